"""The comparison of settings between ranks, and with those of a saved run."""

from collections.abc import Mapping, Sequence
from typing import Any

from lentando.comm.errors import MismatchError, grouped_by_rank
from lentando.optimizers.rules.describe import differences, with_defaults
from lentando.optimizers.rules.settings import DESCRIPTION_VERSION, Settings, method_of

__all__ = ["check_same_settings", "different_from"]


def check_same_settings(by_rank: Sequence[dict[str, Any]]) -> None:
    """Compare the settings of all ranks.

    Args:
        by_rank: ``Settings.description`` of each.

    Raises:
        MismatchError: with each setting that differs, its values, and the ranks that have them.
    """
    if differing := differences(by_rank):
        listed = "; ".join(f"{key}: {grouped_by_rank(values)}" for key, values in differing)
        raise MismatchError(
            f"the settings differ between ranks. {listed}. Give every rank the same. An object of your own is compared "
            "by its attributes, or by what its method describe() returns, if it has one"
        )


def different_from(settings: Settings, saved: Mapping[str, Any]) -> str:
    """The settings in which a saved run differs, with both values, for an error message; empty if it can be resumed.

    Args:
        settings: settings here, with "auto" replaced by what it stands for.
        saved: ``Settings.method`` of the saved run, by this or an earlier version.
    """
    if saved.get("version") != DESCRIPTION_VERSION:
        return f"they are of version {saved.get('version')} of their format, this Lentando reads {DESCRIPTION_VERSION}"
    differing = differences([method_of(with_defaults(dict(saved), settings)), settings.method])
    return "; ".join(f"{key} was {before}, and is {here} here" for key, (before, here) in differing)
