"""Weights in 16 bits: rounding is right on average, whatever the update is, and loses no movement in training."""

import copy
import functools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import galore_fx
from galore_fx.passes.optimizer_graph.round_weights import CompiledRounding
from galore_fx.runtime.formats.counter_rng import UpdateKeys, key_of, random_bits
from galore_fx.runtime.formats.quantized_tensor import QuantizedTensor
from galore_fx.runtime.formats.rounding import round_stochastically, round_to_bfloat16, rounded_as
from galore_fx.runtime.layers.normalized_linear import NormalizedLinear
from galore_fx.runtime.step.realised_movement import RealisedMovement
from galore_fx.runtime.subspace.projection import ProjectedDim, back_projected_rows
from tests.models import adamw, backward, batches, llama, straight_and_resumed, train, trainer

pytestmark = pytest.mark.usefixtures("without_kernels")

NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def key(seed):
    return torch.tensor(key_of(seed), dtype=torch.int32)


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-44, 38))
def test_rounding_by_bits_is_the_cast(seed, exponent):
    values = torch.randn(4096, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3) * 10.0**exponent
    assert torch.equal(round_to_bfloat16(values), values.to(torch.bfloat16).to(torch.float32))


@NARROW
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-30, 20))
def test_a_value_goes_to_one_of_its_two_neighbours(dtype, seed, exponent):
    """The one below or the one above, and one that the format holds stays."""
    values = torch.randn(4096, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    values = values.clamp(-60000.0, 60000.0)
    rounded = round_stochastically(values, dtype, random_bits(torch.arange(4096, dtype=torch.int32), key(seed)))
    assert torch.equal(rounded.to(dtype).to(torch.float32), rounded)
    nearest = values.to(dtype)
    infinity = torch.full_like(nearest, math.inf)
    above = torch.where(nearest.float() >= values, nearest, torch.nextafter(nearest, infinity)).float()
    below = torch.where(nearest.float() <= values, nearest, torch.nextafter(nearest, -infinity)).float()
    assert bool(((rounded == above) | (rounded == below)).all())
    held = nearest.to(torch.float32)
    assert torch.equal(
        round_stochastically(held, dtype, random_bits(torch.arange(4096, dtype=torch.int32), key(1))), held
    )


@NARROW
def test_what_is_no_number_stays(dtype):
    values = torch.tensor([math.inf, -math.inf, math.nan, 0.0, 65519.0, -65519.0])
    payload = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(
        torch.float32
    )  # NaN of CUDA's, and a small one
    for bits in (torch.zeros(6, dtype=torch.int32), torch.full((6,), -1, dtype=torch.int32)):
        rounded = round_stochastically(values, dtype, bits)
        assert rounded[0] == math.inf and rounded[1] == -math.inf and rounded[2].isnan() and rounded[3] == 0.0
        assert bool(rounded[4:].to(dtype).isfinite().all())
        assert bool(round_stochastically(payload, dtype, bits[:2]).isnan().all())


@NARROW
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-5])
def test_rounding_has_no_bias_over_seeds(dtype, size):
    """200 of them: each element's mean error is what chance leaves of it, and that of all vanishes."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2**14, generator=generator) * size
    like = values.to(dtype)
    step = (torch.nextafter(like.abs(), torch.full_like(like, math.inf)) - like.abs()).double()
    num_seeds = 200
    mean = sum(rounded_as(values, like, key(seed)).double() for seed in range(num_seeds)) / num_seeds
    error = (mean - values.double()) / step
    assert float(error.abs().max()) < 5.5 * 0.5 / num_seeds**0.5
    assert abs(float(error.mean())) < 5 * 0.5 / (num_seeds * error.numel()) ** 0.5


def test_the_numbers_follow_from_the_element_and_not_from_the_block():
    values, like = torch.randn(1000), torch.zeros(1000, dtype=torch.bfloat16)
    whole = rounded_as(values, like, key(3))
    parts = [rounded_as(values[i : i + 100], like[i : i + 100], key(3) + i) for i in range(0, 1000, 100)]
    assert torch.equal(whole, torch.cat(parts))


def test_keys_differ_by_update_and_parameter_and_come_again():
    keys, device = UpdateKeys(0), torch.device("cpu")
    found = {(t, i): int(keys.of(t, i, 5, device)) for t in (0, 1, 2) for i in range(5)}
    assert len(set(found.values())) == 15 and found[1, 2] == key_of(0, 1, 2)
    assert int(UpdateKeys(0).of(1, 2, 7, device)) == found[1, 2]


@NARROW
@pytest.mark.parametrize("dim", list(ProjectedDim))
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_update_in_blocks_is_the_plain_one(dtype, dim, parts, transposed):
    """Row blocks, parts of a basis, and a weight that is no contiguous memory: one rounding of one sum."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(48, 32, generator=generator) * 0.02).to(dtype)
    weight = weight.T.contiguous().T if transposed else weight
    basis = torch.randn(dim.basis_shape((48, 32), 8, parts), generator=generator)
    update = torch.randn(dim.projected_shape((48, 32), 8), generator=generator) * 1e-4
    whole = torch.block_diag(*[basis] * parts)
    change = whole @ update if dim is ProjectedDim.ROWS else update @ whole.T
    counters = torch.arange(weight.numel(), dtype=torch.int32).view(48, 32)
    moved = weight.float() * torch.tensor(0.999) + change
    expected = round_stochastically(moved, dtype, random_bits(counters, key(7)))
    rounding = CompiledRounding()
    part_rows = len(basis) if dim is ProjectedDim.ROWS else 48
    made = weight.clone(memory_format=torch.preserve_format)
    rounding.add_(made, functools.partial(back_projected_rows, update, basis, dim), 0.999, key(7), part_rows)
    step = torch.finfo(dtype).eps * float(moved.abs().max())
    assert float((made.float() - expected).abs().max()) <= step
    assert float((made.float() != expected).float().mean()) < 0.002  # a sum in another order may cross a border
    rounding.add_(weight, functools.partial(back_projected_rows, update, basis, dim), 0.999, None, part_rows)
    assert float((weight.float() - moved).abs().max()) <= step / 2 * 1.01


