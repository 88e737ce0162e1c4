"""The small classifier: a network for images of one size, its folder, and its place among torch-fidelity's extractors.

This file owns the network, `config.json` beside its weights, loading with checks, and the registration with
torch-fidelity. It never trains (see `extractor_training`) and never computes statistics.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from xdlm_image.data.images import normalise
from xdlm_image.files import sha256_of_file

SMALL_CLASSIFIER = "xdlm-small-classifier"  # its name in torch-fidelity's registry
LAST_GRID = 4  # the network halves the image until its side is at most this
SPATIAL_GRID = 2  # the last feature map is averaged over this many rows and columns for the layer "spatial"
SCHEMA_VERSION = 1
REMEDY = "train one with `xdlm-image train-extractor` or name another folder"


@dataclass(frozen=True)
class ExtractorConfig:
    """What `config.json` beside the weights says.

    Attributes:
        image_size: Side of the images in pixels.
        channels: 1 (grey) or 3 (RGB).
        width: Channels of the first convolution; each block doubles them, up to feature_dim.
        feature_dim: Channels of the last block, the width of the layer "pooled".
        class_names: Names by class id.
        data_fingerprint: Fingerprint of the images it was trained on.
        test_accuracy: Share of test images classified rightly.
        weights_sha256: SHA-256 of the bytes of `model.safetensors`.
        schema_version: Version of this layout.
    """

    image_size: int
    channels: int
    width: int
    feature_dim: int
    class_names: list[str]
    data_fingerprint: str
    test_accuracy: float
    weights_sha256: str
    schema_version: int = SCHEMA_VERSION

    @property
    def is_near_chance(self) -> bool:
        """Whether its accuracy is below twice that of guessing, and below a tenth of the way from there to 1."""
        chance = 1 / len(self.class_names)
        return self.test_accuracy < min(2 * chance, chance + 0.1 * (1 - chance))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class SmallClassifier(torch.nn.Module):
    """A small residual network (timm's ByobNet with basic blocks) for images of one size.

    A 3x3 convolution with stride 2, then basic blocks that halve the side each, until it is at most 4: for 28x28
    that is 28 -> 14 -> 7 -> 4 with widths (width, 2 width, feature_dim). Two blocks at least.

    Args:
        image_size: Side of the images in pixels, at least 8.
        channels: 1 or 3.
        num_classes: Classes of the head.
        width: Channels of the first convolution.
        feature_dim: Channels of the last block.
    """

    def __init__(self, image_size: int, channels: int, num_classes: int, width: int, feature_dim: int) -> None:
        super().__init__()
        side = (image_size + 1) // 2
        strides: list[int] = []
        while side > LAST_GRID or len(strides) < 2:  # ByobNet wants two stages at least
            strides.append(2 if side > LAST_GRID else 1)
            side = -(-side // strides[-1])
        widths = [min(width * 2**block, feature_dim) for block in range(1, len(strides))] + [feature_dim]
        blocks = tuple(ByoBlockCfg(type="basic", d=1, c=c, s=s) for c, s in zip(widths, strides))
        self.net = ByobNet(
            ByoModelCfg(blocks=blocks, stem_type="3x3", stem_pool="", stem_chs=width),
            num_classes=num_classes,
            in_chans=channels,
            zero_init_last=False,  # so shallow a network learns faster with every branch open
        )
        self.net.head.fc.reset_parameters()  # timm's 0.01 costs a short training its first hundred steps

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float images (B, C, S, S) in [-1, 1] -> class logits (B, num_classes)."""
        return self.net(images)

    def layers(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Float images (B, C, S, S) in [-1, 1] -> "pooled" (B, D), "spatial" (B, 4 D), "logits" (B, num_classes)."""
        grid = self.net.forward_features(images)  # (B, D, s, s), s <= 4
        pooled = self.net.forward_head(grid, pre_logits=True)  # (B, D)
        logits = self.net.forward_head(grid)  # (B, num_classes)
        if grid.device.type == "mps":  # adaptive pooling there needs sides that divide
            grid = grid.cpu()
        spatial = F.adaptive_avg_pool2d(grid, SPATIAL_GRID).flatten(1)  # (B, D, 2, 2) -> (B, 4 D)
        return {"pooled": pooled, "spatial": spatial, "logits": logits}


class SmallClassifierFeatures(FeatureExtractorBase):
    """The small classifier as a torch-fidelity feature extractor, registered as `xdlm-small-classifier`.

    With torch-fidelity's own call: `calculate_metrics(feature_extractor="xdlm-small-classifier",
    feature_extractor_weights_path=FOLDER, fid=True, ...)`.

    Args:
        name: Name in the registry.
        features_list: Which of "pooled", "spatial", "logits".
        feature_extractor_weights_path: Folder with `config.json` and `model.safetensors`.

    Raises:
        ValueError, FileNotFoundError: The folder is missing, truncated or mismatched.
    """

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **_: Any
    ) -> None:
        super().__init__(name, features_list)
        if feature_extractor_weights_path is None:
            raise ValueError(f"feature_extractor_weights_path=None: name the extractor's folder; {REMEDY}")
        self.config, self.classifier = load_small_classifier(Path(feature_extractor_weights_path))
        self.spatial_cells = SPATIAL_GRID**2
        self.classifier.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.eval()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "pooled", "spatial", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"isc": "logits", "fid": "pooled", "kid": "pooled", "prc": "pooled"}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> torch.Tensor:
        raise NotImplementedError("SmallClassifierFeatures is not compiled")

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """uint8 images (B, C, S, S) -> the requested layers, float32, in the order requested.

        torch-fidelity reads every picture file as RGB; a network for grey images takes such a batch when its three
        channels are equal.

        Raises:
            ValueError: Other dtype, channels or size than the network was trained on.
        """
        config = self.config
        if images.dtype != torch.uint8:
            raise ValueError(f"images.dtype={images.dtype}: the extractor takes uint8 images (B, C, H, W)")
        if config.channels == 1 and images.ndim == 4 and images.shape[1] == 3:
            if not torch.equal(images[:, :1].expand_as(images), images):
                raise ValueError("images: colour images were given to an extractor for grey ones; train another")
            images = images[:, :1]
        expected = (config.channels, config.image_size, config.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images.shape={tuple(images.shape)}: this extractor takes (B, {expected[0]}, "
                f"{expected[1]}, {expected[2]}); train one for this size and these channels"
            )
        scaled = normalise(images).contiguous(memory_format=torch.channels_last)
        layers = self.classifier.layers(scaled)
        return tuple(layers[name].float() for name in self.features_list)


if SMALL_CLASSIFIER not in FEATURE_EXTRACTORS_REGISTRY:  # a second import (reload) must not fail
    register_feature_extractor(SMALL_CLASSIFIER, SmallClassifierFeatures)


def read_extractor_config(folder: str | Path) -> ExtractorConfig:
    """Read and check `config.json` of an extractor's folder. Raises FileNotFoundError or ValueError."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"extractor={str(folder)!r}: there is no config.json in it; {REMEDY}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if "_class_name" in values:
            raise ValueError(f"extractor={str(folder)!r}: holds a {values['_class_name']}, no extractor; {REMEDY}")
        known = {field.name for field in fields(ExtractorConfig)}
        config = ExtractorConfig(**{key: value for key, value in values.items() if key in known})
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"extractor={str(folder)!r}: config.json is damaged ({error}); {REMEDY}") from error
    if config.schema_version != SCHEMA_VERSION:
        raise ValueError(
            f"extractor={str(folder)!r}: config.json has schema_version={config.schema_version!r}, this version reads "
            f"{SCHEMA_VERSION}; {REMEDY}"
        )
    return config


def load_small_classifier(folder: Path) -> tuple[ExtractorConfig, SmallClassifier]:
    config = read_extractor_config(folder)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"extractor={str(folder)!r}: there is no model.safetensors in it; {REMEDY}")
    found = sha256_of_file(weights)
    if found != config.weights_sha256:
        raise ValueError(
            f"extractor={str(folder)!r}: model.safetensors is truncated or belongs to another config.json (SHA-256 "
            f"{found[:12]}..., expected {config.weights_sha256[:12]}...); {REMEDY}"
        )
    classifier = SmallClassifier(
        config.image_size, config.channels, len(config.class_names), config.width, config.feature_dim
    )
    try:
        classifier.load_state_dict(load_file(weights))
    except RuntimeError as error:
        raise ValueError(
            f"extractor={str(folder)!r}: the weights do not fit the sizes in config.json ({error}); {REMEDY}"
        ) from error
    return config, classifier
