"""The planted bugs of `make mutants` fit the code as it is; the command itself runs on request."""

import ast
import shutil
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, PACKAGE, DoesNotApplyError, Edit, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_mutant_applies(mutant: Mutant, tmp_path: Path) -> None:
    """What a mutant replaces is there, once, and what becomes of it is Python."""
    for edit in mutant.edits:
        shutil.copy(PACKAGE / f"{edit.module}.py", tmp_path)
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    mutant.plant(tmp_path)
    for path, text in before.items():
        assert ast.dump(ast.parse(path.read_text())) != ast.dump(ast.parse(text))


@pytest.mark.parametrize("source", ["def f():\n    pass", "def f():\n    g(1)\n    g(1)", "g(1)"])
def test_a_mutant_that_no_longer_fits_is_an_error(source: str) -> None:
    """Code that isn't there any more, or is there twice, makes a mutant fail, not survive."""
    with pytest.raises(DoesNotApplyError):
        Edit("module", "f", "g(1)", "g(2)").apply(source)


def test_a_mutant_finds_its_place_by_what_it_says() -> None:
    """Neither formatting, comments nor the code around it matter."""
    edited = Edit("module", "A.f", "g(1)", "g(2)").apply(
        "class A:\n  def f(self):\n    # a comment\n    return [g(\n  1)]\n"
    )
    assert edited == "class A:\n\n    def f(self):\n        return [g(2)]\n"
