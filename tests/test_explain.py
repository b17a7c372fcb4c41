"""``galore_fx.explain``: what it says is what happens, and nothing is changed by asking."""

import copy

import networkx
import pytest
import torch
from torch import nn

import galore_fx
from galore_fx.cli import explain as explain_command
from galore_fx.cli.user_input import InputError
from tests.models import adamw, backward, batches, llama


def sample(**settings):
    ids = batches(1, **settings)[0]
    return {"input_ids": ids, "labels": ids}


def passes(explanation, graph):
    """The passes of the one graph whose name starts so, by name."""
    (report,) = [report for report in explanation.graphs if report.graph.startswith(graph)]
    return {record.name: record for record in report.passes}


def test_a_plain_model_is_explained_and_not_changed():
    model = llama(3)
    before, modules = copy.deepcopy(model.state_dict()), [vars(m).copy() for m in model.modules()]
    explanation = galore_fx.explain(model, sample(), rank=8)
    steady = passes(explanation, "block model.layers.0 (LlamaDecoderLayer) and 2 like it, steady")["project_gradients"]
    # Seven linears of a block: q, k, v, o (64, 64), gate, up (176, 64), down (64, 176), in float32.
    assert steady.effect.count == 7
    assert steady.effect.bytes_before == 4 * (4 * 64 * 64 + 3 * 176 * 64)
    assert steady.effect.bytes_after == 4 * 8 * (4 * 64 + 3 * 176)
    assert steady.num_nodes_after == steady.num_nodes_before + 2 * 7, "a basis and a leaf each"
    refreshing = passes(explanation, "block model.layers.0 (LlamaDecoderLayer) and 2 like it, refreshing")
    assert refreshing["project_gradients"].num_nodes_after == steady.num_nodes_before + 3 * 7
    loss = passes(explanation, "head and loss")["chunk_loss"]
    assert (loss.effect.count, loss.effect.bytes_before) == (1, 4 * 4 * 32 * 256)
    assert passes(explanation, "AdamW's step of a projected")["lower_to_subspace"].effect.count == 2
    assert explanation.uncompiled == {}
    text = str(explanation)
    for line in ("model.layers.*.mlp.up_proj.weight", "linear of a block", "linear outside the blocks", "rank 8, cols"):
        assert line in text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [vars(m) for m in model.modules()] == modules


def test_a_compiled_model_is_explained_with_its_own_recipe_and_goes_on_training():
    model = galore_fx.compile(llama(1), recipe="galore", rank=4, optimizer=adamw())
    backward(model, batches(1)[0])
    explanation = galore_fx.explain(model, sample())
    assert explanation.plan.recipe == model.galore_fx.plan.recipe
    assert (
        passes(explanation, "block model.layers.0 (LlamaDecoderLayer), steady")["project_gradients"].effect.count == 7
    )
    assert "project_gradients" not in passes(explanation, "block model.layers.0 (LlamaDecoderLayer), refreshing"), "SVD"
    model.galore_fx.optimizer.step()
    assert model.galore_fx.stats()["num_updates"] == 1
    keeping = galore_fx.compile(llama(1), rank=4, keep_logits=True)
    assert not any(report.graph.startswith("head") for report in galore_fx.explain(keeping, sample()).graphs)
    with pytest.raises(galore_fx.SettingError, match="rank cannot be given anew"):
        galore_fx.explain(model, sample(), rank=8)


def test_a_model_on_the_meta_device_and_an_optimizer_instance():
    with torch.device("meta"):
        model = llama(1)
    ids = torch.empty((2, 16), dtype=torch.int64, device="meta")
    optimizer = torch.optim.RAdam(model.parameters(), lr=0.1)
    explanation = galore_fx.explain(model, {"input_ids": ids, "labels": ids}, optimizer=optimizer)
    assert passes(explanation, "RAdam's step of a projected")["merge_branches"].effect.count == 2
    assert not optimizer.state


def test_shared_frozen_and_other_parameters_are_told_apart():
    plain = llama(2, tie_word_embeddings=True)
    plain.model.layers[0].mlp.requires_grad_(False)
    explanation = galore_fx.explain(plain, sample(), rank=8)
    by_name = {entry.name: entry for entry in explanation.plan.parameters}
    assert by_name["model.embed_tokens.weight"].shared_with == ("lm_head.weight",)
    assert by_name["model.embed_tokens.weight"].reason == "embedding, tied to the head"
    assert by_name["model.norm.weight"].reason == "1-D, not a matrix"
    assert not any(name.startswith("model.layers.0.mlp") for name in by_name)
    assert "shared with lm_head.weight" in str(explanation)


