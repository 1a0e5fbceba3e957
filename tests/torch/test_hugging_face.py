"""Hugging Face's Trainer and Accelerate: any launcher resumes bit-identically what another began; errors of use."""

import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from case_selection import selected_cases, thoroughly
from launchers import OPEN_MPI, TORCHRUN
from launching import Job
from prepared_python import TRAINERS

EXAMPLES = Path(__file__).parents[2] / "examples"
OFFLINE: dict[str, str | None] = {"HF_HUB_OFFLINE": "1"}
Start = Callable[..., Job]

WRONG_USES = """
import sys
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
import lentando.torch as lt
from lentando.torch.hugging_face import LentandoCallback

lt.init(hide_launcher=True)
config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)

def train(message, items=8, folder=f"{sys.argv[1]}/rank{lt.rank()}", wrap=lt.SlowMo, **changed):
    model = BertForSequenceClassification(config)
    data = [{"input_ids": torch.arange(8), "labels": torch.tensor(0)}] * items
    arguments = TrainingArguments(folder, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, report_to=[])
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    both = {"optimizers": (optimizer, None), "callbacks": [LentandoCallback()]}
    trainer = Trainer(model, arguments, train_dataset=data, **both)
    for name, value in changed.items():
        setattr(arguments, name, value)
    with pytest.raises(lt.ConfigurationError, match=message):
        trainer.train()

train(r"different numbers of steps \\(rank 0: 6; rank 1: 9\\)", items=8 + 4 * lt.rank())
train("save in one folder", folder=sys.argv[1])
train("on rank 0: the optimizer is SGD, which does not average", wrap=lambda sgd: sgd)
train("on rank 0: the Trainer would split each batch among 2 GPUs", _n_gpu=2)
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
train("on rank 0: torch.distributed has a default process group")
print("all refused")
"""


def by_mpirun(*arguments: str) -> Job:
    return OPEN_MPI.run(2, *arguments, timeout_seconds=200, environment=OFFLINE, prepared=TRAINERS)


def by_torchrun(*arguments: str) -> Job:
    return TORCHRUN.run(2, *arguments, timeout_seconds=200, environment=OFFLINE, prepared=TRAINERS)


def check(job: Job) -> None:
    assert job.status == 0, job.output


@pytest.mark.long
@pytest.mark.parametrize(
    ("begin", "resume"),
    selected_cases(
        [(by_torchrun, by_mpirun)],  # Transformers looks at torch.distributed, which torchrun's ranks use
        list(product((by_mpirun, by_torchrun), repeat=2)),
    ),
)
def test_trainer_resumes_and_saves_the_average(begin: Start, resume: Start, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    program, whole, resumed = str(EXAMPLES / "hugging_face_trainer.py"), tmp_path / "whole", tmp_path / "resumed"
    check(begin(program, str(whole)))
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "average")
    for rank in range(2):
        shutil.rmtree(resumed / f"rank{rank}/checkpoint-14")
    check(resume(program, str(resumed), "--resume"))
    expected, found = (load_file(folder / "average/model.safetensors") for folder in (whole, resumed))
    replicas = [load_file(whole / f"rank{rank}/checkpoint-14/model.safetensors") for rank in range(2)]
    assert found.keys() == expected.keys()
    for name, average in expected.items():
        assert (found[name] == average).all(), name
    # The last two of 14 steps are in a round of four that is not complete: the replicas differ.
    assert any((replicas[0][name] != replicas[1][name]).any() for name in expected)


@thoroughly
def test_accelerate_resumes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    program, whole, resumed = str(EXAMPLES / "accelerate_loop.py"), tmp_path / "whole", tmp_path / "resumed"
    check(by_mpirun(program, str(whole)))
    shutil.copytree(whole / "epoch0", resumed / "epoch0")
    check(by_torchrun(program, str(resumed), "--resume"))
    for rank in range(2):
        expected, found = (load_file(folder / f"epoch2/rank{rank}/model.safetensors") for folder in (whole, resumed))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_wrong_uses_are_errors_on_every_rank(tmp_path: Path) -> None:
    job = by_mpirun("-c", WRONG_USES, str(tmp_path))
    check(job)
    assert job.output.count("all refused") == 2
