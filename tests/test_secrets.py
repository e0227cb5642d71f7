"""Nothing of the inside gets out: into responses, into the log, into errors and their causes."""

import json
import logging
import os
import string
import traceback
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import httpx
import peewee
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastapi_peewee import Peewee as Extension
from fastapi_peewee import PoolError, connect
from tests import live
from tests.apps import chain
from tests.live import LiveServer, serve
from tests.servers import OwnDatabase

PASSWORD = "canary/pass#word?[%"
ENCODED = quote(PASSWORD, safe="")
SCHEMES = ["postgresql", "mysql"]
#: How many requests each application and database gets to answer in a soak.
SOAK = int(os.environ.get("SECRETS_REQUESTS", 0))


def assert_silent(shown: str) -> None:
    """No part of the password is in it."""
    for part in (PASSWORD, ENCODED, "canary", "pass", "word"):
        assert part not in shown.replace("password", "").replace("user:", "")


def everything_of(error: BaseException) -> str:
    """An error as logs and debuggers show it, with its causes and the contexts left out of them."""
    shown = [*traceback.format_exception(error)]
    todo: list[BaseException | None] = [error]
    while todo:
        each = todo.pop()
        if each is not None:
            shown += [str(each), repr(each), repr(each.args), *getattr(each, "__notes__", ())]
            todo += [each.__cause__, each.__context__]
    return "\n".join(shown)


# The URL's password.