@pytest.mark.kernels
@NARROW
def test_the_compiled_kernels_are_the_eager_ones_to_the_bit(dtype):
    """Of a projected weight's end of a step, and of the body of an unprojected one's, as Inductor generates them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 80, generator=generator).to(dtype)
    change = (torch.randn(96, 80, generator=generator) * 1e-3).to(dtype)
    made = weight.clone()
    CompiledRounding().add_(made, lambda rows: change[rows].clone(), 0.99, key(5), 96)
    moved = weight.float() * torch.tensor(0.99) + change.float()
    assert torch.equal(made.float(), rounded_as(moved, weight, key(5)))

    def body(weight, values, key):
        weight.copy_(rounded_as(values, weight, key))

    compiled, made = weight.clone(), weight.clone()
    torch.compile(body, fullgraph=True, dynamic=True)(compiled.view(-1), moved.view(-1), key(5))
    body(made.view(-1), moved.view(-1), key(5))
    assert torch.equal(compiled, made)


# Training.


def along(steps, reference, names):
    """Realised share of the reference's movement."""
    return float(sum((steps[n] * reference[n]).sum() for n in names) / sum(reference[n].square().sum() for n in names))


RATES = (1e-5, 1e-4, 1e-3)


@functools.cache
def wide_movements(recipe):
    return movements_of(torch.float32, recipe)[0]


