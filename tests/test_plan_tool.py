"""tools/plan.py: a table, JSON and a picture for a model nobody has, and clear errors."""

import json
import sys
from pathlib import Path

import pytest

import galore_fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
plan_tool = pytest.importorskip("plan", reason="tools/ is not beside the tests")

SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


def test_a_config_file_is_planned_without_weights(config, tmp_path, capsys):
    file = tmp_path / "plan.json"
    sizes = ["--batch", "2", "--seq", "32", "--dtype", "float32", "--device", "cpu", "--rank", "8"]
    assert plan_tool.main([config, *sizes, "--budget", "1GB", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "predicted peak" in out and "refreshing backward" in out and "1 of" not in out.splitlines()[1]
    plan = galore_fx.Plan.from_json(file.read_text())
    assert plan.fits and plan.recipe["rank"] == 8 and plan.categories["weights"] > 4 * 300 * 64
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_what_does_not_fit_ends_with_status_2_and_what_would(config, capsys):
    arguments = [config, "--batch", "1", "--seq", "8", "--device", "cpu", "--dtype", "float32", "--budget", "300KB"]
    assert plan_tool.main([*arguments, "--rank", "4", "--update", "deferred"]) == 2
    assert "does not fit: the smallest plan needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "16"], "budget '16'"),
        (["--budget", "16 apples"], "budget '16 apples'"),
        (["--budget=-3GB"], "budget '-3GB'"),
        (["--budget", "0GB"], "budget '0GB'"),
        (["--budget", "nan"], "budget 'nan'"),
        (["--batch", "0"], "--batch 0: must be at least 1"),
        (["--seq", "0"], "--seq 0: must be at least 1"),
        (["--seq", "65"], "--seq 65: the model has 64 positions"),
        (["--rank", "many"], "--rank 'many'"),
        (["--recipe", "galor"], "unknown recipe 'galor'"),
    ],
)
def test_bad_arguments_are_named_and_end_with_status_2(config, capsys, arguments, message):
    assert plan_tool.main([config, "--seq", "32", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_config_and_one_that_is_not_there(tmp_path, capsys):
    (tmp_path / "notes.json").write_text("{")
    assert plan_tool.main([str(tmp_path / "notes.json"), "--seq", "32"]) == 2
    assert "not a transformers config file" in capsys.readouterr().err
    assert plan_tool.main([str(tmp_path / "nowhere.json")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_leaves_nothing(config, tmp_path, capsys):
    target = tmp_path / "missing" / "plan.json"
    sizes = ["--batch", "1", "--seq", "8", "--device", "cpu", "--dtype", "float32", "--rank", "4"]
    assert plan_tool.main([config, *sizes, "--json", str(target)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert not target.exists()


def test_presets_make_models():
    for name in plan_tool.PRESETS:
        assert plan_tool._config(name).model_type == plan_tool.PRESETS[name]["model_type"]
