"""Parameters that a model comes to train after compile: trained and named; what leaves it is named."""

import copy

import pytest
import torch
from torch import nn

import galore_fx
from tests.models import adamw, backward, batches, llama, train

pytestmark = pytest.mark.usefixtures("without_kernels")

MODES = pytest.mark.parametrize("update", ["deferred", "in-backward"])


def unfreezing(update="deferred", **settings):
    """A model whose first block was frozen when it was compiled."""
    model = llama(2)
    model.model.layers[0].requires_grad_(False)
    galore_fx.compile(model, rank=8, optimizer=adamw(lr=1e-2), update=update, **settings)
    return model


@MODES
def test_an_unfrozen_block_trains_and_is_named(update):
    """At full rank, as torch's optimizer would: the first steps equal AdamW's on the same gradients."""
    model = unfreezing(update)
    train(model, batches(2))
    block = model.model.layers[0]
    frozen = copy.deepcopy(block.state_dict())
    block.requires_grad_(True)
    plain = copy.deepcopy(galore_fx.plain_state_dict(model))
    reference = llama(2)
    reference.load_state_dict(plain)
    weights = dict(reference.model.layers[0].named_parameters())
    stepped = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0.0)
    backward(model, batches(1)[0])
    with pytest.warns(
        UserWarning, match=r"9 parameters were unfrozen.*trained at full rank.*layers.0.self_attn.q_proj"
    ):
        model.galore_fx.optimizer.step()
    backward(reference, batches(1)[0])
    stepped.step()
    for name, p in block.named_parameters():
        assert not torch.equal(p, frozen[name])
        step = (weights[name] - frozen[name]).detach()
        assert float((p - weights[name]).detach().norm()) < 1e-3 * float(step.norm()), name
        assert p.grad is None
    train(model, batches(3))  # and not again
    assert model.galore_fx.stats()["late_parameters"] == [f"model.layers.0.{name}" for name in weights]


@MODES
def test_every_trainable_parameter_has_moved_after_an_update_or_is_named(update, caplog):
    model = unfreezing(update)
    model.requires_grad_(True)
    model.extra = nn.Linear(4, 4)  # in no forward: it has no gradient, and torch would not move it either
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(model, batches(1)[0])
    with pytest.warns(UserWarning, match="11 parameters were unfrozen, exchanged or added"):
        model.galore_fx.optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, start[name])]
    assert still == ["extra.weight", "extra.bias"]
    assert model.galore_fx.stats()["without_gradient"] == still
    assert "2 trainable parameters got no gradient in the first update and did not move: extra.weight" in caplog.text


def test_a_layer_that_is_exchanged_trains_and_the_old_one_is_named():
    model = galore_fx.compile(llama(1), rank=8, optimizer=adamw())
    train(model, batches(1))
    layer = nn.Linear(64, 64, bias=False)
    model.model.layers[0].self_attn.o_proj = layer
    start = layer.weight.detach().clone()
    backward(model, batches(1)[0])
    with pytest.warns(UserWarning) as told:
        model.galore_fx.optimizer.step()
    texts = " ".join(str(each.message) for each in told)
    assert "1 parameters were unfrozen, exchanged or added" in texts
    assert "no longer in the model, nor trained: model.layers.0.self_attn.o_proj.weight" in texts
    assert not torch.equal(layer.weight, start)


@MODES
@pytest.mark.parametrize("at_once", [True, False], ids=["unfrozen before loading", "after it"])
def test_a_run_that_has_unfrozen_resumes_to_the_bit(at_once, update):
    ids = batches(6)

    def unfreeze(model, block):
        model.model.layers[block].requires_grad_(True)

    def make():
        model = llama(3)
        model.model.layers[:2].requires_grad_(False)
        return galore_fx.compile(model, rank=8, optimizer=adamw(), update=update)

    straight = make()
    train(straight, ids[:1])
    for block, batch in ((1, ids[1]), (0, ids[2])):  # not in the order of the model
        unfreeze(straight, block)
        with pytest.warns(UserWarning, match="9 parameters were unfrozen"):
            train(straight, [batch])
    saved = copy.deepcopy((straight.state_dict(), straight.galore_fx.optimizer.state_dict()))
    train(straight, ids[3:])
    resumed = make()
    if at_once:
        resumed.requires_grad_(True)
    resumed.load_state_dict(saved[0])
    resumed.galore_fx.optimizer.load_state_dict(saved[1])
    resumed.requires_grad_(True)
    train(resumed, ids[3:])
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))


@MODES
def test_groups_may_list_frozen_parameters_and_say_how_they_train_later(update):
    model = llama(1)
    model.model.embed_tokens.requires_grad_(False)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "lr": 1e-2}, {"params": others, "lr": 0.0}]
    galore_fx.compile(model, rank=8, optimizer=torch.optim.AdamW(groups, lr=1e-3), update=update)
    start = model.model.embed_tokens.weight.detach().clone()
    train(model, batches(1))
    assert torch.equal(model.model.embed_tokens.weight, start)
    model.model.embed_tokens.requires_grad_(True)
    with pytest.warns(UserWarning, match="1 parameters were unfrozen"):
        train(model, batches(1))
    assert float((model.model.embed_tokens.weight.detach() - start).abs().max()) == pytest.approx(1e-2, rel=0.05)


def test_a_state_that_does_not_fit_changes_nothing():
    saved, other = unfreezing(), unfreezing()
    saved.requires_grad_(True)
    with pytest.warns(UserWarning, match="9 parameters were unfrozen"):
        train(saved, batches(1))
    state = saved.galore_fx.optimizer.state_dict()
    broken = copy.deepcopy(state)
    broken["state"][0].pop("step")
    number = len(other.galore_fx.optimizer.param_groups[0]["params"])
    with pytest.raises(galore_fx.OptimizerError, match="does not fit"):
        other.galore_fx.optimizer.load_state_dict(broken)
    assert len(other.galore_fx.optimizer.param_groups[0]["params"]) == number
    assert not other.galore_fx.stats()["late_parameters"]
    other.galore_fx.optimizer.load_state_dict(state)
    trained = galore_fx.compile(llama(2), rank=8, optimizer=adamw(lr=1e-2))
    with pytest.raises(galore_fx.OptimizerError, match="was unfrozen after compile in the run whose state this is"):
        trained.galore_fx.optimizer.load_state_dict(state)
