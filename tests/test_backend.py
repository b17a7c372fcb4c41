"""The torch.compile backend: the same losses and updates as the regional form, and no silent training of nothing."""

import copy
import warnings

import pytest
import torch
from torch import nn

import galore_fx
from galore_fx.runtime.formats.quantized_tensor import QuantizedTensor
from tests.models import adamw, assert_gradients_equal, backward, batches, largest_error, llama

pytestmark = pytest.mark.usefixtures("without_kernels")

OPTIONS = {"rank": 8, "refresh_gap": 3}


def test_torch_finds_the_backend_by_its_name():
    assert "galore_fx" in torch._dynamo.list_backends()


@pytest.mark.kernels
def test_losses_and_weights_are_those_of_the_regional_form():
    regional = galore_fx.compile(llama(1), optimizer=adamw(), stagger=False, **OPTIONS)
    whole = torch.compile(llama(1), backend="galore_fx", options=OPTIONS)
    optimizer = galore_fx.optimizer(whole, adamw())
    assert galore_fx.optimizer(whole) is optimizer, "asked again, it is the same"
    losses = []
    for ids in batches(4):
        losses.append((backward(regional, ids), backward(whole, ids)))
        regional.galore_fx.optimizer.step()
        optimizer.step()
    for first, second in losses:
        assert first == pytest.approx(second, rel=1e-5)
    assert largest_error(whole, regional) < 1e-4
    stats = whole.galore_fx.stats()
    assert len(stats["projected"]) == 7 and stats["num_region_graphs"] == 1 and stats["num_refreshes"] >= 14
    assert stats["num_region_variants"] == 2, "one that sketches, one that is steady"


def test_gradients_are_those_of_the_plain_model_and_eval_is_plain():
    plain = llama(1)
    reference = copy.deepcopy(plain)
    model = torch.compile(plain, backend="galore_fx", options={"rank": 4})
    galore_fx.optimizer(model, adamw())
    ids = batches(1)[0]
    backward(model, ids), backward(reference, ids)
    assert_gradients_equal(plain, reference)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, reference(input_ids=ids).logits)
    model.zero_grad()
    assert all(record.leaf.grad is None for record in plain.galore_fx.optimizer.records)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).train()


def test_a_backward_before_the_optimizer_exists_raises_and_a_forward_after_it_trains():
    model = torch.compile(mlp(), backend="galore_fx", options={"rank": 4})
    loss = model(torch.ones(3, 16)).sum()
    with pytest.raises(galore_fx.UsageError, match=r"before galore_fx.optimizer\(model\) was called"):
        loss.backward()
    optimizer = galore_fx.optimizer(model, torch.optim.SGD)
    before = model._orig_mod[0].weight.clone()
    model(torch.ones(3, 16)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model._orig_mod[0].weight)
    assert model._orig_mod.galore_fx.stats()["num_region_graphs"] == 1


def test_a_compiled_function_gives_its_options_to_the_optimizer_too():
    model = mlp()
    options = {"rank": 3}
    loss = torch.compile(lambda x: model(x).square().mean(), backend="galore_fx", options=options)
    optimizer = galore_fx.optimizer(model, torch.optim.SGD, options=options)
    loss(torch.ones(3, 16)).backward()
    optimizer.step()
    assert set(model.galore_fx.stats()["rank"].values()) == {3}
    other = torch.compile(lambda x: model(x).sum(), backend="galore_fx", options={"rank": 5})
    with pytest.raises(Exception, match=r"options=\{'rank': 3\} before and options=\{'rank': 5\} now"):
        other(torch.ones(3, 16))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: torch.compile(mlp(), backend="galore_fx", mode="reduce-overhead")(torch.ones(3, 16)),
            Exception,
            "mode=",
        ),
        (
            lambda: galore_fx.optimizer(torch.compile(mlp(), backend="eager")),
            galore_fx.UsageError,
            "compiled with backend='eager'",
        ),
        (
            lambda: galore_fx.optimizer(torch.compile(mlp(), backend="galore_fx", options={"ranks": 4})),
            galore_fx.SettingError,
            "ranks",
        ),
        (
            lambda: galore_fx.optimizer(torch.compile(mlp(), backend="galore_fx", options={"update": "in-backward"})),
            galore_fx.SettingError,
            "defers the update",
        ),
        (
            lambda: galore_fx.optimizer(torch.compile(mlp(), backend="galore_fx", options={"budget": "1KB"})),
            galore_fx.BudgetError,
            "cannot hold this training",
        ),
        (lambda: galore_fx.optimizer(galore_fx.compile(mlp(), rank=4)), galore_fx.ModelError, "by galore_fx.compile"),
        (lambda: galore_fx.compile(torch.compile(mlp())), galore_fx.ModelError, "what torch.compile returned"),
    ],
    ids=["mode", "another backend", "unknown option", "in-backward", "budget", "compiled already", "compile twice"],
)
def test_wrong_uses_say_what_to_do(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_heads_compiled_before_take_no_entries_from_the_class_of_the_model():
    """Dynamo gives up on code with more than its limit; what ran then was the plain forward, with full gradients."""
    torch._dynamo.reset()  # other tests have compiled the class too
    heads = [galore_fx.compile(llama(1), optimizer=adamw(), rank=4) for _ in range(2)]
    for head in heads:
        backward(head, batches(1)[0])
    plain = llama(1)
    model = torch.compile(plain, backend="galore_fx", options={"rank": 4})
    galore_fx.optimizer(model, adamw())
    with torch._dynamo.config.patch(recompile_limit=2), warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(model, batches(1)[0])
    projected = plain.galore_fx.stats()["projected"]
    assert len(projected) == 7 and all(plain.get_parameter(name).grad is None for name in projected)


def test_a_budget_that_is_too_small_leaves_the_weights_as_they_are():
    model = torch.compile(llama(1), backend="galore_fx", options={"recipe": "q-galore", "budget": "100KB", "rank": 8})
    with pytest.raises(galore_fx.BudgetError):
        galore_fx.optimizer(model, adamw())
    assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())
