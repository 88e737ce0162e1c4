"""XDLM from a picture: which pictures, how far they are noised, and what comes back."""

import warnings

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from PIL import Image
from test_pipeline import make_pipe, seeded
from tiny_parts import save_pipeline

from xdlm_image import XDLMImg2ImgPipeline, XDLMInpaintPipeline, XDLMOrderedScheduler, XDLMPipeline, XDLMScheduler
from xdlm_image.cli import main
from xdlm_image.data.images import open_images
from xdlm_image.pipelines.init_images import preprocess
from xdlm_image.recipes import DataOptions
from xdlm_image.schedulers.scheduling_xdlm_ordered import halton_order

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)


def make_img2img(channels: int = 3, **arguments) -> XDLMImg2ImgPipeline:
    pipe = XDLMImg2ImgPipeline.from_pipe(make_pipe(channels=channels, **arguments))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> XDLMImg2ImgPipeline:
    return make_img2img()


def draw(pipe, *args, seed: int = 0, **kwargs):
    return pipe(*args, **{"generator": seeded(seed), "output_type": "latent", **kwargs}).images


def test_pictures_are_encoded_where_weights_lie_elsewhere(pipe):
    """As `enable_sequential_cpu_offload` has it, whose hooks bring a layer's weights when the layer is called."""
    pictures = [Image.fromarray(np.roll(PIXELS, shift, 0)) for shift in range(4)]
    expected = pipe.encode_images(pictures)
    latents = pipe.vqvae.encode(preprocess(pictures, *pipe.image_size, 3)).latents
    assert torch.equal(expected.flatten(), pipe.vqvae.quantize(latents)[2][2]) and len(expected.unique()) > 1
    cpu_offload(pipe.vqvae, torch.device("cpu"))
    assert pipe.vqvae.quantize.embedding.weight.device.type == "meta"
    assert torch.equal(pipe.encode_images(pictures), expected)


def test_half_precision_compares_with_the_codebook_in_float32(pipe):
    pipe.to(dtype=torch.bfloat16)
    latents = pipe.vqvae.encode(preprocess(PIXELS, *pipe.image_size, 3).bfloat16()).latents
    vectors, codebook = latents.permute(0, 2, 3, 1).flatten(0, 2), pipe.vqvae.quantize.embedding.weight
    nearest = (vectors.double()[:, None] - codebook.double()).square().sum(-1).argmin(1)
    assert torch.equal(pipe.encode_images(PIXELS).flatten(), nearest)  # a CPU's cdist knows no bfloat16


# --- where it starts ------------------------------------------------------------------------------


def test_strength_1_is_the_plain_pipeline_and_little_strength_keeps_the_picture(pipe):
    plain = XDLMPipeline.from_pipe(pipe)
    plain.set_progress_bar_config(disable=True)
    for sampler in ({"guidance_scale": 2.0}, {"guidance_scale": 3.0, "guidance_interval": (0.2, 0.8)}):
        expected = plain("tench", num_steps=4, generator=seeded(3), output_type="latent", **sampler).images
        assert torch.equal(draw(pipe, PIXELS, "tench", 1.0, 4, seed=3, **sampler), expected)
    codes = pipe.encode_images(PIXELS)
    kept = [(draw(pipe, PIXELS, 0, s, num_images_per_prompt=64) == codes).float().mean().item() for s in (1e-6, 0.3, 1)]
    assert kept[0] == 1 and kept[0] > kept[1] > kept[2]


