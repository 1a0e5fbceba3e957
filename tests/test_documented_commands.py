"""Every command that the documentation shows is run by a test, or is listed here with the reason why it is not."""

import re
from pathlib import Path

import pytest
from pages import LAUNCHING, PAGES, ROOT, commands

from lentando.cli.app import run

RUN_BY = {
    r"(LENTANDO_TIMELINE=runs/timeline )?mpirun -np [24] python train\.py": "tests/test_documentation.py",
    r"mpirun -np 4 python examples/digits_torch\.py .*": "tests/examples/test_digits.py",
    r"python examples/digits_torch\.py .*--simulate .*": "tests/examples/test_digits.py",
    r"mpirun -np 4 python examples/minimal_keras\.py": "tests/test_documentation.py",
    r".*examples/(hugging_face_trainer|accelerate_loop)\.py .*": "tests/torch/test_hugging_face.py",
    r".*examples/lightning_trainer\.py .*": "tests/torch/test_lightning.py",
    r"python examples/ray_train\.py .*": "tests/torch/test_ray.py",
    r"(mpirun|torchrun) .*examples/ddp_within_nodes\.py .*": "tests/torch_distributed/test_ddp_within_nodes.py",
    r"python examples/cifar/effect\.py .*": "tests/examples/test_cifar.py",
    r"mpirun -np 32 python examples/cifar/train_(torch|keras)\.py .*": "tests/examples/test_cifar.py",
    r"python examples/cifar/adacomm_effect\.py .*": "tests/examples/test_cifar.py",
    r"python examples/cifar/jpeg_loader\.py .*": "tests/examples/test_imagenet.py",
    r"(mpirun -np 8 )?python examples/translation/(train_torch|translation_effect|vocabulary)\.py .*": (
        "tests/examples/test_translation.py"
    ),
    r"python benchmarks/run\.py papers.*": "tests/examples/test_cifar.py",
    r"lentando plan .*": "tests/test_documented_commands.py",
    r"mpirun -np 4 lentando measure .*": "tests/cli/test_commands.py",
    r"lentando report .*": "tests/cli/test_report.py",
    r"lentando timeline .*": "tests/cli/test_timeline.py",
    r"sed .*|mpirun -np 4 python train_lentando\.py": "tests/examples/test_migrating_from_horovod.py",
    r"pytest .*|mpirun -np 3 python -m pytest .*": "tests/test_ranks.py",
    r"tests/gpu/run\.sh .*": "tests/test_gpu_run.py",
}
"""Pattern of each command, and the file whose tests run it, or the same with other numbers."""
NOT_RUN = {
    r"make (demo|check|c10d-tests|horovod-tests).*": "they are the test suite, or take minutes; CI runs their parts",
    r"make data": "tests have no network",
    r"pip install .*": "tests have no network; tests/test_packaging.py installs the wheel",
    r"git clone .*": "tests have no network",
    r"export (OMPI_|PRTE_).*": "Makefile and tests/support/launching.py set the same variables",
    r"\. \.venv/bin/activate.*": "the tests run in that environment",
    r"sudo python benchmarks/.*": "takes minutes, and needs root",
    r"(mpirun|horovodrun) .*-np 32 .*": "takes minutes; tests/test_launchers.py starts fewer ranks in the same way",
}
"""Reason for each command that is not run."""


@pytest.mark.parametrize("page", [page for page in PAGES if page != LAUNCHING], ids=lambda page: page.name)
def test_every_command_is_run_or_has_a_reason(page: Path) -> None:
    """Those of docs/launching.md are run by ``tests/test_launching_page.py``."""
    known = [*RUN_BY, *NOT_RUN]
    shown = [command.partition("  #")[0].strip() for command in commands(page)]
    assert [command for command in shown if not any(re.fullmatch(pattern, command) for pattern in known)] == []


def test_files_of_tests_name_what_they_run() -> None:
    """The program, or the command of lentando."""
    for page in PAGES:
        for command in commands(page):
            file = next((file for pattern, file in RUN_BY.items() if re.fullmatch(pattern, command)), None)
            named = re.search(r"examples/(\w+)\.py|^lentando (\w+)|python -m (pytest)", command)
            if file is not None and named is not None:
                program = next(filter(None, named.groups()))
                assert program.lower() in (ROOT / file).read_text().lower(), (command, file)


def test_all_patterns_are_needed() -> None:
    shown = [command.partition("  #")[0].strip() for page in PAGES for command in commands(page)]
    unused = [pattern for pattern in [*RUN_BY, *NOT_RUN] if not any(re.fullmatch(pattern, each) for each in shown)]
    assert unused == []


def test_predictions_that_the_pages_show_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {command for page in PAGES for command in commands(page) if command.startswith("lentando plan --param")}
    assert shown
    for command in shown:
        assert run(command.split()[1:]) == 0
        assert "AdaComm: begin with period" in capsys.readouterr().out
