"""What drawn images are compared with: real images, the same images through each tokenizer, and the floors.

This file owns the reference folder, which stands for the images wherever they are not at hand:

    reference.json      what the images are, which extractor looked at them, the floors
    statistics/         mean and covariance of their features, and the features of the main layer; of their
                        reconstructions mean and covariance and the pairs of codes
    .floors/            what only computing the floors again would need, and their numbers

It never draws samples.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import VQModel

from xdlm_image.data.image_batches import real_batches
from xdlm_image.data.image_check import check_images
from xdlm_image.data.images import UINT8_RULE, ImageSet, open_images
from xdlm_image.devices import best_device
from xdlm_image.evaluation.cells import read_cell
from xdlm_image.evaluation.comparing import distances, fids
from xdlm_image.evaluation.measuring import FEATURES, Measured, cached_measure, load_measured, short_hash
from xdlm_image.features.extractor import FeatureExtractor, load_extractor
from xdlm_image.files import refuse_unwritable, write_json
from xdlm_image.ranks import barrier, of_first_rank, rank_and_world
from xdlm_image.recipes import DataOptions, ReferenceRecipe
from xdlm_image.recipes.evaluation import FEATURE_METRICS
from xdlm_image.tokenizer.codes import grid_of, load_tokenizer, reconstructed_batches
from xdlm_image.weights import weights_hash

SCHEMA_VERSION = 2
FLOORS = ".floors"  # hidden: what is removed in the end is nobody else's
RESIZE_RULE = "shorter side to image_size, bicubic with antialiasing, then centre crop; none where it fits"
DISTANCES_VERSION = 1  # raise it when a number of the floors changes its meaning
FLOOR_SEED = 0  # which training images stand in the floors


@dataclass
class Reference:
    """A reference set, measured.

    Attributes:
        about: The content of `reference.json`.
        images: The real images.
        reconstructions: Tokenizer hash -> the same images through this tokenizer.
    """

    about: dict[str, Any]
    images: Measured
    reconstructions: dict[str, Measured]

    def forget_class_accuracy(self) -> None:
        """Leave out what another classifier said of the images."""
        for measured in (self.about, *self.about["reconstructions"].values(), *self.about["train"]["floors"].values()):
            measured["class_accuracy"] = None

    def floors(self, pipelines: Mapping[str, str], num_samples: int, image_sets: Collection[int]) -> dict[str, Any]:
        """The floors of a sweep, as `fid.json` holds them.

        Args:
            pipelines: Name -> tokenizer hash.
            num_samples: Images a cell; floors of training images are of as many, or missing (None).
            image_sets: Numbers of images of the sets that are already drawn; where no floor is of as many, those of
                `num_samples` stand alone.
        """
        train = self.about["train"]
        known = {count: train["floors"].get(str(count)) for count in sorted({num_samples, *image_sets})}
        of_train = {count: {**train["images"], **floor} for count, floor in known.items() if floor is not None}
        entries = []
        for tokenizer, floor in self.about["reconstructions"].items():
            users = [name for name, used in pipelines.items() if used == tokenizer]
            if users:
                of_tokenizer = floor["train"].get(str(num_samples))
                entries.append({"tokenizer_hash": tokenizer, "pipelines": users, **floor, "train": of_tokenizer})
        return {
            "reference_class_accuracy": self.about["class_accuracy"],
            "train_against_reference": of_train.get(num_samples),
            "reconstruction": entries,
            "image_sets": [*of_train.values()] if image_sets else [],
        }


def describe_images(images: ImageSet) -> dict[str, Any]:
    """What decides the statistics of an image set."""
    return {
        "fingerprint": images.fingerprint,
        "split": images.split,
        "num_images": len(images),
        "image_size": images.image_size,
        "channels": images.channels,
        "crop": images.crop,
        "uint8_rule": UINT8_RULE,
    }


def open_reference_images(data: DataOptions, split: str) -> tuple[ImageSet, ImageSet]:
    """The images of a reference split, and those of the floor: training images, or test images where train is the
    reference (a subset of the reference would score too well).

    Raises:
        ValueError, FileNotFoundError: A random crop, or images that cannot be opened.
    """
    if data.crop != "center":
        raise ValueError(
            f"data.crop={data.crop!r}: the reference images must be the same at every reading; set data.crop: center"
        )
    return open_images(data, split), open_images(data, "test" if split == "train" else "train")


def make_reference(
    folder: str | Path,
    name: str,
    images: ImageSet,
    floor_images: ImageSet,
    extractor: FeatureExtractor,
    tokenizers: Mapping[str, VQModel],
    num_samples: Sequence[int],
    batch_size: int,
    feature_metrics: Collection[str] = FEATURE_METRICS,
) -> Reference:
    """Measure a reference set and write its folder; what an earlier run left there is taken.

    Args:
        folder: The reference folder.
        name: What the data set is called.
        images: The reference images.
        floor_images: Other real images, for the floors.
        extractor: From `load_extractor`.
        tokenizers: Tokenizer hash -> tokenizer, whose reconstructions are measured.
        num_samples: Sizes of the sets that floors of real images are computed for; where there are fewer images
            than that, all of them stand in.
        batch_size: Images at once.
        feature_metrics: As for `distances`: what the floors hold beside FID.
    """
    folder = Path(folder)
    compare = _Comparing(folder / FLOORS, extractor.device, feature_metrics)
    key = describe_images(images)
    floor_key = {**describe_images(floor_images), "subset_seed": FLOOR_SEED}
    subsets = {count: subset(floor_images, count) for count in num_samples}
    measured = cached_measure(
        folder / "statistics",
        f"reference-{images.split}",
        key,
        extractor,
        lambda: real_batches(images, batch_size),
        len(images),
        features=folder / "statistics",
        touched=images.touched,
    )
    floors = {}
    for count, indices in subsets.items():
        floor = cached_measure(
            folder / FLOORS,
            floor_images.split,
            {**floor_key, "subset": len(indices)},
            extractor,
            lambda: real_batches(floor_images, batch_size, indices),  # noqa: B023  (called at once)
            len(indices),
            features=folder / FLOORS,
            touched=floor_images.touched,
        )
        floors[str(count)] = {
            "num_images": len(indices),
            **compare.distances(floor, measured),
            "class_accuracy": floor.class_accuracy,
        }
    about: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "images": {"name": name, **key, "resize": RESIZE_RULE, "class_names": list(images.class_names)},
        "extractor": extractor.describe(),
        "class_accuracy": measured.class_accuracy,
        "statistics": _place(folder, measured),
        "train": {
            "images": {
                "split": floor_images.split,
                "fingerprint": floor_images.fingerprint,
                "subset_seed": FLOOR_SEED,
            },
            "floors": floors,
        },
        "reconstructions": {},
    }
    reconstructions = {}
    for tokenizer, vqvae in tokenizers.items():
        rebuilt = _reconstructed(
            folder / "statistics", images, None, key, extractor, tokenizer, vqvae, batch_size, folder / FLOORS
        )
        train = {}
        for count, indices in subsets.items():
            key_of_subset = {**floor_key, "subset": len(indices)}
            floor = _reconstructed(
                folder / FLOORS, floor_images, indices, key_of_subset, extractor, tokenizer, vqvae, batch_size
            )
            train[str(count)] = {"num_images": len(indices), **compare.reconstructions(floor, rebuilt)}
        about["reconstructions"][tokenizer] = {
            "num_codes": int(vqvae.config.num_vq_embeddings),
            "num_images": len(images),
            **compare.distances(rebuilt, measured),
            "class_accuracy": rebuilt.class_accuracy,
            "statistics": _place(folder, rebuilt),
            "train": train,
        }
        reconstructions[tokenizer] = rebuilt
    if rank_and_world()[0] == 0:
        write_json(folder / "reference.json", about)  # last: it makes the folder whole
    barrier()
    return Reference(about, measured, reconstructions)


def open_reference(folder: str | Path, extractor: FeatureExtractor) -> Reference:
    """Read a reference folder.

    Raises:
        FileNotFoundError: No such folder, or no `reference.json` in it.
        ValueError: Another extractor, another version, images resized by another rule, or damaged files.
    """
    path = Path(folder) / "reference.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"reference={str(folder)!r}: no reference folder (no reference.json); make one with `xdlm-image reference`"
        )
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        version, used, layers = about["schema_version"], about["extractor"], about["extractor"]["fid_layers"]
        if version != SCHEMA_VERSION:
            raise ValueError(f"its schema_version is {version}, this package reads {SCHEMA_VERSION}")
        if used["weights_sha256"] != extractor.weights_hash or layers != list(extractor.fid_layers):
            raise ValueError(
                f"its features are of {used['name']} {used['weights_sha256'][:12]}, the extractor is {extractor.name} "
                f"{extractor.weights_hash[:12]}: numbers of two extractors do not compare"
            )
        key = {name: about["images"][name] for name in (*_KEY, "uint8_rule")}
        if key["uint8_rule"] != UINT8_RULE:
            raise ValueError(f"its uint8 rule is {key['uint8_rule']!r}, this package's is {UINT8_RULE!r}")
        if about["images"]["resize"] != RESIZE_RULE:
            raise ValueError(f"its images were resized by {about['images']['resize']!r}, not by {RESIZE_RULE!r}")
        _refuse_gaps(about)
        key |= {"extractor": used["weights_sha256"], "layers": layers}
        place = Path(folder) / about["statistics"]["folder"]
        images = load_measured(place, key, None, place / FEATURES)
        reconstructions = {
            tokenizer: load_measured(
                Path(folder) / floor["statistics"]["folder"], {**key, "tokenizer": tokenizer}, floor["num_codes"]
            )
            for tokenizer, floor in about["reconstructions"].items()
        }
        told = [about["statistics"], *(floor["statistics"] for floor in about["reconstructions"].values())]
        for measured, statistics in zip([images, *reconstructions.values()], told):
            if measured.hashes != statistics["sha256"]:
                raise ValueError(f"{statistics['folder']} holds other statistics than reference.json tells of")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"reference.json holds no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"reference={str(folder)!r}: cannot be used ({reason}); make it again") from error
    return Reference(about, images, reconstructions)


def reference(recipe: ReferenceRecipe) -> Path:
    """The verb `reference`: measure, write the folder, and drop what only computing the floors again would need.

    Returns:
        The path of `reference.json`.

    Raises:
        FileNotFoundError, ValueError: The images, the extractor or a tokenizer do not exist or do not fit; before
            anything is measured.
    """
    images, floor_images = open_reference_images(recipe.data, recipe.reference_split)
    extractor = load_extractor(recipe.extractor, best_device(recipe.device))
    extractor.check_images(recipe.data.channels, recipe.data.image_size)
    if not extractor.knows(images.class_names):
        print("the extractor was trained on other classes than the data's: no class accuracy is measured")
        extractor = replace(extractor, logits_layer=None)
    loaded = [load_tokenizer(folder, extractor.device) for folder in recipe.tokenizers]
    for folder, vqvae in zip(recipe.tokenizers, loaded):
        grid_of(vqvae, recipe.data.image_size)
        if vqvae.config.in_channels != recipe.data.channels:
            raise ValueError(
                f"tokenizers: {folder} takes {vqvae.config.in_channels} channels, data.channels is "
                f"{recipe.data.channels}; use one that fits"
            )
    output = Path(recipe.output_dir)
    refuse_unwritable(output, "output_dir")
    check_images(images)
    check_images(floor_images, places=subset(floor_images, max(recipe.num_samples, default=0)))
    make_reference(
        output,
        str(recipe.data.name),
        images,
        floor_images,
        extractor,
        {weights_hash(vqvae): vqvae for vqvae in loaded},
        recipe.num_samples,
        recipe.batch_size,
    )
    shutil.rmtree(output / FLOORS, ignore_errors=True)
    return output / "reference.json"


_KEY = ("fingerprint", "split", "num_images", "image_size", "channels", "crop")


def _refuse_gaps(about: dict[str, Any]) -> None:
    """KeyError or TypeError where something is missing that only the end of a sweep would ask for."""
    list(about["images"]["class_names"])
    floors = [*about["train"]["floors"].values(), *about["reconstructions"].values()]
    for measured in (about, *floors):
        measured["class_accuracy"]
    for floor in floors:
        floor["fid"], floor["num_images"]
    dict(about["train"]["images"])
    for floor in about["reconstructions"].values():
        dict(floor["train"])


def subset(images: ImageSet, count: int) -> list[int]:
    """Which of the images stand in a floor of `count`: all where there are no more."""
    return sorted(np.random.default_rng(FLOOR_SEED).permutation(len(images))[:count].tolist())


@dataclass(frozen=True)
class _Comparing:
    """Numbers of two measured sets, each computed once: the next start finds it in `folder`.

    Attributes:
        folder: Of the numbers, a file each.
        device: Device of distances between all pairs of images.
        feature_metrics: As for `distances`.
    """

    folder: Path
    device: torch.device
    feature_metrics: Collection[str]

    def distances(self, samples: Measured, reference: Measured) -> dict[str, Any]:
        wanted = sorted(self.feature_metrics)
        return self._once(
            {"feature_metrics": wanted},
            samples,
            reference,
            "fid",
            lambda: distances(samples, reference, self.device, wanted),
        )

    def reconstructions(self, samples: Measured, reference: Measured) -> dict[str, Any]:
        assert samples.pairs is not None and reference.pairs is not None
        pairs, theirs = samples.pairs, reference.pairs

        def compute() -> dict[str, Any]:
            return {
                "fid_against_reconstructions": fids(samples, reference),
                "code_pair_total_variation": pairs.total_variation(theirs),
            }

        return self._once({}, samples, reference, "fid_against_reconstructions", compute)

    def _once(
        self,
        key: dict[str, Any],
        samples: Measured,
        reference: Measured,
        number: str,
        compute: Callable[[], dict[str, Any]],
    ) -> dict[str, Any]:
        """`compute()` of the first rank, which every rank calls; or what is in the file of these statistics."""
        key = {"version": DISTANCES_VERSION, "number": number, **key}
        for name, measured in (("samples", samples), ("reference", reference)):
            key[name] = {"statistics": measured.hashes, "features": measured.kept is not None}
        path = self.folder / f"distances-{short_hash(key)}.json"
        main = rank_and_world()[0] == 0
        found = of_first_rank(read_cell(path, key, number) if main else None)
        if found is None:
            found = of_first_rank(compute())
            if main:
                write_json(path, {"key": key, "result": found})
        return dict(found)


def _place(folder: Path, measured: Measured) -> dict[str, Any]:
    assert measured.place is not None
    return {"folder": measured.place.relative_to(folder).as_posix(), "sha256": measured.hashes}


def _reconstructed(
    folder: Path,
    images: ImageSet,
    indices: Sequence[int] | None,
    key: dict[str, Any],
    extractor: FeatureExtractor,
    tokenizer: str,
    vqvae: VQModel,
    batch_size: int,
    features: Path | None = None,
) -> Measured:
    return cached_measure(
        folder,
        f"reconstructions-{images.split}",
        {**key, "tokenizer": tokenizer},
        extractor,
        lambda: reconstructed_batches(vqvae, real_batches(images, batch_size, indices)),
        len(images) if indices is None else len(indices),
        int(vqvae.config.num_vq_embeddings),
        features,
        images.touched,
    )
