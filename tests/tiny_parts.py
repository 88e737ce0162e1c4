"""Tiny images, a tiny trained extractor and tiny random pipelines for tests that need a whole pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from diffusers import VQModel
from PIL import Image

from xdlm_image.data.image_batches import Batch
from xdlm_image.evaluation.measuring import Measured, measure
from xdlm_image.features.extractor_training import train_extractor
from xdlm_image.models.transformer_xdlm import XDLMTransformer2DModel
from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.recipes import DataOptions, EvaluateRecipe, ExtractorRecipe
from xdlm_image.schedulers import XDLMScheduler

CLASSES = ["ant", "bee, wasp", "cat"]
SIZE = 16
NUM_CODES = 24


def write_images(root: Path, per_class: dict[str, int], seed: int = 0) -> DataOptions:
    """A folder data set of three classes that differ in the direction of a colour gradient; noise on top."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 180, SIZE)
    patterns = [np.add.outer(0 * ramp, ramp), np.add.outer(ramp, 0 * ramp), np.add.outer(ramp, -ramp) / 2 + 90]
    for split, count in per_class.items():
        for name, pattern in zip(CLASSES, patterns):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = pattern[..., None] * [1.0, 0.6, 0.8] + rng.normal(30, 15, (SIZE, SIZE, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
    return DataOptions(name="folder", root=str(root), image_size=SIZE, channels=3)


def extractor_recipe(data: DataOptions, output: Path, **changes) -> ExtractorRecipe:
    recipe = ExtractorRecipe(
        output_dir=str(output), data=data, width=8, feature_dim=16, batch_size=16, epochs=4, learning_rate=1e-2
    )
    return dataclasses.replace(recipe, **changes)


def save_pipeline(folder: Path, k: float = 0.1, seed: int = 0, channels: int = 3, num_classes: int | None = 3) -> Path:
    """A pipeline of random weights (the transformer's zero-initialised ones too) for 16x16 images on 4x4 codes."""
    torch.manual_seed(seed)
    transformer = XDLMTransformer2DModel(
        sample_size=4,
        num_embeds=NUM_CODES + 1,
        out_channels=NUM_CODES,
        num_classes=num_classes,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.manual_seed(100)  # the same tokenizer in every pipeline
    vqvae = VQModel(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=NUM_CODES,
        norm_num_groups=4,
        vq_embed_dim=4,
        sample_size=SIZE,
    )
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    scheduler = XDLMScheduler(k=k, num_codes=NUM_CODES)
    names = dict(enumerate(CLASSES)) if num_classes == 3 else None
    XDLMPipeline(transformer, scheduler, vqvae, id2label=names).save_pretrained(folder)
    return folder


def statistics_of(extractor, images: torch.Tensor) -> Measured:
    """What an extractor makes of uint8 images (N, C, H, W), in batches of 12."""
    blocks = zip(range(0, len(images), 12), images.split(12))
    return measure(extractor, [Batch(block, torch.zeros(len(block)), None, start) for start, block in blocks])


@dataclasses.dataclass
class Parts:
    """Paths of everything a sweep needs."""

    data: DataOptions
    extractor: Path
    pipelines: dict[str, str]

    def recipe(self, output: Path, **changes) -> EvaluateRecipe:
        recipe = EvaluateRecipe(
            pipelines=self.pipelines,
            output_dir=str(output),
            data=self.data,
            extractor=str(self.extractor),
            num_steps=[1, 3],
            num_samples=18,
            seeds=[0, 1],
            batch_size=7,
            device="cpu",
        )
        return dataclasses.replace(recipe, **changes)


def build_parts(root: Path) -> Parts:
    data = write_images(root / "images", {"train": 40, "val": 12})
    extractor = train_extractor(extractor_recipe(data, root / "extractor"))
    pipelines = {
        "mdlm": str(save_pipeline(root / "mdlm", k=0.0, seed=1)),
        "xdlm-0.1": str(save_pipeline(root / "xdlm", k=0.1, seed=2)),
    }
    return Parts(data, extractor, pipelines)
