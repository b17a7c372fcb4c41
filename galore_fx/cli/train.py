"""Trains a model on text with galore_fx.

    galore-fx train                                     a Llama of 10 M parameters, Python's own sources
    galore-fx train --resume                            continues a stopped run
    galore-fx train --model config.json --text notes/   another model, your text
    galore-fx train --model HUB/NAME --budget 16GB      fine-tunes a hub model

Into ``--out`` it writes ``checkpoint.pt`` (model, optimizer, position; replaced as a whole), ``log.jsonl`` and, at the
end, ``model/``, a plain transformers folder.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import pickle
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import galore_fx
from galore_fx.cli.preset_models import PRESETS, EncoderSize, transformers_config
from galore_fx.cli.recipe_options import add_part_option
from galore_fx.cli.text_data import Sequences, make_sequences, make_tokenizer, read_corpus
from galore_fx.cli.user_input import InputError, run_command
from galore_fx.recipes.presets import resolve_recipe
from galore_fx.runtime.measure.meter import MemoryCount, count_memory, tensor_bytes
from galore_fx.units import format_bytes

# With the parts of the recipe, these settings determine the results of a run; a resumed run must have the same ones.
RUN_SETTINGS = (
    "model",
    "text",
    "steps",
    "batch",
    "accumulate",
    "seq",
    "lr",
    "weight_decay",
    "recipe",
    "budget",
    "dtype",
    "vocabulary",
    "seed",
)
# Parts of a recipe that have their own option.
_PART_OPTIONS = ("rank", "refresh_gap", "update", "state_bits", "max_grad_norm")
# The memory of this step of a run is counted; everything is compiled and allocated by then.
COUNTED_STEP = 4


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line; raises InputError if a value is not allowed or a recipe part is given twice."""
    parser = argparse.ArgumentParser(
        prog="galore-fx train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        help=f"{', '.join(PRESETS)}, a transformers config file (random weights), folder or hub name (its weights)",
    )
    parser.add_argument("--text", help="text file or folder of them; default: Python's standard library")
    parser.add_argument("--out", default="runs/train", help="folder for checkpoint, log and model")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8, help="sequences per micro-batch")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--seq", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate: linear warm-up, then cosine")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--recipe", default="auto")
    parser.add_argument("--rank", type=_rank, help="columns of each basis, or fraction of the shorter side")
    parser.add_argument("--refresh-gap", type=int)
    parser.add_argument("--update", choices=("deferred", "in-backward"))
    parser.add_argument("--state-bits", type=int, choices=(8, 32), help="of the optimizer's states (as the weights)")
    parser.add_argument("--max-grad-norm", type=float)
    add_part_option(parser)
    parser.add_argument("--budget", help="memory the training may take, such as 16GB")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--vocabulary", type=int, default=4096, help="of the tokenizer, for a model without one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--stop-after", type=int, help="stop after this step, as if interrupted")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--overwrite", action="store_true", help="start anew where --out holds a checkpoint")
    arguments = parser.parse_args(argv)
    least = {"steps": 1, "batch": 1, "accumulate": 1, "seq": 2, "vocabulary": 256, "save_every": 1, "stop_after": 1}
    for name, smallest in least.items():
        value = getattr(arguments, name)
        if value is not None and value < smallest:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {smallest}")
    if not 0.0 <= arguments.lr < math.inf:
        raise InputError(f"--lr {arguments.lr}: must be a finite number of at least 0")
    arguments.part = dict(arguments.part)
    twice = [name for name in _PART_OPTIONS if name in arguments.part and getattr(arguments, name) is not None]
    if twice:
        raise InputError(f"{twice[0]} is given by --{twice[0].replace('_', '-')} and by --part; leave one of them out")
    return arguments


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, and returns the figures of the final report; of a run stopped by ``--stop-after`` only the step.

    Raises:
        InputError: an option is wrong, or does not agree with the files in ``--out``.
        GaloreFxError: as in ``galore_fx.compile``.
    """
    arguments = parse_arguments(argv)
    out = Path(arguments.out)
    checkpoint_path = out / "checkpoint.pt"
    if arguments.resume and arguments.overwrite:
        raise InputError("--resume goes on with a run and --overwrite starts anew; give one of them")
    if arguments.resume and not checkpoint_path.exists():
        raise InputError(f"--resume: there is no {checkpoint_path}; start without --resume, or give its --out")
    if checkpoint_path.exists() and not (arguments.resume or arguments.overwrite):
        raise InputError(
            f"{checkpoint_path} is there: --resume goes on with that run, --overwrite starts anew, and --out names "
            "another folder"
        )
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; name a folder")
    _recipe_in_force(arguments)  # refuses a wrong recipe before the slow part
    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, sequences, tokenizer = model_and_text(arguments)
    model = model.to(device, getattr(torch, arguments.dtype)).train()
    _compile(model, arguments)
    optimizer = model.galore_fx.optimizer
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(schedule, steps=arguments.steps))
    start = _resume(model, scheduler, checkpoint_path, arguments) if arguments.resume else 0
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}, {num_parameters / 1e6:.1f} M parameters, {arguments.dtype} on {device.type}")
    print(model.galore_fx.plan.table())
    out.mkdir(parents=True, exist_ok=True)
    run = _Run(model, scheduler, sequences, arguments, device, out)
    stop = min(arguments.steps, arguments.stop_after or arguments.steps)
    run.train(start, stop)
    if stop < arguments.steps:
        print(f"stopped after step {stop} of {arguments.steps}; go on with --resume")
        return {"step": stop}
    return run.report(tokenizer)


class _Run:
    """The training loop, which also writes log, checkpoints and the final model."""

    def __init__(
        self,
        model: Any,
        scheduler: Any,
        sequences: Sequences,
        arguments: argparse.Namespace,
        device: torch.device,
        out: Path,
    ) -> None:
        self.model, self.scheduler, self.sequences = model, scheduler, sequences
        self.arguments, self.device, self.out = arguments, device, out
        self.optimizer = model.galore_fx.optimizer
        self.counted: MemoryCount | None = None
        self.loss = math.nan

    def train(self, start: int, stop: int) -> None:
        """Runs steps ``start`` to ``stop - 1``, with a checkpoint every ``--save-every`` steps and at the end."""
        arguments = self.arguments
        tokens = arguments.batch * arguments.seq * arguments.accumulate
        bar = tqdm(range(start, stop), initial=start, total=arguments.steps, unit="step", file=sys.stdout)
        with open(self.out / "log.jsonl", "a" if start else "w") as log:
            for step in bar:
                begin = time.perf_counter()
                if step == start + COUNTED_STEP:
                    self.counted = count_memory(functools.partial(self._step, step), self.device)
                else:
                    self._step(step)
                time_s = time.perf_counter() - begin
                bar.set_postfix_str(
                    f"loss {self.loss:.3f}, {tokens / time_s:.0f} tokens/s, {format_bytes(_memory_now(self.device))}"
                    f"{self._refreshes()}"
                )
                log.write(json.dumps({"step": step, "loss": self.loss, "time_s": round(time_s, 4)}) + "\n")
                if (step + 1) % arguments.save_every == 0 or step + 1 == stop:
                    log.flush()
                    self._save(step + 1)

    def _refreshes(self) -> str:
        """Returns the number of refreshes and the current gaps for the progress bar; empty unless they are lazy."""
        stats = self.model.galore_fx.stats()
        gaps = stats.get("refresh_gap")
        if gaps is None:
            return ""
        return f", {stats['num_refreshes']} refreshes, gaps {min(gaps.values())} to {max(gaps.values())}"

    def _step(self, step: int) -> None:
        arguments = self.arguments
        total = 0.0
        for micro in range(arguments.accumulate):
            ids = self.sequences.batch(step * arguments.accumulate + micro, arguments.batch, arguments.seed)
            ids = ids.to(self.device)
            loss = self.model(input_ids=ids, labels=ids).loss / arguments.accumulate
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.scheduler.step()
        self.loss = total

    def _save(self, step: int) -> None:
        """Writes a new file and replaces the checkpoint by it, so an interruption loses nothing."""
        target = self.out / "checkpoint.pt"
        state = {
            "step": step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "settings": {name: getattr(self.arguments, name) for name in RUN_SETTINGS},
            "parts": _recipe_in_force(self.arguments),
        }
        torch.save(state, target.with_suffix(".new"))
        os.replace(target.with_suffix(".new"), target)

    def report(self, tokenizer: Any) -> dict[str, Any]:
        """Prints and returns held-out loss, counted peak and counters; exports the model to ``--out``."""
        held_out = evaluate(self.model, self.sequences.held_out, self.arguments.batch, self.device)
        stats = self.model.galore_fx.stats()
        figures = {
            "step": self.arguments.steps,
            "train_loss": self.loss,
            "held_out_loss": held_out,
            "unigram_entropy": self.sequences.unigram_entropy(),
            "num_refreshes": stats["num_refreshes"],
            "num_skipped": stats["num_skipped"],
            "refresh_time_s": stats["refresh_time_s"],
            "stability": stats.get("stability", {}),
            "refresh_gap": stats.get("refresh_gap", {}),
        }
        print(
            f"held-out loss {held_out:.3f} nats/token (unigram entropy {figures['unigram_entropy']:.3f}); "
            f"{len(stats['projected'])} weights projected, {stats['num_refreshes']} refreshes"
        )
        if self.counted is not None:
            kept = tensor_bytes([*self.model.parameters(), *self.model.buffers(), *_state_tensors(self.optimizer)])
            figures["counted_peak_bytes"] = kept + self.counted.transient_peak_bytes
            print(
                f"counted peak of a step {format_bytes(figures['counted_peak_bytes'])}: {format_bytes(kept)} kept "
                f"(weights, bases, optimizer state) and {format_bytes(self.counted.transient_peak_bytes)} passing"
            )
        self.model.save_pretrained(self.out / "model")
        _save_tokenizer(tokenizer, self.out / "model")
        print(f"wrote {self.out / 'model'} (plain transformers weights)")
        return figures


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Tensor, batch: int, device: torch.device) -> float:
    """Returns the mean loss over held-out sequences (num, seq), nats per token; leaves the model in training mode."""
    model.eval()
    losses = []
    for ids in tqdm(held_out.split(4 * batch), desc="held-out", unit="batch", file=sys.stdout, leave=False):
        ids = ids.to(device)
        losses.append((model(input_ids=ids, labels=ids).loss.item(), len(ids)))
    model.train()
    return sum(loss * weight for loss, weight in losses) / sum(weight for _, weight in losses)


def model_and_text(arguments: argparse.Namespace) -> tuple[Any, Sequences, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    name = arguments.model
    if name in PRESETS and isinstance(PRESETS[name], EncoderSize):
        raise InputError(f"--model {name}: classifies, and this trains on the next token of a text; give a decoder")
    config_file = name is not None and name.endswith(".json")
    if config_file and not Path(arguments.model).is_file():
        raise InputError(f"--model {arguments.model}: not a transformers config file: no such file")
    num_tokens = arguments.steps * arguments.accumulate * arguments.batch * arguments.seq
    corpus = read_corpus(arguments.text, num_tokens)
    if name is not None and not config_file and name not in PRESETS:
        try:
            model = AutoModelForCausalLM.from_pretrained(arguments.model)
            tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        except (OSError, ValueError) as error:
            raise InputError(f"--model {arguments.model}: {error}") from error
        return model, make_sequences(corpus, lambda texts: tokenizer(texts)["input_ids"], arguments.seq), tokenizer
    if name in PRESETS:
        config = transformers_config(name)
    elif name is None:
        config = LlamaConfig(
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=10,
            num_attention_heads=8,
            vocab_size=arguments.vocabulary,
            max_position_embeddings=max(arguments.seq, 256),
            bos_token_id=None,
            eos_token_id=None,
        )
    else:
        try:
            config = AutoConfig.from_pretrained(arguments.model)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"--model {arguments.model}: not a transformers config file: {error}") from error
    print(f"training a tokenizer of {config.vocab_size} entries on {corpus.source} ...", flush=True)
    tokenizer = make_tokenizer(corpus, config.vocab_size)
    sequences = make_sequences(
        corpus, lambda texts: [encoded.ids for encoded in tokenizer.encode_batch(texts)], arguments.seq
    )
    return AutoModelForCausalLM.from_config(config), sequences, tokenizer


def _compile(model: nn.Module, arguments: argparse.Namespace) -> None:
    galore_fx.compile(
        model,
        arguments.budget,
        recipe=arguments.recipe,
        optimizer=functools.partial(torch.optim.AdamW, lr=arguments.lr, weight_decay=arguments.weight_decay),
        micro_batches=arguments.accumulate,
        **_parts(arguments),
    )


def _parts(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(arguments, name) for name in _PART_OPTIONS}
    return {name: value for name, value in given.items() if value is not None} | arguments.part


def _recipe_in_force(arguments: argparse.Namespace) -> dict[str, Any]:
    return dataclasses.asdict(resolve_recipe(arguments.recipe, _parts(arguments)))


def _resume(model: Any, scheduler: Any, path: Path, arguments: argparse.Namespace) -> int:
    try:
        state = torch.load(path, weights_only=True)
        if not {"settings", "parts"} <= state.keys():
            raise KeyError("settings, parts")
    except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"--resume: {path} is damaged or was not written by galore-fx train: {error!r:.200}"
        ) from error
    for name, saved in state["settings"].items():
        if getattr(arguments, name) != saved:
            option = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{option} {getattr(arguments, name)}: {path} was made with {option} {saved}; resume with that"
            )
    parts = _recipe_in_force(arguments)
    for name, saved in state["parts"].items():
        if parts.get(name) != saved:
            raise InputError(f"{name}={parts.get(name)!r}: {path} was made with {name}={saved!r}; resume with that")
    if state["step"] >= arguments.steps:
        raise InputError(f"--resume: {path} is at step {state['step']} of {arguments.steps}: the run is finished")
    model.load_state_dict(state["model"])
    model.galore_fx.optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"]:
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    print(f"resumed {path} at step {state['step']}")
    return int(state["step"])


def schedule(step: int, *, steps: int) -> float:
    """Linear warm-up over a tenth, then cosine to a tenth of the peak (GaLore, arXiv:2403.03507, appendix C)."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    else:
        tokenizer.save(str(folder / "tokenizer.json"))


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _memory_now(device: torch.device) -> int:
    """Returns the bytes allocated on the GPU, or on a CPU the peak resident size of the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _rank(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def run() -> None:
    """Runs the command."""
    run_command("galore-fx train", main)
