"""The contract of `sql_app`, the same on each database: what it answers, and what it refuses.

One server serves all tests on one database; each test finds the tables empty.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import peewee
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pwdlib import PasswordHash

from tests import live
from tests.live import LiveServer, Request, serve
from tests.servers import OwnDatabase

KIB = 1024
SECRET = "correct-horse-battery"
REGISTERED = {"detail": "Email already registered"}
NO_USER = {"detail": "User not found"}
COLUMN_RANGE = range(-(2**31), 2**31)
SKIP_RANGE = range(2**63)
LIMIT_RANGE = range(1, 1001)


class Api:
    """A served `sql_app`, a client of it, and its tables, seen from beside it."""

    def __init__(self, url: str, server: LiveServer, client: httpx.Client, db: Any) -> None:
        self.url = url
        self.server = server
        self.client = client
        self.user = peewee.Table(
            "user", ["id", "email", "hashed_password", "is_active"], primary_key="id"
        ).bind(db)
        self.item = peewee.Table(
            "item", ["id", "title", "description", "owner_id"], primary_key="id"
        ).bind(db)

    def empty(self) -> None:
        self.item.delete().execute()
        self.user.delete().execute()

    @property
    def rows(self) -> tuple[int, int]:
        """How many users and items there are."""
        return self.user.select().count(), self.item.select().count()

    def add_user(self, email: str) -> int:
        self.user.insert(email=email, hashed_password="-", is_active=True).execute()
        row = self.user.select(self.user.id).where(self.user.email == email).get()
        user_id: int = row["id"]
        return user_id

    def add_item(self, title: str, owner_id: int) -> None:
        self.item.insert(title=title, description=None, owner_id=owner_id).execute()

    def post(self, path: str, body: bytes, content_type: str | None = "application/json") -> Any:
        headers = {} if content_type is None else {"content-type": content_type}
        return self.client.post(path, content=body, headers=headers)

    def register(self, email: str, password: str = "long enough") -> Any:
        return self.post("/users/", encoded({"email": email, "password": password}))


@pytest.fixture(scope="module", params=["sqlite", "postgres", "mysql"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Api]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('sql_app') / 'test.db'}"
    else:
        database: OwnDatabase = request.getfixturevalue(f"{request.param}_database")
        database.empty()
        url = database.url
    with (
        serve("sql_app", DATABASE_URL=url, SLOWUSERS_STEP="0.001") as server,
        closing(live.plain_database(url)) as db,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
    ):
        yield Api(url, server, client, db)


@pytest.fixture
def api(served: Api) -> Iterator[Api]:
    """The application with empty tables. Afterwards it has logged no error and holds nothing."""
    served.empty()
    errors = len(served.server.errors)
    yield served
    assert served.server.errors[errors:] == []
    assert asyncio.run(live.stats(served.server)).in_use == 0


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def strict_json(answer: Any) -> Any:
    """Its body, which is UTF-8 and JSON as other languages read it: there is no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {answer.content!r}")

    return json.loads(answer.content.decode("utf-8"), parse_constant=refuse)


def check_json(answer: Any, status: int, body: Any) -> None:
    """It has that status and that JSON, and no header but those that say what it is."""
    assert (answer.status_code, strict_json(answer)) == (status, body)
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.headers) == {"content-length", "content-type", "date", "server"}


def check_refused(answer: Any, *statuses: int) -> None:
    """It has one of these statuses and a body in FastAPI's form, which doesn't repeat the input."""
    assert answer.status_code in statuses, (answer.status_code, answer.text)
    if answer.status_code == 413:
        return
    detail = strict_json(answer)["detail"]
    if answer.status_code == 422:
        assert detail
        assert all(set(error) == {"type", "loc", "msg"} for error in detail)
    else:
        assert isinstance(detail, str)


# What the calls answer


def test_registering_answers_the_user(api: Api) -> None:
    """`POST /users/` answers 200 and the user, active and without items."""
    answer = api.register("ada@example.com")

    [row] = api.user.select()
    check_json(
        answer,
        200,
        {"id": row["id"], "email": "ada@example.com", "is_active": True, "items": []},
    )
    assert (row["email"], bool(row["is_active"])) == ("ada@example.com", True)


def test_an_email_is_registered_once(api: Api) -> None:
    """A second `POST /users/` of an email answers 400 and changes nothing."""
    api.register("ada@example.com")
    before = list(api.user.select())

    check_json(api.register("ada@example.com", "another password"), 400, REGISTERED)

    assert list(api.user.select()) == before


@pytest.mark.slow
def test_of_32_parallel_registrations_of_one_email_exactly_one_succeeds(api: Api) -> None:
    """Of 32 parallel `POST /users/` of one email one answers 200 and 31 answer 400; there is one
    user afterwards."""
    check_one_registration_of_32(api, api.server, "ada@example.com")
    assert api.rows == (1, 0)


