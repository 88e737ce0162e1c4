"""The VQ autoencoder that LlamaGen and taming-transformers share, stated independently for the tests of the converters.

Its modules carry the originals' names, so that `state_dict()` has the originals' keys; widths are free.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv(a: int, b: int, kernel: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(a, b, kernel, **({"padding": kernel // 2} | options))


class Residual(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = norm(a), conv(a, b), norm(b), conv(b, b)
        if a != b:
            self.nin_shortcut = conv(a, b, 1)

    def forward(self, x):
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """One head over all places."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (conv(c, c, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2) for layer in (self.q, self.k, self.v))  # (B, C, L)
        share = (torch.einsum("bcl,bcm->blm", q, k) / math.sqrt(x.shape[1])).softmax(-1)
        return x + self.proj_out(torch.einsum("blm,bcm->bcl", share, v).view_as(x))


class Resample(nn.Module):
    """Half the size (padded below and right, as a stride of 2 needs) or twice the size."""

    def __init__(self, c: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = conv(c, c) if up else conv(c, c, stride=2, padding=0)

    def forward(self, x):
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3) if self.up else F.pad(x, (0, 1, 0, 1)))


class Half(nn.Module):
    """Encoder or decoder. `widths` run from the finest level to the coarsest; `attended` names levels."""

    def __init__(self, style: str, upward: bool, image: int, latent: int, widths, layers: int, attended) -> None:
        super().__init__()
        self.upward = upward
        order = list(range(len(widths)))
        order = order[::-1] if upward else order
        width = widths[order[0]]
        self.conv_in = conv(latent if upward else image, width)
        self.walk = []  # levels in the order in which an image meets them
        for level in order:
            module = nn.Module()
            residuals, module.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(layers + upward):
                residuals.append(Residual(width, widths[level]))
                width = widths[level]
                if level in attended:
                    module.attn.append(Attention(width))
            module.add_module("res" if style == "llamagen" else "block", residuals)
            if level != order[-1]:
                module.add_module("upsample" if upward else "downsample", Resample(width, upward))
            self.walk.append(module)
        c = widths[-1]
        middle = [Residual(c, c), Attention(c), Residual(c, c)]
        if style == "llamagen":
            self.conv_blocks, self.mid = nn.ModuleList(self.walk), nn.ModuleList(middle)
        else:  # taming's level 0 is the finest on both sides
            self.add_module("up" if upward else "down", nn.ModuleList(self.walk[::-1] if upward else self.walk))
            self.mid = nn.Module()
            self.mid.block_1, self.mid.attn_1, self.mid.block_2 = middle
        self.middle = lambda x: middle[2](middle[1](middle[0](x)))
        self.norm_out, self.conv_out = norm(width), conv(width, image if upward else latent)

    def forward(self, x):
        x = self.conv_in(x)
        x = self.middle(x) if self.upward else x
        for level in self.walk:
            parts = dict(level.named_children())
            for j, residual in enumerate(parts.get("res", parts.get("block"))):
                x = residual(x)
                x = level.attn[j](x) if len(level.attn) else x
            step = parts.get("upsample" if self.upward else "downsample")
            x = x if step is None else step(x)
        x = x if self.upward else self.middle(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class OriginalTokenizer(nn.Module):
    """Encoder, codebook and decoder; `style` is `llamagen` (rows of unit length) or `taming` (rows as they are)."""

    def __init__(self, style, widths=(32, 64), latent=32, codes=40, dim=8, image=3, layers=2, attended=None) -> None:
        super().__init__()
        self.unit = style == "llamagen"
        attended = {len(widths) - 1} if attended is None else attended
        sizes = (image, latent, widths, layers, attended)
        self.encoder, self.decoder = Half(style, False, *sizes), Half(style, True, *sizes)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(codes, dim)
        if self.unit:
            self.quantize.register_buffer("codebook_used", torch.zeros(64))
        self.quant_conv, self.post_quant_conv = conv(latent, dim, 1), conv(dim, latent, 1)

    def rows(self):
        rows = self.quantize.embedding.weight
        return F.normalize(rows, dim=-1) if self.unit else rows

    def latents(self, images):
        return self.quant_conv(self.encoder(images))  # (B, d, h, w)

    def codes(self, images):
        z = self.latents(images).movedim(1, -1)  # (B, h, w, d)
        z = F.normalize(z, dim=-1) if self.unit else z
        return (z[..., None, :] - self.rows()).square().sum(-1).argmin(-1)  # (B, h, w)

    def decode(self, codes):
        return self.decoder(self.post_quant_conv(self.rows()[codes].movedim(-1, 1)))


def random_tokenizer(style: str, seed: int = 0, **sizes) -> OriginalTokenizer:
    """Every tensor random, norms included, so that no two can be exchanged unseen."""
    torch.manual_seed(seed)
    model = OriginalTokenizer(style, **sizes)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    nn.init.normal_(model.quantize.embedding.weight)
    return model.eval().requires_grad_(False)
