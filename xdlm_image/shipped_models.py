"""Where the models lie that come with a checkout. A folder of such models holds

pipelines/NAME/      saved pipelines that differ in k
extractor/           the judge
reference/           what the judge saw of the real images (`xdlm-image reference`): no data set is needed
evaluation/fid.json  the whole protocol, run once, to compare with
"""

from __future__ import annotations

import json
from pathlib import Path


def models_folder(models: str | None) -> Path:
    """The folder of shipped models.

    Args:
        models: The folder, if the user named one.

    Raises:
        FileNotFoundError: It is not there, as where the package was installed without a checkout.
    """
    folder = Path(models) if models else Path(__file__).parents[1] / "shipped" / "fashion_mnist"
    if not (folder / "reference" / "reference.json").is_file():
        raise FileNotFoundError(
            f"models={str(folder)!r}: no models there (pipelines/NAME/, extractor/, reference/). An installed package "
            "carries no weights: clone the repository, or name with --models a folder that holds trained ones"
        )
    return folder


def shipped_pipelines(folder: Path) -> dict[str, Path]:
    """Name -> folder of every pipeline, by rising k."""
    found = {}
    for index in folder.glob("pipelines/*/model_index.json"):
        scheduler = json.loads((index.parent / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        found[index.parent.name] = (float(scheduler["k"]), index.parent)
    if not found:
        raise FileNotFoundError(f"models={str(folder)!r}: no pipeline in its folder pipelines/; clone it again")
    return {name: place for name, (_, place) in sorted(found.items(), key=lambda item: item[1][0])}
