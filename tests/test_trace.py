"""The record of a call: nothing drawn differs by it, its states are the call's, and its pictures say what changed."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_parts import NUM_CODES, save_pipeline

from xdlm_image.drawing import sample as verb
from xdlm_image.drawing.opening import open_pipeline
from xdlm_image.drawing.sample import sample
from xdlm_image.drawing.trace import (
    CODE_TO_CODE,
    CODE_TO_MASK,
    HATCH,
    KEPT,
    MASK_TO_CODE,
    Trace,
    kinds_of_change,
    most_probable,
    record,
)
from xdlm_image.drawing.trace_pictures import COLOURS, MAX_COLUMNS, save_gif, save_strip, shown_states
from xdlm_image.recipes import SampleRecipe
from xdlm_image.seeds import image_generators


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved pipelines by name; `grey` and `free` (no classes) at k = 0.1."""
    root = tmp_path_factory.mktemp("pipelines")
    made = {str(k): save_pipeline(root / str(k), k=k) for k in (0.0, 0.1, 1.0)}
    made["grey"] = save_pipeline(root / "grey", channels=1)
    made["free"] = save_pipeline(root / "free", num_classes=None)
    return made


@pytest.fixture(scope="module")
def pipelines(folders):
    return {name: open_pipeline(folder, torch.device("cpu")) for name, folder in folders.items()}


def call(steps: int = 6, seed: int = 0, **changes) -> dict:
    return {"num_steps": steps, "generator": image_generators(seed, range(3)), **changes}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", ["0.0", "0.1", "1.0", "grey"])
def test_a_record_changes_nothing_and_holds_every_state(pipelines, name, guidance):
    pipe = pipelines[name]
    plain = pipe([0, 2, 1], **call(guidance_scale=guidance), output_type="latent").images
    states = []

    def keep(pipe, i, t, tensors):
        states.append(tensors["latents"].clone())
        return tensors

    start = pipe.prepare_latents(3, image_generators(0, range(3)))
    pipe([0, 2, 1], **call(guidance_scale=guidance), output_type="latent", callback_on_step_end=keep)
    trace = record(pipe, [0, 2, 1], **call(guidance_scale=guidance))
    assert torch.equal(trace.codes[-1], plain)
    assert torch.equal(trace.codes, torch.stack([start, *states]))
    assert trace.times.tolist() == pytest.approx([1 - i / 6 for i in range(7)])
    assert trace.labels.tolist() == [0, 2, 1]
    assert trace.images([6]).shape == trace.predicted_images([0]).shape == (1, 3, 1 if name == "grey" else 3, 16, 16)
    assert not pipe.transformer._forward_hooks  # the network is as it was


def test_the_kinds_of_change_by_hand():
    mask = 9
    before = torch.tensor([9, 9, 1, 1, 1])
    after = torch.tensor([9, 2, 1, 3, 9])
    assert kinds_of_change(before, after, mask).tolist() == [KEPT, MASK_TO_CODE, KEPT, CODE_TO_CODE, CODE_TO_MASK]


def test_each_noise_makes_the_changes_it_can_make(pipelines):
    labels = [0, 1, 2] * 4
    kinds = {}
    for name in ("0.0", "0.1", "1.0"):
        trace = record(pipelines[name], labels, num_steps=6, generator=torch.Generator().manual_seed(0))
        kinds[name] = torch.bincount(trace.changes().flatten().long(), minlength=4)
        assert trace.changes().shape == (6, 12, 4, 4)
    assert kinds["0.0"][MASK_TO_CODE] == 12 * 16 and kinds["0.0"][CODE_TO_CODE] == kinds["0.0"][CODE_TO_MASK] == 0
    assert kinds["1.0"][CODE_TO_CODE] > 0 and kinds["1.0"][MASK_TO_CODE] == kinds["1.0"][CODE_TO_MASK] == 0
    assert all(kinds["0.1"][1:] > 0)


def test_masked_places_are_hatched_and_only_they(pipelines):
    trace = record(pipelines["0.0"], [0, 1, 2], **call())
    images = trace.images()
    empty = (trace.codes == NUM_CODES).repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, None].expand(images.shape)
    hatched = (images == HATCH[0]) | (images == HATCH[1])
    assert empty[0].all() and not empty[-1].any() and hatched[empty].all()
    assert hatched[~empty].float().mean() < 0.2  # a decoded pixel may have that grey too
    plain = pipelines["0.0"]([0, 1, 2], **call(), output_type="pt").images
    assert (images[-1] - plain * 255).abs().max() <= 0.5 + 1e-3


