"""galore_fx as a backend of ``torch.compile``: the whole model is one graph, the update is deferred.

    model = torch.compile(model, backend="galore_fx", options={"rank": 128})
    optimizer = galore_fx.optimizer(model, functools.partial(torch.optim.AdamW, lr=1e-3))

The backend sees a graph and its parameters but not the model; ``optimizer`` makes the records that tell it how each
weight's gradient is wanted. Before that a training forward runs as it is, and its backward raises: another optimizer
would find no gradient on the projected weights and train nothing.

Not handled: head and loss stay as the model says (its logits are formed), and the update cannot run in the backward.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from galore_fx.assembly.assemble import assemble
from galore_fx.assembly.compiled_model import Compiled
from galore_fx.assembly.decisions import decide
from galore_fx.assembly.reparametrize import normalized
from galore_fx.assembly.request import Request
from galore_fx.assembly.user_optimizer import OptimizerChoice
from galore_fx.errors import ModelError, SettingError, UsageError
from galore_fx.passes.model_graph.region_compiler import RegionCompiler, copy_graph
from galore_fx.recipes.parts import UNSET, parts_of
from galore_fx.recipes.recipe import Recipe
from galore_fx.runtime.torch_private import (
    WeakTensorKeyDictionary,
    backend_settings,
    compile_graph,
    refuse_unsupported_modes,
)

NAME = "galore_fx"
_NO_OPTIMIZER = (
    "this forward ran before galore_fx.optimizer(model) was called, so no gradient can be delivered. Call "
    "optimizer = galore_fx.optimizer(model) after torch.compile(model, backend='galore_fx'), step that one, and run "
    "the forward again"
)


class _BackendModel:
    """What the backend knows of one model: its graphs, its options, whether an optimizer exists."""

    def __init__(self, options: dict[str, Any] | None) -> None:
        self.compiler = RegionCompiler()
        self.options = options
        self.is_built = False


# By parameter: the only thing that a graph and a model have in common.
_MODELS: Any = WeakTensorKeyDictionary()


def galore_fx_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend that ``torch.compile`` finds under the name ``galore_fx``.

    Args:
        gm: a graph from Dynamo.
        example_inputs: its inputs.
        options: ``budget``, ``recipe`` and overrides, as of ``galore_fx.compile``.
        mode: none of torch's is supported.

    Raises:
        SettingError: a mode, compiled autograd or CUDA graphs, or options other than those of ``galore_fx.optimizer``.
    """
    if mode is not None:
        raise SettingError(
            f"mode={mode!r} is not supported by backend='galore_fx' (it stands for CUDA graphs or autotuning of "
            "Inductor's own backend); leave it out, and give options={'budget': ..., 'recipe': ...}"
        )
    refuse_unsupported_modes()
    trained = [value for value in example_inputs if isinstance(value, nn.Parameter) and value.requires_grad]
    if not trained or not torch.is_grad_enabled():
        return compile_graph(copy_graph(gm), example_inputs)
    model = _model_of(trained, dict(options or {}))
    captured = model.compiler.capture(gm, example_inputs, compile_now=model.is_built)
    plain = copy_graph(gm).forward

    def call(*inputs: object) -> Any:
        return captured(*inputs) if model.is_built else _refuse_backward(plain(*inputs))

    return call


def optimizer(
    model: nn.Module, optimizer: OptimizerChoice = torch.optim.AdamW, *, options: Mapping[str, Any] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of a model that was compiled by ``torch.compile(model, backend="galore_fx")``.

    Args:
        model: what ``torch.compile`` returned, or the module inside it.
        optimizer: as of ``galore_fx.compile``.
        options: those given to ``torch.compile``, where it was given a function and not the model.

    Returns:
        The optimizer to step; the same one when called again. ``model.galore_fx`` has ``.plan`` and ``.stats()``.

    Raises:
        UsageError: the model was compiled by another backend.
        SettingError, ModelError, OptimizerError, BudgetError: as of ``galore_fx.compile``.
    """
    inner = getattr(model, "_orig_mod", model)
    name, given = backend_settings(model)
    if name not in (None, NAME):
        raise UsageError(
            f"this {type(inner).__name__} was compiled with backend={name!r}; compile it with "
            "torch.compile(model, backend='galore_fx'), or use galore_fx.compile(model)"
        )
    compiled = getattr(inner, "galore_fx", None)
    trained = [p for p in inner.parameters() if p.requires_grad]
    if isinstance(compiled, Compiled):
        if not trained or trained[0] not in _MODELS:
            raise ModelError(
                f"this {type(inner).__name__} has been compiled by galore_fx.compile; it has its optimizer"
            )
        return compiled.optimizer
    options = given if options is None else dict(options)
    known = _model_of(trained, options)
    settings = _one_graph_settings(known.options or {})
    budget, recipe = settings.pop("budget", None), settings.pop("recipe", "auto")
    request = Request(budget, recipe=recipe, optimizer=optimizer, overrides=settings)
    with normalized(inner, request) as (asked, normalization):
        if normalization is not None:
            raise SettingError(
                "weight_norm needs galore_fx.compile: it exchanges layers of the model, which torch.compile has "
                "looked at before"
            )
        assembled = assemble(inner, decide(inner, asked), optimizer, known.compiler, None)
    inner.galore_fx = Compiled(assembled)
    # torch's wrapper is a module of its own, with a zero_grad of its own.
    vars(model)["zero_grad"] = inner.zero_grad
    known.is_built = True
    return assembled.optimizer


def _one_graph_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with what follows from there being one graph.

    Raises:
        SettingError: they ask for what one graph cannot do.
    """
    only = {name: part.one_graph for name, part in parts_of(Recipe).items() if part.one_graph is not UNSET}
    settings = {**only, **options}
    for name, value in only.items():
        if settings[name] != value:
            raise SettingError(
                f"{name}={settings[name]!r} needs galore_fx.compile; the backend has one graph, which defers the "
                f"update and renews all bases together: use {name}={value!r}"
            )
    return settings


def _model_of(trained: Sequence[nn.Parameter], options: dict[str, Any] | None) -> _BackendModel:
    """The model that these parameters belong to; a new one where none of them is known.

    Raises:
        SettingError: it is known with other options.
    """
    known = next((_MODELS[p] for p in trained if p in _MODELS), None)
    if known is None:
        known = _BackendModel(options)
    if options is not None and not known.is_built:
        known.options = options  # nothing has been made of the earlier ones
    elif options is not None and options != known.options:
        raise SettingError(
            f"the model was given options={known.options} before and options={options} now; "
            "give torch.compile and galore_fx.optimizer the same"
        )
    for parameter in trained:
        _MODELS[parameter] = known
    return known


def _refuse_backward(outputs: Any) -> Any:
    def refuse(_grad: Tensor) -> None:
        raise UsageError(_NO_OPTIMIZER)

    for value in outputs:
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(refuse)
    return outputs
