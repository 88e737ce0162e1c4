"""Tiny pictures, a tiny recipe and a tiny trained tokenizer for the tests of tokenizers and of encoding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xdlm_image.recipes import DataOptions, TokenizerModelOptions, TokenizerRecipe
from xdlm_image.tokenizer.train import train_tokenizer

STEPS, CHECKPOINT = 14, 6


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """The memory of checked images goes into a home of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module", name="pictures")
def pictures_fixture(tmp_path_factory) -> DataOptions:
    """Two classes of 16x16 pictures: bars across and bars down, of many widths."""
    root = tmp_path_factory.mktemp("pictures")
    y, x = np.mgrid[0:16, 0:16]
    for split, number in (("train", 20), ("val", 4), ("test", 6)):
        for name, axis in (("across", y), ("down", x)):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                picture = 127 * (1 + np.sin(axis * (0.3 + 0.1 * i) + i))
                Image.fromarray(picture.astype(np.uint8)).save(root / split / name / f"{i:02d}.png")
    return DataOptions(name="folder", root=str(root), image_size=16, channels=1, crop="random")


def tiny_recipe(output: Path, data: DataOptions, **changes) -> TokenizerRecipe:
    model = TokenizerModelOptions(
        block_out_channels=[8, 8, 8], latent_channels=4, num_vq_embeddings=16, vq_embed_dim=2, norm_num_groups=4
    )
    values = {
        "batch_size": 4, "max_steps": STEPS, "plain_steps": 4, "warmup_steps": 2, "learning_rate": 5e-3,
        "revive_after": 4, "log_every": 1, "checkpoint_every": CHECKPOINT,
    }  # fmt: skip
    return TokenizerRecipe(output_dir=str(output), data=data, model=model, **(values | changes))


@pytest.fixture(scope="module", name="trained")
def trained_fixture(tmp_path_factory, pictures) -> Path:
    return train_tokenizer(tiny_recipe(tmp_path_factory.mktemp("trained") / "tokenizer", pictures))


def losses(folder: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["squared_error"], line["norm"], line["codes_alive"]) for line in lines]
