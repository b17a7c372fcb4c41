"""Computes bases from a gradient, from a sketch of it, or at random."""

import torch
from torch import Tensor

from galore_fx.runtime.subspace.projection import ProjectedDim

# Largest |P^T P - I| accepted from Cholesky QR; above it Householder QR is used.
ORTHONORMAL_TOLERANCE = 1e-5


def sketch(rows: Tensor, cols: Tensor, projected: Tensor, dim: ProjectedDim) -> Tensor:
    """Returns ``G G^T P`` (m, r) for ROWS, ``G^T G P`` (n, r) for COLS, from ``R`` and without forming ``G``.

    In 16 bits R is balanced first (``balanced``).

    Args:
        rows: A, (t, m), of ``G = A^T B``.
        cols: B, (t, n).
        projected: R, (r, n) for ROWS, (m, r) for COLS.
        dim: the projected dimension.

    Source: the power iteration of Halko, Martinsson, Tropp 2011, SIAM Rev. 53(2), algorithm 4.4, started from the
    previous basis.
    """
    projected = balanced(projected, dim)
    return rows.T @ (cols @ projected.T) if dim is ProjectedDim.ROWS else cols.T @ (rows @ projected)


def balanced(projected: Tensor, dim: ProjectedDim) -> Tensor:
    """Makes the vectors of a 16-bit R nearly orthonormal, keeping their span; returns a wider R unchanged.

    A sketch ``G^T (G P)`` squares the ratios of singular values. If the smallest relevant one is a sixtieth of the
    largest, its direction is three thousand times weaker in the sketch and is lost in bfloat16 rounding. In ``G^T W``
    with W orthonormal it is only sixty times weaker. Uses one pass of shifted Cholesky QR in float32.

    Args:
        projected: R, (r, n) for ROWS, (m, r) for COLS.
        dim: the projected dimension.

    Returns:
        Shape and dtype of R. If the factorisation fails, the vectors are only normalised.

    Source: Halko, Martinsson, Tropp 2011, SIAM Rev. 53(2), algorithm 4.4, which orthonormalises after each product.
    """
    if projected.dtype.itemsize > 2:
        return projected
    with torch.autocast(projected.device.type, enabled=False):  # autocast would compute the products in 16 bits
        columns = (projected if dim is ProjectedDim.COLS else projected.T).float()
        columns = columns / torch.linalg.vector_norm(columns, dim=0).clamp_min(torch.finfo(torch.float32).tiny)
        size, rank = columns.shape
        identity = torch.eye(rank, device=columns.device)
        factor, info = torch.linalg.cholesky_ex(columns.T @ columns + _shift(size, rank) * identity)
        solved = torch.linalg.solve_triangular(factor.T, columns, upper=True, left=False)
        columns = torch.where(info == 0, solved, columns)
    found: Tensor = (columns if dim is ProjectedDim.COLS else columns.T).to(projected.dtype)
    return found


def _shift(size: int, rank: int) -> float:
    """Returns the diagonal shift that makes the Gram matrix of unit-norm columns factorisable.

    The source gives 11 (size r + r (r + 1)) u ||A||^2, where ||A||^2 <= r for such columns. This is a worst-case
    bound, so it is capped at 1e-2; with the cap, the condition number after the pass is at most sqrt(r / 1e-2).

    Source: Fukaya et al. 2020, SIAM J. Sci. Comput. 42(1).
    """
    return min(11 * (size * rank + rank * (rank + 1)) * 2.0**-24 * float(rank), 1e-2)


def sketch_of(grad: Tensor, basis: Tensor, dim: ProjectedDim) -> Tensor:
    """Applies one subspace iteration to a full gradient: ``G G^T P`` (m, r) for ROWS, ``G^T G P`` (n, r) for COLS.

    In 16 bits the intermediate product is balanced.

    Source: Halko, Martinsson, Tropp 2011, SIAM Rev. 53(2), algorithm 4.4, started from the previous basis.
    """
    if dim is ProjectedDim.ROWS:
        sketch: Tensor = grad @ balanced((grad.T @ basis).T, dim).T
    else:
        sketch = grad.T @ balanced(grad @ basis, dim)
    return sketch


