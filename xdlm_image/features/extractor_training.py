"""Train the small classifier whose features judge images.

This file owns the training loop of the extractor, its checkpoints and the files it leaves; the network is in
`small_classifier`, the images come from `data.images`. It never computes FID.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from xdlm_image.data.image_batches import real_batches
from xdlm_image.data.image_check import check_images
from xdlm_image.data.images import ImageSet, Uint8Images, normalise, open_images
from xdlm_image.devices import best_device
from xdlm_image.features.extractor import load_extractor
from xdlm_image.features.small_classifier import ExtractorConfig, SmallClassifier, read_extractor_config
from xdlm_image.files import sha256_of_file, write_atomic, write_json
from xdlm_image.processes import only_command
from xdlm_image.recipes import WHERE_IMAGES_ARE, ExtractorRecipe
from xdlm_image.training.checkpoints import Checkpoint, CheckpointFolder, refuse_other_recipe

EVALUATION_BATCH = 500


def augment(images: torch.Tensor, shift: int, generator: torch.Generator) -> torch.Tensor:
    """Mirror half of the images and move each by up to `shift` pixels both ways, repeating the border.

    Args:
        images: Float (B, C, S, S) on any device.
        shift: Largest move in pixels, at least 0.
        generator: CPU generator of the draws.

    Returns:
        A new tensor (B, C, S, S).
    """
    batch, channels, side, _ = images.shape
    mirrored = torch.rand(batch, generator=generator) < 0.5  # (B,)
    moves = torch.randint(-shift, shift + 1, (2, batch, 1), generator=generator)  # rows and columns
    rows, columns = (torch.arange(side) + moves).clamp(0, side - 1)  # (B, S) each
    columns = torch.where(mirrored[:, None], side - 1 - columns, columns)
    index = (rows[:, :, None] * side + columns[:, None, :]).to(images.device)  # (B, S, S)
    index = index.view(batch, 1, side * side).expand(-1, channels, -1)
    return images.reshape(batch, channels, side * side).gather(2, index).view_as(images)


@torch.no_grad()
def measure_accuracy(classifier: SmallClassifier, images: ImageSet, device: torch.device, num_workers: int) -> float:
    """Share of `images` that the classifier puts in their class, in [0, 1]."""
    classifier.eval()
    right = 0
    for batch in real_batches(images, EVALUATION_BATCH, num_workers=num_workers):
        logits = classifier(normalise(batch.images.to(device)))  # (B, num_classes)
        right += int((logits.argmax(1).cpu() == batch.labels).sum())
    return right / len(images)


def train_extractor(recipe: ExtractorRecipe) -> Path:
    """Train on the train split, measure accuracy on the test split, write the extractor's folder.

    Writes `model.safetensors`, `report.json` and, last, `config.json`. A folder that already holds an extractor of
    exactly this recipe and these images is left as it is.

    Raises:
        OSError: Nothing can be written to `output_dir`; before training.
        ValueError: `output_dir` holds an extractor of another recipe: FIDs measured with it could not be repeated; or
            the images are of one class; or another command is at work there.
    """
    output = Path(recipe.output_dir)
    train, test = open_images(recipe.data, "train"), open_images(recipe.data, "test")
    if len(train.class_names) < 2:
        raise ValueError(
            f"data.root={recipe.data.root!r}: one class, {train.class_names[0]!r}, teaches a classifier nothing; put "
            "the images of each class into a folder of its name, or judge with another extractor"
        )
    if _is_trained(output, recipe, train.fingerprint):
        print(f"{output}: this extractor is already trained; delete the folder to train it again")
        return output
    with only_command(output, is_main=True):
        _train(recipe, train, test)
    return output


def _train(recipe: ExtractorRecipe, train: ImageSet, test: ImageSet) -> None:
    output = Path(recipe.output_dir)
    for images in (train, test):
        check_images(images, recipe.num_workers)
    device = best_device()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        classifier = SmallClassifier(
            recipe.data.image_size, recipe.data.channels, len(train.class_names), recipe.width, recipe.feature_dim
        )
    classifier = classifier.to(device).to(memory_format=torch.channels_last)
    checkpoints = CheckpointFolder(output / "checkpoints", "train-extractor", keep=1)
    curve, seconds = _fit(classifier, train, recipe, device, checkpoints)
    accuracy = measure_accuracy(classifier, test, device, recipe.num_workers)

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    weights = write_atomic(output / "model.safetensors", lambda path: save_file(state, path))
    config = ExtractorConfig(
        image_size=recipe.data.image_size,
        channels=recipe.data.channels,
        width=recipe.width,
        feature_dim=recipe.feature_dim,
        class_names=list(train.class_names),
        data_fingerprint=train.fingerprint,
        test_accuracy=accuracy,
        weights_sha256=sha256_of_file(weights),
    )
    write_json(
        output / "report.json",
        {
            "test_accuracy": accuracy,
            "test_images": len(test),
            "train_images": len(train),
            "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
            "seconds": round(seconds, 1),
            "device": str(device),
            "loss_curve": curve,
        },
    )
    write_json(
        output / "config.json", {**config.to_dict(), "recipe": _recipe_key(recipe)}
    )  # last: it makes the folder whole
    load_extractor(output, device)
    shutil.rmtree(checkpoints.folder)
    print(f"{output}: test accuracy {accuracy:.4f} after {seconds:.0f} s")
    if config.is_near_chance:
        print(
            f"warning: that is little more than chance for {len(train.class_names)} classes, so distances by this "
            "extractor will mean little; train one with more epochs, in another folder"
        )


def _recipe_key(recipe: ExtractorRecipe) -> dict[str, Any]:
    """What decides the weights: everything but where files lie and how they are read."""
    key = asdict(recipe)
    for name in ("output_dir", "num_workers"):
        del key[name]
    return {**key, "data": {k: v for k, v in key["data"].items() if k not in WHERE_IMAGES_ARE}}


def _is_trained(output: Path, recipe: ExtractorRecipe, fingerprint: str) -> bool:
    if not (output / "config.json").exists():
        return False
    config = read_extractor_config(output)
    stored = json.loads((output / "config.json").read_text(encoding="utf-8")).get("recipe", {})
    same = stored == _recipe_key(recipe)
    if not same or config.data_fingerprint != fingerprint:
        raise ValueError(
            f"output_dir={str(output)!r}: it holds an extractor of another recipe or other images. Numbers measured "
            "with it could not be repeated; name another folder, or delete this one"
        )
    load_extractor(output, "cpu")
    return True


def _fit(
    classifier: SmallClassifier,
    train: ImageSet,
    recipe: ExtractorRecipe,
    device: torch.device,
    checkpoints: CheckpointFolder,
) -> tuple[list[dict[str, Any]], float]:
    """One-cycle AdamW on the cross-entropy, with a checkpoint after each epoch.

    Returns:
        The loss curve, one point every 50 steps and the last; and the seconds of training, over all starts.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    loader = DataLoader(
        Uint8Images(train),
        batch_size=min(recipe.batch_size, len(train)),
        shuffle=True,
        drop_last=True,
        generator=generator,
        num_workers=recipe.num_workers,
    )
    total_steps = recipe.epochs * len(loader)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=total_steps, pct_start=0.15, div_factor=4
    )
    shift = max(1, recipe.data.image_size // 28)
    curve: list[dict[str, Any]] = []
    recent: list[float] = []
    done, earlier = 0, 0.0
    bound = {**_recipe_key(recipe), "images": train.fingerprint, "device": device.type}
    newest = checkpoints.load_newest()
    if newest is not None:
        refuse_other_recipe(newest.state["bound"], bound, checkpoints.folder.parent)
        classifier.load_state_dict(newest.tensors["model"])
        optimizer.load_state_dict(newest.optimizer["optimizer"])
        schedule.load_state_dict(newest.optimizer["schedule"])
        generator.set_state(newest.optimizer["generator"])
        done, earlier = newest.step, newest.state["seconds"]
        curve, recent = newest.state["curve"], newest.state["recent"]
    started = time.perf_counter() - earlier
    classifier.train()
    with tqdm(total=total_steps, initial=done * len(loader), desc="extractor", unit="step") as progress:
        for epoch in range(done, recipe.epochs):
            for images, labels in loader:
                images = normalise(images.to(device))  # (B, C, S, S) in [-1, 1]
                images = augment(images, shift, generator).contiguous(memory_format=torch.channels_last)
                loss = F.cross_entropy(classifier(images), labels.to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                recent.append(loss.item())
                progress.update()
                if progress.n % 50 == 0 or progress.n == total_steps:
                    mean = sum(recent) / len(recent)
                    curve.append({"step": progress.n, "loss": round(mean, 5)})
                    progress.set_postfix(loss=f"{mean:.3f}")
                    recent.clear()
            states = {
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "generator": generator.get_state(),  # order and augmentation
            }
            state = {"bound": bound, "seconds": time.perf_counter() - started, "curve": curve, "recent": recent}
            checkpoints.save(Checkpoint(epoch + 1, {"model": classifier.state_dict()}, states, state))
    return curve, time.perf_counter() - started