def test_of_32_registrations_that_reach_the_database_together_exactly_one_succeeds(
    api: Api,
) -> None:
    """The same holds in each of 20 rounds if no hashing of passwords keeps the calls apart."""
    with serve("sql_app_with_quick_hashes", DATABASE_URL=api.url) as server:
        for number in range(20):
            check_one_registration_of_32(api, server, f"round-{number}@example.com")
        assert server.errors == []
    assert api.rows == (20, 0)


def check_one_registration_of_32(api: Api, server: LiveServer, email: str) -> None:
    request = Request("/users/", {"email": email, "password": "long enough"})

    answers = asyncio.run(live.ask_at_once(server, [request] * 32))

    assert Counter(answer.status for answer in answers) == {200: 1, 400: 31}
    assert all(answer.json() == REGISTERED for answer in answers if answer.status == 400)
    [winner] = [answer.json() for answer in answers if answer.status == 200]
    [row] = api.user.select().where(api.user.email == email)
    assert (winner["id"], winner["email"]) == (row["id"], email)


def test_a_user_is_read_with_the_items(api: Api) -> None:
    """`GET /users/{user_id}` answers 200 and the user with exactly its own items."""
    ada, bob = api.add_user("ada"), api.add_user("bob")
    for title, owner in (("a", ada), ("b", bob), ("c", ada)):
        api.add_item(title, owner)
    items = {row["title"]: row["id"] for row in api.item.select()}

    check_json(
        api.client.get(f"/users/{ada}"),
        200,
        {
            "id": ada,
            "email": "ada",
            "is_active": True,
            "items": [
                {"id": items[title], "title": title, "description": None, "owner_id": ada}
                for title in ("a", "c")
            ],
        },
    )


@pytest.mark.parametrize("user_id", [0, -1, COLUMN_RANGE[0], COLUMN_RANGE[-1]])
def test_a_missing_user_is_not_found(user_id: int, api: Api) -> None:
    """Of an id without a user `GET /users/{user_id}` answers 404."""
    check_json(api.client.get(f"/users/{user_id}"), 404, NO_USER)


@pytest.mark.parametrize(
    ("body", "description"),
    [
        ({"title": "tea", "description": "green"}, "green"),
        ({"title": "tea", "description": None}, None),
        ({"title": "tea"}, None),
        ({"title": "tea", "description": ""}, ""),
    ],
)
def test_an_item_is_created_for_a_user(
    body: dict[str, Any], description: str | None, api: Api
) -> None:
    """`POST /users/{user_id}/items/` answers 200 and the item; a description may be null, and is
    if it isn't given."""
    user_id = api.add_user("ada")

    answer = api.post(f"/users/{user_id}/items/", encoded(body))

    [row] = api.item.select()
    expected = {"title": "tea", "description": description, "owner_id": user_id}
    check_json(answer, 200, {"id": row["id"], **expected})
    assert row == {"id": row["id"], **expected}


@pytest.mark.parametrize("user_id", [0, -1, COLUMN_RANGE[0], COLUMN_RANGE[-1]])
def test_an_item_for_a_missing_user_is_not_stored(user_id: int, api: Api) -> None:
    """`POST /users/{user_id}/items/` of an id without a user answers 404 and stores nothing."""
    api.add_user("ada")

    check_json(api.post(f"/users/{user_id}/items/", encoded({"title": "tea"})), 404, NO_USER)

    assert api.rows == (1, 0)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("x" * 255, id="255 characters"),
        pytest.param("\N{GRINNING FACE}" * 255, id="255 characters of 4 bytes"),
        pytest.param("", id="none"),
        pytest.param(" a\tb\r\nc ", id="white space"),
        pytest.param("'; DROP TABLE item; -- %s %(a)s ? :a \\ \" `", id="quotes"),
        pytest.param("e\u0301\u200b\u202e\ufeff\ufffe", id="unusual characters"),
        pytest.param("\x01\x1f\x7f\x80", id="control characters"),
    ],
)
def test_text_is_stored_as_it_came(text: str, api: Api) -> None:
    """Whatever text is within the column's length comes back, unchanged, from each call."""
    user = api.register(text)
    assert (user.status_code, user.json()["email"]) == (200, text)
    user_id = user.json()["id"]

    body = {"title": text, "description": text}
    item = api.post(f"/users/{user_id}/items/", encoded(body))

    check_json(item, 200, {**body, "id": item.json()["id"], "owner_id": user_id})
    check_json(api.client.get("/items/"), 200, [item.json()])
    check_json(api.client.get("/users/"), 200, [{**user.json(), "items": [item.json()]}])


