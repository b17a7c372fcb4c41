"""Prepares text for training: files -> byte-level BPE -> fixed-length sequences, with a held-out split by file.

The default corpus exists on every machine: the sources of Python's standard library. The sequences of a step depend
only on the seed and the index of the step, so a resumed run trains on the same sequences.
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
# An upper bound: with a vocabulary of 4096 entries a token of Python source is about 3.3 bytes.
_BYTES_PER_TOKEN = 5
_TOKENIZER_BYTES = 3_000_000
_HELD_OUT_BYTES = 200_000


class TextError(InputError):
    """The text cannot be used for training."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and held-out text.

    Attributes:
        train: documents to train on.
        held_out: documents for evaluation.
        source: description of their origin, for messages.
    """

    train: list[str]
    held_out: list[str]
    source: str


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Token sequences, int64: ``train`` (num_train, seq) and ``held_out`` (num_held_out, seq)."""

    train: Tensor
    held_out: Tensor

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        """Returns the batch (size, seq) of a step: consecutive sequences of the epoch's permutation."""
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
        """Returns the entropy of the held-out token frequencies, in nats: the loss of a model of frequencies alone."""
        counts = torch.bincount(self.held_out.flatten()).double()
        p = counts[counts > 0] / counts.sum()
        return float(-(p * p.log()).sum())


def read_corpus(path: str | None, num_tokens: int) -> Corpus:
    """Reads enough text for ``num_tokens`` training tokens.

    Args:
        path: a text file, a folder with text files, or None for the sources of Python's standard library.
        num_tokens: number of training tokens; shorter text is used again in further epochs.

    Raises:
        TextError: the path does not exist, or has too little readable text; the message names it.
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
    """Returns a byte-level BPE tokenizer trained on the first megabytes of the training text.

    Args:
        corpus: the text.
        vocabulary: number of entries.
    """
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
    """Joins the documents of each split end to end and cuts them into sequences of ``seq`` tokens.

    Args:
        corpus: the text.
        encode: maps a list of texts to a list of lists of token ids.
        seq: tokens per sequence.

    Raises:
        TextError: the training or the held-out text is shorter than one sequence.
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
    """Yields the texts of the files in a fixed random order; skips files that are empty or not UTF-8 text."""
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
    """Splits the text of one file into pieces of at most 16384 characters, so that some can be held out."""
    size = min(16_384, math.ceil(len(text) / (2 * HELD_OUT_EVERY)) or 1)
    return [text[i : i + size] for i in range(0, len(text), size)]
