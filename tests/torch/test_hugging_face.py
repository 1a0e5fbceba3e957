"""Hugging Face's Trainer under mpirun: trains on all ranks, saves the average once, resumes bit for bit.

Runs where Transformers and Accelerate are installed, which the development environment does without.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from launching import mpirun

EXAMPLE = Path(__file__).parents[2] / "examples/hugging_face_trainer.py"

pytestmark = pytest.mark.skipif(
    not (find_spec("transformers") and find_spec("accelerate")), reason="pip install transformers accelerate"
)


def train(folder: Path, *options: str) -> None:
    job = mpirun(
        2, str(EXAMPLE), str(folder), *options, timeout_seconds=200, environment={"HF_HUB_OFFLINE": "1"}
    )  # fmt: skip
    assert job.status == 0, job.output


@pytest.mark.timeout(450)
def test_trainer_saves_the_average_and_resumes(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    train(tmp_path / "whole")
    whole = load_file(tmp_path / "whole/average/model.safetensors")
    ranks = [load_file(tmp_path / f"whole/rank{rank}/checkpoint-16/model.safetensors") for rank in range(2)]
    for name, average in whole.items():  # the last step ended a round, so that the replicas are equal
        assert (average == ranks[0][name]).all(), name
        assert (average == ranks[1][name]).all(), name
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/average")
    for rank in range(2):
        shutil.rmtree(tmp_path / f"resumed/rank{rank}/checkpoint-16")
    train(tmp_path / "resumed", "--resume")
    resumed = load_file(tmp_path / "resumed/average/model.safetensors")
    assert resumed.keys() == whole.keys()
    assert all((resumed[name] == whole[name]).all() for name in whole)
