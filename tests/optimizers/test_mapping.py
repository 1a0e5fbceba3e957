"""Mappings between two frameworks' tensors, and pairing of layers."""

from collections.abc import Sequence
from math import prod
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from numpy.testing import assert_array_equal

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.checkpoint.layers import Layer, Tensor
from lentando.optimizers.checkpoint.weight_map import WeightMap, WeightRule


@st.composite
def rules(draw: Any) -> tuple[WeightRule, tuple[int, ...]]:
    """A rule with a source shape that it fits."""
    split = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), max_size=3).map(tuple))
    parts = sum(map(len, split))
    axes = draw(st.none() | st.permutations(range(parts)).map(tuple))
    if draw(st.booleans()):
        cuts = sorted(draw(st.sets(st.integers(1, parts - 1)))) if parts > 1 else []
        merge = tuple(np.diff([0, *cuts, parts]).tolist()) if parts else None
        return WeightRule("source", "target", axes, split, merge), tuple(map(prod, split))
    return WeightRule("source", "target", axes), tuple(length for axis in split for length in axis)


@pytest.mark.slow
@given(rules())
def test_inverse_brings_every_element_back(drawn: tuple[WeightRule, tuple[int, ...]]) -> None:
    rule, shape = drawn
    array = np.arange(prod(shape)).reshape(shape)
    there = rule.apply(array)
    assert there.shape == rule.shape(shape)
    assert_array_equal(np.sort(there, axis=None), array.reshape(-1))
    assert_array_equal(rule.inverse.apply(there), array)
    assert rule.inverse.shape(there.shape) == shape
    assert_array_equal(rule.inverse.inverse.apply(array), there)


@pytest.mark.slow
@given(st.lists(rules(), max_size=4))
def test_mappings_survive_inversion(drawn: list[tuple[WeightRule, tuple[int, ...]]]) -> None:
    mapping = WeightMap(
        WeightRule(f"source{n}", f"target{n}", r.axes, r.split, r.merge) for n, (r, _) in enumerate(drawn)
    )
    twice = mapping.inverse.inverse
    for (_, shape), rule in zip(drawn, twice.rules.values(), strict=True):
        array = np.arange(prod(shape)).reshape(shape)
        assert_array_equal(rule.apply(array), mapping.rules[rule.target].apply(array))


def test_dense_after_a_flattened_map() -> None:
    """A map (C, H, W) flattened channels first, against the same map (H, W, C) flattened channels last."""
    generator = np.random.default_rng(0)
    images, weight = generator.normal(size=(5, 3, 4, 2)), generator.normal(size=(7, 24))
    rule = WeightRule("weight", "kernel", axes=(2, 3, 1, 0), split=((7,), (3, 4, 2)), merge=(3, 1))
    first = images.reshape(5, -1) @ weight.T
    last = images.transpose(0, 2, 3, 1).reshape(5, -1) @ rule.apply(weight)
    np.testing.assert_allclose(first, last, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "stated"),
    [
        ({"axes": (0, 2)}, r"must be a permutation of 0, 1, ..., got \(0, 2\)"),
        ({"axes": (0, 1), "split": ((2, 3), (4,))}, "split into 3 axes .* permutes 2"),
        ({"split": ((2,), (3,)), "merge": (3,)}, "must count each part of split once"),
        ({"merge": (1, 1)}, "must count each part of split once"),
    ],
)
def test_impossible_rules_are_refused(arguments: Any, stated: str) -> None:
    with pytest.raises(ConfigurationError, match=stated):
        WeightRule("a", "b", **arguments)


SOURCES = {"weight": (2, 3), "bias": (2,)}
TARGETS = {"kernel": (3, 2), "offset": (2,)}
FITS = (WeightRule("weight", "kernel", (1, 0)), WeightRule("bias", "offset"))


