"""What a reader of a sweep's numbers must know beside them: each sentence is printed, and stands in `fid.json`.

This file owns the sentences and when they are said; it opens nothing, and refuses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xdlm_image.drawing.given_images import GivenImages
from xdlm_image.evaluation.references import Reference
from xdlm_image.features.extractor import FeatureExtractor
from xdlm_image.features.feature_set import MOST_KEPT
from xdlm_image.features.inception import RELEASED

CELL = "a cell"  # a set that is drawn, among those that are given
NAMED = 5  # sets that one sentence names


def of_judge(
    extractor: FeatureExtractor, class_names: Sequence[str], classifier: str | None, reference: Reference | None
) -> list[str]:
    """What the judge of FID and that of classes are not."""
    said = []
    if extractor.unreleased:
        said.append(
            f"the extractor's weights are not the released ones of Inception (SHA-256 {RELEASED}...): its FID is no "
            "Inception FID and compares with no published number or statistics"
        )
    if extractor.config is not None and extractor.config.is_near_chance:
        said.append(
            f"the extractor classifies {100 * extractor.config.test_accuracy:.1f} % of its test images rightly, little "
            "more than chance: its distances mean little; train one for more epochs"
        )
    if not extractor.knows(class_names) and classifier is None:
        said.append("the extractor was trained on other classes than the data's: no class accuracy is given")
    if classifier is not None and reference is not None and reference.about["class_accuracy"] is not None:
        said.append("the reference folder's images were judged by another classifier: their accuracy is left out")
    return said


def of_pipelines(pipelines: Mapping[str, Mapping[str, Any]], batch_size: int) -> list[str]:
    """What is not known of diffusers' other pipelines."""
    said = []
    for name, about in pipelines.items():
        if "class" in about:
            said.append(
                f"{name} is a {about['class']}: that its class ids mean the reference's classes is taken on trust"
            )
        if about.get("draws_by_batches"):
            said.append(
                f"{name} draws by its scheduler ({about['scheduler']['class']}) without a generator an image: which "
                f"images they are depends on batch_size={batch_size} too"
            )
    return said


def of_numbers(
    drawn: int | None,
    given: Mapping[str, GivenImages],
    reference: int | None,
    extractor: FeatureExtractor,
    keeps_features: bool,
) -> list[str]:
    """Sets of too few images, of unlike numbers, or of more than are kept, and what the given ones tell of themselves.

    Args:
        drawn: Images of a cell; None where nothing is drawn.
        given: Name -> images that are already drawn.
        reference: Images of the reference; None where it does not say.
        extractor: The judge.
        keeps_features: Whether metrics of the features themselves are asked for.
    """
    numbers = ({} if drawn is None else {CELL: drawn}) | {name: len(images) for name, images in given.items()}
    said = []
    for number in dict.fromkeys(numbers.values()):
        alike = [name for name in numbers if numbers[name] == number]
        sets = "" if alike == [CELL] else f"{', '.join(alike[:NAMED])}{', ...' * (len(alike) > NAMED)}: "
        smallest = number if reference is None else min(number, reference)
        whose = f"{number} images" if smallest == number else f"the reference's {smallest} images"
        said += [
            f"{sets}{whose} are few for the {dim} features of {layer!r} (at least {2 * dim} are wanted): FID "
            "is biased upwards, compare only numbers of as many images"
            for layer, dim in extractor.feature_dims.items()
            if smallest < 2 * dim
        ]
    for name, images in given.items():
        said += [f"{name}: {note}" for note in images.notes]
        if drawn not in (None, len(images)):
            said.append(
                f"{name} has {len(images)} images, the pipelines' cells {drawn}: FID falls with the number of images, "
                "compare like with like"
            )
    if keeps_features:
        for name, number in (numbers | ({} if reference is None else {"the reference": reference})).items():
            if number > MOST_KEPT:
                said.append(
                    f"of the {number} images of {name} {MOST_KEPT} are taken for KID, precision, recall, coverage and "
                    "Inception Score, drawn at random, at every run the same; FID is of all"
                )
    return said


def of_reference(reference: Reference, pipelines: Mapping[str, Mapping[str, Any]], numbers: set[int]) -> list[str]:
    """What a reference folder does not hold for these pipelines and `numbers` of images."""
    said = [
        f"the reference holds no reconstructions by the tokenizer of {name}: no distance to reconstructions and none "
        "of pairs of codes is given"
        for name, about in pipelines.items()
        if about["tokenizer_hash"] not in (None, *reference.reconstructions)
    ]
    known = list(reference.about["train"]["floors"])
    missing = sorted(number for number in numbers if str(number) not in known)
    if known and missing:
        said.append(f"the reference has floors for {_listed(known)} images, none for {_listed(missing)}")
    elif missing:
        said.append("the reference has no floors")
    return said


def _listed(values: Sequence) -> str:
    return ", ".join(map(str, values))
