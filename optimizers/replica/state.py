"""The state of a replica: all that decides the next step, to be saved and resumed."""

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

from lentando.comm.agreement import fingerprint
from lentando.comm.elastic import without_vote
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import describe
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.setup import Setup
from lentando.optimizers.rules.period import Decision
from lentando.optimizers.rules.settings_comparison import different_from
from lentando.optimizers.rules.streamed_step import StreamedOuterStep

__all__ = ["check_state", "copied", "is_of_one_rank", "load_state", "return_to_state", "state_of", "state_to_return_to"]

STATE_VERSION = 3
"""Version of what ``state_of`` returns. Version 2 held a fingerprint of the settings in words."""


def state_of(setup: Setup, progress: Progress) -> dict[str, Any]:
    """Return all that decides the next step of a replica besides parameters and base optimizer."""
    weights_set = {"weights_set": True} if setup.framework.watch.found else {}
    return {
        **weights_set,
        "version": STATE_VERSION,
        "layout": _layout_of(setup),
        "settings": setup.settings.method,
        "rank": setup.transport.rank,
        "size": setup.transport.size,
        **_state_without_base(setup, progress),
        "base": _state_of_base(setup),
    }


def _state_without_base(setup: Setup, progress: Progress) -> dict[str, Any]:
    return {
        "started": progress.has_started,
        "clock": progress.seconds(),
        "decisions": [list(astuple(decision)) for decision in progress.decisions],
        "inner_steps": progress.inner_steps,
        "rounds": progress.rounds,
        "steps": progress.steps,
        "steps_in_round": progress.steps_in_round,
        "rate_sums": list(progress.rate_sums),
        "loss_sum": float(progress.loss_sum),
        "loss_count": progress.loss_count,
        **_state_of_weights(setup, progress),
        "period": None if progress.period is None else progress.period.state_dict(),
        "outer": None if setup.outer is None else setup.outer.state_dict(),
        **(setup.outer.timetable_state() if isinstance(setup.outer, StreamedOuterStep) else {}),
    }


def _state_of_weights(setup: Setup, progress: Progress) -> dict[str, Any]:
    if not setup.settings.averages_movements:
        return {}
    return {
        "samples": progress.samples,
        "steps_with_samples": progress.steps_with_samples,
        "norms": progress.norms.state_dict(),
    }


def is_of_one_rank(setup: Setup) -> bool:
    """Whether a state differs between ranks, so that only the rank that saved it can resume from it.

    Where each step averages gradients and there is nothing else, replicas are equal, and the state of any will do.
    """
    return not setup.settings.base.averages_gradients or setup.outer is not None or setup.base.has_state


def check_state(state: Mapping[str, Any], setup: Setup) -> None:
    """Check that a replica can resume from a state. Changes nothing.

    Args:
        state: result of ``state_of``.
        setup: the replica's transport, framework and method.

    Raises:
        ConfigurationError: if the state is of another version, model, method, world size or rank.
    """
    if state["version"] != STATE_VERSION:
        raise ConfigurationError(
            f"cannot resume: the saved state has version {state['version']} of its format, this Lentando reads version "
            f"{STATE_VERSION}: resume with the Lentando that saved it, or from a checkpoint of lt.save"
        )
    if found := different_from(setup.settings, state["settings"]):
        raise ConfigurationError(f"cannot resume: the state was saved with other settings than those here: {found}")
    expected = {"layout": (_layout_of(setup), "the fingerprint of the model (the same parameters must be trainable)")}
    if is_of_one_rank(setup):
        expected |= {
            "size": (setup.transport.size, "the world size (to change it, use lt.save and lt.load)"),
            "rank": (setup.transport.rank, "the rank (each rank must load the state that it saved itself)"),
        }
    for key, (wanted, meaning) in expected.items():
        if state[key] != wanted:
            raise ConfigurationError(f"cannot resume: {meaning} is {wanted} here, but {state[key]} in the saved state")


def load_state(state: Mapping[str, Any], setup: Setup, progress: Progress) -> None:
    """Resume from a state that ``state_of`` has returned. Raises as ``check_state``."""
    check_state(state, setup)
    return_to_state(state, setup, progress)
    setup.base.state.load_state_dict(state["base"])


def state_to_return_to(setup: Setup, progress: Progress) -> dict[str, Any]:
    """Return copies of the part of ``state_of`` that does not depend on which ranks are alive. Waits for no message."""
    weights_set = {"weights_set": True} if setup.framework.watch.found else {}
    state: dict[str, Any] = copied({**weights_set, **_state_without_base(setup, progress)})
    return state


def return_to_state(state: Mapping[str, Any], setup: Setup, progress: Progress) -> None:
    """Restore everything but the state of the base algorithm, which is left as it is."""
    # The program may load the model's weights after this, so they are not compared before the next step ends.
    setup.framework.watch.forget()
    setup.framework.watch.reset(found=state.get("weights_set", False))
    progress.has_started = state["started"]
    progress.start_clock(state["clock"])
    progress.decisions = [Decision(*decision) for decision in state["decisions"]]
    progress.inner_steps, progress.rounds = state["inner_steps"], state["rounds"]
    progress.steps, progress.steps_in_round = state["steps"], state["steps_in_round"]
    progress.due = progress.steps_in_round
    progress.rate_sums = list(state["rate_sums"])
    progress.loss_sum, progress.loss_count = state["loss_sum"], state["loss_count"]
    if setup.settings.averages_movements:
        progress.samples, progress.steps_with_samples = state["samples"], state["steps_with_samples"]
        progress.norms.load_state_dict(state["norms"])
    if progress.period is not None:
        progress.period.load_state_dict(state["period"])
    if setup.outer is not None:
        setup.outer.load_state_dict(state["outer"])
    if isinstance(setup.outer, StreamedOuterStep):
        setup.outer.load_timetable(state)
        progress.due = setup.outer.next_due(progress.steps, progress.steps_in_round or 1, progress.inner_steps)


def copied(state: Any) -> Any:
    """Return a state with its arrays copied, within dicts and lists: a saved state must not change with later steps."""
    if isinstance(state, dict):
        return {key: copied(item) for key, item in state.items()}
    if isinstance(state, list):
        return [copied(item) for item in state]
    return state.copy() if hasattr(state, "copy") else state


def _layout_of(setup: Setup) -> int:
    """Return the fingerprint of the flat buffers: names, shapes, dtypes and groups of the tensors."""
    return fingerprint(describe(buffer.layout for buffer in setup.framework.buffers))


def _state_of_base(setup: Setup) -> dict[str, Any]:
    """Return the state of the base algorithm, which may wait for messages."""
    state: dict[str, Any] = {}
    while not without_vote(setup.transport, lambda: state.update(setup.base.state.state_dict())):
        pass
    return state
