"""What `model_index.json` may name, looked at before anything it names is imported.

diffusers looks up `[library, class]` of every part among the modules that are imported, `subprocess` and `Popen`
included, and refuses late and obscurely what has no way of loading. This file owns the refusal beforehand. It imports
only the standard library, and travels with its siblings.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

CLASSES = {"transformer": "XDLMTransformer2DModel", "scheduler": "XDLMScheduler", "vqvae": "VQModel"}


def check_index(folder: str | Path, given: Collection[str], package: str, travels: Any) -> None:
    """Refuse an index that names other parts than the pipeline's own.

    Args:
        folder: Of the pipeline.
        given: Arguments of the call; a part among them is the caller's, and what the index says of it is not used.
        package: Name of the installed package whose classes the parts are; `VQModel` is diffusers'.
        travels: Regular expression of the names that code beside the weights has; the package's classes stand for it.

    Raises:
        ValueError: Names the file, the part, what stands there and what should.
    """
    file = Path(folder) / "model_index.json"
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return  # diffusers says what is missing
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): save or download the pipeline anew") from error
    if not isinstance(index, dict):
        raise ValueError(f"{file} holds a {type(index).__name__}: save or download the pipeline anew")
    for part, name in CLASSES.items():
        if part in given:
            continue
        value = index.get(part)
        library, found = value if isinstance(value, list) and len(value) == 2 else (None, None)
        if part == "vqvae":
            known = library == "diffusers"
        else:
            known = isinstance(library, str) and (
                library.split(".")[0] == package or travels.fullmatch(library) is not None
            )
        if found != name or not known:
            home = "diffusers" if part == "vqvae" else package
            raise ValueError(
                f"{file}: {part} is {str(value)[:80]}, must be {name} of {home}; "
                f"nothing was imported. Pass your own as from_pretrained(..., {part}=...) if that is meant"
            )
