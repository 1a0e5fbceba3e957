"""The recipes of examples/cifar, started as a user starts them, on small datasets in the published formats."""

import json
import re
from pathlib import Path
from typing import Any

import image_archives as made
import pytest
from case_selection import selected_cases, thoroughly
from recipe_runs import alone, finished, on_ranks, refused, resumed_after_a_kill, weights

ROOT = Path(__file__).parents[2]
TORCH, KERAS = (str(ROOT / "examples" / "cifar" / f"train_{framework}.py") for framework in ("torch", "keras"))
EFFECT = str(ROOT / "examples" / "cifar" / "effect.py")
ADACOMM = str(ROOT / "examples" / "cifar" / "adacomm_effect.py")
SMALL = (
    "--any-size",
    "--model",
    "resnet8",
    "--batch-size",
    "4",
    "--workers",
    "4",
    "--warmup-epochs",
    "1",
    "--no-progress",
)
SHORT = ("--epochs", "2", "--lr", "0.1", "--reduction", "ring")


@pytest.mark.parametrize("recipe", [TORCH, KERAS])
def test_help_and_list_end_at_once(recipe: str) -> None:
    shown = alone(recipe, "--help")
    assert "--preset" in shown
    assert "lentando report" in shown
    listed = alone(recipe, "--list")
    assert re.search(r"slowmo-cifar10: resnet18 on cifar10, 32 ranks x 128 images", listed)
    assert re.search(r"--row sgp-slowmo +sgp; period 12; .*94\.32 %", listed)
    assert "adacomm-resnet50-cifar100" in listed


@pytest.mark.long
def test_torch_ranks_learn_as_simulated_ones_and_resume_bit_identically(tmp_path: Path) -> None:
    """OSGP with SlowMo, with messages in flight when rank 2 is killed in the middle of the second epoch."""
    made.write_cifar10_binary(tmp_path, per_file=24)
    common = [*SMALL, *SHORT, "--epochs", "6", "--row", "osgp-slowmo", "--period", "3", "--data", str(tmp_path)]
    output = tmp_path / "whole"
    whole = finished(on_ranks(4, TORCH, *common, "--output", str(output)))
    results: dict[str, Any] = json.loads((output / "results.json").read_text())
    assert results["steps"] == 6 * 8
    assert results["rounds"] == 6 * 8 // 3
    assert results["history"][-1]["loss"] < results["history"][0]["loss"] / 1.5
    assert results["accuracy"] > 0.25
    simulated = alone(TORCH, *common, "--simulate", "4")
    assert weights(simulated) == weights(whole) == results["weights"]

    saving = [*common, "--output", str(tmp_path / "killed"), "--save-every", "1"]
    resumed = resumed_after_a_kill(4, 2, 12, TORCH, *saving)
    assert re.search(r"resumed in epoch 2 after [1-4] steps", resumed)
    assert weights(resumed) == weights(whole)

    reason = refused(TORCH, *saving, "--resume", "--seed", "1", "--simulate", "4")
    assert "is of a run with other settings" in reason


@thoroughly
def test_keras_ranks_learn_and_resume_bit_identically(tmp_path: Path) -> None:
    made.write_fashion_mnist(tmp_path)
    common = [*SMALL, *SHORT, "--dataset", "fashion-mnist", "--row", "local-sgd-slowmo", "--period", "5"]
    common += ["--epochs", "3", "--data", str(tmp_path)]
    whole = finished(on_ranks(2, KERAS, *common, "--output", str(tmp_path / "whole")))
    results: dict[str, Any] = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["steps"] == 3 * 13
    assert results["history"][-1]["loss"] < results["history"][0]["loss"]
    saving = [*common, "--output", str(tmp_path / "killed"), "--save-every", "4"]
    resumed = resumed_after_a_kill(2, 1, 20, KERAS, *saving)
    assert "resumed in epoch 2 after 4 steps" in resumed
    assert weights(resumed) == weights(whole)


@thoroughly
def test_keras_ranks_train_in_the_simulator(tmp_path: Path) -> None:
    made.write_cifar10_binary(tmp_path)
    common = [*SMALL, "--row", "sgp", "--epochs", "1", "--data", str(tmp_path)]
    assert "accuracy" in alone(KERAS, *common, "--simulate", "2")


@pytest.mark.parametrize("row", selected_cases(["adacomm"], ["adacomm", "sync-decay"]))
def test_vgg_16_trains_on_cifar_100_by_the_rows_of_adacomm(row: str, tmp_path: Path) -> None:
    """At full width, on the python version, with a learning rate for 24 images."""
    made.write_cifar100_python(tmp_path)
    shown = alone(
        TORCH, "--preset", "adacomm-vgg16-cifar100", "--row", row, "--data", str(tmp_path), "--any-size",
        "--batch-size", "6", "--epochs", "1", "--lr", "0.01", "--simulate", "2", "--no-progress",
    )  # fmt: skip
    assert re.search(r"epoch 1: loss [45]\.\d+, test loss", shown)


def test_missing_and_cut_data_end_every_rank_with_one_sentence(tmp_path: Path) -> None:
    missing = on_ranks(3, TORCH, "--data", str(tmp_path))
    assert missing.status not in (0, None)
    reason = "rank 0, 1, 2: .* holds no CIFAR-10: get it from https://www.cs.toronto.edu/~kriz/cifar.html, so that"
    assert len(re.findall(reason, missing.output)) == 3, missing.output
    file = made.write_cifar10_binary(tmp_path) / "test_batch.bin"
    file.write_bytes(file.read_bytes()[:-1])
    cut = on_ranks(3, TORCH, "--data", str(tmp_path), "--any-size")
    assert cut.status not in (0, None)
    assert len(re.findall("rank 0, 1, 2: .*test_batch.bin: its 122919 bytes are not a whole number", cut.output)) == 3
    assert "Traceback" not in missing.output + cut.output


