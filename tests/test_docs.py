"""What README and docs show runs, and does what they say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.live import serve

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?:<!-- (\w+): (\S+) -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page, each with the file name that the comment above it gives."""
    return [(m[2] or "", m[4]) for m in FENCE.finditer(page.read_text()) if m[3] == language]


#: What is run after a page's own code, to see that it did what the page says.
CHECKS = {
    "transactions.md": """
import asyncio
async def main() -> None:
    await db.acreate_tables([Account])
    a, b = await Account.acreate(balance=10), await Account.acreate(balance=0)
    await transfer(a.id, b.id, 3)
    await deposit(b.id, 1)
    assert [r.balance for r in await Account.select().order_by(Account.id).aexecute()] == [7, 4]
    assert await report() == 11
    await create()
    await db.close_pool()
asyncio.run(main())
""",
    "connections.md": "assert db.is_closed() or db.close()",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    """The Python blocks of a page, one after the other, run without a warning."""
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    """Every relative link of a page is a file or folder of the repository."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


def test_the_readmes_application_answers_as_the_readme_says(tmp_path: Path) -> None:
    """The application on the README's first screen gives the output that stands below it."""
    page = ROOT / "README.md"
    (program,) = (text for name, text in blocks(page, "python") if name == "app.py")
    (session,) = (text for name, text in blocks(page, "console") if name == "app.py")
    (tmp_path / "app.py").write_text(program)
    assert len([line for line in program.splitlines() if line.strip()]) <= 15
    with serve("app:app", cwd=tmp_path) as server:
        for exchange in session.split("$ ")[1:]:
            command, expected = exchange.strip().split("\n", 1)
            words = shlex.split(command.replace("http://127.0.0.1:8000", server.url))
            assert words[0] == "curl"
            method = words[2] if words[1] == "-X" else "GET"
            assert httpx.request(method, words[-1]).text == expected
