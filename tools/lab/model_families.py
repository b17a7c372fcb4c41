"""Tiny random models of transformers' families, each with a training batch; for docs/models.md and the tests.

Dropout is off everywhere, so that a compiled and a plain model compute the same.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

import galore_fx
from galore_fx.runtime.subspace.projection import project

VOCABULARY, HIDDEN, HEADS, LAYERS, LENGTH, BATCH = 128, 32, 4, 2, 16, 4
_PLAIN = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_SIZES = {
    **_PLAIN,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 4 * LENGTH,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
_NO_BERT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        kind: kind of model for the table, such as "decoder".
        model_class: the class of transformers that is trained.
        config: its tiny configuration.
        batch: returns a training batch from a generator.
    """

    kind: str
    model_class: type[nn.Module]
    config: Any
    batch: Callable[[torch.Generator], Batch]

    def model(self) -> nn.Module:
        """Returns a fresh model in training mode, always with the same weights."""
        torch.manual_seed(0)
        return self.model_class(self.config).train()


def _tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)


def _causal(generator: torch.Generator) -> Batch:
    ids = _tokens(generator)
    return {"input_ids": ids, "labels": ids}


def _masked(generator: torch.Generator) -> Batch:
    ids = _tokens(generator)
    hidden = torch.rand(ids.shape, generator=generator) < 0.3
    mask = torch.ones_like(ids)
    mask[0, LENGTH // 2 :] = 0
    return {"input_ids": ids.masked_fill(hidden, 2), "attention_mask": mask, "labels": ids.masked_fill(~hidden, -100)}


def _translation(generator: torch.Generator) -> Batch:
    return {"input_ids": _tokens(generator), "labels": _tokens(generator)}


def _images(generator: torch.Generator) -> Batch:
    images = torch.randn((BATCH, 3, 16, 16), generator=generator)
    return {"pixel_values": images, "labels": torch.randint(0, 4, (BATCH,), generator=generator)}


def _causal_lm(model_class: type[nn.Module], config: Any) -> Family:
    return Family("decoder", model_class, config, _causal)


FAMILIES: dict[str, Family] = {
    "Llama": _causal_lm(hf.LlamaForCausalLM, hf.LlamaConfig(**_SIZES)),
    "Mistral": _causal_lm(hf.MistralForCausalLM, hf.MistralConfig(**_SIZES, num_key_value_heads=2)),
    "Qwen2": _causal_lm(hf.Qwen2ForCausalLM, hf.Qwen2Config(**_SIZES, num_key_value_heads=2)),
    "Gemma": _causal_lm(hf.GemmaForCausalLM, hf.GemmaConfig(**_SIZES, num_key_value_heads=1, head_dim=8)),
    "Phi": _causal_lm(hf.PhiForCausalLM, hf.PhiConfig(**_SIZES)),
    "GPT-2": _causal_lm(
        hf.GPT2LMHeadModel,
        hf.GPT2Config(
            **_PLAIN,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=4 * LENGTH,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
    ),
    "GPT-NeoX": _causal_lm(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**_SIZES)),
    "OPT": _causal_lm(
        hf.OPTForCausalLM,
        hf.OPTConfig(
            **{**_PLAIN, "pad_token_id": 1},
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            ffn_dim=2 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=4 * LENGTH,
            dropout=0.0,
            attention_dropout=0.0,
        ),
    ),
    "BLOOM": _causal_lm(
        hf.BloomForCausalLM,
        hf.BloomConfig(
            **_PLAIN, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, hidden_dropout=0.0, attention_dropout=0.0
        ),
    ),
    "Falcon": _causal_lm(hf.FalconForCausalLM, hf.FalconConfig(**_SIZES)),
    "BERT": Family("encoder", hf.BertForMaskedLM, hf.BertConfig(**_SIZES, **_NO_BERT_DROPOUT), _masked),
    "RoBERTa": Family(
        "encoder",
        hf.RobertaForMaskedLM,
        hf.RobertaConfig(**{**_SIZES, "pad_token_id": 1}, **_NO_BERT_DROPOUT),
        _masked,
    ),
    "DistilBERT": Family(
        "encoder",
        hf.DistilBertForMaskedLM,
        hf.DistilBertConfig(
            vocab_size=VOCABULARY,
            pad_token_id=0,
            dim=HIDDEN,
            hidden_dim=2 * HIDDEN,
            n_layers=LAYERS,
            n_heads=HEADS,
            max_position_embeddings=4 * LENGTH,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        _masked,
    ),
    "T5": Family(
        "encoder-decoder",
        hf.T5ForConditionalGeneration,
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            d_kv=HIDDEN // HEADS,
            d_ff=2 * HIDDEN,
            num_layers=LAYERS,
            num_heads=HEADS,
            dropout_rate=0.0,
            pad_token_id=0,
            decoder_start_token_id=0,
        ),
        _translation,
    ),
    "ViT": Family(
        "vision encoder",
        hf.ViTForImageClassification,
        hf.ViTConfig(
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            image_size=16,
            patch_size=4,
            num_labels=4,
            **_NO_BERT_DROPOUT,
        ),
        _images,
    ),
}


@dataclasses.dataclass(frozen=True)
class FamilyReport:
    """Result of training one family.

    Attributes:
        share: projected share of the parameters, by elements.
        num_projected: number of projected weights.
        worst_error: largest ||R - G Q|| / ||G Q|| over them, G from the plain model in eager mode.
        num_full: number of projected weights that had a full gradient nevertheless.
        losses: loss before the first step and after each step, all on one batch.
        num_graphs: number of captured block graphs.
        uncompiled: blocks that were not captured.
        has_logits: whether logits were formed in training.
    """

    share: float
    num_projected: int
    worst_error: float
    num_full: int
    losses: list[float]
    num_graphs: int
    uncompiled: list[str]
    has_logits: bool


def train_family(family: Family, num_steps: int = 5) -> FamilyReport:
    """Compares the first gradients with the plain model's, then trains ``num_steps`` steps on the same batch."""
    model, reference = family.model(), family.model()
    galore_fx.compile(model, rank=4, refresh_gap=100, optimizer=functools.partial(torch.optim.AdamW, lr=3e-3))
    batch = family.batch(torch.Generator().manual_seed(1))
    reference(**batch).loss.backward()
    plain = dict(reference.named_parameters())
    out = model(**batch)
    out.loss.backward()
    records = list(model.galore_fx.optimizer.records)  # type: ignore[union-attr]
    errors, num_full = [], 0
    for record in records:
        expected = project(plain[record.name].grad, record.basis, record.dim)  # type: ignore[arg-type]
        errors.append(float((record.leaf.grad - expected).norm() / expected.norm()))
        num_full += record.weight.grad is not None
    losses = [out.loss.item()]
    for _ in range(num_steps):
        model.galore_fx.optimizer.step()  # type: ignore[union-attr]
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
    stats = model.galore_fx.stats()  # type: ignore[union-attr, operator]
    return FamilyReport(
        share=sum(r.weight.numel() for r in records) / sum(p.numel() for p in model.parameters()),
        num_projected=len(records),
        worst_error=max(errors),
        num_full=num_full,
        losses=losses,
        num_graphs=stats["num_region_graphs"],
        uncompiled=list(stats["uncompiled"]),
        has_logits=out.get("logits") is not None,
    )
