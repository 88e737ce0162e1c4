"""Validation NELBO of a denoiser on held-out codes, in bits per token.

Owns the estimate: t stratified over the whole of (0, 1], the same noise at every call, the mean and its standard
error over images. It never touches the training state.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..data.code_cache import CodeCache
from ..objective import XDLMLoss
from .batches import step_seed, stratified_times

SEED = 20_240_229  # the noise of validation: the same for every run, so that runs compare


@torch.no_grad()
def validation_nelbo(
    model: XDLMLoss, cache: CodeCache, accelerator: Accelerator, num_images: int, batch_size: int
) -> dict[str, float]:
    """NELBO of `num_images` images (plain view), the same at every call and spread over all classes.

    Every image has its own noise, so the estimate does not depend on `batch_size` or the number of processes.

    Returns:
        `bits_per_token` and `bits_per_token_stderr` (over images, ignoring the gain of stratification).
    """
    num_images = min(num_images, len(cache))
    images = np.random.default_rng(SEED).permutation(len(cache))[:num_images]  # caches may be sorted by class
    times = stratified_times(num_images, 0.0, torch.Generator().manual_seed(step_seed(SEED, 0)))
    training = model.training
    model.eval()
    total, total_squares = 0.0, 0.0
    starts = range(0, num_images, batch_size)
    mine = [s for i, s in enumerate(starts) if i % accelerator.num_processes == accelerator.process_index]
    bar = tqdm(mine, desc="validation", unit="batch", leave=False, disable=not accelerator.is_local_main_process)
    for start in bar:
        stop = min(start + batch_size, num_images)
        x, labels = cache.batch(images[start:stop])
        alpha, beta = model.process.alpha_beta(times[start:stop])
        noise = [torch.Generator().manual_seed(step_seed(SEED, 1, int(i))) for i in images[start:stop]]
        z = model.process.noise(x, alpha, beta, noise)
        device = accelerator.device
        with accelerator.autocast():
            loss = model(
                z.to(device), x.to(device), times[start:stop].float().to(device), _labels(model, labels, device)
            ).per_token
        image = loss.cpu().double().mean(1) / math.log(2.0)  # (b,) bits per token
        total += image.sum().item()
        total_squares += image.square().sum().item()
    model.train(training)
    sums = torch.tensor([total, total_squares], dtype=torch.float32, device=accelerator.device)
    total, total_squares = accelerator.reduce(sums, reduction="sum").tolist()
    mean = total / num_images
    variance = max(0.0, total_squares / num_images - mean**2)
    return {"bits_per_token": mean, "bits_per_token_stderr": math.sqrt(variance / num_images)}


def _labels(model: XDLMLoss, labels: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    config = getattr(model.transformer, "config", None)
    return None if getattr(config, "num_classes", None) is None else labels.to(device)
