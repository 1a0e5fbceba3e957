#!/usr/bin/env bash
# transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU), Python 3.11.
#
# Most would expect that gradient_accumulation_steps=n with batches of 8/n takes the step of one batch of 8. Seen, with
# BertForSequenceClassification: the gradient, and the loss that is reported, are n times as large. The model accepts
# further keyword arguments, from which the Trainer concludes that its loss is a sum divided by the number of items in all
# batches; but the loss is the mean over each batch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 2>/dev/null
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
config = BertConfig(**small, hidden_dropout_prob=0, attention_probs_dropout_prob=0)


def step(accumulated):
    """The change of the last layer in one step of SGD with eight samples, and the reported loss."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    data = [{"input_ids": torch.randint(0, 50, (8,)), "labels": torch.tensor(index % 2)} for index in range(8)]
    before = model.classifier.weight.detach().clone()
    arguments = TrainingArguments(
        "out", max_steps=1, per_device_train_batch_size=8 // accumulated, gradient_accumulation_steps=accumulated,
        max_grad_norm=0, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True,
    )
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    constant = torch.optim.lr_scheduler.ConstantLR(sgd, 1.0)
    loss = Trainer(model, arguments, train_dataset=data, optimizers=(sgd, constant)).train().training_loss
    return model.classifier.weight.detach() - before, loss


change, loss = step(1)
for accumulated in (2, 4):
    found, reported = step(accumulated)
    ratio = (found.norm() / change.norm()).item()
    print(f"{accumulated} accumulated: {ratio:.3f} times the step, {reported / loss:.3f} times the loss")
    assert abs(ratio - accumulated) < 0.01
    assert abs(reported / loss - accumulated) < 0.01
PYTHON
