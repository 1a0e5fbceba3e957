"""What keeps checkpoints whole: other jobs, damaged and forged files, places that cannot be written to."""

import json
import os
import stat
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt
from lentando.optimizers.checkpoint.lock import LOCK, locked


def wrapped(seed: int = 0) -> tuple[lt.DistributedOptimizer, nn.Linear]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    return lt.SlowMo(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), model=model, period=2), model


def step(optimizer: lt.DistributedOptimizer, model: nn.Module) -> None:
    optimizer.zero_grad()
    model(torch.ones(1, 3) + lt.rank()).square().sum().backward()
    optimizer.step()


def forge(folder: Path, change: Any) -> None:
    """Change the content of a manifest on rank 0, and make its checksum right again."""
    lt.barrier()
    if lt.rank() == 0:
        file = folder / "checkpoint.json"
        manifest = json.loads(file.read_text())
        change(manifest["content"])
        text = json.dumps(manifest["content"], sort_keys=True)
        manifest["checksum"] = blake2b(text.encode(), digest_size=16).hexdigest()
        file.write_text(json.dumps(manifest))
    lt.barrier()


def exchange_ranks(content: Any) -> None:
    content["parts"]["ranks"].reverse()


def leave_the_folder(content: Any) -> None:
    content["parts"]["ranks"][-1]["file"] = "../elsewhere.safetensors"


def name_twice(content: Any) -> None:
    content["parts"]["shared"] = content["parts"]["ranks"][0]


FORGERIES = [
    (leave_the_folder, "its entry 'parts' is missing or not what Lentando writes there"),
    (name_twice, "it names 'step-.*' twice"),
    (lambda content: content.pop("entries"), "its entry 'entries' is missing"),
    (lambda content: content.update(world_size=-1), "its entry 'world_size' is missing or not"),
    (lambda content: content.update(world_size=content["world_size"] + 1), "names the files of . ranks, but . saved"),
    (lambda content: content["entries"].append(["x"]), "its entry 'entries' is missing or not"),
    (lambda content: content.update(settings=7), "its entry 'settings' is missing or not"),
]


@pytest.mark.parametrize(("change", "stated"), FORGERIES)
def test_forged_manifest_is_refused_before_anything_changes(change: Any, stated: str, shared_path: Path) -> None:
    lt.save(shared_path, wrapped()[0])
    forge(shared_path, change)
    optimizer, model = wrapped(1)
    before = model.weight.detach().clone()
    with pytest.raises(lt.CheckpointError, match=stated):
        lt.load(shared_path, optimizer)
    assert torch.equal(model.weight, before)


def test_exchanged_parts_are_refused_before_anything_changes(shared_path: Path) -> None:
    if lt.size() == 1:
        return
    saved = wrapped()
    step(*saved)
    lt.save(shared_path, saved[0])
    forge(shared_path, exchange_ranks)
    optimizer, model = wrapped(1)
    before = model.weight.detach().clone()
    last = lt.size() - 1
    stated = f"is of rank {last} of {lt.size()}, but the manifest names it as that of rank 0 of {lt.size()}"
    with pytest.raises(lt.CheckpointError, match=stated):
        lt.load(shared_path, optimizer)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("[" * 100_000, "is damaged .* it is not JSON"),
        ('{"format": "lentando checkpoint", "format": "lentando checkpoint"}', "the key 'format' occurs twice"),
        ('{"format": NaN}', "NaN is no JSON"),
        ("\x80", "is damaged .* it is not JSON"),
    ],
    ids=["nested", "twice", "nan", "bytes"],
)
def test_manifest_that_is_no_json_of_ours_is_refused(text: str, stated: str, shared_path: Path) -> None:
    optimizer, _ = wrapped()
    lt.save(shared_path, optimizer)
    lt.barrier()
    if lt.rank() == 0:
        (shared_path / "checkpoint.json").write_bytes(text.encode("latin-1"))
    lt.barrier()
    with pytest.raises(lt.CheckpointError, match=stated):
        lt.load(shared_path, optimizer)


def test_place_where_another_job_saves_is_refused_on_every_rank(shared_path: Path) -> None:
    optimizer, model = wrapped()
    lt.save(shared_path, optimizer)
    saved = model.weight.detach().clone()
    step(optimizer, model)
    lock = locked(shared_path)
    if lt.rank() == 0:
        lock.__enter__()
    lt.barrier()
    with pytest.raises(lt.CheckpointError, match=f"rank 0: another job is saving to {shared_path}: process .* on "):
        lt.save(shared_path, optimizer)
    lt.barrier()
    if lt.rank() == 0:
        lock.__exit__(None, None, None)
    lt.load(shared_path, optimizer)
    assert torch.equal(model.weight, saved)
    lt.save(shared_path, optimizer)  # the other job has ended
    assert not (shared_path / LOCK).exists()


def test_leftovers_of_a_killed_job_are_removed_and_other_files_are_not(shared_path: Path) -> None:
    optimizer, _ = wrapped()
    shared_path.mkdir(exist_ok=True)
    names = ["step-00000003-0123456789abcdef-rank-00000.safetensors", "checkpoint.json.00ff.partial", "notes.txt", LOCK]
    if lt.rank() == 0:
        for name in names:
            (shared_path / name).write_text("x")
    lt.save(shared_path, optimizer)
    lt.barrier()
    assert [name for name in names if (shared_path / name).exists()] == ["notes.txt"]


def test_link_in_place_of_the_manifest_is_replaced_and_not_written_through(shared_path: Path) -> None:
    optimizer, _ = wrapped()
    shared_path.mkdir(exist_ok=True)
    if lt.rank() == 0:
        (shared_path / "notes.txt").write_text("precious")
        (shared_path / "checkpoint.json").symlink_to("notes.txt")
    lt.save(shared_path, optimizer)
    lt.barrier()
    assert (shared_path / "notes.txt").read_text() == "precious"
    lt.load(shared_path, optimizer)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_umask_says_who_may_read_a_checkpoint(umask: int, shared_path: Path) -> None:
    optimizer, _ = wrapped()
    previous = os.umask(umask)
    try:
        lt.save(shared_path, optimizer)
    finally:
        os.umask(previous)
    lt.barrier()
    assert {stat.S_IMODE(file.stat().st_mode) for file in shared_path.iterdir()} == {0o666 & ~umask}


def test_place_that_cannot_be_written_to_is_a_checkpoint_error() -> None:
    optimizer, _ = wrapped()
    for place in ("/proc", "/proc/lentando", f"{__file__}/below"):
        with pytest.raises(lt.CheckpointError, match=f"saving a checkpoint to {place} failed. .*rank.* 0.*Error"):
            lt.save(place, optimizer)


@pytest.mark.parametrize("path", ["", " "])
def test_empty_path_is_refused(path: str) -> None:
    optimizer, _ = wrapped()
    for action in (lt.save, lt.load, lt.save_on_signal):
        with pytest.raises(lt.ConfigurationError, match="the path of a checkpoint must name a folder"):
            action(path, optimizer)
