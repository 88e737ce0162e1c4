"""The verbs `convert-llamagen` and `convert-taming`: VQ tokenizers of other projects as diffusers' `VQModel`.

This file owns the two maps of keys and what the sizes are read from. Both originals are the same network of
convolutions with attention at the coarsest level(s) (arXiv 2012.09841); they differ in the names, in the order of the
decoder's levels, and in the codebook: LlamaGen (arXiv 2406.06525) compares and decodes rows of unit length.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import VQModel
from torch.nn.functional import normalize

from xdlm_image.conversion.checkpoint_file import CheckpointFile, is_state_dict, read_checkpoint, weight
from xdlm_image.conversion.folder import Conversion, provenance, refuse_taken, write_folder
from xdlm_image.conversion.state_dicts import fill, looks_like, size
from xdlm_image.files import write_json
from xdlm_image.recipes.conversion import ConversionRecipe
from xdlm_image.tokenizer.codes import INFO_FILE, grid_of
from xdlm_image.weights import weights_hash

TRAINED_AT = 256  # pixels; LlamaGen's and taming's ImageNet tokenizers alike
CODEBOOK = "quantize.embedding.weight"
NORM_GROUPS = 32  # fixed in both originals
MOST_LEVELS = 8  # of a file that is believed
OFF_UNIT = 1e-5  # rows farther from unit length than float32 rounding are worth a warning


class Family(NamedTuple):
    """How an original names things, and what its released models have where a file says nothing."""

    name: str
    entries: tuple[str, ...]  # where in the file the weights may lie, best first
    down: str  # a level of the encoder, before its number
    up: str  # a level of the decoder
    resnet: str
    mid: tuple[str, str, str]
    reversed_decoder: bool  # whether level 0 of the decoder is the finest
    unit_codebook: bool
    left_out: tuple[str, ...]  # prefixes of tensors that are no part of the tokenizer
    remedy: str


LLAMAGEN = Family(
    name="LlamaGen VQ tokenizer",
    entries=("ema", "model", "state_dict"),  # the order in which LlamaGen's own scripts look
    down="conv_blocks",
    up="conv_blocks",
    resnet="res",
    mid=("mid.0", "mid.1", "mid.2"),
    reversed_decoder=False,
    unit_codebook=True,
    left_out=("quantize.codebook_used",),  # the codes of the last training batches
    remedy="convert-llamagen takes LlamaGen's vq_ds16_c2i.pt, vq_ds8_c2i.pt and the like",
)
TAMING = Family(
    name="taming VQGAN",
    entries=("state_dict",),
    down="down",
    up="up",
    resnet="block",
    mid=("mid.block_1", "mid.attn_1", "mid.block_2"),
    reversed_decoder=True,
    unit_codebook=False,
    left_out=("loss.",),  # discriminator and perceptual network
    remedy="convert-taming takes the last.ckpt of taming-transformers' VQGANs",
)
PARTS = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0.conv": "downsample.conv",
    "upsamplers.0.conv": "upsample.conv",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def original_key(key: str, family: Family, levels: int) -> str:
    """The original's name of a tensor of `VQModel`."""

    def level(found: re.Match[str]) -> str:
        number = int(found[2])
        if found[1] == "down":
            return f"{family.down}.{number}"
        return f"{family.up}.{levels - 1 - number if family.reversed_decoder else number}"

    key = re.sub(r"(down|up)_blocks\.(\d+)", level, key)
    first, attention, second = family.mid
    for ours, theirs in (("resnets.0", first), ("attentions.0", attention), ("resnets.1", second)):
        key = key.replace(f"mid_block.{ours}", theirs)
    key = key.replace(".resnets.", f".{family.resnet}.").replace(".attentions.", ".attn.")
    for ours, theirs in PARTS.items():
        key = re.sub(rf"\.{re.escape(ours)}(?=\.)", f".{theirs}", key)
    return key


def model_config(found: Mapping[str, torch.Tensor], family: Family) -> dict[str, Any]:
    """`VQModel`'s arguments, read from a file's shapes; what is missing is taken from the released models.

    Raises:
        ValueError: The number of levels or layers is none of a VQ tokenizer.
    """

    def count(before: str) -> int:
        """How many numbers follow `before` in the keys."""
        numbers = re.compile(re.escape(before) + r"\.(\d+)\.")
        return len({match[1] for key in found if (match := numbers.match(key))})

    side = f"encoder.{family.down}"
    levels = count(side) or 5
    layers = count(f"{side}.0.{family.resnet}") or 2
    if levels > MOST_LEVELS or layers > MOST_LEVELS:
        raise ValueError(f"{levels} levels of {layers} layers: no VQ tokenizer has more than {MOST_LEVELS}")
    base = size(found, "encoder.conv_in.weight", 0, 128)
    released = {4: (1, 2, 2, 4), 5: (1, 1, 2, 2, 4)}.get(levels, (1,) * levels)
    widths = [size(found, f"{side}.{i}.{family.resnet}.0.conv1.weight", 0, base * released[i]) for i in range(levels)]
    attended = [count(f"{side}.{i}.attn") > 0 for i in range(levels)]
    latent = size(found, "encoder.conv_out.weight", 0, 256)
    return {
        "in_channels": size(found, "encoder.conv_in.weight", 1, 3),
        "out_channels": size(found, "decoder.conv_out.weight", 0, 3),
        "down_block_types": tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attended),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attended)),
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "latent_channels": latent,
        "sample_size": TRAINED_AT,
        "num_vq_embeddings": size(found, CODEBOOK, 0, 16384),
        "norm_num_groups": NORM_GROUPS,
        "vq_embed_dim": size(found, CODEBOOK, 1, 8 if family.unit_codebook else latent),
        "lookup_from_codebook": True,
    }


