"""Tiny models, batches and the slow, obvious references that tests and benchmarks compare with."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

VOCABULARY = 256


def llama(num_layers: int = 4, hidden: int = 64, intermediate: int = 176, **settings: Any) -> LlamaForCausalLM:
    """A Llama of some 200,000 parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        **settings,
    )
    return LlamaForCausalLM(config).train()


def gpt2(num_layers: int = 3) -> GPT2LMHeadModel:
    """A GPT-2 without dropout; its linears are Conv1D with biases."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64,
        n_layer=num_layers,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        loss_type="ForCausalLM",
    )
    return GPT2LMHeadModel(config).train()


def batches(count: int, batch: int = 4, seq: int = 32, seed: int = 1) -> list[Tensor]:
    """Random token batches (batch, seq)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (batch, seq), generator=generator) for _ in range(count)]


def backward(model: nn.Module, ids: Tensor, weight: float = 1.0) -> float:
    """One forward and backward; the loss, times ``weight``."""
    loss = model(input_ids=ids, labels=ids).loss * weight
    loss.backward()
    return loss.item()


def adamw(**settings: Any) -> Callable[..., torch.optim.Optimizer]:
    """``torch.optim.AdamW`` with settings bound; learning rate 1e-3, no decay."""
    return functools.partial(torch.optim.AdamW, **{"lr": 1e-3, "weight_decay": 0.0, **settings})


def train(model: nn.Module, ids: Sequence[Tensor]) -> None:
    """A step on each batch."""
    for batch in ids:
        backward(model, batch)
        model.galore_fx.optimizer.step()


def trainer(model: nn.Module, folder: Path, data: Sequence[Tensor], **settings: Any) -> Trainer:
    """transformers' Trainer over a compiled model and its optimizer, on the CPU and quiet."""
    arguments = TrainingArguments(
        output_dir=str(folder), max_grad_norm=0, use_cpu=True, report_to=[], disable_tqdm=True, **settings
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in data]
    return Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(model.galore_fx.optimizer, None))


def straight_and_resumed(
    make: Callable[[], nn.Module], ids: Sequence[Tensor], stop: int
) -> tuple[nn.Module, nn.Module]:
    """A model trained on all batches, and one that goes on from the state of another after ``stop``: bit-identical."""
    straight, stopped, resumed = make(), make(), make()
    train(straight, ids)
    train(stopped, ids[:stop])
    resumed.load_state_dict(stopped.state_dict())
    resumed.galore_fx.optimizer.load_state_dict(stopped.galore_fx.optimizer.state_dict())
    train(resumed, ids[stop:])
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))
    return straight, resumed


@torch.no_grad()
def relative_errors(model: nn.Module, reference: nn.Module) -> dict[str, float]:
    """||p - q|| / ||q|| of every parameter."""
    pairs = zip(model.named_parameters(), reference.parameters(), strict=True)
    return {name: float((p - q).norm() / q.norm().clamp_min(1e-12)) for (name, p), q in pairs}


def largest_error(model: nn.Module, reference: nn.Module) -> float:
    """The worst of ``relative_errors``."""
    return max(relative_errors(model, reference).values())


def assert_gradients_equal(model: nn.Module, reference: nn.Module, tolerance: float = 1e-4) -> None:
    """Every gradient of a compiled model is that of the plain one: projected where it is projected, full elsewhere.

    A projected weight must have no full gradient.
    """
    records = {record.name: record for record in model.galore_fx.optimizer.records}
    assert records
    plain = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        record, expected = records.get(name), plain[name].grad
        given = parameter.grad
        if record is not None:
            assert given is None, f"{name} has a full gradient"
            given = record.leaf.grad
            if expected is not None:
                basis = record.basis
                expected = expected @ basis if record.dim.value == "cols" else basis.T @ expected
        assert (given is None) == (expected is None), name
        if given is not None:
            assert given.shape == expected.shape and given.dtype == expected.dtype
            # A gradient that is zero but for rounding (a key's bias under softmax) is compared with the largest.
            error, size = float((given - expected).norm()), float(expected.norm())
            assert error <= tolerance * max(size, 1e-3), f"{name}: {error:.1e} of {size:.1e}"
