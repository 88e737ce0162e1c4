"""What a sweep is going to do: its parts opened, checked against each other, and written down as the protocol.

This file owns the checks before expensive work, the content of `fid.json`'s protocol, and what that and NELBO's say of
machine and versions; it never draws or measures.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import warnings
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xdlm_image.data.image_check import check_images
from xdlm_image.data.images import UINT8_RULE, ImageSet
from xdlm_image.data.labels import Labels, same_classes
from xdlm_image.drawing.foreign_pipelines import ForeignPipeline
from xdlm_image.drawing.given_images import GivenImages, images_in_npz
from xdlm_image.drawing.opening import (
    class_names,
    folder_names,
    image_shape,
    open_any_pipeline,
    pipeline_hash,
    refuse_missing,
)
from xdlm_image.drawing.sampler_settings import SamplerSettings, check_settings
from xdlm_image.evaluation import caveats
from xdlm_image.evaluation.cells import refuse_name
from xdlm_image.evaluation.further_references import open_further
from xdlm_image.evaluation.reference_files import KNOWN, is_reference_file, open_reference_file
from xdlm_image.evaluation.references import Reference, open_reference, open_reference_images, subset
from xdlm_image.features.class_judge import load_class_judge
from xdlm_image.features.extractor import FeatureExtractor, load_extractor
from xdlm_image.processes import own_device
from xdlm_image.ranks import rank_and_world
from xdlm_image.recipes import DataOptions, EvaluateRecipe
from xdlm_image.seeds import SEED_RULE
from xdlm_image.weights import weights_hash

NUM_SAMPLES = 5000  # images a cell where nothing is asked for, and up to whole classes


@dataclass
class Plan:
    """A sweep whose parts are known to fit.

    Attributes:
        recipe: What was asked for.
        num_samples: Images a cell.
        device: Where it runs.
        extractor: The judge.
        images: Images of the reference split, and those of the floor; None where a reference folder stands for them.
        reference: The content of the reference folder or file, if one was named.
        further: Name -> content of each further one.
        shown: The images that a reference file holds (ADM's), for precision and recall; None without.
        class_names: Of the reference.
        pipelines: Name -> folder, hashes and settings, as the protocol records them.
        given: Name -> images that are already drawn.
        keeps_features: Whether numbers are asked for that need the features of all images.
        warnings: What a reader of the numbers must know.
    """

    recipe: EvaluateRecipe
    num_samples: int
    device: torch.device
    extractor: FeatureExtractor
    images: tuple[ImageSet, ImageSet] | None
    reference: Reference | None
    further: dict[str, Reference]
    shown: GivenImages | None
    class_names: list[str]
    pipelines: dict[str, dict[str, Any]]
    given: dict[str, GivenImages]
    keeps_features: bool
    warnings: list[str]


def check(recipe: EvaluateRecipe) -> Plan:
    """Open everything the sweep needs and see that it fits; nothing is drawn or measured.

    Raises:
        FileNotFoundError, ValueError: Names the argument, its value and the remedy.
    """
    for argument, names_given in (("pipelines", recipe.pipelines), ("images", recipe.images)):
        for name in names_given:
            refuse_name(argument, name)
    for name, folder in recipe.pipelines.items():  # before the judge's weights are fetched
        refuse_missing(folder, f"pipelines.{name}")
    device = own_device(recipe.device)
    extractor = load_extractor(recipe.extractor, device)
    target = _open_target(recipe, extractor, device)
    images, reference, names, shape = target.images, target.reference, target.class_names, target.shape
    num_samples = _num_samples(recipe, len(names))
    extractor.check_images(*shape)
    further = open_further(recipe.further_references, extractor, shape)
    said = caveats.of_judge(extractor, names, recipe.classifier, reference)
    if not extractor.knows(names):
        extractor = replace(extractor, logits_layer=None)
    if recipe.classifier is not None:
        extractor = replace(extractor, judge=load_class_judge(recipe.classifier, names, shape, device))
        if reference is not None:
            reference.forget_class_accuracy()
    pipelines = {
        name: _check_pipeline(recipe, name, folder, device, shape, names) for name, folder in recipe.pipelines.items()
    }
    said += caveats.of_pipelines(pipelines, recipe.batch_size)
    if recipe.nelbo is not None:
        _add_nelbo(recipe.nelbo, pipelines)
    given = {name: GivenImages(path, *shape, names) for name, path in recipe.images.items()}
    drawn = num_samples if pipelines else None
    keeps_features = bool(recipe.feature_metrics) or extractor.score_layer is not None
    said += caveats.of_numbers(drawn, given, target.num_images, extractor, keeps_features)
    if reference is not None:
        numbers = {len(images_given) for images_given in given.values()} | ({drawn} if drawn else set())
        said += caveats.of_reference(reference, pipelines, numbers)
    if rank_and_world()[0] == 0:
        first, *others = recipe.settings["temperature"]
        if len(others) == 1 and isinstance(first, float) and isinstance(others[0], float) and others[0] < first:
            print(
                f"note: temperature={[first, *others]} is two constant temperatures; one that falls from {first:g} to "
                f"{others[0]:g} is [[{first:g}, {others[0]:g}]]"
            )
        for caveat in said:
            warnings.warn(caveat, stacklevel=3)
    if images is not None:
        check_images(images[0])
        check_images(images[1], places=subset(images[1], num_samples))
    opened = (images, reference, further, target.shown, names, pipelines, given)
    return Plan(recipe, num_samples, device, extractor, *opened, keeps_features, said)


def _num_samples(recipe: EvaluateRecipe, num_classes: int) -> int:
    """Images a cell, as many of each class. Raises ValueError where the number that was asked for does not allow it."""
    is_balanced = bool(recipe.pipelines) and num_classes > 0
    if recipe.num_samples is None:
        return -(-NUM_SAMPLES // num_classes) * num_classes if is_balanced else NUM_SAMPLES
    if is_balanced and recipe.num_samples % num_classes != 0:
        nearest = max(1, round(recipe.num_samples / num_classes)) * num_classes
        raise ValueError(
            f"num_samples={recipe.num_samples}: must be a multiple of the {num_classes} classes, so that each has as "
            f"many images; {nearest} is near"
        )
    return recipe.num_samples


class _Target(NamedTuple):
    """What samples are held against, opened: one of `images` and `reference` is there, `shown` as in `Plan`."""

    images: tuple[ImageSet, ImageSet] | None
    reference: Reference | None
    shown: GivenImages | None
    class_names: list[str]
    shape: tuple[int, int]  # channels, side in pixels
    num_images: int | None  # None where a file does not say


def _open_target(recipe: EvaluateRecipe, extractor: FeatureExtractor, device: torch.device) -> _Target:
    if recipe.reference is None:
        images = open_reference_images(recipe.data, recipe.reference_split or "test")
        shape = (int(recipe.data.channels), recipe.data.image_size)
        return _Target(images, None, None, list(images[0].class_names), shape, len(images[0]))
    if recipe.data != DataOptions():
        usual, own = vars(DataOptions()), vars(recipe.data)
        given = ", ".join(f"data.{name}={value!r}" for name, value in own.items() if value != usual[name])
        raise ValueError(
            f"reference={recipe.reference!r} and {given}: a reference folder or file stands for the images; give one "
            "of the two"
        )
    if is_reference_file(recipe.reference):
        if recipe.reference_split is not None:
            raise ValueError(
                f"reference_split={recipe.reference_split!r}: reference={recipe.reference!r} is a file of statistics, "
                "which has no splits; leave it out"
            )
        return _open_target_file(recipe, recipe.reference, extractor, device)
    if not Path(recipe.reference).exists():
        raise FileNotFoundError(
            f"reference={recipe.reference!r}: no such folder or file; make one with `xdlm-image reference`, or name "
            f"published statistics: a .npz or .pt file, or {', '.join(KNOWN)}"
        )
    reference = open_reference(recipe.reference, extractor)
    about = reference.about["images"]
    if recipe.reference_split not in (None, about["split"]):
        raise ValueError(
            f"reference_split={recipe.reference_split!r}: the images of reference={recipe.reference!r} are of the "
            f"split {about['split']!r}; leave reference_split out, or name another folder"
        )
    shape = (about["channels"], about["image_size"])
    return _Target(None, reference, None, about["class_names"], shape, about["num_images"])


def _open_target_file(recipe: EvaluateRecipe, file: str, extractor: FeatureExtractor, device: torch.device) -> _Target:
    """A file of statistics: the size is its own if it has one, else that of the first pipeline or set of images.

    Classes are the first pipeline's; without one there are none.
    """
    reference, path = open_reference_file(file, extractor)
    names: list[str] = []
    images = images_in_npz(path)
    size = reference.about["images"]["image_size"] if images is None else images[1]
    channels = 3
    if recipe.pipelines:
        name, folder = next(iter(recipe.pipelines.items()))
        pipeline = open_any_pipeline(folder, device, f"pipelines.{name}")
        names = folder_names(pipeline)
        if size is None:
            channels, size = image_shape(pipeline)
    elif size is None:
        size = GivenImages(next(iter(recipe.images.values())), channels, None, names).image_size
    assert size is not None  # there are pipelines or images
    shape = (channels, size)
    shown = None if images is None else GivenImages(path, *shape, names)
    return _Target(None, reference, shown, names, shape, None)


def _check_pipeline(
    recipe: EvaluateRecipe, name: str, folder: str, device: torch.device, shape: tuple[int, int], names: list[str]
) -> dict[str, Any]:
    argument = f"pipelines.{name}={folder!r}"
    pipeline = open_any_pipeline(folder, device, f"pipelines.{name}")
    if image_shape(pipeline) != shape:
        remedy = "use another" if recipe.reference else "set data.channels and data.image_size to the pipeline's"
        raise ValueError(
            f"{argument}: it draws images of (channels, size) {image_shape(pipeline)}, the reference has {shape}; "
            f"{remedy}"
        )
    if isinstance(pipeline, ForeignPipeline):
        for variant in recipe.variants:
            pipeline.draw([0], [0], 0, SamplerSettings(1, *variant))  # refuses what it has not
        if pipeline.num_classes is not None and pipeline.num_classes < len(names):
            raise ValueError(
                f"{argument}: it has {pipeline.num_classes} classes, the reference {len(names)}; name one of as many"
            )
        return {"folder": folder, **pipeline.describe(), "draws_by_batches": pipeline.draws_by_batches}
    num_classes = pipeline.transformer.config.num_classes
    if num_classes is not None and num_classes != len(names):
        raise ValueError(f"{argument}: it has {num_classes} classes, the data have {len(names)}; use the same data")
    if num_classes is not None and not same_classes(Labels(pipeline.id2label, pipeline.id2synset), names):
        raise ValueError(
            f"{argument}: its classes are {class_names(pipeline)[:5]}..., the data's are {names[:5]}...; the ids would "
            "not mean the same"
        )
    for steps, variant in product(recipe.num_steps, recipe.variants):
        try:
            check_settings(pipeline, SamplerSettings(steps, *variant))
        except ValueError as error:
            raise ValueError(f"{argument}: {error}") from error
    return {
        "folder": folder,
        "weights_hash": pipeline_hash(pipeline),
        "tokenizer_hash": weights_hash(pipeline.vqvae),
        "scheduler": {k: v for k, v in dict(pipeline.scheduler.config).items() if not k.startswith("_")},
        "parameters": sum(p.numel() for p in pipeline.transformer.parameters()),
        "conditional": num_classes is not None,
        "grid": list(pipeline.transformer.grid),
    }


def _add_nelbo(file: str, pipelines: dict[str, dict[str, Any]]) -> None:
    """Put what the verb `nelbo` measured beside the pipelines of the same weights."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"nelbo={file!r}: no such file; `xdlm-image nelbo` writes it")
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        told = content["protocol"]["pipelines"]
        found = {told[cell["pipeline"]]["weights_hash"]: cell["bits_per_token"] for cell in content["results"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"nelbo={file!r}: no file of the verb nelbo ({error!r})") from error
    for name, about in pipelines.items():
        if about["weights_hash"] not in found:
            raise ValueError(f"nelbo={file!r}: holds no pipeline of the weights of {name}; measure it there too")
        about["nelbo_bits_per_token"] = found[about["weights_hash"]]


def metric_name(extractor: FeatureExtractor) -> str:
    """What the main numbers may be called."""
    if extractor.is_inception:
        return "Fréchet Inception Distance (torch-fidelity's InceptionV3, 2048 pooled features)"
    judge = extractor.name
    if extractor.config is not None:
        judge += f" (a small classifier of these classes, test accuracy {100 * extractor.config.test_accuracy:.1f} %)"
    return f"Fréchet distance of features of {judge}. This is not Inception FID and compares only with itself"


def protocol(plan: Plan, reference: Reference) -> dict[str, Any]:
    recipe = plan.recipe
    classes = len(plan.class_names)
    further = {name: _named(other) for name, other in plan.further.items()}
    of_classes = any(about["conditional"] for about in plan.pipelines.values())
    return {
        "reference": _named(reference),
        **({"further_references": further} if further else {}),
        "num_samples": plan.num_samples,
        "samples_per_class": plan.num_samples // classes if of_classes else None,
        "class_balance": f"image i has class i mod {classes}" if of_classes else None,
        "seeds": recipe.seeds,
        "seed_rule": SEED_RULE,
        "uint8_rule": UINT8_RULE,
        "extractor": plan.extractor.describe(),
        "sampler": {
            "num_steps": recipe.num_steps,
            **recipe.settings,
            "dtype": recipe.dtype,
            "compile": recipe.compile,
        },
        "feature_metrics": recipe.feature_metrics,
        "pipelines": plan.pipelines,
        "images": {name: given.describe() for name, given in plan.given.items()},
        "device": device_name(plan.device),
        "versions": versions(),
    }


def _named(reference: Reference) -> dict[str, Any]:
    return {**reference.about["images"], "statistics_sha256": reference.images.hashes}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    packages = ("xdlm-image", "torch", "torchvision", "diffusers", "torch-fidelity", "timm", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
