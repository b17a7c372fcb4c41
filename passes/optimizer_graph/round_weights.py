"""Rounds a new weight to its storage format of 16 or 8 bits, without materialising the weight in float32.

A projected weight is rounded at the end of a step, in row blocks: one library product computes the rows of the
back-projection, a residual is added to them, and one fused kernel widens, adds and rounds. The length of the kernel is
dynamic, so it serves weights of every shape.

    W  <-  round(c W + back_project(L) + ...)

An unprojected weight is rounded inside the compiled body:

    before   W.copy_(W')
    after    W.copy_(rounded_as(W', W, key))
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from galore_fx.runtime.code_objects import own_code_object
from galore_fx.runtime.formats.counter_rng import uniform_numbers
from galore_fx.runtime.formats.groupwise import GROUP, add_and_round
from galore_fx.runtime.formats.quantized_tensor import QuantizedTensor
from galore_fx.runtime.formats.rounding import rounded_as
from galore_fx.runtime.torch_private import compile_for_any_length
from galore_fx.runtime.uniform_loop import alike

# Bytes of the back-projection computed at once: they fit into a CPU's cache, or keep a GPU busy with one launch.
BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**25}
_NUM_FACTORS = 8
# (rows) -> the change of these rows of a weight, (rows, n); a new tensor, which the caller may overwrite.
Change = Callable[[slice], Tensor]


class CompiledRounding:
    """The compiled ends of steps: one kernel for weights in 8 bits and one for weights in 16 bits.

    Args:
        device: device type that sets the block size; None takes the weight's own. A plan for CUDA is simulated on CPU
            tensors and passes "cuda".
    """

    def __init__(self, device: str | None = None) -> None:
        self._device = device
        self._round_codes: Callable[..., None] = compile_for_any_length(own_code_object(_round_codes))
        self._round_elements: Callable[..., None] = compile_for_any_length(own_code_object(_round_elements))
        self._factor = functools.lru_cache(_NUM_FACTORS)(_factor_on)

    def add_(self, weight: Tensor, change: Change, decay: float, key: Tensor | None, part_rows: int) -> None:
        """Computes ``W <- decay * W + change`` in place, rounded once.

        Args:
            weight: (m, n), in 8 or 16 bits; changed.
            change: computes the change of given rows.
            decay: factor of the weight; 1.0 leaves it.
            key: 0-d int32 key of the random numbers of stochastic rounding (``counter_rng.key_of``); None rounds to
                nearest.
            part_rows: rows of each part of the weight; no call of ``change`` crosses a part's boundary.
        """
        num_bytes = BLOCK_BYTES.get(self._device or weight.device.type, BLOCK_BYTES["cpu"])
        blocks = row_blocks(weight, num_bytes // product_dtype(weight.dtype).itemsize, part_rows)
        factor = self._factor(decay, weight.device)
        for rows in alike(blocks):
            added = change(rows)
            if isinstance(weight, QuantizedTensor):
                self._add_to_codes(weight, rows, added, factor, key)
            else:
                part = weight[rows]
                shape = (-1,) if part.is_contiguous() else tuple(part.shape)
                start = part_key(key, rows.start * weight.shape[1])
                # Detached, so that Dynamo sees no views: it would distinguish them by the tensors they view.
                self._round_elements(part.view(shape).detach(), added.reshape(shape).detach(), factor, start)

    def _add_to_codes(
        self, weight: QuantizedTensor, rows: slice, added: Tensor, factor: Tensor, key: Tensor | None
    ) -> None:
        groups = slice(rows.start * weight.shape[1] // GROUP, rows.stop * weight.shape[1] // GROUP)
        parts = [part[groups].detach() for part in weight.parts]
        added = added.view(-1, GROUP).detach()
        for tensor in (parts[0], added):
            torch._dynamo.mark_static(tensor, 1)
        self._round_codes(*parts, added, factor, part_key(key, groups.start * GROUP))


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the back-projection: the weight's, or float32 for float16, whose range is too small."""
    return torch.float32 if dtype is torch.float16 else dtype


def row_blocks(weight: Tensor, num_elements: int, part_rows: int) -> list[slice]:
    """Returns row blocks of about ``num_elements`` elements at most, each inside one part of ``part_rows`` rows.

    Blocks of a weight in 8 bits hold whole quantisation groups.
    """
    num_rows, num_cols = weight.shape
    unit = GROUP // math.gcd(GROUP, num_cols) if isinstance(weight, QuantizedTensor) else 1
    size = max(1, num_elements // (num_cols * unit)) * unit
    return [
        slice(first, min(first + size, start + part_rows))
        for start in range(0, num_rows, part_rows)
        for first in range(start, start + part_rows, size)
    ]


def wide_rows(weight: Tensor, rows: slice) -> Tensor:
    """Returns a copy of a row block (see ``row_blocks``) of a weight, (rows, n), in float32 or wider."""
    if isinstance(weight, QuantizedTensor):
        num_cols = weight.shape[1]
        groups = slice(rows.start * num_cols // GROUP, rows.stop * num_cols // GROUP)
        parts = [part[groups] for part in weight.parts]
        shape = (rows.stop - rows.start, num_cols)
        return QuantizedTensor(*parts, weight.bits, shape, torch.float32).dequantized()
    return weight[rows].to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def round_full_weight(body: fx.GraphModule) -> fx.GraphModule:
    """Makes the body of an unprojected parameter's step round a weight in 16 bits stochastically.

    Args:
        body: from ``merge_branches`` or ``quantize_states``, with the placeholder ``weight``; changed.

    Returns:
        ``body``, with one more placeholder after all others: ``key``, 0-d int32.
    """
    placeholders = {str(node.target): node for node in body.graph.nodes if node.op == "placeholder"}
    weight = placeholders["weight"]
    with body.graph.inserting_after(list(placeholders.values())[-1]):
        key = body.graph.placeholder("key")
    for node in body.graph.find_nodes(op="call_method", target="copy_"):
        if node.args[0] is weight:
            with body.graph.inserting_before(node):
                node.args = (weight, body.graph.call_function(rounded_as, (node.args[1], weight, key)))
    body.graph.lint()
    body.recompile()
    return body


def part_key(key: Tensor | None, start: int) -> Tensor | None:
    """Returns the key of a part that begins at element ``start``, so that the draws do not depend on the partition."""
    if key is None:
        return None
    return (key + ((start + 2**31) % 2**32 - 2**31) if start else key).detach()


def _factor_on(decay: float, device: torch.device) -> Tensor:
    return torch.tensor(decay, dtype=torch.float32).to(device)


def _round_elements(weight: Tensor, change: Tensor, factor: Tensor, key: Tensor | None) -> None:
    moved = weight.to(torch.float32) * factor + change.to(torch.float32)
    weight.copy_(moved if key is None else rounded_as(moved, weight, key))


def _round_codes(
    codes: Tensor, scales: Tensor, zeros: Tensor, change: Tensor, factor: Tensor, key: Tensor | None
) -> None:
    if key is None:
        thresholds = torch.full((), 0.5, device=codes.device)
    else:
        counters = torch.arange(codes.numel(), dtype=torch.int32, device=codes.device).view(codes.shape)
        thresholds = uniform_numbers(counters, key)
    new = add_and_round(codes, scales, zeros, change, factor, thresholds)
    for part, value in zip((codes, scales, zeros), new, strict=True):
        part.copy_(value)
