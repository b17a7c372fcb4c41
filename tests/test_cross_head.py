"""Cross-head projection: the basis of one head, drawn anew at each refresh, serves all heads of a weight."""

import copy

import pytest
import torch

import galore_fx
from galore_fx.planner.verify_peak import counted_peak
from galore_fx.runtime.remainder.sparse import entries_of
from galore_fx.runtime.subspace.bases import exact_basis
from galore_fx.runtime.subspace.basis_heads import HeadBasis, SampledHeads, basis_of_heads
from galore_fx.runtime.subspace.projected_parameter import GradientForm
from galore_fx.runtime.subspace.projection import ProjectedDim
from tests.models import adamw, backward, batches, gpt2, largest_error, llama, straight_and_resumed, train

pytestmark = pytest.mark.usefixtures("without_kernels")

CROSS = {"project": "input", "cross_head": "query-key", "refresh_gap": 3, "stagger": False}


def _span(basis):
    return basis @ basis.T


@pytest.mark.parametrize("shape", [(12, 40), (12, 12)])
@pytest.mark.parametrize("dim", list(ProjectedDim))
def test_the_small_gram_matrix_gives_the_leading_singular_vectors(shape, dim):
    grad = torch.randn(shape) @ torch.diag(0.7 ** torch.arange(shape[1]))
    grad = grad if dim is ProjectedDim.COLS else grad.T
    torch.testing.assert_close(_span(basis_of_heads(grad, 4, dim)), _span(exact_basis(grad, 4, dim)), atol=1e-4, rtol=0)


def test_a_gradient_of_nan_gives_no_basis():
    assert basis_of_heads(torch.full((4, 8), torch.nan), 2, ProjectedDim.COLS) is None
    assert basis_of_heads(torch.zeros(4, 8), 2, ProjectedDim.COLS) is None


@pytest.mark.kernels
@pytest.mark.parametrize(("make", "num_shared", "recipe"), [(llama, 2, "auto"), (gpt2, 1, "galore")])
def test_the_new_basis_is_that_of_the_drawn_heads(make, num_shared, recipe):
    """Llama: of q and of k, each its own head; GPT-2: of the rows of q, k and v together (stored as columns)."""
    model, plain = galore_fx.compile(make(1), recipe=recipe, rank=8, optimizer=adamw(), **CROSS), make(1)
    ids = batches(1)[0]
    backward(plain, ids)
    backward(model, ids)
    shared = [record for record in model.galore_fx.optimizer.records if isinstance(record.source, HeadBasis)]
    assert len(shared) == num_shared
    features = {record.name: record.source.heads.features.clone() for record in shared}
    assert all(record.form is GradientForm.REFRESHING for record in shared)
    model.galore_fx.optimizer.step()
    grads = {name: p.grad for name, p in plain.named_parameters()}
    for record in shared:
        grad = grads[record.name]
        of_heads = grad[features[record.name]] if make is llama else grad[:, features[record.name]]
        assert len(features[record.name]) == 16 * (1 if make is llama else 3)
        expected = exact_basis(of_heads, 8, record.dim)
        torch.testing.assert_close(_span(record.basis), _span(expected), atol=1e-3, rtol=0)


def test_more_heads_where_the_rank_exceeds_one():
    model = galore_fx.compile(llama(1, num_key_value_heads=2), rank=24, optimizer=adamw(), **CROSS)
    backward(model, batches(1)[0])
    drawn = {
        r.name: r.source.heads.features for r in model.galore_fx.optimizer.records if isinstance(r.source, HeadBasis)
    }
    assert {name.split(".")[-2]: len(features) for name, features in drawn.items()} == {"q_proj": 32, "k_proj": 32}
    model.galore_fx.optimizer.step()
    for record in model.galore_fx.optimizer.records:
        identity = torch.eye(record.rank)
        assert float((record.basis.T @ record.basis - identity).abs().max()) < 1e-5


def test_values_join_where_they_are_asked_to():
    model = galore_fx.compile(llama(1), rank=8, optimizer=adamw(), **CROSS | {"cross_head": "query-key-value"})
    backward(model, batches(1)[0])
    assert [name.split(".")[-2] for name in model.galore_fx.stats()["cross_head"]] == ["q_proj", "k_proj", "v_proj"]


def test_the_heads_of_all_layers_are_found_in_one_graph():
    whole = torch.compile(
        llama(2), backend="galore_fx", options={"rank": 8, "project": "input", "cross_head": "query-key"}
    )
    optimizer = galore_fx.optimizer(whole, adamw())
    backward(whole, batches(1)[0])
    assert sum(isinstance(record.source, HeadBasis) for record in optimizer.records) == 4


