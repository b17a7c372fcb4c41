"""From a region's Dynamo graph to compiled variants of it.

    Dynamo graph (kept)  --copy-->  passes  -->  AOTAutograd + Inductor  -->  variant
                                                                              one per gradient forms of its weights

Dynamo calls a region with the graph's inputs. The weights are among them; their records say in which form their
gradients are wanted now, and so which variant runs. Layers with equal graphs share one region and its variants, and so
do models in one process.
"""

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from galore_fx.errors import CaptureError
from galore_fx.passes.model_graph.dequantize_inputs import StoredInput, dequantize_inputs
from galore_fx.passes.model_graph.find_linears import read_by_one_linear
from galore_fx.passes.model_graph.group_heads import HeadGroup, group_heads, same_inputs, shared_heads
from galore_fx.passes.model_graph.inline_checkpoints import inline_checkpoints
from galore_fx.passes.model_graph.order_consumers import compile_region
from galore_fx.passes.model_graph.project_gradients import ProjectionTarget, project_gradients
from galore_fx.passes.model_graph.share_bases import owner_place, share_bases, weight_inputs
from galore_fx.passes.model_graph.slice_single_indices import slice_single_indices
from galore_fx.passes.pass_runner import GraphPass, PassRecord, run_passes
from galore_fx.runtime.formats.quantized_tensor import QuantizedTensor, gradient_leaf
from galore_fx.runtime.subspace.basis_heads import HeadBasis
from galore_fx.runtime.subspace.projected_parameter import REGISTRY, GradientForm, ProjectedParameter
from galore_fx.runtime.torch_private import (
    FakeTensorMode,
    compiler_settings,
    current_tracing_context,
    saves_elsewhere,
    tracing,
)

Regions = dict[tuple[object, ...], "CapturedRegion"]
FinishGraph = Callable[[fx.GraphModule, Sequence[object], float], Callable[..., Any]]
# Regions by their graph, for all models of the process; a region holds no tensor of a model.
_REGIONS: Regions = {}


def forget_regions() -> None:
    """Drops what is shared between models, so that the next capture compiles anew."""
    _REGIONS.clear()


