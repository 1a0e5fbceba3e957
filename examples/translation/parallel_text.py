"""Parallel text as sub-words: two files of one sentence a line for each part, and a sentencepiece vocabulary.

Nothing is downloaded. In the folder of ``--data`` lie

    train.en  train.de     one sentence a line, UTF-8; line N of one file is the translation of line N of the other
    valid.en  valid.de
    test.en   test.de
    vocabulary.model       python examples/translation/vocabulary.py --data DIR makes it of the training text

with other endings for other languages (``--source``, ``--target``). ``make data`` makes English-German text of Debian's
packages in data/gettext-en-de.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
import sentencepiece
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[1]))
from recipe_loop import DataError

PAD, EOS, UNKNOWN = 0, 1, 2
"""Numbers of the sub-words that are no text, in vocabularies of vocabulary.py."""
AT_ONCE = 100_000
"""Lines that are in memory as text."""


@dataclass(frozen=True)
class Sentences:
    """Sentences as numbers of sub-words, each with EOS at its end, one after the other.

    Attributes:
        subwords: all of them, of shape (sum of lengths,).
        begins: where each sentence begins, and the end of the last one, of shape (sentences + 1,).
    """

    subwords: NDArray[np.int32]
    begins: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.begins) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.begins)

    def only(self, chosen: NDArray[np.int64]) -> "Sentences":
        parts = [self.subwords[self.begins[number] : self.begins[number + 1]] for number in chosen]
        return Sentences(np.concatenate([self.subwords[:0], *parts]), np.cumsum([0, *self.lengths[chosen]]))

    def padded(self, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        """The chosen sentences, of shape (chosen, longest), filled up with PAD."""
        lengths = self.lengths[chosen]
        columns = np.arange(lengths.max())
        places = self.begins[chosen, None] + columns
        inside = columns < lengths[:, None]
        return np.where(inside, self.subwords[np.where(inside, places, 0)], PAD).astype(np.int64)


@dataclass(frozen=True)
class Pairs:
    """Sentences and their translations."""

    source: Sentences
    target: Sentences

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Length of the longer side of each pair."""
        return np.maximum(self.source.lengths, self.target.lengths)

    def only(self, chosen: NDArray[np.int64]) -> "Pairs":
        return Pairs(self.source.only(chosen), self.target.only(chosen))

    def up_to(self, length: int) -> "Pairs":
        """The pairs that are not longer."""
        return self.only(np.flatnonzero(self.lengths <= length))

    def sample(self, count: int) -> "Pairs":
        """About so many pairs at equal distances, or all of them if there are not more."""
        return self.only(np.arange(0, len(self), max(1, len(self) // count)))


@dataclass(frozen=True)
class ParallelText:
    """The parts of a corpus, the vocabulary, and the lines of the reference translations."""

    train: Pairs
    valid: Pairs
    test: Pairs
    vocabulary: sentencepiece.SentencePieceProcessor
    references: dict[str, list[str]]

    def longest(self) -> int:
        """Sub-words of the longest sentence, in all parts and both languages."""
        return max(int(pairs.lengths.max()) for pairs in (self.train, self.valid, self.test))

    @cached_property
    def checksum(self) -> str:
        """Of all sub-words, to compare whether ranks and runs have the same text and vocabulary."""
        total = 0
        for pairs in (self.train, self.valid, self.test):
            for side in (pairs.source, pairs.target):
                total = crc32(side.begins, crc32(side.subwords, total))
        return f"{total:08x}"


def lines(file: Path) -> Iterator[str]:
    """The lines of a file of sentences, without their ends.

    Raises:
        DataError: if it is missing, empty, no UTF-8, or ends in the middle of a line.
    """
    if not file.is_file():
        raise DataError(f"there is no file {file}: one sentence a line, as parallel_text.py describes")
    number = 0
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            if not line.endswith(b"\n"):
                raise DataError(f"{file} is cut: line {number} has no end. Copy it again")
            try:
                yield line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{file} is damaged: line {number} is no UTF-8 text. Copy it again") from error
    if number == 0:
        raise DataError(f"{file} is empty: copy it again")


def read_vocabulary(file: Path) -> sentencepiece.SentencePieceProcessor:
    """Read a sentencepiece model whose special sub-words are those of vocabulary.py.

    Raises:
        DataError: if it is missing, damaged, or has others.
    """
    advice = f"python examples/translation/vocabulary.py --data {file.parent} makes one"
    if not file.is_file():
        raise DataError(f"there is no vocabulary {file}: {advice}")
    vocabulary = sentencepiece.SentencePieceProcessor()
    try:
        vocabulary.load_from_serialized_proto(file.read_bytes())
    except RuntimeError as error:
        raise DataError(f"{file} is no sentencepiece vocabulary, or it is damaged: {advice}") from error
    if (vocabulary.pad_id(), vocabulary.eos_id(), vocabulary.unk_id()) != (PAD, EOS, UNKNOWN):
        raise DataError(f"{file} has other numbers for padding, end and unknown than {PAD}, {EOS}, {UNKNOWN}: {advice}")
    return vocabulary


def encoded(file: Path, vocabulary: sentencepiece.SentencePieceProcessor) -> Sentences:
    subwords, lengths = [np.empty(0, np.int32)], [np.zeros(1, np.int64)]
    text = lines(file)
    while chunk := list(islice(text, AT_ONCE)):
        numbers = vocabulary.encode(chunk, out_type=int, add_eos=True)
        subwords.append(np.fromiter((number for line in numbers for number in line), np.int32))
        lengths.append(np.fromiter(map(len, numbers), np.int64, len(numbers)))
    return Sentences(np.concatenate(subwords), np.cumsum(np.concatenate(lengths)))


@lru_cache  # simulated ranks share it
def load(folder: Path, source: str, target: str) -> ParallelText:
    """Read a corpus.

    Args:
        folder: folder that holds it, as at the top of this file.
        source: ending of the files that are translated.
        target: ending of the files of their translations.

    Raises:
        DataError: if it is missing or damaged, or the sides differ in their number of lines.
    """
    files = {part: (folder / f"{part}.{source}", folder / f"{part}.{target}") for part in ("train", "valid", "test")}
    missing = [str(file) for pair in files.values() for file in pair if not file.is_file()]
    if missing:
        raise DataError(
            f"{folder} holds no parallel text: {', '.join(missing)} missing. Each is UTF-8 text, one sentence a "
            "line; make data makes English-German ones in data/gettext-en-de"
        )
    vocabulary = read_vocabulary(folder / "vocabulary.model")
    parts = {}
    for part, (original, translated) in files.items():
        pairs = Pairs(encoded(original, vocabulary), encoded(translated, vocabulary))
        if len(pairs.source) != len(pairs.target):
            raise DataError(
                f"{original} has {len(pairs.source)} lines and {translated} has {len(pairs.target)}: line N of one "
                "must be the translation of line N of the other. Copy both again"
            )
        parts[part] = pairs
    references = {part: list(lines(files[part][1])) for part in ("valid", "test")}
    return ParallelText(**parts, vocabulary=vocabulary, references=references)
