"""Offers galore_fx as a backend of ``torch.compile``: the whole model is one graph, and the update is deferred.

    model = torch.compile(model, backend="galore_fx", options={"rank": 128})
    optimizer = galore_fx.optimizer(model, functools.partial(torch.optim.AdamW, lr=1e-3))

The backend sees a graph and its parameters but not the model. ``optimizer`` creates the records that state in which
form each weight's gradient is needed. Before that call a training forward runs unchanged, and its backward raises: the
projected weights have no gradient for another optimizer, so it would train nothing.

Limits: head and loss stay as the model defines them (its logits are formed), and no update can run in the backward.
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
    """Holds the graphs and options of one model, and whether its optimizer exists."""

    def __init__(self, options: dict[str, Any] | None) -> None:
        self.compiler = RegionCompiler()
        self.options = options
        self.is_built = False


# Keyed by parameter, the only object that a graph and its model share.
_MODELS: Any = WeakTensorKeyDictionary()


def galore_fx_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compiles one graph; registered with ``torch.compile`` under the name ``galore_fx``.

    Args:
        gm: a graph from Dynamo.
        example_inputs: its inputs.
        options: ``budget``, ``recipe`` and overrides, as in ``galore_fx.compile``.
        mode: must be None; no mode of torch's is supported.

    Returns:
        A function that runs the graph. In training, before ``galore_fx.optimizer`` is called, its backward raises
        UsageError.

    Raises:
        SettingError: a mode is given, compiled autograd or CUDA graphs are on, or the options differ from those given
            to ``galore_fx.optimizer``.
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
    """Creates the optimizer of a model that was compiled by ``torch.compile(model, backend="galore_fx")``.

    Args:
        model: the result of ``torch.compile``, or the module inside it.
        optimizer: as in ``galore_fx.compile``.
        options: the options given to ``torch.compile``; needed only if it compiled a function instead of the model.

    Returns:
        The optimizer to step; a second call returns the same one. ``model.galore_fx`` has ``.plan`` and ``.stats()``.

    Raises:
        UsageError: the model was compiled by another backend.
        ModelError: the model was compiled by ``galore_fx.compile``, or as there.
        SettingError: an option needs ``galore_fx.compile``, differs from an earlier call, or as there.
        OptimizerError, BudgetError: as in ``galore_fx.compile``.
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
    # torch's wrapper is a separate module with its own zero_grad.
    vars(model)["zero_grad"] = inner.zero_grad
    known.is_built = True
    return assembled.optimizer


def _one_graph_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options completed by the values that a single graph requires.

    Raises:
        SettingError: an option has a value that a single graph does not support.
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
    """Returns the record of the model that these parameters belong to; a new one if none of them is known.

    Raises:
        SettingError: the model already has other options.
    """
    known = next((_MODELS[p] for p in trained if p in _MODELS), None)
    if known is None:
        known = _BackendModel(options)
    if options is not None and not known.is_built:
        known.options = options  # nothing has been built with the earlier options
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