@pytest.mark.parametrize(
    "url",
    [
        "{scheme}://user:{raw}@host/name",
        "{scheme}://user:pass/word@host/name",
        "{scheme}://user:pass#word@host/name",
        "{scheme}://user:pass?word@host/name",
        "{scheme}://user:[pass@host/name",
        "{scheme}://user:pass]word[@host/name",
        "{scheme}://user:pass\u2100word@host/name",
        "{scheme}://user:{encoded}@host:canary/name",
        "{scheme}://user:{encoded}@host",
        "{scheme}:user:{encoded}@host/name",
        "{scheme}//user:{encoded}@host/name",
        "canary:pass@host/name",
        "pass word://user:{encoded}@host/name",
        "user:{encoded}@host/name",
        "{encoded}",
        "{scheme}://user:{encoded}@host/name?pool_size=0",
        "{scheme}://user:{encoded}@host/name?max_connections=8",
    ],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_error_about_a_url_holds_nothing_of_it(url: str, scheme: str) -> None:
    """Whatever is wrong with a URL: the error, with its context, shows no part of a password."""
    with pytest.raises(ValueError, match=r".") as failure:
        connect(url.format(scheme=scheme, raw=PASSWORD, encoded=ENCODED))
    lines = everything_of(failure.value).splitlines()
    source = [line for line in lines if line.startswith("    ")]  # of this file, in the traceback
    assert_silent("\n".join(line for line in lines if line not in source))


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_database_doesnt_show_its_password(
    scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a database as such, nor its pool, nor the error and its causes when it is away, nor
    the log."""
    caplog.set_level(logging.INFO)
    db = connect(f"{scheme}://somebody:{ENCODED}@127.0.0.1:1/nowhere", pool_size=1, timeout=1)
    assert db.connect_params["password"] == PASSWORD
    for thing in (db, db.pool, db.pool_stats, db.Model, db.atomic(), db._state):
        assert_silent(f"{thing!r} {thing}")
    with pytest.raises(PoolError) as failure:
        await db.aexecute_sql("SELECT 1")
    assert len(list(chain(failure.value))) > 1
    assert_silent(everything_of(failure.value))
    assert_silent(caplog.text)
    with pytest.raises(TypeError, match="got: str") as refusal:
        Extension(f"{scheme}://somebody:{ENCODED}@127.0.0.1:1/nowhere")
    assert_silent(str(refusal.value))


@pytest.mark.parametrize("server", ["postgres_url", "mysql_url"])
async def test_a_refused_login_doesnt_show_the_password(
    server: str, request: pytest.FixtureRequest
) -> None:
    """The server's own words about it, which are the cause of our error, don't hold it."""
    parts = urlsplit(request.getfixturevalue(server))
    host = parts.netloc.rpartition("@")[2]
    url = parts._replace(netloc=f"nobody_here:{ENCODED}@{host}").geturl()
    db = connect(url, pool_size=1, timeout=1)
    with pytest.raises(PoolError) as failure:
        await db.aexecute_sql("SELECT 1")
    assert_silent(everything_of(failure.value))


# What many requests bring to light.


class Secret(NamedTuple):
    """What a served application has, and its clients must not see."""

    server: LiveServer
    client: httpx.Client
    url: str
    words: list[str]

    def assert_kept(self, text: str) -> None:
        found = [word for word in self.words if word.lower() in text.lower()]
        assert found == [], text


def assert_canaries(secret: Secret) -> None:
    """The tests aren't vacuous: the rows and names of the application hold canaries, and its
    requests are refused for all the reasons there are. Later on they may have been deleted."""
    if "127.0.0.1:1/" in secret.url:
        assert secret.client.get("/members/").status_code == 503
        return
    with closing(live.plain_database(secret.url)) as db:
        [(hidden,), *_] = (
            peewee.Table("canary members").bind(db).select(peewee.SQL("canary_hidden")).tuples()
        )
        assert "canary" in hidden
    member = {"email": "taken@example.com", "team": 1, "age": 1, "price": 1.0, "note": None}
    asked = [
        ({}, 409, "unique"),
        ({"email": "nobody else, 1", "team": 77}, 422, "reference"),
        ({"email": "nobody else, 2", "age": -1}, 422, "check"),
    ]
    for values, status, kind in asked:
        answer = secret.client.post("/members/", json={**member, **values})
        assert (answer.status_code, answer.json()["detail"][0]["type"]) == (status, kind)


#: Of the database, of how it is spoken to, and of where the code is.
INTERNALS = [
    *("INSERT INTO", "SELECT ", "DELETE FROM", "CONSTRAINT", "DETAIL:", "FOREIGN KEY"),
    *("psycopg", "pymysql", "sqlite", "peewee", "Traceback", "site-packages", ".py"),
]
#: What `tests.live_apps.guarded` has in its rows, and calls its tables, columns and constraints.
ROWS_AND_NAMES = ["canary"]


@pytest.fixture(scope="module", params=["sqlite", "postgres", "mysql", "away"])
def secret(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Secret]:
    """An application whose database, or the way there, is full of canaries."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('canary') / 'canary.db'}"
    elif request.param == "away":
        url = f"postgresql://canary:{ENCODED}@127.0.0.1:1/canary"
    else:
        database: OwnDatabase = request.getfixturevalue(f"{request.param}_database")
        database.empty()
        url = database.url
        if request.param == "postgres":  # which trusts us, and so doesn't look at passwords
            parts = urlsplit(url)
            user, _, host = parts.netloc.rpartition("@")
            user = user.partition(":")[0]
            url = parts._replace(netloc=f"{user}:{ENCODED}@{host}").geturl()
    words = [*ROWS_AND_NAMES, *INTERNALS, PASSWORD, ENCODED, url, urlsplit(url).path.strip("/")]
    with (
        serve("guarded", DATABASE_URL=url) as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
    ):
        secret = Secret(server, client, url, words)
        assert_canaries(secret)
        yield secret
        assert server.log.count("a line at INFO") == 1  # it has what is above DEBUG
        # The name of the logger, which tells of an outage, is nothing of the inside.
        secret.assert_kept(server.log.replace("fastapi_peewee", ""))


ODD_TEXT = st.text(st.characters(), max_size=30) | st.sampled_from(
    [
        *(
            "a",
            "b",
            "taken@example.com",
            "' OR 1=1 --",
            '"; DROP TABLE x; --',
            "%s",
            "${x}",
            "x" * 40,
        ),
        *("../../etc/passwd", "{}", "\0", "\ud800", "1); DROP 1"),
    ]
)
INTEGERS = st.integers(-3, 3) | st.sampled_from([2**15, 2**31, 2**63, 2**70]) | st.integers()
JSON = (
    st.none() | st.booleans() | INTEGERS | st.floats() | ODD_TEXT | st.lists(INTEGERS, max_size=2)
)
MEMBERS = st.fixed_dictionaries(
    {"email": ODD_TEXT, "team": INTEGERS},
    optional={"age": INTEGERS, "price": st.floats(), "note": st.none() | ODD_TEXT},
)
BODIES = (
    MEMBERS | MEMBERS | st.dictionaries(st.sampled_from(["email", "team", "age", "x"]), JSON)
).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40)
PLAIN = st.text(string.ascii_letters + string.digits + "'\"%;-_.", max_size=12)
PATHS = st.one_of(
    st.just("/members/"),
    st.builds("/members/{}".format, INTEGERS | PLAIN.map(lambda text: quote(text, safe=""))),
    st.builds("/teams/{}".format, INTEGERS),
    st.builds("/members/?email={}&limit={}".format, PLAIN.map(quote), INTEGERS | PLAIN.map(quote)),
    st.builds("/{}".format, PLAIN.map(lambda text: quote(text, safe=""))),
)
METHODS = st.sampled_from(["GET", "POST", "POST", "POST", "PUT", "PATCH", "PATCH", "DELETE"])
REQUESTS = st.lists(st.tuples(METHODS, PATHS, BODIES), min_size=1, max_size=10)
STATUSES = {200, 307, 400, 404, 405, 409, 413, 422, 503}


def try_many(secret: Secret, examples: int) -> int:
    """Ask so many times for up to ten things; return how many they were."""
    count = 0

    @settings(settings(), max_examples=examples)
    @given(requests=REQUESTS)
    def answers(requests: list[tuple[str, str, bytes]]) -> None:
        nonlocal count
        for method, path, body in requests:
            count += 1
            headers = {"content-type": "application/json"}
            answer = secret.client.request(method, path, content=body, headers=headers)
            assert answer.status_code in STATUSES, (method, path, body, answer.text)
            secret.assert_kept(f"{answer.text} {answer.headers}")

    answers()
    return count


def test_no_request_brings_to_light_what_is_inside(secret: Secret) -> None:
    """Whatever is asked: neither responses nor the log, above DEBUG, hold a password, a DSN, SQL,
    names of tables, columns and constraints, a path of the code, or others' rows."""
    try_many(secret, settings().max_examples // 4)


@pytest.mark.skipif(not SOAK, reason="for a soak: SECRETS_REQUESTS=10000 (for each database)")
@pytest.mark.timeout(0)
def test_ten_thousand_requests_bring_nothing_to_light(secret: Secret) -> None:
    """The same, as often as `SECRETS_REQUESTS` says."""
    count = 0
    while count < SOAK:
        count += try_many(secret, 200)
    print(f"{count} requests: nothing")
