"""Capture and dispatch: one graph for all layers, the compiled form in training only, every weight projected."""

import copy
import functools
import gc
import inspect
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

import galore_fx
from galore_fx.passes.model_graph.find_regions import find_regions
from galore_fx.runtime.dispatch.forwards import CompiledForward
from tests.models import adamw, backward, batches, gpt2, largest_error, llama

pytestmark = pytest.mark.usefixtures("without_kernels")


@pytest.mark.kernels
def test_twelve_layers_share_one_graph_and_keep_it_after_generate_and_eval():
    model = llama(num_layers=12)
    assert model.config.use_cache, "transformers' default, the case that used to fall apart"
    galore_fx.compile(model, rank=8, optimizer=adamw(), refresh_gap=100)
    ids = batches(1)[0]
    for _ in range(3):
        backward(model, ids)
        model.galore_fx.optimizer.step()
    before = model.galore_fx.stats()
    assert len(before["projected"]) == 84
    assert before["num_region_graphs"] == 1
    assert before["num_region_variants"] == 2, "one that sketches, one that is steady"
    model.eval()
    with torch.no_grad():
        assert model(input_ids=ids).past_key_values is not None, "evaluation keeps its cache"
        model.generate(ids[:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.train()
    backward(model, ids)
    assert all(p.grad is None for n, p in model.named_parameters() if n in before["projected"])
    assert all(record.leaf.grad is not None for record in model.galore_fx.optimizer.records)
    model.galore_fx.optimizer.step()
    after = model.galore_fx.stats()
    assert (after["num_region_graphs"], after["num_region_variants"]) == (1, 2)
    assert model.config.use_cache, "restored"


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("project", ["shorter", "input", "output"])
def test_projected_gradients_equal_those_of_eager(make, project):
    model = make(2)
    reference = copy.deepcopy(model)
    galore_fx.compile(model, rank=8, project=project, optimizer=adamw())
    ids = batches(1)[0]
    backward(model, ids)
    backward(reference, ids)
    grads = dict(reference.named_parameters())
    records = list(model.galore_fx.optimizer.records)
    assert len(records) == (14 if make is llama else 8)
    for record in records:
        grad = grads[record.name].grad
        expected = grad @ record.basis if record.dim.value == "cols" else record.basis.T @ grad
        assert record.leaf.grad.shape == expected.shape
        assert (record.leaf.grad - expected).norm() < 1e-5 * expected.norm()
    sketch = model.galore_fx.optimizer.refreshes._sketches[id(records[0].weight)]
    grad = grads[records[0].name].grad
    gram = grad.T @ grad if records[0].dim.value == "cols" else grad @ grad.T
    torch.testing.assert_close(sketch, gram @ records[0].basis, rtol=1e-4, atol=1e-6)


def test_leaves_own_no_storage():
    model = llama(1)
    galore_fx.compile(model, rank=8, optimizer=adamw())
    for record in model.galore_fx.optimizer.records:
        assert record.leaf.untyped_storage().nbytes() == record.leaf.element_size()


def test_eval_and_no_grad_run_the_original_forward():
    model = llama(2)
    reference = copy.deepcopy(model)
    galore_fx.compile(model, rank=8, optimizer=adamw())
    ids = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)
    model.eval(), reference.eval()
    assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)
    assert model.galore_fx.stats()["num_region_variants"] == 0


class Shared(nn.Module):
    """One block, used twice in a forward; its input does not require grad."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](self.blocks[0](x)).square().mean()


def _plain_sgd_galore(reference: nn.Module, model: nn.Module, lr: float) -> None:
    """W -= lr * scale * back_project(project(G)) with the compiled model's bases; biases at full rank."""
    records = {record.name: record for record in model.galore_fx.optimizer.records}
    with torch.no_grad():
        for name, p in reference.named_parameters():
            record, grad = records.get(name), p.grad
            if record is not None:
                basis = record.basis
                projector = basis @ basis.T
                grad = 0.25 * (grad @ projector if record.dim.value == "cols" else projector @ grad)
            p -= lr * grad
            p.grad = None


def test_a_block_used_twice_and_two_forwards_before_one_backward():
    torch.manual_seed(0)
    model = Shared().train()
    reference = copy.deepcopy(model)
    galore_fx.compile(model, rank=6, refresh_gap=1000, optimizer=torch.optim.SGD)
    xs = torch.randn(4, 5, 24)
    for step in range(2):
        (model(xs[2 * step]) + model(xs[2 * step + 1])).backward()
        (reference(xs[2 * step]) + reference(xs[2 * step + 1])).backward()
        _plain_sgd_galore(reference, model, lr=1e-3)
        model.galore_fx.optimizer.step()
        assert largest_error(model, reference) < 1e-6
    assert largest_error(model, Shared()) > 1e-3


