"""What a history of lists must never show, and that it is seen if it does."""

import pytest

from soak.history import Append, Outcome, Read, Transaction, violations

DONE, FAILED, UNKNOWN = Outcome.DONE, Outcome.FAILED, Outcome.UNKNOWN
X, Y = 1, 2


def history(*transactions: tuple[Outcome, list[Append | Read]]) -> list[Transaction]:
    return [Transaction(number, *rest) for number, rest in enumerate(transactions, 1)]


def test_what_is_right_has_no_violations() -> None:
    """Transactions one after the other, one that failed and one that nobody knows of."""
    right = history(
        (DONE, [Append(X, 1), Read(X, (1,)), Append(Y, 2)]),
        (FAILED, [Read(X, (1,)), Append(X, 3)]),
        (UNKNOWN, [Append(X, 4), Append(Y, 5)]),
        (UNKNOWN, [Append(X, 6)]),
        (DONE, [Read(X, (1, 4)), Append(X, 7), Read(X, (1, 4, 7)), Read(Y, (2, 5))]),
    )
    assert violations(right, {X: [1, 4, 7], Y: [2, 5]}, "SERIALIZABLE") == []


@pytest.mark.parametrize(
    ("words", "transactions", "final"),
    [
        ("lost", [(DONE, [Append(X, 1)])], {X: []}),
        ("there all the same", [(FAILED, [Append(X, 1)])], {X: [1]}),
        ("torn", [(UNKNOWN, [Append(X, 1), Append(Y, 2)])], {X: [1], Y: []}),
        ("twice", [(DONE, [Append(X, 1)])], {X: [1, 1]}),
        ("its own appends", [(DONE, [Append(X, 1), Read(X, ())])], {X: [1]}),
        (
            "another order",
            [(DONE, [Append(X, 1)]), (DONE, [Append(X, 2)]), (DONE, [Read(X, (2, 1))])],
            {X: [1, 2]},
        ),
        ("G1a", [(FAILED, [Append(X, 1)]), (DONE, [Read(X, (1,))])], {X: []}),
        ("G1b", [(DONE, [Append(X, 1), Append(X, 2)]), (DONE, [Read(X, (1,))])], {X: [1, 2]}),
        (
            "G0",
            [(DONE, [Append(X, 1), Append(Y, 2)]), (DONE, [Append(X, 3), Append(Y, 4)])],
            {X: [1, 3], Y: [4, 2]},
        ),
        (
            "G1c",
            [(DONE, [Append(X, 1), Read(Y, (2,))]), (DONE, [Append(Y, 2), Read(X, (1,))])],
            {X: [1], Y: [2]},
        ),
    ],
)
def test_what_no_level_allows(
    words: str, transactions: list[tuple[Outcome, list[Append | Read]]], final: dict[int, list[int]]
) -> None:
    [found] = violations(history(*transactions), final, "READ COMMITTED")
    assert words in found


def test_a_read_that_another_overwrites_in_between() -> None:
    """G-single: 1 reads X before 2 writes it, and sees what 2 wrote to Y."""
    skewed = history(
        (DONE, [Read(X, ()), Read(Y, (2,))]),
        (DONE, [Append(X, 1), Append(Y, 2)]),
    )
    final = {X: [1], Y: [2]}
    assert violations(skewed, final, "READ COMMITTED") == []
    assert "G-single" in violations(skewed, final, "REPEATABLE READ")[0]
    assert "G2" in violations(skewed, final, "SERIALIZABLE")[0]


def test_write_skew() -> None:
    """G2: each reads what the other then writes. A snapshot allows it."""
    skewed = history((DONE, [Read(X, ()), Append(Y, 1)]), (DONE, [Read(Y, ()), Append(X, 2)]))
    final = {X: [2], Y: [1]}
    assert violations(skewed, final, "REPEATABLE READ") == []
    assert "G2" in violations(skewed, final, "SERIALIZABLE")[0]
