"""Compiles and runs one lowered step: its numbers on the host, its body in one kernel.

With 8-bit states the body runs in slices, so that the decoded states stay small.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from galore_fx.passes.optimizer_graph.lower_to_subspace import SCALE, lower_to_subspace
from galore_fx.passes.optimizer_graph.merge_branches import merge_branches, numbers_of
from galore_fx.passes.optimizer_graph.quantize_states import quantize_states
from galore_fx.passes.optimizer_graph.round_weights import (
    CompiledRounding,
    part_key,
    product_dtype,
    round_full_weight,
    row_blocks,
    wide_rows,
)
from galore_fx.passes.optimizer_graph.trace_step import TracedStep
from galore_fx.runtime.formats.blockwise import BLOCK
from galore_fx.runtime.formats.quantized_tensor import QuantizedTensor
from galore_fx.runtime.formats.state_format import SCALES
from galore_fx.runtime.remainder.scaled import Complement
from galore_fx.runtime.step.realised_movement import SAMPLE_ELEMENTS, MovementProbe
from galore_fx.runtime.subspace.projected_parameter import ProjectedParameter
from galore_fx.runtime.subspace.projection import ProjectedDim, add_back_projection_, back_projected_rows
from galore_fx.runtime.torch_private import compile_for_any_length
from galore_fx.runtime.uniform_loop import alike

# Most elements that a step with 8-bit states decodes at once, and so the length of its float32 temporaries.
SLICE_ELEMENTS = 2**20
# Size of the cache of a step's numbers: parameters that lag behind (unused in a step) have their own step count.
NUM_CACHED_STEPS = 8


class Remainder(Protocol):
    """Interface of the step of a weight's residual, which is applied after the step in the subspace."""

    def add_to_(self, weight: Tensor) -> None:
        """Adds the step to the weight (m, n) in place, after the update in the subspace."""

    def add_to_rows_(self, change: Tensor, rows: slice) -> None:
        """Adds the step to the change of some rows of the weight, (rows, n), in place."""


