"""Validation of a denoiser on held-out codes: NELBO in bits per token, and how many hidden codes it guesses.

Owns the estimates: times spread over the whole of (0, 1] and weighted, the same noise at every call, the mean and its
standard error. It never touches the training state.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from xdlm_image.data.code_cache import CodeCache
from xdlm_image.objective import XDLMLoss
from xdlm_image.training.batches import step_seed, weighted_times

SEED = 20_240_229  # the noise of validation: the same for every run, so that runs compare


@torch.no_grad()
def validation_nelbo(
    model: XDLMLoss, cache: CodeCache, accelerator: Accelerator, num_images: int, batch_size: int
) -> dict[str, float]:
    """NELBO and accuracy on `num_images` images (plain view), the same at every call and spread over all classes.

    Every image has its own noise, so the estimate does not depend on `batch_size` or the number of processes.

    Returns:
        `bits_per_token` and, of two images or more, `bits_per_token_stderr`; and `accuracy`, the share of hidden codes
        that are the likeliest one, argmax over the codes of p(x_i | z): hidden are the places where z is the mask, and
        at k = 1, where no z is, those where z is not x. Every hidden place counts as it would at times uniform in
        (0, 1]; left out where nothing was hidden.
    """
    num_images = min(num_images, len(cache))
    images = np.random.default_rng(SEED).permutation(len(cache))[:num_images]  # caches may be sorted by class
    times, weights = weighted_times(num_images, torch.Generator().manual_seed(step_seed(SEED, 0)))
    found = torch.zeros(3, num_images, dtype=torch.float64)  # an image: NELBO, right guesses, hidden codes
    training = model.training
    model.eval()
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
        right = torch.zeros(x.shape, dtype=torch.float64)  # (b, L)
        right[is_hidden] = (guesses.cpu() == x[is_hidden]).double()
        bits = loss.per_token.cpu().double().mean(1) / math.log(2.0)  # (b,) per token
        found[:, start:stop] = torch.stack([bits, right.sum(1), is_hidden.double().sum(1)])
    model.train(training)
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    found = accelerator.reduce(found.to(accelerator.device, dtype), reduction="sum").cpu().double()
    bits, right, hidden = weights * found  # (n,) each
    values = {"bits_per_token": bits.mean().item()}
    if num_images > 1:
        values["bits_per_token_stderr"] = _stratified_stderr(bits[times.argsort()])
    return values | ({"accuracy": (right.sum() / hidden.sum()).item()} if hidden.sum() > 0 else {})


def _stratified_stderr(values: torch.Tensor) -> float:
    """Standard error of the mean of one value a stratum (n >= 2,), in the order of the strata.

    Strata next to each other are compared, as if their means were equal: a little too much, since they are not.

        Var(mean) = sum over i of (v_{i+1} - v_i)^2 / (2 n (n - 1))
    """
    n = len(values)
    return math.sqrt(values.diff().square().sum().item() / (2 * n * (n - 1)))


def _labels(model: XDLMLoss, labels: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    config = getattr(model.transformer, "config", None)
    return None if getattr(config, "num_classes", None) is None else labels.to(device)
