"""The recipe of examples/translation, started as a user starts it, on a toy language in the real format."""

import re
from pathlib import Path

import pytest
from parallel_texts import write_parallel_text
from recipe_runs import alone, finished, on_ranks, refused, resumed_after_a_kill, weights

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "translation"
TORCH, KERAS = (str(FOLDER / f"train_{framework}.py") for framework in ("torch", "keras"))
SMALL = (
    "--model",
    "tiny",
    "--batch-tokens",
    "64",
    "--epochs",
    "4",
    "--warmup-steps",
    "8",
    "--lr",
    "0.02",
    "--beam",
    "2",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy text, with the vocabulary that the recipe's own command makes of it."""
    folder = write_parallel_text(tmp_path_factory.mktemp("text"))
    made = alone(str(FOLDER / "vocabulary.py"), "--data", str(folder), "--size", "60")
    assert f"{folder / 'vocabulary.model'}: 60 sub-words" in made
    return folder


def test_help_and_list_end_at_once() -> None:
    shown = alone(TORCH, "--help")
    assert "--batch-tokens" in shown
    assert "lentando report" in shown
    listed = alone(TORCH, "--list")
    assert re.search(r"slowmo-wmt16: big Transformer, 8 ranks x 25000 sub-words", listed)
    assert re.search(r"--row sgp-slowmo +sgp; period 48; slow momentum 0.6; moments: maintain; .*27\.84", listed)


@pytest.mark.long
def test_ranks_learn_as_simulated_ones_and_resume_bit_identically(text: Path, tmp_path: Path) -> None:
    """OSGP with SlowMo and dropout, with messages in flight when rank 2 is killed in the middle of the second epoch."""
    common = [*SMALL, "--row", "osgp-slowmo", "--period", "3", "--reduction", "ring", "--dropout", "0.1"]
    common += ["--no-progress", "--data", str(text)]
    simulated = alone(TORCH, *common, "--simulate", "4")
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss ([\d.]+)", simulated)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.5
    assert re.search(r"valid bleu \d+\.\d+, test loss \d\.\d+, test bleu \d+\.\d+, weights", simulated)
    assert re.search(r"test 1: .*\n  reference: \w+", simulated)
    assert re.search(r"test: BLEU by sacrebleu, nrefs:1\|case:mixed\|eff:no\|tok:13a\|smooth:exp\|version:", simulated)

    saving = [*common, "--output", str(tmp_path), "--save-every", "1"]
    resumed = resumed_after_a_kill(4, 2, 14, TORCH, *saving)
    assert re.search(r"resumed in epoch 2 after [1-4] steps", resumed)
    assert weights(resumed) == weights(simulated)

    with (text / "train.en").open("a") as english, (text / "train.de").open("a") as german:
        english.write("one\n")
        german.write("eins\n")
    reason = refused(TORCH, *saving, "--resume", "--simulate", "4")
    assert "is of a run with other settings" in reason


def test_missing_and_unequal_text_ends_every_rank_with_one_sentence(tmp_path: Path) -> None:
    missing = on_ranks(3, TORCH, "--data", str(tmp_path))
    assert missing.status not in (0, None)
    assert len(re.findall(r"rank 0, 1, 2: .* holds no parallel text: .*train\.en, .*one sentence", missing.output)) == 3
    write_parallel_text(tmp_path)
    alone(str(FOLDER / "vocabulary.py"), "--data", str(tmp_path), "--size", "60")
    file = tmp_path / "valid.de"
    file.write_bytes(file.read_bytes()[: file.read_bytes().rindex(b"\n", 0, -1) + 1])
    unequal = on_ranks(3, TORCH, "--data", str(tmp_path))
    assert unequal.status not in (0, None)
    assert (
        len(re.findall(r"rank 0, 1, 2: .*valid\.en has 12 lines and .*valid\.de has 11: line N", unequal.output)) == 3
    )
    assert "Traceback" not in missing.output + unequal.output


def test_impossible_sizes_of_a_vocabulary_are_refused(text: Path) -> None:
    for folder, reason in ((text, r"error: Vocabulary size too high \(5000\)\. .* <= \d+"), (text / "none", "no file")):
        found = refused(str(FOLDER / "vocabulary.py"), "--size", "5000", "--data", str(folder), status=2)
        assert re.search(reason, found), found


def test_the_effect_is_shown_in_parts(text: Path, tmp_path: Path) -> None:
    command = [str(FOLDER / "translation_effect.py"), "--output", str(tmp_path), "--data", str(text)]
    row = "local-adam-slowmo-reset"
    small = ["--model", "tiny", "--epochs", "1", "--batch-tokens", "90", "--beam", "1", "--seeds", "2", "--rows", row]
    shown = alone(*command, *small)
    assert re.search(rf"\| `{row}` \|  \| \d\.\d+ \| \d\.\d+ \| \d+\.\d+ \| 0 \| 1 \|", shown), shown
    assert (tmp_path / f"{row}-seed2.json").exists()


@pytest.mark.long
def test_keras_ranks_learn_and_resume_bit_identically(text: Path, tmp_path: Path) -> None:
    common = [*SMALL, "--beam", "1", "--epochs", "2", "--batch-tokens", "90", "--row", "local-adam-slowmo-average"]
    common += ["--period", "3", "--reduction", "ring", "--dropout", "0.1", "--no-progress", "--data", str(text)]
    whole = finished(on_ranks(2, KERAS, *common))
    first, second = re.findall(r"epoch \d: loss ([\d.]+)", whole)
    assert float(second) < float(first)
    saving = [*common, "--output", str(tmp_path), "--save-every", "2"]
    resumed = resumed_after_a_kill(2, 1, 17, KERAS, *saving)
    assert re.search(r"resumed in epoch [12] after \d+ steps", resumed)
    assert weights(resumed) == weights(whole)
    reason = refused(KERAS, "--beam", "2", "--data", str(text))
    assert "in Keras, translations are greedy: pass --beam 1" in reason
