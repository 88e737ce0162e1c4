"""What a pipeline's folder holds: whether it may be loaded, whether its files are whole, whether it may be replaced.

diffusers looks up `[library, class]` of every part among the modules that are imported, `subprocess` and `Popen`
included, and refuses late and obscurely what has no way of loading. This file owns the refusals beforehand, and never
writes. It imports only the standard library, safetensors and its sibling, and travels beside the weights.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .travelling_code import VERSIONED

CARD = "README.md"
PICTURE = "samples.png"
WEIGHTS = "diffusion_pytorch_model"  # diffusers' name of a part's weights
CODE = rf"{VERSIONED.pattern}\.py"
FILES = re.compile(rf"model_index\.json|{re.escape(CARD)}|{re.escape(PICTURE)}|{CODE}")  # of a self-contained folder
PART_FILES = re.compile(rf"\w*config\.json|{WEIGHTS}.*\.safetensors(\.index.*\.json)?|{CODE}")
CLASSES = {
    "transformer": ("XDLMTransformer2DModel",),
    "scheduler": ("XDLMScheduler", "XDLMOrderedScheduler", "XDLMPsiScheduler"),
    "vqvae": ("VQModel",),
}


def check_index(folder: str | Path, given: Collection[str], package: str) -> None:
    """Refuse an index that names other parts than the pipeline's own.

    Args:
        folder: Of the pipeline.
        given: Arguments of the call; a part among them is the caller's, and what the index says of it is not used.
        package: Name of the installed package whose classes the parts are, code beside the weights or not; `VQModel`
            is diffusers'.

    Raises:
        ValueError: Names the file, the part, what stands there and what should.
    """
    file = Path(folder) / "model_index.json"
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return  # diffusers says what is missing
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): save or download the pipeline again") from error
    if not isinstance(index, dict):
        raise ValueError(f"{file} holds a {type(index).__name__}: save or download the pipeline again")
    for part, names in CLASSES.items():
        if part in given:
            continue
        value = index.get(part)
        if part == "vqvae" and value == [None, None]:  # saved without
            continue
        library, found = value if isinstance(value, list) and len(value) == 2 else (None, None)
        if part == "vqvae":
            known = library == "diffusers"
        else:
            known = isinstance(library, str) and (
                library.split(".")[0] == package or VERSIONED.fullmatch(library) is not None
            )
        if found not in names or not known:
            home = "diffusers" if part == "vqvae" else package
            raise ValueError(
                f"{file}: {part} is {str(value)[:80]}, must be {' or '.join(names)} of {home}; "
                f"nothing was imported. Pass your own as from_pretrained(..., {part}=...) if that is meant"
            )


def part_classes(folder: str | Path) -> dict[str, list[str]]:
    """What a self-contained folder says of its parts, part -> [module, class]; empty where it is no such folder."""
    try:
        index = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
        if isinstance(index["_class_name"], str) or not (Path(folder) / f"{index['_class_name'][0]}.py").is_file():
            return {}
        return {part: value for part, value in index.items() if isinstance(value, list) and part != "_class_name"}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def check_all_loaded(name: str, module: Any, variant: str | None = None) -> None:
    """Raise if a tensor of the module is in none of the safetensors files that it was loaded from.

    Of pickles, which only diffusers opens, it has left a tensor that they lack without values, on the device "meta";
    and of a module that it has quantised. Offloaded weights are there too.

    Args:
        name: Of the part.
        module: As diffusers has loaded it.
        variant: That was asked for; a part without weights of it was loaded from its plain ones.
    """
    folder = Path(getattr(module.config, "_name_or_path", None) or "")
    files = _weight_files(folder, variant)
    saved: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as weights:
            saved |= set(weights.keys())
    by_name = bool(files) and getattr(module, "hf_quantizer", None) is None  # a quantised module has other tensors
    offloaded = hasattr(module, "_hf_hook")
    missing = sorted(
        tensor
        for tensor, values in module.state_dict().items()
        if (by_name and tensor not in saved) or (values.is_meta and not offloaded)
    )
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} tensors are not in {folder}, such as {missing[:3]}; save or download it again"
        )


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files that diffusers loads of a part's folder: those that an index names go before a whole."""
    for kind in [f".{variant}", ""] if variant else [""]:
        index, whole = folder / f"{WEIGHTS}.safetensors.index{kind}.json", folder / f"{WEIGHTS}{kind}.safetensors"
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / shard for shard in sorted(set(shards))]
        if whole.is_file():
            return [whole]
    return []


def refuse_other_content(folder: Path, overwrite: bool) -> None:
    """Raise FileExistsError if `folder` holds anything but an earlier self-contained folder, unless `overwrite`."""
    if overwrite or not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    strange = _not_exported(folder)
    if strange:
        raise FileExistsError(
            f"{str(folder)!r} holds something that no export wrote ({', '.join(strange[:3])}); name another folder, "
            "or say overwrite to replace it"
        )


def _not_exported(folder: Path) -> list[str]:
    """What in a folder, and in its parts' folders, is no file of a self-contained folder; paths from there."""
    parts, strange = part_classes(folder), []
    if not parts:
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [folder.name]
    for path in folder.iterdir():
        if path.name in parts and path.is_dir():
            other = [file.name for file in path.iterdir() if not (file.is_file() and PART_FILES.fullmatch(file.name))]
            strange += [f"{path.name}/{name}" for name in other]
        elif not (path.is_file() and FILES.fullmatch(path.name)):
            strange.append(path.name)
    return sorted(strange)


def own_file(folder: Path, name: str) -> bool:
    """Whether a file is there and lies in the folder, or where the hub's cache keeps what its folders link to.

    A folder from elsewhere may hold links to anything of this machine, which no export may carry on.
    """
    path, folder = (folder / name).resolve(), folder.resolve()
    homes = {folder, *(above / "blobs" for above in folder.parents[1:2])}  # snapshots/<commit>/name -> blobs/<hash>
    return path.is_file() and path.parent in homes
