"""How far a reconstruction is from its image: pixels, edges, and the features of a trained classifier.

This file owns the losses of images; the codebook's loss is diffusers'.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from xdlm_image.recipes import TokenizerRecipe


def reconstruction_loss(recipe: TokenizerRecipe, sample: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """|d|^2 + l1 |d| + edge (|dx d| + |dy d|) / 2 with d = sample - images, each averaged; both (B, C, S, S)."""
    error = sample - images
    loss = error.square().mean() + recipe.l1_weight * error.abs().mean()
    if recipe.edge_weight:
        across = (error[..., :, 1:] - error[..., :, :-1]).abs().mean()
        down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        loss = loss + recipe.edge_weight * (across + down) / 2
    return loss


class PerceptualLoss(nn.Module):
    """Distance of two images in a classifier's eyes: LPIPS (arXiv 1801.03924, eq. 1) with every channel of weight 1.

    The feature maps of every stage are normalised over channels at each place; their squared differences are summed
    over channels and averaged over places, images and stages.

    Args:
        extractor: Folder of a small classifier (from `train-extractor`). Take another one than the judge of rFID.
        channels: Channels of the images.
        image_size: Their side in pixels.

    Raises:
        FileNotFoundError, ValueError: There is no classifier there, or it is for other images.
    """

    def __init__(self, extractor: str | Path, channels: int, image_size: int) -> None:
        super().__init__()
        from xdlm_image.features.small_classifier import load_small_classifier

        try:
            config, classifier = load_small_classifier(Path(extractor))
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"perceptual={str(extractor)!r}: {error}") from error
        if (channels, image_size) != (config.channels, config.image_size):
            raise ValueError(
                f"perceptual={str(extractor)!r}: it was trained on {config.channels} x {config.image_size} x "
                f"{config.image_size} images, the data have {channels} x {image_size} x {image_size}; train another"
            )
        self.weights_hash = config.weights_sha256
        self.net = classifier.net.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stays in evaluation mode: its batch statistics are those of its own training."""
        return super().train(False)

    def forward(self, sample: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Both (B, C, S, S) in [-1, 1] -> ()."""
        with torch.no_grad():
            targets = [self._normalised(stage) for stage in self._stages(images)]
        found = [self._normalised(stage) for stage in self._stages(sample)]
        return torch.stack([(a - b).square().sum(1).mean() for a, b in zip(found, targets)]).mean()

    def _stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self.net.forward_intermediates(images, intermediates_only=True)  # each (B, c, s, s)

    @staticmethod
    def _normalised(features: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(features.float(), dim=1, eps=1e-6)
