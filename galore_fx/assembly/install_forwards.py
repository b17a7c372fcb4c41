"""Replaces a model's forwards by dispatchers to their compiled forms."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from galore_fx.passes.model_graph.find_regions import Region, find_stems
from galore_fx.passes.model_graph.head_compiler import HeadCompiler
from galore_fx.passes.model_graph.region_compiler import RegionCompiler
from galore_fx.runtime.code_objects import own_code_object
from galore_fx.runtime.dispatch.forwards import CompiledForward, OpaqueForward, RegionFunction, TrainingForward
from galore_fx.runtime.torch_private import dispatch_compiler

# Most variants of one compiled function: a batch's shapes, masks and modes make variants, layers do not.
_RECOMPILE_LIMIT = 64
# After the graph break at the opaque stem Dynamo also compiles the functions that the model's forward wraps. Simulated
# steps of the planner add entries of their own.
_HEAD_RECOMPILE_LIMIT = 256


def install(
    model: nn.Module,
    regions: Sequence[Region],
    compiler: RegionCompiler,
    head: HeadCompiler | None,
    *,
    policy: Sequence[float],
    strict: bool,
) -> "InstalledBlocks":
    """Installs the dispatchers on the blocks, on the modules that call them and on the model.

    Args:
        model: the model, changed in place.
        regions: regions of its blocks.
        compiler: compiler of their graphs.
        head: compiler that rewrites head and loss; None leaves them unchanged.
        policy: for each block the share of its activations that it keeps, 0 to 1.
        strict: whether a block that cannot be captured raises CaptureError, when it is called.
    """
    blocks = InstalledBlocks(regions, compiler, strict=strict)
    blocks.set_policy(policy)
    for forward in blocks.forwards:
        forward.module.forward = forward
    training = None
    stems = find_stems(model, regions)
    if stems and not _has_own_forward(model) and head is not None:
        for stem in stems:
            stem.forward = OpaqueForward(stem, stem.forward)
        training = dispatch_compiler(
            own_code_object(type(model).forward), head, recompile_limit=_HEAD_RECOMPILE_LIMIT, whole=False
        )
    blocks.whole = TrainingForward(model, model.forward, training)
    model.forward = blocks.whole
    return blocks


class InstalledBlocks:
    """The blocks' new forwards and the compiled functions that they share.

    There is one compiled function per forward function and share of kept activations. Layers of one class with the same
    share use the same function.

    Attributes:
        forwards: new forwards of the blocks, in the order of the regions.
        whole: new forward of the model.
    """

    whole: TrainingForward

    def __init__(self, regions: Sequence[Region], compiler: RegionCompiler, *, strict: bool) -> None:
        self._compiler = compiler
        self._strict = strict
        self._plain = [_forward_function(region.module) for region in regions]
        self._functions: dict[tuple[object, float], RegionFunction] = {}
        self.forwards = [CompiledForward(r.name, r.module, r.module.forward) for r in regions]

    def set_policy(self, policy: Sequence[float]) -> None:
        """Sets the share of its activations (0 to 1) that each block keeps from its next forward on."""
        for forward, plain, share in zip(self.forwards, self._plain, policy, strict=True):
            if (plain, share) not in self._functions:
                compiled = dispatch_compiler(
                    own_code_object(plain), self._compiler.keeping(share), recompile_limit=_RECOMPILE_LIMIT
                )
                self._functions[plain, share] = RegionFunction(compiled, self._strict)
            forward.function = self._functions[plain, share]

    @property
    def failures(self) -> dict[str, str]:
        """Names of the blocks that run uncompiled, each with the reason."""
        return {forward.name: forward.function.failure for forward in self.forwards if forward.function.failure}


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a forward other than the class's is set on the instance; a copy of a compiled model has the class's."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _forward_function(module: nn.Module) -> Callable[..., Any]:
    """Returns the module's forward with the module as first argument: the class's, or the one set on the instance."""
    if not _has_own_forward(module):
        function: Callable[..., Any] = type(module).forward
        return function
    own = vars(module)["forward"]

    def forward(_module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return forward
