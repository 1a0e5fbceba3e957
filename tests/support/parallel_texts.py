"""A toy language in the format of parallel text: sentences of numbers in words, and their translations word by word."""

from pathlib import Path

import numpy as np

WORDS = {
    "one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs", "seven": "sieben",
    "eight": "acht", "nine": "neun", "ten": "zehn",
}  # fmt: skip


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """Sentences of 1 to 7 words, and their translations."""
    generator = np.random.default_rng(seed)
    chosen = [generator.choice(list(WORDS), generator.integers(1, 8)).tolist() for _ in range(count)]
    return [(" ".join(words), " ".join(WORDS[word] for word in words)) for words in chosen]


def write_parallel_text(folder: Path, train: int = 200, others: int = 12) -> Path:
    """Write train.en, train.de, valid.en, ... Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (part, count) in enumerate((("train", train), ("valid", others), ("test", others))):
        for language, texts in zip(("en", "de"), zip(*sentences(count, seed), strict=True), strict=True):
            (folder / f"{part}.{language}").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return folder
