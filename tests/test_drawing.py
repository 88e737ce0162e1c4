"""Which random numbers an image is drawn from, what a user would get, and how fast it was."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_parts import save_pipeline

from xdlm_image.drawing import draw
from xdlm_image.drawing.draw import DrawnBatches, draw_all
from xdlm_image.drawing.drawn_codes import DrawnCodes
from xdlm_image.drawing.opening import open_pipeline, pipeline_hash
from xdlm_image.drawing.sampler_settings import SamplerSettings, nfe
from xdlm_image.schedulers import XDLMOrderedScheduler, XDLMScheduler
from xdlm_image.seeds import MAX_IMAGES, MAX_SEED, image_generators, image_seed
from xdlm_image.tokenizer.codes import decode_codes


def test_every_image_of_every_seed_has_its_own_random_numbers():
    seeds = {image_seed(s, i) for s in (0, 1, 2, MAX_SEED - 1) for i in (*range(3000), MAX_IMAGES - 1)}
    assert len(seeds) == 4 * 3001 and all(0 <= seed < 2**32 for seed in seeds)
    assert image_seed(0, 0) == 0 and image_seed(0, 1) == 0x514E28B7  # MurmurHash3's fmix32
    first, second = (torch.rand(4, generator=image_generators(s, [7])[0]) for s in (0, 1))
    assert not torch.equal(first, second)  # seed * 2**32 + index would make them equal
    for seed, index, word in ((MAX_SEED, 0, "seed="), (-1, 0, "seed="), (0, MAX_IMAGES, "index"), (0, -1, "index")):
        with pytest.raises(ValueError, match=word):
            image_seed(seed, index)


def test_drawn_images_do_not_depend_on_the_batch_and_are_those_of_the_user(tmp_path):
    pipeline = open_pipeline(save_pipeline(tmp_path, k=0.1, seed=2), torch.device("cpu"))
    labels, settings = [0, 1, 2, 0, 1, 2], SamplerSettings(num_steps=3, guidance_scale=2.0)
    assert nfe(pipeline, settings) == 6 and nfe(pipeline, SamplerSettings(3)) == 3

    def codes(indices):
        return pipeline(
            [labels[i] for i in indices],
            num_steps=3,
            guidance_scale=2.0,
            generator=image_generators(4, indices),
            output_type="latent",
        ).images

    together = codes(range(6))
    assert torch.equal(together, torch.cat([codes([i]) for i in range(6)]))
    assert len({tuple(image.flatten().tolist()) for image in together}) == 6
    images = draw_all(pipeline, labels, 4, settings, batch_size=4)
    assert images.dtype == torch.uint8 and images.shape == (6, 3, 16, 16)
    # the rule is round to nearest: against the decoder's own output ...
    decoded = decode_codes(pipeline.vqvae, together).double()
    exact = (decoded + 1) * 127.5
    assert (images - exact.clamp(0, 255)).abs().max() <= 0.5 + 1e-3
    # ... and against the picture a user gets
    user = pipeline(
        labels, num_steps=3, guidance_scale=2.0, generator=image_generators(4, range(6)), output_type="pil"
    ).images
    theirs = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in user])
    assert (theirs.int() - images.int()).abs().max() <= 1  # a value on the edge may fall to either side
    assert (theirs == images).float().mean() > 0.999


@pytest.mark.parametrize("has_codes", [True, False])
@pytest.mark.parametrize("batch_size", [250, 20, 6])
def test_speed_is_of_a_usual_image_whatever_the_batch(batch_size, has_codes, tmp_path, monkeypatch):
    """20 images on a clock by which drawing one takes 1/4 s and decoding it as long; the first batch a minute more."""
    now = [0.0]

    def spend(number: int, shape: tuple[int, ...], seconds: float, pause: float = 0.0) -> torch.Tensor:
        now[0] += number * seconds + pause
        return torch.zeros(number, *shape, dtype=torch.int64)

    def pause() -> float:
        return 60.0 if batch_size == 6 and now[0] == 0 else 0.0

    monkeypatch.setattr(draw, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(draw, "draw_codes", lambda _, labels, *rest: spend(len(labels), (2, 3), 0.25, pause()))
    monkeypatch.setattr(draw, "decode", lambda _, codes: spend(len(codes), (1, 4, 4), 0.25))
    monkeypatch.setattr(draw, "draw_images", lambda _, labels, *rest: spend(len(labels), (1, 4, 4), 0.5, pause()))
    store = DrawnCodes(tmp_path / "codes", {}, 20, (2, 3), 24, {}) if has_codes else None
    monkeypatch.setattr(draw, "is_conditional", lambda _: True)
    cpu, extra = torch.device("cpu"), 60.0 if batch_size == 6 else 0.0
    for start in range(2 if has_codes else 1):
        batches = DrawnBatches(None, 20, 5, 0, SamplerSettings(2), batch_size, store)
        assert sum(len(batch.images) for batch in batches) == 20
        assert batches.images_per_second(cpu, processes=1) == pytest.approx(2.0)
        assert batches.images_per_second(cpu, processes=4) == pytest.approx(8.0)
        assert batches.seconds(cpu) == pytest.approx(10.0 + extra), start


def test_pipelines_with_other_samplers_have_other_hashes(tmp_path):
    """A scheduler made from another's settings keeps those that it does not read: they must not count."""
    pipeline = open_pipeline(save_pipeline(tmp_path, k=0.1, seed=2), torch.device("cpu"))
    hashes = [pipeline_hash(pipeline)]
    for unmasking, choice_temperature in (("halton", None), ("confidence", None), ("confidence", 2.0)):
        pipeline.scheduler = XDLMOrderedScheduler.from_config(
            pipeline.scheduler.config, unmasking=unmasking, choice_temperature=choice_temperature
        )
        hashes.append(pipeline_hash(pipeline))
    pipeline.save_pretrained(tmp_path / "ordered")
    again = open_pipeline(tmp_path / "ordered", torch.device("cpu"))
    assert len(set(hashes)) == 4 and pipeline_hash(again) == hashes[-1]
    again.scheduler = XDLMScheduler.from_config(again.scheduler.config)
    again.save_pretrained(tmp_path / "ancestral")
    assert pipeline_hash(open_pipeline(tmp_path / "ancestral", torch.device("cpu"))) == hashes[0]


def test_the_id_of_a_repository_is_told_how_it_becomes_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name, is_id in (("somebody/xdlm", True), ("runs/xdlm", False), ("xdlm", False), (tmp_path / "a", False)):
        with pytest.raises(FileNotFoundError, match="no saved pipeline there") as told:
            open_pipeline(name, torch.device("cpu"))
        assert ("`hf download somebody/xdlm --local-dir DIR`" in str(told.value)) == is_id
