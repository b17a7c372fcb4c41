"""An operation of a backward graph that hands the two factors of a gradient to the update of its weight.

    consume_gradient(A, B, W, Z, after)   ->   R        G = A^T B is applied to W inside

It stands where a graph would compute ``R``, so that an update which needs all of G can work through it in parts while A
and B are there anyway, and no G leaves the graph. The optimizer says what to do by the record's ``consume``.

The compiler does not know that W changes. So nothing that the graph still makes of W may come later: whoever compiles
the backward lets every reader of W be an input ``after`` (passes/model_graph/order_consumers.py). And W is known by its
identity, so it must come out of the backward's saved tensors as what it was: with hooks on those nothing is consumed.
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
    """Runs above autograd, so that a change of the weight counts as one, and above every mode that watches."""
    record = REGISTRY.get(weight)
    if record is None or record.consume is None:  # traced: a tensor that stands for the weight
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
