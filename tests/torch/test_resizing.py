"""A checkpoint of so many ranks, continued by another number of them: real jobs, one after the other."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from case_selection import selected_cases
from launching import mpirun
from numpy.testing import assert_allclose, assert_array_equal
from resized_training import FEATURES, LAST, MOMENTUM, RATE, ROUND, SLOW_MOMENTUM, batch, left, whole

PROGRAM = Path(__file__).parents[1] / "support/resized_training.py"
METHODS = [
    "allreduce", "adacomm", "slowmo", "slowmo by ring", "slowmo without average", "sgp", "osgp",
    "osgp in bfloat16", "slowmo over osgp",
]  # fmt: skip
STEPS = [2 * ROUND, 2 * ROUND + 1]  # right after an outer step, and inside a round
WANTED = [f"{method}:{','.join(map(str, STEPS))}" for method in METHODS]


def run(size: int, action: str, folder: Path, wanted: list[str]) -> None:
    job = mpirun(
        size, str(PROGRAM), "torch", action, str(folder), *wanted, timeout_seconds=200, prepared="lentando.torch"
    )
    assert job.status == 0, job.output


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    run(4, "save", folder, WANTED)
    return folder


@pytest.fixture(scope="module", params=selected_cases([3, 5], [1, 2, 3, 5]))
def continued(request: pytest.FixtureRequest, four: Path) -> tuple[Path, int]:
    run(request.param, "load", four, WANTED)
    return four, request.param


CASES = [(method, step) for method in METHODS for step in STEPS]


@pytest.mark.parametrize(("method", "step"), CASES)
def test_every_rank_begins_with_the_mean(continued: tuple[Path, int], method: str, step: int) -> None:
    folder, size = continued
    before, after = left(folder, f"{method} {step} on 4"), left(folder, f"{method} {step} on {size}")
    assert len(after) == size
    parameters = np.mean([arrays["sum"] for arrays in before], axis=0) if "sum" in before[0] else None
    for name, own in after[0].items():
        if not name.startswith(("model", "optimizer")):
            continue
        for other in after[1:]:
            assert_array_equal(own, other[name], err_msg=name)
        saved = [arrays[name] for arrays in before]
        if all(np.array_equal(array, saved[0]) for array in saved):
            assert_array_equal(own, saved[0], err_msg=name)
        elif parameters is None or "running" in name or name.startswith("optimizer"):
            assert_allclose(own, np.mean(saved, axis=0), rtol=1e-14, atol=1e-15, err_msg=name)
    if parameters is not None:  # what gossip keeps constant: the sum of x, messages in flight included
        stepped = [n for n in after[0] if n.startswith("model") and "running" not in n and "num_batches" not in n]
        found = np.concatenate([after[0][name].reshape(-1) for name in stepped])
        assert_allclose(found, parameters, rtol=1e-14, atol=1e-15)
        for arrays in after:
            assert arrays["weight"] == 1
            assert arrays["in flight"] == 0
            assert_array_equal(arrays["sum"], found)


@pytest.mark.parametrize(("method", "step"), CASES)
def test_outer_state_is_cut_again_exactly(continued: tuple[Path, int], method: str, step: int) -> None:
    folder, size = continued
    before, after = left(folder, f"{method} {step} on 4"), left(folder, f"{method} {step} on {size}")
    names = [name for name in before[0] if name in ("anchors 0", "slow_buffers 0")]
    assert len(names) == (2 if "slowmo" in method else 0)
    for name in names:
        if "without" in method:  # each replica has its own
            for arrays in after:
                assert_allclose(arrays[name], np.mean([a[name] for a in before], axis=0), rtol=1e-14)
        else:
            assert_array_equal(whole(after, name), whole(before, name))
            assert np.any(whole(after, name))


@pytest.mark.parametrize(("method", "step"), CASES)
def test_counts_and_schedule_continue_and_the_user_is_informed(
    continued: tuple[Path, int], method: str, step: int
) -> None:
    folder, size = continued
    before, after = left(folder, f"{method} {step} on 4"), left(folder, f"{method} {step} on {size}")
    losses = [arrays["about"]["loss_sum"] for arrays in before]
    for rank, arrays in enumerate(after):
        about, saved = dict(arrays["about"]), dict(before[0]["about"])
        assert about.pop("extra") == {"rank": rank if rank < 4 else 0, "step": step}
        received = about.pop("received")
        assert len(received) == (rank == 0)
        assert about.pop("loss_sum") == pytest.approx(np.mean(losses), rel=1e-14)
        del saved["loss_sum"]
        assert about == saved
    (stated,) = after[0]["about"]["received"]
    exact, approximated = stated.split(" Approximated: ")
    assert exact.startswith(f"resumed 4 ranks' checkpoint on {size} ranks. Exact: inner step {step}, ")
    gossips = "gossip" in approximated
    in_round = before[0]["about"]["steps"] > 0 and before[0]["about"]["steps_in_round"] is not None
    assert gossips == ("gp" in method or "without" in method)
    own = [arrays["model weight" if method == "slowmo" else "model 1.weight"] for arrays in before]
    are_equal = all(np.array_equal(array, own[0]) for array in own)
    assert ("the parameters (equal" in exact) == are_equal
    assert ("; the round in progress (" in approximated) == (in_round and not are_equal)
    assert ("momenta (sharded again)" in exact) == ("slowmo" in method and "without" not in method)
    assert ("slow momenta" in approximated) == ("without" in method)
    assert ("base optimizer's state (equal" in exact) == (method == "allreduce" or "over osgp 6" in f"{method} {step}")


@pytest.mark.parametrize("method", METHODS)
def test_training_continues_to_the_same_loss(continued: tuple[Path, int], method: str) -> None:
    folder, size = continued
    expected = left(folder, f"{method} end on 4")[0]["about"]["loss"]
    found = left(folder, f"{method} continued on {size}")[0]["about"]
    assert found["inner_steps"] == LAST
    assert found["loss"] == pytest.approx(expected, rel=0.05)


def test_against_numpy(continued: tuple[Path, int]) -> None:
    """SlowMo on four replicas, written down once more: its mean, anchor and u are what other numbers of ranks get."""
    folder, size = continued
    anchor, u = np.zeros(FEATURES), np.zeros(FEATURES)
    weights, momenta = np.zeros((4, FEATURES)), np.zeros((4, FEATURES))
    for step in range(2 * ROUND + 1):
        for rank in range(4):
            features, targets = batch(rank, step)
            gradient = features.T @ (features @ weights[rank] - targets[:, 0]) / len(features)
            momenta[rank] = MOMENTUM * momenta[rank] + gradient
            weights[rank] -= RATE * momenta[rank]
        if (step + 1) % ROUND == 0:
            u = SLOW_MOMENTUM * u + (anchor - weights.mean(axis=0)) / RATE
            anchor = anchor - RATE * u
            weights[:] = anchor
    after = left(folder, f"slowmo {2 * ROUND + 1} on {size}")
    for arrays in after:
        assert_allclose(arrays["model weight"][0], weights.mean(axis=0), rtol=1e-12)
        assert_allclose(arrays["optimizer momentum_buffer weight"][0], momenta.mean(axis=0), rtol=1e-12)
    assert_allclose(whole(after, "anchors 0"), anchor, rtol=1e-12)
    assert_allclose(whole(after, "slow_buffers 0"), u, rtol=1e-12)


def test_missing_part_is_refused_on_every_rank(four: Path, tmp_path: Path) -> None:
    """Each rank of the new job needs all parts."""
    checkpoint = tmp_path / "slowmo 6 by 4"
    shutil.copytree(four / checkpoint.name, checkpoint)
    next(checkpoint.glob("*-rank-00003.*")).unlink()
    job = mpirun(2, str(PROGRAM), "torch", "load", str(tmp_path), "slowmo:6", prepared="lentando.torch")
    assert job.status not in (0, None)
    assert job.output.count("CheckpointError: loading the checkpoint") >= 2
    assert "-rank-00003.safetensors is missing" in job.output


def test_one_rank_becomes_three(tmp_path: Path) -> None:
    wanted = [f"{method}:{STEPS[1]}" for method in ("slowmo", "diloco", "slowmo over osgp", "allreduce")]
    run(1, "save", tmp_path, wanted)
    run(3, "load", tmp_path, wanted)
    for method in ("slowmo", "diloco", "slowmo over osgp", "allreduce"):
        (before,) = left(tmp_path, f"{method} {STEPS[1]} on 1")
        after = left(tmp_path, f"{method} {STEPS[1]} on 3")
        for arrays in after:
            for name in before:
                if name.startswith(("model", "optimizer")):
                    assert_array_equal(arrays[name], before[name], err_msg=name)
        if method != "allreduce":
            assert_array_equal(whole(after, "slow_buffers 0"), before["slow_buffers 0"])
        (stated,) = after[0]["about"]["received"]
        assert stated.endswith("gossip (begins again: w = 1, nothing in flight)" if "gp" in method else "nothing")


def test_one_rank_with_coded_outer_steps_becomes_two(tmp_path: Path) -> None:
    """It has sent nothing, so that there are no errors yet: they begin at zero."""
    method = "slowmo in int8"
    wanted = [f"{method}:{STEPS[0]}"]
    run(1, "save", tmp_path, wanted)
    run(2, "load", tmp_path, wanted)
    before, after = left(tmp_path, f"{method} {STEPS[0]} on 1"), left(tmp_path, f"{method} {STEPS[0]} on 2")
    for name, array in before[0].items():
        if name.startswith(("model", "optimizer")):
            for arrays in after:
                assert_array_equal(arrays[name], array, err_msg=name)
    for arrays in after:
        assert not arrays["errors 0"].any()
        assert not arrays["shard_errors 0"].any()


def test_two_ranks_with_coded_outer_steps_become_three(tmp_path: Path) -> None:
    """What rounding has left out is not lost: errors of the ranks begin with their mean, those of shards are cut."""
    method = "slowmo in int8"
    wanted = [f"{method}:{','.join(map(str, STEPS))}"]
    run(2, "save", tmp_path, wanted)
    run(3, "load", tmp_path, wanted)
    for step in STEPS:
        before, after = left(tmp_path, f"{method} {step} on 2"), left(tmp_path, f"{method} {step} on 3")
        for name in after[0]:
            if name.startswith(("model", "optimizer")):
                mean = np.mean([arrays[name] for arrays in before], axis=0)
                for arrays in after:
                    assert_allclose(arrays[name], mean, rtol=1e-14, atol=1e-15, err_msg=name)
        mean_error = np.mean([arrays["errors 0"] for arrays in before], axis=0)
        assert np.any(mean_error)
        for arrays in after:
            assert_allclose(arrays["errors 0"], mean_error, rtol=1e-14, atol=1e-18)
        for name in ("slow_buffers 0", "shard_errors 0", "anchors 0"):
            assert_array_equal(whole(after, name), whole(before, name), err_msg=name)
    expected = left(tmp_path, f"{method} end on 2")[0]["about"]["loss"]
    found = left(tmp_path, f"{method} continued on 3")[0]["about"]
    assert found["inner_steps"] == LAST
    assert found["loss"] == pytest.approx(expected, rel=0.05)
