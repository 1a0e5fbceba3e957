"""Ends messages that no rank will receive or send any more, because an error has ended the operation that needed them.

The threads that wait for them must end before the process does: Gloo reports to them when the other processes end,
and a thread that then returns to the interpreter ends the process with an error.
"""

from collections import Counter
from collections.abc import Callable

from lentando.comm.objects import allgather_object
from lentando.comm.transport import Transport
from lentando.comm.transports.torch_distributed.waiting import END_SECONDS, WaitingThreads

__all__ = ["end_unmatched"]


def end_unmatched(
    transport: Transport,
    threads: WaitingThreads,
    send: Callable[[int, int], object],
    receive: Callable[[int, int, int], object],
) -> None:
    """Complete the messages that threads still wait for, each by its missing counterpart. Collective.

    Args:
        transport: transport of the same ranks, for the exchange of what they wait for.
        threads: the threads, which have been asked to end.
        send: sends a byte to a peer with a tag.
        receive: receives from a peer with a tag, up to a number of bytes.
    """
    before: object = None
    while True:
        by_rank = allgather_object(transport, [list(message[1:]) for message in threads.in_flight()])
        if by_rank == before or not any(by_rank):
            break
        before = by_rank
        threads.join(END_SECONDS)  # of a large message, only one end may be complete yet
    own = Counter((peer, is_sent, tag) for peer, is_sent, tag, _ in by_rank[transport.rank])
    for peer, messages in enumerate(by_rank):
        theirs = [(is_sent, tag, nbytes) for other, is_sent, tag, nbytes in messages if other == transport.rank]
        longest = max((nbytes for _, _, nbytes in theirs), default=0)
        for (is_sent, tag), count in Counter((is_sent, tag) for is_sent, tag, _ in theirs).items():
            for _ in range(count - own[peer, not is_sent, tag]):
                if is_sent:
                    receive(peer, tag, longest)
                else:
                    send(peer, tag)
    threads.join(END_SECONDS)
