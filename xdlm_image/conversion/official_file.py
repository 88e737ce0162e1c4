"""What a checkpoint of the official XDLM code holds: where the network lies in it, and what it tells of the training.

This file owns the layouts of the official files and the official order of parameters. Lightning files have the last
weights under `state_dict` (with the prefix `backbone.`) and the averaged ones under `ema.shadow_params`, a list without
names; published files may have the latter alone. It builds no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from xdlm_image.conversion.checkpoint_file import CheckpointFile, is_state_dict, setting
from xdlm_image.conversion.state_dicts import check_keys, looks_like

OFFICIAL = "an official XDLM network"
NETWORK, TOKENIZER, METRICS = "backbone.", "image_tokenizer.vae.", "metrics."  # prefixes in Lightning files
FREQUENCIES = "rotary_emb.inv_freq"  # the one buffer of the network
CLASSES = "y_embedder.embedding_table.weight"
HEAD_NAMES = ("vocab_embed.embedding", *(f"sigma_map.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")))
BLOCK_NAMES = ("norm1.weight", "attn_qkv.weight", "attn_out.weight", "norm2.weight", "mlp.0.weight", "mlp.0.bias",
               "mlp.2.weight", "mlp.2.bias", "adaLN_modulation.weight", "adaLN_modulation.bias")  # fmt: skip
TAIL_NAMES = ("norm_final.weight", "linear.weight", "linear.bias", "adaLN_modulation.weight", "adaLN_modulation.bias")


class Weights(NamedTuple):
    """What a checkpoint holds of a network.

    Attributes:
        network: Parameters by their official names.
        frequencies: The buffer of rotary frequencies; None where the file has none.
        tokenizer: State dict of the tokenizer that Lightning saved along; empty where there is none.
        layout: In words.
        left_out: How many tensors are no part of the network.
    """

    network: dict[str, torch.Tensor]
    frequencies: torch.Tensor | None = None
    tokenizer: Mapping[str, torch.Tensor] = {}
    layout: str = "averaged weights (shadow_params)"
    left_out: int = 0


class Training(NamedTuple):
    """What the settings in a Lightning file tell; None where they do not.

    Attributes:
        k: Weight of uniform noise.
        heads: Heads of a block.
        length: Codes of an image.
    """

    k: Any
    heads: Any
    length: Any


def parameter_names(blocks: int, with_classes: bool) -> list[str]:
    """Names of the official network's parameters in the order of its `parameters()`, which `shadow_params` follows."""
    names = [*HEAD_NAMES, *([CLASSES] if with_classes else [])]
    names += [f"blocks.{i}.{name}" for i in range(blocks) for name in BLOCK_NAMES]
    return names + [f"output_layer.{name}" for name in TAIL_NAMES]


def weights_in(file: CheckpointFile, ema: bool, where: str) -> Weights:
    """The network in a file.

    Args:
        file: A Lightning file, one of averaged weights alone, or a plain state dict.
        ema: Whether the averaged weights are wanted.
        where: The argument and the file, for errors.

    Raises:
        ValueError: There is no network, or none of the wanted weights, or those under `ema` are another network's.
    """
    content = file.content if isinstance(file.content, Mapping) else {}
    plain = is_state_dict(file.content)
    state = file.content if plain else content.get("state_dict")
    last = _last_weights(state, plain) if isinstance(state, Mapping) and is_state_dict(state) else Weights({})
    averaged = content.get("ema")
    shadow = averaged.get("shadow_params") if isinstance(averaged, Mapping) else None
    if shadow is None and not any(name in last.network for name in (HEAD_NAMES[0], "output_layer.linear.weight")):
        keys = [key for value in (content, *content.values()) if isinstance(value, Mapping) for key in map(str, value)]
        guess = looks_like(key.removeprefix(NETWORK) for key in keys)
        names = ", ".join(map(repr, list(content)[:8])) or f"a {type(file.content).__name__}"
        raise ValueError(
            f"{where}: is not {OFFICIAL}; it holds {names}. "
            + (f"It looks like {guess}" if guess else "convert-xdlm takes checkpoints of the official XDLM code")
        )
    if not ema:
        if not last.network:
            raise ValueError(f"ema=False: {where} holds averaged weights only; leave ema true")
        return last
    if shadow is None:
        raise ValueError(f"ema=True: {where} holds no averaged weights; pass --ema false to take those it has")
    network = _named(shadow, where)
    if not last.network:
        return Weights(network)
    check_keys(network, {name: tensor.shape for name, tensor in last.network.items()}, OFFICIAL, where)
    return last._replace(network=network, layout="Lightning checkpoint, averaged weights")


def _last_weights(state: Mapping[str, torch.Tensor], plain: bool) -> Weights:
    if plain and not any(key.startswith(NETWORK) for key in state):
        state = {NETWORK + key: tensor for key, tensor in state.items()}
    tokenizer, metrics = _below(TOKENIZER, state), _below(METRICS, state)
    network = {
        key.removeprefix(NETWORK): tensor for key, tensor in state.items() if not key.startswith((TOKENIZER, METRICS))
    }
    return Weights(
        network,
        frequencies=network.pop(FREQUENCIES, None),
        tokenizer=tokenizer,
        layout="plain state dict" if plain else "Lightning checkpoint, last weights",
        left_out=len(tokenizer) + len(metrics),
    )


def _below(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _named(shadow: Any, where: str) -> dict[str, torch.Tensor]:
    """The bare list of averaged tensors by name; ValueError if its length is that of no official network."""
    if not isinstance(shadow, list | tuple) or not all(isinstance(tensor, torch.Tensor) for tensor in shadow):
        raise ValueError(f"{where}: ema.shadow_params is no list of tensors")
    per_block, rest = len(BLOCK_NAMES), len(HEAD_NAMES) + len(TAIL_NAMES)
    blocks, with_classes = divmod(len(shadow) - rest, per_block)
    if blocks < 1 or with_classes > 1:
        raise ValueError(
            f"{where}: ema.shadow_params holds {len(shadow)} tensors; an official network has {rest} + {per_block} a "
            "block, and one more for classes, so this is another network or a truncated list"
        )
    return dict(zip(parameter_names(blocks, with_classes == 1), shadow))


def training_of(file: CheckpointFile, where: str) -> Training:
    """The settings of a training, without bringing the file's configuration objects to life.

    Raises:
        ValueError: A training that definition B and the official network without time do not describe.
    """
    config = ("hyper_parameters", "config")

    def number(*path: str) -> Any:
        value = setting(file.content, *config, *path)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    algorithm = setting(file.content, *config, "algo", "name")
    if algorithm not in (None, "xdlm", "mdlm", "udlm"):
        raise ValueError(f"{where}: was trained with algo={algorithm!r}; only xdlm, mdlm and udlm are converted")
    if setting(file.content, *config, "algo", "time_conditioning"):
        raise ValueError(f"{where}: reads the time (time_conditioning: true), which is not converted")
    fixed = {"mdlm": 0.0, "udlm": 1.0}.get(str(algorithm))
    return Training(
        k=number("algo", "k1") if algorithm == "xdlm" else fixed,
        heads=number("model", "n_heads"),
        length=number("model", "length"),
    )
