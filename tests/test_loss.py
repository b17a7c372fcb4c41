"""Head and loss: the fused operation equals torch's, the pass rewrites what it may and nothing else."""

import copy
import functools

import pytest
import torch
from torch import fx
from torch.nn import functional as F

import galore_fx
from galore_fx.passes.model_graph.chunk_loss import chunk_loss
from galore_fx.runtime.layers import linear_cross_entropy as fused_module
from galore_fx.runtime.layers.linear_cross_entropy import linear_cross_entropy
from galore_fx.runtime.measure.meter import count_memory
from tests.models import VOCABULARY, adamw, backward, batches, gpt2, llama

pytestmark = pytest.mark.usefixtures("without_kernels")

TOKENS, HIDDEN, CLASSES = 37, 12, 50


def _inputs(dtype, bias):
    x = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    w = torch.randn(CLASSES, HIDDEN).to(dtype).requires_grad_()
    b = torch.randn(CLASSES).to(dtype).requires_grad_() if bias else None
    y = torch.randint(0, CLASSES, (TOKENS,))
    y[::5] = -100
    return x, w, b, y


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 10, 37, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_of_cross_entropy(monkeypatch, reduction, bias, chunk, dtype):
    monkeypatch.setattr(fused_module, "CHUNK_BYTES", 4 * CLASSES * chunk)
    x, w, b, y = _inputs(dtype, bias)
    expected = F.cross_entropy(F.linear(x, w, b).float(), y, reduction=reduction)
    (3.0 * expected).backward()
    grads = [t.grad for t in (x, w, b) if t is not None]
    fresh = [t.detach().clone().requires_grad_() if t is not None else None for t in (x, w, b)]
    loss = linear_cross_entropy(*fresh, y, -100, reduction)
    (3.0 * loss).backward()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip([t.grad for t in fresh if t is not None], grads, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, **tolerance)


def test_a_frozen_head_gets_no_gradient_and_inference_makes_none():
    x, w, _, y = _inputs(torch.float32, False)
    loss = linear_cross_entropy(x, w.detach(), None, y, -100, "mean")
    loss.backward()
    assert x.grad is not None and w.grad is None
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, w, None, y, -100, "mean"), loss.detach())


def test_no_target_at_all_gives_torchs_nan_and_zero_gradients():
    x, w, _, y = _inputs(torch.float32, False)
    loss = linear_cross_entropy(x, w, None, torch.full_like(y, -100), -100, "mean")
    loss.backward()
    assert loss.isnan() and not x.grad.any() and not w.grad.any()


def test_a_second_backward_says_what_to_do():
    x, w, _, y = _inputs(torch.float32, False)
    loss = linear_cross_entropy(x, w, None, y, -100, "mean")
    loss.backward(retain_graph=True)
    with pytest.raises(galore_fx.UsageError, match="keep_logits=True"):
        loss.backward()


def _head(extra_reader=False, classes=CLASSES, **settings):
    """x -> linear -> float -> view -> cross_entropy; returns (loss, logits)."""
    logits_like, rows_like = torch.zeros(TOKENS, CLASSES), torch.zeros(TOKENS * CLASSES // classes, classes)
    graph = fx.Graph()
    x, w, y = (graph.placeholder(name) for name in "xwy")
    logits = graph.call_function(torch._C._nn.linear, (x, w, None))
    rows = graph.call_method("view", (graph.call_method("float", (logits,)), -1, classes))
    loss = graph.call_function(F.cross_entropy, (rows, y), {"ignore_index": -100, **settings})
    if extra_reader:
        loss = graph.call_function(torch.add, (loss, graph.call_function(torch.mean, (logits,))))
    graph.output((loss, logits))
    for node, example in ((logits, logits_like), (rows, rows_like), (y, torch.zeros(TOKENS, dtype=torch.int64))):
        node.meta["example_value"] = example
    return fx.GraphModule({}, graph)


def test_the_pass_removes_the_logits():
    x, w, _, y = _inputs(torch.float32, False)
    expected, _ = _head()(x, w, y)
    gm = chunk_loss(_head(), ())
    assert not any(node.target is torch._C._nn.linear for node in gm.graph.nodes)
    loss, logits = gm(x, w, y)
    assert logits is None
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    "head", [{"extra_reader": True}, {"label_smoothing": 0.1}, {"reduction": "none"}, {"classes": 25}]
)
def test_the_pass_leaves_other_losses_alone(head):
    gm = _head(**head)
    before = gm.code
    assert chunk_loss(gm, ()).code == before


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_models_loss_and_head_gradient_are_unchanged_and_logits_are_on_demand(make):
    reference = make(2)
    without, kept = make(2), make(2)
    galore_fx.compile(without, rank=8, optimizer=adamw())
    galore_fx.compile(kept, rank=8, optimizer=adamw(), keep_logits=True)
    ids = batches(1)[0]
    labels = ids.clone()
    labels[:, :5] = -100
    expected = reference(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(50))
    expected.loss.backward()
    head = reference.get_output_embeddings().weight.grad
    for model, has_logits in ((without, False), (kept, True)):
        out = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(50))
        assert (out.logits is not None) == has_logits
        out.loss.backward()
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
        assert (model.get_output_embeddings().weight.grad - head).norm() < 1e-5 * head.norm()
    assert without(input_ids=ids).logits.shape == (4, 32, VOCABULARY), "without labels the logits are the result"
    without.eval()
    assert without(input_ids=ids, labels=ids).logits is not None


def test_the_logits_are_not_in_the_counted_peak(monkeypatch):
    monkeypatch.setattr(fused_module, "CHUNK_BYTES", 2**14)
    peaks = []
    for keep_logits in (False, True):
        torch.manual_seed(0)
        model = galore_fx.compile(llama(1), rank=8, optimizer=adamw(), refresh_gap=100, keep_logits=keep_logits)
        ids = batches(1, batch=16)[0]
        for _ in range(3):
            backward(model, ids)
            model.galore_fx.optimizer.step()
        peaks.append(count_memory(functools.partial(backward, model, ids), torch.device("cpu")).transient_peak_bytes)
        model.galore_fx.optimizer.step()
    logits_bytes = 16 * 32 * VOCABULARY * 4
    assert peaks[1] - peaks[0] > logits_bytes


def test_a_copy_of_the_model_has_its_own_forward_back():
    model = galore_fx.compile(llama(1), rank=8, optimizer=adamw())
    with pytest.warns(UserWarning, match="copy of a model"):
        plain = copy.deepcopy(model)
    assert plain.model.forward.__func__ is type(plain.model).forward
    assert backward(plain, batches(1)[0]) > 0
