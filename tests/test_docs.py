"""What README and docs show runs, and does what they say."""

import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastapi_peewee import explain
from tests.live import serve

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?:<!-- (\w+): (\S+) -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page, each with the file name that the comment above it gives."""
    return [(m[2] or "", m[4]) for m in FENCE.finditer(page.read_text()) if m[3] == language]


def marked(page: Path, kind: str) -> list[tuple[str, str]]:
    """The blocks under a comment of this kind, each with the name that the comment gives."""
    return [(m[2], m[4]) for m in FENCE.finditer(page.read_text()) if m[1] == kind]


#: What is run after a page's own code, to see that it did what the page says.
CHECKS = {
    "transactions.md": """
import asyncio, httpx
async def main() -> None:
    await db.acreate_tables([Account, Payment])
    a, b = await Account.acreate(balance=10), await Account.acreate(balance=0)
    await transfer(a.id, b.id, 3)
    await deposit(b.id, 1)
    assert [r.balance for r in await Account.select().order_by(Account.id).aexecute()] == [7, 4]
    assert await report() == 11
    await create()
    await pay(a.id, b.id)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        await client.post(f"/move?source={b.id}&target={a.id}")
        pay_once = f"/payments?key={UUID(int=7)}&amount=5"
        assert [(await client.post(pay_once)).status_code for _ in "12"] == [201, 409]
    assert [r.balance for r in await Account.select().order_by(Account.id).aexecute()] == [2, 4, 0]
    await close(a.id)
    await db.close_pool()
asyncio.run(main())
""",
    "responses.md": """
import asyncio, httpx
from fastapi_peewee import LazyLoad
async def answers(app: FastAPI, path: str) -> str:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        response = await client.get(path)
        assert response.status_code == 200
        return response.text
async def main() -> None:
    ada = await User.acreate(name="Ada")
    for price in range(8):
        await Item.acreate(title=f"item {price}", price=price, owner=ada)
    five = ",".join(f'{{"id":{n + 1},"title":"item {n}"}}' for n in (7, 6, 5, 4, 3))
    two = ",".join(f'{{"id":{n + 1},"title":"item {n}"}}' for n in (6, 7))
    lines = "".join(f'{{"id":{n + 1},"title":"item {n}"}}\\n' for n in range(8))
    assert await answers(app, "/shops") == f'[{{"name":"Ada","items":[{five}]}}]'
    assert await answers(app, "/priced?at_least=6") == f'[{{"id":1,"name":"Ada","items":[{two}]}}]'
    assert await answers(app, "/counts") == '[{"name":"Ada","n":8}]'
    assert await answers(app, "/search?brief=true") == '[{"name":"Ada"}]'
    assert await answers(app, "/search") == await answers(app, "/users")
    assert await answers(app, "/fast/Ada") == await answers(app, "/users/Ada")
    assert await answers(app, "/export") == await answers(app, "/lines") == lines
    try:
        await answers(strict, "/items")
    except LazyLoad as error:
        print(f"{type(error).__name__}: {error}")
    await db.close_pool()
asyncio.run(main())
db.close()
""",
    "connections.md": """
with db.connection_context():
    db.drop_tables([User])
for made in client.__wrapped__():
    test_read(made)
assert db.is_closed() or db.close()
""",
    "deployment.md": """
import asyncio, httpx
async def main() -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        for path in "/live", "/ready":
            response = await client.get(path)
            assert (response.status_code, response.text) == (200, '"ok"')
    assert await db.count(User.select()) == 0
    await db.close_pool()
create_tables()
assert db.is_closed()
asyncio.run(main())
""",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    """The Python blocks of a page, one after the other, run without a warning.

    If the page has blocks of output, they print these.
    """
    code = "\n".join(text for _, text in blocks(page, "python"))
    code += CHECKS.get(page.name, "")
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    if outputs := [text for _, text in marked(page, "output")]:
        assert ran.stdout == "".join(outputs)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    """Every relative link of a page is a file or folder of the repository."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("page", ["README.md", "docs/responses.md"])
def test_the_application_of_a_page_answers_as_the_page_says(page: str, tmp_path: Path) -> None:
    """The application at the top of a page gives the output that stands below it."""
    ((_, program),) = marked(ROOT / page, "file")
    ((_, session),) = marked(ROOT / page, "session")
    (tmp_path / "app.py").write_text(program)
    if page == "README.md":
        assert len([line for line in program.splitlines() if line.strip()]) <= 15
    with serve("app:app", cwd=tmp_path) as server:
        for exchange in session.split("$ ")[1:]:
            command, expected = exchange.strip().split("\n", 1)
            words = shlex.split(command.replace("http://127.0.0.1:8000", server.url))
            assert words[0] == "curl"
            method = words[2] if words[1] == "-X" else "GET"
            assert httpx.request(method, words[-1]).text == expected


def test_the_statement_that_a_page_shows(postgres_url: str) -> None:
    """The SQL on the page of responses is what PostgreSQL is sent, but for spaces."""
    page = ROOT / "docs" / "responses.md"
    ((_, program),) = marked(page, "file")
    ((_, statement),) = marked(page, "statement")
    names: dict[str, Any] = {}
    exec(program.replace("sqlite:///app.db", postgres_url), names)
    try:
        found = explain(names["read_users"](), types.GenericAlias(list, names["UserOut"]))
    finally:
        names["db"].close()
    assert found.plan == "json"
    assert "".join(found.sql.split()) == "".join(statement.split())


def test_the_diagrams_are_what_their_script_draws(tmp_path: Path) -> None:
    """`docs/images/draw.py` makes the SVG files that are there."""
    images = ROOT / "docs" / "images"
    shutil.copy(images / "draw.py", tmp_path)
    subprocess.run([sys.executable, tmp_path / "draw.py"], check=True, timeout=60)
    drawn = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name: path.read_text() for path in images.glob("*.svg")}
    assert drawn
