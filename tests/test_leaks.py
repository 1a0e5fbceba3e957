"""What wrappers, collectives and checkpoints take is given back when they are dropped. ``leaks.py`` runs for longer."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from launching import mpirun
from leaks import Held, growth

SCRIPT = Path(__file__).parent / "support/leaks.py"
FLAT = Held(300 * 2**20, 20, 500, 6, 12)


def test_what_is_made_and_dropped_leaves_nothing_behind() -> None:
    job = mpirun(2, str(SCRIPT), "--minutes", "0.1", timeout_seconds=300)
    assert job.status == 0, job.output
    assert job.output.count("nothing grew") == 2
    assert int(re.findall(r"(\d+) turns", job.output)[-1]) > 1


@pytest.mark.parametrize(
    ("name", "each"),
    [("memory_bytes", 2**20), ("descriptors", 1), ("mappings", 4), ("threads", 1), ("communicators", 4)],
)
def test_what_grows_is_named(name: str, each: int) -> None:
    samples = [replace(FLAT, **{name: getattr(FLAT, name) + each * number}) for number in range(30)]
    (words,) = growth(samples)
    assert words.startswith(f"{name} grew from")


def test_what_grows_in_the_first_third_alone_is_no_leak() -> None:
    samples = [replace(FLAT, memory_bytes=FLAT.memory_bytes + 2**24 * min(number, 9)) for number in range(30)]
    assert growth(samples) == []
