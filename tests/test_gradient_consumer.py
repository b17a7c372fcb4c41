"""Updates inside the backward's graph: the same as from full gradients, in the right order, and where they can be."""

import contextlib

import pytest
import torch
from torch import fx, nn

import galore_fx
from galore_fx.passes.model_graph.order_consumers import order_consumers
from galore_fx.runtime.layers.gradient_consumer import consume_gradient
from galore_fx.runtime.subspace import factored_gradient
from galore_fx.runtime.subspace.bases import sketch_of
from galore_fx.runtime.subspace.basis_iteration import IteratedBasis
from galore_fx.runtime.subspace.factored_gradient import GradientProduct
from galore_fx.runtime.subspace.projected_parameter import GradientForm
from galore_fx.runtime.subspace.projection import ProjectedDim
from tests.models import adamw, backward, batches, gpt2, largest_error, llama, train

pytestmark = pytest.mark.usefixtures("without_kernels")

# With an eps that rounding errors do not reach: a key bias has a gradient of zero.
FIRA = {"recipe": "fira", "rank": 8, "refresh_gap": 3, "optimizer": adamw(eps=1e-5)}


def records_of(model):
    return list(model.galore_fx.optimizer.records)


def pair(make, **parts):
    """A model updated inside the backward's graph, and one whose backward delivers full gradients."""
    consuming = galore_fx.compile(make(), **{**FIRA, **parts})
    forming = galore_fx.compile(make(), **{**FIRA, **parts})
    for record in records_of(forming):
        record.stop_consuming()
    return consuming, forming


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (gpt2, {"basis": "subspace-iteration", "project": "output"}),
        (lambda: llama(2), {"basis": "subspace-iteration", "activation_budget": 0.0}),
        (lambda: llama(2), {"basis": "subspace-iteration", "project": "input", "cross_head": "query-key", "rank": 4}),
        (lambda: llama(2), {"basis": "random", "basis_bits": 8}),
        (lambda: llama(1), {"basis": "subspace-iteration", "project": "input", "cross_head": "query-key-shared"}),
        (lambda: llama(2).bfloat16(), {"basis": "svd"}),
    ],
    ids=["inputs by outputs", "recomputed", "heads", "stored bases", "shared bases", "bfloat16"],
)
def test_factors_give_the_step_of_the_full_gradient(make, parts, monkeypatch):
    monkeypatch.setattr(factored_gradient, "PART_ELEMENTS", 64 * 48)  # several parts of each gradient
    consuming, forming = pair(make, **parts)
    is_half = next(consuming.parameters()).dtype is torch.bfloat16
    for batch in batches(4):
        train(consuming, [batch])
        train(forming, [batch])
    assert all(record.form is GradientForm.CONSUMED for record in records_of(consuming))
    assert all(record.form is GradientForm.FULL for record in records_of(forming))
    assert largest_error(consuming, forming) < (2e-2 if is_half else 1e-4)
    stats, others = consuming.galore_fx.stats(), forming.galore_fx.stats()
    assert stats["num_refreshes"] == others["num_refreshes"] > 0


def test_autocast_updates_the_weight_and_not_its_cast():
    consuming, forming = pair(lambda: llama(2), basis="subspace-iteration", oversampling=2)
    before = [record.weight.clone() for record in records_of(consuming)]
    for model in (consuming, forming):
        for batch in batches(3):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            model.galore_fx.optimizer.step()
    assert not any(torch.equal(r.weight, old) for r, old in zip(records_of(consuming), before, strict=True))
    assert largest_error(consuming, forming) < 2e-2


