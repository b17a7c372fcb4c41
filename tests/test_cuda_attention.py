"""Attention in a plan for CUDA: the kernel that torch takes there, and what it saves."""

import pytest
import torch
import transformers as hf
from torch.nn import functional

import galore_fx
from galore_fx.passes.memory_plan.cuda_attention import (
    Kernel,
    attention_of_cuda,
    choose_kernel,
    cuda_kernel_scratch_bytes,
)
from tests.models import adamw

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("settings", "kernel"),
    [
        ({"dtype": BF16}, Kernel.FLASH),
        ({"dtype": BF16, "dropout": 0.1}, Kernel.FLASH),
        ({"dtype": BF16, "kv_heads": 2}, Kernel.FLASH),
        ({"dtype": BF16, "has_mask": True}, Kernel.EFFICIENT),
        ({"dtype": BF16, "has_mask": True, "kv_heads": 2}, Kernel.MATH),
        ({"dtype": BF16, "head": 200}, Kernel.EFFICIENT),
        ({"dtype": BF16, "head": 512}, Kernel.EFFICIENT),
        ({"dtype": BF16, "keys": 32, "is_causal": True}, Kernel.EFFICIENT),
        ({"dtype": F32}, Kernel.EFFICIENT),
        ({"dtype": F32, "kv_heads": 2}, Kernel.MATH),
        ({"dtype": torch.float64}, Kernel.MATH),
    ],
)
def test_the_kernel_is_the_one_that_torch_takes(settings, kernel):
    def make(dtype, kv_heads=4, head=64, keys=16, has_mask=False, dropout=0.0, is_causal=False):
        query = torch.empty(2, 4, 16, head, dtype=dtype, device="meta")
        key = torch.empty(2, kv_heads, keys, head, dtype=dtype, device="meta")
        return query, key, key, torch.empty(16, keys) if has_mask else None, dropout, is_causal

    assert choose_kernel(*make(**settings)) is kernel


def test_a_graph_with_each_kernel_has_the_output_of_the_one_it_replaces():
    class Attention(torch.nn.Module):
        def forward(self, q, k, mask):
            first = functional.scaled_dot_product_attention(q, k, k, is_causal=True)
            return first + functional.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    gm = torch.fx.symbolic_trace(Attention())
    attention_of_cuda(gm)
    for dtype in (BF16, F32, torch.float64):
        q = torch.empty(2, 4, 16, 60, dtype=dtype, device="meta", requires_grad=True)
        out = gm(q, torch.empty_like(q), torch.ones(16, 16, dtype=torch.bool, device="meta"))
        assert out.shape == q.shape and out.dtype is dtype and out.requires_grad


def test_workspace_of_the_flash_backward():
    q, k = torch.empty(2, 8, 100, 80, dtype=BF16, device="meta"), torch.empty(2, 2, 100, 80, dtype=BF16, device="meta")
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    sums, gradient, expanded = 2 * 8 * 128 * 4, 2 * 8 * 128 * 96 * 4, 2 * 2 * 100 * 8 * 80 * 2
    assert cuda_kernel_scratch_bytes(backward, (q, q, k, k), {}) == sums + gradient + expanded
    assert cuda_kernel_scratch_bytes(torch.ops.aten.mm.default, (q, q), {}) == 0


def test_dropout_costs_no_attention_matrix_on_cuda():
    config = hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256, bos_token_id=None, eos_token_id=None)
    ids = torch.zeros((2, 256), dtype=torch.long)
    peaks = {}
    for device in ("cpu", "cuda"):
        model = hf.GPT2LMHeadModel(config).bfloat16().to("meta").train()
        sample = {"input_ids": ids, "labels": ids}
        plan = galore_fx.plan(model, sample=sample, optimizer=adamw(), recipe="full", device=device)
        assert plan.prediction.uncaptured == ()
        peaks[device] = plan.prediction.peak_bytes
    matrix = 2 * 4 * 256 * 256 * 2  # of one layer, in bfloat16
    assert peaks["cpu"] - peaks["cuda"] > matrix
