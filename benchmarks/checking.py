"""Do two servers answer the same? Compared are statuses and what their JSON means."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import httpx

from .stacks import WORKLOADS, Request


class Answer(NamedTuple):
    status: int
    body: Any


Answers = dict[str, list[tuple[Request, Answer]]]


def answers(client: httpx.Client, workloads: Iterable[str]) -> Answers:
    """What a server answers to the requests of each workload, on a database nobody has changed."""
    return {
        name: [(request, ask(client, request)) for request in WORKLOADS[name].compared]
        for name in workloads
    }


def ask(client: httpx.Client, request: Request) -> Answer:
    method = "GET" if request.json is None else "POST"
    response = client.request(method, request.path, json=request.json)
    try:
        return Answer(response.status_code, response.json())
    except ValueError:
        return Answer(response.status_code, response.text)


def differences(ours: Answers, theirs: Answers) -> dict[str, str]:
    """For each workload whose answers aren't the same: where they differ first."""
    found = {}
    for workload, pairs in ours.items():
        for (request, expected), (_, actual) in zip(pairs, theirs[workload], strict=True):
            # As texts, since True == 1 in Python.
            if _canonical(expected) != _canonical(actual):
                found[workload] = _describe(request, expected, actual)
                break
    return found


def _canonical(answer: Answer) -> str:
    return json.dumps(answer, sort_keys=True)


def _describe(request: Request, expected: Answer, actual: Answer) -> str:
    method = "GET" if request.json is None else "POST"
    here, there = _canonical(expected), _canonical(actual)
    pairs = enumerate(zip(here, there, strict=False))
    at = next((n for n, (a, b) in pairs if a != b), min(len(here), len(there)))
    part = slice(max(0, at - 30), at + 50)
    return f"{method} {request.path}: “{there[part]}” instead of “{here[part]}”"
