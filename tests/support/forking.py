"""A forked child that does something and says whether it found what it expected."""

import os
import traceback
from collections.abc import Callable


def succeeds_in_child(function: Callable[[], None]) -> bool:
    """Whether ``function`` returns in a forked child, which ends there without the parent's clean-up."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:  # noqa: BLE001 - reported, and the child must not leave this function in any other way
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0
