"""The verb `convert-xdlm`: networks of the official XDLM code (arXiv 2602.01362) as pipelines of this package.

This file owns the map of keys and the parts of the pipeline. The network is `models.transformer_xdlm` with
`SIZES["xdlm-official"]`; its process is definition B: K codes, the mask with id K, and two more ids that are no codes,
all of which take part in uniform noise.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel

from xdlm_image.conversion.checkpoint_file import check_tensors, read_checkpoint
from xdlm_image.conversion.folder import Conversion, provenance, refuse_taken, write_folder
from xdlm_image.conversion.official_file import (
    CLASSES,
    FREQUENCIES,
    OFFICIAL,
    TOKENIZER,
    Weights,
    training_of,
    weights_in,
)
from xdlm_image.conversion.state_dicts import fill, size
from xdlm_image.conversion.vq_tokenizers import LLAMAGEN, TAMING, build_tokenizer
from xdlm_image.data.labels import imagenet_labels
from xdlm_image.files import sha256_of_file
from xdlm_image.models.transformer_xdlm import SIZES, XDLMTransformer2DModel
from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.recipes.conversion import ConvertXDLMRecipe
from xdlm_image.schedulers import XDLMScheduler
from xdlm_image.tokenizer.codes import load_tokenizer
from xdlm_image.weights import weights_hash

IMAGENET_CLASSES = 1000
SPECIAL_IDS = 3  # the official tokenizer adds mask (which is also its begin of sequence), end of sequence, and one more
HEAD_DIM = 64  # of the official sizes small and medium
PLACES = {  # official -> ours
    "vocab_embed.embedding": "token_embed.weight",
    "sigma_map.mlp.0": "conditioning.time_embed.linear_1",
    "sigma_map.mlp.2": "conditioning.time_embed.linear_2",
    "y_embedder.embedding_table": "conditioning.class_embed",
    "output_layer.norm_final": "norm_out",
    "output_layer.linear": "proj_out",
    "output_layer.adaLN_modulation": "adaln_out",
}
BLOCK_PLACES = {
    "norm1": "norm1",
    "attn_out": "attn.to_out.0",
    "norm2": "norm2",
    "mlp.0": "ff.net.0.proj",
    "mlp.2": "ff.net.2",
    "adaLN_modulation": "adaln",
}


def agreed(argument: str, given: Any, told: Any, where: str) -> Any:
    """The value that an argument and a file's settings agree on; None if neither says one."""
    if given is not None and told is not None and given != told:
        raise ValueError(f"{argument}={given!r}: the settings in {where} say {told!r}; leave {argument} out")
    return given if given is not None else told


