"""Puts the compiled forms in the place of a model's forwards."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from galore_fx.passes.model_graph.find_regions import Region, find_stems
from galore_fx.passes.model_graph.head_compiler import HeadCompiler
from galore_fx.passes.model_graph.region_compiler import RegionCompiler
from galore_fx.runtime.code_objects import own_code_object
from galore_fx.runtime.dispatch.forwards import CompiledForward, OpaqueForward, RegionFunction, TrainingForward
from galore_fx.runtime.torch_private import dispatch_compiler

# Forms of one region's graph before it counts as a defect: shapes, masks and modes of a batch, not layers.
_RECOMPILE_LIMIT = 64
# After the break at the opaque part Dynamo compiles what the model's forward wraps too. A planner's simulated steps are
# entries of their own.
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
    """Puts the dispatchers in place.

    Args:
        model: the model.
        regions: its blocks.
        compiler: compiles their graphs.
        head: rewrites head and loss, None to leave them.
        policy: for each block the share of its activations that it keeps.
        strict: a block that cannot be captured is an error.
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
    """The blocks' new forwards, and the compiled functions that they share.

    There is one compiled function per forward function and share of activations kept; all layers of one class that
    keep the same share use the same.

    Attributes:
        forwards: in the order of the regions.
        whole: the model's new forward.
    """

    whole: TrainingForward

    def __init__(self, regions: Sequence[Region], compiler: RegionCompiler, *, strict: bool) -> None:
        self._compiler = compiler
        self._strict = strict
        self._plain = [_forward_function(region.module) for region in regions]
        self._functions: dict[tuple[object, float], RegionFunction] = {}
        self.forwards = [CompiledForward(r.name, r.module, r.module.forward) for r in regions]

    def set_policy(self, policy: Sequence[float]) -> None:
        """From the next forward on, each block keeps this share of its activations."""
        for forward, plain, share in zip(self.forwards, self._plain, policy, strict=True):
            if (plain, share) not in self._functions:
                compiled = dispatch_compiler(
                    own_code_object(plain), self._compiler.keeping(share), recompile_limit=_RECOMPILE_LIMIT
                )
                self._functions[plain, share] = RegionFunction(compiled, self._strict)
            forward.function = self._functions[plain, share]

    @property
    def failures(self) -> dict[str, str]:
        """Names of the blocks that run uncompiled, with the reason."""
        return {forward.name: forward.function.failure for forward in self.forwards if forward.function.failure}


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a forward was set on the instance; a copy of a compiled model has its class's own there."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _forward_function(module: nn.Module) -> Callable[..., Any]:
    """What a call of the module runs, taking the module first: its class's forward, or one set on the instance."""
    if not _has_own_forward(module):
        function: Callable[..., Any] = type(module).forward
        return function
    own = vars(module)["forward"]

    def forward(_module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return forward
