"""Lightning's example under mpirun and torchrun: the same weights, and training that resumes bit-identically."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from launching import Job, launch, mpirun
from prepared_python import TRAINERS

EXAMPLE = Path(__file__).parents[2] / "examples/lightning_trainer.py"
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2"]


def weights(checkpoint: Path) -> torch.Tensor:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return torch.cat([tensor.flatten() for tensor in state.values()])


def check(job: Job) -> None:
    assert job.status == 0, job.output
    assert "rank 0 of 2: loss" in job.output
    assert "rank 1 of 2: loss" in job.output


@pytest.mark.long
def test_torchrun_resumes_what_mpirun_began(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    check(mpirun(2, str(EXAMPLE), str(whole), timeout_seconds=180, prepared=TRAINERS))
    shutil.copytree(whole, resumed, symlinks=True)
    for path in resumed.glob("epoch=2.ckpt*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (resumed / "last.ckpt").unlink()
    (resumed / "last.ckpt").symlink_to("epoch=1.ckpt")
    check(launch([*TORCHRUN, str(EXAMPLE), str(resumed), "--resume"], timeout_seconds=180))
    assert torch.equal(weights(whole / "epoch=2.ckpt"), weights(resumed / "epoch=2.ckpt"))