class RegionCompiler:
    """The Dynamo backend of one model's regions, and what the model has used of it so far.

    Attributes:
        last_run: the region that ran last.

    Args:
        regions: where captured regions are kept; those of the process by default.
        finish: makes a callable of a graph after all passes, its inputs and the activation budget; AOTAutograd and
            Inductor by default.
        all_forms: compile the steady and the refreshing form when a region is captured, as is done anyway where sizes
            are symbols; else each when it is first run.
    """

    def __init__(
        self, regions: Regions | None = None, finish: FinishGraph | None = None, *, all_forms: bool = False
    ) -> None:
        self._regions = _REGIONS if regions is None else regions
        self._finish = finish or compile_region
        self._all_forms = all_forms
        self.last_run: CapturedRegion | None = None
        self._used: dict[CapturedRegion, set[tuple[object, ...]]] = {}
        self._weights: dict[CapturedRegion, dict[str, int]] = {}

    @property
    def num_graphs(self) -> int:
        """Distinct region graphs of this model."""
        return len(self._used)

    @property
    def num_variants(self) -> int:
        """Compiled forms of them that this model has run."""
        return sum(len(keys) for keys in self._used.values())

    @property
    def regions(self) -> list["CapturedRegion"]:
        """What has been captured for this model."""
        return list(self._used)

    def weights_of(self, region: "CapturedRegion") -> set[str]:
        """Names of the projected weights that have gone through a region, of all blocks that share it."""
        return set(self._weights[region])

    def heads_of(self, region: "CapturedRegion") -> dict[str, tuple[HeadGroup, ...]]:
        """The attention heads in the projected weights that have gone through a region, by the weight's name."""
        return {
            name: tuple(group for group in region.heads if group.placeholder == placeholder)
            for name, placeholder in self._weights[region].items()
        }

    def keeping(self, activation_budget: float) -> Callable[..., Any]:
        """The Dynamo backend for blocks that keep this share of their activations, 0 to 1."""
        return functools.partial(self.capture, compile_now=True, activation_budget=activation_budget)

    def capture(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[object],
        *,
        compile_now: bool,
        activation_budget: float = 1.0,
    ) -> Callable[..., Any]:
        """Captures a graph; what it returns runs the variant that its inputs' records ask for.

        Args:
            gm: the graph, as Dynamo gives it.
            example_inputs: its inputs.
            compile_now: compile the variant that this very call needs already, and not when it is first run.
            activation_budget: share of the activations that is kept.
        """
        gm, pass_records = run_passes(copy_graph(gm), example_inputs, [inline_checkpoints, slice_single_indices])
        identity = _graph_identity(gm)
        key = None if identity is None else (*identity, activation_budget)
        region = self._regions.get(key) if key is not None else None
        if region is None:
            region = CapturedRegion(gm, pass_records, self._finish, activation_budget)
            if key is not None:
                self._regions[key] = region
        used, weights = self._used.setdefault(region, set()), self._weights.setdefault(region, {})
        if compile_now:
            records = region.records(example_inputs)
            if region.is_symbolic or self._all_forms:
                region.compile_forms(records)
            region.variant_for(records)
        region.finish_capture()

        def call(*inputs: object) -> Any:
            self.last_run = region
            records = region.records(inputs)
            for record in records:
                if record is not None and record.form is GradientForm.CONSUMED:
                    record.num_uses += 1
            used.add(region.key(records))
            weights.update({r.name: i for r, i in zip(records, region.parameters, strict=True) if r})
            return region.variant_for(records)(*region.graph_inputs(inputs, records))

        return call