@pytest.fixture
def seven_users(api: Api) -> list[dict[str, Any]]:
    """Seven users with 0 to 6 items, as they are to be read. Rows don't lie in their ids' order."""
    ids = [api.add_user(f"user-{n}") for n in range(7)]
    for n in range(6):
        for owner in reversed(ids[n + 1 :]):
            api.add_item(f"item-{n}", owner)
    # PostgreSQL writes a changed row to a new place, which is where it then finds it.
    for user_id in ids[::2]:
        api.user.update(hashed_password="+").where(api.user.id == user_id).execute()
    first = api.item.select(peewee.fn.MIN(api.item.id)).scalar()
    api.item.update(description="changed").where(api.item.id == first).execute()
    items = sorted(api.item.select(), key=lambda row: row["id"])
    return [
        {
            "id": user_id,
            "email": f"user-{n}",
            "is_active": True,
            "items": [row for row in items if row["owner_id"] == user_id],
        }
        for n, user_id in enumerate(ids)
    ]


def test_a_user_s_items_are_in_id_order(seven_users: list[dict[str, Any]], api: Api) -> None:
    """`GET /users/{user_id}` answers with the user's items in the order of their ids, wherever
    the database keeps them."""
    for user in seven_users:
        check_json(api.client.get(f"/users/{user['id']}"), 200, user)


@pytest.mark.parametrize("path", ["/users/", "/slowusers/"])
@pytest.mark.parametrize(
    ("query", "window"),
    [
        ("", slice(0, 100)),
        ("?skip=2", slice(2, 102)),
        ("?limit=3", slice(0, 3)),
        ("?skip=5&limit=1", slice(5, 6)),
        ("?skip=6&limit=1000", slice(6, 1006)),
        ("?skip=7", slice(0, 0)),
        (f"?skip={SKIP_RANGE[-1]}", slice(0, 0)),
    ],
)
def test_users_are_listed_in_id_order_with_their_items(
    path: str, query: str, window: slice, seven_users: list[dict[str, Any]], api: Api
) -> None:
    """`GET /users/` and `GET /slowusers/` answer 200 and the users from `skip` on, at most `limit`
    (by default 100), in the order of their ids, each with exactly its own items."""
    check_json(api.client.get(path + query), 200, seven_users[window])


@pytest.mark.parametrize(
    ("query", "window"),
    [
        ("", slice(0, 100)),
        ("?skip=4&limit=10", slice(4, 14)),
        ("?skip=20&limit=1000", slice(20, 1020)),
        ("?skip=21", slice(0, 0)),
        (f"?skip={SKIP_RANGE[-1]}&limit=1000", slice(0, 0)),
    ],
)
def test_items_are_listed_in_id_order(
    query: str, window: slice, seven_users: list[dict[str, Any]], api: Api
) -> None:
    """`GET /items/` answers 200 and the items from `skip` on, at most `limit` (by default 100), in
    the order of their ids."""
    items = sorted((item for user in seven_users for item in user["items"]), key=lambda i: i["id"])
    assert len(items) == 21

    check_json(api.client.get(f"/items/{query}"), 200, items[window])


@pytest.mark.parametrize("path", ["/users/", "/items/", "/slowusers/"])
def test_a_list_has_100_entries_unless_told_otherwise(path: str, api: Api) -> None:
    """By default a list ends after 100 of 101 rows; `limit=1000` has them all."""
    user_ids = [api.add_user(f"user-{n}") for n in range(101)]
    for n in range(101):
        api.add_item(f"item-{n}", user_ids[0])

    assert len(api.client.get(path).json()) == 100
    assert len(api.client.get(f"{path}?limit=1000").json()) == 101


# Passwords


@pytest.mark.parametrize(
    "password",
    [
        pytest.param("x" * 8, id="8 characters"),
        pytest.param("x" * 1024, id="1024 characters"),
        pytest.param("\N{GRINNING FACE}" * 8, id="8 characters of 4 bytes"),
        pytest.param("\N{GRINNING FACE}" * 1024, id="1024 characters of 4 bytes"),
        pytest.param("  white space  ", id="white space"),
        pytest.param("e\u0301 and \u00e9", id="not normalised"),
    ],
)
def test_a_password_of_8_to_1024_characters_is_stored_as_argon2id_of_just_it(
    password: str, api: Api
) -> None:
    """Of a password only an argon2id hash is stored, with the parameters that OWASP asks for; it
    is the hash of the password as it came."""
    assert api.register("ada", password).status_code == 200

    [row] = api.user.select()
    _, kind, version, parameters, *_ = row["hashed_password"].split("$")
    assert (kind, version) == ("argon2id", "v=19")
    costs = {
        name: int(value) for name, value in (part.split("=") for part in parameters.split(","))
    }
    assert costs["m"] >= 19456
    assert costs["t"] >= 2
    assert costs["p"] >= 1
    assert PasswordHash.recommended().verify(password, row["hashed_password"])
    assert not PasswordHash.recommended().verify(password.strip()[:-1], row["hashed_password"])


@pytest.mark.parametrize("length", [0, 1, 7, 1025, 60_000])
def test_a_password_of_another_length_is_refused(length: int, api: Api) -> None:
    """Passwords of less than 8 and of more than 1,024 characters answer 422."""
    check_refused(api.register("ada", "x" * length), 422)
    assert api.rows == (0, 0)


