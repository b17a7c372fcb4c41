"""Times rank plans: attention of grouped queries is counted, and a formula that fails ends no plan."""

import pytest
import torch
import transformers as hf
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

import galore_fx
from galore_fx.passes.memory_plan import roofline
from galore_fx.passes.memory_plan.roofline import RTX_4090, attention_flops


@pytest.mark.parametrize("value_head", [16, 24])
def test_attention_is_counted_as_torch_counts_it(value_head):
    query, key, value = (torch.empty(2, 4, length, head) for length, head in ((8, 16), (12, 16), (12, value_head)))
    shapes = [tuple(each.shape) for each in (query, key, value)]
    assert attention_flops(query, key, value) == sdpa_flop_count(*shapes)
    grad = (2, 4, 8, value_head)
    assert attention_flops(query, key, value, backward=True) == sdpa_backward_flop_count(grad, *shapes)


def test_fewer_heads_of_keys_cost_as_many_products():
    query, key = torch.empty(2, 8, 16, 4), torch.empty(2, 8, 16, 4)
    assert attention_flops(query, key[:, :2], key[:, :2]) == attention_flops(query, key, key)


GROUPED = {
    "Llama 3": (hf.LlamaForCausalLM, hf.LlamaConfig),
    "Qwen 2": (hf.Qwen2ForCausalLM, hf.Qwen2Config),
    "Mistral": (hf.MistralForCausalLM, hf.MistralConfig),
}


def grouped(name):
    torch.manual_seed(0)
    model_class, config_class = GROUPED[name]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return model_class(config_class(**sizes, num_key_value_heads=2, vocab_size=128, **special)).train()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", list(GROUPED))
def test_a_model_of_grouped_queries_is_planned(name, device):
    ids = torch.randint(0, 128, (2, 32))
    plan = galore_fx.plan(grouped(name), sample={"input_ids": ids, "labels": ids}, rank=8, device=device)
    assert plan.prediction.peak_bytes > 0 and plan.prediction.seconds["backward"] > 0


def test_a_formula_that_fails_is_named_and_ends_nothing(monkeypatch, caplog):
    def fails(*_arguments, **_settings):
        raise AssertionError("shapes are incompatible")

    roofline._note_unknown.cache_clear()
    monkeypatch.setitem(roofline.flop_registry, torch.ops.aten.mm, fails)
    x = torch.ones(8, 8)
    with caplog.at_level("WARNING"):
        times = [RTX_4090.seconds(torch.ops.aten.mm.default, (x, x), {}, x) for _ in range(2)]
    assert times == [3 * x.nbytes / RTX_4090.bytes_per_second] * 2  # the bytes alone
    assert caplog.text.count("aten::mm is not counted in a plan's time: AssertionError: shapes") == 1
