"""face -> passes -> runtime -> leaves: nothing imports upwards."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"galore_fx": "galore_fx", "passes": "galore_fx.passes", "runtime": "galore_fx.runtime"}
LEAVES = {"galore_fx.errors", "galore_fx.units", "galore_fx.recipe", "galore_fx.plan_record"}
RANK = {"leaf": 0, "runtime": 1, "passes": 2, "face": 3}


def _layer(module: str) -> str:
    if module in LEAVES:
        return "leaf"
    for layer in ("runtime", "passes"):
        if module == f"galore_fx.{layer}" or module.startswith(f"galore_fx.{layer}."):
            return layer
    return "face"


def _modules() -> dict[str, Path]:
    found = {}
    for folder, package in (
        ("galore_fx", "galore_fx"),
        ("passes", "galore_fx.passes"),
        ("runtime", "galore_fx.runtime"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


def _imports(source: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports break tools that are pointed at one folder"
            names.append(node.module or "")
    return [name for name in names if name.split(".")[0] in ("galore_fx", "passes", "runtime", "tests", "tools")]


def violations(modules: dict[str, str]) -> list[str]:
    """Imports against the direction, as "importer -> imported"."""
    return [
        f"{module} -> {name}"
        for module, source in modules.items()
        for name in _imports(source)
        if not name.startswith("galore_fx") or RANK[_layer(name)] > RANK[_layer(module)]
    ]


def test_imports_go_one_way():
    modules = {module: path.read_text() for module, path in _modules().items()}
    assert len(modules) > 25, "the sources were found"
    assert violations(modules) == []


def test_the_check_can_fail():
    upward = {"galore_fx.runtime.x": "from galore_fx.passes.pass_runner import run_passes"}
    bare = {"galore_fx.passes.x": "from runtime.subspace import project"}
    assert violations(upward) == ["galore_fx.runtime.x -> galore_fx.passes.pass_runner"]
    assert violations(bare) == ["galore_fx.passes.x -> runtime.subspace"]


def test_private_torch_names_live_in_one_module():
    allowed = {"galore_fx.runtime.compatibility"}
    # Public by use, private by name or not documented: kept to where they are the subject.
    subject = {
        "galore_fx.passes.optimizer_graph.trace_step",
        "galore_fx.passes.memory_plan.fake_inductor",
        "galore_fx.passes.memory_plan.triton_schedule",
    }
    for module, path in _modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                private = any(part.startswith("_") for part in node.module.split("."))
                assert not private or module in allowed | subject, f"{module} imports {node.module}"
