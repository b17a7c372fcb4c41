"""Norms that do not lose the digits, or leave the range, of 16 bits."""

import torch
from torch import Tensor


def wide_norm(tensor: Tensor, dim: int | None = None) -> Tensor:
    """The 2-norm in float32, or in float64 where the tensor is.

    Args:
        tensor: any shape.
        dim: along which, kept as 1; None for all, 0-d.
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dim, keepdim=dim is not None, dtype=dtype)
    return norm
