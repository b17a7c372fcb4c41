"""The README's first program runs as it stands there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.usefixtures("without_kernels")
def test_the_first_program_runs_and_writes_a_model(tmp_path, monkeypatch, capsys):
    program = re.search(r"```python\n(import .*?)```", README.read_text(), re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("20 ")
    assert (tmp_path / "out" / "config.json").is_file()
