"""Leaves that own no storage, whose gradient is all that is wanted of them."""

import torch
from torch import Tensor


def storage_free_leaf(shape: tuple[int, int], like: Tensor) -> Tensor:
    """A zero tensor of this shape that requires grad and owns one element of storage."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(shape).requires_grad_()
