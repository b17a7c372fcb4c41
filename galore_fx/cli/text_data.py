"""Real text for the main job: files -> byte-level BPE -> fixed-length sequences, with a held-out split by file.

The default corpus is on every machine: the sources of Python's standard library. Which sequences a step sees follows
from the seed and the step's number alone, so that a resumed run sees what it would have seen.
"""

import dataclasses
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from galore_fx.cli.user_input import InputError

HELD_OUT_EVERY = 20
# Bytes of Python source per token of a 4096-entry vocabulary are about 3.3; more is read than can be needed.
_BYTES_PER_TOKEN = 5
_TOKENIZER_BYTES = 3_000_000
_HELD_OUT_BYTES = 200_000


class TextError(InputError):
    """Text that cannot be trained on."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and held-out text, as lists of documents."""

    train: list[str]
    held_out: list[str]
    source: str


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Token sequences: ``train`` (num_train, seq) and ``held_out`` (num_held_out, seq), int64."""

    train: Tensor
    held_out: Tensor

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        """The batch (size, seq) of a step: the epoch's permutation, cut in order."""
        num = self.train.shape[0]
        picked = []
        for position in range(step * size, (step + 1) * size):
            epoch, index = divmod(position, num)
            picked.append(self._order(epoch, seed)[index])
        return self.train[torch.stack(picked)]

    def _order(self, epoch: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.randperm(self.train.shape[0], generator=generator)

    def unigram_entropy(self) -> float:
        """Entropy of the held-out tokens' own frequencies, nats: the loss of knowing nothing but frequencies."""
        counts = torch.bincount(self.held_out.flatten()).double()
        p = counts[counts > 0] / counts.sum()
        return float(-(p * p.log()).sum())


def read_corpus(path: str | None, num_tokens: int) -> Corpus:
    """Reads enough text for ``num_tokens`` training tokens.

    Args:
        path: a text file, a folder (its text files), or None for the standard library's sources.
        num_tokens: training tokens wanted; less text is used again in further epochs.

    Raises:
        TextError: nothing readable there; names the path.
    """
    documents, source = _documents(path)
    wanted = max(num_tokens * _BYTES_PER_TOKEN, _TOKENIZER_BYTES)
    train: list[str] = []
    held_out: list[str] = []
    train_bytes = held_out_bytes = 0
    for number, text in enumerate(documents):
        if number % HELD_OUT_EVERY == 0:
            if held_out_bytes < _HELD_OUT_BYTES:
                held_out.append(text)
                held_out_bytes += len(text)
        elif train_bytes < wanted:
            train.append(text)
            train_bytes += len(text)
        elif held_out_bytes >= _HELD_OUT_BYTES:
            break
    if held_out and not train:
        raise TextError(f"{source} has one text file, and one of a folder is held out; give the file itself, or more")
    if not train or not held_out:
        raise TextError(f"{source}: too little text to train on and hold some out (found {train_bytes} characters)")
    return Corpus(train, held_out, source)


def make_tokenizer(corpus: Corpus, vocabulary: int) -> Any:
    """A byte-level BPE tokenizer trained on (the first megabytes of) the training text."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    sample, size = [], 0
    for text in corpus.train:
        sample.append(text)
        size += len(text)
        if size > _TOKENIZER_BYTES:
            break
    tokenizer.train_from_iterator(sample, vocab_size=vocabulary, min_frequency=2, show_progress=False)
    return tokenizer


def make_sequences(corpus: Corpus, encode: Any, seq: int) -> Sequences:
    """Cuts the corpus into sequences of ``seq`` tokens, documents joined end to end.

    Args:
        corpus: the text.
        encode: list of texts -> list of lists of token ids.
        seq: tokens per sequence.

    Raises:
        TextError: not one whole sequence in either part.
    """
    parts = []
    for name, texts in (("training", corpus.train), ("held-out", corpus.held_out)):
        ids = torch.tensor([token for tokens in encode(texts) for token in tokens])
        num = ids.numel() // seq
        if num == 0:
            raise TextError(f"{corpus.source}: the {name} text has {ids.numel()} tokens, less than one of {seq}")
        parts.append(ids[: num * seq].view(num, seq))
    return Sequences(*parts)


def _documents(path: str | None) -> tuple[Iterator[str], str]:
    if path is None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = [f for f in folder.rglob("*.py") if not {"site-packages", "dist-packages"} & set(f.parts)]
        return _shuffled(files), "the standard library's sources"
    given = Path(path)
    if given.is_file():
        return iter(_pieces(_read(given) or "")), str(given)
    if given.is_dir():
        return _shuffled([f for f in given.rglob("*") if f.is_file()]), str(given)
    raise TextError(f"--text {path}: no such file or folder")


def _shuffled(files: list[Path]) -> Iterator[str]:
    """Texts of the files in an order that does not follow their names; what is not UTF-8 text is left out."""
    files = sorted(files)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    texts = (_read(files[i]) for i in order)
    return (text for text in texts if text and text.strip())


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None


def _pieces(text: str) -> list[str]:
    """One file as pieces of some 16 KiB, so that part of it can be held out."""
    size = min(16_384, math.ceil(len(text) / (2 * HELD_OUT_EVERY)) or 1)
    return [text[i : i + size] for i in range(0, len(text), size)]
