"""Detects rows of equal blocks in a model, and copies the model with these rows shortened."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from galore_fx.passes.model_graph.find_regions import Region

_PLAYED = 3  # simulated blocks of a row: the first, a representative of all middle ones, the last
# Attributes that number the layers of a model and do not change their computation.
_POSITION = ("layer_idx", "layer_id", "layer_number", "layer_index", "idx", "index")


def stand_ins(model: nn.Module, regions: Sequence[Region]) -> tuple[tuple[int, ...], ...]:
    """Groups the blocks by their representative, in order; the first block of each group is simulated for all of it.

    A row is a run of neighbours in one ``nn.ModuleList`` that differ only in their position and share no parameter. Of
    a row longer than three, the first, the second and the last are simulated; the second represents all in the middle.
    If the configuration gives layers different types, which a model may look up by position, all blocks are simulated.
    """
    if any(len(set(types)) > 1 for types in _layer_types(model)):
        return tuple((block,) for block in range(len(regions)))
    users: dict[int, int] = {}
    for region in regions:
        for key in {id(p) for p in region.module.parameters()}:
            users[key] = users.get(key, 0) + 1
    kinds: list[tuple[object, ...]] = []
    for number, region in enumerate(regions):
        shared = any(users[id(p)] > 1 for p in region.module.parameters())
        owner, _, place = region.name.rpartition(".")
        # Equal only for neighbours in a list: a module between two blocks of a row would belong to neither.
        distance = int(place) - number if place.isdigit() else None
        kinds.append((owner, distance, region.name if shared else _kind(region.module)))
    members: list[tuple[int, ...]] = []
    for _, row in itertools.groupby(range(len(regions)), key=lambda index: kinds[index]):
        blocks = tuple(row)
        if len(blocks) <= _PLAYED or type(_module(model, _owner(regions[blocks[0]].name))) is not nn.ModuleList:
            members += [(block,) for block in blocks]
        else:
            members += [blocks[:1], blocks[1:-1], blocks[-1:]]
    return tuple(members)


def short_lists(
    model: nn.Module, regions: Sequence[Region], members: Sequence[Sequence[int]]
) -> dict[int, nn.ModuleList]:
    """Returns a list of the remaining modules for each list with a shortened row, by the id of the original list."""
    left_out = {regions[block].name for blocks in members for block in blocks[1:]}
    cut: dict[int, nn.ModuleList] = {}
    for owner in {_owner(name) for name in left_out}:
        modules = _module(model, owner)
        kept = [child for key, child in modules.named_children() if f"{owner}.{key}" not in left_out]
        cut[id(modules)] = nn.ModuleList(kept)
    return cut


def deepcopy_short(model: nn.Module, cut: dict[int, nn.ModuleList]) -> nn.Module:
    """Returns a deep copy of the model in which the lists from ``short_lists`` replace the original ones."""
    memo: dict[int, Any] = {}
    for key, short in cut.items():
        copied = nn.ModuleList()
        memo[key] = copied
        for child in short:
            copied.append(copy.deepcopy(child, memo))
    return copy.deepcopy(model, memo)


def _layer_types(model: nn.Module) -> Iterator[Sequence[str]]:
    configs = {id(found): found for m in model.modules() if (found := getattr(m, "config", None)) is not None}
    return (types for config in configs.values() if (types := getattr(config, "layer_types", None)))


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _module(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


def _description(value: object) -> object:
    """Returns a key: equal for equal plain values; the identity of other objects, such as a shared configuration."""
    plain = isinstance(value, int | float | str | bool | tuple | list | dict | torch.dtype | torch.Size | None)
    return repr(value) if plain else id(value)


def _kind(module: nn.Module) -> tuple[object, ...]:
    """Describes a block except for its position.

    Blocks of one kind compute the same, unless their forward reads their position; the simulation then detects
    different graphs. Blocks of different kinds may compute the same.
    """
    described: list[object] = []
    for name, child in module.named_modules():
        settings = tuple(
            (key, _description(value))
            for key, value in sorted(vars(child).items())
            if key not in _POSITION and not key.startswith("_")
        )
        hooks = len(child._forward_hooks) + len(child._forward_pre_hooks)
        described.append((name, type(child), settings, hooks))
        tensors = [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]
        described += [(key, t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for key, t in tensors]
    return tuple(described)
