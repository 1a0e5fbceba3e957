"""Do all ranks train the same model in the same way? Asked once, before anything else is sent."""

import numpy as np

from lentando.comm.control import Control, Event, agree, fingerprint
from lentando.comm.errors import MismatchError, grouped_by_rank
from lentando.comm.flat import describe, first_difference
from lentando.comm.objects import allgather_object
from lentando.comm.transport import Transport
from lentando.optimizers.framework import Framework
from lentando.optimizers.settings import Settings

__all__ = ["check_equal", "subject"]


def subject(framework: Framework, settings: Settings) -> int:
    """A fingerprint of model and settings."""
    return fingerprint([describe(buffer.layout for buffer in framework.buffers), settings.in_words()])


def check_equal(transport: Transport, framework: Framework, settings: Settings) -> None:
    """Collective: every rank calls it with what it has.

    Raises:
        MismatchError: on every rank, with the first difference and the ranks that have it.
    """
    agree(transport, Control(Event.CONSTRUCT), lambda: "wraps an optimizer")
    subjects = transport.allgather(np.array([subject(framework, settings)], np.int64))
    if (subjects == subjects[0]).all():
        return
    by_rank = allgather_object(transport, settings.in_words())
    if len(set(by_rank)) > 1:
        raise MismatchError(f"the settings differ between ranks: {grouped_by_rank(by_rank)}")
    layouts = allgather_object(transport, describe(buffer.layout for buffer in framework.buffers))
    raise MismatchError(
        f"the models differ between ranks. First difference: {first_difference(layouts)}. Build the same model, "
        "with the same parameter groups, on every rank"
    )
