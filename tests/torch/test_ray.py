"""Ray Train's example. Runs where Ray is installed, which starts too slowly for every run of the suite."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from launching import launch

EXAMPLE = Path(__file__).parents[2] / "examples/ray_train.py"

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason='pip install "ray[train]"')


def test_workers_of_ray_train_and_save(tmp_path: Path) -> None:
    job = launch([sys.executable, str(EXAMPLE), str(tmp_path)], 250, {"RAY_TMPDIR": "/tmp"})
    assert job.status == 0, job.output
    assert "'ranks': 2" in job.output
    saved = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir() if folder.is_dir())
    assert saved == ["step-00000040", "step-00000060"]