@pytest.mark.parametrize("strength", [0.25, 0.6])
def test_the_steps_begin_at_codes_noised_by_the_forward_marginal(strength):
    """The network meets, at t = strength, codes kept with alpha + beta k / K, else masks or others."""
    pipe, k, seen = make_img2img(k=0.3), 0.3, []
    forward = pipe.transformer.forward

    def see(z, timestep, **kwargs):
        seen.append((z, float(timestep)))
        return forward(z, timestep=timestep, **kwargs)

    pipe.transformer.forward = see
    draw(pipe, PIXELS, 0, strength, 3, num_images_per_prompt=2000)
    z, t = seen[0]
    x = pipe.encode_images(PIXELS).flatten(1)
    assert t == pytest.approx(strength) and [t for _, t in seen] == pytest.approx([strength * i / 3 for i in (3, 2, 1)])
    number = z.numel()
    for share, wanted in (
        ((z == x).float().mean().item(), 1 - strength + strength * k / 16),
        ((z == 16).float().mean().item(), strength * (1 - k)),
    ):
        assert abs(share - wanted) < 5 * (wanted * (1 - wanted) / number) ** 0.5


@pytest.mark.parametrize("time_grid", ["linear", "cosine", "arccos"])
@pytest.mark.parametrize("strength", [1e-6, 0.1, 0.7, 1.0])
def test_all_steps_are_run_on_the_part_of_the_grid_that_is_left(time_grid, strength):
    scheduler = XDLMScheduler(time_grid=time_grid)
    scheduler.set_timesteps(6, start=strength)
    times = scheduler.timesteps.tolist()
    assert len(times) == 6 and times[0] == strength and all(a > b > 0 for a, b in zip(times, times[1:]))
    scheduler.set_timesteps(12, start=strength)
    assert scheduler.timesteps[::2].tolist() == pytest.approx(times)  # half the steps are every second time
    scheduler.set_timesteps(6)
    whole = scheduler.timesteps
    scheduler.set_timesteps(4, start=float(whole[2]))
    assert scheduler.timesteps.tolist() == pytest.approx(whole[2:].tolist())  # a tail of the whole grid


def test_steps_are_counted_as_run(pipe):
    steps = []
    draw(pipe, PIXELS, 0, 0.3, num_inference_steps=5, callback_on_step_end=lambda p, i, t, kw: steps.append(i) or kw)
    assert steps == [0, 1, 2, 3, 4] and pipe.num_timesteps == 5
    seen = []
    note = lambda p, i, t, kw: seen.append(set(kw)) or kw
    draw(pipe, PIXELS, 0, num_steps=1, callback_on_step_end=note, callback_on_step_end_tensor_inputs=[])
    assert seen == [set()]


def test_a_picture_whose_codes_the_scheduler_does_not_know(pipe):
    pipe.scheduler = XDLMScheduler(num_codes=int(pipe.encode_images(PIXELS).max()))
    with pytest.raises(ValueError, match="image became code .*, the scheduler knows .*do not belong together"):
        pipe.encode_images(PIXELS)


@pytest.mark.parametrize("kind", [XDLMPipeline, XDLMImg2ImgPipeline, XDLMInpaintPipeline])
def test_a_warning_names_the_line_of_the_caller(pipe, kind):
    other = kind.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    given = {"image": PIXELS, "mask_image": np.ones((20, 33))} if kind is XDLMInpaintPipeline else {"image": PIXELS}
    sampler = {"guidance_scale": 2.0, "guidance_interval": (0.01, 0.02), "output_type": "latent"}
    with pytest.warns(UserWarning, match="guides no step") as found:
        other(**({} if kind is XDLMPipeline else given), class_labels=0, num_steps=2, **sampler)
    assert [warning.filename for warning in found] == [__file__]


def test_own_times_below_1_need_codes(pipe):
    plain = XDLMPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match="timesteps begins at 0.5: give latents"):
        plain(0, timesteps=[0.5, 0.2])
    with pytest.raises(ValueError, match="num_steps=3 and timesteps"):
        plain(0, num_steps=3, timesteps=[1.0, 0.2])
    with pytest.raises(ValueError, match="must fall strictly"):
        plain(0, timesteps=[1.0, 1.0])


# --- batches --------------------------------------------------------------------------------------


