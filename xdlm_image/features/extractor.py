"""Feature extractors as the metrics see them: one network or several behind one call.

This file owns their names, how they are put together, and what a protocol records of them. The networks are in
`small_classifier`, `inception` and `dinov2`; it never computes statistics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xdlm_image.data.images import in_colour
from xdlm_image.devices import best_device
from xdlm_image.features.class_judge import ClassJudge
from xdlm_image.features.small_classifier import REMEDY, SMALL_CLASSIFIER, ExtractorConfig, SmallClassifierFeatures

INCEPTION, DINOV2 = "inception", "dinov2"
NOT_RELEASED = "not the released weights"
SMALL_LAYERS = ["pooled", "spatial", "logits"]


@dataclass(frozen=True)
class FeatureExtractor:
    """One or more networks that turn images into features.

    Attributes:
        name: What reports call it: `inception-v3-compat`, `dinov2-vitl14`, `xdlm-small-classifier`, or several.
        compute: uint8 images (B, C, H, W) on `device` -> layer -> (B, D).
        feature_dims: Width of each layer of which FID is computed, the main one first.
        logits_layer: Layer with class logits of `class_names`; None where the classes are not those of the data.
        score_layer: Layer of logits that Inception Score is computed of; None without Inception.
        weights_hash: SHA-256 of its weights.
        device: Where it computes.
        config: The small classifier's configuration; None without one.
        is_inception: Whether numbers of the main layer may be called Inception FID.
        unreleased: Whether the main layer is Inception's, but of other weights than the released ones.
        judge: Who says which class an image shows; None leaves that to `logits_layer`.
    """

    name: str
    compute: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    feature_dims: dict[str, int]
    logits_layer: str | None
    score_layer: str | None
    weights_hash: str
    device: torch.device
    config: ExtractorConfig | None = None
    is_inception: bool = False
    unreleased: bool = False
    judge: ClassJudge | None = None

    @property
    def judges_classes(self) -> bool:
        """Whether anything here says which class an image shows."""
        return self.judge is not None or self.logits_layer is not None

    @property
    def fid_layers(self) -> tuple[str, ...]:
        """Layers of which FID is computed, the main one first."""
        return tuple(self.feature_dims)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 images (B, C, H, W), C = 1 or 3 -> layer name -> float32 features (B, D) on the CPU."""
        return {layer: values.float().cpu() for layer, values in self.compute(images.to(self.device)).items()}

    @torch.no_grad()
    def classes(self, images: torch.Tensor, features: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Class ids (B,) of images, whose features are these already; None where nothing judges classes."""
        if self.judge is not None:
            return self.judge.classify(images.to(self.device))
        return None if self.logits_layer is None else features[self.logits_layer].argmax(1)

    def knows(self, class_names: Sequence[str]) -> bool:
        """Whether its classes are these, as far as it says."""
        return self.config is None or self.config.class_names == list(class_names)

    def check_images(self, channels: int, image_size: int) -> None:
        """Raise ValueError when images of this shape cannot be judged."""
        if self.config is None or (channels, image_size) == (self.config.channels, self.config.image_size):
            return
        own = self.config.image_size
        raise ValueError(
            f"extractor: it was trained on {self.config.channels} x {own} x {own} images, the data have {channels} x "
            f"{image_size} x {image_size}; set data.image_size and data.channels if they were meant to be those, or "
            f"{REMEDY}"
        )

    def describe(self) -> dict[str, Any]:
        """What a protocol must record about it."""
        description: dict[str, Any] = {
            "name": self.name,
            "is_inception": self.is_inception,
            "weights_sha256": self.weights_hash,
            "fid_layers": list(self.fid_layers),
        }
        if self.config is not None:
            description["test_accuracy"] = self.config.test_accuracy
            description["data_fingerprint"] = self.config.data_fingerprint
        if self.judge is not None:
            description["classifier"] = self.judge.describe()
        return description


def load_extractor(
    names: str | Path | Sequence[str | Path], device: str | torch.device | None = None
) -> FeatureExtractor:
    """One extractor, or several as one; the first gives the main layer.

    Args:
        names: `inception` (torch-fidelity's InceptionV3) or `inception:FILE` of weights for it, `dinov2` (timm's
            ViT-L/14) or `dinov2:FILE`, or the folder of a trained small classifier; or a list of them.
        device: torch device; None picks the best there is.

    Raises:
        FileNotFoundError: No such folder, or a file in it is missing.
        ValueError: Its files are truncated or do not belong together; or a name is given twice.
        OSError: Weights cannot be fetched.
    """
    target = best_device(device)
    if isinstance(names, (str, Path)):
        return _load_one(str(names), target)
    if len(names) == 0:
        raise ValueError("extractor=[]: name one at least")
    parts = [_load_one(str(name), target) for name in names]
    if len(parts) == 1:
        return parts[0]
    layers = [layer for part in parts for layer in part.fid_layers]
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise ValueError(f"extractor={list(names)}: two of them have a layer {twice[0]!r}; leave one out")

    def compute(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {layer: values for part in parts for layer, values in part.compute(images).items()}

    return FeatureExtractor(
        name=" + ".join(part.name for part in parts),
        compute=compute,
        feature_dims={layer: dim for part in parts for layer, dim in part.feature_dims.items()},
        logits_layer=next((part.logits_layer for part in parts if part.logits_layer), None),
        score_layer=next((part.score_layer for part in parts if part.score_layer), None),
        weights_hash=hashlib.sha256(" ".join(part.weights_hash for part in parts).encode()).hexdigest(),
        device=target,
        config=next((part.config for part in parts if part.config), None),
        is_inception=parts[0].is_inception,
        unreleased=parts[0].unreleased,
    )


def _load_one(name: str, device: torch.device) -> FeatureExtractor:
    kind, _, file = name.partition(":")
    if kind == INCEPTION:
        from xdlm_image.features.inception import SPATIAL_DIM, Inception

        inception = Inception(file or None).to(device).eval().requires_grad_(False)
        return FeatureExtractor(
            name="inception-v3-compat" if inception.is_released else f"inception-v3-compat ({NOT_RELEASED})",
            compute=lambda images: inception(in_colour(images)),
            feature_dims={"2048": 2048, "spatial": SPATIAL_DIM},
            logits_layer=None,
            score_layer="logits_unbiased",
            weights_hash=inception.weights_hash,
            device=device,
            is_inception=inception.is_released,
            unreleased=not inception.is_released,
        )
    if kind == DINOV2:
        from xdlm_image.features.dinov2 import DINOv2
        from xdlm_image.weights import weights_hash

        dinov2 = DINOv2(file or None).to(device).eval().requires_grad_(False)
        return FeatureExtractor(
            name="dinov2-vitl14",
            compute=lambda images: dinov2(in_colour(images)),
            feature_dims={"dinov2": int(dinov2.net.num_features)},
            logits_layer=None,
            score_layer=None,
            weights_hash=weights_hash(dinov2),
            device=device,
        )
    small = SmallClassifierFeatures(SMALL_CLASSIFIER, SMALL_LAYERS, feature_extractor_weights_path=name).to(device)
    width = small.config.feature_dim
    return FeatureExtractor(
        name=SMALL_CLASSIFIER,
        compute=lambda images: small.convert_features_tuple_to_dict(small(images)),
        feature_dims={"pooled": width, "spatial": width * small.spatial_cells},
        logits_layer="logits",
        score_layer=None,
        weights_hash=small.config.weights_sha256,
        device=device,
        config=small.config,
    )