@pytest.mark.parametrize(
    ("path", "body", "content_type"),
    [
        pytest.param("/users/", encoded({"email": "a", "password": SECRET}), None, id="untyped"),
        pytest.param(
            "/users/", encoded({"email": "a", "password": SECRET}), "text/plain", id="text"
        ),
        pytest.param(
            "/users/",
            f"email=a&password={SECRET}".encode(),
            "application/x-www-form-urlencoded",
            id="form",
        ),
        *(
            pytest.param("/users/", body, "application/json", id=name)
            for name, body in {
                "taken": encoded({"email": "taken", "password": SECRET}),
                "no email": encoded({"password": SECRET}),
                "bad email": encoded({"email": "\0", "password": SECRET}),
                "no object": encoded([{"email": "a", "password": SECRET}]),
                "unknown field": encoded({"email": "a", "password": SECRET, "id": 1}),
                "misspelt": encoded({"email": "a", "pasword": SECRET}),
                "too short": encoded({"email": "a", "password": SECRET[:7]}),
                "too long": encoded({"email": "a", "password": SECRET * 100}),
                "in a list": encoded({"email": "a", "password": [SECRET]}),
                "in an object": encoded({"email": "a", "password": {"is": SECRET}}),
                "as the email": encoded({"email": [SECRET], "password": SECRET}),
                "cut off": encoded({"email": "a", "password": SECRET})[:-2],
                "and a surrogate": encoded({"email": "a", "password": SECRET + "\ud800"}),
                "not UTF-8": encoded({"email": "a", "password": SECRET})[:-1] + b"\xff}",
                "too big": encoded({"email": "a" * 100_000, "password": SECRET}),
            }.items()
        ),
        pytest.param(
            "/users/1/items/",
            encoded({"title": "a", "password": SECRET}),
            "application/json",
            id="for an item",
        ),
        pytest.param(
            f"/users/{SECRET}/items/", encoded({"title": "a"}), "application/json", id="in the path"
        ),
        pytest.param(
            f"/users/?password={SECRET}", encoded({}), "application/json", id="in the query"
        ),
    ],
)
def test_a_refused_call_does_not_repeat_the_password(
    path: str, body: bytes, content_type: str | None, api: Api
) -> None:
    """Whatever is wrong with a call that has a password in it, neither answer nor log has it."""
    api.add_user("taken")

    answer = api.post(path, body, content_type)

    check_refused(answer, 400, 413, 422)
    assert SECRET[:7] not in f"{answer.headers} {answer.text}"
    assert SECRET[:7] not in api.server.log
    assert api.rows == (1, 0)


def test_no_answer_has_the_password_or_its_hash(api: Api) -> None:
    """No call answers with a user's password or hash."""
    user_id = api.register("ada", SECRET).json()["id"]
    api.post(f"/users/{user_id}/items/", encoded({"title": "tea"}))
    [row] = api.user.select()

    answers = [
        api.register("bob", SECRET),
        api.register("ada", SECRET),
        *map(api.client.get, ["/users/", f"/users/{user_id}", "/items/", "/slowusers/"]),
    ]

    for answer in answers:
        seen = f"{answer.headers} {answer.text}"
        assert "ada" in seen or "bob" in seen or "tea" in seen or answer.status_code == 400
        assert SECRET not in seen
        assert "password" not in seen
        assert row["hashed_password"].rpartition("$")[2] not in seen
    assert SECRET not in api.server.log


# What is refused


@pytest.mark.parametrize("path", ["/users/", "/items/", "/slowusers/"])
@pytest.mark.parametrize(
    "query",
    [
        *(f"skip={value}" for value in (-1, 2**63, -(2**63), 10**30, -(10**30))),
        *(f"limit={value}" for value in (0, -1, 1001, 2**63, 10**30, -(10**30))),
        *(
            f"{name}={value}"
            for name in ("skip", "limit")
            for value in (
                *("", "a", "1.5", "1e400", "NaN", "Infinity", "-Infinity", "null", "true", "0x10"),
                *("%00", "1%00", "%ED%A0%80", "%FF", "[1]", "1,2", "1;DROP TABLE item", "%27"),
                "9" * 5_000,
            )
        ),
        "skip=1&limit=0",
        "skip=-1&limit=1",
    ],
    ids=lambda query: query[:24],
)
def test_a_window_out_of_range_is_refused(path: str, query: str, api: Api) -> None:
    """`skip` below 0, `limit` outside 1 to 1,000, and what isn't a whole number answer 422."""
    check_refused(api.client.get(f"{path}?{query}"), 422)


