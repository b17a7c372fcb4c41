"""transformers' Trainer trains a compiled model, and goes on from its own checkpoints."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import galore_fx
from tests.models import adamw, batches, llama

pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
pytestmark = pytest.mark.usefixtures("without_kernels")


def trainer(folder, num_steps):
    model = galore_fx.compile(llama(1), optimizer=adamw(), rank=8, refresh_gap=2, max_grad_norm=1.0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=2,
        max_grad_norm=0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    data = [{"input_ids": ids, "labels": ids} for ids in torch.cat(batches(6))]
    return Trainer(model=model, args=arguments, train_dataset=data, optimizers=(model.galore_fx.optimizer, None))


def test_trainer_trains_and_resumes_bit_identically(tmp_path):
    straight, stopped, resumed = trainer(tmp_path / "a", 4), trainer(tmp_path / "b", 2), trainer(tmp_path / "b", 4)
    before = [p.clone() for p in straight.model.parameters()]
    straight.train()
    assert not any(torch.equal(p, q) for p, q in zip(before, straight.model.parameters(), strict=True))
    assert straight.model.galore_fx.stats()["num_updates"] == 4
    stopped.train()
    resumed.train(resume_from_checkpoint=True)
    for p, q in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
