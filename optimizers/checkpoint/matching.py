"""Which tensor of a checkpoint becomes which tensor of a model: as given, by the layers, or by equal names."""

from collections.abc import Mapping, Sequence

from lentando.comm.dtypes import is_floating, numpy_dtype
from lentando.comm.errors import CheckpointError, ConfigurationError
from lentando.comm.flat import Entry, describe, in_words
from lentando.comm.transport import Array
from lentando.optimizers.checkpoint.layers import layers_from_json
from lentando.optimizers.checkpoint.pairing import differing_settings, pairs_of
from lentando.optimizers.checkpoint.source import Source
from lentando.optimizers.checkpoint.training import Training
from lentando.optimizers.checkpoint.weight_map import WeightMap, WeightRule
from lentando.optimizers.framework import Framework

__all__ = ["check_dtypes", "entries_of", "matched_weights", "settings_to_check"]

NAMES_ADVICE = (
    "Only names differ: pass the same model as model= as then (the names of what torch.compile returns begin with "
    "'_orig_mod.'), or give mapping="
)


def entries_of(framework: Framework) -> list[Entry]:
    """The tensors of a model's flat buffers, in their order."""
    return [entry for buffer in framework.buffers for entry in buffer.layout.entries]


def matched_weights(source: Source, training: Training, given: WeightMap | None) -> WeightMap:
    """The map from the tensors of a checkpoint to all tensors of the model.

    Args:
        source: the checkpoint.
        training: the model.
        given: the user's map, None to find one.

    Raises:
        CheckpointError: if the checkpoint is of another model, or which tensor is which is not known.
        ConfigurationError: if the map does not fit, or the layers cannot be paired.
    """
    framework = training.replica.framework
    not_averaged = framework.not_averaged()
    saved = {entry.name: entry.shape for entry in source.entries}
    here = {entry.name: entry.shape for entry in entries_of(framework)}
    saved_rest = {name: (tuple(shape), dtype) for name, shape, dtype in source.own.about["not_averaged"]}
    weights = given
    if weights is None and source.manifest["entries"] != describe(buffer.layout for buffer in framework.buffers):
        if source.framework == framework.name:
            raise CheckpointError(f"it is of another model: {_first_difference(source, framework)}")
        weights = _paired_layers(source, training)
    if weights is None:
        names = [*here, *(name for name in not_averaged if name in saved_rest)]
        weights = WeightMap(WeightRule(name, name) for name in names)
    mentioned = {rule.source for rule in weights.rules.values()}
    # Counters and the like exist in one framework only: those that no rule mentions stay as they are.
    saved |= {
        name: shape
        for name, (shape, dtype) in saved_rest.items()
        if name in mentioned or is_floating(numpy_dtype(dtype))
    }
    here |= {
        name: array.shape
        for name, array in not_averaged.items()
        if name in weights.by_target or is_floating(array.dtype)
    }
    weights.check(saved, here)
    return weights


def settings_to_check(source: Source, training: Training, weights: WeightMap) -> Sequence[str]:
    """Notes for the user on a checkpoint of another framework: layers whose settings differ, or were paired by order.

    Args:
        source: the checkpoint.
        training: the model.
        weights: the map that was used.
    """
    if weights.notes or source.framework == training.replica.framework.name:
        return weights.notes
    try:
        layers = training.layers()
    except ConfigurationError as error:  # no reason not to load: the map was given
        return [f"whether settings differ is not known: {error}"]
    saved = layers_from_json(source.manifest["layers"] or [])
    return differing_settings(pairs_of(list(weights.rules.values()), saved, layers or []))


def check_dtypes(weights: WeightMap, values: Mapping[str, Array], framework: Framework) -> None:
    """Check that the values have the dtypes of the model's tensors.

    Args:
        weights: the map that has made the values.
        values: new values of the model's tensors, by name.
        framework: the model.

    Raises:
        CheckpointError: at the first tensor of another dtype.
    """
    dtypes = {entry.name: entry.dtype for entry in entries_of(framework)}
    dtypes |= {name: array.dtype.name for name, array in framework.not_averaged().items()}
    for rule in weights.rules.values():
        saved = values[rule.target].dtype.name
        if saved != dtypes[rule.target]:
            raise CheckpointError(
                f"{rule.source!r} was saved as {saved}, but {rule.target!r} is {dtypes[rule.target]} here"
            )


def _paired_layers(source: Source, training: Training) -> WeightMap:
    """The map that pairing the layers of both models gives."""
    layers, saved = training.layers(), source.manifest["layers"]
    if layers is None or saved is None:
        reason = source.manifest["why_no_layers"] or "no model= was given here"
        raise CheckpointError(
            f"it was saved by {source.framework}, and which of its tensors is which here is not known: give mapping=, "
            f"or model= to the optimizers of both frameworks ({reason})"
        )
    return WeightMap.between(layers_from_json(saved), layers)


def _first_difference(source: Source, framework: Framework) -> str:
    """The first difference between the saved model and that here, for an error message."""
    entries = entries_of(framework)
    trained_then = {entry.name for entry in source.entries if entry.group is not None}
    trained_now = {entry.name for entry in entries if entry.group is not None}
    frozen_then = {name for name, *_ in source.own.about["not_averaged"]}
    advice = "train the same parameters as then (requires_grad, trainable) before loading"
    if names := sorted(trained_then & framework.not_averaged().keys()):
        return f"{names[0]!r} was trained when it was saved, and is frozen here: {advice}"
    if names := sorted(trained_now & frozen_then):
        return f"{names[0]!r} was frozen when it was saved, and is trained here: {advice}"
    saved, here = source.manifest["entries"], describe(buffer.layout for buffer in framework.buffers)
    differ_by_names = [about for _, *about in saved] == [about for _, *about in here]
    for number in range(max(len(saved), len(here))):
        saved_tensor, tensor = in_words(saved, number), in_words(here, number)
        if saved_tensor != tensor:
            difference = f"its tensor number {number} is {saved_tensor}, the model's is {tensor}"
            return f"{difference}. {NAMES_ADVICE}" if differ_by_names else difference
    raise AssertionError("equal descriptions")