def test_a_block_without_attention_is_named_and_trains():
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).train()
    galore_fx.compile(model, rank=4, optimizer=adamw(), **CROSS)
    with pytest.warns(UserWarning, match="no attention is recognised in the block of 0.weight"):
        model(torch.ones(3, 16)).sum().backward()
    model.galore_fx.optimizer.step()
    assert model.galore_fx.stats()["cross_head"] == []


def test_cross_attention_of_torch_splits_the_packed_weight():
    class Crossed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x, y):
            return self.attention(x, y, y, need_weights=False)[0]

    torch.manual_seed(0)
    model = Crossed().train()
    plain = copy.deepcopy(model)
    galore_fx.compile(model, rank=4, optimizer=adamw(), **CROSS)
    x, y = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    plain(x, y).square().sum().backward()
    model(x, y).square().sum().backward()
    record = next(r for r in model.galore_fx.optimizer.records if isinstance(r.source, HeadBasis))
    features = record.source.heads.features.clone()
    with pytest.warns(UserWarning, match="the full gradient of attention.in_proj_weight was formed"):
        model.galore_fx.optimizer.step()
    expected = exact_basis(plain.attention.in_proj_weight.grad[features], 4, record.dim)
    torch.testing.assert_close(_span(record.basis), _span(expected), atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [128, 16], ids=["by blocks", "as a whole"])
def test_a_residual_is_split_where_the_parts_begin_with_a_block_of_rows(size):
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(size, 4, batch_first=True).train()
    plain = copy.deepcopy(attention)
    galore_fx.compile(attention, rank=4, optimizer=adamw(), project="input", residual="sparse", residual_density=0.2)
    x, y = torch.randn(2, 5, size), torch.randn(2, 7, size)
    for each in (plain, attention):
        each(x, y, y, need_weights=False)[0].square().sum().backward()
    record = next(r for r in attention.galore_fx.optimizer.records if r.name == "in_proj_weight")
    expected = entries_of(plain.in_proj_weight.grad, record.residual.columns)
    if size == 16:
        with pytest.warns(UserWarning, match="the full gradient of in_proj_weight was formed"):
            attention.galore_fx.optimizer.clip_grad_norm_(1e9)
    torch.testing.assert_close(record.residual.leaf.grad, expected, rtol=1e-4, atol=1e-5)


def test_every_head_is_drawn_and_the_draw_follows_from_its_number():
    heads = SampledHeads(tuple((2 * h, 2 * h + 1) for h in range(8)), 3, torch.device("cpu"))
    seen = set()
    for key in range(-40, 40):
        heads.draw(key)
        first = heads.features.clone()
        heads.draw(key)
        assert torch.equal(first, heads.features)
        assert len(set(first.tolist())) == 4
        seen.update(first.tolist())
    assert seen == set(range(16))
    with pytest.raises(ValueError, match="8 heads of 2 features cannot give a basis of rank 17"):
        SampledHeads(tuple((2 * h, 2 * h + 1) for h in range(8)), 17, torch.device("cpu"))


def test_resume_draws_the_same_heads():
    def make():
        return galore_fx.compile(llama(1), rank=8, optimizer=adamw(), **CROSS)

    ids = batches(8)

    straight, stopped, resumed = make(), make(), make()
    train(straight, ids)
    train(stopped, ids[:6])  # the next window refreshes, before the resumed model has seen a graph
    resumed.load_state_dict(stopped.state_dict())
    resumed.galore_fx.optimizer.load_state_dict(stopped.galore_fx.optimizer.state_dict())
    train(resumed, ids[6:])
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))


SHARED = CROSS | {"cross_head": "query-key-value-shared", "rank": 8}


def by_layer(model):
    """The records of attention inputs by the layer's name."""
    return {record.name.split(".")[-2]: record for record in model.galore_fx.optimizer.records}


def test_a_shared_basis_is_that_of_a_query_head_and_projects_all():
    model, plain = galore_fx.compile(llama(1), optimizer=adamw(), **SHARED), llama(1)
    ids = batches(1)[0]
    backward(model, ids)
    backward(plain, ids)
    layers = by_layer(model)
    query, basis, features = layers["q_proj"], layers["q_proj"].basis, layers["q_proj"].source.heads.features.clone()
    assert basis is layers["k_proj"].basis is layers["v_proj"].basis is not layers["o_proj"].basis
    attention = plain.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        expected = getattr(attention, name).weight.grad @ basis
        torch.testing.assert_close(layers[name].leaf.grad, expected, rtol=1e-4, atol=1e-6)
    assert layers["k_proj"].source.leaf.grad is None, "the query's heads alone are asked"
    model.galore_fx.optimizer.step()
    expected = exact_basis(attention.q_proj.weight.grad[features], 8, query.dim)
    torch.testing.assert_close(_span(query.basis), _span(expected), atol=1e-3, rtol=0)
    names = ("q_proj", "k_proj", "v_proj")
    assert model.galore_fx.stats()["cross_head"] == [layers[name].name for name in names]
    assert all(model.galore_fx.optimizer.state[layers[name].weight]["basis"] is basis for name in names)


