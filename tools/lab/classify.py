"""Fine-tunes a small RoBERTa to predict the keyword that began a line of Python, and counts the right answers.

    python -m tools.lab.classify --way gradnormlorp --lr 3e-3   trains the base model if it is missing, then fine-tunes
    python -m tools.lab.classify --way lora --lr 3e-3           the peer (pip install peft): LoRA of rank 8

The base model is trained on the same text with masked tokens and stored in ``--base``. The first word of a line (def,
for, return, ...) is removed and is the label; held-out lines come from separate files. Embeddings are frozen.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import galore_fx
from galore_fx.cli import train
from galore_fx.cli.text_data import Corpus, make_tokenizer, read_corpus
from galore_fx.cli.user_input import run_command
from galore_fx.planner.verify_peak import counted_peak
from tools.lab.fine_tuning import add_fine_tuning_options

LABELS = ("def", "class", "if", "elif", "for", "while", "return", "import", "from", "raise", "with", "assert")
VOCABULARY, SEQ = 4096, 32
PAD, MASK = 0, 1
BASE_STEPS, BASE_LR, MASKED = 1000, 1e-3, 0.15
NUM_HELD_OUT = 2000
WAYS = ("gradnormlorp", "lora", "full")
LORA = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": ["query", "key", "value", "dense"],
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Fine-tunes; returns accuracy, held-out loss in nats, refreshes, trained parameters and counted peak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, default="gradnormlorp", help="a recipe, or LoRA")
    add_fine_tuning_options(parser, lr=3e-3, batch=32, base="runs/classify-base", base_steps=BASE_STEPS)
    arguments = parser.parse_args(argv)
    corpus = read_corpus(None, 4_000_000)
    tokenizer = make_tokenizer(corpus, VOCABULARY)
    data = {name: encode(labelled_lines(texts), tokenizer) for name, texts in vars(corpus).items() if name != "source"}
    model = _base(Path(arguments.base), arguments, corpus, tokenizer)
    torch.manual_seed(arguments.seed)
    model = _prepared(model, arguments)
    ids, labels = data["train"]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(arguments.seed))

    def batch(number: int) -> dict[str, Tensor]:
        at = order[torch.arange(number * arguments.batch, (number + 1) * arguments.batch) % len(ids)]
        return {"input_ids": ids[at], "attention_mask": (ids[at] != PAD).long(), "labels": labels[at]}

    _train(model, batch, arguments.steps)
    accuracy, loss = evaluate(model, *(part[:NUM_HELD_OUT] for part in data["held_out"]))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    figures = {"accuracy": accuracy, "held_out_loss": loss, "num_refreshes": model.galore_fx.stats()["num_refreshes"]}
    figures |= {"num_trained": trained, "counted_peak_bytes": counted_peak(model, batch(0))}
    print(f"accuracy {accuracy:.2%}, loss {loss:.4f}, {trained} numbers trained")
    return figures


def labelled_lines(texts: list[str]) -> list[tuple[str, int]]:
    """Returns lines without their first word, each with the index of this word in ``LABELS``."""
    found = []
    for text in texts:
        for line in text.splitlines():
            word, _, rest = line.strip().partition(" ")
            if word in LABELS and len(rest) > 3:
                found.append((rest, LABELS.index(word)))
    return found


def encode(lines: list[tuple[str, int]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Returns token ids (lines, seq), padded on the right, and labels (lines,), both int64."""
    ids = torch.full((len(lines), SEQ), PAD)
    for row, encoded in enumerate(tokenizer.encode_batch([text for text, _ in lines])):
        part = torch.tensor(encoded.ids[:SEQ])
        ids[row, : len(part)] = part
    return ids, torch.tensor([label for _, label in lines])


@torch.no_grad()
def evaluate(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[float, float]:
    """Returns the share of right answers and the mean loss in nats."""
    model.eval()
    logits = torch.cat([model(input_ids=part, attention_mask=(part != PAD).long()).logits for part in ids.split(256)])
    model.train()
    return float((logits.argmax(-1) == labels).float().mean()), float(nn.functional.cross_entropy(logits, labels))


def _prepared(model: Any, arguments: argparse.Namespace) -> Any:
    """Returns the compiled model for the way of training; the head is always trained, the embeddings never."""
    settings: dict[str, Any] = {"recipe": "full"}
    if arguments.way == "lora":
        from peft import LoraConfig, get_peft_model

        classifier = model.classifier
        model = get_peft_model(model, LoraConfig(**LORA, exclude_modules=r".*classifier.*"))
        classifier.requires_grad_(True)
    else:
        model.roberta.embeddings.requires_grad_(False)
        settings = {"recipe": arguments.way}
    adamw = functools.partial(torch.optim.AdamW, lr=arguments.lr, weight_decay=0.0)
    return galore_fx.compile(model.train(), optimizer=adamw, **settings, **dict(arguments.part))


def _train(model: Any, batch: Any, steps: int) -> None:
    optimizer = model.galore_fx.optimizer
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(train.schedule, steps=steps))
    bar = tqdm(range(steps), unit="step", disable=None)
    for number in bar:
        loss = model(**batch(number)).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)


def _base(folder: Path, arguments: argparse.Namespace, corpus: Corpus, tokenizer: Any) -> Any:
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification

    if not (folder / "config.json").exists():
        print(f"training the base model into {folder} ...", flush=True)
        torch.manual_seed(0)
        config = RobertaConfig(
            hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=6, vocab_size=VOCABULARY,
            max_position_embeddings=SEQ + 2, pad_token_id=PAD, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model: Any = RobertaForMaskedLM(config).train()
        galore_fx.compile(model, recipe="full", optimizer=functools.partial(torch.optim.AdamW, lr=BASE_LR))
        ids = torch.tensor([i for encoded in tokenizer.encode_batch(corpus.train) for i in encoded.ids])
        ids = ids[: len(ids) // SEQ * SEQ].view(-1, SEQ)
        draw = torch.Generator().manual_seed(0)

        def batch(_number: int) -> dict[str, Tensor]:
            whole = ids[torch.randint(len(ids), (32,), generator=draw)]
            is_masked = torch.rand(whole.shape, generator=draw) < MASKED
            return {"input_ids": whole.where(~is_masked, MASK), "labels": whole.where(is_masked, -100)}

        _train(model, batch, arguments.base_steps)
        model.save_pretrained(folder)
    torch.manual_seed(arguments.seed)
    return RobertaForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS))


if __name__ == "__main__":
    run_command("classify", main)
