"""The verb `encode`: images through a tokenizer into code caches, one a split.

This file owns the pass over the images and its sharing over processes. The format on disk is `data.code_cache`'s, what
a killed run leaves `data.code_blocks`', the call into the network `codes`'.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import VQModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from xdlm_image.data.code_blocks import CodeBlocks
from xdlm_image.data.code_cache import (
    BESIDES,
    MANIFEST,
    CodeCache,
    Manifest,
    code_dtype,
    refuse_existing,
    write_code_cache,
)
from xdlm_image.data.image_check import check_images
from xdlm_image.data.images import ImageSet, Uint8Images, normalise, open_images
from xdlm_image.files import write_json
from xdlm_image.processes import only_command, own_device, process_state
from xdlm_image.ranks import barrier, rank_and_world
from xdlm_image.recipes import DataOptions, EncodeRecipe
from xdlm_image.tokenizer.codebook import usage_of_cache
from xdlm_image.tokenizer.codes import encode_images, grid_of, load_tokenizer, tokenizer_info
from xdlm_image.tokenizer.measure import save_reconstructions
from xdlm_image.weights import weights_hash

REPORT = "report.json"  # beside the manifest
BLOCK = 1_024  # images, about, that a killed run loses on each process


def encode(recipe: EncodeRecipe) -> Path:
    """Encode the splits of an image set; returns output_dir, which then has a `CodeCache` a split.

    Beside each cache's manifest lie `report.json` (use of the codebook, PSNR) and `reconstructions.png`: 64 images
    above what their codes in the cache decode to.

    Called again, it keeps the caches that it finds whole and of this very recipe, so a killed run goes on with the
    block of images it was at. Several processes (`accelerate launch`, torchrun) share the images of a split, each on
    its own device; batches are the same however many there are.

    Raises:
        ValueError: The tokenizer was trained for other sizes or channels; random crop; an image that cannot be read;
            another command is at work in output_dir.
        FileExistsError: A cache of something else, or a damaged one, is there and overwrite is False.
        FileNotFoundError: No tokenizer, no images.
        OSError: Nothing can be written to output_dir; before any image is read.
    """
    data = recipe.data
    if data.crop != "center":
        raise ValueError(f"data.crop={data.crop!r}: a cache holds one crop of an image; set data.crop: center")
    output = Path(recipe.output_dir)
    for split in recipe.splits:
        if recipe.overwrite or not (output / split / MANIFEST).is_file():
            refuse_existing(output / split, recipe.overwrite)
    device = own_device(recipe.device)
    is_main = rank_and_world()[0] == 0
    vqvae = load_tokenizer(recipe.tokenizer, device)
    if vqvae.config.in_channels != data.channels:
        raise ValueError(
            f"data.channels={data.channels}: {recipe.tokenizer} takes {vqvae.config.in_channels}; set it to that, or "
            "name another tokenizer"
        )
    for note in _trained_otherwise(tokenizer_info(recipe.tokenizer) or {}, data) if is_main else ():
        tqdm.write(f"note: {recipe.tokenizer} was trained {note}")
    grid = grid_of(vqvae, data.image_size)
    sets = [open_images(data, split) for split in recipe.splits]
    with only_command(output, is_main):
        _encode_sets(recipe, vqvae, grid, sets)
    return output


def _encode_sets(recipe: EncodeRecipe, vqvae: VQModel, grid: tuple[int, int], sets: list[ImageSet]) -> None:
    """Encode those that are not encoded yet; all are compared with what is there before the first is."""
    output, is_main = Path(recipe.output_dir), rank_and_world()[0] == 0
    to_encode: list[tuple[ImageSet, Manifest]] = []
    weights = weights_hash(vqvae)
    for images in sets:
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
            cut=images.cut,
        )
        if not recipe.overwrite and _is_encoded(output / images.split, manifest):
            if is_main:
                tqdm.write(f"{output / images.split}: already encoded from these images by this tokenizer; kept")
                _report(vqvae, images, output / images.split)
                CodeBlocks(output / images.split, manifest, size=1).remove()  # where a kill came just before that
        else:
            to_encode.append((images, manifest))
    for images, _ in to_encode:
        check_images(images, _workers(recipe, images))

    for images, manifest in to_encode:
        blocks = CodeBlocks(
            output / images.split,
            manifest,
            size=recipe.batch_size * max(1, BLOCK // recipe.batch_size),
            batch_size=recipe.batch_size,
            touched=images.touched,
        )
        for block, codes in _encoded(vqvae, images, recipe, _share(blocks)):
            blocks.write(block, codes)
        barrier()
        if not is_main:
            continue
        labelled = ((codes, images.labels[block.start : block.stop]) for block, codes in blocks.read())
        path = write_code_cache(output / images.split, manifest, labelled, recipe.overwrite)
        blocks.remove()
        _report(vqvae, images, path)
    barrier()


def _trained_otherwise(info: dict, data: DataOptions) -> Iterator[str]:
    """What of its training does not fit these images, where `tokenizer.json` tells of it."""
    if info.get("image_size", data.image_size) != data.image_size:
        yield f"at image_size={info['image_size']}, not {data.image_size}"
    seen = info.get("data")
    if not isinstance(seen, dict) or None in (seen.get("root"), data.root):
        return
    there, here = (os.path.realpath(os.path.expanduser(str(root))) for root in (seen["root"], data.root))
    cut = seen.get("validation_fraction", data.validation_fraction)
    if there == here and cut != data.validation_fraction:
        yield (
            f"with data.validation_fraction={cut}, not {data.validation_fraction}: it may have learned images that "
            "validate here"
        )


def _report(vqvae: VQModel, images: ImageSet, path: Path) -> None:
    """Tell what a cache holds and how its codes look decoded, unless that was done: `report.json` and a picture."""
    if (path / REPORT).is_file():
        return
    cache = CodeCache.open(path)
    usage = usage_of_cache(cache)
    shown, psnr = save_reconstructions(vqvae, images, path / "reconstructions.png", cache)
    report = {"images": len(images), **usage, "psnr": psnr, "psnr_of_images": shown}
    write_json(path / REPORT, report)
    held = cache.manifest
    tqdm.write(
        f"{path}: {len(images)} images x {held.num_views} views x {held.grid[0]}x{held.grid[1]} codes; "
        f"{usage['codes_used']} of {held.num_codes} codes used ({usage['codes_used_percent']:.1f} %), perplexity "
        f"{usage['perplexity']:.0f}; decoded, {shown} images have PSNR {psnr:.1f} dB (reconstructions.png)"
    )


def _share(blocks: CodeBlocks) -> list[range]:
    """The missing blocks that fall to this process: neighbours, as many as to the others."""
    processes = process_state()
    if processes is None:
        blocks.begin()
        return blocks.missing()
    from accelerate.utils import broadcast_object_list

    missing: list = [None]
    if processes.is_main_process:
        blocks.begin()
        missing = [blocks.missing()]  # told to all: who looks later already misses fewer
    [of_all] = broadcast_object_list(missing)
    rank, world = processes.process_index, processes.num_processes
    return of_all[len(of_all) * rank // world : len(of_all) * (rank + 1) // world]


def _workers(recipe: EncodeRecipe, images: ImageSet) -> int:
    """Data loading processes: as told, or what each process on this machine can have of its cores."""
    if recipe.num_workers is not None:
        return recipe.num_workers
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(8, cores - 1) if images.paths and cores > 4 else 0


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
        if name not in BESIDES and held != value:
            raise FileExistsError(f"{path} was encoded with {name}={held!r}, asked for is {value!r}: {remedy}")
    return True


def _encoded(
    vqvae: VQModel, images: ImageSet, recipe: EncodeRecipe, blocks: list[range]
) -> Iterator[tuple[range, np.ndarray]]:
    """Each of the blocks with its codes (b, views, h*w)."""
    size = recipe.batch_size
    batches = ([*block[i : i + size]] for block in blocks for i in range(0, len(block), size))
    loader = iter(DataLoader(Uint8Images(images), batch_sampler=batches, num_workers=_workers(recipe, images)))
    processes = process_state()
    label = f"encoding {images.split}"
    if processes is not None:
        label += f", process 1 of {processes.num_processes}"
    with tqdm(
        total=sum(map(len, blocks)),
        desc=label,
        unit="image",
        mininterval=1,
        disable=processes is not None and not processes.is_main_process,
    ) as bar:
        for block in blocks:
            parts = []
            for _ in range(0, len(block), size):
                raw, _labels = next(loader)
                batch = normalise(raw)
                views = [batch, batch.flip(-1)] if recipe.flip else [batch]
                codes = [encode_images(vqvae, view).flatten(1).cpu() for view in views]  # each (b, h*w)
                parts.append(torch.stack(codes, 1).numpy())
                bar.update(len(batch))
            yield block, np.concatenate(parts)