@pytest.mark.parametrize("moments", ["keep", "rotate"])
def test_in_the_backward_a_shared_basis_changes_when_all_have_been_updated(moments):
    models = [
        galore_fx.compile(llama(1), optimizer=adamw(), update=update, moments_on_refresh=moments, **SHARED)
        for update in ("deferred", "in-backward")
    ]
    for model in models:
        train(model, batches(5))
    assert models[0].galore_fx.stats()["num_refreshes"] == models[1].galore_fx.stats()["num_refreshes"] == 3 * 5
    assert largest_error(*models) < 1e-5


@pytest.mark.kernels
def test_a_shared_basis_is_kept_once_and_predicted():
    sample = {"input_ids": batches(1)[0], "labels": batches(1)[0]}
    plan = galore_fx.plan(llama(1), sample=sample, optimizer=adamw(), **SHARED)
    apart = galore_fx.plan(llama(1), sample=sample, optimizer=adamw(), **SHARED | {"cross_head": "query-key-value"})
    model = galore_fx.compile(llama(1), optimizer=adamw(), **SHARED)
    assert counted_peak(model, sample) == plan.peak_bytes < apart.peak_bytes
    saved = apart.prediction.kept["bases"] - plan.prediction.kept["bases"]
    assert saved >= 2 * 64 * 8 * 4, "two bases of 64 x 8"


def test_a_resumed_run_shares_the_same_basis():
    def make():
        return galore_fx.compile(llama(1), optimizer=adamw(), **SHARED)

    straight_and_resumed(make, batches(5), 3)
    model, fresh = make(), make()
    start = copy.deepcopy((model.state_dict(), model.galore_fx.optimizer.state_dict()))
    train(model, batches(2))
    model.load_state_dict(start[0])
    model.galore_fx.optimizer.load_state_dict(start[1])  # saved before the graph was seen, bases apart
    for each in (model, fresh):
        train(each, batches(2))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), fresh.parameters(), strict=True))


def test_a_frozen_sharer_does_not_hold_up_the_others():
    model = galore_fx.compile(llama(1), optimizer=adamw(), update="in-backward", **SHARED)
    layers, ids = by_layer(model), batches(8)
    train(model, ids[:1])
    layers["v_proj"].weight.requires_grad_(False)
    before = layers["q_proj"].basis.clone()
    train(model, ids[1:])
    assert not torch.equal(layers["q_proj"].basis, before)
    assert model.galore_fx.stats()["refresh_queue"] == []


@pytest.mark.parametrize("cross_head", [SHARED["cross_head"], "query-key"])
def test_a_basis_is_not_exchanged_in_the_middle_of_a_window(cross_head):
    """The first micro-batch runs the block's own code, in eval mode; the graph is seen with the second."""
    parts = {**SHARED, "cross_head": cross_head}
    model, plain = galore_fx.compile(llama(1), optimizer=adamw(), **parts), llama(1)
    ids, layers = batches(2), by_layer(model)
    for each in (model, plain):
        backward(each.eval(), ids[0])
        backward(each.train(), ids[1])
    key = layers["k_proj"]
    expected = plain.model.layers[0].self_attn.k_proj.weight.grad @ key.basis
    torch.testing.assert_close(key.leaf.grad, expected, rtol=1e-4, atol=1e-6)
    model.galore_fx.optimizer.step()
    train(model, ids)
    assert key.basis_owner is None, "an update has used its own basis"
    assert isinstance(layers["q_proj"].source, HeadBasis)


def test_keys_of_another_rank_keep_their_basis_and_are_named():
    model = galore_fx.compile(
        llama(1, num_key_value_heads=2), optimizer=adamw(), **SHARED | {"rank": 0.25, "cross_head": "query-key-shared"}
    )
    with pytest.warns(UserWarning, match=r"k_proj.weight has a basis of \(64, 8\) and cannot share that of .*q_proj"):
        backward(model, batches(1)[0])
    assert by_layer(model)["k_proj"].basis_owner is None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"cross_head": "all", "project": "input"}, "cross_head='all' is not one of query-key, query-key-value"),
        ({"cross_head": "query-key"}, "project='shorter' may project the outputs; use project='input'"),
    ],
)
def test_what_makes_no_sense_is_refused(parts, message):
    with pytest.raises(galore_fx.SettingError, match=message):
        galore_fx.compile(llama(1), optimizer=adamw(), **parts)
