"""The main job, small: it trains, reports, stops and goes on bit-identically, and refuses bad input."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import galore_fx
from galore_fx.cli import train

pytestmark = pytest.mark.usefixtures("without_kernels")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def small(tmp_path):
    """Arguments for a model of two layers on a text of repeated sentences."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=300,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    sentences = [f"the {a} {b} number {i}\n" for i in range(900) for a in ("red", "old") for b in ("fox", "tree")]
    (tmp_path / "text.txt").write_text("".join(sentences))

    def arguments(out, *more):
        fixed = ["--model", tmp_path / "config.json", "--text", tmp_path / "text.txt", "--out", tmp_path / out]
        sizes = ["--steps", 8, "--batch", 2, "--seq", 32, "--rank", 8, "--refresh-gap", 3, "--save-every", 2]
        return [str(a) for a in (*fixed, *sizes, *more)]

    return tmp_path, arguments


@pytest.mark.kernels
def test_a_stopped_run_goes_on_bit_identically_and_exports_plain_weights(small):
    folder, arguments = small
    straight = train.main(arguments("straight"))
    assert straight["held_out_loss"] < math.log(300), "better than knowing nothing"
    assert straight["counted_peak_bytes"] > 0
    assert train.main(arguments("stopped", "--stop-after", 4)) == {"step": 4}
    with pytest.raises(train.InputError, match="--seed 7: .* was made with --seed 0"):
        train.main(arguments("stopped", "--resume", "--seed", 7))
    with pytest.raises(train.InputError, match="scale=0.9: .* was made with scale=0.25"):
        train.main(arguments("stopped", "--resume", "--part", "scale=0.9"))
    resumed = train.main(arguments("stopped", "--resume"))
    assert resumed["held_out_loss"] == straight["held_out_loss"]
    first, second = (AutoModelForCausalLM.from_pretrained(folder / out / "model") for out in ("straight", "stopped"))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    rows = [json.loads(line) for line in (folder / "stopped" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(8))


def test_accumulation_and_the_backward_mode_train(small):
    _, arguments = small
    assert train.main(arguments("a", "--accumulate", 2, "--max-grad-norm", 1.0))["num_skipped"] == 0
    assert train.main(arguments("b", "--update", "in-backward"))["num_skipped"] == 0


def test_a_checkpoint_is_neither_overwritten_unasked_nor_read_where_it_is_damaged(small):
    folder, arguments = small
    checkpoint = folder / "held" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"no checkpoint")
    with pytest.raises(train.InputError, match="--resume goes on with that run, --overwrite starts anew"):
        train.main(arguments("held"))
    with pytest.raises(train.InputError, match="checkpoint.pt is damaged or was not written by galore-fx train"):
        train.main(arguments("held", "--resume"))
    assert checkpoint.read_bytes() == b"no checkpoint"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seq", 1], "--seq 1: must be at least 2"),
        (["--vocabulary", 5], "--vocabulary 5: must be at least 256"),
        (["--stop-after", 0], "--stop-after 0: must be at least 1"),
        (["--lr", "nan"], "--lr nan: must be a finite number"),
        (["--part", "rank=4"], "rank is given by --rank and by --part"),
        (["--out", "{folder}/text.txt"], "text.txt: is a file; name a folder"),
        (["--text", "{folder}/one"], "one has one text file"),
        (["--accumulate", 2, "--update", "in-backward"], "micro_batches=2 accumulate gradients"),
    ],
)
def test_bad_arguments_are_named(small, more, message):
    folder, arguments = small
    (folder / "one").mkdir()
    (folder / "one" / "only.txt").write_text("words " * 900)
    given = [value.format(folder=folder) if isinstance(value, str) else value for value in more]
    with pytest.raises((train.InputError, galore_fx.SettingError), match=message):
        train.main(arguments("out", *given))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--resume", "--out", "nowhere"], "--resume: there is no nowhere"),
        (["--text", "nowhere.txt"], "--text nowhere.txt: no such file or folder"),
        (["--model", "nowhere.json"], "--model nowhere.json: not a transformers config file"),
        (["--recipe", "galor"], "unknown recipe 'galor'"),
        (["--budget", "1KB"], "cannot hold"),
    ],
)
def test_bad_arguments_end_with_a_line_and_status_2(arguments, message, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.pt"))
