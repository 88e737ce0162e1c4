"""The weights a run begins at when its recipe names a trained network: `init_from`.

Owns where the network is found, whether it fits, and what of it is taken. It never trains, and never guesses: what does
not fit is an error, what is left out is said.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from xdlm_image.data.labels import labels_of_folders
from xdlm_image.models import XDLMTransformer2DModel
from xdlm_image.recipes import TransformerOptions
from xdlm_image.tokenizer.codes import load_tokenizer
from xdlm_image.weights import weights_hash

CLASSES = "conditioning.class_embed.weight"  # (classes + 1, C), the null class last


def begin_at(
    transformer: XDLMTransformer2DModel,
    folder: str | Path,
    class_names: Sequence[str] | None = None,
    tokenizer: str | None = None,
) -> list[str]:
    """Give a new network the weights of a trained one.

    Where the classes are others (another number, other names, or none), the network begins as the unconditional one
    that it holds: every class at the row of the null class, at 0 where there were no classes, or, without classes, that
    row in the biases. All other weights are taken as they are.

    Args:
        transformer: The new network; changed in place.
        folder: A saved pipeline, the `transformer` folder of one, or a run folder that holds `pipeline/`.
        class_names: Class folders of the training images, in the order of ids; None without classes.
        tokenizer: Hash of the tokenizer that made the codes; a pipeline's own must have it.

    Returns:
        What was taken and what was not, a sentence each.

    Raises:
        FileNotFoundError: There is no network in the folder.
        ValueError: It cannot be loaded, is another architecture, or was trained on other codes.
    """
    argument = f"init_from={str(folder)!r}"
    network, pipeline = find_network(folder)
    start = _load(network, argument)
    if pipeline is not None and tokenizer is not None and weights_hash(load_tokenizer(pipeline / "vqvae")) != tokenizer:
        raise ValueError(
            f"{argument}: its tokenizer is not the one that made the codes, so its codes mean something else; encode "
            f"with {str(pipeline / 'vqvae')!r}, or name {str(network)!r} to take the weights all the same"
        )
    _refuse_other_architecture(transformer, start, argument)
    notes = [f"{argument}: begins at the weights of {network}"]
    weights = start.state_dict()
    ours, theirs = transformer.config.num_classes, start.config.num_classes
    names = _read(pipeline / "model_index.json").get("id2label") if pipeline is not None else None
    if ours != theirs or not _same_names(class_names, names):
        rows = weights.pop(CLASSES, None)
        kind = f"{ours or 'no'} classes here, {theirs or 'no'} there"
        if ours == theirs:
            kind = f"the classes have other names there (if they are the same, name {str(network)!r})"
        if rows is None:
            notes.append(f"{kind}: every class begins at 0, as the network without classes there")
            weights[CLASSES] = torch.zeros_like(transformer.state_dict()[CLASSES])
        elif ours is None:
            notes.append(f"{kind}: the class embedding is not taken, the null class there is part of the biases")
            _fold(rows[-1], weights)
        else:
            notes.append(f"{kind}: the class embedding is not taken, every class begins as the null class there")
            weights[CLASSES] = rows[-1:].repeat(ours + 1, 1)
    elif ours is not None and not names:
        notes.append(f"the names of its {theirs} classes are not known; they are taken to be those of the codes")
    missing, unexpected = transformer.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {CLASSES}:
        raise ValueError(
            f"{argument}: has no {missing} and has {unexpected}, which this network has not; save it again"
        )
    if pipeline is None:
        notes.append("a network without its tokenizer: that the codes are those it knows cannot be checked")
    return notes


def _fold(row: torch.Tensor, weights: dict[str, torch.Tensor]) -> None:
    """Put one row of a class embedding (C,) into biases, so that a network without classes computes the same.

    The conditioning is silu(time embedding + row), which the adaLN layers read: without a time embedding it is the same
    for every image, c = silu(row), and their biases take W c; with one, its last bias takes the row.
    """
    last = "conditioning.time_embed.linear_2.bias"
    if last in weights:
        weights[last] = weights[last] + row
        return
    c = F.silu(row.double())
    for name in [name for name in weights if name.endswith(("adaln.weight", "adaln_out.weight"))]:
        bias = name.removesuffix("weight") + "bias"
        weights[bias] = (weights[bias].double() + weights[name].double() @ c).to(weights[bias].dtype)


def find_network(folder: str | Path) -> tuple[Path, Path | None]:
    """The folder of the network's weights, and of its pipeline if it has one. Raises FileNotFoundError."""
    path = Path(folder)
    if (path / "pipeline" / "model_index.json").is_file():
        path = path / "pipeline"
    if (path / "model_index.json").is_file():
        return path / "transformer", path
    if (path / "config.json").is_file():
        return path, None
    newest = max(path.glob("pipelines/step-*"), default=None)
    hint = "that run has not ended; " if (path / "checkpoints").is_dir() else ""
    hint += f"its newest pipeline is {str(newest)!r}; " if newest is not None else ""
    raise FileNotFoundError(
        f"init_from={str(folder)!r}: {hint}no saved pipeline there (model_index.json), no network (config.json), no "
        "run's pipeline/; name a folder that holds one"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); save it again") from error


def _load(network: Path, argument: str) -> XDLMTransformer2DModel:
    name = _read(network / "config.json").get("_class_name")
    if name != XDLMTransformer2DModel.__name__:
        raise ValueError(f"{argument}: a {name}, no {XDLMTransformer2DModel.__name__}; name a pipeline of this package")
    try:
        start = XDLMTransformer2DModel.from_pretrained(str(network), local_files_only=True, use_safetensors=True)
    except Exception as error:  # json, safetensors, OSError, KeyError: whatever a damaged folder raises
        raise ValueError(f"{argument}: cannot be loaded ({type(error).__name__}: {error}); save it again") from error
    return start.float()


def _refuse_other_architecture(ours: XDLMTransformer2DModel, theirs: XDLMTransformer2DModel, argument: str) -> None:
    """Dropout alone may differ, and the grid where no place has a vector of its own."""
    options = [field.name for field in dataclasses.fields(TransformerOptions) if field.name != "dropout"]
    here, there = _sizes(ours, options), _sizes(theirs, options)
    wrong = [f"model.{name}={there[name]!r}" for name in options if here[name] != there[name]]
    if wrong:
        raise ValueError(f"{argument}: its network is another; set what it was trained with: {', '.join(wrong)}")
    for name, what in (("num_embeds", "ids that come in"), ("out_channels", "ids that are predicted")):
        if ours.config[name] != theirs.config[name]:
            raise ValueError(
                f"{argument}: {theirs.config[name]} {what}, but codes and process.definition make {ours.config[name]}; "
                "take codes of its tokenizer, and the definition it was trained with"
            )
    if ours.grid != theirs.grid and ours.config.position_embedding == "learned":
        raise ValueError(
            f"{argument}: it has learned the places of a grid of {theirs.grid}, the codes have {ours.grid}; take codes "
            "of that grid, or a network with position_embedding=none"
        )


def _sizes(transformer: XDLMTransformer2DModel, options: Sequence[str]) -> dict[str, Any]:
    config = {name: transformer.config[name] for name in options}
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if config["conditioning_dim"] is None:
        config["conditioning_dim"] = width
    return config


def _same_names(folders: Sequence[str] | None, names: Mapping[str, str] | None) -> bool:
    """Whether a pipeline's names are those of the class folders; where either has none, nothing speaks against it."""
    if folders is None or not names:
        return True
    return {int(key): name for key, name in names.items()} == labels_of_folders(folders).id2label
