"""A replica's state, to be saved and continued from: all that decides the next step."""

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

from lentando.comm.control import fingerprint
from lentando.comm.elastic import without_vote
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import describe
from lentando.optimizers.replica.plan import Plan
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.rounds import Rounds
from lentando.optimizers.rules.period import Decision
from lentando.optimizers.rules.settings import different_from

__all__ = ["check_state", "copied", "load_state", "state_of"]

STATE_VERSION = 3
"""Of what ``state_of`` returns. Version 2 held a fingerprint of the settings in words."""


def state_of(plan: Plan, progress: Progress, rounds: Rounds) -> dict[str, Any]:
    """See ``Replica.state_dict``."""
    weights_set = {"weights_set": True} if plan.framework.watch.found else {}
    return {
        **weights_set,
        "version": STATE_VERSION,
        "layout": _layout_of(plan),
        "settings": plan.settings.method,
        "rank": plan.transport.rank,
        "size": plan.transport.size,
        "started": progress.has_started,
        "clock": progress.seconds(),
        "decisions": [list(astuple(decision)) for decision in rounds.decisions],
        "inner_steps": progress.inner_steps,
        "rounds": progress.rounds,
        "steps": progress.steps,
        "steps_in_round": progress.steps_in_round,
        "rate_sums": list(progress.rate_sums),
        "loss_sum": float(progress.loss_sum),
        "loss_count": progress.loss_count,
        "base": _state_of_base(plan),
        "period": None if rounds.period is None else rounds.period.state_dict(),
        "outer": None if plan.outer is None else plan.outer.state_dict(),
    }


def check_state(state: Mapping[str, Any], plan: Plan) -> None:
    """See ``Replica.check_state``."""
    if state["version"] != STATE_VERSION:
        raise ConfigurationError(
            f"cannot resume: the saved state has version {state['version']} of its format, this Lentando reads version "
            f"{STATE_VERSION}: resume with the Lentando that saved it, or from a checkpoint of lt.save"
        )
    if found := different_from(plan.settings, state["settings"]):
        raise ConfigurationError(f"cannot resume: the state was saved with other settings than those here: {found}")
    mine = {
        "size": (plan.transport.size, "the world size (to change it, use lt.save and lt.load)"),
        "rank": (plan.transport.rank, "the rank (each rank must load the state that it saved itself)"),
        "layout": (_layout_of(plan), "the fingerprint of the model (the same parameters must be trainable)"),
    }
    for key, (wanted, what) in mine.items():
        if state[key] != wanted:
            raise ConfigurationError(f"cannot resume: {what} is {wanted} here, but {state[key]} in the saved state")


def load_state(state: Mapping[str, Any], plan: Plan, progress: Progress, rounds: Rounds) -> None:
    """See ``Replica.load_state_dict``."""
    check_state(state, plan)
    # The program may load the model's weights after this, which therefore are not compared before the next step ends.
    plan.framework.watch.forget()
    plan.framework.watch.reset(found=state.get("weights_set", False))
    progress.has_started = state["started"]
    progress.start_clock(state["clock"])
    rounds.decisions = [Decision(*decision) for decision in state["decisions"]]
    progress.inner_steps, progress.rounds = state["inner_steps"], state["rounds"]
    progress.steps, progress.steps_in_round = state["steps"], state["steps_in_round"]
    progress.rate_sums = list(state["rate_sums"])
    progress.loss_sum, progress.loss_count = state["loss_sum"], state["loss_count"]
    plan.base.state.load_state_dict(state["base"])
    if rounds.period is not None:
        rounds.period.load_state_dict(state["period"])
    if plan.outer is not None:
        plan.outer.load_state_dict(state["outer"])


def copied(state: Any) -> Any:
    """Arrays within dicts and lists copied: what is saved must not change with the next step."""
    if isinstance(state, dict):
        return {key: copied(item) for key, item in state.items()}
    if isinstance(state, list):
        return [copied(item) for item in state]
    return state.copy() if hasattr(state, "copy") else state


def _layout_of(plan: Plan) -> int:
    """Fingerprint of the flat buffers: names, shapes, dtypes and groups of the tensors."""
    return fingerprint(describe(buffer.layout for buffer in plan.framework.buffers))


def _state_of_base(plan: Plan) -> dict[str, Any]:
    """The base algorithm's, which may wait for messages."""
    state: dict[str, Any] = {}
    while not without_vote(plan.transport, lambda: state.update(plan.base.state.state_dict())):
        pass
    return state
