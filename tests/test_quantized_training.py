"""Weights in 8 bits and bases in 4, in training: the same gradients, little memory, and a model that behaves."""

import copy
import io

import pytest
import torch
import transformers as hf

import galore_fx
from galore_fx.passes.model_graph import dequantize_inputs
from galore_fx.planner.verify_peak import counted_peak
from galore_fx.runtime.formats.groupwise import stored_bytes
from galore_fx.runtime.formats.quantized_tensor import QuantizedTensor
from galore_fx.runtime.formats.state_format import SCALES
from galore_fx.runtime.subspace.projected_parameter import GradientForm
from tests.models import adamw, assert_gradients_equal, backward, batches, gpt2, largest_error, llama

pytestmark = pytest.mark.usefixtures("without_kernels")

Q_PARTS = {"weight_bits": 8, "basis_bits": 4, "state_bits": 8}


def compiled(model, **settings):
    settings = {"rank": 16, "weight_bits": 8, "basis_bits": 4, "optimizer": adamw(), **settings}
    return galore_fx.compile(model, **settings)


def plain_twin(model, make):
    """An ordinary model with the values that the quantised one has."""
    twin = make()
    twin.load_state_dict(galore_fx.plain_state_dict(model))
    return twin


def quantized_parameters(model):
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


@pytest.mark.kernels
@pytest.mark.parametrize("make", [llama, gpt2], ids=["Llama", "GPT-2"])
def test_gradients_are_those_of_the_dequantised_model(make):
    model = compiled(make(2), recipe="auto", stagger=False, refresh_gap=1000)
    forms = (GradientForm.REFRESHING, GradientForm.REFRESHING, GradientForm.PROJECTED)
    for form, batch in zip(forms, batches(3), strict=True):
        assert {record.form for record in model.galore_fx.optimizer.records} == {form}
        twin = plain_twin(model, lambda: make(2))
        backward(model, batch)
        backward(twin, batch)
        assert_gradients_equal(model, twin)
        model.galore_fx.optimizer.step()
    for record in model.galore_fx.optimizer.records:
        assert isinstance(record.weight, QuantizedTensor) and record.basis.bits == 4


def test_full_gradients_for_an_svd_are_those_of_the_dequantised_model():
    model = compiled(llama(1), recipe="galore")
    twin = plain_twin(model, lambda: llama(1))
    for each in (model, twin):
        backward(each, batches(1)[0])
    for p, plain in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, plain.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.kernels
def test_at_most_one_dequantised_weight_is_alive(monkeypatch):
    """Few tokens: what a step takes besides what is kept is one weight in float32; untagged, it is every one."""

    def transient():
        model = llama(2, hidden=128, intermediate=1024)
        sample = {"input_ids": batches(1, 1, 4)[0], "labels": batches(1, 1, 4)[0]}
        plan = galore_fx.plan(model, sample=sample, rank=4, update="in-backward", optimizer=adamw(), weight_bits=8)
        kept = sum(plan.prediction.kept.values())
        return max(plan.phases[phase] for phase in ("forward", "backward")) - kept, plan.regions

    largest, whole_block = 4 * 128 * 1024, 4 * (4 * 128 * 128 + 3 * 128 * 1024)
    tagged, regions = transient()
    assert tagged < 1.5 * largest
    assert len(regions) == 2
    policy = dequantize_inputs.CheckpointPolicy
    untagging = type("Untagging", (), {"MUST_RECOMPUTE": policy.MUST_SAVE})
    monkeypatch.setattr(dequantize_inputs, "CheckpointPolicy", untagging)
    untagged, _ = transient()
    assert untagged > 2 * whole_block


@pytest.mark.kernels
def test_predicted_peak_is_the_counted_one():
    """All quantised parts at once; 176 x 40 states are not whole blocks."""
    sample = {"input_ids": batches(1)[0], "labels": batches(1)[0]}
    made = {"recipe": "q-galore", "rank": 40, "update": "in-backward", "optimizer": adamw()}
    plan = galore_fx.plan(llama(1), sample=sample, **made)
    model = galore_fx.compile(llama(1), **made)
    states = [model.galore_fx.optimizer.state[p] for p in quantized_parameters(model).values()]
    assert any(name.endswith(SCALES) for state in states for name in state)
    assert abs(counted_peak(model, sample) - plan.prediction.peak_bytes) <= 64  # a few numbers of 4 and 8 bytes