@pytest.mark.parametrize(
    "user_id",
    [
        *map(str, (2**31, -(2**31) - 1, 2**63, 10**20, 10**30, -(10**30))),
        *("a", "1.5", "NaN", "Infinity", "null", "true", "%00", "1%00", "%ED%A0%80", "%FF", "%20"),
        "9" * 5_000,
    ],
    ids=lambda user_id: user_id[:24],
)
def test_an_id_outside_its_column_is_refused(user_id: str, api: Api) -> None:
    """An id that the column couldn't hold answers 422, for reading a user and for adding items."""
    check_refused(api.client.get(f"/users/{user_id}"), 422)
    check_refused(api.post(f"/users/{user_id}/items/", encoded({"title": "tea"})), 422)
    assert api.rows == (0, 0)


NESTED = {
    "lists": b"[" * 30_000 + b"]" * 30_000,
    "objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "unclosed": b"[" * 60_000,
}
NO_OBJECTS = {
    "nothing": b"",
    "white space": b"  ",
    "null": b"null",
    "true": b"true",
    "a number": b"5",
    "a string": b'"email"',
    "a list": b"[]",
    "a list of lists": b'[["email", "a"], ["password", "long enough"]]',
    "NaN": b"NaN",
    "an open object": b"{",
    "a missing comma": b'{"a": 1 "b": 2}',
    "single quotes": b"{'a': 1}",
    "a comment": b"{} // comment",
    "two values": b"{} {}",
    "XML": b"<a/>",
    "a NUL": b"\x00",
    **{f"nested {name}": body for name, body in NESTED.items()},
}
# Python's JSON parser gives up before there is anything to validate, and FastAPI calls that 400.
UNREADABLE = {
    "not UTF-8": b"\xff\xfe\xfd",
    "a cut character": b'{"a": "\xf0\x9f"}',
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5_000 + b"}",
}
#: What a field of text may not be.
NO_TEXT: dict[str, bytes] = {
    "a number": b"5",
    "a huge number": b"1" + b"0" * 30,
    "infinite": b"1e400",
    "NaN": b"NaN",
    "Infinity": b"Infinity",
    "-Infinity": b"-Infinity",
    "true": b"true",
    "a list": b'["a"]',
    "an object": b'{"a": "b"}',
    "NUL": b'"a\\u0000b"',
    "a lone surrogate": b'"\\ud800"',
    "surrogates the wrong way round": b'"\\udc00\\ud800"',
    "a lone surrogate in bytes": b'"\xed\xa0\x80"',
    "256 characters": b'"' + b"x" * 256 + b'"',
    "256 characters of 4 bytes": b'"' + "\N{GRINNING FACE}".encode() * 256 + b'"',
    "60,000 characters": b'"' + b"x" * 60_000 + b'"',
    "nested lists": b"[" * 900 + b"]" * 900,
}
BAD_USERS = {
    "no email": b'{"password": "long enough"}',
    "no password": b'{"email": "a"}',
    "neither": b"{}",
    "null email": b'{"email": null, "password": "long enough"}',
    "null password": b'{"email": "a", "password": null}',
    "a number as password": b'{"email": "a", "password": 12345678}',
    "a list as password": b'{"email": "a", "password": ["1", "2", "3", "4", "5", "6", "7", "8"]}',
    "NaN as password": b'{"email": "a", "password": NaN}',
    "a lone surrogate in the password": b'{"email": "a", "password": "long enough\\udfff"}',
    "an unknown field": b'{"email": "a", "password": "long enough", "name": "b"}',
    "an id": b'{"email": "a", "password": "long enough", "id": 1}',
    "is_active": b'{"email": "a", "password": "long enough", "is_active": false}',
    "a hash": b'{"email": "a", "password": "long enough", "hashed_password": "x"}',
    "a lone surrogate as field": b'{"email": "a", "password": "long enough", "\\ud800": 1}',
    **{
        f"email: {name}": b'{"email": %s, "password": "long enough"}' % value
        for name, value in NO_TEXT.items()
    },
}
BAD_ITEMS = {
    "no title": b'{"description": "b"}',
    "null title": b'{"title": null}',
    "an unknown field": b'{"title": "a", "name": "b"}',
    "an id": b'{"title": "a", "id": 1}',
    "another owner": b'{"title": "a", "owner_id": 1}',
    **{f"title: {name}": b'{"title": %s}' % value for name, value in NO_TEXT.items()},
    **{
        f"description: {name}": b'{"title": "a", "description": %s}' % value
        for name, value in NO_TEXT.items()
    },
}


@pytest.mark.parametrize("name", [*NO_OBJECTS, *BAD_USERS])
def test_a_user_that_is_not_as_described_is_refused(name: str, api: Api) -> None:
    """A body that isn't JSON, lacks a field, has one too many, or a value of another type or out
    of range: `POST /users/` answers 422, and nothing is stored."""
    check_refused(api.post("/users/", (NO_OBJECTS | BAD_USERS)[name]), 422, *unparsed(name))
    assert api.rows == (0, 0)


@pytest.mark.parametrize("name", [*NO_OBJECTS, *BAD_ITEMS])
def test_an_item_that_is_not_as_described_is_refused(name: str, api: Api) -> None:
    """A body that isn't JSON, lacks a field, has one too many, or a value of another type or out
    of range: `POST /users/{user_id}/items/` answers 422, and nothing is stored."""
    path = f"/users/{api.add_user('ada')}/items/"
    check_refused(api.post(path, (NO_OBJECTS | BAD_ITEMS)[name]), 422, *unparsed(name))
    assert api.rows == (1, 0)


def unparsed(name: str) -> list[int]:
    """Python's parser recurses, and FastAPI answers 400 when it is too deep for it."""
    return [400] if name.startswith("nested") else []


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_body_that_cannot_be_parsed_is_refused(name: str, api: Api) -> None:
    """Bytes that aren't text and numbers that Python won't read answer 400 or 422."""
    user_id = api.add_user("ada")
    for path in ("/users/", f"/users/{user_id}/items/"):
        check_refused(api.post(path, UNREADABLE[name]), 400, 422)
    assert api.rows == (1, 0)


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/xml",
        "application/octet-stream",
        "json",
        "/",
    ],
)
def test_json_that_is_not_called_json_is_refused(content_type: str | None, api: Api) -> None:
    """A body whose content type isn't JSON, or that has none, answers 422 (browsers send such
    across sites without asking)."""
    user = encoded({"email": "a", "password": "long enough"})
    check_refused(api.post("/users/", user, content_type), 422)

    path = f"/users/{api.add_user('ada')}/items/"
    check_refused(api.post(path, encoded({"title": "tea"}), content_type), 422)

    assert api.rows == (1, 0)


