"""``recipe="galore"`` is GaLore: against the released optimizer, and against a plain reference with decay."""

import copy

import pytest
import torch
from torch import nn

import galore_fx
from tests.models import adamw, backward, batches, gpt2, largest_error, llama, relative_errors
from tests.references import PlainGaLore

pytestmark = pytest.mark.usefixtures("without_kernels")

RANK, GAP, SCALE, STEPS = 16, 5, 0.25, 25
# A key bias shifts all scores of a query alike, so softmax removes it: its gradient is rounding noise, which Adam
# blows up to full steps in both. In GPT-2 it is the middle third of the fused bias.
NO_EFFECT = "attn.c_attn.bias"


def _split(model: nn.Module, names: list[str]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    parameters = dict(model.named_parameters())
    return [parameters[n] for n in names], [p for n, p in parameters.items() if n not in names]


@pytest.mark.parametrize(
    ("make", "num_projected"), [pytest.param(llama, 28, marks=pytest.mark.kernels), (gpt2, 12)], ids=["llama", "gpt2"]
)
def test_25_steps_equal_the_released_optimizer(make, num_projected):
    galore_torch = pytest.importorskip("galore_torch", reason="the dev extra installs galore-torch")
    model = make()
    reference = copy.deepcopy(model)
    galore_fx.compile(model, recipe="galore", rank=RANK, refresh_gap=GAP, scale=SCALE, optimizer=adamw(eps=1e-15))
    names = model.galore_fx.stats()["projected"]
    assert len(names) == num_projected
    projected, full = _split(reference, names)
    settings = {"rank": RANK, "update_proj_gap": GAP, "scale": SCALE, "proj_type": "std"}
    peer = galore_torch.GaLoreAdamW(
        [{"params": full}, {"params": projected, **settings}],
        lr=1e-3,
        weight_decay=0.0,
        eps=1e-15,
        no_deprecation_warning=True,
    )
    for ids in batches(STEPS):
        assert backward(model, ids) == pytest.approx(backward(reference, ids), abs=1e-5)
        model.galore_fx.optimizer.step()
        peer.step()
        peer.zero_grad()
    for name, p in model.named_parameters():
        if name.endswith(NO_EFFECT):
            third = p.shape[0] // 3
            with torch.no_grad():
                p[third : 2 * third] = reference.get_parameter(name)[third : 2 * third]
    errors = relative_errors(model, reference)
    assert max(errors.values()) < 1e-5, sorted(errors.items(), key=lambda item: -item[1])[:3]


def test_weight_decay_equals_a_plain_reference_in_torchs_order():
    model = llama(num_layers=2)
    reference = copy.deepcopy(model)
    galore_fx.compile(model, recipe="galore", rank=RANK, refresh_gap=GAP, optimizer=adamw(weight_decay=0.1, eps=1e-6))
    projected, full = _split(reference, model.galore_fx.stats()["projected"])
    plain = PlainGaLore(projected, full, rank=RANK, gap=GAP, scale=SCALE, lr=1e-3, weight_decay=0.1, eps=1e-6)
    for ids in batches(12):
        backward(model, ids)
        backward(reference, ids)
        model.galore_fx.optimizer.step()
        plain.step()
    assert largest_error(model, reference) < 1e-5
    untouched = llama(num_layers=2)
    assert largest_error(model, untouched) > 1e-2, "the steps must have moved the weights for this to prove anything"


@pytest.mark.parametrize("recipe", ["galore", "auto"])
def test_in_backward_equals_deferred(recipe):
    deferred, in_backward = llama(num_layers=2), llama(num_layers=2)
    for model, update in ((deferred, "deferred"), (in_backward, "in-backward")):
        galore_fx.compile(
            model, recipe=recipe, rank=RANK, refresh_gap=4, update=update, optimizer=adamw(weight_decay=0.1)
        )
    for ids in batches(9):
        for model in (deferred, in_backward):
            backward(model, ids)
            model.galore_fx.optimizer.step()
        assert all(p.grad is None for p in in_backward.parameters())
    assert largest_error(in_backward, deferred) < 1e-6
    for figure in ("num_updates", "num_refreshes"):
        assert in_backward.galore_fx.stats()[figure] == deferred.galore_fx.stats()[figure] > 0
