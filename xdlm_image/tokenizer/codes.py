"""Using a VQ tokenizer: images to codes, codes to images, its hash, and loading it from a folder.

This file owns the calls into diffusers' `VQModel` that are easy to get wrong. It never trains and never writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from diffusers import VQModel

from xdlm_image.data.image_batches import Batch
from xdlm_image.data.images import normalise, to_uint8
from xdlm_image.hub_ids import fetch_hint
from xdlm_image.weights import weights_hash

INFO_FILE = "tokenizer.json"


def grid_of(vqvae: VQModel, image_size: int) -> tuple[int, int]:
    """Rows and columns of codes of a square image.

    Raises:
        ValueError: image_size is not a multiple of the tokenizer's reduction.
    """
    reduction = 2 ** (len(vqvae.config.block_out_channels) - 1)
    if image_size % reduction:
        raise ValueError(f"image_size={image_size}: must be a multiple of the tokenizer's reduction {reduction}")
    return image_size // reduction, image_size // reduction


@torch.no_grad()
def encode_images(vqvae: VQModel, images: torch.Tensor) -> torch.Tensor:
    """Images (B, C, S, S) in [-1, 1] -> codes (B, h, w) int64, the nearest codebook row of each latent.

    Raises:
        ValueError: Wrong rank or channel count.
    """
    if images.dim() != 4 or images.shape[1] != vqvae.config.in_channels:
        raise ValueError(
            f"images of shape {tuple(images.shape)}: the tokenizer takes (B, {vqvae.config.in_channels}, S, S)"
        )
    latents = vqvae.encode(images.to(device=vqvae.device, dtype=vqvae.dtype)).latents  # (B, D, h, w)
    batch, _, rows, columns = latents.shape
    return vqvae.quantize(latents)[2][2].reshape(batch, rows, columns)


@torch.no_grad()
def decode_codes(vqvae: VQModel, codes: torch.Tensor) -> torch.Tensor:
    """Codes (B, h, w) -> images (B, C, S, S), about in [-1, 1] (not cut off).

    Raises:
        ValueError: Wrong rank, or a code outside the codebook (`VQModel` itself would crash the device).
    """
    size = vqvae.config.num_vq_embeddings
    if codes.dim() != 3:
        raise ValueError(f"codes of shape {tuple(codes.shape)}: need (B, h, w)")
    check_codes(codes, size)
    codes = codes.to(vqvae.device, torch.int64)
    shape = (*codes.shape, vqvae.config.vq_embed_dim or vqvae.config.latent_channels)
    if vqvae.config.lookup_from_codebook:
        return vqvae.decode(codes.flatten(), force_not_quantize=True, shape=shape).sample
    latents = vqvae.quantize.get_codebook_entry(codes.flatten(), shape)  # (B, D, h, w)
    return vqvae.decode(latents, force_not_quantize=True).sample


def reconstructed_batches(vqvae: VQModel, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Each batch through encoder, codebook and decoder, back to uint8."""
    for batch in batches:
        codes = encode_images(vqvae, normalise(batch.images).to(vqvae.device))  # (B, h, w)
        yield batch._replace(images=to_uint8(decode_codes(vqvae, codes)).cpu(), codes=codes.cpu())


def check_codes(codes: torch.Tensor, num_codes: int) -> None:
    """Raise ValueError when any code lies outside [0, num_codes)."""
    if codes.numel() == 0:
        return
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= num_codes:
        raise ValueError(
            f"codes run from {low} to {high}, but the codebook has ids 0 to {num_codes - 1}: they are from another "
            "tokenizer, or still hold the mask"
        )


def load_tokenizer(path: str | Path, device: str | torch.device | None = None) -> VQModel:
    """Load a tokenizer folder (`VQModel.save_pretrained`'s layout) in evaluation mode.

    Raises:
        FileNotFoundError: The folder, its config.json or its weights are missing.
        ValueError: The weights are truncated, do not fit the config, or are not those `tokenizer.json` tells of.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "no such folder"
        raise FileNotFoundError(f"tokenizer={str(path)!r}: {what}; train one with train-tokenizer{fetch_hint(path)}")
    if not (folder / "config.json").is_file():
        inside = folder / "vqvae"
        remedy = f"name {str(inside)!r}" if inside.is_dir() else "is it unfinished?"
        raise FileNotFoundError(f"tokenizer={str(path)!r}: has no config.json, so it is no saved VQModel; {remedy}")
    if not any(folder.glob("diffusion_pytorch_model*.safetensors")):
        raise FileNotFoundError(f"tokenizer={str(path)!r}: has no diffusion_pytorch_model.safetensors")
    try:
        vqvae, info = VQModel.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # safetensors, diffusers and json each raise their own kinds
        raise ValueError(f"tokenizer={str(path)!r}: cannot be loaded ({type(error).__name__}: {error})") from error
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(
            f"tokenizer={str(path)!r}: weights and config.json differ; missing {info['missing_keys'][:3]}, "
            f"unexpected {info['unexpected_keys'][:3]}"
        )
    vqvae.eval().requires_grad_(False)
    note = tokenizer_info(folder)
    if note is not None and note.get("tokenizer_hash", "") not in ("", weights_hash(vqvae)):
        raise ValueError(
            f"tokenizer={str(path)!r}: its weights are not those its {INFO_FILE} tells of; copy the whole folder"
        )
    return vqvae if device is None else vqvae.to(device)


def tokenizer_info(path: str | Path) -> dict | None:
    """The folder's `tokenizer.json` (image_size, channels, tokenizer_hash, data_fingerprint, data), or None.

    Raises:
        ValueError: The file is damaged.
    """
    file = Path(path) / INFO_FILE
    if not file.is_file():
        return None
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(info, dict):
            raise ValueError(f"it holds a {type(info).__name__}")
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are some
        raise ValueError(f"{file} is damaged ({error}): copy the whole tokenizer again, or train it again") from error
    return info
