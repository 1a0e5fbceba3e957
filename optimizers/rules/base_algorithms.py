"""Base algorithms: what the replicas say to each other around each inner step, between outer steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, get_args

from lentando.comm.array_module import is_on_host
from lentando.comm.checks import check_choice, check_flag
from lentando.comm.collectives import Algorithm, plan_reduction
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import FlatBuffer
from lentando.comm.thread_transports import borrow_transports
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.gradient_buckets import THREADS, BucketCoverage, Buckets
from lentando.optimizers.rules.partial_average import PartialAverage, mean_over_some
from lentando.optimizers.rules.words import UNSAID

__all__ = ["AllReduce", "BaseAlgorithm", "BoundAlgorithm", "LocalSGD", "OverlappedGradients"]


class BoundAlgorithm:
    """A base algorithm at work in one job. Does nothing at any moment that a subclass does not override.

    Attributes:
        coverage: which of this rank's gradients of this step its buckets hold.
    """

    coverage = BucketCoverage.NONE

    def finish_buckets(self, agreed: BucketCoverage) -> None:
        """Called before ``average_gradients``, unless this rank has run out of batches.

        Args:
            agreed: least coverage of any rank.
        """

    def average_gradients(self, partial_average: PartialAverage | None = None) -> None:
        """After the gradients of a step are there, before the base optimizer uses them.

        Args:
            partial_average: of this rank, if the average is not over all ranks (``join``).
        """

    def after_step(self) -> None:
        """After the base optimizer has stepped."""

    def allow_drop(self) -> None:
        """From now on, ``drop_non_finite`` may be called.

        Raises:
            ConfigurationError: by base algorithms that mix parameters and do not know how to go on then.
        """
        raise ConfigurationError(
            f"{type(self).__name__} does not say how replicas go on without the parameters of a rank that are not "
            "finite (``allow_drop``): use on_nonfinite='raise'"
        )

    def drop_non_finite(self) -> None:
        """Before ``after_step``: this rank's parameters are not finite, and must not reach another."""

    def wait_in_flight(self) -> None:
        """Bring home what is still under way."""

    def prepare_average(self) -> None:
        """Before an exact average: put into the buffers what must be averaged, with nothing under way."""

    def abort_average(self) -> None:
        """The average did not come about: put back what ``prepare_average`` has replaced."""

    def adopt_consensus(self) -> None:
        """The buffers hold new parameters, equal on all ranks: begin from them."""

    def rebase_on_model(self) -> None:
        """The buffers hold new parameters of this rank's own: go on from them."""

    def state_dict(self) -> dict[str, Any]:
        """All that decides the next steps, as numbers, strings, lists, dicts and arrays."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` of an earlier run."""

    # A job that loses ranks makes its base algorithm anew (``bind``). Then these two, for one that exchanges messages.

    @property
    def begun_exchanges(self) -> int:
        """How many gossip steps have begun to exchange messages with some of the ranks."""
        return 0

    def resume_after_failure(self, begun_exchanges: int, most_begun: int) -> None:
        """Begin from the parameters, and exchange nothing in the steps that any rank has begun already.

        Args:
            begun_exchanges: ``begun_exchanges`` of this rank's algorithm before the failure.
            most_begun: largest ``begun_exchanges`` of any rank.
        """
        self.adopt_consensus()

    # A checkpoint that goes on with another number of ranks goes on from the average. These two change nothing here.

    def prepared_average(self, state: dict[str, Any], parameters: Sequence[Array]) -> Sequence[Array]:
        """What ``prepare_average`` would have put into the buffers of a rank.

        Args:
            state: its ``state_dict()``.
            parameters: of its buffers, then.
        """
        return parameters

    def state_for_average(self, state: dict[str, Any], parameters: Sequence[Array]) -> dict[str, Any]:
        """The state with which a world of another size begins from the average.

        Args:
            state: ``state_dict()`` of one of the ranks that there were.
            parameters: the average.

        Raises:
            ConfigurationError: if that is not known.
        """
        if state:
            raise ConfigurationError(
                f"{type(self).__name__} does not say how it continues on another number of ranks "
                "(``state_for_average``): start as many ranks as saved the checkpoint"
            )
        return {}


class BaseAlgorithm(Protocol):
    """Describes a base algorithm. Describing neither communicates nor starts anything: ``bind`` does.

    Attributes:
        averages_gradients: whether every step begins with ``average_gradients``.
        communicates: whether anything is sent between outer steps.
        mixes_parameters: whether ``after_step`` reads and changes the parameters.
    """

    averages_gradients: ClassVar[bool]
    communicates: ClassVar[bool]
    mixes_parameters: ClassVar[bool]

    def bind(
        self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]
    ) -> BoundAlgorithm:
        """Plan the messages for these buffers; ``gradients`` is empty unless ``averages_gradients``."""


