"""The pieces that checkpoints are made of, one by one."""

import json
from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from ml_dtypes import bfloat16
from numpy.testing import assert_array_equal

from lentando.comm.errors import CheckpointError, ConfigurationError
from lentando.comm.flat import Entry, FlatLayout, build_layouts
from lentando.optimizers.checkpoint.elements import entries_within, in_memory_order, in_shape
from lentando.optimizers.checkpoint.optimizer_state import NeutralState, OptimizerState, Reading
from lentando.optimizers.checkpoint.rank_content import RankContent
from lentando.optimizers.checkpoint.relayout import Relayout
from lentando.optimizers.checkpoint.resizing import merge_ranks
from lentando.optimizers.checkpoint.shard_file import read_shard_file, write_shard_file
from lentando.optimizers.checkpoint.tree import pack, unpack
from lentando.optimizers.checkpoint.weight_map import WeightMap, WeightRule
from lentando.optimizers.rules.algorithm_hooks import hooks_of
from lentando.optimizers.rules.base_algorithm import BoundAlgorithm
from lentando.optimizers.rules.flat_state import flat_state, is_flat_state


def through_json(tree: Any) -> Any:
    structure, tensors = pack(tree, [], "tree")
    return unpack(json.loads(json.dumps(structure, allow_nan=False)), tensors, lambda node: node)


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9)
keys = st.sampled_from(["a", "b", "lentando", "path", "flat", 0, 1, "0"])
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=9,
)


@given(trees)
def test_any_plain_object_comes_back(tree: Any) -> None:
    if not is_flat_state(tree):
        assert repr(through_json(tree)) == repr(tree)


def test_arrays_and_odd_numbers_come_back() -> None:
    """Among them arrays whose places are written alike."""
    tree = {1: np.arange(3), "1": np.float32(2), "bits": np.ones((), bfloat16), "numbers": (nan, inf, -0.0)}
    again = through_json(tree)
    assert_array_equal(again[1], np.arange(3))
    assert again["1"] == np.float32(2)
    assert isinstance(again["1"], np.float32)
    assert again["bits"].dtype == bfloat16
    assert again["bits"].shape == ()
    assert isnan(again["numbers"][0])
    assert repr(again["numbers"][1:]) == "(inf, -0.0)"


def test_object_that_cannot_be_saved_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"extra\['list'\]\[1\] is a object"):
        pack({"list": [0, object()]}, [], "extra")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.array([print]), "ndarray of dtype object"),
        (np.array(["a"]), "ndarray of dtype <U1"),
        (np.array([b"a"]), r"ndarray of dtype \|S1"),
        (np.array([1], "datetime64[D]"), r"ndarray of dtype datetime64\[D\]"),
        (np.timedelta64(1, "s"), r"timedelta64 of dtype timedelta64\[s\]"),
        (np.zeros(2, "f4, i4"), r"ndarray of dtype \[\('f0', '<f4'\), \('f1', '<i4'\)\]"),
    ],
)
def test_array_of_other_things_than_numbers_is_named_with_its_dtype(value: Any, kind: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"extra\['list'\]\[1\] is a {kind}: only"):
        pack({"list": [0, value]}, [], "extra")


@pytest.mark.parametrize("dtype", [">f4", ">i2", ">c16", np.longdouble])
def test_arrays_in_other_byte_orders_and_of_more_bits_come_back(dtype: Any, tmp_path: Path) -> None:
    array = np.arange(3).astype(dtype)
    structure, tensors = pack({"a": array, "b": array[1]}, [], "extra")
    part = write_shard_file(tmp_path / "part.safetensors", tensors, {})
    found = unpack(structure, read_shard_file(tmp_path, part.as_json())[0], lambda node: node)
    assert_array_equal(found["a"], array)
    assert found["a"].dtype == array.dtype.newbyteorder("=")
    assert found["b"] == 1


