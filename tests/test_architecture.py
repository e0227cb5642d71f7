"""The imports inside the library point one way, and what is private is used in one place."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import fastapi_peewee

PACKAGE = Path(fastapi_peewee.__file__).parent

#: Each module may import those before it, and no others.
ORDER = [
    "exceptions",
    "gate",
    "state",
    "shapes",
    "templates",
    "sql_cache",
    "single",
    "workers",
    "breaker",
    "watchdog",
    "leaks",
    "pool",
    "calls",
    "blocks",
    "outcomes",
    "retries",
    "verbs",
    "async_names",
    "reads",
    "database",
    "drivers",
    "sockets",
    "libpq",
    "files",
    "inline",
    "writers",
    "group_commit",
    "sqlite",
    "postgresql",
    "mysql",
    "backends",
    "values",
    "schemas",
    "trees",
    "annotations",
    "response_types",
    "columns",
    "json_sql",
    "reading",
    "plans",
    "loading",
    "refusals",
    "handlers",
    "responses",
    "routing",
    "lifecycle",
    "__init__",
]
KNOW_FASTAPI = {"handlers", "responses", "routing", "lifecycle"}
KNOW_PYDANTIC = KNOW_FASTAPI | {"annotations", "response_types", "schemas", "values"}


class Import(NamedTuple):
    module: str  # ours, which imports
    source: str
    name: str | None  # None for `import source`
    typing_only: bool
    local: bool  # inside a function

    @property
    def is_ours(self) -> bool:
        return self.source.startswith(".") or self.package == "fastapi_peewee"

    @property
    def package(self) -> str:
        return self.source.partition(".")[0]


def imports_of(path: Path) -> Iterator[Import]:
    def walk(node: ast.AST, typing_only: bool, local: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(path.stem, alias.name, None, typing_only, local)
            elif isinstance(child, ast.ImportFrom):
                source = "." * child.level + (child.module or "")
                for alias in child.names:
                    yield Import(path.stem, source, alias.name, typing_only, local)
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                yield from walk(child, True, local)
            else:
                within = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                yield from walk(child, typing_only, local or within)

    yield from walk(ast.parse(path.read_text()), False, False)


IMPORTS = [found for path in sorted(PACKAGE.glob("*.py")) for found in imports_of(path)]


def test_every_module_has_its_place() -> None:
    """A new module must be given its place in the order of imports."""
    assert {path.stem for path in PACKAGE.rglob("*.py")} == set(ORDER)
    assert len(IMPORTS) > 50


def test_imports_point_one_way() -> None:
    """A module imports only those before it: none needs what is built on it."""
    wrong = []
    for found in IMPORTS:
        if not found.is_ours or found.typing_only:
            continue
        assert found.source.startswith("."), f"{found}: an absolute import of ourselves"
        target = found.source.removeprefix(".") or str(found.name)
        if ORDER.index(target) >= ORDER.index(found.module):
            wrong.append(f"{found.module} imports {target}")
    assert wrong == []


def test_imports_of_our_own_stand_at_the_top() -> None:
    """No import of ours hides in a function, where it could break the order unseen."""
    assert [found for found in IMPORTS if found.is_ours and found.local] == []


def test_only_the_upper_modules_know_fastapi() -> None:
    """Pool, leases and databases work without FastAPI and Starlette."""
    modules = {found.module for found in IMPORTS if found.package in ("fastapi", "starlette")}
    assert modules == KNOW_FASTAPI


def test_few_modules_know_pydantic() -> None:
    """Connections and transactions know nothing of schemas, and schemas nothing of them."""
    packages = ("pydantic", "pydantic_core")
    assert {found.module for found in IMPORTS if found.package in packages} <= KNOW_PYDANTIC
    ours = [each for each in IMPORTS if each.module in ("values", "schemas") and each.is_ours]
    assert {each.source for each in ours} == {".exceptions", ".values"}


def is_private(found: Import) -> bool:
    parts = [*found.source.split("."), found.name or ""]
    return any(part.startswith("_") and part != "__future__" for part in parts)


@pytest.mark.parametrize(
    ("package", "home"),
    [("peewee", "state"), ("playhouse", "state"), ("fastapi", "routing"), ("starlette", "routing")],
)
def test_private_names_are_imported_in_one_place(package: str, home: str) -> None:
    """What Peewee and FastAPI keep private is imported by one module, for an upgrade to look at."""
    private = [found for found in IMPORTS if found.package == package and is_private(found)]
    assert {found.module for found in private} <= {home}
    if package in ("peewee", "fastapi"):
        assert private, "there is nothing to look after any more"


def test_no_module_reaches_for_private_names_through_peewee() -> None:
    """`peewee._something` is used nowhere: it would be an import in disguise."""
    found = [
        f"{path.name}:{node.lineno} {ast.unparse(node)}"
        for path in PACKAGE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("peewee", "fastapi", "starlette", "playhouse")
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
    ]
    assert found == []


def test_drivers_and_options_are_imported_where_they_are_used() -> None:
    """At the top of a module stands only what every installation has."""
    always = {*sys.stdlib_module_names, "peewee", "anyio", "fastapi", "starlette", "pydantic"}
    always.add("pydantic_core")  # a part of Pydantic, of the same version
    found = {
        f"{each.module}: {each.source}"
        for each in IMPORTS
        if not each.is_ours and not each.local and not each.typing_only
        if each.package not in always
    }
    # FastAPI depends on `opentelemetry-api`, `typing_extensions` and others; we don't.
    assert found == set()


def loaded_by(code: str) -> set[str]:
    """The modules that a new interpreter has loaded after running `code`."""
    program = f"import sys\n{code}\nprint(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return set(output.stdout.split())


OPTIONAL = (
    "psycopg",
    "psycopg2",
    "pymysql",
    "MySQLdb",
    "playhouse",
    "uvicorn",
    "httpx",
    "greenlet",
)


def optional(modules: set[str]) -> set[str]:
    return {module for module in modules if module.partition(".")[0] in OPTIONAL}


def test_the_package_imports_no_driver_and_nothing_optional() -> None:
    """`import fastapi_peewee` loads what Peewee and FastAPI load themselves, and no more."""
    without_us = loaded_by("import peewee, fastapi, pydantic, starlette.requests")
    with_us = loaded_by("import fastapi_peewee")
    assert "fastapi_peewee.lifecycle" in with_us
    assert optional(with_us) - optional(without_us) == set()


def test_a_sqlite_database_needs_no_driver_of_another() -> None:
    """`connect("sqlite:…")` and a query work where no other driver can be imported."""
    blocked = ["psycopg", "psycopg2", "psycopg_binary", "pymysql", "MySQLdb", "mysql"]
    code = (
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import fastapi_peewee\n"
        "db = fastapi_peewee.connect('sqlite:///:memory:')\n"
        "assert db.execute_sql('SELECT 1').fetchone() == (1,)\n"
        "db.close()\n"
    )
    assert "fastapi_peewee" in loaded_by(code)


def test_what_init_exports_is_there_and_sorted() -> None:
    """`__all__` names what users may import, each of it once, in order."""
    names = fastapi_peewee.__all__
    assert names == sorted(set(names))
    assert [name for name in names if not hasattr(fastapi_peewee, name)] == []


def test_it_can_be_imported_where_there_is_no_fork() -> None:
    """The package needs nothing of an operating system that only some have."""
    code = "import os; del os.fork, os.register_at_fork; import fastapi_peewee"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