@pytest.mark.parametrize("size", [64 * KIB + 1, 65 * KIB, 100_000, 2_000_000])
@pytest.mark.parametrize("chunked", [False, True], ids=["sized", "chunked"])
@pytest.mark.parametrize("padding", ["white space", "value"])
def test_a_body_of_more_than_64_kib_is_too_large(
    size: int, chunked: bool, padding: str, api: Api
) -> None:
    """Bodies over 64 KiB answer 413, whether their size is announced or not, and store nothing."""
    user_id = api.add_user("ada")
    for path, body in (
        ("/users/", encoded({"email": "a", "password": "long enough"})),
        (f"/users/{user_id}/items/", encoded({"title": "tea"})),
    ):
        missing = size - len(body)
        full = body + b" " * missing
        if padding == "value":
            full = body.replace(b'"}', b"x" * missing + b'"}')
        assert len(full) == size
        content: Any = (full[n : n + 8 * KIB] for n in range(0, size, 8 * KIB)) if chunked else full

        answer = api.client.post(
            path, content=content, headers={"content-type": "application/json"}
        )

        check_refused(answer, 413)
        assert len(answer.content) < 100
    assert api.rows == (1, 0)


def test_a_body_of_64_kib_is_not_too_large(api: Api) -> None:
    """A body of exactly 64 KiB is read."""
    body = encoded({"email": "ada", "password": "long enough"}).ljust(64 * KIB)

    assert api.post("/users/", body).status_code == 200
    assert api.rows == (1, 0)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/users/1/items/", 405),
        ("GET", "/users/1/2", 404),
        ("GET", "/users/1%2F2", 404),
        ("DELETE", "/users/1", 405),
        ("PUT", "/users/", 405),
        ("POST", "/items/", 405),
        ("POST", "/slowusers/", 405),
        ("GET", "/%00", 404),
        ("GET", "/%ED%A0%80", 404),
    ],
)
def test_what_is_not_in_the_contract_is_not_there(
    method: str, path: str, status: int, api: Api
) -> None:
    """Other paths answer 404, other methods 405."""
    check_refused(api.client.request(method, path), status)


def test_a_405_says_which_methods_the_path_has(api: Api) -> None:
    """`Allow` has them all, of whichever route."""
    for path, methods in (
        ("/users/", "GET, POST"),
        ("/users/1", "GET"),
        ("/users/1/items/", "POST"),
        ("/items/", "GET"),
    ):
        answer = api.client.request("PUT", path)
        check_refused(answer, 405)
        assert answer.headers["allow"] == methods


def test_a_url_of_100_kib_is_refused_by_the_server(api: Api) -> None:
    """Uvicorn reads URLs of up to 64 KiB and answers 400 to longer ones, before the application
    sees them; it goes on serving."""
    for path in ("/users/?x=", "/users/", "/items/?limit="):
        for size in (100 * KIB, 1024 * KIB):
            head = f"GET {path}{'1' * size} HTTP/1.1\r\nhost: test\r\n\r\n"
            assert live.ask_raw(api.server, head).startswith(b"HTTP/1.1 400 ")
    check_json(api.client.get("/users/"), 200, [])


