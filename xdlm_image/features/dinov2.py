"""DINOv2 as FD-DINOv2 wants it (arXiv 2306.04675): ViT-L/14 at 224 pixels, resized as EDM2 does.

This file owns the way from uint8 images to its features; network and weights are timm's.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.v2.functional import normalize

MODEL = "vit_large_patch14_dinov2.lvd142m"
SIZE, PATCH = 224, 14
POSITION_OFFSET = 0.1  # the original adds it to the target size before it interpolates positions
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DINOv2(nn.Module):
    """Features of the class token.

    Args:
        weights: safetensors file of timm's weights; None takes them from timm's hub.
        model: timm's name of the network.

    Raises:
        OSError: The weights cannot be had.
    """

    def __init__(self, weights: str | Path | None = None, model: str = MODEL) -> None:
        super().__init__()
        try:
            state = timm.create_model(model, pretrained=True).state_dict() if weights is None else load_file(weights)
        except Exception as error:  # whatever a hub without network raises
            raise OSError(
                f"extractor='dinov2': the weights of timm's {model} could not be loaded ({error}). Fetch its "
                "model.safetensors from the hub and name it as dinov2:FILE, or leave dinov2 out"
            ) from error
        self.net = timm.create_model(model, img_size=SIZE, num_classes=0, global_pool="token")
        state = {name: value for name, value in state.items() if name in self.net.state_dict()}
        state["pos_embed"] = positions(state["pos_embed"], SIZE // PATCH)
        try:
            self.net.load_state_dict(state)
        except RuntimeError as error:
            raise OSError(f"extractor='dinov2': {weights} holds other weights than {model}'s ({error})") from error

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 images (B, 3, H, W) -> "dinov2" (B, D)."""
        x = nn.functional.interpolate(images.float(), size=(SIZE, SIZE), mode="bicubic", antialias=True)
        return {"dinov2": self.net(normalize(x / 255, MEAN, STD))}


def positions(embedding: torch.Tensor, side: int) -> torch.Tensor:
    """Positions (1, 1 + M^2, D) of an M x M grid for a side x side one, as the original network interpolates them."""
    token, grid = embedding[:, :1], embedding[:, 1:]
    old = round(grid.shape[1] ** 0.5)
    grid = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, M, M)
    scale = (side + POSITION_OFFSET) / old
    grid = nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")  # (1, D, side, side)
    return torch.cat([token, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
