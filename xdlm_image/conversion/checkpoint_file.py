"""Reading checkpoint files that nobody vouches for: tensors come out, code never runs.

This file owns what may be in a file and the words in which others are refused; it knows no architecture.

safetensors files hold no code. Files of `torch.save` are pickles, read by torch's restricted reader
(`weights_only=True`) and no other. Genuine Lightning files hold Python objects beside their tensors (settings, classes
of callbacks, a whole tokenizer), which that reader refuses. Names of `SETTINGS` are therefore resolved to `Inert`, a
class of ours that keeps an object's saved state and does nothing: no module is imported for them, and none of their
functions is called, whatever the file says. Any other name is refused before the pickle is read.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from xdlm_image.files import sha256_of_file

# What Lightning files of the projects converted here hold beside tensors, by the names in the pickle.
SETTINGS = re.compile(
    r"(omegaconf|lightning|pytorch_lightning|lightning_fabric|torch\.nn\.modules|vision_datasets)\..+"
    r"|argparse\.Namespace|typing\.Any|collections\.defaultdict|builtins\.(dict|list|tuple|str|int|float|bool)"
)


class Inert:
    """Stands where a Python object was in the file: keeps the state that was saved with it, and does nothing."""

    state: Any = None

    def __new__(cls, *args: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        """Whatever the object was made of is dropped."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _plain_dict(*args: Any) -> dict[Any, Any]:
    """Stands for `collections.defaultdict`: torch's reader fills dictionaries only."""
    return {}


@dataclass(frozen=True)
class CheckpointFile:
    """A file that was read.

    Attributes:
        path: Where it lies.
        sha256: Of its bytes.
        format: `safetensors` or `torch`.
        content: Tensors and plain values in dicts and lists; `Inert` where other objects were.
        inert: Names of the Python objects that were not brought to life.
    """

    path: Path
    sha256: str
    format: str
    content: Any
    inert: list[str] = field(default_factory=list)


def read_checkpoint(path: str | Path) -> CheckpointFile:
    """Read a safetensors file or a file of `torch.save` (1.6 or newer) without running anything in it.

    Tensors are mapped from the file, not copied.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint, damaged, or holds Python objects that are neither tensors nor known settings.
    """
    path = Path(path)
    where = f"checkpoint={str(path)!r}"
    if not path.is_file():
        raise FileNotFoundError(
            f"{where}: " + ("is a folder; name the file in it" if path.is_dir() else "no such file")
        )
    kind = _kind_of_file(path, where)
    if kind == "safetensors":
        try:
            content: Any = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{where}: is a damaged or truncated safetensors file ({error}); fetch it again"
            ) from error
        return CheckpointFile(path, sha256_of_file(path), kind, content)
    _check_archive(path, where)
    inert = _foreign_names(path, where)
    stand_ins = [(_plain_dict if name == "collections.defaultdict" else Inert, name) for name in inert]
    try:
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a forged pickle can make the reader fail in any way
        raise ValueError(f"{where}: cannot be read ({_first_line(error)}); it is damaged, fetch it again") from error
    return CheckpointFile(path, sha256_of_file(path), kind, content, inert)


def _kind_of_file(path: Path, where: str) -> str:
    """`safetensors` or `torch`, by the first bytes and never by the name; ValueError says what else it is."""
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return "torch"
    if head[8:9] == b"{":
        return "safetensors"
    text = head.lstrip().lower()
    if not head:
        raise ValueError(f"{where}: is empty; fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{where}: is a git-lfs pointer, not the weights; run 'git lfs pull' where it came from")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(f"{where}: is a web page, not weights; the download link led to a page, fetch the file itself")
    if head[:1] == b"\x80":
        raise ValueError(
            f"{where}: is a bare pickle, or older than PyTorch 1.6's file format, and is not read. {_remedy(path)}"
        )
    raise ValueError(
        f"{where}: is neither a safetensors file nor one of torch.save (first bytes {head[:8]!r}); fetch it again"
    )


