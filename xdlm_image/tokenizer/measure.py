"""How good a tokenizer is: PSNR, use of the codebook, rFID, and a picture of reconstructions.

This file owns the measuring of a finished tokenizer. It never trains; the formula of rFID is `features.fid`'s.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import VQModel
from torchvision.utils import make_grid
from tqdm import tqdm

from xdlm_image.data.images import ImageSet, normalise, to_uint8
from xdlm_image.files import write_atomic
from xdlm_image.tokenizer.codebook import usage_of
from xdlm_image.tokenizer.codes import decode_codes, encode_images

if TYPE_CHECKING:
    from xdlm_image.data.code_cache import CodeCache
    from xdlm_image.features.extractor import FeatureExtractor

SHOWN_AT_ONCE = 8  # decoded; their activations at 256x256 take gigabytes


def measure_tokenizer(
    vqvae: VQModel,
    images: ImageSet,
    batch_size: int,
    extractor: FeatureExtractor | None = None,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Measure on a whole split, whose images the ranks of `torch.distributed` share.

    Args:
        vqvae: Tokenizer in evaluation mode.
        images: The split.
        batch_size: Images at once.
        extractor: From `features.extractor.load_extractor`, for rFID; None leaves rFID out.
        num_workers: Data loading processes.

    Returns, on every rank:
        `psnr` (dB, mean over images of 10 log10(255^2 / MSE), on uint8 pixels), `psnr_of_mean_error` (of the mean
        MSE), `l1` (mean |error| in uint8 steps), `codes_used`, `codes_used_percent`, `perplexity`, and with an
        extractor `rfid` (one a feature layer) and `rfid_extractor`.
    """
    from xdlm_image.data.image_batches import blocks_of_rank, real_batches
    from xdlm_image.features.fid import fid_from_statistics, new_statistics, update_statistics
    from xdlm_image.ranks import rank_and_world, reduce_over_ranks

    rank, world = rank_and_world()
    counts = torch.zeros(vqvae.config.num_vq_embeddings, dtype=torch.int64)
    sums = torch.zeros(3, dtype=torch.float64)  # over images: PSNR, squared error, absolute error
    real, again = ({}, {}) if extractor is None else (new_statistics(extractor), new_statistics(extractor))
    batches = real_batches(images, batch_size, num_workers=num_workers)
    number = len([*blocks_of_rank(len(images), batch_size)])
    for batch in tqdm(batches, "measuring the tokenizer", number, unit="batch", disable=rank != 0):
        raw = batch.images  # uint8 (B, C, S, S)
        codes = encode_images(vqvae, normalise(raw))
        reconstructed = to_uint8(decode_codes(vqvae, codes)).cpu()
        error = reconstructed.float() - raw.float()
        squared = error.square().mean((1, 2, 3)).double()  # (B,)
        sums += torch.stack([_psnr(squared).sum(), squared.sum(), error.abs().mean((1, 2, 3)).double().sum()])
        counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
        if extractor is not None:
            update_statistics(real, extractor(raw))
            update_statistics(again, extractor(reconstructed))
    if world > 1:
        sums, counts = (reduce_over_ranks(values.to(vqvae.device)).cpu() for values in (sums, counts))
    for statistics in (*real.values(), *again.values()):
        statistics.all_reduce(vqvae.device)
    psnr, mse, l1 = (sums / len(images)).tolist()
    report: dict[str, Any] = {
        "split": images.split,
        "images": len(images),
        "psnr": psnr,
        "psnr_of_mean_error": 10 * math.log10(255**2 / max(mse, 1e-3)),
        "l1": l1,
        "num_codes": len(counts),
        **usage_of(counts),
    }
    if extractor is not None:
        report["rfid"] = {layer: fid_from_statistics(real[layer], again[layer]) for layer in real}
        report["rfid_extractor"] = extractor.describe()
    return report


def _psnr(squared: torch.Tensor) -> torch.Tensor:
    """dB of each image from its mean squared error on uint8 pixels, (B,) -> (B,).

    An image that comes back exactly would have infinite PSNR; the floor on its error says 78 dB.
    """
    return 10 * torch.log10(255**2 / squared.clamp(min=1e-3))


def save_reconstructions(
    vqvae: VQModel, images: ImageSet, path: Path, cache: CodeCache | None = None, columns: int = 16, rows: int = 4
) -> tuple[int, float]:
    """PNG of evenly spread images: each row of originals stands above its row of reconstructions.

    Args:
        vqvae: Tokenizer in evaluation mode.
        images: The split.
        path: Of the picture.
        cache: Codes of the split, which are decoded as they lie there; None encodes the images.
        columns: Images a row.
        rows: Rows of originals.

    Returns:
        How many images are shown, and their PSNR (dB, mean over images).
    """
    number = min(columns * rows, len(images))
    columns = min(columns, number)
    chosen = [i * len(images) // number for i in range(number // columns * columns)]
    raw = torch.stack([images.raw(i) for i in chosen])  # (n, C, S, S)
    if cache is None:
        codes = torch.cat([encode_images(vqvae, normalise(part)) for part in raw.split(SHOWN_AT_ONCE)])
    else:
        codes = cache.batch(np.array(chosen))[0].unflatten(1, cache.manifest.grid)  # (n, h, w)
    again = torch.cat([to_uint8(decode_codes(vqvae, part)).cpu() for part in codes.split(SHOWN_AT_ONCE)])
    pairs = torch.stack([raw.unflatten(0, (-1, columns)), again.unflatten(0, (-1, columns))], 1)  # (r, 2, c, C, S, S)
    scale = max(1, 56 // images.image_size)
    picture = make_grid(pairs.flatten(0, 2), nrow=columns, padding=1, pad_value=255)
    picture = picture.repeat_interleave(scale, -1).repeat_interleave(scale, -2)

    from torchvision.transforms.v2.functional import to_pil_image

    write_atomic(path, lambda temporary: to_pil_image(picture).save(temporary))
    return len(raw), float(_psnr((again.float() - raw.float()).square().mean((1, 2, 3))).mean())
