"""Rules that make parts of tensors of parts of others, and those that add."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from numpy.testing import assert_allclose, assert_array_equal

from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import Entry
from lentando.optimizers.canonical import canonical_tensors
from lentando.optimizers.checkpoint import weight_rule as rules
from lentando.optimizers.checkpoint.weight_map import WeightMap, WeightRule

CONCATENATED = [
    WeightRule("weight", "kernel", axes=(1, 0), source_part=((0, 7), (0, 5)), target_part=((0, 5), (0, 7))),
    WeightRule(
        "weight", "kernel", axes=(2, 3, 1, 0), split=((7,), (3, 4, 2)), merge=(3, 1),
        source_part=((0, 7), (5, 29)), target_part=((5, 29), (0, 7)),
    ),
]  # fmt: skip
"""Of a dense layer after 5 features and a map of 3 channels and 4 by 2 places."""


def test_dense_after_features_and_a_flattened_map() -> None:
    generator = np.random.default_rng(0)
    images, features = generator.normal(size=(6, 3, 4, 2)), generator.normal(size=(6, 5))
    weight = generator.normal(size=(7, 29))
    mapping = WeightMap(CONCATENATED)
    mapping.check({"weight": (7, 29)}, {"kernel": (29, 7)})
    kernel = mapping.value("kernel", lambda name: {"weight": weight}[name])
    first = np.concatenate([features, images.reshape(6, -1)], 1) @ weight.T
    last = np.concatenate([features, images.transpose(0, 2, 3, 1).reshape(6, -1)], 1) @ kernel
    assert_allclose(first, last, rtol=1e-12)
    assert_array_equal(mapping.inverse.value("weight", lambda name: {"kernel": kernel}[name]), weight)


@st.composite
def cuts(draw: Any) -> tuple[WeightMap, tuple[int, int]]:
    """One tensor that becomes several, whose pieces come in any order."""
    length, width = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    stops = [*sorted(draw(st.sets(st.integers(1, length)))), length]
    ranges = [(start, stop) for start, stop in zip([0, *stops], stops, strict=False) if start < stop]
    ends = dict.fromkeys("abc", 0)
    made = []
    for start, stop in draw(st.permutations(ranges)):
        name = draw(st.sampled_from("abc"))
        place = (ends[name], ends[name] + stop - start)
        ends[name] = place[1]
        made.append(WeightRule("x", name, (1, 0), None, None, ((start, stop), (0, width)), ((0, width), place)))
    return WeightMap(made), (length, width)


@given(cuts())
def test_parts_come_back_to_their_places(drawn: tuple[WeightMap, tuple[int, int]]) -> None:
    mapping, shape = drawn
    array = np.arange(shape[0] * shape[1]).reshape(shape)
    made = {name: mapping.value(name, lambda _: array) for name in mapping.by_target}
    mapping.check({"x": shape}, {name: value.shape for name, value in made.items()})
    assert sum(value.size for value in made.values()) == array.size
    assert_array_equal(mapping.inverse.value("x", made.__getitem__), array)
    again = WeightMap(eval(f"[{', '.join(r.as_python() for r in mapping.rules.values())}]", {"lt": rules}))
    assert again == mapping


def test_two_tensors_are_added_and_what_was_added_is_zero_again() -> None:
    mapping = WeightMap([WeightRule("input", "bias"), WeightRule("recurrent", "bias", use="added")])
    values = {"input": np.array([1.0, 2.0]), "recurrent": np.array([10.0, 20.0])}
    mapping.check({"input": (2,), "recurrent": (2,)}, {"bias": (2,)})
    both = mapping.value("bias", values.__getitem__)
    assert_array_equal(both, [11, 22])
    back = mapping.inverse
    back.check({"bias": (2,)}, {"input": (2,), "recurrent": (2,)})
    assert_array_equal(back.value("input", lambda _: both), both)
    assert_array_equal(back.value("recurrent", lambda _: both), [0, 0])
    # Both have the same gradient as their sum, and so the same moments.
    assert_array_equal(mapping.value("bias", values.__getitem__, of_gradients=True), [5.5, 11])
    assert_array_equal(back.value("recurrent", lambda _: both, of_gradients=True), both)
    assert back.inverse == mapping


@pytest.mark.parametrize(
    ("arguments", "stated"),
    [
        ({"source_part": ((3, 3),)}, r"a part of 'a' must be \(first index, index after the last\)"),
        ({"target_part": ((-1, 3),)}, "a part of 'b' must be"),
        ({"use": "subtracted"}, "use must be one of"),
        ({"split": ((2,),), "merge": (2, -1)}, "must count each part"),
    ],
)
def test_impossible_parts_are_refused(arguments: Any, stated: str) -> None:
    with pytest.raises(ConfigurationError, match=stated):
        WeightRule("a", "b", **arguments)


def part(*ranges: tuple[int, int], to: tuple[tuple[int, int], ...] | None = None) -> WeightRule:
    return WeightRule("x", "y", source_part=ranges, target_part=to or ranges)


def test_parts_that_overlap_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"each source once, .*: \['x'\]"):
        WeightMap([part((0, 2)), part((1, 3), to=((2, 4),))])
    with pytest.raises(ConfigurationError, match=r"each target once, .*: \['y'\]"):
        WeightMap([part((0, 2)), part((2, 4), to=((1, 3),))])
    WeightMap([part((0, 2), (0, 2)), part((0, 2), (2, 3))])


@pytest.mark.parametrize(
    ("made", "stated"),
    [
        ([part((0, 2))], "leaves out parts of tensors of the checkpoint: 'x'"),
        ([part((0, 2)), part((2, 5))], r"'x' has shape \(4,\), which does not have the part \(\(2, 5\),\)"),
        ([part((0, 4), to=((1, 5),))], r"'y\[1:5\]' of the model has shape \(4,\)"),
        ([part((0, 3)), part((3, 4), to=((3, 5),))], r"'x\[3:4\]' of the checkpoint, .* becomes \(1,\)"),
    ],
)
def test_parts_that_do_not_make_up_the_whole_are_refused(made: list[WeightRule], stated: str) -> None:
    with pytest.raises(ConfigurationError, match=stated):
        WeightMap(made).check({"x": (4,)}, {"y": (4,)})


@pytest.mark.parametrize(
    "mapping", [WeightMap(CONCATENATED), WeightMap([WeightRule("a", "kernel"), WeightRule("b", "kernel", use="added")])]
)
def test_ranks_of_different_frameworks_cannot_average_parts(mapping: WeightMap) -> None:
    with pytest.raises(
        ConfigurationError, match=r"of parts of others: \['kernel'\].* train in one framework at a time"
    ):
        canonical_tensors(mapping, [Entry("kernel", (29, 7), "float32", 0)])