METACHARACTERS = [
    "' OR '1'='1",
    '" OR ""="',
    "1; DROP TABLE item; --",
    "'); DELETE FROM user; --",
    "a' UNION SELECT hashed_password FROM user --",
    "${7*7}{{7*7}}",
    "%s %(email)s %%",
    "? :1 $1 @x",
    "\\'; --",
    "`user`",
    "/* */ #",
    "_%",
    "<script>alert(1)</script>",
    "a\r\nSet-Cookie: b=c",
    "__class__",
    "$(sleep 9)",
]


def test_what_would_mean_something_in_sql_is_text(api: Api) -> None:
    """In a body it is stored and found as it is; in a path or a query it is refused."""
    expected = []
    for text in METACHARACTERS:
        user = api.register(text).json()
        body = encoded({"title": text, "description": text})
        item = api.post(f"/users/{user['id']}/items/", body).json()
        shown = {"title": text, "description": text, "owner_id": user["id"], "id": item["id"]}
        expected.append({"id": user["id"], "email": text, "is_active": True, "items": [shown]})
        raw = quote(text, safe="")
        path_status = 404 if "%2F" in raw else 422  # a slash leads elsewhere
        check_refused(api.client.get(f"/users/{raw}"), path_status)
        check_refused(api.post(f"/users/{raw}/items/", body), path_status)
        for path in (f"/users/?skip={raw}", f"/items/?limit={raw}", f"/slowusers/?limit={raw}"):
            check_refused(api.client.get(path), 422)
    check_json(api.client.get("/users/"), 200, expected)


def test_openapi_has_what_the_calls_answer(api: Api) -> None:
    """Each call declares its statuses, those included that FastAPI answers of itself."""
    paths = api.client.get("/openapi.json").json()["paths"]
    declared = {
        f"{method.upper()} {path}": sorted(map(int, call["responses"]))
        for path, calls in paths.items()
        for method, call in calls.items()
    }
    assert declared == {
        "POST /users/": [200, 400, 405, 409, 413, 422, 503],
        "GET /users/": [200, 405, 422, 503],
        "GET /users/{user_id}": [200, 404, 405, 422, 503],
        "POST /users/{user_id}/items/": [200, 400, 404, 405, 409, 413, 422, 503],
        "GET /items/": [200, 405, 422, 503],
        "GET /slowusers/": [200, 405, 422, 503],
    }
    allow = paths["/users/"]["get"]["responses"]["405"]["headers"]["Allow"]
    assert allow == {"schema": {"type": "string"}, "required": True}


# Garbage

ANY_TEXT = st.text(st.characters(), max_size=40)  # lone surrogates and NUL among them
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=10,
)
FIELDS = JSON_VALUES | ANY_TEXT | st.text("x", min_size=6, max_size=12) | st.text("x", min_size=254)
OBJECTS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("email", "password", "title", "description", "id", "owner_id"), FIELDS),
) | st.fixed_dictionaries({"title": FIELDS}, optional={"description": FIELDS})
BODIES = st.binary(max_size=200) | (OBJECTS | OBJECTS | JSON_VALUES).map(encoded)

garbage = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@garbage
@given(body=BODIES, path=st.sampled_from(["/users/", "/users/{}/items/", "/users/0/items/"]))
def test_no_body_whatever_is_an_error_of_the_server(body: bytes, path: str, api: Api) -> None:
    """Any body is answered with 200 and stored as one row, or is refused and not stored."""
    api.empty()
    path = path.format(api.add_user("ada"))
    users, items = api.rows

    answer = api.post(path, body)

    if answer.status_code == 200:
        strict_json(answer)
        assert sum(api.rows) == users + items + 1
    else:
        check_refused(answer, 400, 404, 422)
        assert api.rows == (users, items)


RAW_VALUES = (
    st.integers().map(str)
    | st.integers(-2, 1002).map(str)
    | st.sampled_from([2**31, 2**63, 10**30]).map(str)
    | ANY_TEXT.map(lambda text: quote(text.encode("utf-8", "surrogatepass"), safe=""))
    | st.binary(max_size=8).map(lambda octets: quote(octets, safe=""))
)


@garbage
@given(
    path=st.sampled_from(["/users/", "/items/", "/slowusers/"]),
    query=st.lists(
        st.tuples(st.sampled_from(["skip", "limit", "%00", "x"]), RAW_VALUES), max_size=4
    ),
)
@example(path="/users/", query=[("skip", "-1"), ("skip", "1")])
def test_no_query_whatever_is_an_error_of_the_server(
    path: str, query: list[tuple[str, str]], api: Api
) -> None:
    """Any query string is answered with 200 and a list, or 422; it is 200 exactly if the numbers
    in it are in range."""
    answer = api.client.get(f"{path}?{'&'.join(f'{name}={value}' for name, value in query)}")

    assert answer.status_code in (200, 422)
    if answer.status_code == 200:
        assert strict_json(answer) == []
    else:
        check_refused(answer, 422)
    last = {name: value for name, value in query if name in ("skip", "limit")}
    if all(value.removeprefix("-").isdecimal() and value.isascii() for value in last.values()):
        in_range = (
            int(last.get("skip", "0")) in SKIP_RANGE
            and int(last.get("limit", "100")) in LIMIT_RANGE
        )
        assert answer.status_code == (200 if in_range else 422)


