"""Records the results of training, so that a refactoring can be shown to change none of them.

    python -m tools.lab.snapshot --record    run every case and write tools/lab/results/snapshot.json
    python -m tools.lab.snapshot --check     run every case and compare; the exit status is the number of differences
    python -m tools.lab.snapshot --check galore+ plans    only the cases whose name contains one of these words

A case trains a recipe with its update mode, dtype and bits of the weights for 12 updates. Bases are refreshed twice,
deferred updates accumulate gradients, one step has a NaN, and after 7 updates a new model loads the state. Recorded are
digests of weights and saved optimizer state, the counted peak of a step, the numbers of refreshes, skips and
compilations, the passes that ran, and the plans of six models. Only a few cases run Inductor's kernels.

Digests depend on the arithmetic of the CPU: on another kind of processor, record the older commit there first.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import multiprocessing
import multiprocessing.connection
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx as inductor
from torch._inductor import config as inductor_config
from tqdm import tqdm

import galore_fx
from galore_fx.cli.preset_models import PRESETS, build
from galore_fx.planner.verify_peak import counted_peak
from tools.lab.rows import RESULTS, ROOT, environment

Task = Callable[[], dict[str, Any]]
NUM_PROCESSES = 2
FILE = RESULTS / "snapshot.json"
UPDATES, STOP, NAN_AT = 12, 7, 4
VOCABULARY, BATCH, LENGTH = 128, 2, 16
# Parts whose published values have no effect within 12 updates of a small model, or do not fit it.
SMALL: dict[str, Any] = {"rank": 8, "refresh_gap": 5}
OF_RECIPE: dict[str, dict[str, Any]] = {
    "galore+": {"residual_warm_up": 4, "residual_density": 0.1},
    "lotus": {"lotus_interval": 3, "lotus_threshold": 1.0},
    "vlorp": {"granularity": 4},
    "q-galore": {"lazy_queue": 1, "lazy_threshold": 0.5},
}
# Parts that no named recipe uses.
PARTS: dict[str, dict[str, Any]] = {
    "rows": {"project": "output"},
    "rotate": {"moments_on_refresh": "rotate"},
    "reset": {"moments_on_refresh": "reset"},
    "iterations": {"iterations": 2, "oversampling": 4},
    "shared heads": {"project": "input", "cross_head": "query-key-value-shared"},
    "heads": {"project": "input", "cross_head": "query-key-value"},
    "additive residual": {"residual": "sparse", "residual_variant": "additive", "residual_warm_up": 4},
    "rectified residual": {"residual": "sparse", "residual_variant": "rectified", "residual_warm_up": 4},
    "lazy first vector": {"refresh": "lazy", "lazy_statistic": "first-vector", "lazy_queue": 1, "lazy_threshold": 0.1},
    "limited refreshes": {"refresh_limit": 1, "stagger": False},
    "clipped": {"max_grad_norm": 0.5},
    "recomputed": {"activation_budget": 0.0},
    "8-bit states": {"state_bits": 8},
    "nearest": {"rounding": "nearest"},
    "random basis": {"basis": "random"},
    "4-bit basis": {"basis_bits": 4},
}
OF_NORMALIZED: dict[str, dict[str, Any]] = {
    "columns": {"weight_norm": "column"},
    "one side": {"sides": "one", "basis": "subspace-iteration"},
    "merged": {"merge_factors": True},
}
# Cases that run Inductor's kernels: recipe, update mode, dtype, bits of the weights.
WITH_KERNELS = {
    ("auto", "deferred", "bfloat16", 16),
    ("galore+", "in-backward", "float32", 16),
    ("q-galore", "deferred", "bfloat16", 8),
    ("gradnormlorp", "deferred", "float32", 16),
    ("fira", "in-backward", "bfloat16", 16),
}
PLANS: dict[str, dict[str, Any]] = {
    "llama-60m": {"budget": "1GB", "device": "cpu", "dtype": "float32"},
    "llama-130m": {"budget": "2GB", "device": "cpu", "dtype": "bfloat16", "recipe": "galore"},
    "gpt2": {"budget": "3GB", "device": "cuda", "dtype": "float32", "recipe": "galore+"},
    "roberta-base": {"budget": "4GB", "device": "cuda", "dtype": "bfloat16", "recipe": "gradnormlorp"},
    "llama-7b": {"budget": "24GB", "device": "cuda", "dtype": "bfloat16"},
    "llama-3-8b": {"budget": None, "device": "cuda", "dtype": "bfloat16", "recipe": "q-galore", "rank": 64},
}
PLAN_LENGTH = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        recipe: a name of ``galore_fx.RECIPES``.
        update: "deferred" or "in-backward".
        dtype: torch's name of the model's dtype.
        weight_bits: 16 for weights in the model's dtype, 8 for 8-bit codes.
        part: a key of ``PARTS`` or ``OF_NORMALIZED``, or empty.
    """

    recipe: str
    update: str
    dtype: str
    weight_bits: int
    part: str = ""

    @property
    def name(self) -> str:
        """Name of the case in the file."""
        of = (self.recipe, self.part, self.update, self.dtype, "8-bit weights" if self.weight_bits == 8 else "")
        return ", ".join(filter(None, of))

    @property
    def has_kernels(self) -> bool:
        """Whether Inductor compiles the case."""
        return not self.part and (self.recipe, self.update, self.dtype, self.weight_bits) in WITH_KERNELS

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of ``galore_fx.compile``."""
        found = {**SMALL, **OF_RECIPE.get(self.recipe, {}), "recipe": self.recipe, "update": self.update}
        if self.recipe == "full":
            del found["rank"]
        found["weight_bits"] = 8 if self.weight_bits == 8 else None
        return found | PARTS.get(self.part, {}) | OF_NORMALIZED.get(self.part, {})


def cases() -> list[Case]:
    """Returns every combination of the grid that galore_fx accepts, and each further part once."""
    grid = itertools.product(galore_fx.RECIPES, ("deferred", "in-backward"), ("float32", "bfloat16"), (16, 8))
    found = [Case(*each) for each in grid]
    for recipe, parts in (("auto", PARTS), ("gradnormlorp", OF_NORMALIZED)):
        found += [Case(recipe, "deferred", "bfloat16", 16, part) for part in parts]
    return [case for case in found if _is_allowed(case)]


def run(case: Case) -> dict[str, Any]:
    """Trains the case and returns the recorded results."""
    with _quiet(), _kernels(case.has_kernels):
        model = _train(case)
        stats = model.galore_fx.stats()
        report = galore_fx.explain(_model(case), _batch(0), optimizer=_adamw(), **case.settings)
        return {
            "weights": _digest(model.state_dict()),
            "optimizer": _digest(model.galore_fx.optimizer.state_dict()),
            "refreshes": stats["num_refreshes"],
            "skipped": stats["num_skipped"],
            "compilations": [stats[f"num_{kind}"] for kind in ("region_graphs", "region_variants", "update_graphs")],
            "passes": [[graph.graph, *(done.name for done in graph.passes)] for graph in report.graphs],
            "counted_peak": counted_peak(model, _batch(0)),
        }


def run_plan(name: str) -> dict[str, Any]:
    """Plans a preset and returns its peak and its phases, in bytes."""
    settings = dict(PLANS[name])
    dtype = getattr(torch, settings.pop("dtype"))
    with torch.device("meta"):
        model = build(PRESETS[name]).to(dtype)
    ids = torch.zeros(1, PLAN_LENGTH, dtype=torch.long, device="meta")
    labels = torch.zeros(1, dtype=torch.long, device="meta") if name == "roberta-base" else ids
    with _quiet():
        plan = galore_fx.plan(model, sample={"input_ids": ids, "labels": labels}, optimizer=_adamw(), **settings)
    return {"peak": plan.peak_bytes, "phases": plan.phases}


def main() -> int:
    """Records or checks; returns 0 after recording, otherwise the number of differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--record", action="store_true", help="write the file anew")
    mode.add_argument("--check", action="store_true", help="compare with the file")
    parser.add_argument("words", nargs="*", help="only cases whose name contains one of them; plans are 'plans NAME'")
    arguments = parser.parse_args()
    work: dict[str, Task] = {f"plans {name}": functools.partial(run_plan, name) for name in PLANS}
    work |= {case.name: functools.partial(run, case) for case in cases()}
    if arguments.words:
        work = {name: task for name, task in work.items() if any(word in name for word in arguments.words)}
    found = _run_all(_grouped(work))
    for name, case in found.items():
        if "error" in case:
            print(f"{name}: {case['error']}")
    if arguments.record:
        if arguments.words:
            found = json.loads(FILE.read_text())["cases"] | found
        FILE.write_text(json.dumps({"machine": _machine(), "cases": found}, indent=1, sort_keys=True) + "\n")
        print(f"wrote {FILE.relative_to(ROOT)}: {len(found)} cases")
        return 0
    recorded = json.loads(FILE.read_text())
    if {**recorded["machine"], "commit": ""} != {**_machine(), "commit": ""}:
        print(f"recorded on {recorded['machine']}, this is {_machine()}: digests may differ for that alone")
    return _compare(recorded["cases"], found, is_whole=not arguments.words)


