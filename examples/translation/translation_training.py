"""The translation recipe on one rank, in both frameworks: batches, learning rates, and BLEU."""

import argparse
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from parallel_text import DataError, Pairs, ParallelText, load
from sacrebleu.metrics import BLEU
from token_batches import Batch, TokenBatches
from translation_recipes import Recipe

sys.path.append(str(Path(__file__).parents[1]))
import recipe_loop

EXAMPLES = 3
"""Sentences that are printed with their translations."""
MEASURED = 10_000
"""Training pairs of which the training loss is the mean."""


class Translator(Protocol):
    """A Transformer and its optimizer in one framework."""

    optimizer: Any

    def step(self, batch: Batch, learning_rate: float, seed: int) -> Any:
        """Train on a batch; ``seed`` is that of dropout. Returns the mean loss, which ``float`` can read."""

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """The sum of the negative log-likelihoods of the sub-words of the translations, and their number."""

    def translate(self, sources: NDArray[np.int64], beam: int) -> list[list[int]]:
        """Translations of sentences, without PAD and EOS."""

    def weights(self) -> list[Any]:
        """All weights, as NumPy arrays."""


class TranslationCourse:
    """A row of the paper's table on this rank. Collective.

    Attributes:
        text: the corpus.
    """

    optimizer: Any
    weights: Any

    def __init__(self, lt: Any, options: argparse.Namespace) -> None:
        self._lt, self._options = lt, options
        recipe: Recipe = options.recipe
        recipe_loop.read_together(lt, self._read)
        recipe_loop.compare(lt, self.text.checksum, f"text or vocabulary in {options.data}")
        self.epochs, self.steps, self.batches = recipe.epochs, self._shuffled.steps, self._shuffled.batches
        self.settings = f"{recipe}, seed {options.seed}, text {self.text.checksum}"

    def _read(self) -> ParallelText:
        """Read the text, and cut it into batches."""
        options, recipe = self._options, self._options.recipe
        self.text = load(options.data, options.source, options.target)
        train = self.text.train.up_to(recipe.max_length)
        if self._lt.rank() == 0 and len(train) < len(self.text.train):
            print(f"{len(self.text.train) - len(train)} training pairs of over {recipe.max_length} sub-words left out")
        shard = {"rank": self._lt.rank(), "size": self._lt.size()}
        self._shuffled = TokenBatches(train, batch_tokens=recipe.batch_tokens, **shard, seed=options.seed)

        def in_order(name: str, pairs: Pairs) -> TokenBatches:
            longest = max(recipe.batch_tokens, int(pairs.lengths.max(initial=0)))
            try:
                return TokenBatches(pairs, batch_tokens=longest, **shard, shuffle=False)
            except DataError as error:
                raise DataError(f"{name}: {error}") from error

        parts = {"training": train.sample(MEASURED), "valid": self.text.valid, "test": self.text.test}
        self._parts = {name: in_order(name, pairs) for name, pairs in parts.items()}
        return self.text

    def begin(self, translator: Translator) -> None:
        """Take the model that is trained."""
        self._translator = translator
        self.optimizer, self.weights = translator.optimizer, translator.weights

    def train_on(self, batch: Batch, epoch: int, step: int) -> Any:
        number = epoch * self.steps + step
        # Of the step and rank, so that a resumed or simulated rank drops what the original one does.
        seed = np.random.SeedSequence([self._options.seed, number, self._lt.rank()]).generate_state(1)[0]
        return self._translator.step(batch, self._options.recipe.learning_rate(number), int(seed))

    def evaluate(self) -> dict[str, float]:
        return {"valid_loss": self._loss("valid")}

    def final(self, history: list[dict[str, float]]) -> dict[str, float]:
        return {
            "training_loss": self._loss("training"),
            "valid_loss": history[-1]["valid_loss"],
            "valid_bleu": self._bleu("valid"),
            "test_loss": self._loss("test"),
            "test_bleu": self._bleu("test"),
        }

    def _loss(self, part: str) -> float:
        """Mean negative log-likelihood of a sub-word, of the average of all replicas, each rank on its shard."""
        with self.optimizer.averaged():
            found = [self._translator.evaluate(batch) for batch in self._parts[part].batches(0)]
        loss, count = np.sum([np.sum(theirs, axis=0) for theirs in self._lt.allgather_object(found)], axis=0)
        return float(loss / count)

    def _bleu(self, part: str) -> float:
        """BLEU of the translations of the average of all replicas, each rank those of its shard."""
        sources = getattr(self.text, part).source
        mine: list[tuple[int, list[int]]] = []
        with self.optimizer.averaged():
            for chosen in self._parts[part].indices(0):
                found = self._translator.translate(sources.padded(chosen), self._options.beam)
                mine += zip(chosen.tolist(), found, strict=True)
        by_number = sorted(pair for theirs in self._lt.allgather_object(mine) for pair in theirs)
        translated = self.text.vocabulary.decode([subwords for _, subwords in by_number])
        references = self.text.references[part]
        metric = BLEU()
        score = float(metric.corpus_score(translated, [references]).score)
        if self._lt.rank() == 0:
            for number in range(min(EXAMPLES, len(references))):
                print(f"{part} {number + 1}: {translated[number]}\n  reference: {references[number]}", flush=True)
            print(f"{part}: BLEU by sacrebleu, {metric.get_signature()}", flush=True)
        return score
