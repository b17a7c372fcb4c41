"""Compiles variants of a region from its Dynamo graph.

    Dynamo graph (kept)  --copy-->  passes  -->  AOTAutograd + Inductor  -->  variant
                                                                              one per combination of gradient forms

Dynamo calls a region with the graph's inputs, which include the weights. The records of the weights determine the
current form of their gradients, and thereby the variant that runs. Layers with equal graphs share one region and its
variants, even across models of one process.
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
# Regions of all models of the process, by graph; a region holds no tensor of a model.
_REGIONS: Regions = {}


def forget_regions() -> None:
    """Drops the regions that models share, so that the next capture compiles anew."""
    _REGIONS.clear()


class RegionCompiler:
    """Dynamo backend for one model's regions; records which variants the model uses.

    Attributes:
        last_run: the region that ran last, None before the first run.

    Args:
        regions: storage of captured regions; shared by the process by default.
        finish: compiles a graph after all passes, from the graph, its inputs and the activation budget; AOTAutograd
            and Inductor by default.
        all_forms: compile the steady and the refreshing form at capture, as always with symbolic sizes; otherwise each
            form is compiled when it first runs.
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
        """Number of distinct region graphs of this model."""
        return len(self._used)

    @property
    def num_variants(self) -> int:
        """Number of their variants that this model has run."""
        return sum(len(keys) for keys in self._used.values())

    @property
    def regions(self) -> list["CapturedRegion"]:
        """The regions that have been captured for this model."""
        return list(self._used)

    def weights_of(self, region: "CapturedRegion") -> set[str]:
        """Returns the names of the projected weights that have run through a region, from all blocks that share it."""
        return set(self._weights[region])

    def heads_of(self, region: "CapturedRegion") -> dict[str, tuple[HeadGroup, ...]]:
        """Returns the attention heads of the projected weights that have run through a region, by the weight's name."""
        return {
            name: tuple(group for group in region.heads if group.placeholder == placeholder)
            for name, placeholder in self._weights[region].items()
        }

    def keeping(self, activation_budget: float) -> Callable[..., Any]:
        """Returns the Dynamo backend for blocks that keep this share of their activations, 0 to 1."""
        return functools.partial(self.capture, compile_now=True, activation_budget=activation_budget)

    def capture(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[object],
        *,
        compile_now: bool,
        activation_budget: float = 1.0,
    ) -> Callable[..., Any]:
        """Captures a graph and returns a function that runs the variant for the records of its inputs.

        Args:
            gm: the graph from Dynamo; not changed.
            example_inputs: inputs of the graph.
            compile_now: compile the variant for the current records at once, instead of at its first run.
            activation_budget: share of the activations that is kept, 0 to 1.
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
        pass_records: records of the passes on the graph itself, then of the passes for each variant.
        parameters: indices of the graph's inputs that are parameters.
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
        """The attention heads of the graph's weights."""
        return tuple(group_heads(self._gm))

    def finish_capture(self) -> None:
        """Marks the end of the capture; Dynamo builds its guards next."""
        self._capturing = False

    def records(self, inputs: Sequence[object]) -> list[ProjectedParameter | None]:
        """Returns the record of each parameter input, None if not projected; adapts the records to the graph."""
        found = [REGISTRY.get(inputs[i]) for i in self.parameters]
        new: list[int] = []
        for placeholder, record in zip(self.parameters, found, strict=True):
            if record is not None and record.consumes and placeholder not in self._read_once:
                record.stop_consuming()
            elif record is not None and record.consumes and saves_elsewhere():
                record.form = GradientForm.FULL  # for this window
            if record is not None and record.is_hooked:
                record.form = GradientForm.FULL  # so that the user's hook sees the gradient
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
        """Lets the heads of a weight share a basis, if the graph has such heads in it."""
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
        """Returns the inputs of the variant for the inputs that Dynamo passes."""
        extra = (
            value for record in records if record for value in weight_inputs(record, record.form, records).values()
        )
        values = [*inputs, *extra]
        wants_gradient = self._wants_gradient(records, [record.form if record else None for record in records])
        return _in_parts(values, _stored_inputs(values, wants_gradient))

    def _wants_gradient(
        self, records: list[ProjectedParameter | None], forms: Sequence[GradientForm | None]
    ) -> set[int]:
        """Returns the indices of the inputs that need their full gradient, if they require one."""
        return {
            index
            for index, record, form in zip(self.parameters, records, forms, strict=True)
            if record is None or form is GradientForm.FULL
        }

    def key(self, records: list[ProjectedParameter | None]) -> tuple[object, ...]:
        """Returns the key of the variant for these records."""
        return self._key(records, [record.form if record else None for record in records])

    @property
    def is_symbolic(self) -> bool:
        """Whether sizes of the graph are symbols, which cover every size that Dynamo's guards admit."""
        sizes = (size for fake in self._fakes if isinstance(fake, torch.Tensor) for size in fake.shape)
        return any(isinstance(value, torch.SymInt) for value in (*sizes, *self._fakes))

    def compile_forms(self, records: list[ProjectedParameter | None]) -> None:
        """Compiles the steady and refreshing forms during capture, while their conditions on symbols become guards."""
        for due in (False, True):
            forms = [record.form_of(due=due) if record else None for record in records]
            key = self._key(records, forms)
            if key not in self._variants:
                self._variants[key] = self._compile(records, forms)

    def variant_for(self, records: list[ProjectedParameter | None]) -> Callable[..., Any]:
        """Returns the variant for the gradient forms of these records; compiles it at its first use.

        Raises:
            CaptureError: compilation after the capture failed.
        """
        forms = [record.form if record else None for record in records]
        key = self._key(records, forms)
        variant = self._variants.get(key)
        if variant is None:
            try:
                variant = self._variants[key] = self._compile(records, forms)
            except Exception as error:
                if self._capturing:
                    raise  # Dynamo reports the cause
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
        # Dynamo does not check conditions that arise after its guards are built: such a variant runs uncompiled.
        unchecked = not self._capturing and len(fake_mode.shape_env.guards) > num_guards
        return gm.forward if unchecked else compiled


def _has_heads(record: ProjectedParameter) -> bool:
    return isinstance(record.source, HeadBasis)


def _fake_like(value: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """Returns a fake tensor with the sizes, strides, dtype and device of a real or fake one."""
    if isinstance(value, QuantizedTensor):
        return value.with_parts(lambda part: _fake_like(part, mode))
    with mode:
        like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return like.requires_grad_(value.requires_grad)


def _stored_inputs(
    values: Sequence[object], wants_gradient: set[int], fake_mode: FakeTensorMode | None = None
) -> list[StoredInput]:
    """Returns the quantised tensors among a graph's inputs, with new leaves where a gradient is needed."""
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
    """Returns the inputs in the order that ``dequantize_inputs`` defines."""
    flat = list(values)
    for each in stored:
        flat[each.placeholder] = each.tensor.codes
        flat += each.parts[1:]
    return flat


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Returns a copy of a graph; Dynamo still reads the placeholders of its own graph after the backend has run."""
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
    """Returns the key by which captures share a region; None if they cannot: symbolic sizes or attributes."""
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
