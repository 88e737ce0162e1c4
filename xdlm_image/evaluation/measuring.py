"""From batches of images to what an extractor saw of them, and the cache of that on disk.

This file owns the stream over batches and ranks, and folders of statistics keyed by what the images are and which
extractor looked at them. It never draws samples and never compares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xdlm_image.data.image_batches import Batch
from xdlm_image.evaluation.code_pairs import PairFrequencies
from xdlm_image.evaluation.feature_metrics import inception_score
from xdlm_image.features.extractor import FeatureExtractor
from xdlm_image.features.feature_set import FeatureCollector, FeatureSet
from xdlm_image.features.fid import new_statistics, update_statistics
from xdlm_image.features.statistics import StreamedStatistics
from xdlm_image.files import sha256_of_file, write_json
from xdlm_image.ranks import barrier, of_first_rank, rank_and_world, sum_over_ranks

FEATURES = "features.safetensors"


@dataclass
class Measured:
    """What an extractor saw of a set of images.

    Attributes:
        statistics: Layer -> mean and covariance.
        class_accuracy: Share of images that the extractor's judge puts in their class; None without one.
        pairs: How the images' codes go together; None where they were not made of codes.
        kept: The main layer's features themselves, on every rank; None where they were not asked for.
        score: Inception Score (`mean`, `std`); None where it was not asked for or there is no Inception.
        hashes: Layer (and `pairs`) -> SHA-256 of the statistics' file; empty where they are on no disk.
        place: Folder of those files; None where they are on no disk.
    """

    statistics: dict[str, StreamedStatistics]
    class_accuracy: float | None
    pairs: PairFrequencies | None
    hashes: dict[str, str]
    place: Path | None = None
    kept: FeatureSet | None = None
    score: dict[str, float] | None = None


def measure(
    extractor: FeatureExtractor,
    batches: Iterable[Batch],
    num_codes: int | None = None,
    progress: tqdm | None = None,
    keep: int | None = None,
) -> Measured:
    """Stream batches into statistics of each FID layer; merged over ranks at the end.

    Args:
        extractor: From `load_extractor`.
        batches: This rank's share.
        num_codes: Codebook size where the batches hold codes, whose pairs are then counted; None without.
        progress: Bar that counts this rank's images.
        keep: Images of the whole set, where the features of the main layer are wanted too; None leaves them out.
    """
    statistics = new_statistics(extractor)
    collector = None if keep is None else FeatureCollector(keep)
    scores = None if keep is None or extractor.score_layer is None else FeatureCollector(keep)
    pairs = None if num_codes is None else PairFrequencies(num_codes)
    right = 0
    for batch in batches:
        features = extractor(batch.images)
        update_statistics(statistics, features)
        if collector is not None:
            collector.update(batch.start, features[extractor.fid_layers[0]], batch.labels)
        if scores is not None:
            scores.update(batch.start, features[str(extractor.score_layer)], batch.labels)
        classes = extractor.classes(batch.images, features)
        if classes is not None:
            right += int((classes == batch.labels.cpu()).sum())
        if pairs is not None and batch.codes is not None:
            pairs.update(batch.codes)
        if progress is not None:
            progress.update(len(batch.images))
    for layer_statistics in statistics.values():
        layer_statistics.all_reduce(extractor.device)
    if pairs is not None:
        pairs.all_reduce(extractor.device)
    count = next(iter(statistics.values())).count
    accuracy = sum_over_ranks(right, extractor.device) / count if extractor.judges_classes else None
    kept = None if collector is None else collector.gather(extractor.device)
    logits = None if scores is None else scores.gather(extractor.device)
    score = None if logits is None else inception_score(logits.features)
    return Measured(statistics, accuracy, pairs, {}, kept=kept, score=score)


def short_hash(content: Any) -> str:
    """12 hexadecimal digits that differ when the JSON content does."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def cached_measure(
    folder: Path,
    label: str,
    key: dict[str, Any],
    extractor: FeatureExtractor,
    make_batches: Callable[[], Iterable[Batch]],
    total: int,
    num_codes: int | None = None,
    features: Path | None = None,
    touched: str = "",
) -> Measured:
    """`measure`, or what an earlier run with the same key left in `folder`.

    Args:
        folder: Folder of the cache.
        label: What the set is called in file names and in the progress bar.
        key: JSON that names the images and everything that changes their statistics.
        extractor: Its weights' hash becomes part of the key.
        make_batches: This rank's share of the images.
        total: Images over all ranks.
        num_codes: As for `measure`.
        features: Folder for the features themselves, where they are wanted too: `folder`, or one that is dropped
            before it.
        touched: `ImageSet.touched` of the images. It is no part of the key, since what was measured stays true of
            copies of the files; but what is here is only taken where it is the same.
    """
    key = {**key, "extractor": extractor.weights_hash, "layers": list(extractor.fid_layers)}
    if extractor.judge is not None:
        key["classifier"] = extractor.judge.weights_hash
    place = folder / f"{label}-{short_hash(key)}"
    file = None if features is None else features / place.name / FEATURES
    touched = of_first_rank(touched)
    found = _load_again(place, key, num_codes, file, touched)
    if found is not None:
        return found
    rank, world = rank_and_world()
    with tqdm(total=(total - rank + world - 1) // world, desc=label, unit="image", disable=rank != 0) as progress:
        measured = measure(extractor, make_batches(), num_codes, progress, None if file is None else total)
    if rank == 0:
        if file is not None and measured.kept is not None:
            measured.kept.save(file)
        for layer, statistics in measured.statistics.items():
            statistics.save(place / f"{layer}.safetensors", {"layer": layer, "extractor": extractor.weights_hash})
        if measured.pairs is not None:
            measured.pairs.save(place / "pairs.safetensors", {"num_codes": str(num_codes)})
        hashes = _hashes(place, extractor.fid_layers, num_codes)
        about: dict[str, Any] = {"key": key, "class_accuracy": measured.class_accuracy, "statistics_sha256": hashes}
        about["touched"] = touched
        if file is not None:
            about |= {"features_sha256": sha256_of_file(file), "inception_score": measured.score}
        write_json(place / "about.json", about)  # last: it makes the folder whole
    barrier()
    return load_measured(place, key, num_codes, file)


def _hashes(place: Path, layers: Sequence[str], num_codes: int | None) -> dict[str, str]:
    names = [*layers] if num_codes is None else [*layers, "pairs"]
    return {name: sha256_of_file(place / f"{name}.safetensors") for name in names}


def _load_again(
    place: Path, key: dict[str, Any], num_codes: int | None, features: Path | None, touched: str
) -> Measured | None:
    if not (place / "about.json").is_file():
        return None
    try:
        found = load_measured(place, key, num_codes, features)
        if json.loads((place / "about.json").read_text(encoding="utf-8")).get("touched", "") != touched:
            raise ValueError(f"{place}: the images' files were written since these statistics were computed")
        return found
    except ValueError as error:
        print(f"{error}; computing them again")
        return None


def load_measured(place: Path, key: dict[str, Any], num_codes: int | None, features: Path | None = None) -> Measured:
    """What `cached_measure` left in a folder.

    Args:
        place: The folder.
        key: What the images must be; its `extractor` and `layers` say what looked at them.
        num_codes: As for `measure`.
        features: The file of features, where they are wanted too.

    Raises:
        ValueError: Files are missing, damaged, or of other images, another extractor or another codebook.
    """
    try:
        about = json.loads((place / "about.json").read_text(encoding="utf-8"))
        hashes = _hashes(place, key["layers"], num_codes)
        if about["key"] != key or about["statistics_sha256"] != hashes:
            raise ValueError("its files do not belong together")
        statistics = {layer: StreamedStatistics.load(place / f"{layer}.safetensors") for layer in key["layers"]}
        pairs = None if num_codes is None else PairFrequencies.load(place / "pairs.safetensors", num_codes)
        kept = score = None
        if features is not None:
            if sha256_of_file(features) != about["features_sha256"]:
                raise ValueError(f"{features.name} does not belong to it")
            kept, score = FeatureSet.load(features), about["inception_score"]
        return Measured(statistics, about["class_accuracy"], pairs, hashes, place, kept, score)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place}: these statistics cannot be used ({error})") from error
