"""Validation of a denoiser on held-out codes: NELBO in bits per token, and how many hidden codes it guesses.

Owns the estimates: t stratified over the whole of (0, 1], the same noise at every call, the mean and its standard
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
    """NELBO and accuracy on `num_images` images (plain view), the same at every call and spread over all classes.

    Every image has its own noise, so the estimate does not depend on `batch_size` or the number of processes.

    Returns:
        `bits_per_token` and `bits_per_token_stderr` (over images, ignoring the gain of stratification); and `accuracy`,
        the share of hidden codes that are the likeliest one, argmax over the codes of p(x_i | z): hidden are the places
        where z is the mask, and at k = 1, where no z is, those where z is not x. Every hidden place counts alike, at
        times that are uniform in (0, 1]; left out where nothing was hidden.
    """
    num_images = min(num_images, len(cache))
    images = np.random.default_rng(SEED).permutation(len(cache))[:num_images]  # caches may be sorted by class
    times = stratified_times(num_images, 0.0, torch.Generator().manual_seed(step_seed(SEED, 0)))
    training = model.training
    model.eval()
    total, total_squares, right, hidden = 0.0, 0.0, 0.0, 0.0
    starts = range(0, num_images, batch_size)
    mine = [s for i, s in enumerate(starts) if i % accelerator.num_processes == accelerator.process_index]
    bar = tqdm(mine, desc="validation", unit="batch", leave=False, disable=not accelerator.is_local_main_process)
    for start in bar:
        stop = min(start + batch_size, num_images)
        x, labels = cache.batch(images[start:stop])
        alpha, beta = model.process.alpha_beta(times[start:stop])
        noise = [torch.Generator().manual_seed(step_seed(SEED, 1, int(i))) for i in images[start:stop]]
        z = model.process.noise(x, alpha, beta, noise)
        is_hidden = z == model.process.mask if model.process.k < 1 else z != x  # (b, L)
        device = accelerator.device
        t = times[start:stop].float().to(device)
        inputs = (z.to(device), x.to(device), t, _labels(model, labels, device), is_hidden.to(device))
        with accelerator.autocast():
            loss, guesses = model.loss_and_guesses(*inputs)
        right += (guesses.cpu() == x[is_hidden]).sum().item()
        hidden += len(guesses)
        image = loss.per_token.cpu().double().mean(1) / math.log(2.0)  # (b,) bits per token
        total += image.sum().item()
        total_squares += image.square().sum().item()
    model.train(training)
    sums = [total, total_squares, right, hidden]
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    sums = accelerator.reduce(torch.tensor(sums, dtype=dtype, device=accelerator.device), reduction="sum").tolist()
    total, total_squares, right, hidden = sums
    mean = total / num_images
    variance = max(0.0, total_squares / num_images - mean**2)
    values = {"bits_per_token": mean, "bits_per_token_stderr": math.sqrt(variance / num_images)}
    return values | ({"accuracy": right / hidden} if hidden else {})


def _labels(model: XDLMLoss, labels: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    config = getattr(model.transformer, "config", None)
    return None if getattr(config, "num_classes", None) is None else labels.to(device)
