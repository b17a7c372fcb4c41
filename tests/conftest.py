"""Shared by all tests: no GPU unless there is one, and quiet imports."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx as inductor

from galore_fx.passes.model_graph import region_compiler
from galore_fx.passes.optimizer_graph import update_compiler


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips ``gpu`` tests with the reason where there is no device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


_EAGER: tuple[region_compiler.Regions, update_compiler.Variants] = ({}, update_compiler.Variants())


@pytest.fixture
def without_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs graphs as AOTAutograd leaves them: C++ compilers take most of a suite's time.

    For tests of what is computed; one among them that is marked ``kernels`` is compiled all the same. Graphs that are
    compiled so are kept apart from those of other tests.
    """
    if request.node.get_closest_marker("kernels"):
        yield
        return

    def leave(gm: fx.GraphModule, *_: object, **__: object) -> object:
        return make_boxed_func(gm.forward)

    monkeypatch.setattr(inductor, "compile_fx", partial(inductor.compile_fx, inner_compile=leave))
    monkeypatch.setattr(inductor, "compile_fx_inner", leave)
    monkeypatch.setattr(region_compiler, "_REGIONS", _EAGER[0])
    monkeypatch.setattr(update_compiler, "_VARIANTS", _EAGER[1])
    with functorch_config.patch(enable_autograd_cache=False):
        yield