def movements_of(dtype, recipe, rates=RATES, **parts):
    """What 20 steps at each rate move, all from the same start, and the model."""
    model = llama(2, hidden=128, intermediate=352).to(dtype)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    galore_fx.compile(model, recipe=recipe, optimizer=adamw(), refresh_gap=100, **parts)
    optimizer = model.galore_fx.optimizer
    begin, found = copy.deepcopy((model.state_dict(), optimizer.state_dict())), {}
    for lr in rates:
        model.load_state_dict(begin[0])
        optimizer.load_state_dict(copy.deepcopy(begin[1]))
        for group in optimizer.param_groups:
            group["lr"] = lr
        train(model, batches(20, 4, 64))
        now = galore_fx.plain_state_dict(model)
        found[lr] = {name: now[name].float() - value.float() for name, value in start.items()}
    return found, model


@NARROW
@pytest.mark.parametrize(
    ("recipe", "parts"),
    [("auto", {}), ("auto", {"update": "in-backward"}), ("full", {}), ("full", {"state_bits": 8})],
    ids=["projected", "projected, in-backward", "full", "full, 8-bit states"],
)
def test_the_movement_along_the_float32_run_is_made(dtype, recipe, parts):
    found, model = movements_of(dtype, recipe, **parts)
    projected = set(model.galore_fx.stats()["projected"])
    assert bool(projected) == (recipe == "auto")
    for lr, steps in found.items():
        for inside in {True, False} if projected else {False}:
            names = [name for name in steps if (name in projected) is inside]
            assert along(steps, wide_movements(recipe)[lr], names) > 0.98, (lr, inside)
    shares = model.galore_fx.stats()["realised_movement"]
    assert (shares["projected"] is None) == (recipe == "full")
    assert all(0.8 < share < 1.2 for share in shares.values() if share is not None)  # a sample of few updates


def test_rounding_to_the_nearest_loses_it_and_is_told():
    with pytest.warns(UserWarning, match=r"rounding='nearest' loses .* of projected weights"):
        found, model = movements_of(torch.bfloat16, "auto", rates=(1e-5,), rounding="nearest")
    projected = model.galore_fx.stats()["projected"]
    assert along(found[1e-5], wide_movements("auto")[1e-5], projected) < 0.1
    assert model.galore_fx.stats()["realised_movement"]["projected"] < 0.1


def test_rounding_to_the_nearest_is_torchs_own_step():
    model = llama(1).to(torch.bfloat16)
    plain = copy.deepcopy(model)
    galore_fx.compile(model, recipe="full", optimizer=adamw(lr=1e-2), rounding="nearest", state_bits=32)
    wide = {name: p.detach().clone() for name, p in plain.named_parameters()}
    backward(model, batches(1)[0])
    backward(plain, batches(1)[0])
    model.galore_fx.optimizer.step()
    for name, p in plain.named_parameters():  # the first step of AdamW: lr * g / (|g| + eps)
        g = p.grad.float()
        expected = (wide[name].float() - 1e-2 * g / (g.abs() + 1e-8)).to(torch.bfloat16)
        assert float((model.get_parameter(name) != expected).float().mean()) < 0.02, name


def test_float32_weights_are_not_rounded_and_have_no_figure():
    _, model = movements_of(torch.float32, "full", rates=(1e-3,))
    assert "realised_movement" not in model.galore_fx.stats()


