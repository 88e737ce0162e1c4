"""Strict loading: every tensor of a file has one place, every place one tensor, or an error that says what differs.

This file owns the comparison of keys and shapes, its words, and filling a model. It knows formats by their keys only to
say which converter fits; the maps of keys belong to the converters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import nn

from xdlm_image.conversion.checkpoint_file import check_tensors, weight

SHOWN = 8  # keys of a kind that an error names

Model = TypeVar("Model", bound=nn.Module)

# Keys that tell a format, and what to do with it.
FORMATS = (
    (r"(encoder|decoder)\.conv_blocks\.", "a LlamaGen tokenizer: use convert-llamagen"),
    (r"quantize\.(embed|proj)\.", "a taming VQGAN with Gumbel quantisation, which no converter here takes"),
    (r"(encoder|decoder)\.(down|up)\.\d+\.block\.", "a taming VQGAN: use convert-taming"),
    (r"(backbone\.)?vocab_embed\.embedding", "an official XDLM network: use convert-xdlm"),
    (r"(backbone\.)?(downsampling|upsampling)_modules\.", "an official network on pixels (U-Net), not converted here"),
    (r"(encoder|decoder)\.(down|up)_blocks\.", "a diffusers VQModel already: load its folder with from_pretrained"),
    (r"transformer_blocks\.\d+\.adaln", "a transformer of this package already: load its folder with from_pretrained"),
)


def looks_like(keys: Iterable[str]) -> str | None:
    """What a file with these keys is, and the remedy; None if it is nothing known."""
    keys = list(keys)
    return next((what for pattern, what in FORMATS if any(re.match(pattern, key) for key in keys)), None)


def size(found: Mapping[str, torch.Tensor], key: str, axis: int, default: int) -> int:
    """Length of a tensor's axis; `default` where there is no such tensor or axis."""
    return int(found[key].shape[axis]) if key in found and found[key].ndim > axis else default


def check_keys(found: Mapping[str, torch.Tensor], expected: Mapping[str, Iterable[int]], what: str, where: str) -> None:
    """Raise ValueError unless a file holds just the expected tensors, each of its shape.

    Args:
        found: The file's tensors.
        expected: Name in the file -> shape.
        what: What the file should be, for the error.
        where: The argument and the file, for the error.
    """
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    shapes = [
        f"{key} {tuple(found[key].shape)}, not {tuple(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key].shape) != tuple(shape)
    ]
    parts = []
    for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            parts.append(f"{len(keys)} {kind}: {', '.join(keys[:SHOWN])}{more}")
    if not parts:
        return
    guess = looks_like(found) if missing else None
    known = f". It looks like {guess}" if guess and looks_like(expected) != guess else ""
    raise ValueError(f"{where}: is not {what}; keys {'; '.join(parts)}{known}")


def fill(
    build: Callable[[], Model],
    found: Mapping[str, torch.Tensor],
    originals: Callable[[str, torch.Size], dict[str, tuple[int, ...]]],
    convert: Callable[[str, list[torch.Tensor]], torch.Tensor],
    what: str,
    where: str,
) -> Model:
    """A model with the weights of a file, strictly: first all keys and shapes, then all values.

    Args:
        build: Makes the model; called on the meta device, so that nothing is allocated for a file that does not fit.
        found: The file's tensors by the original's names.
        originals: Our key and shape -> the tensors in the file that it is made of, with their shapes.
        convert: Our key and those tensors, float32 -> our tensor.
        what: What the file should be, for errors.
        where: The argument and the file, for errors.
    """
    with torch.device("meta"):
        model = build()
    sources = {key: originals(key, value.shape) for key, value in model.state_dict().items()}
    expected: dict[str, tuple[int, ...]] = {}
    for source in sources.values():
        expected |= source
    check_keys(found, expected, what, where)
    check_tensors(found, where)
    state = {
        key: convert(key, [weight(name, found[name], where) for name in source]) for key, source in sources.items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)
