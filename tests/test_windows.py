"""What may happen between two steps: micro-batches, clipping, NaN, a second backward, discarded gradients."""

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves

import galore_fx
from galore_fx.runtime.subspace.bases import orthonormalize
from galore_fx.runtime.subspace.projection import project
from tests.models import adamw, backward, batches, largest_error, llama, train

pytestmark = pytest.mark.usefixtures("without_kernels")

RANK = 8


def _compiled(**settings):
    return galore_fx.compile(llama(2), rank=RANK, optimizer=adamw(), **{"refresh_gap": 100, **settings})


def _accumulate(model, ids, parts):
    for part in ids.chunk(parts):
        backward(model, part, 1 / parts)
    model.galore_fx.optimizer.step()


@pytest.mark.parametrize("recipe", ["galore", "auto"])
def test_four_micro_batches_equal_one_batch_of_four_times_the_size(recipe):
    """The first windows refresh: SVD from the sum of the full gradients, subspace iteration in both models from
    the same first batch; after them, inside a refresh interval, accumulation is all that differs."""
    whole, parts = _compiled(recipe=recipe), _compiled(recipe=recipe)
    warm_up, measured = batches(2, batch=16, seed=3), batches(4, batch=16, seed=4)
    for ids in warm_up:
        if recipe == "galore":
            _accumulate(whole, ids, 1)
            _accumulate(parts, ids, 4)
        else:
            for model in (whole, parts):
                backward(model, ids)
                model.galore_fx.optimizer.step()
    for ids in measured:
        _accumulate(whole, ids, 1)
        _accumulate(parts, ids, 4)
    assert whole.galore_fx.stats()["num_refreshes"] == parts.galore_fx.stats()["num_refreshes"] > 0
    assert largest_error(parts, whole) < 1e-5


def test_subspace_iteration_refreshes_from_the_first_micro_batch():
    model = _compiled()
    reference = copy.deepcopy(llama(2))
    records = list(model.galore_fx.optimizer.records)
    before = [record.basis.clone() for record in records]
    ids = batches(1, batch=8)[0]
    backward(reference, ids[:4])
    _accumulate_sum = [backward(model, ids[:4]), backward(model, ids[4:])]
    assert len(_accumulate_sum) == 2
    model.galore_fx.optimizer.step()
    grads = {name: p.grad for name, p in reference.named_parameters()}
    for record, old in zip(records, before, strict=True):
        grad = grads[record.name]
        gram = grad.T @ grad if record.dim.value == "cols" else grad @ grad.T
        expected = orthonormalize(gram @ old)
        assert (record.basis @ record.basis.T - expected @ expected.T).norm() < 1e-3
        assert (record.basis.T @ record.basis - torch.eye(RANK)).abs().max() < 1e-5


def test_the_new_basis_holds_from_the_next_window_on():
    model = _compiled()
    record = next(iter(model.galore_fx.optimizer.records))
    before = record.basis.clone()
    backward(model, batches(1)[0])
    assert torch.equal(record.basis, before)
    model.galore_fx.optimizer.step()
    assert not torch.equal(record.basis, before)


@pytest.mark.parametrize("recipe", ["galore", "auto"])
def test_clipping_is_that_of_torch_over_projected_and_full_gradients(recipe):
    model = _compiled(recipe=recipe)
    reference = llama(2)
    ids = batches(1)[0]
    backward(model, ids)
    backward(reference, ids)
    optimizer = model.galore_fx.optimizer
    norm = optimizer.clip_grad_norm_(0.1)
    expected = []
    named = dict(reference.named_parameters())
    for name, _ in model.named_parameters():
        record = next((r for r in optimizer.records if r.name == name), None)
        grad = named[name].grad
        expected.append(project(grad, record.basis, record.dim) if record else grad)
    holders = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in expected]
    for holder, grad in zip(holders, expected, strict=True):
        holder.grad = grad
    expected_norm = torch.nn.utils.clip_grad_norm_(holders, 0.1)
    assert norm == pytest.approx(float(expected_norm), rel=1e-5)
    clipped = [h.grad for h in optimizer._holders()]
    for mine, theirs in zip(clipped, [h.grad for h in holders], strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9


def test_clipping_that_misses_the_projected_gradients_is_not_silent():
    model = _compiled()
    ids = batches(1)[0]
    backward(model, ids[:2]), backward(model, ids[2:])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="projected gradients are no parameter's .grad .*clip_grad_norm_"):
        model.galore_fx.optimizer.step()
    backward(model, ids)
    model.galore_fx.optimizer.clip_grad_norm_(0.1)
    model.galore_fx.optimizer.step()