def test_pictures_and_labels_pair_up(pipe):
    two = np.stack([PIXELS, 255 - PIXELS])
    assert draw(pipe, two, ["goldfish", 3]).shape == (2, 3, 5)
    assert draw(pipe, two, "goldfish", num_images_per_prompt=np.int64(3)).shape == (6, 3, 5)
    assert draw(pipe, PIXELS, [0, 3, 4]).shape == (3, 3, 5)
    with pytest.raises(ValueError, match="image holds 2 pictures, class_labels 3 labels"):
        pipe(two, [0, 1, 2])
    pipe.vqvae.encode = None  # any work would fail
    for odd, message in (
        ([seeded(0), seeded(1)], "is a list of 2 for 4 images"),
        (42, "holds 42: give torch.Generator"),
        ([seeded(0), 42, seeded(1), seeded(2)], "holds 42: give torch.Generator"),
    ):
        with pytest.raises(ValueError, match=f"generator {message}"):
            pipe(two, [0, 1], num_images_per_prompt=2, generator=odd)


def test_an_image_with_its_own_generator_depends_on_nothing_else(pipe):
    two = np.stack([PIXELS, 255 - PIXELS])
    both = draw(pipe, two, [0, 3], generator=[seeded(1), seeded(2)])
    assert torch.equal(both[1:], draw(pipe, two[1], 3, generator=[seeded(2)]))


def test_unconditional_pictures():
    pipe = make_img2img(num_classes=None)
    assert draw(pipe, [PIXELS, PIXELS], num_images_per_prompt=2).shape == (4, 3, 5)
    with pytest.raises(ValueError, match="unconditional"):
        pipe(PIXELS, 3)


# --- pictures -------------------------------------------------------------------------------------


def test_one_picture_in_every_form_is_the_same(pipe):
    floats = PIXELS.astype(np.float32) / 255
    tensor = torch.from_numpy(floats).permute(2, 0, 1)
    forms = [
        PIXELS,
        floats,
        floats[None],
        [floats],
        tensor,
        tensor[None],
        [tensor],
        torch.from_numpy(PIXELS).movedim(2, 0),
    ]
    arrays = [preprocess(form, 6, 10, 3) for form in forms]
    for pixels in arrays:
        assert pixels.shape == (1, 3, 6, 10) and torch.allclose(pixels, arrays[0], atol=1e-5)
    beyond = floats + np.float32(1e-5) * np.sign(floats - 0.5)
    assert torch.equal(preprocess(beyond.clip(0, 1), 6, 10, 3), preprocess(beyond, 6, 10, 3)) and beyond.max() > 1
    for other in (floats.astype(">f4"), floats.astype(np.longdouble), floats.astype(np.float16).astype(float)):
        assert torch.allclose(preprocess(other, 6, 10, 3), arrays[0], atol=2e-3)
    fixed = PIXELS.copy()
    fixed.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(preprocess(fixed, 6, 10, 3), arrays[0])
    picture = preprocess(Image.fromarray(PIXELS), 6, 10, 3)
    assert (picture - arrays[0]).abs().max() < 0.03  # Pillow rounds to 8 bits twice
    assert len(preprocess([Image.fromarray(PIXELS), floats], 6, 10, 3)) == 2


def test_pictures_are_read_on_the_cpu_in_float32_whatever_the_defaults():
    expected, before = [preprocess(PIXELS, 6, 10, channels) for channels in (1, 3)], torch.get_default_dtype()
    scheduler = XDLMScheduler(num_codes=16)
    noisy = scheduler.add_noise(codes := torch.arange(15).reshape(1, 15), 0.5, seeded(0))
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = [preprocess(PIXELS, 6, 10, channels) for channels in (1, 3)]
            assert torch.equal(scheduler.add_noise(codes, 0.5, seeded(0)), noisy)
            assert halton_order(11).device.type == "cpu"
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(expected, found))