def test_a_prediction_weighs_the_code_that_stands_there(pipelines):
    """Against Bayes by hand: p(x | z) is the leave-one-out p times q(z_i | x)."""
    pipe, t = pipelines["0.1"], 0.3
    process = pipe.scheduler.process
    logits = torch.randn(2, 50, NUM_CODES, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    z = torch.randint(NUM_CODES + 1, (2, 50), generator=torch.Generator().manual_seed(1))
    alpha, beta = process.alpha_beta(torch.tensor(t, dtype=torch.float64))
    q = process.marginal(torch.arange(NUM_CODES), alpha, beta)  # (x, z)
    expected = (torch.softmax(logits, -1) * q.T[z]).argmax(-1)
    assert torch.equal(most_probable(pipe, logits, z, t), expected)
    assert (expected != logits.argmax(-1)).any()
    trace = record(pipelines["0.0"], [0, 1, 2], **call())
    visible = trace.codes[:-1] != NUM_CODES
    assert torch.equal(trace.predictions[visible], trace.codes[:-1][visible])  # k = 0: a visible code is certain


def test_codes_for_research(pipelines, tmp_path):
    trace = record(pipelines["0.1"], ["ant", "wasp", "cat"], **call())
    with np.load(trace.save_codes(tmp_path / "sub" / "t.npz")) as saved:
        assert saved["codes"].shape == (7, 3, 4, 4) and saved["predictions"].shape == (6, 3, 4, 4)
        np.testing.assert_array_equal(saved["codes"], trace.codes)
        np.testing.assert_array_equal(saved["times"], trace.times)
        assert saved["labels"].tolist() == [0, 1, 2] and saved["mask"] == NUM_CODES
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["t.npz"]


SQUARE = 23 * 23  # pixels of a place in the map of a 16 x 16 image, enlarged to 96 x 96: 24 less a white line


def colour_shares(picture: np.ndarray) -> dict[int, int]:
    """Pixels of each of the three colours, and within 3 of it (a GIF has 256 colours)."""
    picture = picture.astype(int)
    return {kind: int((np.abs(picture - colour).max(-1) <= 3).sum()) for kind, colour in COLOURS.items()}


def test_a_strip_shows_each_change_in_its_colour(pipelines, tmp_path):
    trace = record(pipelines["0.1"], [0, 1, 2], **call())
    codes = trace.codes[:1].expand_as(trace.codes)  # nothing changes: what remains of the colours is the captions
    still = Trace(codes, trace.times, trace.predictions, trace.labels, trace.pipeline)
    picture, blank = (np.array(Image.open(save_strip(t, tmp_path / "s.png"))) for t in (trace, still))
    for kind, pixels in colour_shares(picture).items():
        places = int((trace.changes() == kind).sum())
        assert abs(pixels - colour_shares(blank)[kind] - places * SQUARE) < SQUARE / 2
    predicted = np.array(Image.open(save_strip(trace, tmp_path / "p.png", predictions=True)))
    assert predicted.shape == picture.shape and (predicted != picture).any()


def test_many_states_are_thinned_and_none_that_matters_is_lost(pipelines, tmp_path):
    assert shown_states(9) == list(range(9)) and shown_states(17) == list(range(17))
    assert shown_states(65) == list(range(0, 65, 4)) and shown_states(1001)[-1] == 1000
    long = record(pipelines["grey"], [0, 1, 2], **call(steps=40))
    short = record(pipelines["grey"], [0, 1, 2], **call(steps=MAX_COLUMNS - 1))
    sizes = [Image.open(save_strip(t, tmp_path / "s.png")).size for t in (long, short)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", ["0.1", "grey"])
def test_an_animation_has_a_frame_a_state_and_holds_the_last(pipelines, tmp_path, name):
    trace = record(pipelines[name], [0, 1, 2], **call())
    with Image.open(save_gif(trace, tmp_path / "a.gif", frame_ms=100)) as gif:
        durations, shares = [], []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            durations.append(gif.info["duration"])
            shares.append(colour_shares(np.array(gif.convert("RGB"))))
        assert gif.info["loop"] == 0
    assert durations == [100] * 6 + [600]
    for step, kinds in enumerate(trace.changes(), 1):
        for kind in COLOURS:
            more = shares[step][kind] - shares[0][kind]  # the first frame has the legend only
            assert abs(more - int((kinds == kind).sum()) * SQUARE) < SQUARE / 2
    with pytest.raises(ValueError, match="frame_ms=10"):
        save_gif(trace, tmp_path / "b.gif", frame_ms=10)


def recipe(folder, output, **changes) -> SampleRecipe:
    values = {"num_steps": 3, "images_per_class": 2, "trace": "strip", "device": "cpu", **changes}
    return SampleRecipe(pipeline=str(folder), output=str(output), **values)


def test_sample_writes_traces_beside_its_grid(folders, tmp_path):
    sample(recipe(folders["0.1"], tmp_path / "g.png", trace=["strip", "gif", "codes"], trace_images=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.png", "g.trace.gif", "g.trace.npz", "g.trace.png"]
    sample(recipe(folders["0.1"], tmp_path / "h.png", trace=None))
    assert (tmp_path / "g.png").read_bytes() == (tmp_path / "h.png").read_bytes()
    with np.load(tmp_path / "g.trace.npz") as saved:
        assert saved["labels"].tolist() == [0, 0, 1, 1, 2, 2]
        sample(recipe(folders["0.1"], tmp_path / "i.png", trace="codes"))
        with np.load(tmp_path / "i.trace.npz") as first:  # the first image of each row, the same as before
            np.testing.assert_array_equal(first["codes"], saved["codes"][:, ::2])


def test_a_pipeline_without_classes(folders, tmp_path):
    sample(recipe(folders["free"], tmp_path / "g.png", trace=["strip", "gif", "codes"], trace_images=2))
    with np.load(tmp_path / "g.trace.npz") as saved:
        assert saved["codes"].shape == (4, 2, 4, 4) and "labels" not in saved


def test_traces_that_cannot_be_are_refused_before_drawing(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "class_grid", lambda *args: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=r"3 classes x trace_images=11 are 33 images, at most 32"):
        sample(recipe(folders["0.1"], tmp_path / "g.png", images_per_class=11, trace_images=11))
    cases = [
        ({"trace_images": 3}, "trace_images=3: .*images_per_class=2"),
        ({"trace_frame_ms": 5}, "trace_frame_ms=5"),
        ({"trace": []}, "trace=\\[\\]"),
        ({"trace": None, "trace_shows": "predictions"}, "trace_shows='predictions': does nothing without trace"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            recipe(folders["0.1"], tmp_path / "g.png", **changes)
    assert not list(tmp_path.iterdir())