class CapturedRegion:
    """One graph and its compiled variants.

    Attributes:
        pass_records: what each pass did: to the graph itself, and then for each variant.
        parameters: which of the graph's inputs are parameters.
    """

    def __init__(
        self, gm: fx.GraphModule, pass_records: list[PassRecord], finish: FinishGraph, activation_budget: float
    ) -> None:
        self.pass_records: list[list[PassRecord]] = [pass_records]
        self._finish = finish
        self._activation_budget = activation_budget
        self._capturing = True
        self._has_named_heads = False
        self._gm = gm
        self._context = current_tracing_context()
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self._fakes = [node.meta["example_value"] for node in placeholders]
        self.parameters = [i for i, value in enumerate(self._fakes) if isinstance(value, torch.nn.Parameter)]
        self._variants: dict[tuple[object, ...], Callable[..., Any]] = {}

    @functools.cached_property
    def heads(self) -> tuple[HeadGroup, ...]:
        """The attention heads in the graph's weights."""
        return tuple(group_heads(self._gm))

    def finish_capture(self) -> None:
        """Called when Dynamo goes on to make its guards."""
        self._capturing = False

    def records(self, inputs: Sequence[object]) -> list[ProjectedParameter | None]:
        """The record of each parameter among the inputs, None for one that is not projected."""
        found = [REGISTRY.get(inputs[i]) for i in self.parameters]
        new: list[int] = []
        for placeholder, record in zip(self.parameters, found, strict=True):
            if record is not None and record.consumes and placeholder not in self._read_once:
                record.stop_consuming()
            elif record is not None and record.consumes and saves_elsewhere():
                record.form = GradientForm.FULL  # for this window
            if record is not None and record.is_hooked:
                record.form = GradientForm.FULL  # a hook of the user's is to see the gradient
            if record is not None and record.shared_roles and not _has_heads(record) and not record.is_underway:
                self._share_heads(placeholder, record)
                new += [placeholder] if _has_heads(record) else []
        if new:
            share_bases(new, dict(zip(self.parameters, found, strict=True)), self._same_inputs, self.heads)
        return found

    @functools.cached_property
    def _read_once(self) -> frozenset[int]:
        return read_by_one_linear(self._gm)

    @functools.cached_property
    def _same_inputs(self) -> dict[int, list[int]]:
        return same_inputs(self._gm)

    def _share_heads(self, placeholder: int, record: ProjectedParameter) -> None:
        """Lets the heads of a weight share a basis, if the graph shows that it has such heads."""
        heads = shared_heads(self.heads, placeholder, record.shared_roles, record.rank)
        if heads is not None:
            record.take_source(HeadBasis(record.weight, heads, record.rank, record.dim, record.source.key))
            return
        record.shared_roles = frozenset()  # an ordinary matrix
        if not self.heads and not self._has_named_heads:
            self._has_named_heads = True
            warnings.warn(
                f"cross_head: no attention is recognised in the block of {record.name}; its weights are projected as "
                "ordinary matrices. print(galore_fx.explain(model, batch)) shows the heads that are found",
                stacklevel=2,
            )

    def graph_inputs(self, inputs: Sequence[object], records: list[ProjectedParameter | None]) -> list[object]:
        """What the variant takes for the inputs that Dynamo gives."""
        extra = (
            value for record in records if record for value in weight_inputs(record, record.form, records).values()
        )
        values = [*inputs, *extra]
        wants_gradient = self._wants_gradient(records, [record.form if record else None for record in records])
        return _in_parts(values, _stored_inputs(values, wants_gradient))

    def _wants_gradient(
        self, records: list[ProjectedParameter | None], forms: Sequence[GradientForm | None]
    ) -> set[int]:
        """Inputs whose full gradient is wanted, if they have one."""
        return {
            index
            for index, record, form in zip(self.parameters, records, forms, strict=True)
            if record is None or form is GradientForm.FULL
        }

    def key(self, records: list[ProjectedParameter | None]) -> tuple[object, ...]:
        """What tells the variants apart."""
        return self._key(records, [record.form if record else None for record in records])

    @property
    def is_symbolic(self) -> bool:
        """Whether sizes of the graph are symbols, which stand for every size that Dynamo's guards let through."""
        sizes = (size for fake in self._fakes if isinstance(fake, torch.Tensor) for size in fake.shape)
        return any(isinstance(value, torch.SymInt) for value in (*sizes, *self._fakes))

    def compile_forms(self, records: list[ProjectedParameter | None]) -> None:
        """Compiles the steady and the refreshing form now, while what they demand of the symbols becomes guards."""
        for due in (False, True):
            forms = [record.form_of(due=due) if record else None for record in records]
            key = self._key(records, forms)
            if key not in self._variants:
                self._variants[key] = self._compile(records, forms)

    def variant_for(self, records: list[ProjectedParameter | None]) -> Callable[..., Any]:
        """The compiled form for these gradient forms, made now if it is the first time."""
        forms = [record.form if record else None for record in records]
        key = self._key(records, forms)
        variant = self._variants.get(key)
        if variant is None:
            try:
                variant = self._variants[key] = self._compile(records, forms)
            except Exception as error:
                if self._capturing:
                    raise  # Dynamo names the cause
                raise CaptureError(f"{type(error).__name__}: {error}") from error
        return variant

    def _key(
        self, records: list[ProjectedParameter | None], forms: Sequence[GradientForm | None]
    ) -> tuple[object, ...]:
        of_weights = (
            (record.graph_key(form), owner_place(record, records)) if record and form else None
            for record, form in zip(records, forms, strict=True)
        )
        return (compiler_settings(), *of_weights)

    def _compile(
        self, records: list[ProjectedParameter | None], forms: Sequence[GradientForm | None]
    ) -> Callable[..., Any]:
        wanted = [
            (index, record, form)
            for index, record, form in zip(self.parameters, records, forms, strict=True)
            if record is not None and form is not None and form is not GradientForm.FULL
        ]
        targets = [
            ProjectionTarget(
                index,
                record.name,
                record.dim,
                tuple(weight_inputs(record, form, records)),
                None if (place := owner_place(record, records)) is None else self.parameters[place],
                form is GradientForm.CONSUMED,
                record.source.name,
            )
            for index, record, form in wanted
        ]
        fake_mode = self._context.fake_mode
        assert fake_mode is not None and fake_mode.shape_env is not None
        given = (value for _, record, form in wanted for value in weight_inputs(record, form, records).values())
        extra = [_fake_like(value, fake_mode) for value in given]
        values = [*self._fakes, *extra]
        stored = _stored_inputs(values, self._wants_gradient(records, forms), fake_mode)
        passes: list[GraphPass] = [functools.partial(project_gradients, targets=targets)] if targets else []
        if stored:
            passes.append(functools.partial(dequantize_inputs, targets=stored))
        with tracing(self._context):
            gm, pass_records = run_passes(copy_graph(self._gm), values, passes)
            self.pass_records.append(pass_records)
            num_guards = len(fake_mode.shape_env.guards)
            compiled = self._finish(gm, _in_parts(values, stored), self._activation_budget)
        # Once Dynamo has made its guards, a demand on a symbol goes unchecked: such a form runs as it is.
        unchecked = not self._capturing and len(fake_mode.shape_env.guards) > num_guards
        return gm.forward if unchecked else compiled


