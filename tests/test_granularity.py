"""One small basis for several parts of a dimension: VLoRP's reshaped gradient, a plain loop, the predicted peak."""

import pytest
import torch

import galore_fx
from galore_fx.planner.verify_peak import counted_peak
from galore_fx.recipes.recipe import Recipe
from galore_fx.runtime.subspace.bases import random_basis
from galore_fx.runtime.subspace.moment_transfer import rotation_between
from galore_fx.runtime.subspace.projection import ProjectedDim, add_back_projection_, project, projected_gradient
from tests.models import adamw, backward, batches, largest_error, llama, straight_and_resumed
from tests.references import PlainGaLore

pytestmark = pytest.mark.usefixtures("without_kernels")

PARTS = {"recipe": "vlorp", "rank": 8, "granularity": 4, "refresh_gap": 3}


@pytest.mark.parametrize("dim", list(ProjectedDim))
def test_the_gradient_is_projected_as_the_reshaped_one(dim):
    """In the terms of the paper: G of (n, m) as (n c, m / c), a row of which is projected."""
    rows, cols, parts = torch.randn(7, 24), torch.randn(7, 36), 6
    grad = rows.T @ cols
    upright = grad if dim is ProjectedDim.COLS else grad.T
    basis = random_basis(dim.basis_shape((24, 36), 12, parts), torch.Generator().manual_seed(0))
    assert basis.shape == (upright.shape[1] // parts, 2)
    reshaped = upright.reshape(-1, basis.shape[0]) @ basis
    expected = reshaped.view(len(upright), 12) if dim is ProjectedDim.COLS else reshaped.view(len(upright), 12).T
    projected = project(grad, basis, dim)
    torch.testing.assert_close(projected, expected)
    assert projected.is_contiguous()
    torch.testing.assert_close(projected_gradient(rows, cols, basis, dim), expected)
    back = (reshaped @ basis.T).view(upright.shape)
    for weight in (torch.randn(24, 36), torch.randn(36, 24).T):
        want = 0.5 * weight + (back if dim is ProjectedDim.COLS else back.T)
        add_back_projection_(weight, expected, basis, dim, 0.5)
        torch.testing.assert_close(weight, want)


def test_the_parts_in_force_divide_the_side_and_the_rank():
    recipe = Recipe("vlorp", granularity=256)
    found = {basis: recipe.granularity_in_force(basis) for basis in ((4096, 256), (11008, 256), (160, 40), (7, 3))}
    assert found == {(4096, 256): 256, (11008, 256): 256, (160, 40): 40, (7, 3): 1}
    assert Recipe("vlorp", granularity=30).granularity_in_force((160, 40)) == 20


def test_states_are_rotated_part_by_part():
    old, new = (random_basis((9, 2), torch.Generator().manual_seed(seed)) for seed in (0, 1))
    expected = torch.block_diag(new, new, new).T @ torch.block_diag(old, old, old)
    torch.testing.assert_close(rotation_between(old, new, 6), expected)


def test_ten_steps_equal_a_plain_loop():
    """Whose projection is a matrix: the small basis in each part's place."""
    model, plain, ids = llama(2), llama(2), batches(10)
    galore_fx.compile(model, optimizer=adamw(), **PARTS)
    records = model.galore_fx.optimizer.records
    parameters = dict(plain.named_parameters())
    names = {record.name for record in records}
    reference = PlainGaLore(
        [parameters[name] for name in names], [p for name, p in parameters.items() if name not in names],
        rank=8, gap=None, scale=1.0, lr=1e-3,
    )  # fmt: skip
    for batch in ids:
        for record in records:
            assert record.basis.shape[1] == 2
            reference.bases[parameters[record.name]] = torch.block_diag(*[record.basis] * 4)
        backward(model, batch)
        model.galore_fx.optimizer.step()
        backward(plain, batch)
        reference.step()
    assert largest_error(model, plain) < 1e-4
    assert model.galore_fx.stats()["num_refreshes"] == 14 * 4  # updates 0, 3, 6, 9


@pytest.mark.parametrize("update", ["deferred", "in-backward"])
def test_a_resumed_run_draws_the_same(update):
    def make():
        return galore_fx.compile(llama(1), optimizer=adamw(), update=update, **PARTS)

    straight_and_resumed(make, batches(5), 3)


@pytest.mark.kernels
def test_the_peak_is_predicted_and_bases_are_small():
    ids = batches(1)[0]
    sample = {"input_ids": ids, "labels": ids}
    plan = galore_fx.plan(llama(2), sample=sample, optimizer=adamw(), **PARTS)
    model = galore_fx.compile(llama(2), optimizer=adamw(), **PARTS)
    assert plan.peak_bytes == counted_peak(model, sample)
    # Sides of 64: 16 x 2 in each of 7 weights of 2 blocks, float32; and two leaves of one element.
    assert plan.categories["bases"] == 2 * 7 * (16 * 2 + 2) * 4


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"granularity": 0}, "granularity=0 must be an int of at least 1"),
        ({"basis": "svd"}, "granularity=4 projects the parts of a dimension with one random basis, and basis='svd'"),
        ({"weight_bits": 8}, "weight_bits=8 does not know parts; use weight_bits=None, or granularity=1"),
        ({"recipe": "full"}, "recipe 'full' projects none"),
    ],
)
def test_what_makes_no_sense_is_refused(parts, message):
    with pytest.raises(galore_fx.SettingError, match=message):
        galore_fx.compile(llama(1), optimizer=adamw(), **{**PARTS, **parts})