def test_checkpoints_and_blocks_that_cannot_be_captured_are_shown():
    class Block(nn.Module):
        def __init__(self, broken):
            super().__init__()
            self.linear, self.broken = nn.Linear(8, 8), broken

        def forward(self, x):
            y = torch.utils.checkpoint.checkpoint(self.linear, x, use_reentrant=False)
            if self.broken:
                torch._dynamo.graph_break()
            return y.relu()

    for broken in (False, True):
        model = Caller(nn.ModuleList([Block(broken), Block(broken)]))
        explanation = galore_fx.explain(model, torch.ones(3, 8), rank=2)
        if broken:
            assert list(explanation.uncompiled) == ["blocks.0", "blocks.1"]
            assert "not compiled: blocks.0: block blocks.0 (Block) could not be captured" in str(explanation)
        else:
            # Two graphs: the first block's input needs no gradient.
            for name in ("blocks.0", "blocks.1"):
                assert passes(explanation, f"block {name} (Block), steady")["inline_checkpoints"].effect.count == 1


class Caller(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.sum()


def test_a_sample_that_does_not_fit_is_said():
    with pytest.raises(galore_fx.ModelError, match=r"LlamaForCausalLM does not run .*torch.int64 \(4, 32\)"):
        galore_fx.explain(llama(1), {"input_idz": batches(1)[0]})
    with pytest.raises(galore_fx.ModelError, match="not an nn.Module"):
        galore_fx.explain(lambda x: x, torch.ones(3))


@pytest.mark.parametrize("is_compiled", [False, True], ids=["plain", "compiled"])
def test_quantised_tensors_are_explained(is_compiled):
    settings = {} if is_compiled else {"recipe": "q-galore", "rank": 16}
    model = llama(2)
    if is_compiled:
        galore_fx.compile(model, recipe="q-galore", rank=16, optimizer=adamw())
    explanation = galore_fx.explain(model, sample(), **settings)
    steady = passes(explanation, "block model.layers.0 (LlamaDecoderLayer) and 1 like it, steady")
    # Seven weights in 8 bits and their seven bases in 4, each with a scale and a zero point for 256 elements.
    stored = steady["dequantize_inputs"].effect
    elements, basis_elements = 4 * 64 * 64 + 3 * 176 * 64, 7 * 64 * 16
    assert stored.count == 14 and stored.bytes_before == 4 * (elements + basis_elements)
    assert stored.bytes_after == elements + basis_elements // 2 + 3 * (elements + basis_elements) // 256
    assert steady["project_gradients"].effect.count == 7


def test_the_structure_is_a_graph_of_blocks_parameters_and_heads(tmp_path):
    plain = llama(2, tie_word_embeddings=True)
    recipe = {"recipe": "galore+", "cross_head": "query-key-shared", "rank": 8}
    explanation = galore_fx.explain(plain, sample(), **recipe)
    graph = explanation.graph
    blocks = [node for node, kind in graph.nodes(data="kind") if kind == "block"]
    assert blocks == ["model.layers.0", "model.layers.1"] and set(graph["LlamaForCausalLM"]) >= set(blocks)
    query, key = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    found = graph.nodes[query]
    assert (found["kind"], found["shape"], found["treatment"], found["rank"]) == ("parameter", "64x64", "projected", 8)
    assert graph.edges[key, query]["relation"] == "uses basis of"
    heads = graph.nodes[f"{query}: query heads"]
    assert (heads["number"], heads["size"]) == (4, 16)
    assert graph.edges["model.embed_tokens.weight", "lm_head.weight"]["relation"] == "is also"
    assert graph.nodes["model.norm.weight"]["treatment"] == "full rank"
    sizes = [graph.nodes[node].get("bytes_weights", 0) for node in graph if node in (*blocks, "LlamaForCausalLM")]
    assert sum(sizes) == explanation.plan.kept["weights"] - explanation.plan.fixed_bytes
    networkx.write_graphml(graph, tmp_path / "model.graphml")
    assert networkx.read_graphml(tmp_path / "model.graphml").nodes[query] == found


def test_the_command_explains_and_writes_the_graph(tmp_path, capsys):
    config = llama(1).config
    config.architectures = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    file = tmp_path / "model.graphml"
    sizes = ["--batch", "2", "--seq", "16", "--dtype", "float32", "--rank", "8"]
    explain_command.main([str(tmp_path / "config.json"), *sizes, "--graph", str(file)])
    assert "project_gradients" in capsys.readouterr().out
    assert networkx.read_graphml(file).has_edge("LlamaForCausalLM", "model.layers.0")
    with pytest.raises(InputError, match="--seq 65: the model has 64 positions"):
        explain_command.main([str(tmp_path / "config.json"), "--seq", "65"])
