"""8-bit blocks: the nearest value of the dynamic map for every kind of block, and optimizer states kept in them."""

import functools
import io

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import galore_fx
from galore_fx.passes.optimizer_graph import compiled_update
from galore_fx.passes.optimizer_graph.update_compiler import UpdateCompiler
from galore_fx.runtime.formats.blockwise import BLOCK, MIN_ELEMENTS, code_of_zero, decode, encode, stored_bytes
from galore_fx.runtime.formats.state_format import SCALES, StateFormat
from tests.models import adamw, backward, batches, llama

pytestmark = pytest.mark.usefixtures("without_kernels")


def dynamic_map(signed):
    """As the paper defines it: midpoints of equal cells in seven decades, and 0 and 1."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        midpoints = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        found += midpoints + [-value for value in midpoints if signed]
    return torch.tensor(sorted(found), dtype=torch.float64)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_mean_the_dynamic_map_in_ascending_order(signed):
    values = decode(torch.arange(256, dtype=torch.uint8)[None], torch.ones(1), signed)[0]
    expected = dynamic_map(signed)
    assert expected.numel() == 256 and values[code_of_zero(signed=signed)] == 0 and values[255] == 1
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=2e-13)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["mixed", "positive", "negative", "constant", "zero", "one"]),
    exponent=st.integers(-30, 30),
    spread=st.integers(0, 8),
    signed=st.booleans(),
)
def test_every_element_gets_the_nearest_value(seed, kind, exponent, spread, signed):
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** (exponent - spread * torch.rand(2, BLOCK, generator=generator))
    sign = torch.randint(0, 2, size.shape, generator=generator) * 2 - 1
    x = {
        "mixed": size * sign,
        "positive": size,
        "negative": -size,
        "constant": torch.full_like(size, -(10.0**exponent)),
        "zero": torch.zeros_like(size),
        "one": torch.nn.functional.one_hot(torch.tensor([3, 7]), BLOCK) * size,
    }[kind]
    x = x if signed else x.abs()
    codes, scales = encode(x, signed)
    assert codes.dtype is torch.uint8 and torch.equal(scales, x.abs().amax(1))
    values = dynamic_map(signed)
    ratio = x.double() / scales.double().clamp(min=1e-38)[:, None]
    nearest = (ratio[:, :, None] - values).abs().amin(2)
    found = (ratio - values[codes.long()]).abs()
    # A negative block's largest element has no code of its own: there is no -1.
    allowed = nearest + (ratio < -0.99) * 0.0071 + 1e-6
    assert (found <= allowed).all()
    back = decode(codes, scales, signed)
    assert ((back - x).abs() <= (allowed.float() + 1e-6) * scales[:, None]).all()


CASES = {
    "AdamW": (torch.optim.AdamW, {"amsgrad": True}, {"exp_avg_sq", "max_exp_avg_sq"}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}, set()),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}, {"square_avg"}),
    "RAdam": (torch.optim.RAdam, {}, {"exp_avg_sq"}),
    "Adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}, {"sum"}),
    "Adamax": (torch.optim.Adamax, {}, {"exp_inf"}),
}


@pytest.mark.parametrize("name", CASES)
def test_states_that_are_never_negative_are_found_in_the_graph(name):
    optimizer_class, extra, unsigned = CASES[name]
    optimizer = optimizer_class([torch.nn.Parameter(torch.ones(3))], weight_decay=0.1, **extra)
    group = optimizer.param_groups[0]
    compiler = UpdateCompiler(optimizer_class, optimizer.defaults, state_bits=8)
    assert compiler.layout(compiler.read(group), group).format == StateFormat(8, frozenset(unsigned))


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad"])
def test_ten_steps_equal_torchs_with_its_states_rounded_after_each(name, monkeypatch):
    """Of a length that is no multiple of a block, in slices, and with a gradient that is not contiguous."""
    monkeypatch.setattr(compiled_update, "SLICE_ELEMENTS", 10 * BLOCK)
    optimizer_class, extra, unsigned = CASES[name]
    shape = (71, 67)
    weight = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(weight.detach().clone())
    optimizer = optimizer_class([theirs], lr=0.01, weight_decay=0.1, foreach=False, **extra)
    group = optimizer.param_groups[0]
    compiler = UpdateCompiler(optimizer_class, optimizer.defaults, state_bits=8)
    layout = compiler.layout(compiler.read(group), group)
    state = layout.format.make(layout.initial, weight, weight.dtype)
    state |= {name: torch.tensor(value) for name, value in layout.scalars.items()}
    for t in range(10):
        theirs.grad = torch.randn(67, 71).T * 10.0 ** torch.randint(-3, 1, shape)
        with torch.no_grad():
            compiler.update(weight, theirs.grad.clone(), state, group, compiler.read(group), None, 1.0, first=t == 0)
        optimizer.step()
        for key, value in optimizer.state[theirs].items():
            if value is not None and value.shape == shape:
                signed = key not in unsigned
                padded = torch.nn.functional.pad(value.flatten(), (0, -value.numel() % BLOCK))
                codes, scales = encode(padded.view(-1, BLOCK), signed)
                value.copy_(decode(codes, scales, signed).flatten()[: value.numel()].view(shape))
                differing = (state[key] != codes.flatten()).float().mean()
                assert differing < 5e-2, "a value between two codes may fall to either side"
                torch.testing.assert_close(state[key + SCALES], scales, rtol=1e-2, atol=0)
    moved = (weight - theirs).norm() / theirs.norm()
    assert moved < 1e-3


def test_small_tensors_stay_in_float32_and_bytes_are_those_of_the_plan():
    make = functools.partial(llama, 2, hidden=64)
    model = galore_fx.compile(make().bfloat16(), rank=4, state_bits=8, optimizer=adamw())
    states = model.galore_fx.optimizer.state
    total = 0
    for entry in model.galore_fx.plan.parameters:
        parameter = model.get_parameter(entry.name)
        elements = parameter.numel() if entry.rank is None else entry.rank * max(entry.shape)
        moments = {name: value for name, value in states[parameter].items() if name.startswith("exp_avg")}
        if elements < MIN_ELEMENTS:
            assert all(value.dtype is torch.float32 for value in moments.values()) and len(moments) == 2
            expected = 2 * 4 * elements
        else:
            assert len(moments) == 4 and stored_bytes(elements) == -(-elements // 256) * 260
            expected = 2 * stored_bytes(elements)
        assert sum(value.nbytes for value in moments.values()) == expected == entry.bytes["optimizer_state"] - 4
        total += expected + 4
    assert model.galore_fx.plan.kept["optimizer_state"] == total


def test_training_in_8_bits_follows_float32_and_resumes_bit_identically():
    def make(bits):
        return galore_fx.compile(llama(1), rank=16, state_bits=bits, optimizer=adamw())

    def train(model, ids):
        losses = []
        for batch in ids:
            losses.append(backward(model, batch))
            model.galore_fx.optimizer.step()
        return losses

    ids = batches(8)
    straight = make(8)
    losses = train(straight, ids)
    assert losses == pytest.approx(train(make(None), ids), rel=5e-3)
    stopped = make(8)
    train(stopped, ids[:4])
    file = io.BytesIO()
    torch.save([stopped.state_dict(), stopped.galore_fx.optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = make(8)
    resumed.load_state_dict(weights)
    resumed.galore_fx.optimizer.load_state_dict(state)
    assert losses[4:] == train(resumed, ids[4:])
    with pytest.raises(galore_fx.OptimizerError, match="does not fit"):
        make(None).galore_fx.optimizer.load_state_dict(state)
    with pytest.raises(galore_fx.SettingError, match="state_bits=4 must be 8, 32, or None"):
        make(4)
