"""Bounds the time of an operation from below: its arithmetic at the device's rate, or its bytes at the memory's.

The bound serves to rank alternatives of one model on one device, and for the shares of a step. It does not predict
seconds.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from galore_fx.runtime.torch_private import outside_all_modes, tree_leaves

_MADE_NOT_FILLED = ("aten::empty", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided")
_LOGGER = logging.getLogger(__name__)
# Every scaled dot-product attention, forward (query, key, value, ...) and backward (gradient, query, key, value, ...).
# torch has no formulas for the CPU kernels, and in torch 2.11 its formulas reject keys with fewer heads than queries.
_ATTENTIONS = frozenset(
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")
    for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
)
_ATTENTIONS_BACKWARD = frozenset(
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_backward")
    for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Rates of a device.

    Attributes:
        flops: floating-point operations per second of a matrix product, by dtype; float32's for other dtypes.
        bytes_per_second: memory bandwidth.
        source: source of the numbers.
    """

    flops: Mapping[torch.dtype, float]
    bytes_per_second: float
    source: str

    def seconds(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> float:
        """Returns the bound for one ``OpOverload`` in seconds; 0 for a view or an allocation. Tensors may be fake."""
        if getattr(func, "is_view", False) or func.name().partition(".")[0] in _MADE_NOT_FILLED:
            return 0.0
        tensors = [value for value in (*args, *kwargs.values(), out) if isinstance(value, Tensor)]
        return max(self._arithmetic(func, args, kwargs, out), self.transfer(tensors))

    def transfer(self, tensors: Sequence[Any]) -> float:
        """Returns the seconds in which the memory moves these tensors once."""
        return sum(value.nbytes for value in tensors if isinstance(value, Tensor)) / self.bytes_per_second

    def _arithmetic(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> float:
        try:
            flops = _num_flops(func.overloadpacket, args, kwargs, out)
        except Exception as error:
            # Times only rank plans: if a formula fails, only the bytes count.
            _note_unknown(func.name(), f"{type(error).__name__}: {error}")
            return 0.0
        if not flops:
            return 0.0
        dtype = next(value.dtype for value in tree_leaves(args) if isinstance(value, Tensor))
        return flops / self.flops.get(dtype, self.flops[torch.float32])


def _num_flops(packet: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> float:
    """Returns the floating-point operations of an operation's matrix products; 0 if it has none."""
    if packet in _ATTENTIONS:
        return attention_flops(*args[:3])
    if packet in _ATTENTIONS_BACKWARD:
        return attention_flops(*args[1:4], backward=True)
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=out))
    return 0.0


def attention_flops(query: Tensor, key: Tensor, value: Tensor, *, backward: bool = False) -> float:
    """Returns the floating-point operations of an attention's matrix products; ignores a causal mask.

    Args:
        query: (batch, heads, queries, head size).
        key, value: (batch, heads or fewer, keys, head size).
        backward: whether to count the gradients of all three and the recomputed scores instead.
    """
    batch, num_heads, num_queries, head = query.shape
    num_keys, value_head = value.shape[2], value.shape[3]
    widths = 3 * head + 2 * value_head if backward else head + value_head
    return 2.0 * batch * num_heads * num_queries * num_keys * widths


@functools.cache
def _note_unknown(name: str, reason: str) -> None:
    _LOGGER.warning("the arithmetic of %s is not counted in a plan's time: %s", name, reason)


# Dense tensor-core rate with float32 accumulation, and memory bandwidth: NVIDIA Ada GPU Architecture whitepaper v2.1,
# appendix A, GeForce RTX 4090.
RTX_4090 = Roofline(
    {torch.float32: 82.6e12, torch.bfloat16: 165.2e12, torch.float16: 165.2e12}, 1008e9, "RTX 4090, data sheet"
)


@functools.cache
def this_cpu() -> Roofline:
    """Measures the rates of this CPU: the best of three 512 x 512 products and of three copies of 64 MiB."""
    flops = {dtype: 2 * 512**3 / _best(_product(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    source, target = torch.ones(2**24), torch.empty(2**24)
    bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source))
    return Roofline(flops, bandwidth, "measured on this CPU")


def _product(dtype: torch.dtype) -> Any:
    matrix = torch.ones((512, 512), dtype=dtype)
    return lambda: matrix @ matrix


def _best(work: Any) -> float:
    times = []
    with outside_all_modes(), torch.no_grad():
        for _ in range(4):  # the first warms up
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    return min(times[1:])
