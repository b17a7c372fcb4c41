"""GradNormLoRP with frozen weights in 8 bits: the training of what the codes stand for."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import galore_fx
from galore_fx.runtime.formats.groupwise import stored_bytes
from galore_fx.runtime.formats.quantized_tensor import QuantizedTensor, stored_tensors
from galore_fx.runtime.layers.normalized_linear import NormalizedLinear
from tests.models import adamw, backward, batches, gpt2, llama, straight_and_resumed, train

pytestmark = pytest.mark.usefixtures("without_kernels")

PARTS = {"recipe": "gradnormlorp", "rank": 4, "optimizer": adamw(lr=1e-2), "refresh_gap": 3}


def layers(model):
    return [module for module in model.modules() if isinstance(module, NormalizedLinear)]


def of_stored_weights(model):
    """The plain model with the weights that the codes stand for."""
    plain = llama(1)
    plain.load_state_dict({name: value.clone() for name, value in galore_fx.plain_state_dict(model).items()})
    return plain


def test_the_training_is_that_of_the_weights_that_the_codes_stand_for(tmp_path):
    model, ids = galore_fx.compile(llama(1), weight_bits=8, **PARTS), batches(5)
    assert all(isinstance(layer.base_weight, QuantizedTensor) for layer in layers(model))
    stored = of_stored_weights(model)
    for mine, theirs in zip(llama(1).parameters(), stored.parameters(), strict=True):
        assert (mine - theirs).abs().max() <= (mine.max() - mine.min()) / 255, "a step of the grid"
    with torch.no_grad():
        expected = stored.eval()(input_ids=ids[0]).logits
        assert torch.equal(model.eval()(input_ids=ids[0]).logits, expected), "W(0) is what the codes stand for"
    reference = galore_fx.compile(stored.train(), **PARTS)
    for batch in ids:
        assert backward(model.train(), batch) == backward(reference, batch)
        model.galore_fx.optimizer.step()
        reference.galore_fx.optimizer.step()
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids[0]).logits, model.eval()(input_ids=ids[0]).logits)


def test_a_conv1d_is_stored_too_and_a_resumed_run_is_the_same():
    straight, _ = straight_and_resumed(lambda: galore_fx.compile(gpt2(1), weight_bits=8, **PARTS), batches(4), 2)
    assert all(isinstance(layer.base_weight, QuantizedTensor) for layer in layers(straight))


@pytest.mark.kernels
def test_one_wide_weight_is_alive():
    """Few tokens: what a step takes besides what is kept is one weight in float32, not those of the blocks."""
    ids = batches(1, 1, 4)[0]
    sample = {"input_ids": ids, "labels": ids}

    def make():
        return llama(2, hidden=256, intermediate=1024)

    parts = {**PARTS, "rank": 1, "update": "in-backward", "weight_bits": 8}
    plan = galore_fx.plan(make(), sample=sample, **parts)
    kept = sum(plan.prediction.kept.values())
    assert max(plan.phases[phase] for phase in ("forward", "backward")) - kept < 1.5 * 4 * 256 * 1024
    wide = galore_fx.plan(make(), **{**parts, "weight_bits": None})
    sizes = [weight.numel() for block in make().model.layers for weight in block.parameters() if weight.ndim == 2]
    assert wide.fixed_bytes - plan.fixed_bytes == sum(4 * size - stored_bytes(size, 8) for size in sizes)


def test_a_trained_magnitude_stays_where_codes_are_made_and_codes_are_not_merged_into():
    model, ids = galore_fx.compile(llama(1), **PARTS), batches(3)
    train(model, ids)
    with pytest.warns(UserWarning, match="compiled"):
        stored = copy.deepcopy(model)
    before = layers(stored)[0].magnitude / layers(stored)[0].base_norms.sqrt()
    galore_fx.compile(stored, weight_bits=8, **PARTS)
    after = layers(stored)[0].magnitude / layers(stored)[0].base_norms.sqrt()
    torch.testing.assert_close(after, before)
    assert not torch.allclose(after, torch.ones_like(after), atol=1e-5)
    with pytest.warns(UserWarning, match="compiled"):
        again = copy.deepcopy(stored)
    with pytest.raises(galore_fx.SettingError, match="stores them as codes"):
        galore_fx.compile(again, merge_factors=True, **PARTS)
    frozen = [part for p in again.parameters() if not p.requires_grad for part in stored_tensors(p)]
    assert galore_fx.plan(again, **PARTS).fixed_bytes == sum(t.nbytes for t in [*frozen, *again.buffers()])


def test_a_plan_leaves_the_model_wide():
    model = llama(1)
    before = model.model.layers[0].mlp.up_proj.weight
    value = before.detach().clone()
    galore_fx.plan(model, weight_bits=8, **PARTS)
    assert model.model.layers[0].mlp.up_proj.weight is before and torch.equal(before, value)
