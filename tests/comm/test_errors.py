import inspect

import pytest

from lentando.comm import errors
from lentando.comm.errors import LentandoError, grouped_by_rank, ranks_in_words, ranks_of


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([3], "rank 3"),
        ([0, 1], "ranks 0 and 1"),
        ([0, 2, 5], "ranks 0, 2 and 5"),
        (range(8), "ranks 0, 1, 2, 3, 4, 5, 6 and 7"),
        (range(32), "ranks 0, 1, 2, 3 and 28 more"),
    ],
)
def test_ranks_in_words(ranks: list[int], words: str) -> None:
    assert ranks_in_words(ranks) == words


def test_grouped_by_rank_says_who_says_what_in_order_of_rank() -> None:
    assert grouped_by_rank(["red", "blue", "red"]) == "ranks 0 and 2: red; rank 1: blue"


def test_ranks_of_collects_who_has_what_in_the_order_in_which_it_comes() -> None:
    assert ranks_of([(2, "red"), (0, "blue"), (1, "red")]) == {"red": [2, 1], "blue": [0]}


@pytest.mark.parametrize("name", sorted({*errors.__all__} - {"grouped_by_rank", "ranks_in_words", "ranks_of"}))
def test_every_error_is_a_lentando_error(name: str) -> None:
    kind = getattr(errors, name)
    assert inspect.isclass(kind)
    assert issubclass(kind, LentandoError)


@pytest.mark.parametrize(
    ("name", "builtin"),
    [("ConfigurationError", ValueError), ("MismatchError", RuntimeError), ("NonFiniteError", ArithmeticError)],
)
def test_errors_are_also_what_python_programs_catch(name: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(errors, name), builtin)
