"""Errors of torch.distributed, which are all RuntimeErrors, as errors of Lentando."""

from types import TracebackType

from lentando.comm.errors import TransportError

__all__ = ["TranslatedErrors", "translated"]

_LOST = ("Connection closed by peer", "Connection reset", "Broken pipe", "Socket closed")
"""Parts of Gloo's messages after the end of another rank. They differ between ranks."""


def translated(error: RuntimeError, peer: int | None = None) -> TransportError:
    """Return the error to raise for one of torch.distributed.

    Args:
        error: the error.
        peer: the rank with which this rank exchanged messages; None in a collective.
    """
    if any(part in str(error) for part in _LOST):
        return TransportError(
            f"torch.distributed failed: {'a rank' if peer is None else f'rank {peer}'} has died, or has left the job "
            "without the others. See its last output for the reason, or the output of torchrun. Restart the job from "
            "the last checkpoint"
        )
    return TransportError(f"torch.distributed failed: {error}")


class TranslatedErrors:
    """A context that turns an error of torch.distributed into one of Lentando.

    Args:
        peer: the rank with which this rank exchanges messages; None in a collective.
    """

    def __init__(self, peer: int | None = None) -> None:
        self._peer = peer

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, TransportError):
            raise translated(error, self._peer) from error
