"""Hugging Face's Trainer on several ranks: ``mpirun -np 2 python examples/hugging_face_trainer.py FOLDER [--resume]``.

The model is small and created here, so that nothing is downloaded.
"""

import sys
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import lentando.torch as lt
from lentando.torch.hugging_face import LentandoCallback

lt.init(hide_launcher=True)  # otherwise Accelerate detects several ranks, and starts torch.distributed
folder, resume = sys.argv[1], "--resume" in sys.argv
torch.manual_seed(0)
config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
model = BertForSequenceClassification(config)
data = [{"input_ids": torch.randint(0, 50, (8,)), "labels": torch.tensor(index % 2)} for index in range(120)]
adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
optimizer = lt.SlowMo(adamw, model=model, period=4, slow_momentum=0.5)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=14)
arguments = TrainingArguments(
    f"{folder}/rank{lt.rank()}", num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
    max_grad_norm=0.5, eval_strategy="epoch", save_strategy="epoch", use_cpu=True, disable_tqdm=True, report_to=[],
)  # fmt: skip


class AverageTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with optimizer.averaged():  # all ranks evaluate the average of all replicas
            return dict(super().evaluate(*args, **kwargs))


shards = {"train_dataset": data[lt.rank() : 112 : lt.size()], "eval_dataset": data[112:]}
trainer = AverageTrainer(model, arguments, **shards, optimizers=(optimizer, scheduler), callbacks=[LentandoCallback()])
trainer.train(resume_from_checkpoint=resume)  # each rank's checkpoint contains its replica and slow momentum
if lt.rank() == 0:
    trainer.save_model(f"{folder}/average")
