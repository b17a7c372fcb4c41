"""Heads found from the graph equal what the config says: which rows of which weight, how many, of what size."""

import copy

import pytest
import torch
import transformers as hf
from torch import fx, nn

import galore_fx
from galore_fx.passes.model_graph.group_heads import group_heads
from tools.lab.model_families import _PLAIN, _SIZES, FAMILIES, Family, _causal

GROUPED = {**_SIZES, "num_key_value_heads": 2}
MORE = {
    "Qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**GROUPED, head_dim=16)),  # norms of q and k, heads wider than hidden
    "Phi-3": (hf.Phi3ForCausalLM, hf.Phi3Config(**{**GROUPED, "pad_token_id": 0})),  # fused and grouped
    "Falcon, grouped": (hf.FalconForCausalLM, hf.FalconConfig(**_SIZES, new_decoder_architecture=True, num_kv_heads=2)),
    "OLMo-2": (hf.Olmo2ForCausalLM, hf.Olmo2Config(**GROUPED)),  # norms before the heads are split
    "GPT-J": (
        hf.GPTJForCausalLM,
        hf.GPTJConfig(**_PLAIN, n_embd=32, n_head=4, n_layer=2, n_positions=64, rotary_dim=4),
    ),
}
CASES = {name: FAMILIES[name] for name in FAMILIES if name != "RoBERTa"} | {
    name: Family("decoder", model_class, config, _causal) for name, (model_class, config) in MORE.items()
}
# Weights of q, k, v (or all in one) and of the output, by what their names end with.
SEPARATE = (
    *(("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj", "k_proj", "v_proj", "out_proj")),
    *(("q_proj", "k_proj", "v_proj", "dense"), ("query", "key", "value", "attention.output.dense")),
    *(("q_lin", "k_lin", "v_lin", "out_lin"), ("Attention.q", "Attention.k", "Attention.v", "Attention.o")),
)
FUSED = (("attn.c_attn", "attn.c_proj"), ("query_key_value", "dense"), ("qkv_proj", "o_proj"))


def expected(name, config):
    """{(ending, role): heads}, from sizes and the documented layout of the family's fused weight."""
    num_heads = config.num_attention_heads
    num_kv = getattr(config, "num_key_value_heads", None) or num_heads
    num_kv = {"Falcon": 1, "Falcon, grouped": 2}.get(name, num_kv)
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // num_heads

    def heads(first, count, stride=size):
        return tuple(tuple(range(first + i * stride, first + i * stride + size)) for i in range(count))

    if name in ("GPT-2", "Phi-3"):  # all of q, then k, then v
        k, v = num_heads * size, (num_heads + num_kv) * size
        return {"query": heads(0, num_heads), "key": heads(k, num_kv), "value": heads(v, num_kv)}
    if name in ("GPT-NeoX", "BLOOM"):  # q, k, v of a head beside each other
        return {role: heads(i * size, num_heads, 3 * size) for i, role in enumerate(("query", "key", "value"))}
    if name.startswith("Falcon"):  # the queries of a group, then its k and v
        group = num_heads // num_kv
        block = (group + 2) * size
        queries = tuple(head for g in range(num_kv) for head in heads(g * block, group))
        return {
            "query": queries,
            "key": heads(group * size, num_kv, block),
            "value": heads((group + 1) * size, num_kv, block),
        }
    return {"query": heads(0, num_heads), "key": heads(0, num_kv), "value": heads(0, num_kv)}


def check(name, family):
    explained = galore_fx.explain(family.model(), family.batch(torch.Generator().manual_seed(1)))
    found = {(w.removesuffix(".weight"), g.role): g.heads for w, groups in explained.heads.items() for g in groups}
    wanted = expected(name, family.config)
    endings = [each for each in SEPARATE if any(key[0].endswith(each[0]) for key in found)]
    if name in ("GPT-2", "GPT-NeoX", "BLOOM", "Falcon", "Falcon, grouped", "Phi-3"):
        (fused,) = [each for each in FUSED if any(key[0].endswith(each[0]) for key in found)]
        endings = [(fused[0], fused[0], fused[0], fused[1])]
    assert endings, f"no heads in {sorted(found)}"
    num_layers = 0
    for (weight, role), heads in found.items():
        number = ("query", "key", "value", "output").index(role)
        assert any(weight.endswith(each[number]) for each in endings), (weight, role)
        size = len(heads[0])
        columns = tuple(tuple(range(h * size, (h + 1) * size)) for h in range(len(wanted["query"])))
        assert heads == (columns if role == "output" else wanted[role]), (weight, role)
        num_layers += role == "query"
    # T5's decoder has two attentions in each of its layers.
    assert num_layers == (6 if name == "T5" else 2)
    assert len(found) == 4 * num_layers


@pytest.mark.parametrize("name", CASES)
def test_heads_are_those_of_the_config(name):
    check(name, CASES[name])


def test_explain_prints_them():
    family = CASES["Qwen3"]
    text = str(galore_fx.explain(family.model(), family.batch(torch.Generator().manual_seed(1))))
    (line,) = [line for line in text.splitlines() if "k_proj.weight" in line and " key " in line]
    assert line.split() == [
        "model.layers.*.self_attn.k_proj.weight",
        "2",
        "key",
        "2",
        "of",
        "16",
        "rows",
        "0-15,",
        "16-31",
    ]


@pytest.mark.parametrize("name", ["GPT-2", "BERT"])
def test_the_products_of_eager_attention_are_recognised(name):
    family = CASES[name]
    config = copy.deepcopy(family.config)
    config._attn_implementation = "eager"
    check(name, Family(family.kind, family.model_class, config, family.batch))


def test_torch_multi_head_attention():
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    explained = galore_fx.explain(nn.Sequential(layer).train(), (torch.randn(2, 5, 16),))
    groups = explained.heads["0.self_attn.in_proj_weight"]
    assert [(g.role, g.num_heads, g.head_size, g.heads[0][0]) for g in groups] == [
        *(("query", 4, 4, 0), ("key", 4, 4, 16), ("value", 4, 4, 32)),
    ]


def test_values_made_of_two_weights_have_no_heads():
    class Mixed(nn.Module):
        def forward(self, x, a, b, c):
            query = nn.functional.linear(x, a) + nn.functional.linear(x, b)
            value = nn.functional.linear(x, c)
            split = [each.view(2, 3, 2, 4).transpose(1, 2) for each in (query, value)]
            value[:, x[0, :, 0].argsort()]  # moved by what only a run can tell: it has no labels, and that is all
            return nn.functional.scaled_dot_product_attention(split[0], split[1], split[1])

    gm = fx.symbolic_trace(Mixed())
    inputs = (torch.randn(2, 3, 8), *(torch.randn(8, 8) for _ in range(3)))
    fx.passes.shape_prop.ShapeProp(gm).propagate(*inputs)

    class Shapes(fx.Interpreter):
        def run_node(self, node):
            node.meta["example_value"] = super().run_node(node)
            return node.meta["example_value"]

    Shapes(gm).run(*inputs)
    assert [(group.placeholder, group.role) for group in group_heads(gm)] == [(3, "key"), (3, "value")]
