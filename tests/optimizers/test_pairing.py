"""Which layer is which, where the order differs; what is reported of settings, and of layers that cannot be paired."""

import json
from dataclasses import replace
from typing import Any

import pytest

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.checkpoint import weight_rule as rules
from lentando.optimizers.checkpoint.layers import Layer, Tensor, layers_from_json
from lentando.optimizers.checkpoint.weight_map import WeightMap, WeightRule


def dense(name: str, inputs: int, outputs: int, axes: str = "oi", **more: Any) -> Layer:
    lengths = {"i": inputs, "o": outputs}
    weight = Tensor(f"{name}.w", axes, tuple(lengths[axis] for axis in axes))
    return Layer(name, "dense", {"weight": weight}, channels_first=axes == "oi", **more)


def norm(name: str, size: int, **settings: Any) -> Layer:
    return Layer(name, "layer norm", {"weight": Tensor(f"{name}.w", "i", (size,))}, settings=settings)


def paired(first: list[Layer], second: list[Layer]) -> dict[str, str]:
    mapping = WeightMap.between(first, second)
    assert WeightMap.between(second, first) == mapping.inverse
    return {rule.source: rule.target for rule in mapping.rules.values()}


def test_layers_in_another_order_are_paired_by_shape() -> None:
    first = [dense("a", 2, 3), norm("b", 3), dense("c", 3, 4)]
    second = [dense("z", 3, 4, "io"), dense("x", 2, 3, "io"), norm("y", 3)]
    assert paired(first, second) == {"a.w": "x.w", "b.w": "y.w", "c.w": "z.w"}
    assert WeightMap.between(first, second).notes == ()
    # Rules come in the order of the first model.
    assert list(paired(first, second)) == ["a.w", "b.w", "c.w"]


def test_layers_of_one_kind_in_the_same_order_are_paired_and_named() -> None:
    first = [norm("a", 3), norm("b", 3), dense("c", 3, 4)]
    second = [dense("z", 3, 4, "io"), norm("x", 3), norm("y", 3)]
    assert paired(first, second) == {"a.w": "x.w", "b.w": "y.w", "c.w": "z.w"}
    (note,) = WeightMap.between(first, second).notes
    assert note.endswith("so check that these are the same: 'a' and 'x'; 'b' and 'y'")


def test_layers_in_parallel_are_named() -> None:
    first = [norm(f"a{number}", 3) for number in range(25)]
    second = [replace(norm(f"b{number}", 3), is_parallel=number > 1) for number in range(25)]
    (note,) = WeightMap.between(first, second).notes
    assert "neither of which comes before the other" in note
    assert note.endswith("'a21' and 'b21'; and 3 more")
    assert layers_from_json([layer.as_json() for layer in second]) == second


def test_layers_that_cannot_be_distinguished_are_refused() -> None:
    first = [dense("a", 3, 3), dense("b", 3, 3), dense("c", 3, 4)]
    second = [dense("x", 3, 3, "io"), dense("z", 3, 4, "io"), dense("y", 3, 3, "io")]
    with pytest.raises(
        ConfigurationError, match="it is not known which of 'a', 'b' is which of 'x', 'y': each is a dense"
    ):
        WeightMap.between(first, second)


def test_layer_that_is_listed_twice_is_paired_once() -> None:
    one = dense("a", 3, 3)
    assert paired([one, one, dense("b", 3, 4)], [dense("x", 3, 3, "io"), dense("y", 3, 4, "io")]) == {
        "a.w": "x.w",
        "b.w": "y.w",
    }


def test_settings_that_differ_are_named_with_both_values() -> None:
    first = [norm(name, size, epsilon=1e-5, momentum=0.1) for name, size in (("a", 2), ("b", 3), ("c", 4))]
    second = [
        norm("x", 2, epsilon=1e-3, momentum=1 - 0.9),
        norm("y", 3, epsilon=1e-3, momentum=1 - 0.99),
        norm("z", 4, epsilon=1e-5, momentum=1 - 0.9),
    ]
    assert WeightMap.between(first, second).notes == (
        "epsilon of layer norm: 1e-05 in 'a', 0.001 in 'x', and so in 1 more",
        f"momentum of layer norm: 0.1 in 'b', {1 - 0.99} in 'y', as PyTorch counts it (Keras's is 1 minus that)",
    )


