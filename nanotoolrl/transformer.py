"""The language model: a decoder-only transformer of the Llama family, whole and to be read.

    ids [B, T] -> embedding -> layers (attention, then MLP, each added to the stream) -> norm -> [B, T, D]

The same forward trains and samples. What differs is which earlier positions a token may look at, and where
their keys and values are: that is the argument `attend`. Parameters bear the names that transformers gives
them, so that its checkpoints are read and written without any translation (model.py).

Families: Llama (SmolLM2, Llama 3), Mistral without a window, Qwen2 (Qwen2.5) and Qwen3. Every other is
refused by name. loading.py compares logits with those of transformers.

Shapes: B rows, T tokens, D width, H query heads, K key-value heads, W width of a head, V vocabulary.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanotoolrl.attention import Attend, causal

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # `model_type` of a config
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Architecture:
    """What of a model's config decides its forward pass."""

    vocabulary: int  # V, rows of the embedding
    width: int  # D
    layers: int
    heads: int  # H
    kv_heads: int  # K; a key-value head serves H / K query heads
    head_width: int  # W
    mlp_width: int
    context: int  # positions that the model was made for
    norm_eps: float
    qkv_bias: bool
    output_bias: bool  # of the attention's output
    mlp_bias: bool
    qk_norm: bool  # queries and keys are normalised, head by head
    tied: bool  # the output embedding is the input embedding
    rope: dict = field(default_factory=dict)  # rotary positions: theta, type, and what the type needs

    @classmethod
    def of(cls, config: Any) -> "Architecture":
        """That of a transformers config. Raises ValueError, saying what is missing here, for any other."""
        family = config.model_type
        if family not in FAMILIES:
            raise ValueError(f"its architecture is {family!r}; there is {', '.join(FAMILIES)}")
        if config.hidden_act not in ("silu", "swish"):
            raise ValueError(f"its activation is {config.hidden_act!r}; there is silu")
        kinds = set(getattr(config, "layer_types", None) or ())
        if kinds - {"full_attention"} or (not kinds and getattr(config, "sliding_window", None)):
            what = ", ".join(sorted(kinds - {"full_attention"})) or "a sliding window"
            raise ValueError(f"its attention has {what}; there is full attention only")
        rope = {"rope_type": "default"} | config.rope_parameters
        if rope["rope_type"] not in ROPE_TYPES:
            there = ", ".join(ROPE_TYPES)
            raise ValueError(f"its rotary positions are {rope['rope_type']!r}; there is {there}")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("its rotary positions turn a part of each head only")
        if type(config.max_position_embeddings) is not int or config.max_position_embeddings < 1:
            raise ValueError(
                f"max_position_embeddings must be a positive integer, not {config.max_position_embeddings!r}"
            )
        heads = config.num_attention_heads
        biased = getattr(config, "attention_bias", False)
        return cls(
            vocabulary=config.vocab_size,
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
            mlp_width=config.intermediate_size,
            context=config.max_position_embeddings,
            norm_eps=config.rms_norm_eps,
            qkv_bias=biased or family == "qwen2",
            output_bias=biased and family != "qwen2",
            mlp_bias=getattr(config, "mlp_bias", False),
            qk_norm=family == "qwen3",
            tied=config.tie_word_embeddings,
            rope=rope,
        )


class Transformer(nn.Module):
    """The model. `forward` gives hidden states; `lm_head.weight` [V, D] turns them into logits."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.shape = shape
        self.checkpointing = False  # keep a layer's input only, and compute it again in the backward pass
        self.model = Backbone(shape)
        self.lm_head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make the output embedding the input embedding, where the architecture says so."""
        if self.shape.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, positions: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """Hidden states [B, T, D] of `ids` [B, T], from which `lm_head` predicts what follows each of them.

        positions: [B, T], by default 0 to T - 1 in every row. attend: by default every token looks at itself
        and all before it in its row (`causal`).
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.model.embed_tokens(ids)  # [B, T, D]
        angles = rotation(frequencies(self.shape, ids.device), positions, x.dtype)
        for layer in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, angles, attend or causal, use_reentrant=False)
            else:
                x = layer(x, angles, attend or causal)
        return self.model.norm(x)


class Backbone(nn.Module):
    """All but the head, where transformers' checkpoints have it: `model.embed_tokens`, `model.layers`, ..."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape, index) for index in range(shape.layers))
        self.norm = RMSNorm(shape.width, shape.norm_eps)


class Layer(nn.Module):
    """Attention and MLP: each reads the normalised stream x [B, T, D] and adds to it."""

    def __init__(self, shape: Architecture, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(shape, index)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.width, shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.width, shape.norm_eps)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions. angles: see `rotation`."""

    def __init__(self, shape: Architecture, index: int) -> None:
        super().__init__()
        self.index, self.head_width = index, shape.head_width
        inner, kv = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        self.q_proj = nn.Linear(shape.width, inner, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.width, kv, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.width, kv, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(inner, shape.width, bias=shape.output_bias)
        self.q_norm = RMSNorm(shape.head_width, shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(shape.head_width, shape.norm_eps) if shape.qk_norm else nn.Identity()

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_width)  # [B, T, H or K, W]
        query = rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), angles)  # [B, H, T, W]
        key = rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), angles)  # [B, K, T, W]
        value = self.v_proj(x).view(heads).transpose(1, 2)  # [B, K, T, W]
        gathered = attend(self.index, query, key, value)  # [B, H, T, W]
        return self.o_proj(gathered.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: a gate decides how much of each inner value passes."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.mlp_width, bias=shape.mlp_bias)
        self.up_proj = nn.Linear(shape.width, shape.mlp_width, bias=shape.mlp_bias)
        self.down_proj = nn.Linear(shape.mlp_width, shape.width, bias=shape.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x over its root mean square, in fp32, times a learnt weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        exact = x.float()
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(x.dtype)


# --------------------------------------------------------------------------------- rotary positions
def frequencies(shape: Architecture, device: torch.device) -> Tensor:
    """Angle [W / 2] by which each pair of a head's numbers turns from one position to the next (RoFormer,
    arXiv 2104.09864).

    theta^(-2 i / W) for pair i. Type linear: divided by `factor`. Type llama3 (arXiv 2407.21783): pairs that
    turn less than `low_freq_factor` times within the original context are divided by `factor`. Those that
    turn more than `high_freq_factor` times are left as they are, the others lie between.
    """
    rope, W = shape.rope, shape.head_width
    base = 1.0 / rope["rope_theta"] ** (torch.arange(0, W, 2, device=device).float() / W)
    if rope["rope_type"] == "default":
        return base
    if rope["rope_type"] == "linear":
        return base / rope["factor"]
    turns = rope["original_max_position_embeddings"] * base / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * base + (1 - kept) * base / rope["factor"]


def rotation(frequency: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cosine, sine), each [B, 1, T, W], at `positions` [B, T], the first half of sines negative; in fp32."""
    angles = positions[:, None, :, None].float() * frequency  # [B, 1, T, W / 2]
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, heads, T, W] with pairs (x_i, x_(i + W / 2)) turned by their angles."""
    cosine, sine = angles
    left, right = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([right, left], dim=-1) * sine
