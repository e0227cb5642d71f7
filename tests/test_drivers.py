"""Waiting for sockets, with `poll()` and, where a system has none, with `select()`."""

import math
import select
import socket
from collections.abc import Iterator

import pytest

from fastapi_peewee.drivers import readable, shut_down, wait_for

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=["poll", "select"])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    if request.param == "select":
        monkeypatch.delattr(select, "poll", raising=False)
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_waiting_for_a_socket(pair: Pair) -> None:
    """It says whether one can read, write or both, and comes back when the time is over."""
    one, other = pair
    assert not readable(one)
    assert wait_for(one, 1, 0.001) == 0
    assert wait_for(one, 2, math.inf) == 2
    assert wait_for(one, 3, 1) == 2
    other.send(b"x")
    assert readable(one)
    assert wait_for(one, 1, math.inf) == 1
    assert wait_for(one, 3, 1) == 3
    assert wait_for(one, 1, -1) == 1


def test_a_socket_that_was_shut_down_can_be_read_to_its_end(pair: Pair) -> None:
    """Whoever waits for it goes on at once; the one that it is done to stays open."""
    one, _ = pair
    shut_down(one.fileno())
    assert readable(one)
    assert one.recv(1) == b""
    shut_down(-1)  # closed by its owner meanwhile
