"""Hugging Face's Trainer on several ranks: ``mpirun -np 2 python examples/hugging_face_trainer.py FOLDER [--resume]``.

Needs ``pip install transformers accelerate``. The model is small and created here, so that nothing is downloaded.
"""

import sys
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import lentando.torch as lt

lt.init(hide_launcher=True)  # otherwise Accelerate detects several ranks, and starts torch.distributed
folder, resume = sys.argv[1], "--resume" in sys.argv
torch.manual_seed(0)
config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
model = BertForSequenceClassification(config)
data = [{"input_ids": torch.randint(0, 50, (8,)), "labels": torch.tensor(index % 2)} for index in range(64)]
adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
optimizer = lt.SlowMo(adamw, model=model, period=2, slow_momentum=0.5, base_buffers="maintain")


class SaveAverage(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Saves the average of all replicas, which is the result of the training."""

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Save on rank 0; all ranks take part in the average."""
        with optimizer.averaged():
            if lt.rank() == 0:
                model.save_pretrained(f"{folder}/average")


arguments = TrainingArguments(
    f"{folder}/rank{lt.rank()}", num_train_epochs=2, per_device_train_batch_size=4, save_strategy="epoch",
    report_to=[], use_cpu=True, disable_tqdm=True,
)  # fmt: skip
own_data = data[lt.rank() :: lt.size()]
trainer = Trainer(model, arguments, train_dataset=own_data, optimizers=(optimizer, None), callbacks=[SaveAverage()])
trainer.train(resume_from_checkpoint=resume)  # each rank's checkpoint contains its replica and slow momentum