@garbage
# A slash leads elsewhere, and so does a line's end, which Starlette overlooks after `/users/`.
@given(
    user_id=RAW_VALUES.filter(lambda id_: id_ not in ("", ".", "..", "%0A") and "%2F" not in id_)
)
def test_no_id_whatever_is_an_error_of_the_server(user_id: str, api: Api) -> None:
    """Whatever a path has for an id is answered with 404 or 422: with 404 exactly if it is a number
    that the column could hold."""
    for answer in (
        api.client.get(f"/users/{user_id}"),
        api.post(f"/users/{user_id}/items/", encoded({"title": "tea"})),
    ):
        check_refused(answer, 404, 422)
        if user_id.removeprefix("-").isdecimal() and user_id.isascii():
            assert answer.status_code == (404 if int(user_id) in COLUMN_RANGE else 422)
    assert api.rows == (0, 0)


# Settings


async def test_without_settings_it_makes_a_sqlite_file_in_the_working_directory(
    tmp_path: Path,
) -> None:
    """`uvicorn sql_app.main:app` serves, by default, from `test.db`, and users outlive it."""
    user = {"email": "ada", "password": "long enough"}
    with serve("sql_app.main:app", cwd=tmp_path) as server:
        created = (await live.ask(server, "/users/", user)).json()
    assert (tmp_path / "test.db").is_file()

    with serve("sql_app.main:app", cwd=tmp_path) as server:
        assert (await live.ask(server, "/users/")).json() == [created]
        assert server.errors == []


def test_slowusers_counts_in_seconds_by_default(tmp_path: Path) -> None:
    """`SLOWUSERS_STEP` is one second unless it is set."""
    root = Path(__file__).parents[1]
    program = "import sys; sys.path.insert(0, sys.argv[1]); from sql_app import main"
    shown = subprocess.run(
        [sys.executable, "-c", f"{program}; print(main.SLOWUSERS_STEP)", str(root)],
        cwd=tmp_path,
        env={},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "1.0\n"


async def test_slowusers_sleeps_shorter_from_call_to_call_and_holds_its_connection(
    sqlite_url: str,
) -> None:
    """`GET /slowusers/` sleeps 9 steps, then 8, … then 0, and has a connection meanwhile."""
    step = 0.05
    with serve("sql_app", DATABASE_URL=sqlite_url, SLOWUSERS_STEP=str(step)) as server:

        async def held() -> bool:
            return (await live.stats(server)).in_use == 1

        first = asyncio.ensure_future(live.ask(server, "/slowusers/"))
        await live.until(held, "the call holds a connection")
        assert not first.done()
        assert (await first).seconds >= 9 * step
        for steps in range(8, 0, -1):
            assert (await live.ask(server, "/slowusers/")).seconds >= steps * step
        # The best of some, on a machine with other things to do.
        awake = [await live.ask(server, "/slowusers/") for _ in range(5)]
        assert min(answer.seconds for answer in awake) < step
        assert not await held()


def test_a_script_uses_the_same_functions(tmp_path: Path) -> None:
    """What endpoints call, a script calls: it registers users, finds them, and makes tables, which
    is tried again while others make them, but not for ever, nor without a database."""
    program = """
import asyncio
import peewee
from fastapi_peewee import DatabaseUnavailable
from sql_app import crud, main, schemas
from sql_app.database import db

asyncio.run(main.create_tables())
with db.connection_context():
    user = crud.create_user(schemas.UserCreate(email="ann@example.com", password="long enough"))
    assert user.hashed_password.startswith("$argon2")
    assert crud.get_user(user.id) == crud.get_user_by_email("ann@example.com") == user
    assert crud.get_user(7) is crud.get_user_by_email("bob@example.com") is None

attempts, make = [], db.acreate_tables

async def refuse(models):
    attempts.append(models)
    if len(attempts) == 3:
        return await make(models)
    raise peewee.OperationalError("table user already exists")

db.acreate_tables = refuse
asyncio.run(main.create_tables())
print(len(attempts))
try:
    asyncio.run(main.create_tables())
except peewee.OperationalError:
    print(len(attempts))

async def nowhere(models):
    attempts.append(models)
    raise DatabaseUnavailable

db.acreate_tables = nowhere
try:
    asyncio.run(main.create_tables())
except DatabaseUnavailable:
    print(len(attempts))
asyncio.run(db.close_pool())
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "DATABASE_URL": f"sqlite:///{tmp_path}/app.db"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.stdout, ran.returncode) == ("3\n13\n14\n", 0), ran.stderr