def test_bytes_held_are_those_of_the_formula():
    """docs/memory.md: codes a byte, 3 bytes a group; half a byte a basis element; 8-bit states with float32 scales."""
    model = compiled(llama(4, hidden=128, intermediate=352), rank=32, **Q_PARTS)
    plan, optimizer = model.galore_fx.plan, model.galore_fx.optimizer
    rank, expected = 32, {"weights": 0, "bases": 0, "optimizer_state": 0}
    for name, p in model.named_parameters():
        shape = tuple(p.shape)
        if name in {record.name for record in optimizer.records}:
            weights, bases = stored_bytes(p.numel(), 8), stored_bytes(min(shape) * rank, 4)
            assert weights == p.numel() + 3 * p.numel() // 256
            assert bases == (min(shape) * rank // 2) + 3 * min(shape) * rank // 256
            num_states = max(shape) * rank
        else:
            weights, bases, num_states = 4 * p.numel(), 0, p.numel()
        quantized_state = num_states + 4 * num_states // 256
        expected["weights"] += weights
        expected["bases"] += bases
        expected["optimizer_state"] += 2 * (quantized_state if num_states >= 4096 else 4 * num_states) + 4
    assert {name: plan.kept[name] for name in expected} == expected | {
        "weights": expected["weights"] + sum(b.nbytes for b in model.buffers())
    }
    held = {"weights": 0, "bases": 0, "optimizer_state": 0}
    for p in model.parameters():
        parts = p.parts if isinstance(p, QuantizedTensor) else (p,)
        held["weights"] += sum(part.untyped_storage().nbytes() for part in parts)
        for name, value in optimizer.state[p].items():
            parts = value.parts if isinstance(value, QuantizedTensor) else (value,)
            category = "bases" if name == "basis" else "optimizer_state"
            held[category] += sum(part.untyped_storage().nbytes() for part in parts)
    assert held == expected
    assert any(name.endswith(SCALES) for state in optimizer.state.values() for name in state)


def test_training_learns_and_a_resumed_run_is_bit_identical():
    def make():
        return compiled(llama(2), refresh_gap=4, recipe="auto", state_bits=8, optimizer=adamw(lr=1e-2))

    def train(model, ids):
        losses = []
        for batch in ids:
            losses.append(backward(model, batch))
            model.galore_fx.optimizer.step()
        return losses

    ids = batches(1) * 10
    straight, stopped, resumed = make(), make(), make()
    losses = train(straight, ids)
    assert losses[-1] < 0.9 * losses[0]
    train(stopped, ids[:5])
    file = io.BytesIO()
    torch.save([stopped.state_dict(), stopped.galore_fx.optimizer.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved[0])
    resumed.galore_fx.optimizer.load_state_dict(saved[1])
    assert train(resumed, ids[5:]) == losses[5:]
    for name, p in quantized_parameters(straight).items():
        q = resumed.get_parameter(name)
        assert all(torch.equal(a, b) for a, b in zip(p.parts, q.parts, strict=True)), name


def test_rounding_to_the_nearest_loses_small_updates():
    moved = {}
    for rounding in ("stochastic", "nearest"):
        model = compiled(llama(2), rounding=rounding, optimizer=adamw(lr=1e-5), recipe="auto")
        before = {name: p.clone() for name, p in quantized_parameters(model).items()}
        for batch in batches(3):
            backward(model, batch)
            model.galore_fx.optimizer.step()
        after = quantized_parameters(model)
        moved[rounding] = sum(int((after[name].codes != before[name].codes).sum()) for name in after)
    assert moved["nearest"] < 0.01 * moved["stochastic"]


def test_it_behaves_as_a_model_of_ordinary_weights(tmp_path):
    model = compiled(llama(2))
    ids = batches(2)
    backward(model, ids[0])
    model.galore_fx.optimizer.step()
    weights = quantized_parameters(model)
    assert len(weights) == 14
    model.eval()
    with torch.no_grad():
        logits = model(ids[1]).logits
    model.save_pretrained(tmp_path)
    loaded = hf.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert not quantized_parameters(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(ids[1]).logits, logits)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids[1][:1], **settings), loaded.generate(ids[1][:1], **settings))
    with pytest.warns(UserWarning, match="copy of a model compiled"):
        copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(copied(ids[1]).logits, logits)
    assert quantized_parameters(copied).keys() == weights.keys()
    wide = copied.to(torch.float64)
    with torch.no_grad():
        assert wide(ids[1]).logits.dtype is torch.float64
    loaded.load_state_dict(galore_fx.plain_state_dict(model))
    model.load_state_dict(loaded.state_dict())
    twin = plain_twin(model, lambda: llama(2))
    assert largest_error(twin, loaded) < 0.01


def test_an_eval_mode_gradient_is_projected_too():
    model = compiled(llama(1), recipe="auto").eval()
    twin = plain_twin(model, lambda: llama(1)).eval()
    for each in (model, twin):
        backward(each, batches(1)[0])
    assert_gradients_equal(model, twin)


def test_with_the_backend():
    model = llama(2)
    options = {"rank": 16, **Q_PARTS}
    compiled_model = torch.compile(model, backend="galore_fx", options=options)
    optimizer = galore_fx.optimizer(compiled_model, adamw(lr=1e-2))
    losses = []
    for batch in batches(1) * 5:
        losses.append(backward(compiled_model, batch))
        optimizer.step()
    assert losses[-1] < losses[0] and len(quantized_parameters(model)) == 14


def test_writing_into_a_quantised_weight_is_refused_unless_it_is_a_whole_copy():
    weight = QuantizedTensor.of(torch.randn(8, 64), 8)
    with pytest.raises(galore_fx.UsageError, match="stored in 8 bits; change it through"):
        weight.add_(1)
    new = torch.randn(8, 64)
    weight.copy_(new)
    assert float((weight - new).abs().max()) < 0.02
    assert torch.equal(torch.empty(8, 64).copy_(weight), weight.dequantized())
    assert type(torch.zeros_like(weight)) is torch.Tensor and weight.to(torch.bfloat16).codes.dtype is torch.uint8


def test_a_weight_of_no_whole_groups_stays_as_it_is():
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Tanh(), torch.nn.Linear(20, 64))
    compiled(model, rank=4)
    assert quantized_parameters(model).keys() == {"2.weight"}
    entries = {entry.name: entry.weight_bits for entry in model.galore_fx.plan.parameters}
    assert entries["0.weight"] is None and entries["2.weight"] == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 4}, "weight_bits=4 must be 8, or None"),
        ({"basis_bits": 3}, "basis_bits=3 must be 4, 8, or None"),
        ({"rounding": "up"}, "rounding='up' is not one of stochastic, nearest"),
        ({"weight_bits": 8, "recipe": "full"}, "weight_bits=8 is for projected weights"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(galore_fx.SettingError, match=message):
        galore_fx.plan(llama(1), **settings)
