"""torch's multi-head attention with projected weights.

``nn.MultiheadAttention`` passes its weights to ``F.multi_head_attention_forward``, which multiplies by them itself. A
copy of that function runs here with our ``linear``; masks, heads and dropout remain torch's.

Cross-attention splits a packed weight (3 E, E) by rows. A basis of the columns serves all parts, and ``R`` is split
like the weight. The entries of a sparse residual are split too, if each part begins at a boundary of their row groups.
A basis of the rows, or the gradient of drawn heads from any part, would need the whole product at once; such a weight
keeps its full gradient.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from galore_fx.runtime.layers.projected_linear import WeightLayout, projected_linear
from galore_fx.runtime.remainder.sparse import BLOCK_ROWS, num_blocks
from galore_fx.runtime.subspace.projection import ProjectedDim
from galore_fx.runtime.torch_private import attention_with_linear

# Inputs from the weight's record as ``projected_linear`` takes them, value of a ``ProjectedDim``, name of the source.
Projection = tuple[Mapping[str, Tensor], str, str]


def projected_attention(projections: Mapping[str, Projection], **arguments: Any) -> Any:
    """Calls ``F.multi_head_attention_forward`` with a backward that delivers projected gradients.

    Args:
        projections: the projection of each projected weight, by the weight's argument name.
        **arguments: all arguments of ``F.multi_head_attention_forward``, by name.

    Returns:
        The attention (L, N, E) or (L, E), and the attention weights or None.
    """
    weights = {name: _Projected(arguments[name], *projection) for name, projection in projections.items()}
    return _ATTENTION(**{**arguments, **weights})


@dataclasses.dataclass(frozen=True)
class _Projected:
    """A weight (out, in) on its way through the attention to ``linear``; it may be split on the way."""

    weight: Tensor
    inputs: Mapping[str, Tensor]
    dim: str
    source: str

    def split(self, sizes: list[int]) -> Any:
        splits_blocks = "residual_leaf" in self.inputs and any(size % BLOCK_ROWS for size in sizes[:-1])
        if self.dim == ProjectedDim.ROWS.value or "head_features" in self.inputs or splits_blocks:
            return self.weight.split(sizes)
        numbers = {"leaf": sizes, "residual_leaf": sizes, "residual_columns": [num_blocks(size) for size in sizes]}
        by_rows = [name for name in numbers if name in self.inputs]
        parts = zip(*(self.inputs[name].split(numbers[name]) for name in by_rows), strict=True)
        return tuple(
            dataclasses.replace(self, weight=weight, inputs={**self.inputs, **dict(zip(by_rows, part, strict=True))})
            for weight, part in zip(self.weight.split(sizes), parts, strict=True)
        )

    def chunk(self, count: int) -> Any:
        return self.split([self.weight.shape[0] // count] * count)

    def size(self, dim: int) -> int:
        return self.weight.size(dim)

    @property
    def shape(self) -> Any:
        return self.weight.shape


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, _Projected):
        return _PLAIN_LINEAR(x, weight, bias)  # type: ignore[no-any-return]
    return projected_linear(x, weight.weight, bias, weight.inputs, WeightLayout.OUT_IN.value, weight.dim, weight.source)


_ATTENTION, _PLAIN_LINEAR = attention_with_linear(_linear)
