"""Gives graphs that are traced on CPU tensors the attention kernels of a CUDA device.

With dropout, torch keeps the whole attention matrix on a CPU; CUDA's fused kernels never form it. Attention is the
operation whose kernel changes the memory of a step, so a plan for CUDA uses CUDA's kernels.

The choice and the workspaces follow torch's aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (order: flash,
memory-efficient, math; conditions for compute capability 8.0 and above) and flash_attn/flash_api.cpp (``mha_bwd``).
They are not verified on a GPU. The workspace of the memory-efficient kernel is unknown and counts as 0.
"""

import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

_LARGEST_FLASH_HEAD = 256
_FLOAT_BYTES = 4


class Kernel(enum.Enum):
    """Kernel of a scaled dot-product attention."""

    FLASH = "flash"
    EFFICIENT = "memory-efficient"
    MATH = "math"


def attention_of_cuda(gm: fx.GraphModule) -> None:
    """Replaces the attention in a graph of torch functions, in place, by the operations that CUDA would run."""
    for node in gm.graph.find_nodes(op="call_function", target=functional.scaled_dot_product_attention):
        node.target = _attention
    gm.recompile()


def choose_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, is_causal: bool
) -> Kernel:
    """Returns the kernel that torch chooses on a CUDA device of compute capability 8.9.

    Args:
        query: (batch, heads, queries, head size).
        key, value: (batch, heads or fewer, keys, head size).
        mask: added to the scores, or boolean, True for scores that count; None for no mask.
        dropout: dropout probability.
        is_causal: whether each query attends only to keys up to its own position.
    """
    head = query.shape[-1]
    is_square = query.shape[-2] == key.shape[-2]
    too_wide_for_8_9 = 192 < head <= 224 or (head > 224 and dropout > 0.0)
    if (
        query.dtype in (torch.float16, torch.bfloat16)
        and mask is None
        and head == value.shape[-1] <= _LARGEST_FLASH_HEAD
        and not too_wide_for_8_9
        and (is_square or not is_causal)
    ):
        return Kernel.FLASH
    has_as_many_heads = query.shape[1] == key.shape[1] == value.shape[1]
    if has_as_many_heads and query.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return Kernel.EFFICIENT
    return Kernel.MATH


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Computes ``scaled_dot_product_attention`` by the operation of the chosen kernel; fake tensors only."""
    if query.ndim != 4:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    kernel = choose_kernel(query, key, value, attn_mask, dropout_p, is_causal)
    if kernel is Kernel.MATH:
        out = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return out[0]  # type: ignore[no-any-return]
    scale = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    head = query.shape[-1]
    if kernel is Kernel.FLASH:
        query, key, value = (_padded(each) for each in (query, key, value))
        out = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, return_debug_mask=False, scale=scale
        )
        return out[0][..., :head]  # type: ignore[no-any-return]
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            minus_infinity = torch.full((), -math.inf, dtype=query.dtype, device=query.device)
            attn_mask = torch.where(attn_mask, torch.zeros_like(minus_infinity), minus_infinity)
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    out = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )
    return out[0]  # type: ignore[no-any-return]


def _padded(tensor: Tensor) -> Tensor:
    """Pads the head size to a multiple of 8, as flash attention requires."""
    missing = -tensor.shape[-1] % 8
    return functional.pad(tensor, (0, missing)) if missing else tensor


def cuda_kernel_scratch_bytes(func: Any, args: Sequence[Any], _kwargs: Mapping[str, Any]) -> int:
    """Returns the bytes that an operation's CUDA kernel allocates besides its outputs; 0 if they are unknown.

    Args:
        func: an ``OpOverload``.
        args: its arguments; tensors may be fake.
    """
    if func.overloadpacket is not torch.ops.aten._scaled_dot_product_flash_attention_backward:
        return 0
    query, key = args[1], args[2]
    batch, heads, queries, head = query.shape
    rounded_queries = -(-queries // 128) * 128
    rounded_head = -(-head // 32) * 32 if head <= 192 else 256
    sums = batch * heads * rounded_queries * _FLOAT_BYTES
    gradient_of_queries = sums * rounded_head
    num_kv_heads, keys = key.shape[1], key.shape[2]
    expanded = 2 * batch * keys * heads * head * query.itemsize if num_kv_heads != heads else 0
    return int(sums + gradient_of_queries + expanded)