@dataclass(frozen=True)
class LocalSGD:
    """Nothing: every replica steps on its own. Between outer steps not one message is sent."""

    averages_gradients: ClassVar[bool] = False
    communicates: ClassVar[bool] = False
    mixes_parameters: ClassVar[bool] = False

    def bind(
        self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]
    ) -> BoundAlgorithm:
        return BoundAlgorithm()


@dataclass(frozen=True)
class AllReduce:
    """Synchronous SGD: gradients are averaged over all replicas before each step, as Horovod and DDP do.

    Args:
        algorithm: how the all-reduce is done; see ``lentando.comm.collectives.plan_reduction``.
        overlap: average gradients in buckets while the backward pass still computes others: in PyTorch, on CPUs, over
            an MPI that lets threads in. Over other transports, and inside ``join``, it changes nothing. What is done
            to a gradient between the backward pass and ``step()`` (clipping, a ``GradScaler``, another backward pass)
            is noticed, and all are averaged again, which costs more than not to overlap: call ``synchronize()`` before
            clipping, and ``no_sync()`` around all backward passes of a step but the last. Gradients that are zeroed in
            place set out at ``step()``: leave ``set_to_none`` as it is.
        bucket_bytes: of the buckets, with ``overlap``.

    Raises:
        ConfigurationError: if ``bucket_bytes`` is not an integer >= 1, or for another ``algorithm``.
    """

    algorithm: Algorithm = "auto"
    overlap: bool = field(default=False, metadata=UNSAID)
    bucket_bytes: int = field(default=25 * 1024 * 1024, metadata=UNSAID)

    averages_gradients: ClassVar[bool] = True
    communicates: ClassVar[bool] = True
    mixes_parameters: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("algorithm", self.algorithm, get_args(Algorithm))
        check_flag("overlap", self.overlap)
        if not isinstance(self.bucket_bytes, int) or isinstance(self.bucket_bytes, bool) or self.bucket_bytes < 1:
            raise ConfigurationError(f"bucket_bytes must be an integer > 0, got {self.bucket_bytes!r}")

    def bind(
        self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]
    ) -> BoundAlgorithm:
        threads = 0
        if self.overlap and transport.size > 1 and all(is_on_host(buffer.array) for buffer in gradients):
            threads = THREADS
        loans = borrow_transports(transport, threads) if threads else []
        if not loans:
            return _AveragedGradients(transport, gradients, self.algorithm)
        buckets = Buckets(loans, gradients, self.algorithm, self.bucket_bytes)
        return OverlappedGradients(transport, gradients, self.algorithm, buckets)


class _AveragedGradients(BoundAlgorithm):
    def __init__(self, transport: Transport, gradients: Sequence[FlatBuffer], algorithm: Algorithm) -> None:
        self._gradients = gradients
        self._reductions = [plan_reduction(transport, buffer.array, algorithm) for buffer in gradients]

    def average_gradients(self, partial_average: PartialAverage | None = None) -> None:
        for buffer, reduction in zip(self._gradients, self._reductions, strict=True):
            if partial_average is None:
                reduction.all_reduce(mean=True)
            else:
                mean_over_some(reduction, buffer.array, partial_average)


class OverlappedGradients(_AveragedGradients):
    """Takes what buckets hold for the mean, where they hold it on all ranks.

    Attributes:
        buckets: an adapter fills them, starts them all before each ``average_gradients`` of a replica outside
            ``join``, and sets ``coverage``.
    """

    def __init__(
        self, transport: Transport, gradients: Sequence[FlatBuffer], algorithm: Algorithm, buckets: Buckets
    ) -> None:
        super().__init__(transport, gradients, algorithm)
        self.buckets = buckets
        self._traffic = transport.traffic
        self._presence = [plan_reduction(transport, own.array[own.layout.offsets[-1] :], "engine") for own in gradients]
        self._agreed = BucketCoverage.NONE

    def finish_buckets(self, agreed: BucketCoverage) -> None:
        """Wait for the buckets that are in flight."""
        self._agreed, self.coverage = agreed, BucketCoverage.NONE
        if self.buckets.is_in_flight:
            self.buckets.wait(self._traffic)

    def average_gradients(self, partial_average: PartialAverage | None = None) -> None:
        """Take over what the buckets hold, or average all."""
        agreed, self._agreed = self._agreed, BucketCoverage.NONE
        if partial_average is not None or agreed is BucketCoverage.NONE:
            super().average_gradients(partial_average)
            return
        self.buckets.take_over()
        if agreed is BucketCoverage.ALL_PRESENT:
            for reduction in self._presence:
                reduction.all_reduce(mean=True)
