"""The end of a step over a weight in 8 bits: back-project, add and round, without the weight in its wide form.

    W (codes, scales, zeros)  <-  round(c dequantize(W) + back_project(L))

in row blocks of at most 2^20 elements: one library product for a block of the back-projection, then one fused kernel
that dequantises, adds, fits the grids and rounds. The kernel has a dynamic length and serves weights of every shape.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from galore_fx.runtime.compatibility import compile_for_any_length
from galore_fx.runtime.dispatch import own_code_object
from galore_fx.runtime.group_quantizer import GROUP, add_and_round
from galore_fx.runtime.quantized_tensor import QuantizedTensor
from galore_fx.runtime.random_thresholds import uniform_numbers
from galore_fx.runtime.repetition import alike
from galore_fx.runtime.subspace import ProjectedDim

BLOCK_ELEMENTS = 2**20


class WeightRounding:
    """The compiled end of a step, for weights of every shape; each has a kernel of its own."""

    def __init__(self) -> None:
        self._kernel: Callable[..., None] = compile_for_any_length(own_code_object(_round_block))

    def add_back_projection_(
        self, weight: QuantizedTensor, update: Tensor, basis: Tensor, dim: ProjectedDim, decay: float, key: int | None
    ) -> None:
        """``W <- decay * W + back_project(update)`` on the codes of W, in place.

        Args:
            weight: (m, n) in 8 bits, changed.
            update: (r, n) for ROWS, (m, r) for COLS, already scaled.
            basis: (m, r) or (n, r).
            dim: the projected dimension.
            decay: factor of the weight, 1.0 to leave it.
            key: of the random numbers (``random_thresholds.key_of``) that round up or down; None rounds to the nearest.
        """
        update = update.to(weight.dtype)
        basis = basis.dequantized() if isinstance(basis, QuantizedTensor) else basis
        factor = torch.tensor(decay, dtype=torch.float32).to(weight.device)
        for rows in alike(_row_blocks(weight.shape[0], weight.shape[1])):
            change = basis[rows] @ update if dim is ProjectedDim.ROWS else update[rows] @ basis.T
            groups = slice(rows.start * weight.shape[1] // GROUP, rows.stop * weight.shape[1] // GROUP)
            parts = [part[groups].detach() for part in weight.parts]
            numbers = None
            if key is not None:
                numbers = torch.tensor([key, groups.start * GROUP], dtype=torch.int32).to(weight.device)
            change = change.view(-1, GROUP).detach()
            for tensor in (parts[0], change):
                torch._dynamo.mark_static(tensor, 1)
            self._kernel(*parts, change, factor, numbers)


def _row_blocks(num_rows: int, num_cols: int) -> list[slice]:
    """Rows that are whole groups of elements together."""
    unit = GROUP // math.gcd(GROUP, num_cols)
    size = max(1, BLOCK_ELEMENTS // (num_cols * unit)) * unit
    return [slice(first, min(first + size, num_rows)) for first in range(0, num_rows, size)]


def _round_block(
    codes: Tensor, scales: Tensor, zeros: Tensor, change: Tensor, factor: Tensor, numbers: Tensor | None
) -> None:
    if numbers is None:
        thresholds = torch.full((), 0.5, device=codes.device)
    else:
        counters = torch.arange(codes.numel(), dtype=torch.int32, device=codes.device).view(codes.shape)
        thresholds = uniform_numbers(counters + numbers[1], numbers[0])
    new = add_and_round(codes, scales, zeros, change, factor, thresholds)
    for part, value in zip((codes, scales, zeros), new, strict=True):
        part.copy_(value)