def _grouped(work: dict[str, Task]) -> list[dict[str, Task]]:
    """Groups tasks by process: cases that share graphs together, so that none is captured twice; others alone."""
    groups: dict[object, dict[str, Task]] = {}
    shared = {case.name: (case.recipe, case.part, case.dtype) for case in cases() if not case.has_kernels}
    for name, task in work.items():
        groups.setdefault(shared.get(name, name), {})[name] = task
    return list(groups.values())


def _run_all(groups: list[dict[str, Task]]) -> dict[str, Any]:
    """Runs each group in its own process, with one thread, so that sums keep their order."""
    torch.set_num_threads(1)
    inductor_config.compile_threads = 1  # a pool of compilers does not survive a fork
    context = multiprocessing.get_context("fork")
    waiting, running, found = list(groups), {}, {}
    with tqdm(total=sum(map(len, groups)), unit="case") as progress:
        while waiting or running:
            while waiting and len(running) < NUM_PROCESSES:
                group = waiting.pop(0)
                here, there = context.Pipe(duplex=False)
                # Forked from the main thread, because torch's profiler runs in no other.
                process = context.Process(target=_run_group, args=(group, there))
                process.start()
                there.close()
                running[here] = group, process
            for here in multiprocessing.connection.wait(list(running)):
                group, process = running[here]
                try:
                    name, result = here.recv()
                    found[name] = result
                    progress.update()
                except EOFError:
                    del running[here]
                    process.join()
                    found |= {name: {"error": "its process has died"} for name in group if name not in found}
    return found