def build_network(
    weights: Weights, heads: int | None, sample_size: int, where: str
) -> tuple[XDLMTransformer2DModel, list[str]]:
    """The official network with a file's weights, strictly, and notes.

    Raises:
        ValueError: Keys or shapes that are not the official network's, or heads that do not divide its width.
    """
    found, notes = weights.network, []
    check_tensors(found if weights.frequencies is None else {**found, FREQUENCIES: weights.frequencies}, where)
    width = size(found, "vocab_embed.embedding", 1, 768)
    if weights.frequencies is not None:
        heads = agreed("num_attention_heads", heads, width // max(1, 2 * weights.frequencies.numel()), where)
    if heads is None:
        heads = max(1, width // HEAD_DIM)
        notes.append(f"the file does not say the number of heads; taken as {heads} of {HEAD_DIM} channels")
    if heads < 1 or width % (2 * heads) or width == 0:
        raise ValueError(f"num_attention_heads={heads!r}: must divide the network's width {width} into even parts")
    check_frequencies(weights.frequencies, width // heads, where)
    blocks = len({key.split(".")[1] for key in found if key.startswith("blocks.")}) or 12
    classes = size(found, CLASSES, 0, 0) - 1
    if blocks > 1000 or (CLASSES in found and classes < 1):
        raise ValueError(f"{where}: {blocks} blocks and {classes} classes: is not {OFFICIAL}")
    vocabulary = size(found, "vocab_embed.embedding", 0, 16384 + SPECIAL_IDS)
    config = SIZES["xdlm-official"] | {
        "sample_size": sample_size,
        "num_embeds": vocabulary,
        "out_channels": vocabulary,
        "num_classes": classes if CLASSES in found else None,
        "num_layers": blocks,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "conditioning_dim": size(found, "sigma_map.mlp.0.weight", 0, 128),
    }
    places = {ours: official for official, ours in PLACES.items()}
    block_places = {ours: official for official, ours in BLOCK_PLACES.items()}

    def originals(key: str, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        if key in places:
            return {places[key]: tuple(shape)}
        module, _, kind = key.rpartition(".")
        if module in places:
            return {f"{places[module]}.{kind}": tuple(shape)}
        _, block, part = module.split(".", 2)
        if part in ("attn.to_q", "attn.to_k", "attn.to_v"):
            return {f"blocks.{block}.attn_qkv.weight": (3 * shape[0], shape[1])}
        return {f"blocks.{block}.{block_places[part]}.{kind}": tuple(shape)}

    def convert(key: str, tensors: list[torch.Tensor]) -> torch.Tensor:
        third = next((i for i, name in enumerate("qkv") if key.endswith(f"attn.to_{name}.weight")), None)
        return tensors[0] if third is None else tensors[0].chunk(3)[third].clone()

    model = fill(lambda: XDLMTransformer2DModel(**config), found, originals, convert, OFFICIAL, where)
    return model, [f"{OFFICIAL} of {sum(p.numel() for p in model.parameters())} parameters", *notes]


def check_frequencies(frequencies: torch.Tensor | None, head_dim: int, where: str) -> None:
    """Raise ValueError unless the file's rotary frequencies are those that this network computes itself."""
    if frequencies is None:
        return
    expected = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    same = frequencies.shape == expected.shape and torch.allclose(frequencies.double(), expected, rtol=1e-2, atol=0)
    if not same:  # 1e-2: a file in bfloat16 rounds them
        raise ValueError(f"{where}: {FREQUENCIES} are not the frequencies of rotary positions over {head_dim} channels")


def check_tokenizer(weights: Weights, vqvae: VQModel, recipe: ConvertXDLMRecipe, where: str) -> str | None:
    """Raise ValueError if the checkpoint carries another tokenizer than the one given; a note if it is the same."""
    if not weights.tokenizer:
        return None
    family = LLAMAGEN if any(".conv_blocks." in key for key in weights.tokenizer) else TAMING
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the codebook's lengths, which are the tokenizer's own matter
        carried, _ = build_tokenizer(weights.tokenizer, family, f"{where}, {TOKENIZER}*")
    if weights_hash(carried) != weights_hash(vqvae):
        raise ValueError(
            f"tokenizer={recipe.tokenizer!r}: is not the tokenizer that {where} was trained with and carries along; "
            "convert the file that the training used"
        )
    return "the checkpoint carries the very tokenizer that was given"


def convert_xdlm(recipe: ConvertXDLMRecipe) -> Conversion:
    """Convert an official XDLM, MDLM or UDLM network and its tokenizer to a pipeline folder.

    Raises:
        ValueError: The file is no such network, damaged, or more than tensors and known settings; or its settings or
            its tokenizer are not those given.
        OSError: A file is not there, or the output folder is taken or cannot be written.
    """
    refuse_taken(recipe)
    vqvae = load_tokenizer(recipe.tokenizer)
    file = read_checkpoint(recipe.checkpoint)
    where = f"checkpoint={recipe.checkpoint!r}"
    training = training_of(file, where)
    k = agreed("k", recipe.k, training.k, where)
    if k is None:
        raise ValueError(f"k=None: {where} does not say it; pass --k, 0 for MDLM, 1 for UDLM, XDLM's value between")
    if training.length is not None and training.length != recipe.sample_size**2:
        raise ValueError(
            f"sample_size={recipe.sample_size}: the settings in {where} say {training.length} codes an image"
        )

    weights = weights_in(file, recipe.ema, where)
    heads = agreed("num_attention_heads", recipe.num_attention_heads, training.heads, where)
    transformer, notes = build_network(weights, heads, recipe.sample_size, where)
    codes, ids = vqvae.config.num_vq_embeddings, transformer.config.num_embeds
    if ids not in (codes + SPECIAL_IDS, codes + 1):
        raise ValueError(
            f"tokenizer={recipe.tokenizer!r}: has {codes} codes, the network {ids} ids; it should have {codes} codes + "
            f"{SPECIAL_IDS} special ids (or + 1, the mask alone)"
        )
    same = check_tokenizer(weights, vqvae, recipe, where)
    num_classes = transformer.config.num_classes
    labels = imagenet_labels()._asdict() if num_classes == IMAGENET_CLASSES else {}
    pipeline = XDLMPipeline(
        transformer=transformer,
        scheduler=XDLMScheduler(k=float(k), num_codes=codes, definition="B", vocab_size=ids, mask_id=codes),
        vqvae=vqvae,
        supports_guidance=num_classes is not None,
        **labels,
    )
    notes = [
        f"{weights.layout}; k = {float(k):g}, definition B: {codes} codes, mask {codes}, {ids} ids",
        *notes,
        *([same] if same else []),
        *([f"left out {weights.left_out} tensors of tokenizer and metrics"] if weights.left_out else []),
        *([f"{len(file.inert)} kinds of Python objects in the file were not brought to life"] if file.inert else []),
        f"tokenizer of {_origin(recipe.tokenizer)}",
    ]
    content = provenance(file, f"official XDLM code, {weights.layout}", recipe, notes)
    return Conversion(write_folder(recipe, content, pipeline.save_pretrained), notes)


def _origin(tokenizer: str) -> str:
    """A tokenizer folder in words: its name and the hash of its weights."""
    weights = sorted(Path(tokenizer).glob("diffusion_pytorch_model*.safetensors"))
    return f"folder {Path(tokenizer).name!r} (sha256 {', '.join(map(sha256_of_file, weights))})"
