"""Checks of a transport that opens transports for some of its ranks (``lentando.comm.capabilities.Subsets``)."""

from collections.abc import Callable

import numpy as np

from lentando.comm.capabilities import Elastic, Subsets
from lentando.comm.testing.checks import TransportChecks
from lentando.comm.transport import Transport

__all__ = ["SubsetChecks"]


class SubsetChecks(TransportChecks):
    """Checks of subsets of the ranks."""

    def subsets(self, check_subset: Callable[[Transport], None]) -> None:
        """Two disjoint subsets work at the same time, apart from each other and from all ranks.

        Args:
            check_subset: runs the other checks of the suite on a transport.
        """
        transport = self.transport
        if not isinstance(transport, Subsets) or isinstance(transport, Elastic):
            return
        everyone, parity = range(transport.size), transport.rank % 2
        subsets = [self._opened(transport, everyone[first::2]) for first in (0, 1) if everyone[first::2]]
        before = transport.traffic.copy()
        own = subsets[parity]
        assert own is not None
        check_subset(own)  # of even and odd ranks at the same time
        self.require(transport.traffic.copy() == before, "operations of a subset were counted as traffic of all ranks")
        own.close()
        last = self._opened(transport, everyone[-1:])
        if last is not None:
            last.close()
        whole = self._opened(transport, everyone)
        assert whole is not None
        self._check_apart(whole)
        whole.close()
        transport.barrier()

    def _opened(self, transport: Subsets, members: range) -> Transport | None:
        ranks = list(members)
        subset = transport.for_ranks(ranks)
        own = self.transport.rank
        self.require((subset is not None) == (own in ranks), f"for_ranks({ranks}) returned {subset!r}")
        if subset is not None:
            found, expected = (subset.rank, subset.size), (ranks.index(own), len(ranks))
            self.require(found == expected, f"for_ranks({ranks}): rank and size are {found}, expected {expected}")
        return subset

    def _check_apart(self, subset: Transport) -> None:
        """Messages over all ranks and over a subset with the same ranks, with the same tag, are not mixed up."""
        transport = self.transport
        received = self.empty(), self.empty()
        requests = [
            each.exchange([], [(self.previous, array)], 3)
            for each, array in zip((transport, subset), received, strict=True)
        ]
        for number, each in reversed([*enumerate((transport, subset))]):
            requests.append(each.exchange([(self.next, self.numbers(transport.rank, number))], [], 3))
        for request in requests:
            request.wait()
        for number, (array, name) in enumerate(zip(received, ("all ranks", "a subset"), strict=True)):
            self.require_equal(array, self.numbers(self.previous, number), f"a message over {name}")
        total = np.array([1.0])
        subset.allreduce(total)
        self.require_equal(total, np.array([float(transport.size)]), "an allreduce over a subset of all ranks")
