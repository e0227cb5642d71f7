"""What the server of PostgreSQL says that it was asked, while `sql_app` answers."""

from benchmarks.counting import Counts, counted
from tests.live import Connection, Request, serve

READS = ["/users/?limit=100", "/users/1", "/items/?limit=100"]


async def test_one_statement_and_one_round_trip_for_each_read(postgres_url: str) -> None:
    """Each read of `sql_app` is one statement and one round trip: no BEGIN, ping or reset."""
    with (
        counted(postgres_url) as tally,
        serve("sql_app.main:app", DATABASE_URL=tally.settings["DATABASE_URL"]) as server,
    ):
        connection = await Connection.to(server)
        user = {"email": "ada@example.com", "password": "correct horse"}
        assert (await connection.ask(Request("/users/", user))).status == 200
        assert (await connection.ask(Request("/users/1/items/", {"title": "a"}))).status == 200
        for path in READS:
            for _ in range(3):  # the second time it is prepared
                assert (await connection.ask(Request(path))).status == 200
            before = tally.settled()
            for _ in range(5):
                answer = await connection.ask(Request(path))
                assert b'"title":"a"' in answer.body
            after = tally.settled()
            assert Counts(*(b - a for a, b in zip(before, after, strict=True))) == Counts(5, 5)
        await connection.close()