def test_the_effect_is_shown_in_parts(tmp_path: Path) -> None:
    made.write_fashion_mnist(tmp_path, count=130)
    output = tmp_path / "effect"
    common = [EFFECT, "--output", str(output), "--data", str(tmp_path), "--any-size", "--limit", "128"]
    common += ["--epochs", "3", "--seeds"]
    row = "osgp-slowmo-12"
    assert re.search(
        rf"\| `{row}` \| .*93\.74 % \| 0\.10 \| 0\.60 \| \d\.\d+ \| \d+\.\d+ % \| 0 \| 1 \|",
        alone(*common, "3", "--rows", row),
    )
    file = output / f"{row}-seed3.json"
    first = file.stat().st_mtime_ns
    assert re.search(rf"\| `{row}` \| .* ± .* ± .* \| 2 \|", alone(*common, "3", "4", "--rows", row))
    assert file.stat().st_mtime_ns == first  # it was not trained again
    assert row in alone(*common, "5", "--table")
    reason = refused(*common, "5", "--lr", "0.2")
    assert re.search(r"holds runs with other settings: .*'lr': None.*, not .*'lr': 0\.2.*another folder", reason)


def test_wrong_flags_are_refused() -> None:
    for flags, reason in (
        (["--row", "nothing"], "slowmo-cifar10 has no row nothing: choose from ar-sgd, "),
        (["--resume"], "need --output"),
    ):
        assert reason in refused(TORCH, *flags, status=2)


def test_the_effect_of_adacomm_is_timed_in_parts(tmp_path: Path) -> None:
    made.write_fashion_mnist(tmp_path, count=128)
    output = tmp_path / "adacomm"
    common = [ADACOMM, "--output", str(output), "--data", str(tmp_path), "--any-size", "--steps", "40", "--seeds", "1"]
    rows = ["tau-1-at-4", "tau-16-at-0.2", "adacomm-at-4", "adacomm-block-momentum-decay-at-0.2"]
    shown = alone(*common, "--rows", *rows)
    assert re.search(r"D/Y = 4, learning rate fixed, against tau-1; seeds 1:\n\n\| method \| final loss", shown), shown
    assert re.search(r"\| tau-1 \| \d\.\d+ \| \+0\.0 % \|.*\| 1 \|", shown), shown
    assert re.search(r"AdaComm's periods \| by its formula, .*\n.*\n\| 1 \| (64.*) \| \1 \|", shown), shown
    runs = {row: json.loads((output / f"{row}-seed1.json").read_text()) for row in rows}
    # Synchronous SGD takes steps of 1 + D/Y s; a method that averages every 16 steps takes 1 + D/Y / 16 s for each.
    assert runs["tau-1-at-4"]["steps"] == 48  # of 40, rounded up to a multiple of 16
    assert runs["tau-1-at-4"]["seconds"] / 48 == pytest.approx(1 + 4, rel=0.001)
    assert runs["tau-16-at-0.2"]["seconds"] / runs["tau-16-at-0.2"]["steps"] == pytest.approx(1 + 0.2 / 16, rel=0.001)
    assert runs["adacomm-block-momentum-decay-at-0.2"]["periods"] == [[0.0, 4]]


def test_experiments_are_driven_in_parts(tmp_path: Path) -> None:
    made.write_fashion_mnist(tmp_path, count=130)
    driver = [str(ROOT / "benchmarks" / "run.py"), "papers", "--only", "images", "--runs", str(tmp_path / "runs")]
    driver += ["--rows", "ar-sgd", "bmuf-12", "--seeds", "0", "1"]
    given = ["--", "--data", str(tmp_path), "--any-size", "--limit", "128", "--epochs", "2"]
    reason = refused(*driver[:-6], "--rows", "nothing", "--remaining")
    assert "argument --rows: invalid choice: 'nothing'" in reason
    assert re.search(r"effect\.py .* ended with status 2\n$", reason), reason
    assert "Traceback" not in reason
    remaining = alone(*driver, "--remaining", *given)
    assert "images: ar-sgd (0), bmuf-12 (0), ar-sgd (1), bmuf-12 (1)\n4 runs missing, about " in remaining
    alone(EFFECT, "--output", str(tmp_path / "runs" / "images"), "--rows", "ar-sgd", "--seeds", "0", "1", *given[1:])
    shown = alone(*driver, "--jobs", "2", *given)
    assert "2 runs missing" in shown
    assert "0 runs missing" in shown
    page = tmp_path / "page.md"
    old = "before\n<!-- images -->\nold\n<!-- end of images -->\nafter\n"
    page.write_text(old)
    alone(*driver[:-7], str(tmp_path / "nothing"), "--tables", str(page))
    assert page.read_text() == old
    alone(*driver, "--tables", str(page), *given)
    rows = r"\| row \| .*\| `ar-sgd` \|.*\| 2 \|\n\| `bmuf-12` \|.*"
    pattern = rf"before\n<!-- images -->\n\n{rows}\n\n<!-- end of images -->\nafter\n"
    assert re.fullmatch(pattern, page.read_text(), re.DOTALL), page.read_text()
    assert "images: complete" in alone(*driver, "--remaining", *given)
