"""Measures the scratch memory of library kernels on this machine, once per operation, shapes and dtypes.

A fake run sees the output of a matrix product but not oneDNN's workspace for it in bfloat16, nor the workspace of an
attention kernel, nor the casts inside an elementwise operation of mixed dtypes. Each such operation runs once on real
zeros of the same layout. Its allocations are counted and the result is cached for the process.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_fx.runtime.measure.meter import memory_timeline
from galore_fx.runtime.torch_private import outside_all_modes, tree_map

# Operations with larger operands are not measured; their scratch is unknown and counts as 0.
LARGEST_OPERANDS_BYTES = 2**30
_OPERATIONS = (
    "aten::mm",
    "aten::addmm",
    "aten::addmm_",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "aten::convolution",
    "aten::convolution_backward",
    "aten::linalg_solve_triangular",
    "aten::linalg_cholesky_ex",
)
# These take minutes on large operands. Their scratch is little more than a copy of the operand, which is counted.
LARGEST_FACTORISED_BYTES = 2**26
_FACTORISATIONS = ("aten::_linalg_svd", "aten::linalg_qr", "aten::_linalg_eigh")
_MEASURED: dict[object, int] = {}


def kernel_scratch_bytes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Returns the peak bytes that an operation on the CPU allocates besides its outputs.

    Args:
        func: an ``OpOverload``.
        args, kwargs: its arguments; tensors may be fake, because only their layout counts.

    Returns:
        Bytes; 0 if the operation neither is a library kernel nor mixes dtypes, or is too large to be measured.
    """
    name = func.name().partition(".")[0]
    if name not in (*_OPERATIONS, *_FACTORISATIONS) and not _mixes_dtypes(func, args):
        return 0
    if name in _FACTORISATIONS and args[0].nbytes > LARGEST_FACTORISED_BYTES:
        return int(args[0].nbytes)
    described: list[object] = []

    def describe(value: Any) -> Any:
        described.append((value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value)
        return value

    tree_map(describe, (list(args), dict(kwargs)))
    key = (func, *described)
    if key not in _MEASURED:
        sizes = [torch.Size(entry[0]).numel() * entry[2].itemsize for entry in described if isinstance(entry, tuple)]
        _MEASURED[key] = 0 if sum(sizes) > LARGEST_OPERANDS_BYTES else _measure(func, args, kwargs)
    return _MEASURED[key]


def _mixes_dtypes(func: Any, args: Sequence[Any]) -> bool:
    """Returns whether an operation is elementwise with mixed dtypes, so that it casts operands into temporaries."""
    if torch.Tag.pointwise not in getattr(func, "tags", ()):
        return False
    return len({value.dtype for value in args if isinstance(value, Tensor) and value.ndim}) > 1


def _measure(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    def real(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu").zero_()

    with outside_all_modes(), torch.no_grad():
        real_args, real_kwargs = tree_map(real, list(args)), tree_map(real, dict(kwargs))
        func(*real_args, **real_kwargs)  # warms up: memory that is allocated once and kept is not scratch
        outputs: list[Any] = []
        timeline = memory_timeline(lambda: outputs.append(func(*real_args, **real_kwargs)))
    return max(live for _, live in timeline) - timeline[-1][1]
