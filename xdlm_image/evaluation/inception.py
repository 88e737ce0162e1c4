"""Inception as FID, sFID and Inception Score want it: torch-fidelity's network with one more layer.

This file owns where the weights come from and the layer of sFID. It never computes statistics.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

SPATIAL_CHANNELS = 7
SPATIAL_DIM = SPATIAL_CHANNELS * 17 * 17
REMEDY = "or name another extractor: FOLDER of a small classifier (`xdlm-image train-extractor`) gives no Inception FID"


class Inception(torch.nn.Module):
    """torch-fidelity's InceptionV3 (the network of the FID paper, TensorFlow's resize and all).

    Args:
        weights: File of the released weights; None takes torch.hub's, and fetches them once.

    Raises:
        OSError: They cannot be fetched or loaded.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        hub = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
        self.weights = hub if weights is None else Path(weights)
        try:
            if weights is None and not hub.exists():
                hub.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(URL_INCEPTION_V3, str(hub), hash_prefix="6726825d")
            # torch-fidelity loads this file with weights_only=False: make sure first that it holds nothing but weights
            torch.load(self.weights, map_location="cpu", weights_only=True)
            self.net = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(self.weights)
            )
        except Exception as error:  # urllib, SSL, RuntimeError on a wrong hash: the remedy is the same
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
