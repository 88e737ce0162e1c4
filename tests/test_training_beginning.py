"""`init_from`: a run begins at trained weights, says what of them it does not take, and refuses what does not fit."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import VQModel
from test_training import CLASSES, logged, recipe_in, weights, world  # noqa: F401

from xdlm_image.data.code_cache import CodeCache, write_code_cache
from xdlm_image.hub.card import write_card
from xdlm_image.models import XDLMTransformer2DModel
from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.recipes import ProcessOptions, TransformerOptions
from xdlm_image.training.loop import TrainingRun, train

CLASS_ROWS = "conditioning.class_embed.weight"


@pytest.fixture
def trained(world: Path) -> Path:  # noqa: F811
    """A run of 150 steps: it knows the codes of each class."""
    model = TransformerOptions(num_layers=1, num_attention_heads=2, attention_head_dim=8)
    changes = {"gradient_accumulation_steps": 1, "batch_size": 32, "log_every": 150, "checkpoint_every": 0}
    train(recipe_in(world, "trained", max_steps=150, model=model, **changes))
    return world / "trained"


def beginning(run: TrainingRun) -> dict[str, torch.Tensor]:
    """The weights before the first step, which the average must have too."""
    state = run.transformer.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(run.transformer.parameters(), run.ema.shadow_params))
    return state


def codes_with(world: Path, name: str, **changes) -> dict[str, str]:  # noqa: F811
    """The caches again, their manifests changed."""
    for split in ("train", "validation"):
        cache = CodeCache.open(world / "codes" / split)
        manifest = dataclasses.replace(cache.manifest, **changes)
        write_code_cache(world / name / split, manifest, [(np.array(cache.codes), np.array(cache.labels))])
    return {"codes": str(world / name / "train"), "validation_codes": str(world / name / "validation")}


def test_a_run_begins_at_a_pipeline_a_network_or_a_run(trained: Path, world: Path, capsys) -> None:  # noqa: F811
    """Another k and other dropout go; what it has learned is there at once, and is not learned by a run without it."""
    expected = weights(trained)
    for folder in (trained, trained / "pipeline", trained / "pipeline" / "transformer"):
        state = beginning(TrainingRun(recipe_in(world, "other", init_from=str(folder), process=ProcessOptions(k=0.5))))
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
        said = capsys.readouterr().out
        assert "begins at the weights" in said and "not taken" not in said
        assert ("cannot be checked" in said) == (folder.name == "transformer")
    changes = {"max_steps": 2, "warmup_steps": 0, "learning_rate": 1e-5}
    train(recipe_in(world, "longer", init_from=str(trained), **changes))
    train(recipe_in(world, "anew", **changes))
    before, after, anew = (
        list(logged(world / name, "validation/bits_per_token").values())[-1] for name in ("trained", "longer", "anew")
    )
    assert after == pytest.approx(before, abs=0.05) and before < 2 < 3 < anew
    assert yaml.safe_load((world / "longer" / "recipe.yaml").read_text())["init_from"] == str(trained)
    card, _ = write_card(XDLMPipeline.from_pretrained(world / "longer" / "pipeline"), "longer", world / "scratch")
    assert "trained from the weights of another network" in card and str(trained) not in card


def test_a_resumed_run_goes_on_at_its_checkpoint(trained: Path, world: Path, capsys) -> None:  # noqa: F811
    """Bit for bit, also when the folder it began at is gone."""
    train(recipe_in(world, "whole", init_from=str(trained)))
    recipe = recipe_in(world, "broken", init_from=str(trained))
    train(dataclasses.replace(recipe, stop_after=5))
    shutil.rmtree(trained)
    capsys.readouterr()
    train(dataclasses.replace(recipe, stop_after=6))
    assert "not read again" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"init_from='elsewhere': the run in .* began at '.*name another output_dir"):
        train(dataclasses.replace(recipe, init_from="elsewhere"))
    train(dataclasses.replace(recipe, init_from=None))
    assert yaml.safe_load((world / "broken" / "recipe.yaml").read_text())["init_from"] == str(trained)
    whole, broken = weights(world / "whole"), weights(world / "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.mark.parametrize("names", [["a", "b", "c", "d", "e"], ["odd", "even", "another"]])
def test_other_classes_begin_as_the_null_class_and_this_is_said(
    trained: Path,
    world: Path,  # noqa: F811
    names: list[str],
    capsys,
) -> None:
    """Whatever the class, the network then predicts what the trained one predicts without one."""
    run = TrainingRun(
        recipe_in(world, "own", init_from=str(trained), **codes_with(world, "own_codes", class_names=names))
    )
    said = capsys.readouterr().out
    assert "every class begins as the null class" in said and ("5 classes here, 3 there" in said) == (len(names) == 5)
    state, expected = beginning(run), weights(trained)
    assert all(torch.equal(state[name], expected[name]) for name in expected if name != CLASS_ROWS)
    z = torch.randint(17, (4, 4))
    source = XDLMPipeline.from_pretrained(trained / "pipeline").transformer.eval()
    with torch.no_grad():
        null = source(z, class_labels=torch.full((4,), len(CLASSES))).sample
        own = run.transformer.eval()(z, class_labels=torch.tensor([0, 1, 2, len(names)])).sample
    torch.testing.assert_close(own, null)


@pytest.mark.parametrize("time_conditioning", ["none", "time"])
def test_without_classes_a_run_begins_as_the_null_class_and_back(world: Path, capsys, time_conditioning) -> None:  # noqa: F811
    model = TransformerOptions(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, time_conditioning=time_conditioning
    )
    changes = {"gradient_accumulation_steps": 1, "model": model}
    train(recipe_in(world, "trained", max_steps=30, learning_rate=0.03, **changes))
    source = XDLMPipeline.from_pretrained(world / "trained" / "pipeline").transformer.eval()
    z, t = torch.randint(17, (4, 4)), torch.rand(4)
    with torch.no_grad():
        null = source(z, timestep=t, class_labels=torch.full((4,), len(CLASSES))).sample
        first = source(z, timestep=t, class_labels=torch.zeros(4, dtype=torch.int64)).sample
    assert (null - first).abs().max() > 1e-3

    run = TrainingRun(recipe_in(world, "without", init_from=str(world / "trained"), conditional=False, **changes))
    told = "no classes here, 3 there: the class embedding is not taken, the null class there is part of the biases"
    assert told in capsys.readouterr().out
    beginning(run)
    run.transformer.eval().save_pretrained(world / "without")
    other = TrainingRun(recipe_in(world, "with", init_from=str(world / "without"), **changes))
    assert "3 classes here, no there: every class begins at 0" in capsys.readouterr().out
    state = beginning(other)
    with torch.no_grad():
        torch.testing.assert_close(run.transformer(z, timestep=t).sample, null, rtol=1e-4, atol=1e-5)
        own = other.transformer.eval()(z, timestep=t, class_labels=torch.tensor([0, 1, 2, 3])).sample
        torch.testing.assert_close(own, null, rtol=1e-4, atol=1e-5)
    expected = run.transformer.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected) and CLASS_ROWS in state


def test_what_does_not_fit_is_refused_with_the_remedy(trained: Path, world: Path) -> None:  # noqa: F811
    def refused(message: str, error: type[Exception] = ValueError, **changes) -> None:
        with pytest.raises(error, match=message):
            TrainingRun(recipe_in(world, "other", **{"init_from": str(trained), **changes}))
        assert not (world / "other").exists()

    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    refused(r"model.num_layers=1$", model=TransformerOptions(**sizes))
    refused(
        r"model.norm_type='rms_norm'$", model=TransformerOptions(**{**sizes, "num_layers": 1}, norm_type="layer_norm")
    )
    refused("process.definition", process=ProcessOptions(definition="B"))
    refused(r"grid of \(2, 2\)", **codes_with(world, "wide", grid=[1, 4]))
    refused("no saved pipeline", FileNotFoundError, init_from=str(world / "codes"))
    refused("has not ended", FileNotFoundError, init_from=str(half_done(trained)))
    refused("a VQModel", init_from=str(world / "tokenizer"))
    shutil.copytree(trained / "pipeline", world / "half" / "pipelines" / "step-00000003")
    refused("newest pipeline is .*step-00000003'", FileNotFoundError, init_from=str(world / "half"))
    vqvae = VQModel.from_pretrained(trained / "pipeline" / "vqvae")
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    vqvae.save_pretrained(trained / "pipeline" / "vqvae")
    refused("not the one that made the codes")
    (trained / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    refused("cannot be loaded", init_from=str(trained / "pipeline" / "transformer"))


def half_done(trained: Path) -> Path:
    """A run of which there are checkpoints alone."""
    (trained.parent / "half" / "checkpoints").mkdir(parents=True)
    return trained.parent / "half"


def test_a_tokenizer_that_is_not_named_is_looked_for_where_it_made_the_codes(world: Path) -> None:  # noqa: F811
    folder = str(world / "tokenizer")
    run = TrainingRun(recipe_in(world, tokenizer=None, **codes_with(world, "told", tokenizer=folder)))
    run.resume()
    assert yaml.safe_load((run.output_dir / "recipe.yaml").read_text())["tokenizer"] == folder
    for gone in ("", "moved"):
        codes = codes_with(world, f"gone{gone}", tokenizer=gone)
        with pytest.raises(FileNotFoundError, match=f"tokenizer: left out, .* made by '{gone}', .* name where it is"):
            TrainingRun(recipe_in(world, tokenizer=None, **codes))
    vqvae = VQModel.from_pretrained(folder)
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    vqvae.save_pretrained(folder)  # another since
    with pytest.raises(ValueError, match="tokenizer: its hash is .*, but the codes in .* were made by"):
        TrainingRun(recipe_in(world, tokenizer=None, codes=str(world / "told" / "train")))


def test_weights_saved_in_short_floats_are_trained_in_float32(trained: Path, world: Path) -> None:  # noqa: F811
    source = XDLMTransformer2DModel.from_pretrained(trained / "pipeline" / "transformer").to(torch.bfloat16)
    source.save_pretrained(world / "short")
    state = beginning(TrainingRun(recipe_in(world, "other", init_from=str(world / "short"))))
    assert all(value.dtype == torch.float32 for value in state.values())
    assert all(torch.equal(state[name], value.float()) for name, value in source.state_dict().items())
