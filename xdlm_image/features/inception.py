"""Inception as FID, sFID and Inception Score want it: torch-fidelity's network with one more layer.

This file owns where the weights come from and the layer of sFID. It never computes statistics.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from xdlm_image.files import sha256_of_file

RELEASED = "6726825d"  # of which the SHA-256 of the released weights begins
SPATIAL_CHANNELS = 7
SPATIAL_DIM = SPATIAL_CHANNELS * 17 * 17
REMEDY = "or name another extractor: FOLDER of a small classifier (`xdlm-image train-extractor`) gives no Inception FID"


class Inception(torch.nn.Module):
    """torch-fidelity's InceptionV3 (the network of the FID paper, TensorFlow's resize and all).

    Args:
        weights: File of weights; None takes the released ones from torch.hub's cache, and fetches them once.

    Attributes:
        weights: That file.
        weights_hash: Its SHA-256.
        is_released: Whether it is the released one, without which no number is an Inception FID.

    Raises:
        OSError: They cannot be fetched or loaded, or torch.hub's cache holds others.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        hub = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
        self.weights = hub if weights is None else Path(weights)
        try:
            if weights is None and not hub.exists():
                hub.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(URL_INCEPTION_V3, str(hub), hash_prefix=RELEASED)
            self.weights_hash = sha256_of_file(self.weights)
            self.is_released = self.weights_hash.startswith(RELEASED)
            if weights is None and not self.is_released:
                raise ValueError(
                    f"{hub} is not the released file: its SHA-256 begins with {self.weights_hash[:8]}, not with "
                    f"{RELEASED}; remove it, or name it as inception:FILE if it is meant"
                )
            # torch-fidelity loads this file with weights_only=False: make sure first that it holds nothing but weights
            torch.load(self.weights, map_location="cpu", weights_only=True)
            self.net = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(self.weights)
            )
        except Exception as error:  # urllib, SSL, a wrong hash, an unpickler: the remedy is the same
            origin = URL_INCEPTION_V3 if weights is None else str(weights)
            raise OSError(
                f"extractor='inception': its weights could not be loaded from {origin} ({error}). Put the file at "
                f"{hub}, name it as inception:FILE, {REMEDY}"
            ) from error
        self._grid = torch.empty(0)
        self.net.Mixed_6d.branch1x1.register_forward_hook(self._keep_grid)

    def _keep_grid(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self._grid = output

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 images (B, 3, H, W) -> "2048" (B, 2048), "spatial" (B, 2023), "logits_unbiased" (B, 1008).

        "spatial" is what sFID (arXiv 2103.03841) is computed of: the first 7 channels of `mixed_6/conv`, 17 x 17, in
        ADM's order (rows, columns, channels).
        """
        pooled, logits = self.net(images)
        grid = self._grid[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 7, 17, 17) -> (B, 17 * 17 * 7)
        return {"2048": pooled, "spatial": grid, "logits_unbiased": logits}
