"""A classifier that only says which class an image shows, apart from the extractor whose features are compared.

This file owns timm's ImageNet classifiers and small classifiers in that office. It never computes features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import ImageNetInfo, resolve_model_data_config
from torch import nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from xdlm_image.data.image_batches import NO_CLASS
from xdlm_image.data.images import in_colour
from xdlm_image.features.small_classifier import SMALL_CLASSIFIER, SmallClassifierFeatures
from xdlm_image.weights import weights_hash

TIMM = "timm:"


@dataclass(frozen=True)
class ClassJudge:
    """A classifier.

    Attributes:
        name: What reports call it.
        weights_hash: SHA-256 of its weights.
        classify: uint8 images (B, C, H, W) on its device -> ids (B,) of the data's classes, or -1.
    """

    name: str
    weights_hash: str
    classify: Callable[[torch.Tensor], torch.Tensor]

    def describe(self) -> dict[str, Any]:
        """What a protocol must record about it."""
        return {"name": self.name, "weights_sha256": self.weights_hash}


def load_class_judge(name: str, class_names: Sequence[str], shape: tuple[int, int], device: torch.device) -> ClassJudge:
    """A classifier of the data's classes.

    Args:
        name: `timm:MODEL`, an ImageNet-1K classifier of timm's hub, `timm:MODEL:FILE` with its safetensors file, or the
            folder of a small classifier (`xdlm-image train-extractor`).
        class_names: Folder names by class id; WordNet ids for timm.
        shape: (channels, side in pixels) of the images; a small classifier takes only those that it was trained on.
        device: Where it computes.

    Raises:
        FileNotFoundError, OSError: It cannot be had.
        ValueError: It knows other classes, or takes other images.
    """
    if not name.startswith(TIMM):
        return _small(name, class_names, shape, device)
    model, _, file = name.removeprefix(TIMM).partition(":")
    synsets = ImageNetInfo().label_names()
    strangers = [folder for folder in class_names if folder not in synsets]
    if strangers:
        raise ValueError(
            f"classifier={name!r}: it knows ImageNet-1K's classes, the data's are {', '.join(strangers[:3])}, ...; use "
            "class folders named by WordNet ids, or a small classifier (`xdlm-image train-extractor`)"
        )
    try:
        net = timm.create_model(model, pretrained=not file)
        if file:
            net.load_state_dict(load_file(file))
    except Exception as error:  # an unknown name, a hub without network, another file: the remedy is the same
        raise OSError(
            f"classifier={name!r}: could not be loaded ({error}). Fetch its model.safetensors from timm's hub and name "
            "it as timm:MODEL:FILE"
        ) from error
    if net.num_classes != len(synsets):
        raise ValueError(f"classifier={name!r}: has {net.num_classes} classes, ImageNet-1K {len(synsets)}")
    net = net.to(device).eval().requires_grad_(False)
    ids = torch.full((len(synsets),), NO_CLASS)
    ids[[synsets.index(folder) for folder in class_names]] = torch.arange(len(class_names))
    transform = _Transform(net)
    return ClassJudge(
        name.removeprefix(TIMM).partition(":")[0],
        weights_hash(net),
        lambda images: ids[net(transform(images)).argmax(1).cpu()],
    )


class _Transform:
    """timm's transform of evaluation, on uint8 batches: shorter side to size / crop share, centre crop, normalised."""

    def __init__(self, net: nn.Module) -> None:
        config = resolve_model_data_config(net)
        self.size = config["input_size"][1:]
        self.resized = int(self.size[0] / config["crop_pct"])
        self.mean, self.std = config["mean"], config["std"]
        self.interpolation = InterpolationMode(config["interpolation"])

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        images = tv.resize(in_colour(images), [self.resized], interpolation=self.interpolation, antialias=True)
        return tv.normalize(tv.center_crop(images, list(self.size)).float() / 255, self.mean, self.std)


def _small(folder: str, class_names: Sequence[str], shape: tuple[int, int], device: torch.device) -> ClassJudge:
    try:
        small = SmallClassifierFeatures(SMALL_CLASSIFIER, ["logits"], feature_extractor_weights_path=folder).to(device)
    except (FileNotFoundError, ValueError) as error:  # they name the argument extractor
        raise type(error)(f"classifier={folder!r}: cannot be opened ({error})") from error
    if small.config.class_names != list(class_names):
        raise ValueError(
            f"classifier={folder!r}: its classes are {small.config.class_names[:3]}, ..., the data's "
            f"{list(class_names)[:3]}, ...; train one on these data"
        )
    if (small.config.channels, small.config.image_size) != shape:
        raise ValueError(
            f"classifier={folder!r}: it takes images of (channels, size) "
            f"{(small.config.channels, small.config.image_size)}, these have {shape}; train one on these data"
        )
    return ClassJudge(
        f"{SMALL_CLASSIFIER} {Path(folder).name} (test accuracy {100 * small.config.test_accuracy:.1f} %)",
        small.config.weights_sha256,
        lambda images: small(images)[0].argmax(1).cpu(),
    )