def test_max_grad_norm_is_clipping_before_every_step():
    automatic, by_hand = _compiled(max_grad_norm=0.05), _compiled()
    for ids in batches(3):
        backward(automatic, ids), backward(by_hand, ids)
        by_hand.galore_fx.optimizer.clip_grad_norm_(0.05)
        automatic.galore_fx.optimizer.step(), by_hand.galore_fx.optimizer.step()
        assert automatic.galore_fx.stats()["grad_norm"] > 0.05, "the norm reported is that before clipping"
    assert largest_error(automatic, by_hand) == 0.0


@pytest.mark.parametrize("recipe", ["galore", "auto"])
def test_a_step_with_nan_changes_nothing_and_is_counted(recipe):
    model = _compiled(recipe=recipe)
    ids = batches(3)
    backward(model, ids[0])
    model.galore_fx.optimizer.step()
    before = copy.deepcopy(model.state_dict())
    states = copy.deepcopy(model.galore_fx.optimizer.state_dict()["state"])
    backward(model, ids[1], float("nan"))
    model.galore_fx.optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for i, state in model.galore_fx.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, states[i][name]) for name, value in state.items())
    stats = model.galore_fx.stats()
    assert (stats["num_skipped"], stats["num_updates"]) == (1, 1)
    backward(model, ids[2])
    model.galore_fx.optimizer.step()
    assert model.galore_fx.stats()["num_updates"] == 2
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_step_that_will_be_skipped_renews_no_basis():
    """One weight's gradient is not finite, the others' are and are due for an SVD, which would reset their states."""
    model = galore_fx.compile(llama(2), recipe="galore", refresh_gap=2, moments_on_refresh="reset", optimizer=adamw())
    optimizer, ids = model.galore_fx.optimizer, batches(3)
    train(model, ids[:2])
    backward(model, ids[2])
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    model.model.layers[0].mlp.up_proj.weight.grad[3, 5] = torch.inf
    optimizer.step()
    after = (model.state_dict(), optimizer.state_dict()["state"])
    assert model.galore_fx.stats()["num_skipped"] == 1
    for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
        assert torch.equal(torch.as_tensor(old), torch.as_tensor(new))
    backward(model, ids[2])
    num_refreshes = model.galore_fx.stats()["num_refreshes"]
    optimizer.step()
    assert model.galore_fx.stats()["num_refreshes"] == num_refreshes + 14, "they have waited"


def test_nan_in_the_backward_mode_skips_the_parameters_it_reaches():
    model = _compiled(update="in-backward")
    before = copy.deepcopy(model.state_dict())
    backward(model, batches(1)[0], float("nan"))
    model.galore_fx.optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.galore_fx.stats()["num_skipped"] == len(list(model.parameters()))


def test_a_second_backward_before_step_raises_in_the_backward_mode():
    model = _compiled(update="in-backward")
    first, second = batches(2)
    backward(model, first)
    after_first = copy.deepcopy(model.state_dict())
    with pytest.raises(galore_fx.UsageError, match="second backward before optimizer.step"):
        backward(model, second)
    assert all(torch.equal(value, after_first[name]) for name, value in model.state_dict().items())
    with pytest.raises(galore_fx.UsageError, match="update='deferred' to clip"):
        model.galore_fx.optimizer.clip_grad_norm_(1.0)


def test_in_the_backward_mode_gradients_of_one_region_at_most_exist():
    model = _compiled(update="in-backward")
    alive = []

    def count(_parameter):
        kept = [p for p in model.parameters() if p.grad is not None]
        kept += [r.leaf for r in model.galore_fx.optimizer.records if r.leaf.grad is not None]
        alive.append(len(kept))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count)
    backward(model, batches(1)[0])
    one_region = 7 + 2
    assert alive and max(alive) <= one_region


def test_discarded_gradients_are_gone():
    model, reference = _compiled(), _compiled()
    first, second = batches(2)
    backward(model, first)
    model.zero_grad()
    for record in model.galore_fx.optimizer.records:
        assert record.leaf.grad is record.source.leaf.grad is record.weight.grad is None
    for each in (model, reference):
        backward(each, second)
        each.galore_fx.optimizer.step()
    assert largest_error(model, reference) == 0.0


def test_a_closure_is_evaluated_and_its_loss_returned():
    model = _compiled()
    ids = batches(1)[0]

    def closure():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    assert model.galore_fx.optimizer.step(closure).item() > 0
    assert model.galore_fx.stats()["num_updates"] == 1
