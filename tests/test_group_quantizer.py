"""Groups of small integers: what a code means, and that rounding loses no movement."""

import zipfile
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from galore_fx.passes.optimizer_graph import round_weights
from galore_fx.passes.optimizer_graph.round_weights import CompiledRounding
from galore_fx.runtime.formats.counter_rng import key_of, uniform_numbers
from galore_fx.runtime.formats.groupwise import (
    GROUP,
    SCALE_DTYPE,
    add_and_round,
    dequantize,
    num_groups,
    pack,
    quantize,
    stored_bytes,
    unpack,
)
from galore_fx.runtime.formats.quantized_tensor import QuantizedTensor
from galore_fx.runtime.subspace.projection import ProjectedDim, back_projected_rows

ROUNDING = CompiledRounding()  # compiled once


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["mixed", "positive", "negative", "constant", "zero", "far from zero", "one"]),
    exponent=st.integers(-30, 36),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    num_elements=st.sampled_from([256, 512, 300, 1]),
)
def test_round_trip_is_within_half_a_step(seed, kind, exponent, bits, dtype, num_elements):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_elements, generator=generator)
    x = {
        "mixed": x,
        "positive": x.abs(),
        "negative": -x.abs(),
        "constant": torch.full_like(x, -0.7),
        "zero": torch.zeros_like(x),
        "far from zero": x.abs() / 100 + 5,
        "one": torch.nn.functional.one_hot(torch.tensor(0), num_elements).float(),
    }[kind] * 10.0**exponent
    x = x.to(dtype)
    codes, scales, zeros = quantize(x, bits)
    back = dequantize(codes, scales, zeros, bits, [num_elements], torch.float32)
    assert codes.shape == (num_groups(num_elements), GROUP * bits // 8) and scales.dtype is SCALE_DTYPE
    assert sum(part.nbytes for part in (codes, scales, zeros)) == stored_bytes(num_elements, bits)
    steps = scales.double().repeat_interleave(GROUP)[:num_elements]
    assert bool(((back.double() - x.double()).abs() <= 0.5001 * steps).all())
    for group, values in enumerate(x.double().split(GROUP)):
        whole = max(0.0, float(values.max())) - min(0.0, float(values.min()))
        assert float(scales[group]) <= max(whole * (1.01 / 15 if bits == 4 else 1.01 * 1.0625 / 254), 2.0**-119)
    assert bool((back[x == 0] == 0).all())


def test_packing_is_exact():
    codes = torch.randint(0, 16, (5, GROUP), dtype=torch.uint8)
    assert pack(codes).shape == (5, GROUP // 2)
    assert torch.equal(unpack(pack(codes)), codes)


def test_uniform_numbers_are_uniform_and_independent_of_each_other():
    counters = torch.arange(2**20, dtype=torch.int32)
    keys = [torch.tensor(key_of(0, *of), dtype=torch.int32) for of in ((0, 1), (1, 1), (0, 2))]
    draws = [uniform_numbers(counters, key) for key in keys]
    for numbers in draws:
        assert 0 <= numbers.min() and numbers.max() < 1
        counts = torch.histc(numbers, 64, 0, 1) / 2**14
        assert float((counts - 1).square().mean().sqrt()) < 0.012  # 0.0078 expected of 2^14 in each
        assert abs(float(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1])) < 4e-3
        rows = numbers.view(-1, GROUP)
        assert abs(float(torch.corrcoef(torch.stack([rows[1:, 0], rows[:-1, 0]]))[0, 1])) < 0.05
    assert float(torch.corrcoef(torch.stack(draws)).sub(torch.eye(3)).abs().max()) < 4e-3


def test_a_bit_of_the_counter_changes_half_the_bits_of_the_number():
    counters = torch.randint(0, 2**31 - 1, (4096,), dtype=torch.int32)
    key = torch.tensor(key_of(3), dtype=torch.int32)
    before = (uniform_numbers(counters, key) * 2**24).int()
    for bit in range(30):
        changed = before ^ (uniform_numbers(counters ^ (1 << bit), key) * 2**24).int()
        share = sum(float(((changed >> place) & 1).float().mean()) for place in range(24)) / 24
        assert abs(share - 0.5) < 0.05, bit


def _moved(change, updates, weight, key=lambda t: key_of(0, t)):
    """Codes after so many equal updates, by the pieces of the quantiser itself."""
    codes, scales, zeros = quantize(weight, 8)
    counters = torch.arange(weight.numel(), dtype=torch.int32).view(weight.shape)
    for t in range(updates):
        thresholds = uniform_numbers(counters, torch.tensor(key(t), dtype=torch.int32))
        codes, scales, zeros = add_and_round(codes, scales, zeros, change, torch.tensor(1.0), thresholds)
    return dequantize(codes, scales, zeros, 8, list(weight.shape), torch.float32)


def test_rounding_is_right_on_average():
    weight = torch.randn(64, GROUP, generator=torch.Generator().manual_seed(0)) * 0.02
    change = torch.randn(64, GROUP, generator=torch.Generator().manual_seed(1)) * 1e-3
    codes, scales, zeros = quantize(weight, 8)
    wanted = dequantize(codes, scales, zeros, 8, [64, GROUP], torch.float32) + change
    mean = torch.zeros_like(wanted)
    num_draws = 2000
    for draw in range(num_draws):
        mean += _moved(change, 1, weight, key=lambda _t, draw=draw: key_of(draw)) / num_draws
    step = float(scales.float().max()) * 1.1
    error = mean - wanted
    assert abs(float(error.mean())) < 1e-3 * step
    assert float(error.abs().max()) < 5.5 * step * 0.5 / num_draws**0.5  # of 16,384 elements, each within five sigma


@pytest.mark.parametrize("update", [1e-4, 1e-5, 1e-6])
def test_small_updates_move_the_weight_as_far_as_they_say(update):
    weight = torch.randn(4096, GROUP, generator=torch.Generator().manual_seed(0)) * 0.02
    start = dequantize(*quantize(weight, 8), 8, list(weight.shape), torch.float32)
    moved = _moved(torch.full_like(weight, update), 50, weight) - start
    assert 0.98 < float(moved.mean()) / (50 * update) < 1.02


@pytest.mark.parametrize("dim", list(ProjectedDim))
@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (7, 256), (512, 3)])
def test_the_compiled_update_is_the_plain_one(monkeypatch, dim, shape):
    """In many row blocks; the same random numbers whatever the blocks are."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    basis = torch.randn(dim.basis_shape(shape, 3), generator=generator)
    update = torch.randn(dim.projected_shape(shape, 3), generator=generator) * 1e-3
    stored = QuantizedTensor.of(weight, 8)
    change = (basis @ update if dim is ProjectedDim.ROWS else update @ basis.T).view(-1, GROUP)
    key = key_of(0, 5)
    counters = torch.arange(weight.numel(), dtype=torch.int32).view(-1, GROUP)
    for thresholds, used in (
        (uniform_numbers(counters, torch.tensor(key, dtype=torch.int32)), key),
        (torch.tensor(0.5), None),
    ):
        expected = add_and_round(*stored.parts, change, torch.tensor(0.99), thresholds)
        for limit in (2**20, 512):
            monkeypatch.setitem(round_weights.BLOCK_BYTES, "cpu", 4 * limit)
            made = stored.clone()
            tensor = None if used is None else torch.tensor(used, dtype=torch.int32)
            ROUNDING.add_(made, partial(back_projected_rows, update, basis, dim), 0.99, tensor, shape[0])
            assert torch.equal(made.scales, expected[1]) and torch.equal(made.zeros, expected[2])
            differing = int((made.codes.int() - expected[0].int()).abs().sum())
            assert differing <= 2, "a threshold was met by a sum that was added up in another order"


def test_the_compiled_update_makes_the_grids_that_it_stores():
    """Where every group needs a new one: a cast to bfloat16 and back, which Inductor drops, would make other codes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((400, GROUP), generator=generator) * 0.02
    change = torch.randn((400, GROUP), generator=generator) * torch.rand((400, 1), generator=generator)
    stored, key = QuantizedTensor.of(weight, 8), torch.tensor(key_of(1), dtype=torch.int32)
    counters = torch.arange(weight.numel(), dtype=torch.int32).view(-1, GROUP)
    thresholds = uniform_numbers(counters, key)
    expected = add_and_round(*stored.parts, change, torch.tensor(1.0), thresholds)
    assert float((expected[1] != stored.scales).float().mean()) > 0.9
    ROUNDING.add_(stored, lambda rows: change[rows].clone(), 1.0, key, 400)
    for made, plain in zip(stored.parts, expected, strict=True):
        assert torch.equal(made, plain)


def test_a_checkpoint_of_before_the_module_moved_is_read(tmp_path):
    tensor = QuantizedTensor.of(torch.randn(4, 256), 8)
    torch.save({"weight": tensor}, tmp_path / "new.pt")
    old_name, new_name = b"galore_fx.runtime.quantized_tensor", b"galore_fx.runtime.formats.quantized_tensor"
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for name in new.namelist():
            written = new.read(name)
            assert (new_name in written) == name.endswith("data.pkl")
            old.writestr(name, written.replace(new_name, old_name))
    read = torch.load(tmp_path / "old.pt", weights_only=True)["weight"]
    assert isinstance(read, QuantizedTensor) and torch.equal(read.codes, tensor.codes)
