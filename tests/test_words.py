"""The word check refuses what the glossary retires, and leaves the rest alone."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
specification = importlib.util.spec_from_file_location("check_words", ROOT / ".ci/check_words.py")
assert specification is not None
assert specification.loader is not None
check_words = importlib.util.module_from_spec(specification)
specification.loader.exec_module(check_words)

Kinds = Callable[[str, str], list[tuple[int, str]]]


@pytest.fixture
def kinds(tmp_path: Path) -> Kinds:
    """Writes a file, and returns the line and kind of everything that the check refuses in it."""

    def refused(name: str, text: str) -> list[tuple[int, str]]:
        (tmp_path / name).write_text(text)
        return [(line, kind) for line, _, kind in sorted(check_words.findings(tmp_path / name, check_words.retired()))]

    return refused


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("x = 1  # the message is under way", "under way"),
        ("text = 'the ranks were told'", "told"),
        ("text = f'{1} goes on'", "goes on"),
        ('def f():\n    """Every rank that takes part hears of it."""', "hears"),
        ("told_loss = 1", "told"),
        ('"""A text in which under\n    way is split between lines."""', "under way"),
    ],
)
def test_a_retired_word_is_refused_in_comments_strings_docstrings_and_names(
    kinds: Kinds, source: str, word: str
) -> None:
    assert {kind for _, kind in kinds("module.py", source + "\n")} == {word}


@pytest.mark.parametrize("source", ["told = 1  # check_words: allow", "retold = untold = 'undergoes only'", "x = 1"])
def test_other_words_and_stated_exceptions_pass(kinds: Kinds, source: str) -> None:
    assert kinds("module.py", source + "\n") == []


def test_a_docstring_shorter_than_a_sentence_is_refused(kinds: Kinds) -> None:
    source = 'class A:\n    """One."""\n\n    def f(self):\n        """Return the number of ranks."""\n'
    assert kinds("module.py", source) == [(2, "short docstring")]


def test_an_argument_without_a_noun_is_refused(kinds: Kinds) -> None:
    source = (
        'def f(rank, steps):\n    """Return the mean of the measured steps.\n\n'
        "    Args:\n        rank: whose.\n        steps: number of steps that were measured.\n\n"
        '    Returns:\n        of all: this is a sentence of its own.\n    """\n'
    )
    assert kinds("module.py", source) == [(5, "fragment")]


def test_pages_are_read_without_their_code(kinds: Kinds) -> None:
    page = "The rank `told` the others.\n\n```\ntold\n```\n\nIt was told.\n"
    assert kinds("page.md", page) == [(7, "told")]


def test_the_glossary_retires_words_and_offers_others() -> None:
    table = check_words.GLOSSARY.read_text().partition("## Retired words")[2]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if re.match(r"\| [^-r]", line)]
    assert len(check_words.retired()) > len(rows) > 15
    assert all(len(row) == 2 and all(cell.strip() for cell in row) for row in rows)