class CompiledUpdate:
    """One lowered step with all its branches; Inductor compiles the body at the first call, for any length.

    Args:
        traced: the branches.
        rounding: the compiled end of steps on projected weights in 16 or 8 bits.
        projected: whether the parameter is projected.
        unsigned: names of the states that are never negative if the states have 8 bits, otherwise None.
        rounded: whether the weight is unprojected, has 16 bits and is rounded stochastically.

    Raises:
        OptimizerError: a branch cannot be lowered.
    """

    def __init__(
        self,
        traced: Sequence[TracedStep],
        rounding: CompiledRounding,
        *,
        projected: bool,
        unsigned: frozenset[str] | None = None,
        rounded: bool = False,
    ) -> None:
        self._traced = traced
        self._rounding = rounding
        self._lowered = [lower_to_subspace(step, projected=projected) for step in traced]
        assert all(lowered.scalars[-1] == SCALE for lowered in self._lowered)
        self._new_scalars = traced[0].new_scalars
        self._needs_weight = any(lowered.needs_weight for lowered in self._lowered)
        body = merge_branches(self._lowered, projected=projected)
        self._is_quantized = unsigned is not None
        if unsigned is not None:
            body = quantize_states(body, traced[0].new_tensors, unsigned)
        if rounded:
            body = round_full_weight(body)
        self._uncompiled = body
        self._body: Callable[..., Any] = compile_for_any_length(body)
        self._numbers = functools.lru_cache(NUM_CACHED_STEPS)(self._compute_numbers)

    def branch_for(self, values: tuple[float, ...], born: bool) -> int | None:
        """Returns the index of the branch whose guards hold for these numbers, or None.

        Args:
            values: the scalars of the traced step, in order.
            born: whether this step creates the missing states of the parameter.
        """
        taken = (i for i, step in enumerate(self._traced) if step.first == born and step.holds_for(values))
        return next(taken, None)

    def __call__(
        self,
        branch: int,
        weight: Tensor,
        grad: Tensor,
        tensors: list[Tensor],
        state: dict[str, Tensor],
        values: tuple[float, ...],
        record: ProjectedParameter | None,
        rounding_key: Tensor | None,
        complement: Complement | None = None,
        remainder: Remainder | None = None,
        probe: MovementProbe | None = None,
    ) -> None:
        """Runs prologue, body and back-projection.

        Args:
            branch: index from ``branch_for``.
            weight, grad, state, record, rounding_key, complement, probe: see ``UpdateCompiler.update``.
            tensors: the state tensors, in the order of the body's inputs.
            values: the numbers of the prologue, the scale last.
            remainder: step of the weight's residual, if it has one.
        """
        if record is None:
            self._step_plain(branch, weight, grad, tensors, state, values, rounding_key, probe)
            return
        read = record.project(weight) if self._needs_weight else None
        update, factor = self.step_low(branch, grad, tensors, state, values, weight.dtype, read)
        dtype = product_dtype(weight.dtype)
        if record.right_basis is not None:
            update = update.to(dtype) @ record.right_basis.to(dtype).T
        if complement is not None:
            update = complement.join(update)
        is_in_place = rounding_key is None and not isinstance(weight, QuantizedTensor)
        if is_in_place and probe is None:
            _add_in_place(weight, update, record, factor, complement, remainder)
            return
        basis = record.basis.dequantized() if isinstance(record.basis, QuantizedTensor) else record.basis
        update, basis = update.to(dtype), basis.to(dtype)

        def change(rows: slice) -> Tensor:
            added = back_projected_rows(update, basis, record.dim, rows)
            for part in (complement, remainder):
                if part is not None:
                    part.add_to_rows_(added, rows)
            return added

        part_rows = len(basis) if record.dim is ProjectedDim.ROWS else len(weight)
        if probe is not None:
            sample = row_blocks(weight, SAMPLE_ELEMENTS, part_rows)
            rows = sample[probe.turn % len(sample)]
            before = wide_rows(weight, rows)
            intended = before * (factor - 1.0) + change(rows)
        if is_in_place:
            _add_in_place(weight, update, record, factor, complement, remainder)
        else:
            self._rounding.add_(weight, change, factor, rounding_key, part_rows)
        if probe is not None:
            probe.note(intended, wide_rows(weight, rows) - before)

    @property
    def needs_weight(self) -> bool:
        """Whether the step reads the weight, as L2 decay in Adam does."""
        return self._needs_weight

    def step_low(
        self,
        branch: int,
        grad: Tensor,
        tensors: list[Tensor],
        state: dict[str, Tensor],
        values: tuple[float, ...],
        weight_dtype: torch.dtype,
        read: Tensor | None,
    ) -> tuple[Tensor, float]:
        """Runs the step on coordinates of the weight in a subspace, or on some of its entries.

        Args:
            branch, tensors, state, values: see ``__call__``.
            grad: gradient of the coordinates or entries; consumed.
            weight_dtype: dtype of the weight.
            read: the corresponding part of the weight, the shape of ``grad``, if the step reads the weight.

        Returns:
            The change, of the shape of ``grad``, and the factor applied to the weight before it.
        """
        numbers, factor, new_scalars = self._numbers(branch, values, _compute_dtype(weight_dtype), grad.device)
        reads = [] if read is None else [read]
        if self._is_quantized:
            scales = [state[name + SCALES] for name in self._traced[0].new_tensors]
            self._run_quantized([grad], tensors, scales, reads, numbers)
            update = grad
        else:
            update = self._body(*_flat([grad, *tensors, *reads]), numbers).view(grad.shape)
        self._note(state, new_scalars)
        return update, factor

    def _step_plain(
        self,
        branch: int,
        weight: Tensor,
        grad: Tensor,
        tensors: list[Tensor],
        state: dict[str, Tensor],
        values: tuple[float, ...],
        key: Tensor | None,
        probe: MovementProbe | None,
    ) -> None:
        numbers, _, new_scalars = self._numbers(branch, values, _compute_dtype(weight.dtype), weight.device)
        scales = [state[name + SCALES] for name in self._traced[0].new_tensors] if self._is_quantized else []
        look = None
        if probe is not None and all(tensor.is_contiguous() for tensor in (weight, grad, *tensors)):
            look = self._look_at(probe, weight, grad, tensors, scales, numbers, key)
        if self._is_quantized:
            self._run_quantized([weight, grad], tensors, scales, [], numbers, key)
        else:
            self._body(*_flat([weight, grad, *tensors]), numbers, *_keys(key, 0))
        if look is not None:
            look()
        self._note(state, new_scalars)

    def _look_at(
        self,
        probe: MovementProbe,
        weight: Tensor,
        grad: Tensor,
        tensors: list[Tensor],
        scales: list[Tensor],
        numbers: Tensor,
        key: Tensor | None,
    ) -> Callable[[], None]:
        """Runs the body on copies of some elements, with the weight in float32 or wider, so that nothing is rounded.

        Returns:
            A function to call after the step; it notes the intended and the realised movement in the probe.
        """
        num_elements = weight.numel() // BLOCK * BLOCK if self._is_quantized else weight.numel()  # whole blocks
        first = probe.turn % max(1, num_elements // SAMPLE_ELEMENTS) * SAMPLE_ELEMENTS
        part = slice(first, min(first + SAMPLE_ELEMENTS, num_elements))
        wide = weight.view(-1)[part].to(numbers.dtype)
        before = wide.clone()
        copies = [wide, *(tensor.view(-1)[part].clone() for tensor in (grad, *tensors))]
        if self._is_quantized:
            rows = slice(first // BLOCK, part.stop // BLOCK)
            copies = [tensor.view(-1, BLOCK) for tensor in copies]
            self._uncompiled(*copies, *(scale[rows].clone() for scale in scales), numbers, *_keys(key, 0))
        else:
            self._uncompiled(*copies, numbers, *_keys(key, 0))
        intended = wide.view(-1) - before
        return lambda: probe.note(intended, weight.view(-1)[part].to(before.dtype) - before)

    def _note(self, state: dict[str, Tensor], new_scalars: tuple[float, ...]) -> None:
        for name, value in zip(self._new_scalars, new_scalars, strict=True):
            state[name].fill_(value)

    def _run_quantized(
        self,
        whole: list[Tensor],
        codes: list[Tensor],
        scales: list[Tensor],
        read: list[Tensor],
        numbers: Tensor,
        key: Tensor | None = None,
    ) -> None:
        """Runs the body over whole blocks, a slice at a time, so that the decoded states stay small.

        Args:
            whole: tensors with one element per code that are written: the weight if unprojected, the gradient.
            codes, scales: uint8 codes and float32 scales of each state, changed in place.
            read: tensors like ``whole`` that are only read.
            numbers: 1-D tensor of the numbers of the body.
            key: 0-d int32 key of the rounding, if the body rounds a weight.
        """
        flat = [tensor.contiguous().view(-1).detach() for tensor in (*whole, *read)]
        num_elements = flat[0].numel()
        num_whole = num_elements // BLOCK
        num_slices = -(-num_whole * BLOCK // SLICE_ELEMENTS)
        for part in alike(range(num_slices)):
            blocks = slice(part * num_whole // num_slices, (part + 1) * num_whole // num_slices)
            elements = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
            self._run_blocks(
                [tensor[elements] for tensor in flat],
                len(whole),
                [code[elements] for code in codes],
                [scale[blocks] for scale in scales],
                numbers,
                _keys(key, elements.start),
            )
        rest = num_elements - num_whole * BLOCK
        if rest:
            # The last, partial block runs in padded copies of two blocks: a length of one would be specialised.
            padded = [functional.pad(tensor[-rest:], (0, 2 * BLOCK - rest)) for tensor in flat]
            last_codes = [functional.pad(code[-BLOCK:], (0, BLOCK)) for code in codes]
            last_scales = [functional.pad(scale[-1:], (0, 1)) for scale in scales]
            start = num_whole * BLOCK
            self._run_blocks(padded, len(whole), last_codes, last_scales, numbers, _keys(key, start))
            for target, source, length in [
                *((target, source, rest) for target, source in zip(flat[: len(whole)], padded, strict=False)),
                *((target, source, BLOCK) for target, source in zip(codes, last_codes, strict=True)),
                *((target, source, 1) for target, source in zip(scales, last_scales, strict=True)),
            ]:
                target[-length:] = source[:length]
        for tensor, made in zip(whole, flat, strict=False):
            if not tensor.is_contiguous():
                tensor.copy_(made.view(tensor.shape))

    def _run_blocks(
        self,
        whole: list[Tensor],
        num_written: int,
        codes: list[Tensor],
        scales: list[Tensor],
        numbers: Tensor,
        keys: Sequence[Tensor],
    ) -> None:
        # Detached, as in ``_flat``: Dynamo would tell slices from copies, a difference that does not matter here.
        in_blocks = [tensor.view(-1, BLOCK).detach() for tensor in (*whole[:num_written], *codes, *whole[num_written:])]
        scales = [scale.detach() for scale in scales]
        for tensor in in_blocks:
            torch._dynamo.mark_static(tensor, 1)
        num_first = num_written + len(codes)
        self._body(*in_blocks[:num_first], *scales, *in_blocks[num_first:], numbers, *keys)

    def _compute_numbers(
        self, branch: int, values: tuple[float, ...], dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, float, tuple[float, ...]]:
        lowered = self._lowered[branch]
        out = lowered.prologue(*values)
        slots, factor, new_scalars = out[: lowered.num_slots], out[lowered.num_slots], out[lowered.num_slots + 1 :]
        numbers = numbers_of(self._lowered, branch, slots)
        return torch.tensor(numbers, dtype=dtype).to(device), factor, tuple(new_scalars)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the arithmetic: that of the weight, but at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _add_in_place(
    weight: Tensor,
    update: Tensor,
    record: ProjectedParameter,
    factor: float,
    complement: Complement | None,
    remainder: Remainder | None,
) -> None:
    """Adds the back-projection to the weight in one product, then the residual; rounds as torch does."""
    add_back_projection_(weight, update, record.basis, record.dim, factor)
    if complement is not None:
        complement.take_from_(weight)
    if remainder is not None:
        remainder.add_to_(weight)


def _keys(key: Tensor | None, start: int) -> tuple[Tensor, ...]:
    """Returns the last input of a body that rounds, for a part that begins at element ``start``; () without a key."""
    key = part_key(key, start)
    return () if key is None else (key,)


def _flat(tensors: list[Tensor]) -> list[Tensor]:
    """Returns flat views if all tensors are contiguous, otherwise the tensors: a copy would lose the update.

    The views are detached, so that Dynamo sees no views: it would distinguish views of matrices from views of vectors.
    """
    return [t.view(-1).detach() for t in tensors] if all(t.is_contiguous() for t in tensors) else tensors
