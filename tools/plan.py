"""Prints what a training step will take, before the model exists.

    python tools/plan.py llama-60m --budget 2GB --batch 1 --seq 256
    python tools/plan.py path/to/config.json --batch 4 --seq 1024 --dtype bfloat16 --device cuda
    python tools/plan.py HUB/NAME --recipe galore --json plan.json --plot plan.svg
    python tools/plan.py llama-1b --budget 24GB --compare
    python tools/plan.py llama-7b --budget 24GB --seq 512 --recipe gradnormlorp --rank 128 --state-bits 8 --compare

MODEL is a preset, a transformers config file, or a hub name. The step is simulated on tensors without memory: no
weights are loaded and no GPU is needed; for --device cpu, library kernels are tried on zeros to learn their scratch.
Exit status: 0 it fits (or no budget was given), 2 it does not, or the input is wrong.
"""

import argparse
import functools
import gc
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare_plans import compare
from plan_picture import draw
from preset_models import PRESETS, EncoderSize, build
from recipe_parts import add_part_option
from torch import nn

import galore_fx
from galore_fx.recipes import resolve_recipe
from galore_fx.units import format_bytes, parse_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class InputError(Exception):
    """What the user gave is wrong; the message says what and what is allowed."""


def main(argv: list[str] | None = None) -> int:
    """Plans and prints; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help=f"{', '.join(PRESETS)}, a config file or a hub name")
    parser.add_argument("--budget", help="16GB, 15.5GiB, ...; without one the step is only predicted")
    parser.add_argument("--batch", type=int, default=1, help="sequences in a batch (1)")
    parser.add_argument("--seq", type=int, default=1024, help="tokens in a sequence (1024)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and activations (bfloat16)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="where it is to be trained (cuda)")
    parser.add_argument("--recipe", default="auto", help=f"{', '.join(sorted(galore_fx.RECIPES))} (auto)")
    parser.add_argument("--rank", help="columns of a basis, or a fraction of the shorter side")
    parser.add_argument("--update", choices=("deferred", "in-backward"))
    parser.add_argument("--state-bits", type=int, choices=(8, 32), help="of the optimizer's states (as the weights)")
    add_part_option(parser)
    parser.add_argument("--freeze-embeddings", action="store_true", help="they are not trained")
    parser.add_argument("--compare", action="store_true", help="beside other ways of training the same model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw one step there (svg or png; needs matplotlib)")
    arguments = parser.parse_args(argv)
    try:
        make_model, sample, settings = read(arguments)
        plan = galore_fx.plan(make_model(), arguments.budget, sample=sample, **settings)
        print(plan.table())
        if arguments.compare:
            print(f"\n{compare(make_model, sample, plan, arguments.device)}")
        if arguments.json:
            _write(arguments.json, lambda path: path.write_text(plan.to_json()))
        if arguments.plot:
            if importlib.util.find_spec("matplotlib") is None:
                raise InputError("--plot needs matplotlib; pip install -e '.[plots]'")
            _write(arguments.plot, functools.partial(draw, plan))
    except (InputError, galore_fx.GaloreFxError) as error:
        print(f"plan.py: {error}", file=sys.stderr)
        return 2
    if plan.within_budget:
        return 0
    assert plan.budget_bytes is not None
    print(
        f"does not fit: the smallest plan needs {format_bytes(plan.peak_bytes)}, the budget is "
        f"{format_bytes(plan.budget_bytes)}. What would fit: {'; '.join(plan.nearest)}",
        file=sys.stderr,
    )
    return 2


def read(arguments: argparse.Namespace) -> tuple[Callable[[], nn.Module], dict[str, torch.Tensor], dict[str, Any]]:
    """What makes the model, a batch, and the settings of the plan.

    Raises:
        InputError: a value that is not allowed.
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
    resolve_recipe(arguments.recipe, settings)  # before the model is made
    if arguments.budget is not None:
        parse_bytes(arguments.budget)
    make, positions, classifies = _preset(arguments.model) if arguments.model in PRESETS else _config(arguments.model)
    if arguments.seq > (positions or arguments.seq):
        raise InputError(f"--seq {arguments.seq}: the model has {positions} positions")
    ids = torch.empty((arguments.batch, arguments.seq), dtype=torch.int64, device="meta")
    labels = torch.empty((arguments.batch,), dtype=torch.int64, device="meta") if classifies else ids
    settings |= {"recipe": arguments.recipe, "device": arguments.device}
    make_model = functools.partial(_without_memory, make, arguments.dtype, arguments.freeze_embeddings)
    return make_model, {"input_ids": ids, "labels": labels}, settings


def _preset(name: str) -> tuple[Callable[[], nn.Module], int, bool]:
    size = PRESETS[name]
    return functools.partial(build, size), size.positions, isinstance(size, EncoderSize)


def _config(name: str) -> tuple[Callable[[], nn.Module], int | None, bool]:
    import transformers  # takes a second, and the presets do without

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


def _write(path: Path, write: Any) -> None:
    """Through a neighbour, so that nothing half-written is left."""
    neighbour = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(neighbour)
        neighbour.replace(path)
    except (OSError, ValueError) as error:
        neighbour.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error})") from error
    print(f"wrote {path}")


if __name__ == "__main__":
    gc.disable()  # a short process: what is not freed by its last reference need not be looked for
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking torch's compiler down takes as long as a step
