"""The verb `encode`: images through a tokenizer into code caches, one a split.

This file owns the pass over the images. The format on disk is `data.code_cache`'s, the call into the network `codes`'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import VQModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from xdlm_image.data.code_cache import (
    MANIFEST,
    CodeCache,
    Manifest,
    code_dtype,
    refuse_existing,
    usage_of_cache,
    write_code_cache,
)
from xdlm_image.data.image_check import check_images
from xdlm_image.data.images import ImageSet, open_images
from xdlm_image.devices import best_device
from xdlm_image.recipes import EncodeRecipe
from xdlm_image.tokenizer.codes import encode_images, grid_of, load_tokenizer, tokenizer_hash, tokenizer_info


def encode(recipe: EncodeRecipe) -> Path:
    """Encode the splits of an image set; returns output_dir, which then has a `CodeCache` a split.

    Called again, it keeps the caches that it finds whole and of this very recipe, so a killed run goes on with the
    split it was at.

    Raises:
        ValueError: The tokenizer was trained for other sizes or channels; random crop; an image that cannot be read.
        FileExistsError: A cache of something else, or a damaged one, is there and overwrite is False.
        FileNotFoundError: No tokenizer, no images.
    """
    data = recipe.data
    if data.crop != "center":
        raise ValueError(f"data.crop={data.crop!r}: a cache holds one crop of an image; set data.crop: center")
    output = Path(recipe.output_dir)
    for split in recipe.splits:
        if recipe.overwrite or not (output / split / MANIFEST).is_file():
            refuse_existing(output / split, recipe.overwrite)
    vqvae = load_tokenizer(recipe.tokenizer, best_device(recipe.device))
    if vqvae.config.in_channels != data.channels:
        raise ValueError(f"data.channels={data.channels}: {recipe.tokenizer} takes {vqvae.config.in_channels}")
    trained = tokenizer_info(recipe.tokenizer)
    if trained is not None and trained.get("image_size", data.image_size) != data.image_size:
        tqdm.write(f"note: {recipe.tokenizer} was trained at image_size={trained['image_size']}, not {data.image_size}")
    grid = grid_of(vqvae, data.image_size)
    to_encode: list[tuple[ImageSet, Manifest]] = []
    weights = tokenizer_hash(vqvae)
    for split in recipe.splits:  # all are opened and compared before the first is encoded
        images = open_images(data, split)
        manifest = Manifest(
            tokenizer_hash=weights,
            data_fingerprint=images.fingerprint,
            split=images.split,
            image_size=images.image_size,
            channels=images.channels,
            crop=images.crop,
            grid=list(grid),
            num_codes=vqvae.config.num_vq_embeddings,
            num_images=len(images),
            num_views=2 if recipe.flip else 1,
            class_names=images.class_names,
            dtype=code_dtype(vqvae.config.num_vq_embeddings).str,
            label_dtype="<u2" if len(images.class_names) < 65_536 else "<i8",
            tokenizer=str(recipe.tokenizer),
        )
        if not recipe.overwrite and _is_encoded(output / split, manifest):
            tqdm.write(f"{output / split}: already encoded from these images by this tokenizer; kept")
        else:
            to_encode.append((images, manifest))
    for images, _ in to_encode:
        check_images(images, recipe.num_workers)

    for images, manifest in to_encode:
        path = write_code_cache(output / images.split, manifest, _encoded(vqvae, images, recipe), recipe.overwrite)
        usage = usage_of_cache(CodeCache.open(path))
        tqdm.write(
            f"{path}: {len(images)} images x {manifest.num_views} views x {grid[0]}x{grid[1]} codes; "
            f"{usage['codes_used']} of {manifest.num_codes} codes used ({usage['codes_used_percent']:.1f} %), "
            f"perplexity {usage['perplexity']:.0f}"
        )
    return output


def _is_encoded(path: Path, wanted: Manifest) -> bool:
    """Whether `path` holds a whole cache of just this; FileExistsError names the first difference, or the damage."""
    if not (path / MANIFEST).is_file():
        return False
    remedy = "set overwrite: true to replace it, or name another output_dir"
    try:
        cache = CodeCache.open(path)
        cache.verify()
    except ValueError as error:
        raise FileExistsError(f"{error}; here: {remedy}") from error
    for name, value in dataclasses.asdict(wanted).items():
        held = getattr(cache.manifest, name)
        if name not in ("tokenizer", "checksums") and held != value:
            raise FileExistsError(f"{path} was encoded with {name}={held!r}, asked for is {value!r}: {remedy}")
    return True


def _encoded(vqvae: VQModel, images: ImageSet, recipe: EncodeRecipe) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(codes (b, views, h*w), labels (b,)) in the order of the images."""
    loader = DataLoader(images, recipe.batch_size, num_workers=recipe.num_workers)
    with tqdm(total=len(images), desc=f"encoding {images.split}", unit="image", mininterval=1) as bar:
        for batch, labels in loader:
            views = [batch, batch.flip(-1)] if recipe.flip else [batch]
            codes = [encode_images(vqvae, view).flatten(1).cpu() for view in views]  # each (b, h*w)
            yield torch.stack(codes, 1).numpy(), labels.numpy()
            bar.update(len(labels))
