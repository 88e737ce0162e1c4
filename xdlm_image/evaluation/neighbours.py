"""The verb `neighbours`: the training images nearest to samples, to show whether these are copies.

This file owns the search and its picture. A sample that is a copy lies nearer to a training image than images that were
never trained on do; so the same search is made for held-out images of the samples' classes (trousers lie nearer to each
other than bags do), and both are told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from xdlm_image.data.image_batches import real_batches
from xdlm_image.data.image_check import check_images
from xdlm_image.data.images import ImageSet
from xdlm_image.data.labels import Labels, same_classes
from xdlm_image.devices import best_device
from xdlm_image.drawing.draw import draw_all
from xdlm_image.drawing.grids import class_ids, grid_labels, save_grid
from xdlm_image.drawing.opening import class_names, image_shape, open_pipeline, pipeline_hash
from xdlm_image.drawing.sampler_settings import SamplerSettings, check_settings
from xdlm_image.evaluation.references import describe_images, open_reference_images
from xdlm_image.features.extractor import FeatureExtractor, load_extractor
from xdlm_image.files import refuse_unwritable, write_json
from xdlm_image.recipes import NeighboursRecipe

PIXELS = "pixels"
NEAREST = 0.05  # share of the held-out images that are the measure of what is near


class Nearest(NamedTuple):
    """Nearest images of each query, nearest first: Euclidean distances (Q, k) and places in the set (Q, k)."""

    distances: torch.Tensor
    indices: torch.Tensor


def nearest_images(
    queries: dict[str, torch.Tensor], batches: Iterator[tuple[int, dict[str, torch.Tensor]]], count: int
) -> dict[str, Nearest]:
    """Search a stream of features, of which nothing but the best is kept.

    Args:
        queries: Space -> (Q, D).
        batches: (place of the first image, space -> (B, D)), over the whole set.
        count: Neighbours of each query; of a smaller set all.
    """
    best: dict[str, Nearest] = {}
    for start, features in batches:
        for space, wanted in queries.items():
            distances = torch.cdist(wanted, features[space], compute_mode="donot_use_mm_for_euclid_dist")  # (Q, B)
            indices = torch.arange(start, start + distances.shape[1]).expand_as(distances)
            if space in best:
                distances = torch.cat([best[space].distances, distances], 1)
                indices = torch.cat([best[space].indices, indices], 1)
            values, places = distances.topk(min(count, distances.shape[1]), largest=False)
            best[space] = Nearest(values, indices.gather(1, places))
    return best


def neighbours(recipe: NeighboursRecipe) -> Path:
    """Draw samples, find their nearest training images, and write the picture and a JSON of distances beside it.

    Returns:
        The picture's path.

    Raises:
        FileNotFoundError, ValueError: Pipeline, extractor or images do not exist or do not fit; before anything is
            drawn.
    """
    if Path(recipe.output).suffix.lower() != ".png":
        raise ValueError(f"output={recipe.output!r}: name a .png file")
    device = best_device(recipe.device)
    pipeline = open_pipeline(recipe.pipeline, device)
    ids = class_ids(pipeline, recipe.class_labels)
    settings = SamplerSettings.of(recipe)
    check_settings(pipeline, settings)
    labels = grid_labels(ids, recipe.images_per_class)
    held_out, trained = open_reference_images(recipe.data, "test")
    extractor = load_extractor(recipe.extractor, device)
    extractor.check_images(recipe.data.channels, recipe.data.image_size)
    if image_shape(pipeline) != (recipe.data.channels, recipe.data.image_size):
        raise ValueError(
            f"pipeline={recipe.pipeline!r}: it draws images of (channels, size) {image_shape(pipeline)}, the data have "
            f"{(recipe.data.channels, recipe.data.image_size)}; set data.channels and data.image_size to the pipeline's"
        )
    conditional = pipeline.transformer.config.num_classes is not None
    if conditional and not same_classes(Labels(pipeline.id2label, pipeline.id2synset), trained.class_names):
        raise ValueError(f"pipeline={recipe.pipeline!r}: its classes are not those of the data; name what it learned")
    chosen = _held_out_images(recipe, held_out, ids if conditional else None)
    refuse_unwritable(Path(recipe.output).parent, "the folder of output")
    check_images(trained)

    samples = draw_all(pipeline, labels, recipe.seed, settings, recipe.batch_size)
    real = torch.stack([held_out.raw(i) for i in chosen])
    queries = {
        space: torch.cat([_features(extractor, images, recipe.batch_size)[space] for images in (samples, real)])
        for space in (extractor.fid_layers[0], PIXELS)
    }
    found = nearest_images(queries, _stream(extractor, trained, recipe.batch_size), recipe.num_neighbours)
    _write_picture(recipe, samples, [class_names(pipeline)[i] for i in labels] if conditional else None, trained, found)
    spaces = {space: _compare(nearest, len(samples)) for space, nearest in found.items()}
    about = {
        "pipeline_weights": pipeline_hash(pipeline),
        "sampler": {name: value for name, value in asdict(settings).items() if name != "start"} | {"seed": recipe.seed},
        "training_images": describe_images(trained),
        "held_out_images": {**describe_images(held_out), "searched_for": len(chosen)},
        "extractor": extractor.describe(),
        "spaces": spaces,
    }
    write_json(Path(recipe.output).with_suffix(".json"), about)
    of_classes = " of the same classes" if conditional else ""
    for space, compared in spaces.items():
        print(
            f"{space}: {100 * compared['share_of_samples_nearer']:.1f} % of {len(samples)} samples lie nearer to a "
            f"training image than the nearest {100 * NEAREST:.0f} % of {len(chosen)} held-out images{of_classes} do "
            f"(about {100 * usual_share(len(chosen)):.0f} % if none is a copy)"
        )
    return Path(recipe.output)


def _held_out_images(recipe: NeighboursRecipe, images: ImageSet, ids: list[int] | None) -> list[int]:
    """Places of the held-out images that are searched for: each class as often as among the samples, or any.

    Of a class that has fewer test images all are taken, and this is printed.

    Raises:
        ValueError: No class that is drawn has any.
    """
    rng = np.random.default_rng(recipe.seed)
    if ids is None:
        return sorted(rng.permutation(len(images))[: recipe.held_out].tolist())
    chosen: list[int] = []
    short: list[str] = []
    for label, wanted in Counter(ids[i % len(ids)] for i in range(recipe.held_out)).items():
        places = np.flatnonzero(images.labels == label)
        if len(places) < wanted:
            short.append(f"{images.class_names[label]!r} {len(places)}")
        chosen += rng.permutation(places)[:wanted].tolist()
    if not chosen:
        raise ValueError(
            f"class_labels={recipe.class_labels!r}: there is no test image of these classes to compare with; add some, "
            "or name other classes"
        )
    if short:
        few = ", ".join(short[:5]) + ", ..." * (len(short) > 5)
        print(f"note: held_out={recipe.held_out}: there are fewer test images of {few}: {len(chosen)} are searched for")
    return sorted(chosen)


def _features(extractor: FeatureExtractor, images: torch.Tensor, batch_size: int) -> dict[str, torch.Tensor]:
    """uint8 (N, C, S, S) -> main layer and pixels, float32 (N, D)."""
    main = extractor.fid_layers[0]
    parts = [extractor(batch)[main] for batch in images.split(batch_size)]
    return {main: torch.cat(parts), PIXELS: images.flatten(1).float()}


def _stream(
    extractor: FeatureExtractor, images: ImageSet, batch_size: int
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    with tqdm(total=len(images), desc="training images", unit="image") as bar:
        for batch in real_batches(images, batch_size):
            yield batch.start, _features(extractor, batch.images, batch_size)
            bar.update(len(batch.images))


def _compare(nearest: Nearest, num_samples: int) -> dict[str, Any]:
    """Distances to the nearest training image: of samples, and of held-out images as the measure of what is near."""
    samples, held_out = nearest.distances[:num_samples, 0], nearest.distances[num_samples:, 0]
    limit = held_out.double().quantile(NEAREST)
    return {
        "samples": {"distances": samples.tolist(), "nearest_images": nearest.indices[:num_samples].tolist()},
        "held_out_quantiles": {str(q): float(held_out.double().quantile(q)) for q in (0.0, 0.05, 0.5, 0.95, 1.0)},
        "share_of_samples_nearer": float((samples.double() < limit).double().mean()),
    }


def usual_share(held_out: int) -> float:
    """The share of samples that `_compare` finds on average where none is a copy: 5 % of many held-out images, more of
    few. N of them cut what is as likely into N + 1 parts, and the limit is the place 1 + 0.05 (N - 1) among them."""
    return (1 + NEAREST * (held_out - 1)) / (held_out + 1)


def _write_picture(
    recipe: NeighboursRecipe,
    samples: torch.Tensor,
    row_names: list[str] | None,
    trained: ImageSet,
    found: dict[str, Nearest],
) -> None:
    """A row a sample: itself, then its neighbours in features, then those in pixels."""
    rows = []
    for i, sample in enumerate(samples):
        images = [trained.raw(int(place)) for nearest in found.values() for place in nearest.indices[i]]
        rows.append(torch.stack([sample, *images]))
    columns = ["sample"]
    for space, nearest in found.items():
        columns += [space, *[""] * (nearest.indices.shape[1] - 1)]
    save_grid(recipe.output, torch.stack(rows), row_names, columns, "samples, and the training images nearest to them")
