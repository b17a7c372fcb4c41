"""What a compiled form rests on (docs/architecture.md): a change of it after the first step is seen, or named."""

import os
import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch.nn.modules.module import register_module_forward_hook

import galore_fx
from tests.models import adamw, assert_gradients_equal, backward, batches, llama

pytestmark = pytest.mark.usefixtures("without_kernels")


def pair(**settings):
    """A compiled model that has made a backward, and a plain one."""
    model, plain = llama(2), llama(2)
    galore_fx.compile(model, rank=8, refresh_gap=100, optimizer=adamw(), **settings)
    backward(model, batches(1)[0])
    model.zero_grad()
    return model, plain


def assert_same(model, plain):
    assert backward(model, batches(1)[0]) == pytest.approx(backward(plain, batches(1)[0]), abs=1e-5)
    assert_gradients_equal(model, plain)


def mlp(model):
    return model.model.layers[1].mlp


def other_class(model):
    class Doubled(type(mlp(model))):
        def forward(self, x):
            return super().forward(x) * 2

    mlp(model).__class__ = Doubled


CHANGES = {
    "forward hook": lambda m: mlp(m).down_proj.register_forward_hook(lambda _m, _i, out: out * 2),
    "forward pre-hook": lambda m: mlp(m).down_proj.register_forward_pre_hook(lambda _m, given: (given[0] * 2,)),
    "hook with keywords": lambda m: mlp(m).act_fn.register_forward_hook(
        lambda _m, _i, _k, out: out * 2, with_kwargs=True
    ),
    "hook on a norm": lambda m: m.model.layers[1].input_layernorm.register_forward_hook(lambda _m, _i, out: out * 2),
    "hook on a block": lambda m: m.model.layers[1].register_forward_hook(lambda _m, _i, out: out * 2),
    "hook on the head": lambda m: m.lm_head.register_forward_hook(lambda _m, _i, out: out * 2),
    "forward of an instance": lambda m: setattr(
        mlp(m), "forward", types.MethodType(lambda self, x: type(self).forward(self, x) * 2, mlp(m))
    ),
    "class": other_class,
    "tied weights": lambda m: setattr(
        m.model.layers[1].self_attn.o_proj, "weight", m.model.layers[1].self_attn.q_proj.weight
    ),
    "training mode of a part": lambda m: mlp(m).eval(),
}


@pytest.mark.parametrize("change", list(CHANGES.values()), ids=list(CHANGES))
def test_a_change_after_the_first_step_is_seen(change):
    model, plain = pair()
    for each in (model, plain):
        change(each)
    assert_same(model, plain)
    assert not model.galore_fx.stats()["uncompiled"]


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_hook_on_a_backward_is_run_uncompiled_and_named(kind):
    model, plain = pair()
    for each in (model, plain):
        double = {"register_full_backward_hook": lambda _m, into, _out: (into[0] * 2,)}
        getattr(mlp(each).down_proj, kind)(double.get(kind, lambda _m, out: (out[0] * 2,)))
    with pytest.warns(UserWarning, match="could not be captured as one graph: Module-level backwards hooks"):
        assert_same(model, plain)


def test_a_hook_that_is_removed_is_gone():
    model, plain = llama(2), llama(2)
    handle = mlp(model).down_proj.register_forward_hook(lambda _m, _i, out: out * 2)
    galore_fx.compile(model, rank=8, refresh_gap=100, optimizer=adamw())
    backward(model, batches(1)[0])
    model.zero_grad()
    handle.remove()
    assert_same(model, plain)


def test_hooks_on_every_module_run_uncompiled_and_are_named():
    model, plain = pair()
    handle = register_module_forward_hook(lambda m, _i, out: out * 2 if isinstance(m, nn.SiLU) else None)
    try:
        with pytest.warns(UserWarning, match="hooks of register_module_forward_hook"):
            assert_same(model, plain)
    finally:
        handle.remove()
    model.zero_grad()
    plain.zero_grad()
    assert_same(model, plain)


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "eval mode"])
def test_a_hook_on_a_projected_weights_gradient_sees_it(eager):
    """The full gradient is formed for it; the optimizer projects what the hook makes of it."""
    model, plain = pair()
    for each in (model, plain):
        mlp(each).up_proj.weight.register_hook(lambda grad: grad * 3)
        each.train(not eager)
        backward(each, batches(1)[0])
    weight, expected = mlp(model).up_proj.weight, mlp(plain).up_proj.weight.grad
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-7)
    record = next(r for r in model.galore_fx.optimizer.records if r.weight is weight)
    model.train()
    with pytest.warns(UserWarning, match="or a hook wants its gradient"):
        model.galore_fx.optimizer.refreshes.project_full(record, weight.grad)
    torch.testing.assert_close(record.leaf.grad, record.project(expected), rtol=1e-4, atol=1e-7)


def test_settings_of_the_compiler_belong_to_a_form():
    """A backward that may write over saved tensors is not the one for a process that keeps them."""
    model, plain = pair(keep_logits=True)
    num_variants = model.galore_fx.stats()["num_region_variants"]
    with functorch_config.patch(donated_buffer=False):
        for each in (model, plain):
            loss = each(input_ids=batches(1)[0]).logits.float().square().mean()
            loss.backward(retain_graph=True)
            loss.backward()
        assert_gradients_equal(model, plain)
    assert model.galore_fx.stats()["num_region_variants"] > num_variants


_RETAIN = """
import sys, torch, galore_fx
from tests.models import adamw, assert_gradients_equal, batches, llama
model, plain, keep = llama(1), llama(1), sys.argv[1] == "retain"
galore_fx.compile(model, rank=8, refresh_gap=100, optimizer=adamw(), keep_logits=True)
for each in (model, plain):
    loss = each(input_ids=batches(1)[0]).logits.float().square().mean()
    if keep:
        loss.backward(retain_graph=True)
    loss.backward()
assert_gradients_equal(model, plain)
"""


def test_a_graph_that_is_kept_is_not_run_by_a_cached_kernel_that_overwrites_it(tmp_path):
    """The second process finds the kernels of the first on disk, which may write over what a second backward reads."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for mode in ("once", "retain"):
        command = [sys.executable, "-W", "ignore", "-c", _RETAIN, mode]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


def test_a_call_that_collects_hidden_states_leaves_the_blocks_compiled():
    """transformers leaves its collecting hooks on the modules, inside the blocks too."""
    model, plain = pair()
    ids = batches(1)[0]
    model.eval()(input_ids=ids, output_hidden_states=True, output_attentions=True)
    model.train()
    found = [each(input_ids=ids, labels=ids, output_hidden_states=True) for each in (model, plain)]
    for mine, theirs in zip(found[0].hidden_states, found[1].hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for made in found:
        made.loss.backward()
    assert_gradients_equal(model, plain)
    for each in (model, plain):
        each.zero_grad()
    assert_same(model, plain)
    assert not model.galore_fx.stats()["uncompiled"]
