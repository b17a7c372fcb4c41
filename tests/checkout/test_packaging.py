"""pyproject lists exactly the packages that are on the disk."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"galore_fx": "galore_fx", "passes": "galore_fx.passes", "runtime": "galore_fx.runtime"}


def _on_disk() -> set[str]:
    found = set()
    for folder, package in (
        ("galore_fx", "galore_fx"),
        ("passes", "galore_fx.passes"),
        ("runtime", "galore_fx.runtime"),
    ):
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join((package, *init.parent.relative_to(ROOT / folder).parts)))
    return found


def test_every_package_on_the_disk_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == _on_disk()
    assert len(listed) == len(set(listed)) >= 6


def test_every_folder_with_python_files_is_a_package():
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py"


def test_peers_are_no_run_time_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = " ".join(project["dependencies"])
    assert not any(peer in names for peer in ("galore-torch", "q-galore", "apollo", "bitsandbytes"))
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert "import galore_torch" not in path.read_text()