def _check_archive(path: Path, where: str) -> None:
    """A file of torch.save is a zip archive of uncompressed entries with one data.pkl."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{where}: is truncated or damaged ({error}); fetch it again") from error
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(f"{where}: is a TorchScript archive, which holds code, and is not read; use the plain weights")
    if sum(name.endswith("/data.pkl") for name in names) != 1:
        raise ValueError(f"{where}: is a zip archive, but none of torch.save; unpack it and name the weights in it")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"{where}: has compressed entries, which torch.save never writes; it is not read")


def _foreign_names(path: Path, where: str) -> list[str]:
    """Names in the pickle that torch's reader does not know; ValueError if one of them is not among `SETTINGS`."""
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception as error:  # it takes the pickle apart without running it; forged ones fail in any way
        raise ValueError(
            f"{where}: holds a pickle that cannot be taken apart safely ({_first_line(error)}). {_remedy(path)}"
        ) from error
    refused = [name for name in names if not SETTINGS.fullmatch(name)]
    if refused:
        more = f" and {len(refused) - 8} more" if len(refused) > 8 else ""
        raise ValueError(
            f"{where}: is a pickle of more than tensors: it names {', '.join(refused[:8])}{more}, which could run "
            f"code when loaded, and is refused. {_remedy(path)}"
        )
    return names


def _remedy(path: Path) -> str:
    return (
        'If you trust who made it, save its tensors alone where it was made: python -c "import torch; c = '
        f"torch.load('{path.name}', map_location='cpu', weights_only=False); torch.save({{n: c[n] for n in "
        "('state_dict', 'model', 'ema') if n in c}, 'tensors.pt')\""
    )


def _first_line(error: Exception) -> str:
    """What went wrong, without torch's advice to load the file unsafely."""
    text = str(error)
    if "Weights only load failed" in text:
        text = text.split("WeightsUnpickler error:")[-1].split("\n\nCheck the documentation")[0].strip()
        text = text.split("\n\n")[-1]
    return f"{type(error).__name__}: {text.strip().splitlines()[0] if text.strip() else 'no message'}"[:300]


# --------------------------------------------------------------------------------------------------
# What was read
# --------------------------------------------------------------------------------------------------


def is_state_dict(value: Any) -> bool:
    """Whether a value is a non-empty dict of names and tensors."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items())
    )


def check_tensor(name: str, tensor: torch.Tensor, where: str) -> None:
    """Raise ValueError unless a tensor's numbers are all in the file and can be weights."""
    if tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.is_meta:
        raise ValueError(f"{where}: {name} is {tensor.dtype}, {tensor.layout}: no plain floating-point weights")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{where}: {name} claims {tuple(tensor.shape)} numbers, which the file does not hold")


def check_tensors(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """`check_tensor` of each; also ValueError where they claim more numbers together than the file holds."""
    for name, tensor in tensors.items():
        check_tensor(name, tensor, where)
    storages = {(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()) for tensor in tensors.values()}
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    held = end = 0
    for start, length in sorted(storages):  # what lies within others counts once
        held += max(0, start + length - max(start, end))
        end = max(end, start + length)
    if claimed > held:
        raise ValueError(
            f"{where}: its tensors claim {claimed:,} bytes out of the same {held:,}; no network converted here shares "
            "weights, the file is forged"
        )


def weight(name: str, tensor: torch.Tensor, where: str) -> torch.Tensor:
    """A copy in float32, on its own memory. Raises ValueError if a number is NaN or infinite."""
    copy = tensor.detach().to(torch.float32, copy=True).contiguous()
    if not bool(torch.isfinite(copy).all()):
        raise ValueError(f"{where}: {name} holds NaN or infinities; the file is damaged, or its training diverged")
    return copy


def setting(value: Any, *path: str) -> bool | int | float | str | None:
    """One value out of nested settings, through what is left of omegaconf's containers and of namespaces.

    Args:
        value: Dicts, lists and `Inert` objects.
        path: Names, outermost first.

    Returns:
        The value; None where a name is missing or stands for no plain value.
    """
    for name in (*path, None):
        if isinstance(value, Inert):  # a node of omegaconf keeps what it holds under one of two names
            state = value.state if isinstance(value.state, Mapping) else {}
            value = next((state[key] for key in ("_content", "_val") if key in state), state)
        if name is not None:
            value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, bool | int | float | str) else None