def test_a_picture_comes_as_the_tokenizer_saw_its_training_images(tmp_path):
    for name in ("train/a", "val/a"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(PIXELS).save(tmp_path / name / "x.png")
    for channels in (1, 3):
        images = open_images(DataOptions(name="folder", root=str(tmp_path), image_size=8, channels=channels), "test")
        assert torch.allclose(
            preprocess(Image.open(tmp_path / "val/a/x.png"), 8, 8, channels)[0], images[0][0], atol=1e-6
        )


def test_grey_colour_palette_alpha_and_rotation(pipe, tmp_path):
    red = Image.new("RGB", (10, 6), (255, 0, 0))
    assert preprocess(red, 6, 10, 1).mean().item() == pytest.approx(2 * 76 / 255 - 1)
    assert torch.allclose(preprocess(np.asarray(red), 6, 10, 1), torch.tensor(2 * 0.299 - 1), atol=1e-5)
    grey = np.linspace(0, 1, 60, dtype=np.float32).reshape(6, 10)
    three = preprocess(grey, 6, 10, 3)
    assert torch.equal(three[:, 0], three[:, 2]) and torch.allclose(three[0, 0], torch.from_numpy(grey) * 2 - 1)
    assert torch.equal(preprocess(red.convert("P"), 6, 10, 3), preprocess(red, 6, 10, 3))
    assert preprocess(Image.new("RGBA", (10, 6), (255, 0, 0, 0)), 6, 10, 3).min() == 1  # nothing on white
    clear = Image.new("LA", (10, 6), (0, 0)).convert("La")
    assert preprocess(clear, 6, 10, 1).min() == 1
    deep = np.full((6, 10), 2000, np.uint16)
    deep[0] = 0
    Image.fromarray(deep).save(tmp_path / "deep.png", transparency=2000)
    seen = preprocess(Image.open(tmp_path / "deep.png"), 6, 10, 1)[0, 0]
    assert (seen[1:] == 1).all() and (seen[0] == -1).all()
    half = np.zeros((10, 6, 3), np.uint8)
    half[:5] = 255
    exif = Image.Exif()
    exif[0x0112] = 8  # to be shown turned by 90 degrees counter-clockwise
    Image.fromarray(half).save(tmp_path / "turned.png", exif=exif)
    turned = preprocess(Image.open(tmp_path / "turned.png"), 6, 10, 3)
    assert turned[..., :5].min() == 1 and turned[..., 5:].max() == -1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("cat.png", "image is a str: .*PIL.Image.open"),
        (np.full((6, 10, 3), -0.5), r"holds values from -0.5 to -0.5: .*; take \(x \+ 1\) / 2"),
        (None, "image is a NoneType"),
        ([], "image is empty"),
        (np.zeros((0, 6, 10, 3), np.float32), "image is empty"),
        (np.zeros((6, 0, 3), np.float32), "not empty"),
        (np.zeros((6, 10, 4), np.float32), "1 or 3 channels"),
        (torch.zeros(6, 10, 3), r"shape \(6, 10, 3\): must be \(B, C, H, W\)"),
        (np.full((6, 10, 3), 255.0), "values from 255 to 255"),
        (torch.full((1, 3, 6, 10), -0.5), "values from -0.5"),
        (np.full((6, 10, 3), 1.0003), "values from 1.0003 to 1.0003"),
        (np.full((6, 10, 3), np.nan), "nan"),
        (np.zeros((6, 10, 3), np.int64), "array of int64"),
        (torch.zeros(3, 6, 10, dtype=torch.bool), "tensor of torch.bool"),
        ([np.zeros((6, 10, 3), np.float32), "x"], r"image\[1\] is a str"),
        (Image.new("F", (10, 6)), "floating-point"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_picture(pipe, image, message):
    pipe.vqvae.forward = pipe.vqvae.encode = None  # any work would fail otherwise
    with pytest.raises(ValueError, match=message):
        pipe(image, 0)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), "0.5", True, None])