def _run_group(group: dict[str, Task], connection: Any) -> None:
    for name, task in group.items():
        try:
            result = json.loads(json.dumps(task()))
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        connection.send((name, result))
    connection.close()


def _compare(recorded: dict[str, Any], found: dict[str, Any], *, is_whole: bool) -> int:
    differences = []
    for name, new in found.items():
        old = recorded.get(name)
        if old is None:
            differences.append(f"{name}: not in the file")
            continue
        for key in new:
            if old.get(key) != new[key]:
                differences.append(f"{name}: {key} was {old.get(key)}, is {new[key]}")
    if is_whole:
        differences += [f"{name}: gone" for name in recorded if name not in found]
    print("\n".join(differences) or f"{len(found)} cases are as recorded")
    return len(differences)


def _train(case: Case) -> nn.Module:
    """Trains 12 updates; after 7 a new model loads the state of the first and continues."""
    model = galore_fx.compile(_model(case), optimizer=_adamw(), **case.settings)
    numbers = itertools.count()
    for update in range(UPDATES):
        if update == STOP:
            state = model.state_dict(), model.galore_fx.optimizer.state_dict()
            model = galore_fx.compile(_model(case), optimizer=_adamw(), **case.settings)
            model.load_state_dict(state[0])
            model.galore_fx.optimizer.load_state_dict(state[1])
        for _ in range(2 if case.update == "deferred" else 1):
            loss = model(**_batch(next(numbers))).loss
            (loss * float("nan") if update == NAN_AT else loss).backward()
        model.galore_fx.optimizer.step()
    return model


def _model(case: Case) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).to(getattr(torch, case.dtype)).train()


def _batch(number: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "labels": ids}


def _adamw() -> Callable[..., torch.optim.Optimizer]:
    return functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.01)


def _is_allowed(case: Case) -> bool:
    from galore_fx.recipes.presets import resolve_recipe

    settings = case.settings
    try:
        resolve_recipe(settings.pop("recipe"), settings)
    except galore_fx.SettingError:
        return False
    return True


@functools.singledispatch
def _leaves(value: Any) -> Iterator[bytes]:
    if isinstance(value, float | int | str | bool) or value is None:
        yield repr(value).encode()
    else:
        raise TypeError(f"a {type(value).__name__} in a state that is saved")


@_leaves.register
def _(value: dict) -> Iterator[bytes]:  # type: ignore[type-arg]
    for each in value.values():
        yield from _leaves(each)


@_leaves.register
def _(value: list | tuple) -> Iterator[bytes]:  # type: ignore[type-arg]
    for each in value:
        yield from _leaves(each)


@_leaves.register
def _(value: torch.Tensor) -> Iterator[bytes]:
    parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else None
    if parts:
        for part in parts:
            yield from _leaves(getattr(value, part))
        return
    plain = value.detach().contiguous().reshape(-1).view(torch.uint8)
    yield f"{value.dtype} {tuple(value.shape)} ".encode() + plain.numpy().tobytes()


def _digest(state: Any) -> str:
    """Returns a digest of the values in a state, not of their names or order, which a refactoring may change."""
    return hashlib.sha256(b"".join(sorted(hashlib.sha256(leaf).digest() for leaf in _leaves(state)))).hexdigest()[:16]


@functools.cache
def _machine() -> dict[str, str]:
    here = environment()
    kept = {key: here[key] for key in ("commit", "device", "torch")}
    return {**kept, "transformers": transformers.__version__}


class _kernels:
    """Context in which Inductor compiles kernels, or graphs run as AOTAutograd leaves them."""

    def __init__(self, compiled: bool) -> None:
        self._compiled = compiled

    def __enter__(self) -> None:
        self._before = inductor.compile_fx, inductor.compile_fx_inner
        if self._compiled:
            return

        def leave(gm: torch.fx.GraphModule, *_: object, **__: object) -> object:
            return make_boxed_func(gm.forward)

        inductor.compile_fx = functools.partial(inductor.compile_fx, inner_compile=leave)
        inductor.compile_fx_inner = leave

    def __exit__(self, *_: object) -> None:
        inductor.compile_fx, inductor.compile_fx_inner = self._before


class _quiet(warnings.catch_warnings):
    """Context without warnings and log messages."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