def build_tokenizer(found: Mapping[str, torch.Tensor], family: Family, where: str) -> tuple[VQModel, list[str]]:
    """A `VQModel` with the weights of an original, strictly, and notes on what was left out and found.

    Args:
        found: The original's state dict.
        family: Which original.
        where: The argument and the file, for errors.

    Returns:
        The model, in float32 and evaluation mode, and a list of sentences.

    Raises:
        ValueError: Keys, shapes or numbers that are not this original's.
    """
    left_out = [key for key in found if key.startswith(family.left_out)]
    found = {key: tensor for key, tensor in found.items() if key not in set(left_out)}
    try:
        config = model_config(found, family)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    levels = len(config["block_out_channels"])
    if any(width % NORM_GROUPS or width == 0 for width in config["block_out_channels"]):
        raise ValueError(f"{where}: levels of {config['block_out_channels']} channels: not multiples of {NORM_GROUPS}")

    def originals(key: str, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        flat = re.search(r"attentions\.\d+\.to_\w+(\.0)?\.weight$", key)  # 1x1 convolutions there, linear layers here
        return {original_key(key, family, levels): (*shape, 1, 1) if flat else tuple(shape)}

    def convert(key: str, tensors: list[torch.Tensor]) -> torch.Tensor:
        (tensor,) = tensors
        if key == CODEBOOK:
            return normalize(tensor, dim=-1) if family.unit_codebook else tensor
        return tensor[:, :, 0, 0].contiguous() if re.search(r"attentions\.\d+\.to_\w+(\.0)?\.weight$", key) else tensor

    model = fill(lambda: VQModel(**config), found, originals, convert, f"a {family.name}", where)
    notes = [
        f"{family.name}, one code for {2 ** (levels - 1)} x {2 ** (levels - 1)} pixels, "
        f"{config['num_vq_embeddings']} codes of {config['vq_embed_dim']} numbers, "
        f"{sum(p.numel() for p in model.parameters())} parameters"
    ]
    if left_out:
        notes.append(
            f"left out {len(left_out)} tensors that are no part of the tokenizer ({', '.join(family.left_out)})"
        )
    if family.unit_codebook:
        notes.append(codebook_note(weight(CODEBOOK, found[CODEBOOK], where)))
    return model, notes


def codebook_note(rows: torch.Tensor) -> str:
    """What normalising a codebook changed: rows (K, D) as in the file. Warns if that was more than rounding."""
    off = (torch.linalg.vector_norm(rows.double(), dim=-1) - 1).abs()  # (K,)
    note = (
        "the codebook's rows are stored with unit length, as the original compares and decodes them; in the file "
        f"their lengths were off 1 by {off.mean():.3g} on average, {off.max():.3g} at most"
    )
    if off.max() > OFF_UNIT:
        warnings.warn(note, stacklevel=2)
    return note


def weights_in(file: CheckpointFile, family: Family, where: str) -> tuple[Mapping[str, torch.Tensor], str]:
    """The state dict in a file and the name of the entry it lies under ('' for the file itself).

    Raises:
        ValueError: There is none; the error names what is there, and the converter for it where one fits.
    """
    if is_state_dict(file.content):
        return file.content, ""
    content = file.content if isinstance(file.content, Mapping) else {}
    for entry in family.entries:
        if is_state_dict(content.get(entry)):
            return content[entry], entry
    ema = content.get("ema")
    if isinstance(ema, Mapping) and "shadow_params" in ema:
        guess: str | None = "an official XDLM network: use convert-xdlm"
    else:
        guess = looks_like(key for value in content.values() if isinstance(value, Mapping) for key in map(str, value))
    names = ", ".join(map(repr, list(content)[:8])) or f"a {type(file.content).__name__}"
    raise ValueError(
        f"{where}: has no state dict; it holds {names}. {f'It looks like {guess}' if guess else family.remedy}"
    )


def convert_tokenizer(recipe: ConversionRecipe, family: Family) -> Conversion:
    """Convert one file to a tokenizer folder; see the two verbs below."""
    refuse_taken(recipe)
    file = read_checkpoint(recipe.checkpoint)
    where = f"checkpoint={recipe.checkpoint!r}"
    found, entry = weights_in(file, family, where)
    model, notes = build_tokenizer(found, family, where)
    if entry == "ema":
        notes.insert(1, "the file's averaged weights ('ema')")
    if file.inert:
        notes.append(f"{len(file.inert)} kinds of Python objects in the file were not brought to life")
    config = model.config

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        grid = list(grid_of(model, TRAINED_AT))
        info = {"image_size": TRAINED_AT, "channels": config.in_channels, "grid": grid}
        info |= {"num_codes": config.num_vq_embeddings, "tokenizer_hash": weights_hash(model)}
        write_json(folder / INFO_FILE, info)

    source = f"{family.name}, {file.format}"
    return Conversion(write_folder(recipe, provenance(file, source, recipe, notes), save), notes)


def convert_llamagen(recipe: ConversionRecipe) -> Conversion:
    """Convert a LlamaGen VQ-16 or VQ-8 (or another of its sizes) to a tokenizer folder, exactly.

    Raises:
        ValueError: The file is no such tokenizer, damaged, or more than tensors and known settings.
        OSError: The file is not there, or the output folder is taken or cannot be written.
    """
    return convert_tokenizer(recipe, LLAMAGEN)


def convert_taming(recipe: ConversionRecipe) -> Conversion:
    """Convert a taming VQGAN (f16 with 1,024 or 16,384 codes, or another of its sizes) to a tokenizer folder, exactly.

    Raises:
        ValueError: The file is no such tokenizer, damaged, or more than tensors and known settings.
        OSError: The file is not there, or the output folder is taken or cannot be written.
    """
    return convert_tokenizer(recipe, TAMING)
