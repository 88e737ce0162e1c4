"""Validation's accuracy against all logits at once, however the images are cut, and against what is known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from test_training import CODES, logged, recipe_in, world  # noqa: F401

from xdlm_image.data.code_cache import CodeCache
from xdlm_image.models import XDLMTransformer2DModel
from xdlm_image.objective import XDLMLoss, head
from xdlm_image.recipes import ProcessOptions, TransformerOptions
from xdlm_image.schedulers import XDLMProcess
from xdlm_image.training import validation
from xdlm_image.training.batches import step_seed, weighted_times
from xdlm_image.training.loop import train
from xdlm_image.training.validation import SEED, validation_nelbo


def network(process: XDLMProcess) -> XDLMTransformer2DModel:
    torch.manual_seed(0)
    model = XDLMTransformer2DModel(
        sample_size=2, num_embeds=process.num_ids, out_channels=process.logits_width, num_classes=3,
        num_layers=1, num_attention_heads=2, attention_head_dim=8, dropout=0.5,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.proj_out.bias.data[[0, 1, 4, 5, 8, 9]] = 4.0  # the codes that there are
    return model


@pytest.mark.parametrize("k", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("definition", ["A", "B"])
def test_accuracy_is_that_of_all_logits_at_once(k: float, definition: str, world: Path, monkeypatch) -> None:  # noqa: F811
    """Under B the mask is the likeliest id by far, and is never a guess."""
    ids = {"vocab_size": CODES + 1, "mask_id": CODES} if definition == "B" else {}
    process = XDLMProcess(k, CODES, definition, **ids)
    model = network(process)
    if definition == "B":
        model.proj_out.bias.data[CODES] = 100.0
    cache = CodeCache.open(world / "codes" / "validation")
    count = 200
    images = np.random.default_rng(SEED).permutation(len(cache))[:count]
    x, labels = cache.batch(images)
    times, weights = weighted_times(count, torch.Generator().manual_seed(step_seed(SEED, 0)))
    noise = [torch.Generator().manual_seed(step_seed(SEED, 1, int(i))) for i in images]
    z = process.noise(x, *process.alpha_beta(times), noise)
    with torch.no_grad():
        logits = model.eval()(z, timestep=times.float(), class_labels=labels).sample
    hidden = (z != x) if k == 1 else (z == process.mask)
    right = (logits[..., :CODES].argmax(-1) == x) & hidden
    expected = ((weights @ right.double()).sum() / (weights @ hidden.double()).sum()).item()
    assert 0 < expected < 0.5 and hidden.sum() > 100

    loss = XDLMLoss(model, process)
    monkeypatch.setattr(head, "BLOCK_BYTES", 4096)  # several blocks of rows
    for batch_size in (200, 37):
        values = validation_nelbo(loss, cache, Accelerator(), count, batch_size)
        assert values["accuracy"] == pytest.approx(expected, abs=1e-12)
    model.proj_out.register_forward_hook(lambda *_: None)  # no plain layer any more: all logits at once
    assert validation_nelbo(loss, cache, Accelerator(), count, 200) == pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize("k", [0.0, 0.3])
def test_nelbo_of_a_network_that_knows_nothing_and_how_far_it_is_off(k: float, world: Path, monkeypatch) -> None:  # noqa: F811
    """It is log2 of the number of codes, and the standard error is the spread over noise, or a little more."""
    process = XDLMProcess(k, CODES)
    model = network(process)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    loss, cache = XDLMLoss(model, process), CodeCache.open(world / "codes" / "validation")
    means, errors = [], []
    for seed in range(30):
        monkeypatch.setattr(validation, "SEED", seed)
        values = validation_nelbo(loss, cache, Accelerator(), 200, 200)
        means.append(values["bits_per_token"])
        errors.append(values["bits_per_token_stderr"])
    spread, error = np.std(means, ddof=1), np.sqrt(np.square(errors).mean())
    assert abs(np.mean(means) - np.log2(CODES)) < 4 * spread / 30**0.5
    assert 0.7 * spread < error < 2 * spread


def test_accuracy_of_a_run_that_has_learned_all_there_is(world: Path) -> None:  # noqa: F811
    """Given the class two codes are left, given any visible place one.

    Of four places with t uniform, the three others of a hidden one are hidden too with probability E[t^4] / E[t] = 2/5;
    then half the guesses are right, else all: 4/5.
    """
    model = TransformerOptions(num_layers=2, num_attention_heads=2, attention_head_dim=16)
    changes = {"gradient_accumulation_steps": 1, "batch_size": 32, "validation_samples": 1000, "log_every": 50}
    changes |= {"model": model, "process": ProcessOptions(k=0.0), "validate_every": 100}
    train(recipe_in(world, max_steps=200, **changes))
    accuracy = logged(world / "run", "validation/accuracy")
    assert list(accuracy) == [100, 200] and accuracy[200] == pytest.approx(0.8, abs=0.04)
