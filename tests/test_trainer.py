"""transformers' Trainer trains a compiled model, and goes on from its own checkpoints."""

import pytest
import torch

import galore_fx
from tests import models
from tests.models import adamw, batches, llama

pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
pytestmark = pytest.mark.usefixtures("without_kernels")


def trainer(folder, num_steps):
    model = galore_fx.compile(llama(1), optimizer=adamw(), rank=8, refresh_gap=2, max_grad_norm=1.0)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 2}
    return models.trainer(
        model, folder, torch.cat(batches(6)), max_steps=num_steps, lr_scheduler_type="constant", **settings
    )


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
