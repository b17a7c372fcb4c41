"""How a basis is found: from a gradient, from a sketch of it, or drawn."""

import torch
from torch import Tensor

from galore_fx.runtime.subspace.projection import ProjectedDim

# Largest |P^T P - I| that is accepted from the Cholesky factorisations before Householder QR takes over.
ORTHONORMAL_TOLERANCE = 1e-5


def sketch(rows: Tensor, cols: Tensor, projected: Tensor, dim: ProjectedDim) -> Tensor:
    """``G G^T P`` (m, r) for ROWS, ``G^T G P`` (n, r) for COLS, from ``R`` and without forming ``G``.

    Source: the power iteration of Halko, Martinsson, Tropp 2011, SIAM Rev. 53(2), algorithm 4.4, started from the
    previous basis; in 16 bits R is balanced first (``subspace.balanced``).
    """
    projected = balanced(projected, dim)
    return rows.T @ (cols @ projected.T) if dim is ProjectedDim.ROWS else cols.T @ (rows @ projected)


def balanced(projected: Tensor, dim: ProjectedDim) -> Tensor:
    """R in 16 bits with its vectors made nearly orthonormal, which span the same; R itself in wider formats.

    A sketch ``G^T (G P)`` squares what the singular values differ by: where the least that counts is a sixtieth of the
    largest, its direction is three thousand times weaker in the sketch, and lost in the rounding of bfloat16. Of
    ``G^T W`` with W orthonormal it is sixty times weaker. One pass of shifted Cholesky QR, in float32.

    Args:
        projected: R, (r, n) for ROWS, (m, r) for COLS.
        dim: the projected dimension.

    Returns:
        Of R's shape and dtype; with vectors of norm one only, where they cannot be factorised.

    Source: Halko, Martinsson, Tropp 2011, SIAM Rev. 53(2), algorithm 4.4, which orthonormalises after each product.
    """
    if projected.dtype.itemsize > 2:
        return projected
    with torch.autocast(projected.device.type, enabled=False):  # which would make the products in 16 bits
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
    """What is added to the diagonal of a Gram matrix of columns of norm one, so that it can be factorised.

    The source's is 11 (size r + r (r + 1)) u ||A||^2, with ||A||^2 <= r for such columns. It is a worst case; capped,
    the condition after the pass is at most sqrt(r / 1e-2).

    Source: Fukaya et al. 2020, SIAM J. Sci. Comput. 42(1).
    """
    return min(11 * (size * rank + rank * (rank + 1)) * 2.0**-24 * float(rank), 1e-2)


def sketch_of(grad: Tensor, basis: Tensor, dim: ProjectedDim) -> Tensor:
    """One step of subspace iteration from a full gradient: ``G G^T P`` (m, r) for ROWS, ``G^T G P`` (n, r) for COLS.

    In 16 bits what is between the two products is balanced.

    Source: Halko, Martinsson, Tropp 2011, SIAM Rev. 53(2), algorithm 4.4, started from the previous basis.
    """
    if dim is ProjectedDim.ROWS:
        sketch: Tensor = grad @ balanced((grad.T @ basis).T, dim).T
    else:
        sketch = grad.T @ balanced(grad @ basis, dim)
    return sketch


def exact_basis(grad: Tensor, rank: int, dim: ProjectedDim) -> Tensor | None:
    """The leading singular vectors of a gradient, by LAPACK's or cuSOLVER's SVD in float32.

    Returns:
        (m, r) left vectors for ROWS, (n, r) right vectors for COLS, in the gradient's dtype; None where the
        gradient is not finite or the SVD does not converge, so that the caller keeps the old basis.

    Source: GaLore, arXiv:2403.03507, algorithm 2.
    """
    bases = exact_bases(grad, rank)
    return None if bases is None else bases[0] if dim is ProjectedDim.ROWS else bases[1]


def exact_bases(grad: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """The leading singular vectors of both sides, (m, r) and (n, r); None as for ``exact_basis``."""
    if not bool(torch.isfinite(torch.linalg.vector_norm(grad))):
        return None
    try:
        left, _, right = torch.linalg.svd(grad.float(), full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    return left[:, :rank].to(grad.dtype).contiguous(), right[:rank].T.to(grad.dtype).contiguous()


def random_basis(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Orthonormal columns of a Gaussian matrix: (size, r), float32, on the generator's device."""
    gaussian = torch.randn(shape, generator=generator, device=generator.device)
    return _householder(gaussian)


def leading_columns(sketch: Tensor, rank: int) -> Tensor:
    """Of a sketch with more columns than the rank, the combinations in which it is longest: ``Y V``, (size, rank).

    Source: Halko, Martinsson, Tropp 2011, SIAM Rev. 53(2), section 4.2: with oversampling the leading left singular
    vectors of ``Y = G^T G [P, E]`` are kept; here by the eigenvectors V of its small Gram matrix.

    Args:
        sketch: (size, rank + p). Returned as it is where it is not finite, for ``orthonormalize`` to say so.
        rank: columns wanted.
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
    """Orthonormal columns spanning those of ``sketch``, by shifted Cholesky QR, three passes of it.

    The columns are first scaled to norm one, which takes the graded scale out of ``G^T G P`` (column i is about
    sigma_i^2 long) and is most of its ill-conditioning. The first pass is shifted so that the factorisation
    exists; two more restore orthogonality. Where the result still misses ``ORTHONORMAL_TOLERANCE``, Householder
    QR is used.

    Args:
        sketch: (size, r) with size >= r, any floating dtype.

    Returns:
        (size, r), float32; None where the sketch is not finite or zero.

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
    for extra in (_shift(size, rank), 0.0, 0.0):  # what the shift leaves, the two other passes make orthonormal
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
