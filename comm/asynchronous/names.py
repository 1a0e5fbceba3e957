"""Names of operations, sent as numbers from the second time on."""

from typing import Any

__all__ = ["Names"]

NUMBERED = 8192
"""The most names that get a number: a program that makes a new name for each operation must not exhaust memory."""


class Names:
    """Numbers for pairs of a name and a description, given in the same order by the sender and by each receiver.

    Example:
        >>> sender, receiver = Names(), Names()
        >>> for _ in range(2):
        ...     sent = sender.encode(("gradient", "allreduce"))
        ...     print(sent, receiver.decode(sent))
        ['gradient', 'allreduce'] ('gradient', 'allreduce')
        0 ('gradient', 'allreduce')
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str], int] = {}
        self._pairs: list[tuple[str, str]] = []

    def encode(self, pair: tuple[str, str]) -> Any:
        """The number of a pair that was sent before, otherwise the pair itself."""
        number = self._numbers.get(pair)
        if number is None:
            self._add(pair)
            return list(pair)
        return number

    def decode(self, sent: Any) -> tuple[str, str]:
        """The pair that ``encode`` of the sender was given."""
        if isinstance(sent, int):
            return self._pairs[sent]
        pair = (sent[0], sent[1])
        self._add(pair)
        return pair

    def _add(self, pair: tuple[str, str]) -> None:
        if len(self._pairs) < NUMBERED:
            self._numbers[pair] = len(self._pairs)
            self._pairs.append(pair)