@NARROW
@pytest.mark.parametrize(
    "parts",
    [
        {"residual": "sparse", "residual_variant": variant, "residual_warm_up": 2, "residual_density": 0.1}
        for variant in ("rectified", "additive", "scaled")
    ]
    + [
        {"residual": "scaled", "update": "in-backward"},
        {"recipe": "gradnormlorp"},
        {"recipe": "vlorp"},
        {"project": "output"},
    ],
    ids=["rectified", "additive", "scaled entries", "fira", "gradnormlorp", "vlorp", "output"],
)
def test_every_part_makes_its_movement_in_16_bits(dtype, parts):
    """Each way into a weight goes through the one rounding: at a small rate to the nearest hardly any would be left."""
    settings = {"rank": 16, "refresh_gap": 100, "optimizer": adamw(lr=2e-5), "scale": 1.0, **parts}

    def run(dtype, **more):
        model = llama(1, hidden=128, intermediate=352).to(dtype)
        galore_fx.compile(model, **settings, **more)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, batches(12, 4, 64))
        now = dict(model.named_parameters())
        return {name: now[name].detach().float() - p.float() for name, p in start.items()}, model

    reference, model = run(torch.float32)
    steps, _ = run(dtype)
    names = model.galore_fx.stats()["projected"]
    # Entries and bases of two runs need not be the same; factors start at zero, where any format is fine enough.
    if any(isinstance(module, NormalizedLinear) for module in model.modules()):
        assert along(steps, reference, names) > 0.6
        return
    assert along(steps, reference, names) > 0.9
    if dtype is torch.bfloat16:
        with pytest.warns(UserWarning, match="rounding='nearest' loses"):
            nearest, _ = run(dtype, rounding="nearest")
        assert along(nearest, reference, names) < 0.5


@NARROW
@pytest.mark.parametrize("parts", [{}, {"update": "in-backward"}, {"recipe": "full"}])
def test_a_resumed_run_is_the_same_to_the_bit(dtype, parts):
    def make():
        return galore_fx.compile(llama(1).to(dtype), **{"rank": 16, "optimizer": adamw(), "refresh_gap": 3, **parts})

    straight_and_resumed(make, batches(6), 3)


def test_weights_in_8_bits_count_too():
    model = galore_fx.compile(llama(2), recipe="q-galore", rank=16, optimizer=adamw())
    train(model, batches(4))
    assert any(isinstance(p, QuantizedTensor) for p in model.parameters())
    assert 0.8 < model.galore_fx.stats()["realised_movement"]["projected"] < 1.2


def test_autocast_over_float32_weights_rounds_nothing():
    model = llama(1)
    galore_fx.compile(model, rank=16, optimizer=adamw())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=batches(1)[0], labels=batches(1)[0]).loss
    loss.backward()
    model.galore_fx.optimizer.step()
    assert "realised_movement" not in model.galore_fx.stats()


def test_a_training_with_the_trainer_in_bfloat16_moves_its_weights(tmp_path):
    model = llama(1).to(torch.bfloat16)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    galore_fx.compile(model, rank=16, optimizer=adamw(lr=1e-5), max_grad_norm=1.0)
    trainer(model, tmp_path, batches(1, 8)[0], max_steps=3).train()
    projected = model.galore_fx.stats()["projected"]
    assert projected and not any(torch.equal(model.get_parameter(name), start[name]) for name in projected)
    assert model.galore_fx.stats()["realised_movement"]["projected"] is not None


def test_a_parameter_of_parts_of_blocks_is_looked_at_too():
    """8-bit states come in blocks of 256, and 5000 elements are not whole ones."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(50, 50), torch.nn.Linear(50, 50)])
            self.gain = torch.nn.Parameter(torch.ones(100, 50))
            self.extra = torch.nn.Parameter(torch.ones(5000))

        def forward(self, x):
            for block in self.blocks:
                x = x + block(x)
            return (x * self.gain).float().square().mean() + (self.extra * self.gain.flatten()).float().mean()

    model = Model().to(torch.bfloat16).train()
    galore_fx.compile(model, rank=8, state_bits=8, optimizer=adamw(lr=1e-2))
    for _ in range(3):
        model(torch.randn(100, 50).to(torch.bfloat16)).backward()
        model.galore_fx.optimizer.step()
    assert 0.9 < model.galore_fx.stats()["realised_movement"]["full_rank"] < 1.1


def test_looks_are_spread_over_the_weight():
    looks = RealisedMovement()
    turns = {looks.probe("projected", 32 * update, 3).turn % 32 for update in range(200)}
    assert len(turns) >= 28
    assert looks.probe("projected", 33, 3) is None
