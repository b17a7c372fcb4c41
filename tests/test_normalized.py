"""Weights as a magnitude times a normalised low-rank change: the layer, its gradients, training, export, planning."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import galore_fx
from galore_fx.planner.verify_peak import counted_peak, kept_bytes
from galore_fx.runtime.layers.normalized_linear import NormalizedLinear, normalize
from tests.models import adamw, backward, batches, gpt2, largest_error, llama, straight_and_resumed
from tests.references import PlainNormalized
from tests.test_projected_backward import graphs, weight_sized_values  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("without_kernels")

PARTS = {"recipe": "gradnormlorp", "rank": 4}


def layer(in_first=False, by_column=False, scale=0.7, dtype=torch.float64):
    """A normalised layer 5 -> 7 of rank 3 in the middle of its training."""
    torch.manual_seed(0)
    if in_first:
        from transformers.pytorch_utils import Conv1D

        made = Conv1D(7, 5).to(dtype)
    else:
        made = nn.Linear(5, 7, dtype=dtype)
    normalize(made, 3, scale, torch.Generator().manual_seed(1), by_column=by_column)
    with torch.no_grad():
        made.factor_out.normal_()
        made.magnitude.mul_(torch.rand(made.magnitude.shape, dtype=dtype) + 0.5)
    return made


@pytest.mark.parametrize("in_first", [False, True])
@pytest.mark.parametrize("by_column", [False, True])
def test_gradients_are_those_of_the_formulas_and_of_finite_differences(in_first, by_column):
    made = layer(in_first, by_column)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    trained = (made.factor_out, made.factor_in, made.magnitude, made.bias, x)

    def forward(out, in_, magnitude, bias, x):
        values = {"factor_out": out, "factor_in": in_, "magnitude": magnitude, "bias": bias}
        return torch.func.functional_call(made, values, (x,))

    assert torch.autograd.gradcheck(forward, trained)
    weight = made.base_weight.T if in_first else made.base_weight
    direction = weight + 0.7 * made.factor_out @ made.factor_in
    dim = 0 if by_column else 1
    norms = direction.norm(dim=dim, keepdim=True)
    magnitude = made.magnitude[None] if by_column else made.magnitude[:, None]
    expected = magnitude * direction / norms
    torch.testing.assert_close(made(x), x @ expected.T + made.bias)
    torch.testing.assert_close(made.weight, expected.T if in_first else expected)
    # dM = <G, V> / c, dV = M / c (G - dM V / c), dI = s dV J^T, dJ = s I^T dV
    cotangent = torch.randn(4, 7, dtype=torch.float64)
    grads = torch.autograd.grad(made(x), trained[:3], cotangent)
    full = cotangent.T @ x
    of_magnitude = (full * direction).sum(dim, keepdim=True) / norms
    of_direction = magnitude / norms * (full - of_magnitude * direction / norms)
    torch.testing.assert_close(grads[2], of_magnitude.flatten())
    torch.testing.assert_close(grads[0], 0.7 * of_direction @ made.factor_in.T)
    torch.testing.assert_close(grads[1], 0.7 * made.factor_out.T @ of_direction)


@pytest.mark.parametrize("norm", ["row", "column"])
@pytest.mark.parametrize(("make", "dtype"), [(gpt2, torch.float32), (lambda: llama(1), torch.bfloat16)])
def test_at_the_start_the_model_is_what_it_was_to_the_bit(make, dtype, norm):
    plain, ids = make().to(dtype).eval(), batches(1)[0]
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        model = galore_fx.compile(plain.train(), weight_norm=norm, optimizer=adamw(), **PARTS).eval()
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert sum(isinstance(module, NormalizedLinear) for module in model.modules()) == (12 if make is gpt2 else 7)


def test_a_merge_changes_the_weight_by_rounding_only_and_frees_the_factors():
    made = layer(dtype=torch.float32)
    before = made.weight
    made.merge_(torch.Generator().manual_seed(5))
    torch.testing.assert_close(made.weight, before)
    assert not made.factor_out.any() and made.factor_in.any()
    torch.testing.assert_close(made.base_norms, made.base_weight.square().sum(1))


@pytest.mark.kernels
@pytest.mark.parametrize("sides", ["one", "two"])
def test_ten_steps_equal_a_plain_loop(sides):
    # In a new pair of bases R is diagonal: what is beside it is rounding, which a small eps would blow up.
    model, plain, ids = llama(1), llama(1), batches(10)
    galore_fx.compile(
        model, optimizer=adamw(lr=1e-2, eps=1e-4), sides=sides, scale=0.5, factor_scale=2.0, refresh_gap=4, **PARTS
    )
    reference = PlainNormalized(
        plain, model, rank=4, gap=4, scale=0.5, factor_scale=2.0, lr=1e-2, sides=sides, eps=1e-4
    )
    for batch in ids:
        backward(model, batch)
        model.galore_fx.optimizer.step()
        reference.step(batch)
    given = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert given.keys() == reference.parameters.keys()
    errors = {n: float((p - reference.parameters[n]).detach().norm() / p.detach().norm()) for n, p in given.items()}
    assert max(errors.values()) < 2e-3, errors
    with torch.no_grad():
        assert reference.loss(ids[0]) == pytest.approx(float(model.eval()(input_ids=ids[0], labels=ids[0]).loss), 1e-4)


@pytest.mark.parametrize("make", [lambda: llama(1), gpt2])
def test_what_is_exported_is_the_training_model(make, tmp_path):
    model, ids = galore_fx.compile(make(), optimizer=adamw(lr=1e-2), **PARTS), batches(3)
    names = set(make().state_dict())
    for batch in ids:
        backward(model, batch)
        model.galore_fx.optimizer.step()
    model.save_pretrained(tmp_path)
    exported = galore_fx.plain_state_dict(model)
    assert set(exported) == names
    with pytest.raises(RuntimeError, match=r"weight is a merged one, as save_pretrained writes it.*resume from"):
        model.load_state_dict(exported, strict=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids[0]).logits, model.eval()(input_ids=ids[0]).logits)


@pytest.mark.parametrize(
    "parts",
    [{"refresh": "lotus", "lotus_interval": 2}, {"update": "in-backward", "sides": "one", "merge_factors": True}],
)
def test_resume_is_bit_identical(parts):
    def make():
        return galore_fx.compile(llama(1), optimizer=adamw(), refresh_gap=3, **PARTS, **parts)

    straight_and_resumed(make, batches(8), 5)


def test_merging_goes_on_training_and_gives_the_change_more_rank():
    ids = batches(1)[0]
    ranks, losses = {}, {}
    for merge in (False, True):
        model = galore_fx.compile(llama(1), optimizer=adamw(lr=1e-2), refresh_gap=5, merge_factors=merge, **PARTS)
        before = galore_fx.plain_state_dict(model)["model.layers.0.mlp.up_proj.weight"].clone()
        for _ in range(16):
            losses[merge] = backward(model, ids)
            model.galore_fx.optimizer.step()
        after = galore_fx.plain_state_dict(model)["model.layers.0.mlp.up_proj.weight"]
        # Of the directions: the magnitudes alone give a change of full rank.
        change = nn.functional.normalize(after, dim=1) - nn.functional.normalize(before, dim=1)
        values = torch.linalg.svdvals(change)
        ranks[merge] = int((values > 0.05 * values[0]).sum())
    assert ranks[True] > ranks[False] and losses[True] < 0.7 * torch.tensor(256.0).log()


@pytest.mark.kernels
def test_the_peak_is_predicted_and_the_optimizer_keeps_little():
    ids = batches(1)[0]
    sample = {"input_ids": ids, "labels": ids}
    parts = {"optimizer": adamw(), "weight_bits": 8, **PARTS}
    model = galore_fx.compile(llama(4, hidden=128, intermediate=256), **parts)
    plan = galore_fx.plan(llama(4, hidden=128, intermediate=256), sample=sample, **parts)
    assert counted_peak(model, sample) - plan.peak_bytes in (0, 28)
    kept = kept_bytes(model, model.galore_fx.optimizer)
    assert kept["factors"] == plan.prediction.kept["factors"] == sum(p.bytes["factors"] for p in plan.parameters)
    shapes = 4 * (4 * [(128, 128)] + 2 * [(256, 128)] + [(128, 256)])
    assert kept["factors"] == sum(4 * (4 * (m + n) + m) for m, n in shapes)
    states = {p.name: p.bytes["optimizer_state"] for p in plan.parameters if p.rank is not None}
    assert set(states.values()) == {2 * 4 * 4 * 4 + 4}, "two moments of 4 x 4, whatever the weight's shape"


def test_neither_the_weight_nor_its_gradient_is_formed(graphs):  # noqa: F811
    model = galore_fx.compile(llama(num_layers=1, num_key_value_heads=2), optimizer=adamw(), **PARTS)
    shapes = {tuple(m.base_weight.shape) for m in model.modules() if isinstance(m, NormalizedLinear)}
    backward(model, batches(1, 3, 7)[0])
    assert len(graphs) == 2 and len(shapes) == 4
    for graph in graphs:
        assert weight_sized_values(graph, shapes) == []


def test_planning_and_a_refused_budget_leave_the_model_as_it_was():
    model = llama(1)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    instance = torch.optim.AdamW(model.parameters())
    groups = list(instance.param_groups[0]["params"])
    plan = galore_fx.plan(model, optimizer=instance, **PARTS)
    assert sum(p.bytes["factors"] > 0 for p in plan.parameters) == 21
    with pytest.raises(galore_fx.BudgetError):
        galore_fx.compile(model, "100KB", optimizer=instance, **PARTS)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert all(p is q for p, q in zip(instance.param_groups[0]["params"], groups, strict=True))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    galore_fx.compile(model, optimizer=instance, **PARTS)
    backward(model, batches(1)[0])
    model.galore_fx.optimizer.step()
    again = galore_fx.compile(llama(1), plan=galore_fx.Plan.from_json(plan.to_json()), optimizer=torch.optim.AdamW)
    backward(again, batches(1)[0])
    again.galore_fx.optimizer.step()
    assert largest_error(again, model) == 0


def test_a_plan_leaves_the_order_of_parameters_and_the_names_of_groups():
    model = gpt2(1)
    before, order = list(model.state_dict()), [id(p) for p in model.parameters()]
    instance = torch.optim.AdamW(model.named_parameters())
    names = list(instance.param_groups[0]["param_names"])
    galore_fx.plan(model, optimizer=instance, **PARTS)
    assert list(model.state_dict()) == before and [id(p) for p in model.parameters()] == order
    assert instance.param_groups[0]["param_names"] == names
    galore_fx.compile(model, optimizer=instance, **PARTS)
    group = instance.param_groups[0]
    assert dict(zip(group["param_names"], group["params"], strict=True)) == {
        name: p for name, p in model.named_parameters() if p.requires_grad
    }


def test_a_state_that_is_given_is_what_is_saved_and_a_copy_saves_plain_weights(tmp_path):
    model, ids = galore_fx.compile(llama(1), optimizer=adamw(lr=1e-2), **PARTS), batches(2)
    name = "model.layers.0.mlp.up_proj.weight"
    backward(model, ids[0])
    model.galore_fx.optimizer.step()
    best = {key: value.clone() for key, value in model.state_dict().items()}
    expected = galore_fx.plain_state_dict(model)[name].clone()
    backward(model, ids[1])
    model.galore_fx.optimizer.step()
    model.save_pretrained(tmp_path / "best", state_dict=best)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "best").state_dict()[name]
    assert torch.equal(saved, expected) and not torch.equal(saved, galore_fx.plain_state_dict(model)[name])
    with pytest.warns(UserWarning, match="compiled"):
        copied = copy.deepcopy(model)
    copied.save_pretrained(tmp_path / "copy")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert torch.equal(plain.state_dict()[name], galore_fx.plain_state_dict(model)[name])
    with pytest.raises(galore_fx.ModelError, match="the model's layers are normalised"):
        galore_fx.compile(copied, optimizer=adamw())


def test_under_autocast_a_layer_gives_what_a_plain_one_gives():
    made = layer(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(torch.randn(2, 5)).dtype is torch.bfloat16
        parts = {name: getattr(made, name) for name in ("factor_out", "factor_in", "base_weight", "base_norms")}
        norms = made.square_norms(parts)
    direction = made.base_weight + 0.7 * made.factor_out @ made.factor_in
    torch.testing.assert_close(norms, direction.square().sum(1))


def test_a_merge_in_bfloat16_keeps_small_changes_on_average():
    made = nn.Linear(64, 512, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(made.weight, 1.0)
    normalize(made, 1, 1.0, torch.Generator().manual_seed(1), by_column=False)
    with torch.no_grad():
        made.factor_out.fill_(1.0)
        made.factor_in.fill_(1e-3)  # a quarter of the grid at 1
    made.merge_(torch.Generator().manual_seed(2))
    assert float(made.base_weight.float().mean()) == pytest.approx(1.001, abs=1e-4)


def test_layers_that_share_a_weight_are_trained_as_others_are():
    model = llama(2)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    model = galore_fx.compile(model, optimizer=adamw(), **PARTS)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    records = {record.name for record in model.galore_fx.optimizer.records}
    assert "model.layers.0.mlp.up_proj.weight" in records and len(records) == 1 + 2 * 12


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"weight_norm": "both"}, "weight_norm='both' is not one of row, column, or None"),
        ({"basis_bits": 8}, "basis_bits=8 is for weights trained in a subspace of their own"),
        ({"weight_bits": 8, "merge_factors": True}, "adds to the frozen weight, which weight_bits=8 stores as codes"),
        ({"basis": "subspace-iteration"}, "basis='subspace-iteration' is for weights"),
        ({"residual": "sparse"}, "residual='sparse' is for weights"),
        ({"moments_on_refresh": "rotate"}, "knows one basis, and sides='two' has two"),
        ({"factor_scale": 0}, "factor_scale=0 must be a finite number above 0"),
        ({"merge_factors": True, "stagger": True}, "merge_factors=True renews all bases"),
        ({"merge_factors": True, "refresh_limit": 1}, "which refresh_limit=1 may break up"),
        ({"merge_factors": True, "weight_norm": None}, "merges the factors of normalised weights"),
    ],
)
def test_what_makes_no_sense_is_refused(parts, message):
    model = llama(1)
    with pytest.raises(galore_fx.SettingError, match=message):
        galore_fx.compile(model, optimizer=adamw(), **{**PARTS, **parts})
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_the_backend_refuses_it():
    model = torch.compile(llama(1), backend="galore_fx", options=dict(PARTS))
    with pytest.raises(galore_fx.SettingError, match="weight_norm needs galore_fx.compile"):
        galore_fx.optimizer(model)
    assert type(copy.deepcopy(model._orig_mod).model.layers[0].mlp.up_proj) is nn.Linear
