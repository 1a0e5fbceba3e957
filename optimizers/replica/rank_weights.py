"""The weights of the ranks in outer averages, agreed in the control message of each round."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from math import nan

import numpy as np

from lentando.comm.agreement import Event, ranks_where
from lentando.comm.checks import is_number
from lentando.comm.errors import ConfigurationError
from lentando.comm.numbering import in_words, number_of
from lentando.comm.transport import Array
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.setup import Setup
from lentando.optimizers.rules.movement_penalty import normalized_factors, rank_factors
from lentando.optimizers.rules.outer_step import OuterStep
from lentando.optimizers.rules.partial_average import PartialAverage

__all__ = ["RankWeights"]

_log = logging.getLogger("lentando")


class RankWeights:
    """Weights the movements of the ranks by what each has done in the round, and by how far it has moved.

    Args:
        setup: transport, framework and method of the replica.
        progress: steps and samples of the replica.

    Attributes:
        is_needed: whether the method needs weights; only then this takes part in control messages.
        left_out: number of rounds in which this rank's movement was an outlier.
        norm: norm of this rank's movement in the last round; NaN if it is not measured.
    """

    def __init__(self, setup: Setup, progress: Progress) -> None:
        self.is_needed = setup.settings.averages_movements
        self.left_out = 0
        self.norm = nan
        self._setup = setup
        self._progress = progress
        self._share: PartialAverage | None = None

    def record_samples(self, samples: float, count: int = 1) -> None:
        """Add the number of samples of a step, by which ``weighting="samples"`` weights the ranks.

        Args:
            samples: number of samples, 0 or more. With a ``count``, a sum of such numbers.
            count: number of steps that it is the sum of.

        Raises:
            ConfigurationError: if it is no such number.
        """
        if not is_number(samples) or not samples >= 0:
            where = number_of(self._setup.transport)
            raise ConfigurationError(f"samples must be a number >= 0 on rank {where}, got {samples!r}")
        self._progress.samples += float(samples)
        self._progress.steps_with_samples += count

    def contribute(self, event: Event) -> Mapping[str, float]:
        """Attach what this rank has done in the round, and how far it has moved."""
        if event is not Event.ROUND:
            return {}
        numbers = {}
        settings, outer = self._setup.settings, self._setup.outer
        if settings.weighting != "equal":
            numbers["work"] = self._work()
        if settings.movement_penalty is not None and isinstance(outer, OuterStep):
            self.norm = numbers["movement"] = outer.movement_norm()
        return numbers

    def receive(self, event: Event, by_rank: Mapping[str, Array]) -> None:
        """Decide the weights from the numbers of all ranks."""
        if event is not Event.ROUND:
            return
        self._share = None
        settings, transport = self._setup.settings, self._setup.transport
        in_full = bool(by_rank["weights_set"].any())
        counting = by_rank["is_finite"] != 0
        if self._progress.is_joined:
            counting &= by_rank["is_active"] != 0
        if in_full:
            self._share = PartialAverage(True, transport.size, transport.size, in_full=True)
            return
        if not counting.any() or (settings.weighting == "equal" and settings.movement_penalty is None):
            return
        work = np.where(counting, by_rank.get("work", np.ones(transport.size)), 0.0)
        if np.isnan(work).any():
            who = in_words(transport, ranks_where(np.isnan(work)))
            raise ConfigurationError(
                f"weighting='samples' needs the number of samples of every step, and {who} took steps without it: give "
                "step(samples=...) on every rank (in Keras: apply(..., samples=...))"
            )
        if not (work > 0).any():
            raise ConfigurationError(
                f"weighting={settings.weighting!r}: no rank has done anything in this round, so that there is nothing "
                "to average"
            )
        norms = by_rank.get("movement")
        penalty = settings.movement_penalty
        if norms is not None and penalty is not None and penalty.outlier_threshold is not None:
            found = self._progress.norms.outliers(
                norms, work > 0, penalty.outlier_threshold, penalty.smoothing, penalty.warmup_rounds
            )
            self._warn_of(found, norms)
            work = np.where(found, 0.0, work)
        if settings.weighting == "normalized":
            factors = rank_factors((work > 0).astype(np.float64), norms, penalty) * normalized_factors(work)
        else:
            factors = rank_factors(work, norms, penalty)
        if (factors == 1).all():
            return
        rank, count = transport.rank, int((factors > 0).sum())
        self._share = PartialAverage(bool(factors[rank] > 0), count, count, weight=float(factors[rank]))

    def share(self, share: PartialAverage | None) -> PartialAverage | None:
        """How this rank takes part in the average of the round.

        Args:
            share: how it would without weights; None for an average over all ranks.
        """
        if self._share is None or share is None:
            return self._share or share
        if self._share.in_full:
            return replace(share, in_full=True)
        return replace(self._share, is_finite=share.is_finite, is_active=self._share.is_active and share.is_active)

    def _work(self) -> float:
        """What this rank has done in the round; NaN if it is not known."""
        progress = self._progress
        taken = progress.steps - progress.steps_along
        if self._setup.settings.weighting == "samples":
            return progress.samples if progress.steps_with_samples == taken else nan
        return taken

    def _warn_of(self, found: Array, norms: Array) -> None:
        transport = self._setup.transport
        if not found.any():
            return
        self.left_out += int(found[transport.rank])
        if transport.rank == 0 or found[transport.rank]:
            _log.warning(
                "outer step %d: the movement of %s was left out, because its norm (%s) is unusual for it",
                self._progress.rounds + 1,
                in_words(transport, ranks_where(found)),
                ", ".join(f"{norm:.3g}" for norm in norms[found]),
            )
