"""Creates the model, batch and recipe that a command line describes, without allocating memory for them."""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import galore_fx
from galore_fx.cli.preset_models import PRESETS, EncoderSize, build
from galore_fx.cli.recipe_options import add_part_option
from galore_fx.cli.user_input import InputError
from galore_fx.recipes.presets import resolve_recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments for the model, its batch, and the parts of the recipe."""
    parser.add_argument("model", metavar="MODEL", help=f"{', '.join(PRESETS)}, a config file or a hub name")
    parser.add_argument("--batch", type=int, default=1, help="sequences in a batch (1)")
    parser.add_argument("--seq", type=int, default=1024, help="tokens in a sequence (1024)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and activations (bfloat16)")
    parser.add_argument("--recipe", default="auto", help=f"{', '.join(sorted(galore_fx.RECIPES))} (auto)")
    parser.add_argument("--rank", help="columns of a basis, or a fraction of the shorter side")
    parser.add_argument("--update", choices=("deferred", "in-backward"))
    parser.add_argument("--state-bits", type=int, choices=(8, 32), help="of the optimizer's states (as the weights)")
    add_part_option(parser)
    parser.add_argument("--freeze-embeddings", action="store_true", help="they are not trained")


def read(arguments: argparse.Namespace) -> tuple[Callable[[], nn.Module], dict[str, torch.Tensor], dict[str, Any]]:
    """Returns a function that creates the model on the meta device, a meta batch, and the recipe with its parts.

    Raises:
        InputError: a value is not allowed, or the model is unknown.
        SettingError: the recipe or one of its parts is not valid.
    """
    for name in ("batch", "seq"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    settings: dict[str, Any] = dict(arguments.part)
    if arguments.rank is not None:
        settings["rank"] = _number(arguments.rank)
    if arguments.update is not None:
        settings["update"] = arguments.update
    if arguments.state_bits is not None:
        settings["state_bits"] = arguments.state_bits
    resolve_recipe(arguments.recipe, settings)  # checks the recipe before the model is created
    make, positions, classifies = _preset(arguments.model) if arguments.model in PRESETS else _config(arguments.model)
    if arguments.seq > (positions or arguments.seq):
        raise InputError(f"--seq {arguments.seq}: the model has {positions} positions")
    ids = torch.empty((arguments.batch, arguments.seq), dtype=torch.int64, device="meta")
    labels = torch.empty((arguments.batch,), dtype=torch.int64, device="meta") if classifies else ids
    settings["recipe"] = arguments.recipe
    make_model = functools.partial(_without_memory, make, arguments.dtype, arguments.freeze_embeddings)
    return make_model, {"input_ids": ids, "labels": labels}, settings


def _preset(name: str) -> tuple[Callable[[], nn.Module], int, bool]:
    size = PRESETS[name]
    return functools.partial(build, size), size.positions, isinstance(size, EncoderSize)


def _config(name: str) -> tuple[Callable[[], nn.Module], int | None, bool]:
    import transformers  # a slow import, which the presets do not need

    looks_like_a_file = name.endswith(".json") or Path(name).exists()
    if looks_like_a_file and not Path(name).exists():
        raise InputError(f"{name}: no such file; give a transformers config file, a hub name, or {', '.join(PRESETS)}")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:
        raise InputError(f"{name}: not a transformers config file, hub name or preset ({error})") from error
    kinds = config.architectures or [""]
    model_class = getattr(transformers, kinds[0], None)
    make = functools.partial(model_class or transformers.AutoModelForCausalLM.from_config, config)
    return make, getattr(config, "max_position_embeddings", None), "ForSequenceClassification" in kinds[0]


def _without_memory(make: Callable[[], nn.Module], dtype: str, freeze_embeddings: bool = False) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        with torch.device("meta"):
            model = make()
    finally:
        torch.set_default_dtype(before)
    for module in model.modules() if freeze_embeddings else ():
        if isinstance(module, nn.Embedding):
            module.weight.requires_grad_(False)
    return model


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--rank {text!r}: give an int, or a fraction between 0 and 1") from None
