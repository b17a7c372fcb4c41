"""Custom operation of a backward graph that passes both factors of a gradient to the update of its weight.

    consume_gradient(A, B, W, Z, after)   ->   R        G = A^T B is applied to W inside

The graph calls it instead of computing ``R``. An update that needs all of G can thus process G in parts while A and B
are alive, and no G leaves the graph. The optimizer defines the update by the record's ``consume``.

The compiler does not know that W changes, so every value computed from W must come earlier. The pass
``order_consumers`` (passes/model_graph) therefore adds all readers of W to the inputs ``after``. W is recognised by its
identity, so the backward must unpack the same tensor that was saved; under saved-tensor hooks nothing is consumed.
"""

import torch
from torch import Tensor

from galore_fx.errors import UsageError
from galore_fx.runtime.subspace.projected_parameter import REGISTRY
from galore_fx.runtime.torch_private import below_autograd

_LIBRARY = torch.library.Library("galore_fx", "DEF")
_LIBRARY.define("consume_gradient(Tensor rows, Tensor cols, Tensor weight, Tensor leaf, Tensor[] after) -> Tensor")

consume_gradient = torch.ops.galore_fx.consume_gradient.default


def _consume(rows: Tensor, cols: Tensor, weight: Tensor, leaf: Tensor, after: list[Tensor]) -> Tensor:
    """Runs the update at the Autograd key: the weight's version increases, and dispatch modes see each operation."""
    record = REGISTRY.get(weight)
    if record is None or record.consume is None:  # traced with a fake tensor for the weight
        with below_autograd():
            done: Tensor = consume_gradient(rows, cols, weight, leaf, after)
        return done
    with torch.no_grad():
        consumed = record.consume(rows, cols)
    return _refuse() if consumed is None else consumed


def _refuse(*_arguments: object) -> Tensor:
    raise UsageError(
        "a backward of update='in-backward' finds no weight to update: the compiled model is gone, or its weights were "
        "saved for the backward as copies of themselves"
    )


def _shape_only(rows: Tensor, cols: Tensor, weight: Tensor, leaf: Tensor, after: list[Tensor]) -> Tensor:
    return leaf.new_empty(leaf.shape)


_LIBRARY.impl("consume_gradient", _consume, "Autograd")
_LIBRARY.impl("consume_gradient", _refuse, "CompositeExplicitAutograd")
torch.library.register_fake("galore_fx::consume_gradient", _shape_only, lib=_LIBRARY)
