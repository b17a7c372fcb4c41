"""What cannot be captured trains all the same, and says so; what cannot work is refused by name."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint

import galore_fx
from galore_fx.runtime.layers.linear_cross_entropy import linear_cross_entropy
from tests.calls import Blocks, assert_same, causal, enable_checkpointing, pair, step_both
from tests.models import adamw, assert_gradients_equal, batches, llama

pytestmark = pytest.mark.usefixtures("without_kernels")


class Broken(nn.Module):
    """A block with a graph break: the graph cannot go on after a number is read from a tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x):
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y.relu())


def test_a_block_with_a_graph_break_trains_uncompiled_and_is_named_once():
    model, reference = pair(Blocks(Broken), strict=False, refresh_gap=2)
    xs = torch.randn(4, 6, 24)
    with pytest.warns(UserWarning, match=r"block blocks.0 \(Broken\) could not be captured as one graph: .*break"):
        assert_same(model, reference, lambda each: each(xs[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in xs:
            step_both(model, reference)
            assert_same(model, reference, lambda each, x=x: each(x))
    stats = model.galore_fx.stats()
    assert stats["num_refreshes"] > 4 and stats["num_region_graphs"] == 0
    assert list(stats["uncompiled"]) == ["blocks.0", "blocks.1"]


def test_a_fallen_back_block_under_checkpoints():
    call = lambda block, x: checkpoint(block, x, use_reentrant=False)  # noqa: E731
    model, reference = pair(Blocks(Broken, call=call), strict=False)
    with pytest.warns(UserWarning, match="could not be captured"):
        assert_same(model, reference, lambda each: each(torch.ones(6, 24)))


def test_transformers_checkpointing_of_a_fallen_back_block():
    plain = llama(1)
    enable_checkpointing(plain)
    original = plain.model.layers[0].mlp.forward

    def broken(x):
        torch._dynamo.graph_break()
        return original(x)

    reference = copy.deepcopy(plain)
    plain.model.layers[0].mlp.forward = broken
    model = galore_fx.compile(plain, rank=4, refresh_gap=100, optimizer=adamw())
    with pytest.warns(UserWarning, match="could not be captured"):
        assert_same(model, reference, causal(batches(1)[0]))
    assert model.model.layers[0].gradient_checkpointing


def test_a_weight_read_by_something_else_falls_back_with_the_right_gradient():
    class Regularised(nn.Linear):
        def forward(self, x):
            return super().forward(x) + self.weight.square().sum()

    model, reference = pair(Regularised(16, 24).train(), strict=False)
    x = torch.ones(3, 16)
    with pytest.warns(UserWarning, match=r"the model \(Regularised\).*weight is read by .*not a linear layer"):
        for each in (model, reference):
            each(x).sum().backward()
    with pytest.warns(UserWarning, match="full gradient of weight was formed"):
        model.galore_fx.optimizer._collect()
    assert_gradients_equal(model, reference)


def test_strict_makes_a_fallback_an_error():
    model = galore_fx.compile(Blocks(Broken), rank=4, strict=True)
    with pytest.raises(galore_fx.CaptureError, match="block blocks.0"):
        model(torch.ones(6, 24))


def test_a_blocks_own_error_is_the_one_that_is_seen():
    model = galore_fx.compile(Blocks(), rank=4)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        model(torch.ones(6, 23))
    assert model(torch.ones(6, 24)).requires_grad
    assert model.galore_fx.stats()["uncompiled"] == {}, "one bad batch does not end compilation"


@pytest.mark.parametrize("switch", ["autograd", "graphs"])
def test_unsupported_modes_are_refused_by_name(switch):
    if switch == "autograd":
        patch, match = torch._dynamo.config.patch(compiled_autograd=True), "compiled autograd is on"
    else:
        patch, match = inductor_config.patch({"triton.cudagraphs": True}), "CUDA graphs are on"
    model = galore_fx.compile(Blocks(), rank=4)
    with patch:
        with pytest.raises(galore_fx.SettingError, match=match):
            galore_fx.compile(Blocks(), rank=4)
        with pytest.raises(galore_fx.SettingError, match=match):
            model(torch.ones(6, 24))


def test_linears_without_anything_between_them():
    block = lambda: nn.Sequential(nn.Linear(24, 8, bias=False), nn.Linear(8, 24), nn.Linear(24, 24))  # noqa: E731
    for recipe in ("auto", "galore"):
        model, reference = pair(Blocks(block), recipe=recipe)
        for x in torch.randn(2, 6, 24):
            for each in (model, reference):
                each(x).backward()
            model.galore_fx.optimizer._collect()
            assert_gradients_equal(model, reference)
            step_both(model, reference)


def test_a_reentrant_checkpoint_recomputes_the_same_dropout():
    call = lambda block, x: checkpoint(block, x, use_reentrant=True)  # noqa: E731
    block = lambda: nn.Sequential(nn.Linear(24, 40), nn.Dropout(0.5), nn.Linear(40, 24))  # noqa: E731
    model, reference = pair(Blocks(block, call=call))
    assert_same(model, reference, lambda each: each(torch.ones(6, 24, requires_grad=True)))


def test_products_with_keywords_in_an_uncompiled_block():
    class Keywords(Broken):
        def forward(self, x):
            torch._dynamo.graph_break()
            hidden = torch.mm(x, mat2=self.first.weight.T)
            return torch.addmm(input=self.second.bias, mat1=hidden, mat2=self.second.weight.T)

    model, reference = pair(Blocks(Keywords, count=1), strict=False)
    with pytest.warns(UserWarning, match="could not be captured"):
        for each in (model, reference):
            each(torch.ones(6, 24)).backward()
    with pytest.warns(UserWarning, match="full gradient of .* was formed"):
        model.galore_fx.optimizer._collect()
    assert_gradients_equal(model, reference)


def test_a_bad_batch_and_a_copy_keep_the_chunked_loss():
    model = galore_fx.compile(llama(1), rank=4, optimizer=adamw())
    ids = batches(1)[0]
    with pytest.raises((RuntimeError, ValueError)):
        model(input_ids=ids, labels=ids[:2])
    assert model(input_ids=ids, labels=ids).logits is None
    with pytest.warns(UserWarning, match="copy of a model"):
        again = galore_fx.compile(copy.deepcopy(model), rank=4, optimizer=adamw())
    assert again(input_ids=ids, labels=ids).logits is None


def test_the_chunked_loss_under_autocast_with_a_low_precision_input():
    head = nn.Linear(16, 50)
    x, target = torch.randn(6, 16), torch.arange(6)
    grads = []
    for fused in (True, False):
        hidden = x.bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            if fused:
                loss = linear_cross_entropy(hidden, head.weight, head.bias, target, -100, "mean")
            else:
                loss = nn.functional.cross_entropy(head(hidden).float(), target)
        head.zero_grad()
        loss.backward()
        grads.append((hidden.grad.float(), head.weight.grad.clone()))
    for ours, plain in zip(*grads, strict=True):
        assert (ours - plain).norm() < 2e-2 * plain.norm()
