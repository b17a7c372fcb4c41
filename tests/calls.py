"""A compiled model beside a plain one, called the same way and compared."""

import copy

import pytest
import torch
from torch import nn

import galore_fx
from tests.models import adamw, assert_gradients_equal


def pair(plain, **settings):
    """A compiled model and a plain one with equal weights."""
    reference = copy.deepcopy(plain)
    settings = {"rank": 4, "refresh_gap": 100, "optimizer": adamw(), "strict": True, **settings}
    return galore_fx.compile(plain, **settings), reference


def assert_same(model, reference, call, tolerance=1e-4):
    """Runs both once, forward and backward, and compares."""
    losses = []
    for each in (model, reference):
        torch.manual_seed(7)
        loss = call(each)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert_gradients_equal(model, reference, tolerance)


def step_both(model, reference):
    """One update, after which the plain model goes on from the compiled one's weights."""
    model.galore_fx.optimizer.step()
    reference.load_state_dict(model.state_dict())
    reference.zero_grad()


def causal(ids, **settings):
    return lambda model: model(input_ids=ids, labels=ids, **settings).loss


def enable_checkpointing(model):
    """transformers' switch, by its newer name where it has one."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


class Blocks(nn.Module):
    """Linear blocks that the user checkpoints, shares, breaks or skips as a test needs."""

    def __init__(self, block=None, count=2, call=lambda block, x: block(x)):
        super().__init__()
        torch.manual_seed(0)
        make = block or (lambda: nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24)))
        self.blocks = nn.ModuleList([make() for _ in range(count)])
        self.call = call

    def forward(self, x):
        for block in self.blocks:
            x = x + self.call(block, x)
        return x.square().mean()
