"""The denoising transformer of XDLM: noisy codes, class and time in, logits over clean codes out.

This file owns the network and nothing else: it never draws noise, never computes a loss and knows no
pixels. It reads from embedders to attention to block to model. It imports only torch, diffusers and the
standard library, so that it can travel beside the weights to a machine where this package is not installed.

The configuration expresses both the network of arXiv 2602.01362 (`SIZES["xdlm-official"]`, 117,695,619
parameters) and the recipe used here: learned and 2-D rotary positions, QK-norm, SwiGLU, RMSNorm, adaLN-zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, apply_rotary_emb, get_1d_rotary_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm, RMSNorm
from diffusers.utils import BaseOutput
from torch import nn

TIME_FREQUENCIES = 256  # sines and cosines that describe t
TIME_SCALE = 1000  # t in [0, 1] is stretched to the range those frequencies resolve
NORM_TYPES = ("rms_norm", "layer_norm")
ACTIVATIONS = ("swiglu", "gelu-approximate")
ROPE_TYPES = ("2d", "1d")
TIME_CONDITIONINGS = ("none", "time", "constant")
POSITION_EMBEDDINGS = ("learned", "none")


@dataclass
class XDLMTransformer2DModelOutput(BaseOutput):
    """Output of `XDLMTransformer2DModel`.

    Attributes:
        sample: (B, L, out_channels) logits over the clean codes; (B, L, D) features with `project=False`.
    """

    sample: torch.Tensor


# --------------------------------------------------------------------------------------------------
# Embedders
# --------------------------------------------------------------------------------------------------


def rotary_embedding(
    rows: int, columns: int, head_dim: int, rope_type: str, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary positions in raster order, split-half layout, float32.

    Channel pair j is (j, j + head_dim/2). `1d`: pair j turns by n theta_j at raster position n. `2d`: the
    first half of the pairs turns with the row, the second half with the column (arXiv 2104.09864).

    Args:
        rows: Rows of the grid.
        columns: Columns of the grid.
        head_dim: Width D of a head; a multiple of 2 (`1d`) or 4 (`2d`).
        rope_type: `1d` or `2d`.
        device: Where to compute.

    Returns:
        (L, D), (L, D) with L = rows * columns.
    """
    raster = torch.arange(rows * columns, device=device)  # (L,)
    if rope_type == "1d":
        return get_1d_rotary_pos_embed(head_dim, raster, use_real=True, repeat_interleave_real=False)
    quarter = head_dim // 4
    axes = [
        get_1d_rotary_pos_embed(head_dim // 2, position, use_real=True, repeat_interleave_real=False)
        for position in (raster // columns, raster % columns)
    ]  # each (L, D/2), (L, D/2), whose two halves are equal
    cos = torch.cat([axis[0][:, :quarter] for axis in axes], dim=1)  # (L, D/2): rows, columns
    sin = torch.cat([axis[1][:, :quarter] for axis in axes], dim=1)  # (L, D/2)
    return torch.cat([cos, cos], dim=1), torch.cat([sin, sin], dim=1)


class XDLMConditioning(nn.Module):
    """One vector an image: SiLU(time part + class part); zeros where the model has neither."""

    def __init__(self, dim: int, num_classes: int | None, time_conditioning: str) -> None:
        super().__init__()
        self.dim = dim
        self.time_conditioning = time_conditioning
        if time_conditioning != "none":
            self.time_proj = Timesteps(TIME_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0, scale=TIME_SCALE)
            self.time_embed = TimestepEmbedding(TIME_FREQUENCIES, dim)
        if num_classes is not None:
            self.class_embed = nn.Embedding(num_classes + 1, dim)  # the last row is the null class

    def forward(
        self, batch: int, timestep: torch.Tensor | None, class_labels: torch.Tensor | None, like: torch.Tensor
    ) -> torch.Tensor:
        c = torch.zeros(batch, self.dim, dtype=like.dtype, device=like.device)  # (B, C)
        if self.time_conditioning != "none":
            if timestep is None:
                timestep = torch.zeros(1, device=like.device)  # (1,)
            frequencies = self.time_proj(timestep).to(like.dtype)  # (B or 1, TIME_FREQUENCIES)
            c = c + self.time_embed(frequencies)  # (B, C)
        if class_labels is not None:
            c = c + self.class_embed(class_labels)  # (B, C)
        return nn.functional.silu(c)  # (B, C)


# --------------------------------------------------------------------------------------------------
# Attention and block
# --------------------------------------------------------------------------------------------------


class XDLMAttnProcessor:
    """Full self-attention over the grid through diffusers' attention dispatcher."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: XDLMAttention,
        hidden_states: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)  # 3 x (B, L, D)
        else:
            query = attn.to_q(hidden_states)  # (B, L, D)
            key = attn.to_k(hidden_states)  # (B, L, D)
            value = attn.to_v(hidden_states)  # (B, L, D)
        query = query.unflatten(-1, (-1, attn.head_dim))  # (B, L, H, D/H)
        key = key.unflatten(-1, (-1, attn.head_dim))  # (B, L, H, D/H)
        value = value.unflatten(-1, (-1, attn.head_dim))  # (B, L, H, D/H)
        query = attn.norm_q(query)  # (B, L, H, D/H)
        key = attn.norm_k(key)  # (B, L, H, D/H)
        query = apply_rotary_emb(query, image_rotary_emb, use_real_unbind_dim=-2, sequence_dim=1)
        key = apply_rotary_emb(key, image_rotary_emb, use_real_unbind_dim=-2, sequence_dim=1)
        # under autocast the norm returns float32; attention kernels want one dtype
        query, key = query.to(value.dtype), key.to(value.dtype)  # (B, L, H, D/H)
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )  # (B, L, H, D/H)
        hidden_states = hidden_states.flatten(2, 3)  # (B, L, D)
        for module in attn.to_out:
            hidden_states = module(hidden_states)  # (B, L, D)
        return hidden_states


class XDLMAttention(nn.Module, AttentionModuleMixin):
    """Bias-free projections to queries, keys and values, and back; dropout on what comes out."""

    _default_processor_cls = XDLMAttnProcessor
    _available_processors = [XDLMAttnProcessor]
    processor: Any
    to_qkv: nn.Linear  # exists after `fuse_qkv_projections()`

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.use_bias = False
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False), nn.Dropout(dropout)])
        self.norm_q: nn.Module = RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k: nn.Module = RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.processor = self._default_processor_cls()

    def forward(self, hidden_states: torch.Tensor, image_rotary_emb: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.processor(self, hidden_states, image_rotary_emb)  # (B, L, D)


def make_norm(norm_type: str, dim: int) -> nn.Module:
    """A norm with scale and without bias, computed in float32."""
    return RMSNorm(dim, eps=1e-6) if norm_type == "rms_norm" else FP32LayerNorm(dim, eps=1e-5, bias=False)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (1 + scale) + shift: (B, L, D), (B, 1, D), (B, 1, D) -> (B, L, D)."""
    return x * (1 + scale) + shift


class XDLMTransformerBlock(nn.Module):
    """Attention and feed-forward, each normalised, modulated by the conditioning and gated (adaLN-zero)."""

    def __init__(self, dim: int, conditioning_dim: int, config: Any) -> None:  # the model's
        super().__init__()
        inner_dim = max(8, 8 * round(dim * config.mlp_ratio / 8))
        bias = config.activation_fn == "gelu-approximate"
        self.adaln = nn.Linear(conditioning_dim, 6 * dim)
        self.norm1 = make_norm(config.norm_type, dim)
        self.attn = XDLMAttention(
            dim, config.num_attention_heads, config.attention_head_dim, config.dropout, config.qk_norm
        )
        self.norm2 = make_norm(config.norm_type, dim)
        self.ff = FeedForward(dim, activation_fn=config.activation_fn, inner_dim=inner_dim, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        modulation = self.adaln(conditioning)[:, None]  # (B, 1, 6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # 6 x (B, 1, D)
        x = modulate(self.norm1(hidden_states), shift1, scale1)  # (B, L, D)
        hidden_states = hidden_states + gate1 * self.attn(x, image_rotary_emb)  # (B, L, D)
        x = modulate(self.norm2(hidden_states), shift2, scale2)  # (B, L, D)
        return hidden_states + gate2 * self.dropout(self.ff(x))  # (B, L, D)


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


class XDLMTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin):
    """Predicts clean codes from noisy ones: p(x_i | z, class[, t]) = softmax(logits_i) on a grid of codes.

    For k > 0 what training finds is the *leave-one-out* posterior p(x_i | z without z_i) (arXiv 2602.01362),
    so the network copies no visible code to its output.

    Args:
        sample_size: Grid of codes: `[rows, columns]`, or the side of a square one.
        num_embeds: Ids that may come in (codes, mask and any special ids).
        out_channels: Width of the logits; at most `num_embeds`.
        num_classes: Classes, without the null class, whose id is `num_classes`. None: an unconditional model.
        num_layers: Blocks.
        num_attention_heads: Heads of a block.
        attention_head_dim: Width of a head; heads x head width is the width of the network. A multiple of 4
            for `rope_type="2d"`, of 2 for `"1d"`.
        mlp_ratio: Inner width of the feed-forward over the network's width; rounded to a multiple of 8.
        dropout: Residual dropout in [0, 1), on the outputs of attention and feed-forward.
        conditioning_dim: Width of the conditioning vector; None is the network's width.
        norm_type: `rms_norm` or `layer_norm`; both with scale and without bias, in float32.
        activation_fn: `swiglu` (bias-free) or `gelu-approximate` (with bias).
        rope_type: `2d` (half of each head turns with the row, half with the column) or `1d` (raster order).
        qk_norm: RMS-normalise queries and keys in every head.
        time_conditioning: `none`; `time` reads t; `constant` reads t = 0 whatever is given (as officially).
        position_embedding: `learned` adds a vector for each place of the grid; `none` (as officially) leaves rotary
            positions alone, which see distances only: where all codes are the mask, as MDLM begins, every place
            then gets the same prediction.

    Raises:
        ValueError: If a size is impossible.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["XDLMTransformerBlock"]
    _repeated_blocks = ["XDLMTransformerBlock"]
    _skip_layerwise_casting_patterns = ["token_embed", "position_embed", "conditioning", "norm", "adaln"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | list[int] = 16,
        num_embeds: int = 16385,
        out_channels: int = 16384,
        num_classes: int | None = 1000,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        mlp_ratio: float = 8 / 3,
        dropout: float = 0.0,
        conditioning_dim: int | None = None,
        norm_type: str = "rms_norm",
        activation_fn: str = "swiglu",
        rope_type: str = "2d",
        qk_norm: bool = True,
        time_conditioning: str = "none",
        position_embedding: str = "learned",
    ) -> None:
        super().__init__()
        self._check_config(self.config)
        dim = num_attention_heads * attention_head_dim
        conditioning_dim = dim if conditioning_dim is None else conditioning_dim
        self.inner_dim = dim
        self.gradient_checkpointing = False

        self.token_embed = nn.Embedding(num_embeds, dim)
        if position_embedding == "learned":
            self.position_embed = nn.Parameter(torch.empty(math.prod(self.grid), dim))
        self.conditioning = XDLMConditioning(conditioning_dim, num_classes, time_conditioning)
        self.transformer_blocks = nn.ModuleList(
            XDLMTransformerBlock(dim, conditioning_dim, self.config) for _ in range(num_layers)
        )
        self.adaln_out = nn.Linear(conditioning_dim, 2 * dim)
        self.norm_out = make_norm(norm_type, dim)
        self.proj_out = nn.Linear(dim, out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """All initialisation: PyTorch's own for linears and classes, uniform codes, zero gates and logits.

        The zeros make every block the identity (adaLN-zero, arXiv 2212.09748) and the first prediction
        uniform.
        """
        nn.init.kaiming_uniform_(self.token_embed.weight, a=math.sqrt(5))  # U(-1/sqrt(D), 1/sqrt(D))
        if self.config.position_embedding == "learned":
            nn.init.normal_(self.position_embed, std=0.02)
        blocks: list[Any] = list(self.transformer_blocks)
        for linear in (*(block.adaln for block in blocks), self.adaln_out, self.proj_out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grid of codes."""
        size = self.config.sample_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | None = None,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        project: bool = True,
    ) -> XDLMTransformer2DModelOutput | tuple[torch.Tensor]:
        """Logits over the clean codes.

        Args:
            hidden_states: (B, L) int64 ids in raster order, L = rows x columns.
            timestep: t in [0, 1], scalar or (B,); needed and read only with `time_conditioning="time"`.
            class_labels: (B,) int64, `num_classes` for the null class; None for an unconditional model.
            return_dict: Whether to return `XDLMTransformer2DModelOutput`, or a tuple of its `sample` alone.
            project: False stops short of the output projection: `sample` is then the normalised and modulated
                features (B, L, D), D = heads x head width, and `proj_out(sample)` are the logits.

        Returns:
            `sample` (B, L, out_channels).

        Raises:
            ValueError: On a wrong shape or dtype, or a missing or unexpected label or time. Ranges are not
                checked here (it would stop a GPU); the pipeline and the training loop check them.
        """
        timestep = self._check_inputs(hidden_states, timestep, class_labels)  # None, (1,) or (B,)
        rotary = rotary_embedding(
            *self.grid, self.config.attention_head_dim, self.config.rope_type, hidden_states.device
        )  # (L, D/H), (L, D/H)
        x = self.token_embed(hidden_states)  # (B, L, D)
        if self.config.position_embedding == "learned":
            x = x + self.position_embed  # (B, L, D)
        c = self.conditioning(x.shape[0], timestep, class_labels, like=x)  # (B, C)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, c, rotary)  # (B, L, D)
            else:
                x = block(x, c, rotary)  # (B, L, D)
        shift, scale = self.adaln_out(c)[:, None].chunk(2, dim=-1)  # 2 x (B, 1, D)
        x = modulate(self.norm_out(x), shift, scale)  # (B, L, D)
        sample = self.proj_out(x) if project else x  # (B, L, out_channels) or (B, L, D)
        return XDLMTransformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _check_inputs(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | None,
        class_labels: torch.Tensor | None,
    ) -> torch.Tensor | None:
        rows, columns = self.grid
        if hidden_states.ndim != 2 or hidden_states.shape[1] != rows * columns:
            raise ValueError(
                f"hidden_states has shape {tuple(hidden_states.shape)}: expected (batch, {rows * columns}), "
                f"the {rows} x {columns} grid in raster order"
            )
        if hidden_states.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"hidden_states has dtype {hidden_states.dtype}: expected int64 ids")
        batch = hidden_states.shape[0]
        if (class_labels is None) != (self.config.num_classes is None):
            raise ValueError(
                "class_labels=None: this model is class-conditional, pass (batch,) int64 ids; "
                f"{self.config.num_classes} is the null class"
                if class_labels is None
                else "class_labels given: this model is unconditional (num_classes=None), pass None"
            )
        if class_labels is not None and class_labels.shape != (batch,):
            raise ValueError(f"class_labels has shape {tuple(class_labels.shape)}: expected ({batch},)")
        if class_labels is not None and class_labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"class_labels has dtype {class_labels.dtype}: expected int64 ids")
        if self.config.time_conditioning != "time":
            return None
        if timestep is None:
            raise ValueError('timestep=None: a model with time_conditioning="time" needs t in [0, 1]')
        t = torch.as_tensor(timestep).to(torch.float32)  # before it moves: float64 does not exist on MPS
        t = t.to(hidden_states.device)
        t = t.reshape(-1) if t.ndim == 0 else t
        if t.shape not in ((1,), (batch,)):
            raise ValueError(f"timestep has shape {tuple(t.shape)}: expected a scalar or ({batch},)")
        return t

    @staticmethod
    def _check_config(config: Any) -> None:
        def require(condition: bool, name: str, remedy: str) -> None:
            if not condition:
                raise ValueError(f"{name}={config[name]!r}: {remedy}")

        def is_count(value: Any, least: int = 1) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= least

        def is_number(value: Any) -> bool:
            return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)

        size = config["sample_size"]
        pair = isinstance(size, (list, tuple)) and len(size) == 2 and all(is_count(side) for side in size)
        require(is_count(size) or pair, "sample_size", "must be a positive integer or [rows, columns]")
        require(is_count(config["num_embeds"], 2), "num_embeds", "must be at least 2 (a code and the mask)")
        require(
            is_count(config["out_channels"]) and config["out_channels"] <= config["num_embeds"],
            "out_channels",
            f"must lie in [1, num_embeds={config['num_embeds']}]",
        )
        classes = config["num_classes"]
        require(
            classes is None or is_count(classes), "num_classes", "must be a positive integer, or None for no classes"
        )
        for name in ("num_layers", "num_attention_heads", "attention_head_dim"):
            require(is_count(config[name]), name, "must be a positive integer")
        width = config["conditioning_dim"]
        require(width is None or is_count(width), "conditioning_dim", "must be a positive integer, or None for dim")
        ratio, dropout = config["mlp_ratio"], config["dropout"]
        require(is_number(ratio) and ratio > 0, "mlp_ratio", "must be a positive number")
        require(is_number(dropout) and 0 <= dropout < 1, "dropout", "must be a number in [0, 1)")
        require(isinstance(config["qk_norm"], bool), "qk_norm", "must be True or False")
        for name, choices in (
            ("norm_type", NORM_TYPES),
            ("activation_fn", ACTIVATIONS),
            ("rope_type", ROPE_TYPES),
            ("time_conditioning", TIME_CONDITIONINGS),
            ("position_embedding", POSITION_EMBEDDINGS),
        ):
            require(config[name] in choices, name, f"must be one of {', '.join(choices)}")
        multiple = 4 if config["rope_type"] == "2d" else 2
        require(
            config["attention_head_dim"] % multiple == 0,
            "attention_head_dim",
            f"must be a multiple of {multiple} for rope_type={config['rope_type']!r}",
        )


# Named sizes: XDLMTransformer2DModel(**SIZES["base"], sample_size=16, num_embeds=16385, out_channels=16384).
# Parameters beside each: with ImageNet's 1,000 classes and LlamaGen's 16,384 codes (definition A).
SIZES: dict[str, dict[str, Any]] = {
    "small": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},  # 45.3M
    "base": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},  # 154.8M
    "large": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},  # 489.9M
    # 117.7M: the network of arXiv 2602.01362, with num_embeds = out_channels = 16387
    "xdlm-official": {
        "num_layers": 12,
        "num_attention_heads": 12,
        "attention_head_dim": 64,
        "mlp_ratio": 4.0,
        "dropout": 0.1,
        "conditioning_dim": 128,
        "norm_type": "layer_norm",
        "activation_fn": "gelu-approximate",
        "rope_type": "1d",
        "qk_norm": False,
        "time_conditioning": "constant",
        "position_embedding": "none",
    },
}
