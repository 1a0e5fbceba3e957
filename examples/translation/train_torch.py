"""Train a row of SlowMo's WMT'16 table on parallel text, in PyTorch.

The rows, the data and the flags are described in README.md:

    python examples/translation/train_torch.py --list
    mpirun -np 8 python examples/translation/train_torch.py --row sgp-slowmo --data ~/wmt16 --output runs/sgp-slowmo
    mpirun -np 8 python examples/translation/train_torch.py ... --resume    # after a crash, from the last checkpoint
    lentando report runs/sgp-slowmo    # figures, as one HTML page
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from parallel_text import EOS, PAD
from token_batches import Batch
from torch.nn.functional import cross_entropy
from translation_flags import arguments
from translation_recipes import SHAPES
from translation_training import TranslationCourse

import lentando.torch as lt
from lentando.comm import simulate

sys.path.append(str(Path(__file__).parents[1]))
import recipe_loop

if TYPE_CHECKING:
    from transformers import MarianMTModel


def build(model: str, vocabulary: int, dropout: float, longest: int, seed: int) -> "MarianMTModel":
    """A Transformer as Vaswani et al. describe it: embeddings shared by both languages and the last layer.

    Initial weights have the variance 1 / width, so that scaled embeddings are as large as the positions added to them.
    """
    from transformers import MarianConfig, MarianMTModel  # takes seconds; until here, missing data ends a run at once

    torch.manual_seed(seed)
    shape = SHAPES[model]
    return MarianMTModel(
        MarianConfig(
            vocab_size=vocabulary, d_model=shape.width, dropout=dropout, attention_dropout=0.0, activation_dropout=0.0,
            encoder_layers=shape.layers, encoder_attention_heads=shape.heads, encoder_ffn_dim=shape.feed_forward,
            decoder_layers=shape.layers, decoder_attention_heads=shape.heads, decoder_ffn_dim=shape.feed_forward,
            activation_function="relu", scale_embedding=True, init_std=shape.width**-0.5,
            max_position_embeddings=longest,
            pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD, forced_eos_token_id=None,
        )
    )  # fmt: skip


class TorchTranslator:
    """A Transformer, Adam, and the method of the row around it."""

    def __init__(self, options: argparse.Namespace, vocabulary: int, longest: int) -> None:
        recipe = options.recipe
        gpus = torch.cuda.device_count()
        self._device = torch.device("cuda", lt.local_rank() % gpus) if gpus else torch.device("cpu")
        if gpus:
            torch.cuda.set_device(self._device)  # NCCL and CUDA-aware MPI send from the current device
        self._label_smoothing = recipe.label_smoothing
        self._longest = longest
        self._model = build(recipe.model, vocabulary, recipe.dropout, 2 * longest, options.seed).to(self._device)
        adam = torch.optim.Adam(self._model.parameters(), recipe.lr, betas=(0.9, 0.98))
        self.optimizer = recipe.optimizer(lt, adam, self._model, options.reduction)

    def step(self, batch: Batch, learning_rate: float, seed: int) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        torch.manual_seed(seed)  # of dropout
        self._model.train()
        self.optimizer.zero_grad()
        scores, wanted = self._scores(batch)
        loss = cross_entropy(scores, wanted, ignore_index=PAD, label_smoothing=self._label_smoothing)
        loss.backward()
        self.optimizer.step(loss=loss)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        self._model.eval()
        scores, wanted = self._scores(batch)
        return float(cross_entropy(scores, wanted, ignore_index=PAD, reduction="sum")), int((wanted != PAD).sum())

    @torch.no_grad()
    def translate(self, sources: NDArray[np.int64], beam: int) -> list[list[int]]:
        self._model.eval()
        given = torch.from_numpy(sources).to(self._device)
        longest = min(self._longest, 2 * sources.shape[1] + 10)
        found = self._model.generate(
            input_ids=given, attention_mask=(given != PAD).long(), max_new_tokens=longest, do_sample=False,
            num_beams=beam, **({"length_penalty": 0.6} if beam > 1 else {}),
        )  # fmt: skip
        return [[number for number in line if number not in (PAD, EOS)] for line in found.tolist()]

    def weights(self) -> list[Any]:
        return [parameter.detach().cpu().numpy() for parameter in self._model.parameters()]

    def _scores(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of all sub-words, of shape (pairs x longest, vocabulary), and the numbers of the right ones."""
        source, target = (torch.from_numpy(side).to(self._device) for side in batch)
        before = torch.nn.functional.pad(target[:, :-1], (1, 0), value=PAD)  # what the decoder has seen
        found = self._model(
            input_ids=source, attention_mask=(source != PAD).long(), decoder_input_ids=before, use_cache=False
        )
        return found.logits.flatten(0, 1), target.flatten()


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Train on the rank that calls it. Returns the results."""
    lt.init()
    torch.set_num_threads(max(1, torch.get_num_threads() // lt.local_size()))  # ranks share the cores
    course = TranslationCourse(lt, options)
    course.begin(TorchTranslator(options, course.text.vocabulary.vocab_size(), course.text.longest()))
    return recipe_loop.train(lt, course, options)


if __name__ == "__main__":
    assert __doc__ is not None
    flags = arguments(__doc__, beam=4)
    if flags.simulate:
        simulate(lambda: main(flags), size=flags.simulate)
    else:
        main(flags)