def test_part_comes_back(tmp_path: Path) -> None:
    tensors = {
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "strided": np.arange(9)[::2],
        "bits": np.arange(3).astype(bfloat16),
        "nothing": np.empty((0, 3), np.float32),
        "number": np.array(7),
        "truth": np.array([True, False]),
    }
    part = write_shard_file(tmp_path / "part.safetensors", tensors, {"about": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["part.safetensors"]
    found, about = read_shard_file(tmp_path, part.as_json())
    assert about == {"about": 1}
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        assert_array_equal(found[name], array)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.data())
def test_shards_of_a_buffer_hold_every_element_once(sizes: list[int], data: Any) -> None:
    layout = FlatLayout([Entry(f"p{number}", (size,), "float32", 0) for number, size in enumerate(sizes)])
    cuts = sorted(data.draw(st.lists(st.integers(0, layout.size), max_size=3)))
    seen: list[tuple[str, int]] = []
    for start, stop in zip([0, *cuts], [*cuts, layout.size], strict=True):
        for entry, own, here in entries_within(layout, start, stop):
            assert own.stop - own.start == here.stop - here.start > 0
            seen += [(entry.name, element) for element in range(own.start, own.stop)]
    assert seen == [(entry.name, element) for entry in layout.entries for element in range(entry.size)]


def test_channels_last_memory_becomes_the_tensors_shape() -> None:
    image = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    for order, shape, axes in (("channels_last", (2, 3, 4, 5), (0, 2, 3, 1)), ("C", (2, 3, 20), (0, 1, 2))):
        entry = Entry("image", shape, "int64", 0, order)
        tensor = image.reshape(shape)
        elements = np.ascontiguousarray(tensor.transpose(axes)).reshape(-1)
        assert_array_equal(in_shape(elements, entry), tensor)
        assert_array_equal(in_memory_order(tensor, entry), elements)


@pytest.mark.slow
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 3))
def test_shards_find_their_new_places(before: int, after: int, seed: int) -> None:
    """From shards of so many ranks in one layout to shards of another number in another layout."""
    generator = np.random.default_rng(seed)
    saved = build_layouts(
        [Entry("a", (2, 3), "float64", 0), Entry("b", (4,), "float32", 1), Entry("c", (5,), "float64", None)]
    )
    wanted = build_layouts(
        [Entry("B", (2, 2), "float32", 0), Entry("A", (3, 2), "float64", 0), Entry("C", (5,), "float64", None)]
    )
    mapping = WeightMap(
        [WeightRule("a", "A", (1, 0)), WeightRule("b", "B", None, ((2, 2),), (1, 1)), WeightRule("c", "C")]
    )
    values = {entry.name: generator.normal(size=entry.shape) for layout in saved for entry in layout.entries}
    flat = {layout.dtype: np.concatenate([values[e.name].reshape(-1) for e in layout.entries]) for layout in saved}

    def cut(size: int, rank: int, ranks: int) -> slice:
        return slice(size * rank // ranks, size * (rank + 1) // ranks)

    parts = []
    for rank in range(before):
        shards = [cut(layout.size, rank, before) for layout in saved]
        arrays = [flat[layout.dtype][shard] for layout, shard in zip(saved, shards, strict=True)]
        structure, tensors = pack({"u": flat_state(arrays, [s.start for s in shards])}, saved, "replica")
        parts.append(RankContent(tensors, {"replica": structure}))
    for rank in range(after):
        shards = [cut(layout.size, rank, after) for layout in wanted]
        empty = [np.empty(s.stop - s.start) for s in shards]
        state = {"u": flat_state(empty, [s.start for s in shards])}
        relayout = Relayout(mapping, saved, wanted, state, parts[0], lambda: parts)
        node = pack(state, wanted, "replica")[0]
        found = unpack(parts[0][1]["replica"], parts[0][0], relayout.flat_state)["u"]
        assert node is not None
        assert found["starts"] == [s.start for s in shards]
        for layout, shard, array in zip(wanted, shards, found["flat"], strict=True):
            expected = [mapping.rules[e.name].apply(values[mapping.rules[e.name].source]) for e in layout.entries]
            assert_array_equal(array, np.concatenate([e.reshape(-1) for e in expected])[shard])


# --- another number of ranks --------------------------------------------------------------------------------


def resized(
    layouts: list[FlatLayout], models: list[dict[str, Any]], outer: list[Any], steps: list[float], momenta: list[Any]
) -> tuple[dict[str, Any], Any]:
    """What is made of ranks that held these models, shards, counts of steps and momenta."""

    def read(rank: int) -> RankContent:
        state = {
            "started": True, "base": {}, "outer": {"u": outer[rank]}, "rate_sums": [0.1], "loss_sum": 3.0 * rank,
            "loss_count": 2, "steps": 2, "steps_in_round": 4, "inner_steps": 6, "rounds": 1,
        }  # fmt: skip
        structure, tensors = pack(state, layouts, "replica")
        rest, found = pack({"step": np.float32(steps[rank]), "name": f"rank {rank}"}, layouts, "optimizer rest")
        tensors |= found | {f"model/{name}": array for name, array in models[rank].items()}
        tensors |= {f"optimizer/momentum/{name}": array for name, array in momenta[rank].items()}
        optimizer = {"kind": "SGD", "reading": None, "obstacle": "", "is_empty": not momenta[rank]}
        about = {
            "framework": "torch", "not_averaged": [], "replica": structure, "optimizer rest": rest, "extra": rank,
            "optimizer": {**optimizer, "names": {"momentum": list(momenta[rank])}},
        }  # fmt: skip
        return RankContent(tensors, about)

    return merge_ranks(len(models), read, layouts, hooks_of(Mixing()).resizing, 1).content


class Mixing(BoundAlgorithm):
    """A base algorithm without any optional protocol."""


@pytest.mark.slow
@given(st.integers(1, 4), st.integers(0, 3), st.data())
def test_shards_of_any_partition_become_whole(ranks: int, seed: int, data: Any) -> None:
    """In any order: a reduction over several nodes gives rank 1 another shard than a ring does."""
    generator = np.random.default_rng(seed)
    layouts = build_layouts(
        [Entry("a", (2, 3), "float64", 0), Entry("b", (4,), "float32", 1), Entry("c", (5,), "float64", None)]
    )
    models = [{e.name: generator.normal(size=e.shape).astype(e.dtype) for x in layouts for e in x.entries}] * ranks
    u = [generator.normal(size=layout.size) for layout in layouts]
    shards = []
    for layout in layouts:
        cuts = sorted(data.draw(st.lists(st.integers(0, layout.size), min_size=ranks - 1, max_size=ranks - 1)))
        ranges = [slice(*pair) for pair in zip([0, *cuts], [*cuts, layout.size], strict=True)]
        shards.append(data.draw(st.permutations(ranges)))
    outer = [
        flat_state([u[number][own[rank]] for number, own in enumerate(shards)], [own[rank].start for own in shards])
        for rank in range(ranks)
    ]
    tensors, about = resized(layouts, models, outer, [1.0] * ranks, [{}] * ranks)
    found = unpack(about["replica"], tensors, lambda node: {"node": node})["outer"]["u"]["node"]
    assert found["sharded"]
    for array, extent, layout in zip(u, found["ranges"], layouts, strict=True):
        assert extent[:2] == [0, layout.size]
        whole = np.concatenate([tensors[f"replica/outer/u/{entry.name}"].reshape(-1) for entry in layout.entries])
        assert_array_equal(whole, array)
    for entry in layouts[0].entries:
        assert_array_equal(tensors[f"model/{entry.name}"], models[0][entry.name])


def test_ranks_that_differ_become_their_mean() -> None:
    """In numbers that add up exactly; a parameter that only some ranks have stepped has the mean of those."""
    layouts = build_layouts([Entry("a", (2,), "float32", 0), Entry("c", (1,), "float32", None)])
    models = [{"a": np.full(2, rank, np.float32), "c": np.array([2.0 * rank], np.float32)} for rank in range(3)]
    momenta = [{}, {"a": np.full(2, 4, np.float32)}, {"a": np.full(2, 8, np.float32)}]
    outer = [flat_state([np.full(3, 6.0 * rank)]) for rank in range(3)]
    tensors, about = resized(layouts, models, outer, [4.0, 5.0, 9.0], momenta)
    assert_array_equal(tensors["model/a"], [1, 1])
    assert_array_equal(tensors["model/c"], [2])
    assert tensors["model/a"].dtype == np.float32
    assert_array_equal(tensors["optimizer/momentum/a"], [6, 6])
    assert_array_equal(tensors["replica/outer/u/a"], [6, 6])
    assert about["optimizer"]["names"] == {"momentum": ["a"]}
    assert not about["optimizer"]["is_empty"]
    assert unpack(about["optimizer rest"], tensors, lambda node: node) == {"step": np.float32(6), "name": "rank 0"}
    state = unpack(about["replica"], tensors, lambda node: node)
    assert (state["loss_sum"], state["loss_count"], state["rate_sums"]) == (3.0, 2, [0.1])
    assert about["extra"] == 1


def test_shards_that_leave_a_gap_are_refused() -> None:
    layouts = build_layouts([Entry("a", (6,), "float32", 0)])
    models = [{"a": np.zeros(6, np.float32)}] * 2
    outer = [flat_state([np.zeros(2)], [0]), flat_state([np.zeros(3)], [3])]
    with pytest.raises(CheckpointError, match="shards of u do not make up the whole of 6 elements"):
        resized(layouts, models, outer, [1.0] * 2, [{}] * 2)


def test_base_algorithm_that_does_not_say_how_it_continues_is_refused() -> None:
    resizing = hooks_of(Mixing()).resizing
    assert resizing.state_for_average({}, []) == {}
    with pytest.raises(ConfigurationError, match="Mixing does not define how it continues on another number of ranks"):
        resizing.state_for_average({"round": 3}, [])


# --- the base optimizer's state -----------------------------------------------------------------------------


def test_state_is_read_by_quantity_and_scale() -> None:
    state = OptimizerState(
        "SGD", {"velocity": {"w": np.array([1.0, -2.0])}}, None, Reading("momentum", {"momentum": ("velocity", -4.0)})
    )
    again = OptimizerState.from_json(json.loads(json.dumps(state.about())), state.tensors, None)
    neutral = again.neutral()
    assert_array_equal(neutral.quantities["momentum"]["w"], [-4.0, 8.0])
    neutral.check("other", "momentum", {"momentum"})


def test_unknown_state_says_why_it_cannot_cross() -> None:
    with pytest.raises(CheckpointError, match="state of Own cannot be loaded .*: it is mine. Save right after"):
        OptimizerState("Own", {}, None, obstacle="it is mine").neutral()


@pytest.mark.parametrize(
    ("rule", "quantities", "stated"),
    [
        ("momentum", {"momentum"}, r"here is Other \(momentum with momentum\)"),
        ("adam", {"first", "second", "largest_second"}, r"\(adam with first, largest_second, second\)"),
        (None, set(), "a rule that is not known here"),
    ],
)
def test_state_of_another_method_is_refused(rule: Any, quantities: set[str], stated: str) -> None:
    state = NeutralState("Adam", "adam", {"first": {}, "second": {}}, 3)
    state.check("AdamW", "adam", {"first", "second"})
    with pytest.raises(CheckpointError, match=rf"state of Adam \(adam with first, second\), .*{stated}"):
        state.check("Other", rule, quantities)