def _has_heads(record: ProjectedParameter) -> bool:
    return isinstance(record.source, HeadBasis)


def _fake_like(value: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake tensor with the layout of a real or fake one, its sizes fixed."""
    if isinstance(value, QuantizedTensor):
        return value.with_parts(lambda part: _fake_like(part, mode))
    with mode:
        like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return like.requires_grad_(value.requires_grad)


def _stored_inputs(
    values: Sequence[object], wants_gradient: set[int], fake_mode: FakeTensorMode | None = None
) -> list[StoredInput]:
    """The quantised tensors among a graph's inputs, with fresh leaves where a gradient is wanted."""
    found = []
    for index, value in enumerate(values):
        if isinstance(value, QuantizedTensor):
            leaf = None
            if value.requires_grad and index in wants_gradient:
                with fake_mode or contextlib.nullcontext():
                    leaf = gradient_leaf(value)
                leaf = leaf if fake_mode is None else _fake_like(leaf, fake_mode)
            found.append(StoredInput(index, value, leaf))
    return found


def _in_parts(values: Sequence[object], stored: Sequence[StoredInput]) -> list[object]:
    """The inputs as ``dequantize_inputs`` wants them."""
    flat = list(values)
    for each in stored:
        flat[each.placeholder] = each.tensor.codes
        flat += each.parts[1:]
    return flat


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own with the same nodes: Dynamo still reads its graph's placeholders after the backend ran."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, values)
    graph.output(output)
    for old, new in values.items():
        new.meta = {key: copy.copy(value) for key, value in old.meta.items() if key != "grapharg"}
    copied = fx.GraphModule(gm, graph)
    copied.meta.pop("dynamo_compile_id", None)
    return copied


def _graph_identity(gm: fx.GraphModule) -> tuple[object, ...] | None:
    """What two captures must share to be one region; None where sizes are symbols, which belong to one capture."""
    autocast = [torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in ("cpu", "cuda")]
    recomputed = tuple(node.name for node in gm.graph.nodes if "recompute" in node.meta)
    described: list[object] = [gm.code, recomputed, *autocast]
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            return None
        if node.op != "placeholder":
            continue
        value = node.meta["example_value"]
        if not isinstance(value, torch.Tensor) or any(isinstance(size, torch.SymInt) for size in value.shape):
            return None
        described.append(
            (
                *(type(value), getattr(value, "bits", None), tuple(value.shape), value.stride()),
                *(value.dtype, value.device, value.requires_grad),
            )
        )
    return tuple(described)
