"""Which blocks stand for which, and copies of a model that are short."""

import copy

import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, T5Config, T5ForConditionalGeneration

from galore_fx.passes.memory_plan.repeated_blocks import deepcopy_short, short_lists, stand_ins
from galore_fx.passes.model_graph.find_regions import find_regions
from tests.models import llama


def members(model):
    return stand_ins(model, find_regions(model))


def test_the_second_of_a_row_stands_for_all_between_the_first_and_the_last():
    assert members(llama(6)) == ((0,), (1, 2, 3, 4), (5,))
    assert members(llama(3)) == ((0,), (1,), (2,))


def test_encoder_and_decoder_are_two_rows():
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=5, num_heads=4, vocab_size=100, decoder_start_token_id=0)
    # The first block of each has the position bias.
    assert members(T5ForConditionalGeneration(config)) == ((0,), (1,), (2, 3), (4,), (5,), (6,), (7, 8), (9,))


def test_blocks_that_differ_end_a_row():
    frozen, wider, shared = llama(6), llama(6), llama(6)
    frozen.model.layers[2].requires_grad_(False)
    assert members(frozen) == ((0,), (1,), (2,), (3,), (4,))  # the frozen one is no region, and splits the row
    wider.model.layers[3].mlp.act_fn = nn.Tanh()
    assert members(wider) == ((0,), (1,), (2,), (3,), (4,), (5,))
    shared.model.layers[2].mlp.up_proj.weight = shared.model.layers[4].mlp.up_proj.weight
    assert members(shared) == tuple((i,) for i in range(6))


def test_alternating_kinds_of_attention_are_no_row():
    config = Gemma2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=100,
    )  # fmt: skip
    assert members(Gemma2ForCausalLM(config)) == tuple((i,) for i in range(6))


def test_a_short_copy_has_the_first_the_second_and_the_last_and_leaves_the_model_alone():
    model = llama(6, tie_word_embeddings=True)
    for index, layer in enumerate(model.model.layers):
        nn.init.constant_(layer.input_layernorm.weight, index)
    before = copy.deepcopy(model.state_dict())
    regions = find_regions(model)
    short = deepcopy_short(model, short_lists(model, regions, stand_ins(model, regions)))
    assert [layer.input_layernorm.weight[0].item() for layer in short.model.layers] == [0.0, 1.0, 5.0]
    assert short.lm_head.weight is short.model.embed_tokens.weight
    assert len(model.model.layers) == 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not {id(p) for p in short.parameters()} & {id(p) for p in model.parameters()}
