"""Prints what a training step will take, before the model exists.

    python tools/plan.py llama-60m --budget 2GB --batch 1 --seq 256
    python tools/plan.py path/to/config.json --batch 4 --seq 1024 --dtype bfloat16 --device cuda
    python tools/plan.py HUB/NAME --recipe galore --json plan.json --plot plan.svg

MODEL is a preset, a transformers config file, or a hub name. The step is simulated on tensors without memory: no
weights are loaded and no GPU is needed; for --device cpu, library kernels are tried on zeros to learn their scratch.
Exit status: 0 it fits (or no budget was given), 2 it does not, or the input is wrong.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import galore_fx
from galore_fx.recipe import resolve_recipe
from galore_fx.units import format_bytes, parse_bytes

_LLAMA = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
PRESETS: dict[str, dict[str, Any]] = {
    # Sizes of GaLore's pre-training runs (Zhao et al. 2024, arXiv:2403.03507, table 5).
    **{
        f"llama-{name}": {
            **_LLAMA,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }
        for name, hidden, intermediate, layers, heads in (
            ("60m", 512, 1376, 8, 8),
            ("130m", 768, 2048, 12, 12),
            ("350m", 1024, 2736, 24, 16),
            ("1b", 2048, 5461, 24, 32),
            ("7b", 4096, 11008, 32, 32),
        )
    },
    "gpt2": {"model_type": "gpt2"},
    "roberta-base": {
        "model_type": "roberta",
        "architectures": ["RobertaForSequenceClassification"],
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    },
}
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw one step there (svg or png; needs matplotlib)")
    arguments = parser.parse_args(argv)
    try:
        plan = make_plan(arguments)
        print(plan.table())
        if arguments.json:
            _write(arguments.json, lambda path: path.write_text(plan.to_json()))
        if arguments.plot:
            _write(arguments.plot, functools.partial(_plot, plan))
    except (InputError, galore_fx.GaloreFxError) as error:
        print(f"plan.py: {error}", file=sys.stderr)
        return 2
    if plan.within_budget:
        return 0
    assert plan.budget_bytes is not None
    print(
        f"does not fit: the smallest plan needs {format_bytes(plan.peak_bytes)}, the budget is "
        f"{format_bytes(plan.budget_bytes)}; try a shorter --seq, a smaller --batch or a lower --rank",
        file=sys.stderr,
    )
    return 2


def make_plan(arguments: argparse.Namespace) -> galore_fx.Plan:
    """The plan for the command line."""
    for name in ("batch", "seq"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    settings: dict[str, Any] = {}
    if arguments.rank is not None:
        settings["rank"] = _number(arguments.rank)
    if arguments.update is not None:
        settings["update"] = arguments.update
    resolve_recipe(arguments.recipe, settings)  # before the model is made
    if arguments.budget is not None:
        parse_bytes(arguments.budget)
    config = _config(arguments.model)
    if arguments.seq > getattr(config, "max_position_embeddings", arguments.seq):
        raise InputError(f"--seq {arguments.seq}: the model has {config.max_position_embeddings} positions")
    model, sample = _model_and_sample(config, arguments)
    return galore_fx.plan(
        model, arguments.budget, sample=sample, recipe=arguments.recipe, device=arguments.device, **settings
    )


def _config(name: str) -> transformers.PretrainedConfig:
    if name in PRESETS:
        return transformers.AutoConfig.for_model(**PRESETS[name])
    looks_like_a_file = name.endswith(".json") or Path(name).exists()
    if looks_like_a_file and not Path(name).exists():
        raise InputError(f"{name}: no such file; give a transformers config file, a hub name, or {', '.join(PRESETS)}")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:
        raise InputError(f"{name}: not a transformers config file, hub name or preset ({error})") from error
    return config


def _model_and_sample(
    config: transformers.PretrainedConfig, arguments: argparse.Namespace
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model without memory behind it, and a batch of the shape asked for."""
    kinds = config.architectures or [None]
    model_class = getattr(transformers, kinds[0], None) if kinds[0] else None
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[arguments.dtype])
    try:
        with torch.device("meta"):
            model = model_class(config) if model_class else transformers.AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    ids = torch.empty((arguments.batch, arguments.seq), dtype=torch.int64, device="meta")
    classifies = "ForSequenceClassification" in type(model).__name__
    labels = torch.empty((arguments.batch,), dtype=torch.int64, device="meta") if classifies else ids
    return model, {"input_ids": ids, "labels": labels}


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


def _plot(plan: galore_fx.Plan, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    assert plan.prediction is not None
    names = list(plan.prediction.categories)
    moments = [categories for _, categories in plan.prediction.timeline]
    rows = [
        [moment.get(name, plan.prediction.categories[name] if name in _KEPT else 0) / 2**20 for moment in moments]
        for name in names
    ]
    figure, axes = pyplot.subplots(figsize=(9, 4.2))
    axes.stackplot(range(len(moments)), rows, labels=names, step="post")
    if plan.budget_bytes is not None:
        axes.axhline(
            (plan.budget_bytes - plan.reserve_bytes) / 2**20, color="black", linestyle="--", label="budget - reserve"
        )
    axes.set_xlabel("allocations and releases of one steady step")
    axes.set_ylabel("MiB")
    axes.legend(fontsize=8, loc="lower center", ncols=4)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


_KEPT = ("weights", "bases", "optimizer_state")


if __name__ == "__main__":
    sys.exit(main())
