"""Transfers the states of an optimizer to a new basis.

    keep     unchanged: the moments of the old directions continue for the new ones (GaLore)
    rotate   transformed: C = P_new^T P_old,  m <- m C^T,  v <- (1 - b2^t) |(C o C)(v^ - m^ o m^) + (C m^)^2|
    reset    initial values, including the step count

The formulas hold for each row of states (m, r). Hats mark states with the bias of their t updates removed; C o C is the
elementwise square. ``v^ - m^ o m^`` is the variance of the elements of R. They are assumed uncorrelated, so the squares
of C mix their variances.

Source: LDAdam, Robert et al. 2024, arXiv:2410.16103, section 3.2 (rotate); FRUGAL, Zmushko et al. 2024,
arXiv:2411.07837 (reset).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from galore_fx.errors import OptimizerError
from galore_fx.runtime.formats.blockwise import BLOCK, decode, encode
from galore_fx.runtime.formats.state_format import SCALES, Layout
from galore_fx.runtime.subspace.projection import ProjectedDim

# States that are linear in the gradients, and states that are averages or sums of their squares.
_LINEAR = ("exp_avg", "momentum_buffer", "grad_avg")
_SQUARED = ("exp_avg_sq", "square_avg", "sum")
# Linear states that are means of gradients; momentum buffers are sums (RMSprop: of steps).
_MEANS = ("exp_avg", "grad_avg")


def check_rotates(layout: Layout, optimizer: str) -> None:
    """Checks that all states of an optimizer can be rotated.

    Raises:
        OptimizerError: some cannot; the message names them.
    """
    unknown = [name for name in layout.initial if name not in (*_LINEAR, *_SQUARED)]
    if unknown:
        raise OptimizerError(
            f"moments_on_refresh='rotate' does not know how to rotate {', '.join(unknown)} of {optimizer}; it knows "
            f"{', '.join((*_LINEAR, *_SQUARED))}. Use moments_on_refresh='keep' or 'reset'"
        )


def reset_moments(state: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> None:
    """Resets the states of a parameter to their initial values, in place.

    Args:
        state: states of the parameter. Its residual states do not depend on the basis and are kept.
        fresh: states of a new parameter.
    """
    for name, value in fresh.items():
        state[name].copy_(value)


def rotation_between(old: Tensor, new: Tensor, rank: int) -> Tensor:
    """Returns ``C = P_new^T P_old``, (rank, rank), float32; block-diagonal if the bases belong to one part."""
    rotation = new.float().T @ old.float()
    parts = rank // rotation.shape[0]
    return torch.block_diag(*[rotation] * parts) if parts > 1 else rotation


def rotate_moments(
    state: Mapping[str, Tensor],
    rotation: Tensor,
    dim: ProjectedDim,
    shape: torch.Size,
    group: Mapping[str, Any],
    layout: Layout,
) -> None:
    """Rotates the states of a parameter into a new basis, in place.

    Args:
        state: states of the parameter.
        rotation: C, (r, r), float32.
        dim: the projected dimension.
        shape: shape of R, (m, r) for COLS, (r, n) for ROWS.
        group: the param group.
        layout: per-parameter state of the optimizer class.
    """
    decoded = {name: _read(state, name, shape, layout) for name in layout.initial}
    first = next((decoded[name] for name in _MEANS if name in decoded), None)
    bias1, bias2 = _biases(state, group)
    # Squares first: they need the first moment before its rotation.
    for name, value in sorted(decoded.items(), key=lambda item: item[0] in _LINEAR):
        if name in _LINEAR:
            new = _rotated(value, rotation, dim)
        elif first is None:
            new = _rotated(value, rotation.square(), dim)
        else:
            mean = first / bias1
            variance = value / bias2 - mean.square()
            new = _rotated(variance, rotation.square(), dim)
            del variance
            new = new.add_(_rotated(mean, rotation, dim).square_()).abs_().mul_(bias2)
        _write(state, name, new, layout)


def _rotated(value: Tensor, rotation: Tensor, dim: ProjectedDim) -> Tensor:
    return value @ rotation.T if dim is ProjectedDim.COLS else rotation @ value


def _biases(state: Mapping[str, Tensor], group: Mapping[str, Any]) -> tuple[float, float]:
    """Returns 1 - b^t of both moments; 1 without betas or updates."""
    betas, step = group.get("betas"), state.get("step")
    num_updates = 0.0 if step is None else float(step)
    if betas is None or num_updates == 0.0:
        return 1.0, 1.0
    return 1.0 - float(betas[0]) ** num_updates, 1.0 - float(betas[1]) ** num_updates


def _read(state: Mapping[str, Tensor], name: str, shape: torch.Size, layout: Layout) -> Tensor:
    if not layout.format.is_quantized(shape.numel()):
        return state[name].float()
    values = decode(state[name].view(-1, BLOCK), state[name + SCALES], name not in layout.format.unsigned)
    return values.view(-1)[: shape.numel()].view(shape)


def _write(state: Mapping[str, Tensor], name: str, value: Tensor, layout: Layout) -> None:
    if not layout.format.is_quantized(value.numel()):
        state[name].copy_(value)
        return
    padded = torch.nn.functional.pad(value.reshape(-1), (0, -value.numel() % BLOCK)).view(-1, BLOCK)
    codes, scales = encode(padded, name not in layout.format.unsigned)
    state[name].copy_(codes.view(-1))
    state[name + SCALES].copy_(scales)