def test_strength_out_of_range(pipe, strength):
    with pytest.raises(ValueError, match=r"strength=.*must be a number in \(0, 1\]"):
        pipe(PIXELS, 0, strength)


def test_an_order_that_the_grid_has_not_is_refused_before_the_picture_is_encoded(pipe):
    pipe.scheduler = XDLMOrderedScheduler.from_config(pipe.scheduler.config, unmasking="halton")
    pipe.vqvae.encode = None  # any work would fail
    with pytest.raises(ValueError, match=r"shape \(3, 5\) an image are no square grid"):
        pipe(PIXELS, 0)


def test_the_picture_comes_first(pipe):
    with pytest.raises(ValueError, match="image is a str"):
        pipe("goldfish", PIXELS)


def test_strength_0_says_how_to_reconstruct(pipe):
    with pytest.raises(ValueError, match="decode_latents"):
        pipe(PIXELS, 0, strength=0)
    assert pipe.decode_latents(pipe.encode_images(PIXELS)).shape == (1, 3, 6, 10)


@pytest.mark.parametrize("channels", [1, 3])
def test_output_types(channels):
    pipe = make_img2img(channels)
    picture = pipe(Image.fromarray(PIXELS), "tench").images[0]
    assert picture.size == (10, 6) and picture.mode == {1: "L", 3: "RGB"}[channels]
    assert pipe(PIXELS, 0, output_type="np", return_dict=False)[0].shape == (1, 6, 10, channels)
    assert isinstance(pipe(PIXELS, 0, output_type="latent", return_dict=False), tuple)


def test_it_loads_the_same_folder(pipe, tmp_path):
    XDLMPipeline.from_pipe(pipe).save_pretrained(tmp_path)
    loaded = XDLMImg2ImgPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, PIXELS, "tench"), draw(pipe, PIXELS, "tench"))


def test_sharing_keeps_the_dtype(pipe):
    half = make_pipe(channels=3).to(torch.bfloat16)
    assert XDLMImg2ImgPipeline.from_pipe(half).transformer.dtype == half.transformer.dtype == torch.bfloat16
    half.vqvae.float()  # pictures in full precision from a network in half
    shared = XDLMImg2ImgPipeline.from_pipe(half)
    assert shared.vqvae is half.vqvae and half.vqvae.dtype == torch.float32 and half.transformer.dtype == torch.bfloat16
    for name, dtype in (("dtype", torch.float32), ("torch_dtype", torch.float64)):  # the new name and the old one
        assert XDLMImg2ImgPipeline.from_pipe(half, **{name: dtype}).transformer.dtype == dtype


# --- the verb -------------------------------------------------------------------------------------


def test_the_verb_sample_begins_at_a_picture(tmp_path, capsys):
    pipeline = save_pipeline(tmp_path / "pipeline")
    Image.fromarray(PIXELS).save(tmp_path / "init.png")
    command = ["sample", "--pipeline", str(pipeline), "--images_per_class", "2", "--num_steps", "2", "--device", "cpu"]
    picture = ["--image", str(tmp_path / "init.png")]
    grids = {}
    for name, more in (
        ("noise", []),
        ("far", [*picture, "--strength", "1"]),
        ("near", [*picture, "--strength", "0.1"]),
    ):
        assert main([*command, "--output", str(tmp_path / f"{name}.png"), *more]) == 0
        grids[name] = np.asarray(Image.open(tmp_path / f"{name}.png"))
    assert np.array_equal(grids["noise"], grids["far"]) and not np.array_equal(grids["noise"], grids["near"])
    for more, message in (
        (["--image", str(tmp_path / "no.png")], "no.png"),
        ([*picture, "--strength", "0"], "strength=0"),
        (["--strength", "0.3"], "does nothing without image"),
    ):
        try:
            status = main([*command, "--output", str(tmp_path / "x.png"), *more])
        except SystemExit as stop:
            status = stop.code
        assert status == 2 and message in capsys.readouterr().err and not (tmp_path / "x.png").exists()
