"""Lowering for CUDA on a machine without it."""

import torch

from galore_fx.passes.memory_plan.fake_inductor import lowering_only
from galore_fx.passes.memory_plan.storage_counter import StorageCounter
from galore_fx.runtime.torch_private import FakeTensorMode


def _fused_calls(function, *inputs, for_cuda):
    """Numbers of arguments of the kernels that a function becomes, and the most bytes alive besides its inputs."""
    calls = []
    counter = StorageCounter()
    torch._dynamo.reset()
    with FakeTensorMode(), torch.no_grad():
        fakes = [torch.empty(shape) for shape in inputs]
        with lowering_only(lambda arguments: calls.append(len(arguments)), for_cuda=for_cuda):
            compiled = torch.compile(function)
            compiled(*fakes)
            calls.clear()
            with counter:
                compiled(*fakes)
    return calls, max(moment.total for moment in counter.moments(0, counter.now))


def test_graphs_are_scheduled_as_for_triton():
    def tall_sum(x):
        return (x * 2).sum(0)

    on_cpu, _ = _fused_calls(tall_sum, (100_000, 4), for_cuda=False)
    on_cuda, peak = _fused_calls(tall_sum, (100_000, 4), for_cuda=True)
    assert len(on_cpu) == 1
    assert len(on_cuda) == 2, "a long reduction is split for a GPU's many processors"
    assert 16 < peak <= 100_000 * 4, "partial sums, and no whole temporary"


def test_elementwise_work_is_one_kernel_and_products_stay_library_calls():
    def layer(x, w):
        return torch.relu(x @ w) * 2 + 1

    calls, peak = _fused_calls(layer, (64, 32), (32, 48), for_cuda=True)
    assert len(calls) == 1
    assert peak == 64 * 48 * 4, "written over the product"