class Twice(nn.Module):
    """A model of two blocks; one weight of a block is read twice."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

        def forward(self, x):
            return x + self.outer(torch.tanh(self.inner(torch.tanh(self.inner(x)))))

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([self.Block(), self.Block()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def test_a_weight_that_is_read_twice_delivers_its_full_gradient():
    consuming, forming = pair(Twice, basis="subspace-iteration")
    for model in (consuming, forming):
        for seed in range(4):
            model(torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))).backward()
            model.galore_fx.optimizer.step()
    forms = {record.name.split(".")[-2]: record.form for record in records_of(consuming)}
    assert forms == {"inner": GradientForm.FULL, "outer": GradientForm.CONSUMED}
    assert largest_error(consuming, forming) < 1e-5


def _two_losses(model, step, ids):
    return model(input_ids=ids, labels=ids).loss + model(input_ids=ids.flip(0), labels=ids.flip(0)).loss


def _copies(model, step, ids):
    with torch.autograd.graph.save_on_cpu() if step else contextlib.nullcontext():
        return model(input_ids=ids, labels=ids).loss


def _discarded(model, step, ids):
    model(input_ids=ids.flip(0), labels=ids.flip(0))
    return model(input_ids=ids, labels=ids).loss


def _two_modes(model, step, ids):
    loss = model(input_ids=ids, labels=ids).loss
    other = model.eval()(input_ids=ids.flip(0), labels=ids.flip(0)).loss
    model.train()
    return loss + other if step else other + loss


@pytest.mark.parametrize("loss_of", [_two_losses, _copies, _discarded, _two_modes])
def test_what_a_graph_cannot_update_by_itself_is_updated_all_the_same(loss_of):
    """Two uses in one backward, saved tensors that come back as copies, a forward that nothing comes of, two forms."""
    consuming, forming = pair(lambda: llama(1), basis="subspace-iteration")
    for model in (consuming, forming):
        for step, ids in enumerate(batches(3)):
            loss_of(model, step, ids).backward()
            assert not any(record.weight.grad is not None for record in records_of(model))
            model.galore_fx.optimizer.step()
    assert largest_error(consuming, forming) < 1e-4
    assert all(record.form is GradientForm.CONSUMED for record in records_of(consuming))


def test_a_use_outside_the_block_is_refused():
    model = galore_fx.compile(llama(1), **FIRA)
    ids = batches(1)[0]
    loss = model(input_ids=ids, labels=ids).loss + model.model.layers[0].mlp.up_proj.weight.square().sum()
    with pytest.raises(galore_fx.UsageError, match="a weight that is used outside its block too"):
        loss.backward()
    model.galore_fx.optimizer.step()  # closes the window
    train(model, batches(1))


def test_parameters_that_are_asked_for_are_trained():
    consuming, forming = pair(lambda: llama(1), basis="subspace-iteration")
    for model in (consuming, forming):
        ids = batches(1)[0]
        model(input_ids=ids, labels=ids).loss.backward(inputs=list(model.parameters()))
        model.galore_fx.optimizer.step()
    assert largest_error(consuming, forming) < 1e-5


def test_a_gradient_that_is_asked_for_by_itself_updates_nothing():
    model = galore_fx.compile(llama(1), **FIRA)
    before = [p.detach().clone() for p in model.parameters()]
    embeds = torch.randn(2, 8, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(model(inputs_embeds=embeds).logits.square().mean(), embeds)
    assert grad.any()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_explain_says_what_is_updated_in_the_backward():
    ids = batches(1)[0]
    report = str(galore_fx.explain(llama(1), {"input_ids": ids, "labels": ids}, recipe="fira", optimizer=adamw()))
    assert "7 of them after the weight's update" in report


def test_a_second_backward_is_refused_and_the_first_one_kept():
    model = galore_fx.compile(llama(2), **FIRA)
    first, second = batches(2)
    backward(model, first)
    after = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(galore_fx.UsageError, match="a second backward before optimizer.step"):
        backward(model, second)
    weights = {id(record.weight) for record in records_of(model)}
    kept = [torch.equal(p, old) for p, old in zip(model.parameters(), after, strict=True) if id(p) in weights]
    assert all(kept)


def test_a_weight_frozen_after_compile_stays():
    model = galore_fx.compile(llama(2), **FIRA)
    train(model, batches(1))
    frozen = records_of(model)[3].weight.requires_grad_(False)
    before = frozen.detach().clone()
    train(model, batches(2))
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("dim", list(ProjectedDim))
def test_the_sketch_from_factors_is_that_of_the_full_gradient(dim):
    product = GradientProduct(torch.randn(9, 12), torch.randn(9, 10))
    basis = torch.linalg.qr(torch.randn(dim.basis_shape((12, 10), 3))).Q
    source = IteratedBasis(torch.randn(12, 10), basis, num_columns=2)
    source.draw(5)
    found = product.delivered_for(source, product.projected(basis, dim), dim)
    start = torch.cat([basis, source.columns], dim=1)
    torch.testing.assert_close(found, sketch_of(product.formed(), start, dim))


@pytest.mark.parametrize("dim", list(ProjectedDim))
def test_parts_of_a_gradient_make_up_the_whole(dim, monkeypatch):
    monkeypatch.setattr(factored_gradient, "PART_ELEMENTS", 1)
    product = GradientProduct(torch.randn(9, 150), torch.randn(9, 70))
    by_rows = dim is ProjectedDim.COLS
    expected = product.formed().square().sum(int(by_rows), keepdim=True)
    torch.testing.assert_close(product.energies(dim), expected)
    weight, factors = torch.randn(150, 70), torch.rand_like(expected)
    wanted = weight - factors * product.formed()
    product.take_from_(weight, factors, dim)
    torch.testing.assert_close(weight, wanted)


def test_whatever_is_made_of_a_weight_comes_before_its_update():
    graph = fx.Graph()
    rows, cols, weight, leaf = (graph.placeholder(name) for name in ("rows", "cols", "weight", "leaf"))
    done = graph.call_function(consume_gradient, (rows, cols, weight, leaf, []))
    turned = graph.call_function(torch.ops.aten.permute.default, (weight, [1, 0]))
    late = graph.call_function(torch.ops.aten.mm.default, (cols, turned))
    late.meta["val"] = torch.empty(1)
    pair_of = graph.call_function(torch.ops.aten.var_mean.correction, (weight,))
    mean = graph.call_function(lambda pair, index: pair[index], (pair_of, 1))
    cast = graph.call_function(torch.ops.prims.convert_element_type.default, (weight, torch.bfloat16))
    product = graph.call_function(torch.ops.aten.mm.default, (cols, cast))
    cast.meta["val"] = product.meta["val"] = torch.empty(1)
    graph.output((done, late, mean, product))
    gm = fx.GraphModule({}, graph)
    order_consumers(gm)
    (consumer,) = gm.graph.find_nodes(op="call_function", target=consume_gradient)
    order = list(gm.graph.nodes)
    assert set(consumer.args[4]) == {late, mean, cast, product}
    assert order.index(consumer) > max(order.index(node) for node in consumer.args[4])
