"""Checkpoints of an earlier version, whose manifests hold settings as text, continue as they would have then."""

import json
from typing import Any

import earlier_training
import numpy as np
import pytest
from earlier_training import FOLDER, MORE, STEPS

import lentando.torch as lt

EARLIER = FOLDER / "torch"


@pytest.mark.parametrize("method", ["slowmo", "osgp", "dpsgd", "adacomm"])
def test_a_checkpoint_of_an_earlier_version_continues(method: str) -> None:
    if lt.size() != 2:
        pytest.skip("two ranks have saved it")
    manifest = json.loads((EARLIER / method / "checkpoint.json").read_text())
    assert manifest["version"] == 1
    assert manifest["content"]["settings"].startswith("Settings(base=")
    optimizer, train, weights = earlier_training.RUNS["torch"](method)
    assert lt.load(EARLIER / method, optimizer) == {"step": STEPS}
    train(STEPS, STEPS + MORE)
    expected: Any = json.loads((EARLIER / "expected.json").read_text())[method][lt.rank()]
    for found, wanted in zip(weights(), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)  # exact on the machine that wrote it


def test_another_method_is_refused_with_what_differs() -> None:
    optimizer, _, _ = earlier_training.RUNS["torch"]("adacomm")
    with pytest.raises(
        lt.CheckpointError, match=r"other settings: outer.slow_momentum was 0.5, and is 0.25 here; peri"
    ):
        lt.load(EARLIER / "slowmo", optimizer)