@pytest.mark.parametrize(
    ("chosen", "stated"),
    [
        (FITS[:1], "leaves out tensors of the checkpoint: 'bias'"),
        ((*FITS, WeightRule("scale", "gamma")), "names tensors that the checkpoint does not have: 'scale'"),
        ((FITS[0], WeightRule("bias", "beta")), "leaves out tensors of the model: 'offset'"),
        (
            (WeightRule("weight", "kernel"), FITS[1]),
            (
                r"'weight' of the checkpoint, shape \(2, 3\), becomes \(2, 3\) by the mapping, but 'kernel' of the "
                r"model has shape \(3, 2\)"
            ),
        ),
        ((WeightRule("weight", "kernel", (0, 2, 1)), FITS[1]), r"shape \(2, 3\), to which axes \(0, 2, 1\) do not fit"),
        ((WeightRule("weight", "kernel", split=((2,), (4,))), FITS[1]), "cannot be split"),
    ],
)
def test_mapping_that_does_not_fit_is_refused(chosen: Sequence[WeightRule], stated: str) -> None:
    WeightMap(FITS).check(SOURCES, TARGETS)
    with pytest.raises(ConfigurationError, match=stated):
        WeightMap(chosen).check(SOURCES, TARGETS)


def test_each_name_occurs_once() -> None:
    with pytest.raises(ConfigurationError, match=r"each source once, .* more often: \['bias'\]"):
        WeightMap([WeightRule("bias", "a"), WeightRule("bias", "b")])
    with pytest.raises(ConfigurationError, match=r"each target once, .* more often: \['a'\]"):
        WeightMap([WeightRule("weight", "a"), WeightRule("bias", "a")])


# --- layers -------------------------------------------------------------------------------------------------


def dense(name: str, axes: str, shape: tuple[int, ...], **more: Any) -> Layer:
    bias = Tensor(f"{name}.b", "o", (shape[axes.index("o")],))
    return Layer(name, "dense", {"weight": Tensor(f"{name}.w", axes, shape), "bias": bias}, **more)


def test_layers_are_paired_by_what_their_axes_count() -> None:
    first = [dense("first", "oi", (4, 3), channels_first=True)]
    second = [dense("second", "io", (3, 4))]
    mapping = WeightMap.between(first, second)
    assert mapping == WeightMap([WeightRule("first.w", "second.w", (1, 0)), WeightRule("first.b", "second.b")])
    assert WeightMap.between(second, first) == mapping.inverse
    assert [Layer.from_json(layer.as_json()) for layer in first] == first


def test_layer_after_a_flattened_map_is_reordered() -> None:
    first = [dense("first", "oi", (5, 24), channels_first=True)]
    second = [dense("second", "io", (24, 5), flattened=(("h", 4), ("w", 2), ("c", 3)))]
    (weight, bias) = WeightMap.between(first, second).rules.values()
    assert weight == WeightRule("first.w", "second.w", (2, 3, 1, 0), ((5,), (3, 4, 2)), (3, 1))
    assert bias == WeightRule("first.b", "second.b")
    # A map that was already flattened channels first needs no reordering.
    second = [dense("second", "io", (24, 5), flattened=(("c", 3), ("h", 4), ("w", 2)))]
    assert WeightMap.between(first, second).rules["second.w"] == WeightRule("first.w", "second.w", (1, 0))


def test_tied_layers_are_paired_once() -> None:
    """Two layers that share a weight must share one in the other model, too."""
    tied = [dense("one", "oi", (3, 3)), dense("one", "oi", (3, 3))]
    assert len(WeightMap.between(tied, [dense("same", "io", (3, 3))] * 2).rules) == 2
    with pytest.raises(ConfigurationError, match="belongs to several layers of one model, but 'a.w' and 'b.w' are two"):
        WeightMap.between(tied, [dense("a", "io", (3, 3)), dense("b", "io", (3, 3))])


@pytest.mark.parametrize(
    ("second", "stated"),
    [
        ([], "differ at layer 0: dense 'first' but nothing"),
        ([Layer("norm", "batch norm", {})], "differ at layer 0: dense 'first' but batch norm 'norm'"),
        ([dense("second", "io", (4, 3))], r"shape \(4, 3\) \(axes oi\), but 'second.w' has \(4, 3\) \(axes io\)"),
        (
            [Layer("second", "dense", {"weight": Tensor("w", "io", (3, 4))})],
            "has weight, bias, but 'second' has weight",
        ),
    ],
)
def test_layers_that_differ_are_refused(second: list[Layer], stated: str) -> None:
    with pytest.raises(ConfigurationError, match=stated):
        WeightMap.between([dense("first", "oi", (4, 3))], second)


def test_layer_of_unknown_kind_is_refused() -> None:
    layer = [Layer("memory", "LSTM", {})]
    with pytest.raises(ConfigurationError, match="'memory' is of the kind LSTM: only dense, .* Pass a map"):
        WeightMap.between(layer, layer)
