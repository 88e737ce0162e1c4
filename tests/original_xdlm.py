"""The official XDLM network, stated independently for the tests of its converter.

Its modules carry the official names in the official order, so that `state_dict()` has the official keys and
`parameters()` the order of the official averaged weights.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Norm(nn.Module):
    """Layer norm with scale and without bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, conditioning: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = Norm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = Norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Linear(conditioning, 6 * width)

    def forward(self, x, c, turn):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        qkv = self.attn_qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).movedim(2, 0)  # each (B, L, H, d)
        scores = torch.einsum("blhd,bmhd->bhlm", rotate(q, turn), rotate(k, turn)) / math.sqrt(q.shape[-1])
        x = x + gate1 * self.attn_out(torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def rotate(x, turn):
    """x (B, L, H, d): channels j and j + d/2 are one complex number; turn (L, d/2)."""
    half = x.shape[-1] // 2
    y = torch.complex(x[..., :half], x[..., half:]) * turn[:, None]
    return torch.cat([y.real, y.imag], -1)


class OriginalNetwork(nn.Module):
    """Ids (B, L) and classes (B,) -> logits (B, L, vocabulary). The official code feeds it the time 0, always."""

    def __init__(self, vocabulary=35, width=48, heads=3, blocks=2, conditioning=24, classes: int | None = 9) -> None:
        super().__init__()
        self.vocab_embed = nn.Module()
        self.vocab_embed.embedding = nn.Parameter(torch.empty(vocabulary, width))
        self.sigma_map = nn.Module()
        self.sigma_map.mlp = nn.Sequential(
            nn.Linear(256, conditioning), nn.SiLU(), nn.Linear(conditioning, conditioning)
        )
        if classes is not None:
            self.y_embedder = nn.Module()
            self.y_embedder.embedding_table = nn.Embedding(classes + 1, conditioning)
        self.rotary_emb = nn.Module()
        d = width // heads
        self.rotary_emb.register_buffer("inv_freq", 10_000.0 ** -(torch.arange(0, d, 2) / d))
        self.blocks = nn.ModuleList(Block(width, heads, conditioning) for _ in range(blocks))
        self.output_layer = nn.Module()
        self.output_layer.norm_final = Norm(width)
        self.output_layer.linear = nn.Linear(width, vocabulary)
        self.output_layer.adaLN_modulation = nn.Linear(conditioning, 2 * width)

    def forward(self, ids, classes=None):
        x = self.vocab_embed.embedding[ids]
        c = self.sigma_map.mlp(torch.cat([x.new_ones(128), x.new_zeros(128)]))  # cosines and sines of 0
        c = F.silu(c.expand(len(ids), -1) if classes is None else c + self.y_embedder.embedding_table(classes))
        places = torch.arange(ids.shape[1])
        angles = places[:, None] * self.rotary_emb.inv_freq
        turn = torch.polar(torch.ones_like(angles), angles)  # (L, d/2)
        for block in self.blocks:
            x = block(x, c, turn)
        shift, scale = self.output_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.output_layer.linear(self.output_layer.norm_final(x) * (1 + scale) + shift)


def random_network(seed: int = 0, **sizes) -> OriginalNetwork:
    """Every tensor random, gates and norms included."""
    torch.manual_seed(seed)
    model = OriginalNetwork(**sizes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)
