"""Fine-tunes a small model on word problems and counts the exactly right answers.

    python -m tools.lab.arithmetic --recipe galore+      trains the base model if it is missing, then fine-tunes
    python -m tools.lab.arithmetic --recipe full --lr 5e-4

The base model is the default one of ``tools/train.py``, trained on Python's sources and stored in ``--base``. The
problems are generated: a few sentences with names, things and small numbers, and one or two operations. Each problem is
used once, held-out ones never in training. Digits are separated by spaces, so that each is one token.
"""

import argparse
import functools
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import galore_fx
from galore_fx.cli import train
from galore_fx.cli.user_input import run_command
from galore_fx.planner.verify_peak import counted_peak
from tools.lab.fine_tuning import add_fine_tuning_options

BASE_STEPS, BASE_LR = 600, 1e-3
LARGEST = 9
NUM_HELD_OUT = 512
NAMES = ("Ada", "Ben", "Eva", "Max", "Ida", "Tom", "Zoe", "Leo")
THINGS = ("apples", "books", "coins", "cards", "shells", "pens")
# Text and answer of each kind of problem, from operands a, b, c.
KINDS = (
    ("{x} has {a} {things} and gets {b} more. How many {things} does {x} have?", lambda a, b, c: a + b),
    ("{x} has {a} {things} and gives {b} to {y}. How many {things} are left?", lambda a, b, c: a - b),
    ("{x} has {a} {things}, {y} has {b} more. How many {things} do they have together?", lambda a, b, c: 2 * a + b),
    ("{x} had {a} {things}, found {b} and lost {c}. How many {things} does {x} have?", lambda a, b, c: a + b - c),
)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Fine-tunes; returns exact-match accuracy, loss of the answers in nats per token, refreshes and counted peak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="galore+")
    add_fine_tuning_options(parser, lr=2e-3, batch=16, base="runs/arithmetic-base", base_steps=BASE_STEPS)
    arguments = parser.parse_args(argv)
    model, tokenizer = _base(Path(arguments.base), arguments.base_steps)
    data = {name: encode(problems, tokenizer) for name, problems in make_problems(arguments).items()}
    torch.manual_seed(arguments.seed)
    adamw = functools.partial(torch.optim.AdamW, lr=arguments.lr, weight_decay=0.0)
    galore_fx.compile(model.train(), recipe=arguments.recipe, optimizer=adamw, **dict(arguments.part))
    optimizer = model.galore_fx.optimizer
    schedule = functools.partial(train.schedule, steps=arguments.steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    bar = tqdm(range(arguments.steps), unit="step", disable=None)
    ids, labels = data["train"]

    for number in bar:
        at = slice(number * arguments.batch, (number + 1) * arguments.batch)
        loss = model(input_ids=ids[at], labels=labels[at]).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    accuracy, loss = evaluate(model, *data["held out"])
    stats = model.galore_fx.stats()
    figures = {"exact_match": accuracy, "held_out_loss": loss, "num_refreshes": stats["num_refreshes"]}
    batch = {"input_ids": ids[: arguments.batch], "labels": labels[: arguments.batch]}
    figures["counted_peak_bytes"] = counted_peak(model, batch)
    print(f"exact match {accuracy:.1%}, loss of the answers {loss:.4f} nats per token")
    return figures


def make_problems(arguments: argparse.Namespace) -> dict[str, list[tuple[str, str]]]:
    """Returns unique pairs of question and answer: 512 held-out ones, and steps * batch for training."""
    draw = random.Random(arguments.seed)
    num_wanted = NUM_HELD_OUT + arguments.steps * arguments.batch
    made: dict[str, str] = {}
    while len(made) < num_wanted:
        text, answer = draw.choice(KINDS)
        a, b, c = (draw.randint(2, LARGEST) for _ in range(3))
        x, y = draw.sample(NAMES, 2)
        result = answer(a, b, c)
        if result >= 0:
            made[text.format(x=x, y=y, things=draw.choice(THINGS), a=a, b=b, c=c)] = f" {_spaced(result)}\n"
    problems = list(made.items())
    return {"held out": problems[:NUM_HELD_OUT], "train": problems[NUM_HELD_OUT:]}


def encode(problems: list[tuple[str, str]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Returns token ids and labels, (problems, longest) int64, padded on the right; labels are -100 outside answers."""
    questions, answers = ([e.ids for e in tokenizer.encode_batch(list(t))] for t in zip(*problems, strict=True))
    longest = max(len(q) + len(a) for q, a in zip(questions, answers, strict=True))
    ids = torch.zeros(len(problems), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        both = torch.tensor([*question, *answer])
        ids[row, : len(both)] = both
        labels[row, len(question) : len(both)] = both[len(question) :]
    return ids, labels


@torch.no_grad()
def evaluate(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[float, float]:
    """Returns the share of exactly right answers by greedy decoding, and the mean loss of an answer token in nats.

    Greedy decoding gives the right answer exactly if each of its tokens is the most likely one after its predecessors.
    """
    model.eval()
    logits = torch.cat([model(input_ids=part).logits for part in ids.split(64)])[:, :-1].float()
    targets = labels[:, 1:]
    is_answer = targets != -100
    is_right = ((logits.argmax(-1) == targets) | ~is_answer).all(1)
    loss = nn.functional.cross_entropy(logits[is_answer], targets[is_answer])
    model.train()
    return float(is_right.float().mean()), float(loss)


def _base(folder: Path, steps: int) -> tuple[Any, Any]:
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    if not (folder / "model" / "tokenizer.json").exists():
        print(f"training the base model into {folder} ...", flush=True)
        command = ["--out", str(folder), "--steps", str(steps), "--lr", str(BASE_LR), "--recipe", "full"]
        train.main([*command, *(["--resume"] if (folder / "checkpoint.pt").exists() else [])])
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    return model, Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))


def _spaced(number: int) -> str:
    return " ".join(str(number))


if __name__ == "__main__":
    run_command("arithmetic", main)