def test_gates_in_another_order() -> None:
    first = Layer(
        "a", "gru", {"weight": Tensor("a.w", "ui", (6, 3))}, orders={"u": (("r", (("n", 2),)), ("z", (("n", 4),)))}
    )
    second = Layer(
        "b", "gru", {"weight": Tensor("b.w", "iu", (3, 6))}, orders={"u": (("z", (("n", 4),)), ("r", (("n", 2),)))}
    )
    assert list(WeightMap.between([first], [second]).rules.values()) == [
        WeightRule("a.w", "b.w", (1, 0), source_part=((0, 2), (0, 3)), target_part=((0, 3), (4, 6))),
        WeightRule("a.w", "b.w", (1, 0), source_part=((2, 6), (0, 3)), target_part=((0, 3), (0, 4))),
    ]
    assert layers_from_json(json.loads(json.dumps([first.as_json(), second.as_json()]))) == [first, second]


def test_neighbouring_features_in_the_same_order_are_one_part() -> None:
    """Of a map of one channel, of one place, and of several."""
    segments = ((("h", 2), ("w", 3), ("c", 1)), (("h", 1), ("w", 1), ("c", 5)), (("n", 4),), (("h", 2), ("c", 3)))
    order = tuple((str(number), factors) for number, factors in enumerate(segments))
    mapping = WeightMap.between([dense("a", 21, 2)], [dense("b", 21, 2, "io", orders={"i": order})])
    assert [rule.source_part for rule in mapping.rules.values()] == [((0, 2), (0, 15)), ((0, 2), (15, 21))]
    assert [rule.split for rule in mapping.rules.values()] == [None, ((2,), (3, 2))]


def test_features_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'a.w' has 5 features where 'a' or 'b' has 6"):
        WeightMap.between([dense("a", 5, 2)], [dense("b", 5, 2, "io", flattened=(("h", 2), ("c", 3)))])


def test_mapping_to_start_from_is_python() -> None:
    first = [dense("a", 2, 3), Layer("token", "Token", {"weight": Tensor("token", "", (1, 3))}), dense("c", 3, 4)]
    second = [
        dense("x", 2, 3, "io"),
        Layer("cls", "Cls", {"weight": Tensor("cls", "", (1, 3))}),
        dense("z", 3, 5, "io"),
    ]
    with pytest.raises(ConfigurationError, match="token.*but Cls 'cls'") as refusal:
        WeightMap.between(first, second)
    message = str(refusal.value)
    assert message.splitlines()[1:] == [
        "mapping = lt.WeightMap([",
        "    lt.WeightRule('a.w', 'x.w', axes=(1, 0)),",
        "    lt.WeightRule('token', 'cls'),  # a guess by shape: check it",
        "    # not yet mapped from: 'c.w', shape (4, 3)",
        "    # not yet mapped to: 'z.w', shape (3, 5)",
        "])",
    ]
    namespace: dict[str, Any] = {"lt": type("lt", (), {"WeightMap": WeightMap, "WeightRule": rules.WeightRule})}
    exec("\n".join(message.splitlines()[1:]), namespace)
    assert len(namespace["mapping"].rules) == 2


# --- checkpoints of earlier versions ------------------------------------------------------------------------


def old(layer: Layer) -> dict[str, Any]:
    """As versions before concatenated features wrote it."""
    return {key: layer.as_json()[key] for key in ("name", "kind", "tensors", "flattened", "channels_first")}


CONVOLUTION = Layer("conv", "convolution", {"weight": Tensor("conv.w", "hwio", (3, 3, 2, 4))})


def test_earlier_checkpoints_are_understood_where_nothing_is_doubtful() -> None:
    flattened = (("h", 2), ("w", 3), ("c", 4))
    own = [CONVOLUTION, dense("x", 24, 5, "io", flattened=flattened), dense("y", 5, 3, "io")]
    read = layers_from_json([old(layer) for layer in own])
    assert read == own
    assert not any(layer.unknown for layer in layers_from_json([old(CONVOLUTION), old(dense("x", 4, 5, "io"))]))
    assert not any(
        layer.unknown for layer in layers_from_json([old(dense("x", 7, 5, "io")), old(dense("y", 9, 5, "io"))])
    )
    assert layers_from_json([old(CONVOLUTION), old(dense("x", 9, 5))])[1].unknown == ""  # PyTorch's never knew


def test_earlier_checkpoints_are_refused_where_features_may_be_concatenated() -> None:
    """Keras's dense layer after dense features and a flattened map was described like one after neither."""
    saved = [CONVOLUTION, dense("meta", 6, 8, "io"), dense("out", 44, 3, "io")]
    here = [
        Layer("conv", "convolution", {"weight": Tensor("c.w", "oihw", (4, 2, 3, 3))}, channels_first=True),
        dense("m", 6, 8),
        dense("o", 44, 3),
    ]
    with pytest.raises(
        ConfigurationError, match="written by an earlier version, which did not record where the 6 input"
    ):
        WeightMap.between(layers_from_json([old(layer) for layer in saved]), here)
    assert WeightMap.between(saved, here)  # a version that records it