def test_a_model_without_repeated_blocks_is_one_region():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8)).train()
    reference = copy.deepcopy(model)
    galore_fx.compile(model, rank=6, refresh_gap=1000, optimizer=torch.optim.SGD)
    x = torch.randn(16, 24)
    model(x).square().mean().backward()
    reference(x).square().mean().backward()
    _plain_sgd_galore(reference, model, lr=1e-3)
    model.galore_fx.optimizer.step()
    assert model.galore_fx.stats()["projected"] == ["0.weight", "2.weight"]
    assert largest_error(model, reference) < 1e-6


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_a_plain_model_that_says_so(copier):
    model = llama(1)
    galore_fx.compile(model, rank=8, optimizer=adamw())
    ids = batches(1)[0]
    backward(model, ids)
    with pytest.warns(UserWarning, match="copy of a model compiled by galore_fx"):
        plain = copier(model)
    assert not any(isinstance(vars(m).get("forward"), CompiledForward) for m in plain.modules())
    with pytest.raises(galore_fx.UsageError, match="Call galore_fx.compile"):
        _ = plain.galore_fx.optimizer
    plain.zero_grad()
    backward(plain, ids)
    assert all(p.grad is not None for p in plain.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        galore_fx.compile(plain, rank=8, optimizer=adamw())
    assert isinstance(plain.model.layers[0].forward, CompiledForward)


def test_a_dropped_model_frees_its_weights_and_state():
    model = galore_fx.compile(llama(1), rank=8, optimizer=adamw())
    backward(model, batches(1)[0])
    model.galore_fx.optimizer.step()
    optimizer = model.galore_fx.optimizer
    weak = [weakref.ref(model.model.layers[0].mlp.up_proj.weight), weakref.ref(optimizer)]
    weak += [weakref.ref(record) for record in optimizer.records]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in weak] == [None] * len(weak)


def test_blocks_in_nested_lists_are_compiled():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)]) for _ in range(2)])

        def forward(self, x):
            for first, second in self.layers:
                x = second(torch.relu(first(x)))
            return x.square().mean()

    model = galore_fx.compile(Nested().train(), rank=4)
    model(torch.randn(5, 16)).backward()
    assert all(
        record.weight.grad is None and record.leaf.grad is not None for record in model.galore_fx.optimizer.records
    )
    assert len(model.galore_fx.stats()["projected"]) == 4


def test_a_forward_set_on_the_instance_is_the_one_that_trains():
    block = nn.Linear(16, 16)
    block.forward = lambda x: nn.functional.linear(x, block.weight, block.bias) * 3
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    expected = 3 * nn.functional.linear(torch.ones(2, 16), block.weight, block.bias)
    galore_fx.compile(model.train(), rank=4)
    torch.testing.assert_close(model.layers[0](torch.ones(2, 16)), expected)


def test_signatures_are_those_of_the_model():
    plain, model = llama(1), galore_fx.compile(llama(1), rank=8, optimizer=adamw())
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)


def test_generate_on_padded_prompts_is_the_models_own():
    plain, model = gpt2(1).eval(), galore_fx.compile(gpt2(1), rank=8, optimizer=adamw()).eval()
    ids = batches(1, 2, 6)[0]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))


def test_weights_frozen_later_stay_and_groups_cannot_be_added():
    model = galore_fx.compile(llama(1), rank=8, optimizer=adamw())
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.requires_grad_(False)
    before = weight.clone()
    for ids in batches(2):
        backward(model, ids)
        model.galore_fx.optimizer.step()
    assert torch.equal(weight, before)
    with pytest.raises(galore_fx.UsageError, match="add_param_group after compile"):
        model.galore_fx.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


class WithHeads(nn.Module):
    """Two blocks and heads in a list: a linear layer for classes, and a small network for coordinates."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))
        self.heads = nn.ModuleList([nn.Linear(32, 5), nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))])

    def forward(self, x):
        for block in self.body:
            x = x + block(x)
        return self.heads[0](x).square().mean() + self.heads[1](x).square().mean()


def test_heads_in_a_list_are_trained_at_full_rank():
    """One SGD step moves them by lr times their gradient; projected at a rank of 1 it would be a fiftieth of that."""
    model, plain = WithHeads(), WithHeads()
    galore_fx.compile(model, rank=0.25, refresh_gap=100, optimizer=functools.partial(torch.optim.SGD, lr=1.0))
    x = torch.randn(16, 32)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for each in (model, plain):
        each(x).backward()
    model.galore_fx.optimizer.step()
    projected = model.galore_fx.stats()["projected"]
    assert projected == [f"body.{block}.{layer}.weight" for block in (0, 1) for layer in (0, 2)]
    for name, p in plain.named_parameters():
        if name.startswith("heads"):
            torch.testing.assert_close(start[name] - model.get_parameter(name).detach(), p.grad, rtol=1e-4, atol=1e-6)


def test_a_list_of_layers_of_one_network_is_no_list_of_heads():
    layers = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 10)])
    assert [region.name for region in find_regions(nn.ModuleDict({"layers": layers}))] == ["layers.0", "layers.1"]


class Gated(nn.Module):
    """A block whose gate is registered last, as in Qwen2-MoE's shared expert."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 1)

    def forward(self, x):
        return x + self.down(self.up(x)) * self.gate(x).sigmoid()


def test_a_block_with_a_gate_is_no_head():
    model = nn.ModuleDict({"layers": nn.ModuleList([Gated(), Gated()]), "head": nn.Linear(16, 4)})
    regions = find_regions(model)
    assert [region.name for region in regions] == ["layers.0", "layers.1"]
    assert [w.name for w in regions[0].weights] == [
        "layers.0.up.weight",
        "layers.0.down.weight",
        "layers.0.gate.weight",
    ]