def exact_basis(grad: Tensor, rank: int, dim: ProjectedDim) -> Tensor | None:
    """Returns the leading singular vectors of a gradient, by LAPACK's or cuSOLVER's SVD in float32.

    Returns:
        (m, r) left vectors for ROWS, (n, r) right vectors for COLS, in the dtype of the gradient. None if the gradient
        is not finite or the SVD does not converge; the caller then keeps the old basis.

    Source: GaLore, arXiv:2403.03507, algorithm 2.
    """
    bases = exact_bases(grad, rank)
    return None if bases is None else bases[0] if dim is ProjectedDim.ROWS else bases[1]


def exact_bases(grad: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Returns the leading singular vectors of both sides, (m, r) and (n, r); None as for ``exact_basis``."""
    if not bool(torch.isfinite(torch.linalg.vector_norm(grad))):
        return None
    try:
        left, _, right = torch.linalg.svd(grad.float(), full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    return left[:, :rank].to(grad.dtype).contiguous(), right[:rank].T.to(grad.dtype).contiguous()


def random_basis(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Returns orthonormalised Gaussian columns, (size, r) float32, on the device of the generator."""
    gaussian = torch.randn(shape, generator=generator, device=generator.device)
    return _householder(gaussian)


def leading_columns(sketch: Tensor, rank: int) -> Tensor:
    """Reduces an oversampled sketch to its ``rank`` leading directions, ``Y V``.

    Source: Halko, Martinsson, Tropp 2011, SIAM Rev. 53(2), section 4.2: with oversampling the leading left singular
    vectors of ``Y = G^T G [P, E]`` are kept; here by the eigenvectors V of its small Gram matrix.

    Args:
        sketch: (size, rank + p).
        rank: number of columns to return.

    Returns:
        (size, rank), float32, not normalised. If the sketch is zero or not finite, its first columns, which
        ``orthonormalize`` rejects.
    """
    sketch = sketch.float()
    longest = torch.linalg.vector_norm(sketch, dim=0).max()
    if not bool(torch.isfinite(longest)) or float(longest) == 0.0:
        return sketch[:, :rank]
    sketch = sketch / longest
    _, vectors = torch.linalg.eigh(sketch.T @ sketch)
    leading: Tensor = sketch @ vectors[:, -rank:].flip(1)
    return leading


def orthonormalize(sketch: Tensor) -> Tensor | None:
    """Returns orthonormal columns with the span of ``sketch``, by three passes of shifted Cholesky QR.

    The columns are first scaled to norm one. This removes the graded scale of ``G^T G P`` (the norm of column i is
    about sigma_i^2), which is most of its ill-conditioning. The first pass is shifted so that the factorisation
    exists; two more restore orthogonality. If a factorisation fails or the result misses ``ORTHONORMAL_TOLERANCE``,
    Householder QR is used.

    Args:
        sketch: (size, r) with size >= r, any floating dtype.

    Returns:
        (size, r), float32; None if the sketch is not finite or zero.

    Source: Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa 2020, "Shifted Cholesky QR for computing the QR
    factorization of ill-conditioned matrices", SIAM J. Sci. Comput. 42(1).
    """
    sketch = sketch.float()
    norms = torch.linalg.vector_norm(sketch, dim=0)
    largest = norms.max()
    if not bool(torch.isfinite(largest)) or float(largest) == 0.0:
        return None
    basis: Tensor = sketch / norms.clamp_min(torch.finfo(torch.float32).tiny)
    size, rank = basis.shape
    identity = torch.eye(rank, device=basis.device)
    for extra in (_shift(size, rank), 0.0, 0.0):  # the two unshifted passes restore orthogonality
        factor, info = torch.linalg.cholesky_ex(basis.T @ basis + extra * identity)
        if int(info) != 0:
            return _householder(sketch)
        basis = torch.linalg.solve_triangular(factor.T, basis, upper=True, left=False)
    if not float((basis.T @ basis - identity).abs().max()) <= ORTHONORMAL_TOLERANCE:
        return _householder(sketch)
    return basis


def _householder(matrix: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis
