"""Bases and projections."""

import pytest
import torch

from galore_fx.runtime.subspace import bases
from galore_fx.runtime.subspace.bases import (
    ORTHONORMAL_TOLERANCE,
    balanced,
    exact_basis,
    leading_columns,
    orthonormalize,
    random_basis,
    sketch_of,
)
from galore_fx.runtime.subspace.projection import ProjectedDim, add_back_projection_, project

SHAPES = [(48, 32), (32, 48), (32, 32), (5, 123)]


def _gap_from_orthonormal(basis):
    return (basis.T @ basis - torch.eye(basis.shape[1])).abs().max()


def _decaying(m, n, decay=0.8):
    u, _, v = torch.linalg.svd(torch.randn(m, n), full_matrices=False)
    return u @ torch.diag(decay ** torch.arange(min(m, n))) @ v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dim", list(ProjectedDim))
def test_projecting_and_back_is_the_orthogonal_projection(shape, dim):
    grad = torch.randn(shape)
    rank = min(4, *shape)
    basis = exact_basis(grad, rank, dim)
    assert basis.shape == dim.basis_shape(shape, rank)
    assert project(grad, basis, dim).shape == dim.projected_shape(shape, rank)
    assert project(grad, basis, dim).is_contiguous(), "another layout would be another update kernel"
    weight = torch.randn(shape)
    expected = 0.5 * weight + (basis @ (basis.T @ grad) if dim is ProjectedDim.ROWS else (grad @ basis) @ basis.T)
    add_back_projection_(weight, project(grad, basis, dim), basis, dim, 0.5)
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exact_basis_keeps_the_gradients_dtype(dtype):
    assert exact_basis(torch.randn(16, 8).to(dtype), 4, ProjectedDim.COLS).dtype == dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_gives_no_basis(value):
    grad = torch.randn(16, 8)
    grad[3, 3] = value
    assert exact_basis(grad, 4, ProjectedDim.COLS) is None
    assert orthonormalize(grad) is None
    assert orthonormalize(torch.zeros(16, 8)) is None


def test_cholesky_qr_is_orthonormal_on_graded_and_on_hard_matrices():
    graded = torch.randn(512, 64) * torch.logspace(0, -12, 64)
    nearly_parallel = torch.ones(512, 64) + 1e-3 * torch.randn(512, 64)
    rank_deficient = torch.randn(512, 8) @ torch.randn(8, 64)
    zero_column = torch.randn(512, 64)
    zero_column[:, 5] = 0
    for sketch in (graded, nearly_parallel, rank_deficient, zero_column, torch.eye(64)):
        basis = orthonormalize(sketch)
        assert basis.dtype == torch.float32
        assert _gap_from_orthonormal(basis) <= ORTHONORMAL_TOLERANCE


def test_cholesky_qr_spans_what_it_was_given():
    sketch = torch.randn(100, 12)
    basis = orthonormalize(sketch)
    torch.testing.assert_close(basis @ (basis.T @ sketch), sketch, atol=1e-4, rtol=1e-4)


def test_warm_iterations_approach_the_exact_basis_energy():
    grad = _decaying(200, 100)
    exact = exact_basis(grad, 10, ProjectedDim.COLS)
    best = (grad @ exact).square().sum()
    basis = random_basis((100, 10), torch.Generator().manual_seed(0))
    energy = []
    for _ in range(4):
        basis = orthonormalize(grad.T @ (grad @ basis))
        energy.append(float((grad @ basis).square().sum() / best))
    assert energy == sorted(energy)
    assert energy[-1] > 0.999


def test_random_bases_are_reproducible_and_orthonormal():
    first, second = (random_basis((40, 6), torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert _gap_from_orthonormal(first) < 1e-5


@pytest.mark.parametrize("dim", list(ProjectedDim))
def test_oversampled_columns_bring_a_cold_basis_nearer_to_the_exact_one(dim):
    gains = []
    for seed in range(8):
        torch.manual_seed(seed)
        grad = _decaying(60, 48) if dim is ProjectedDim.COLS else _decaying(48, 60)
        basis = random_basis((48, 6), torch.Generator().manual_seed(seed))
        columns = torch.randn(48, 10) / 48**0.5
        held = []
        for sketch in (
            sketch_of(grad, basis, dim),
            leading_columns(sketch_of(grad, torch.cat([basis, columns], 1), dim), 6),
        ):
            found = orthonormalize(sketch)
            assert found.shape == (48, 6) and _gap_from_orthonormal(found) < ORTHONORMAL_TOLERANCE
            held.append(project(grad, found, dim).square().sum())
        best = project(grad, exact_basis(grad, 6, dim), dim).square().sum()
        gains.append((best - held[0]) / (best - held[1]))
    assert min(gains) > 1 and sum(gains) / len(gains) > 3


def test_an_oversampled_sketch_that_is_not_finite_gives_no_basis():
    sketch = torch.full((8, 5), torch.nan)
    assert orthonormalize(leading_columns(sketch, 3)) is None


def graded(rank, least):
    """A gradient (96, 64) whose leading singular values fall from 1 to ``least``, the rest far below, and V."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 64, generator=generator)).Q for n in (96, 64))
    values = torch.full((64,), least * 1e-2)
    values[:rank] = torch.logspace(0, torch.log10(torch.tensor(least)).item(), rank)
    return left * values @ right.T, right[:, :rank]


@pytest.mark.parametrize("dim", list(ProjectedDim))
def test_sketches_in_bfloat16_find_weak_directions(monkeypatch, dim):
    """Two refreshes from a random basis: the subspace is the exact one; without the balance a third of it is noise."""
    grad, exact = graded(8, 0.004)
    grad = (grad if dim is ProjectedDim.COLS else grad.T).to(torch.bfloat16)

    def overlap():
        basis = random_basis((64, 8), torch.Generator().manual_seed(1)).to(torch.bfloat16)
        for _ in range(2):
            basis = orthonormalize(sketch_of(grad, basis, dim)).to(torch.bfloat16)
        return float((basis.float().T @ exact).square().sum() / 8)

    assert overlap() > 0.99
    monkeypatch.setattr(bases, "balanced", lambda projected, _dim: projected)
    assert overlap() < 0.9


@pytest.mark.parametrize("dim", list(ProjectedDim))
def test_balancing_spans_the_same_and_leaves_wide_formats_alone(dim):
    grad, _ = graded(8, 0.02)
    basis = random_basis((64, 8), torch.Generator().manual_seed(1))
    projected = grad @ basis if dim is ProjectedDim.COLS else (grad @ basis).T
    assert balanced(projected, dim) is projected
    narrow = projected.to(torch.bfloat16)
    made = balanced(narrow, dim)
    assert made.shape == narrow.shape and made.dtype is torch.bfloat16
    columns, span = (each.float() if dim is ProjectedDim.COLS else each.float().T for each in (made, narrow))
    inside = torch.linalg.qr(span).Q
    assert float((columns - inside @ (inside.T @ columns)).norm()) < 0.02 * float(columns.norm())
    assert float(torch.linalg.cond(columns)) < 0.2 * float(torch.linalg.cond(span))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(balanced(narrow, dim), made), "float32 inside"
    for odd in (torch.zeros_like(narrow), narrow * float("nan"), narrow[:, :1].expand(narrow.shape)):
        assert balanced(odd.contiguous(), dim).shape == narrow.shape
    assert float(balanced(torch.zeros_like(narrow), dim).abs().max()) == 0.0
