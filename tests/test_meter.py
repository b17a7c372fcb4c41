"""Counting memory."""

import sys

import pytest
import torch

from galore_fx.runtime.measure.meter import count_memory, memory_timeline, tensor_bytes

CPU = torch.device("cpu")


def test_the_peak_and_what_is_kept_are_exact():
    kept = []

    def work():
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(3000, dtype=torch.uint8)
        del first
        third = torch.empty(500, dtype=torch.uint8)
        del second
        kept.append(third)

    counted = count_memory(work, CPU)
    assert (counted.transient_peak_bytes, counted.kept_bytes) == (4000, 500)


def test_the_timeline_starts_at_nothing_and_goes_on_in_time():
    timeline = memory_timeline(lambda: torch.empty(64).neg())
    assert timeline[0] == (0.0, 0)
    assert [time for time, _ in timeline] == sorted(time for time, _ in timeline)
    assert max(live for _, live in timeline) == 512


def test_a_storage_is_counted_once():
    tensor = torch.zeros(100)
    assert tensor_bytes([tensor, tensor[10:], tensor.view(10, 10)]) == 400


def test_other_lines_on_stderr_are_passed_on(capfd):
    def work():
        torch.empty(8)
        sys.stderr.write("the user's own line\n")

    memory_timeline(work)
    err = capfd.readouterr().err
    assert "the user's own line" in err and "SyncActivityProfiler" not in err


@pytest.mark.gpu
def test_on_cuda_the_allocators_peak_is_read():
    counted = count_memory(lambda: torch.empty(2**20, dtype=torch.uint8, device="cuda"), torch.device("cuda"))
    assert counted.transient_peak_bytes == 2**20
