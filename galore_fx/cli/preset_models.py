"""Defines models of known sizes in plain torch, so that ``galore-fx plan`` and ``explain`` need no transformers code.

They compute like transformers' models of these names, in the same dtypes, and have the same parameters. A test compares
their predicted peaks with those of transformers' models. They are for planning only; no weights can be loaded.

Sources: config.json of each model's repository; for llama-60m to llama-1b, Zhao et al. 2024, arXiv:2403.03507, table 5.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class DecoderSize:
    """A decoder with rotary positions, RMS norms and gated feed-forward layers (Llama, Mistral, Qwen2)."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    positions: int
    attention_bias: bool = False


@dataclasses.dataclass(frozen=True)
class GPT2Size:
    """A decoder with learned positions, dropout, fused queries, keys and values, and a tied head."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    positions: int
    dropout: float = 0.1


@dataclasses.dataclass(frozen=True)
class EncoderSize:
    """An encoder with a classification head (RoBERTa)."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    vocabulary: int
    positions: int
    num_labels: int = 2
    dropout: float = 0.1


Size = DecoderSize | GPT2Size | EncoderSize
PRESETS: dict[str, Size] = {
    "llama-60m": DecoderSize(512, 1376, 8, 8, 8, 32000, 4096),
    "llama-130m": DecoderSize(768, 2048, 12, 12, 12, 32000, 4096),
    "llama-350m": DecoderSize(1024, 2736, 24, 16, 16, 32000, 4096),
    "llama-1b": DecoderSize(2048, 5461, 24, 32, 32, 32000, 4096),
    "llama-7b": DecoderSize(4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-3-8b": DecoderSize(4096, 14336, 32, 32, 8, 128256, 8192),
    "llama-3-70b": DecoderSize(8192, 28672, 80, 64, 8, 128256, 8192),
    "mistral-7b": DecoderSize(4096, 14336, 32, 32, 8, 32768, 32768),
    "qwen2.5-7b": DecoderSize(3584, 18944, 28, 28, 4, 152064, 131072, attention_bias=True),
    "gpt2": GPT2Size(768, 12, 12, 50257, 1024),
    "roberta-base": EncoderSize(768, 3072, 12, 12, 50265, 512),
}


# Base of the rotary positions and epsilon of the norms. Only training needs them; ``build`` always uses 1e4 and 1e-6.
_OF_TRAINED = {"llama-3": (5e5, 1e-5), "mistral": (1e6, 1e-5), "qwen2.5": (1e6, 1e-6)}


def transformers_config(name: str) -> Any:
    """Returns the transformers configuration of a preset, to create its model with random weights."""
    import transformers  # a slow import, which plans do not need

    size = PRESETS[name]
    if isinstance(size, GPT2Size):
        return transformers.GPT2Config(
            n_embd=size.hidden,
            n_layer=size.layers,
            n_head=size.heads,
            vocab_size=size.vocabulary,
            n_positions=size.positions,
        )
    if isinstance(size, EncoderSize):
        return transformers.RobertaConfig(
            hidden_size=size.hidden,
            intermediate_size=size.feed_forward,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            vocab_size=size.vocabulary,
            max_position_embeddings=size.positions + 2,  # RoBERTa reserves two of them
            num_labels=size.num_labels,
        )
    theta, epsilon = next((v for key, v in _OF_TRAINED.items() if name.startswith(key)), (1e4, 1e-6))
    settings = {
        "hidden_size": size.hidden,
        "intermediate_size": size.feed_forward,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": size.positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rms_norm_eps": epsilon,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if name.startswith("mistral"):
        return transformers.MistralConfig(**settings, sliding_window=None)
    if size.attention_bias:
        return transformers.Qwen2Config(**settings)
    return transformers.LlamaConfig(**settings)


def build(size: Size) -> nn.Module:
    """Returns a model of the given size, on the default device and in the default dtype."""
    if isinstance(size, DecoderSize):
        return CausalModel(Decoder(size), size.hidden, size.vocabulary)
    if isinstance(size, GPT2Size):
        decoder = GPT2(size)
        model = CausalModel(decoder, size.hidden, size.vocabulary)
        model.lm_head.weight = decoder.tokens.weight
        return model
    return Classifier(size)


class Output(NamedTuple):
    """Output of a model: 0-d loss, None without labels; logits (batch, sequence, vocabulary) or (batch, labels)."""

    loss: Tensor | None
    logits: Tensor


class CausalModel(nn.Module):
    """A decoder with its head and the next-token loss."""

    def __init__(self, base: nn.Module, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.base_model = base
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        """Returns loss and logits; ``input_ids`` and ``labels`` are (batch, sequence)."""
        logits = self.lm_head(self.base_model(input_ids))
        loss = None
        if labels is not None:
            wide = logits.float()
            targets = functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous().view(-1)
            loss = functional.cross_entropy(wide.view(-1, wide.shape[-1]), targets, ignore_index=IGNORED)
        return Output(loss, logits)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``x`` (..., hidden) over its last dimension."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Decoder(nn.Module):
    """Llama-like decoder: embedding, blocks, final norm."""

    frequencies: Tensor

    def __init__(self, size: DecoderSize) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.hidden)
        self.layers = nn.ModuleList([DecoderBlock(size) for _ in range(size.layers)])
        self.norm = RMSNorm(size.hidden)
        width = size.hidden // size.heads
        frequencies = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Maps ``input_ids`` (batch, sequence) to (batch, sequence, hidden)."""
        x = self.tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=x.device)[None, :, None].float()
        angles = positions * self.frequencies.float()
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class DecoderBlock(nn.Module):
    """Attention and gated feed-forward, each preceded by a norm."""

    def __init__(self, size: DecoderSize) -> None:
        super().__init__()
        self.width = size.hidden // size.heads
        narrow, bias = self.width * size.key_value_heads, size.attention_bias
        self.grouped = size.key_value_heads != size.heads
        self.attention_norm = RMSNorm(size.hidden)
        self.q_proj = nn.Linear(size.hidden, size.hidden, bias=bias)
        self.k_proj = nn.Linear(size.hidden, narrow, bias=bias)
        self.v_proj = nn.Linear(size.hidden, narrow, bias=bias)
        self.o_proj = nn.Linear(size.hidden, size.hidden, bias=False)
        self.feed_forward_norm = RMSNorm(size.hidden)
        self.gate_proj = nn.Linear(size.hidden, size.feed_forward, bias=False)
        self.up_proj = nn.Linear(size.hidden, size.feed_forward, bias=False)
        self.down_proj = nn.Linear(size.feed_forward, size.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Maps ``x`` (batch, sequence, hidden) to the same shape; ``cos`` and ``sin`` are (1, sequence, head width)."""
        normed = self.attention_norm(x)
        q, k, v = (self._heads(layer(normed)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = q * cos + _rotated(q) * sin, k * cos + _rotated(k) * sin
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        x = x + self.o_proj(mixed.transpose(1, 2).contiguous().reshape(x.shape))
        normed = self.feed_forward_norm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(normed)) * self.up_proj(normed))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.width).transpose(1, 2)


def _rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


class Conv1D(nn.Module):
    """A linear layer whose weight is (in, out), as in GPT-2."""

    def __init__(self, num_out: int, num_in: int) -> None:
        super().__init__()
        self.nf = num_out
        self.weight = nn.Parameter(torch.empty(num_in, num_out))
        self.bias = nn.Parameter(torch.zeros(num_out))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` (..., in) to (..., out)."""
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class GPT2(nn.Module):
    """GPT-2 decoder: embeddings, blocks, final norm."""

    def __init__(self, size: GPT2Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.hidden)
        self.positions = nn.Embedding(size.positions, size.hidden)
        self.dropout = nn.Dropout(size.dropout)
        self.layers = nn.ModuleList([GPT2Block(size) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(size.hidden)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Maps ``input_ids`` (batch, sequence) to (batch, sequence, hidden)."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = self.dropout(self.tokens(input_ids) + self.positions(positions))
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class GPT2Block(nn.Module):
    """Attention and feed-forward, each preceded by a norm."""

    def __init__(self, size: GPT2Size) -> None:
        super().__init__()
        self.heads, self.rate = size.heads, size.dropout
        self.attention_norm = nn.LayerNorm(size.hidden)
        self.qkv = Conv1D(3 * size.hidden, size.hidden)
        self.out = Conv1D(size.hidden, size.hidden)
        self.feed_forward_norm = nn.LayerNorm(size.hidden)
        self.up = Conv1D(4 * size.hidden, size.hidden)
        self.down = Conv1D(size.hidden, 4 * size.hidden)
        self.activation = nn.GELU(approximate="tanh")
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` (batch, sequence, hidden) to the same shape."""
        parts = self.qkv(self.attention_norm(x)).split(x.shape[-1], dim=2)
        q, k, v = (part.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for part in parts)
        rate = self.rate if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).contiguous().reshape(x.shape)))
        hidden = self.activation(self.up(self.feed_forward_norm(x)))
        return x + self.dropout(self.down(hidden))


class Encoder(nn.Module):
    """RoBERTa encoder: embeddings and blocks."""

    def __init__(self, size: EncoderSize) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.hidden)
        self.positions = nn.Embedding(size.positions + 2, size.hidden)
        self.token_types = nn.Embedding(1, size.hidden)
        self.norm = nn.LayerNorm(size.hidden)
        self.dropout = nn.Dropout(size.dropout)
        self.layers = nn.ModuleList([EncoderBlock(size) for _ in range(size.layers)])

    def forward(self, input_ids: Tensor) -> Tensor:
        """Maps ``input_ids`` (batch, sequence) to (batch, sequence, hidden)."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None] + 2
        kinds = torch.zeros_like(input_ids)
        x = self.dropout(self.norm(self.tokens(input_ids) + self.token_types(kinds) + self.positions(positions)))
        for layer in self.layers:
            x = layer(x)
        return x


class EncoderBlock(nn.Module):
    """Attention and feed-forward, each followed by a norm."""

    def __init__(self, size: EncoderSize) -> None:
        super().__init__()
        self.heads, self.rate = size.heads, size.dropout
        self.query, self.key, self.value, self.out = (nn.Linear(size.hidden, size.hidden) for _ in range(4))
        self.attention_norm = nn.LayerNorm(size.hidden)
        self.up = nn.Linear(size.hidden, size.feed_forward)
        self.down = nn.Linear(size.feed_forward, size.hidden)
        self.feed_forward_norm = nn.LayerNorm(size.hidden)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` (batch, sequence, hidden) to the same shape."""
        layers = (self.query, self.key, self.value)
        q, k, v = (layer(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for layer in layers)
        rate = self.rate if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        x = self.attention_norm(x + self.dropout(self.out(mixed.transpose(1, 2).contiguous().reshape(x.shape))))
        return self.feed_forward_norm(x + self.dropout(self.down(functional.gelu(self.up(x)))))


class Classifier(nn.Module):
    """An encoder with a classification head on the first token."""

    def __init__(self, size: EncoderSize) -> None:
        super().__init__()
        self.base_model = Encoder(size)
        self.dropout = nn.Dropout(size.dropout)
        self.dense = nn.Linear(size.hidden, size.hidden)
        self.out_proj = nn.Linear(size.hidden, size.num_labels)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        """Returns loss and logits; ``input_ids`` is (batch, sequence), ``labels`` (batch,)."""
        first = self.dropout(self.base_model(input_ids)[:, 0, :])
        logits = self.out_proj(self.dropout(torch.tanh(self.dense(first))))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return Output(loss, logits)
