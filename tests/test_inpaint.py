"""XDLM within a picture: what masks mean, what is kept, what the rest is drawn from, and every refusal."""

import inspect

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from PIL import Image
from test_hub_export import run
from test_pipeline import make_pipe, seeded
from tiny_parts import save_pipeline

from xdlm_image import XDLMImg2ImgPipeline, XDLMInpaintPipeline, XDLMOrderedScheduler, XDLMPipeline
from xdlm_image.cli import main
from xdlm_image.pipelines.init_images import preprocess
from xdlm_image.pipelines.mask_images import fit_masks, read_masks, sizes

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)  # the pipeline's size: 3 x 5 cells
MASK = np.zeros((6, 10), np.uint8)
MASK[2:4, 4:10] = 255  # the middle row's last three cells
PAINTED = torch.zeros(3, 5, dtype=torch.bool)
PAINTED[1, 2:] = True


def make_inpaint(channels: int = 3, **arguments) -> XDLMInpaintPipeline:
    pipe = XDLMInpaintPipeline.from_pipe(make_pipe(channels=channels, **arguments))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> XDLMInpaintPipeline:
    return make_inpaint()


def draw(pipe, *args, seed: int = 0, **kwargs):
    return pipe(*args, **{"generator": seeded(seed), "output_type": "latent", **kwargs}).images


def cells(mask, picture: tuple[int, int] | None = None, height: int = 6, width: int = 10) -> torch.Tensor:
    """(B, 3, 5): what the pipeline would paint of pictures of that size; None is the mask's."""
    masks = read_masks(mask)
    size = tuple(masks[0].shape) if picture is None else picture
    return fit_masks(masks, [size], height, width, 3, 5)[1]


# --- what is kept, and what the rest is drawn from ------------------------------------------------


@pytest.mark.parametrize("kind", ["k=0", "k=0.3", "k=1", "confidence"])
def test_kept_codes_are_the_pictures_in_every_state_and_the_rest_is_drawn(kind):
    k = float(kind[2:]) if kind.startswith("k") else 0.3
    pipe = make_inpaint(k=k)
    if not kind.startswith("k"):
        pipe.scheduler = XDLMOrderedScheduler.from_process(pipe.scheduler.process, unmasking=kind)
    codes, states = pipe.encode_images(PIXELS), []
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda z, **kwargs: states.append(z.reshape(-1, 3, 5)) or forward(z, **kwargs)
    images = draw(
        pipe,
        PIXELS,
        MASK,
        0,
        num_steps=4,
        num_images_per_prompt=64,
        callback_on_step_end=lambda p, i, t, given: states.append(given["latents"].clone()) or given,
    )
    assert len(states) == 8
    for state in [*states, images]:
        assert torch.equal(state[:, ~PAINTED], codes[:, ~PAINTED].expand(64, -1))
    assert (images[:, PAINTED] != codes[:, PAINTED]).float().mean() > 0.5 and images.max() < 16
    assert len(images.flatten(1).unique(dim=0)) > 32


@pytest.mark.parametrize(
    "sampler",
    [
        {},
        {"guidance_scale": 2.0},
        {"guidance_scale": (1.0, 3.0), "temperature": (1, 0)},
        {"guidance_scale": 3.0, "guidance_interval": (0.2, 0.8)},
    ],
)
def test_a_white_mask_is_image_to_image_and_at_strength_1_the_plain_pipeline(pipe, sampler):
    white = np.ones((6, 10), bool)
    for other in (XDLMPipeline, XDLMImg2ImgPipeline):
        plain = other.from_pipe(pipe)
        plain.set_progress_bar_config(disable=True)
        given, more = ((), {}) if other is XDLMPipeline else ((PIXELS,), {"strength": 0.4})
        expected = draw(plain, *given, class_labels=["tench", 0], num_steps=4, seed=3, **sampler, **more)
        assert torch.equal(draw(pipe, PIXELS, white, ["tench", 0], num_steps=4, seed=3, **sampler, **more), expected)


def test_little_strength_keeps_the_codes_under_the_mask_too(pipe):
    codes = pipe.encode_images(PIXELS)
    kept = [
        (draw(pipe, PIXELS, MASK, 0, s, num_images_per_prompt=64) == codes)[:, PAINTED].float().mean().item()
        for s in (1e-6, 0.3, 1)
    ]
    assert kept[0] == 1 and kept[0] > kept[1] > kept[2]


def test_one_cell_is_drawn_from_what_the_network_says_of_the_kept_codes():
    """k = 0, one step: p(x_i | the kept codes), label and guidance included."""
    pipe, number = make_inpaint(k=0.0), 4000
    for block in pipe.transformer.transformer_blocks:
        block.attn.to_v.weight.data *= 8  # what stands elsewhere must matter
    mask = np.zeros((6, 10), np.uint8)
    mask[3, 5] = 255
    z = pipe.encode_images(PIXELS)
    z[0, 1, 2] = pipe.scheduler.process.mask

    def predict(z: torch.Tensor) -> torch.Tensor:
        cond, uncond = (
            pipe.transformer(z.flatten(1), timestep=torch.ones(()), class_labels=torch.tensor([i])).sample[0, 7]
            for i in (3, 5)
        )
        return (uncond + 1.5 * (cond - uncond)).double().softmax(-1)

    p, unaware = predict(z), predict(torch.full_like(z, pipe.scheduler.process.mask))
    codes = draw(pipe, PIXELS, mask, 3, num_steps=1, num_images_per_prompt=number, guidance_scale=1.5)[:, 1, 2]
    share = codes.bincount(minlength=16) / number
    margin = 5 * (p * (1 - p) / number).sqrt() + 1e-3
    assert ((share - p).abs() < margin).all() and ((share - unaware).abs() > 2 * margin).any()


@pytest.mark.parametrize("k", [0.0, 0.1, 0.5])
def test_cells_painted_together_follow_the_joint_distribution_given_the_kept_codes(k):
    """Pictures of two kinds, of which the kept codes tell: nearly all 3 or nearly all 7; its denoiser is exact.

    Beforehand 95 % are of 7s; given the kept codes, nearly all of 3s. The pair of painted cells has correlated codes.
    """
    pipe, number = make_inpaint(k=k), 4000
    prior = torch.tensor([0.05, 0.95], dtype=torch.float64)
    emission = torch.full((2, 16), 0.6 / 16, dtype=torch.float64)  # p(x_i | kind)
    emission[0, 3] += 0.4
    emission[1, 7] += 0.4
    x = torch.arange(15) % 16
    x[[0, 4, 8]], x[[7]] = 3, 0  # three 3s: likelihood ratio 11.7 each

    def denoise(z, timestep, **kwargs):
        alpha = 1 - timestep.double() if k else torch.ones(())  # k = 0: what is visible is right at all times
        seen = torch.cat(
            [alpha * emission + (1 - alpha) * k / 16, torch.ones(2, 1)], dim=1
        )  # (2, 17), mask: says nothing
        terms = seen.log()[:, z]  # (2, B, 15)
        others = prior.log()[:, None, None] + terms.sum(-1, keepdim=True) - terms  # kind and all but i
        logits = (others.softmax(0)[..., None] * emission[:, None, None]).sum(0).log()  # (B, 15, 16)
        return (logits,)

    pipe._encode = lambda pixels: x.reshape(1, 3, 5)
    pipe.transformer.forward = denoise
    mask = np.zeros((6, 10), np.uint8)
    mask[3, 3:5] = 255
    painted = draw(pipe, PIXELS, mask, 0, num_steps=40, num_images_per_prompt=number).flatten(1)[:, [6, 7]]

    known = [i for i in range(15) if i not in (6, 7)]
    kinds = (prior.log() + emission.log()[:, x[known]].sum(1)).softmax(0)
    joint = torch.einsum("k,ka,kb->ab", kinds, emission, emission)
    share = torch.histogramdd(painted.double(), bins=[16, 16], range=[0.0, 16.0, 0.0, 16.0]).hist / number
    unaware = torch.einsum("k,ka,kb->ab", prior, emission, emission)
    near, far = ((share - p).abs()[[3, 3, 7, 7], [3, 7, 3, 7]].sum() for p in (joint, unaware))
    assert near < (0.04 if k == 0 else 0.08) and far > 5 * near


def test_what_a_callback_returns_is_taken(pipe):
    seen = []
    codes = draw(
        pipe,
        PIXELS,
        MASK,
        0,
        num_steps=2,
        callback_on_step_end=lambda p, i, t, given: seen.append(set(given)) or {"latents": torch.full((1, 3, 5), 4)},
        callback_on_step_end_tensor_inputs=[],
    )
    assert seen == [set(), set()] and (codes == 4).all()
    with pytest.raises(ValueError, match="callback_on_step_end returned a NoneType"):
        pipe(PIXELS, MASK, 0, callback_on_step_end=lambda *_: None)
    checks, check = [], pipe._check_latents
    pipe._check_latents = lambda *given: checks.append(given) or check(*given)
    draw(pipe, PIXELS, MASK, 0, num_steps=3)
    assert len(checks) == 1  # what it begins at; after a step nobody is waited for without a callback
    with pytest.raises(ValueError, match="latents holds ids from 99 to 99"):
        draw(pipe, PIXELS, MASK, 0, callback_on_step_end=lambda p, i, t, k: k["latents"].fill_(99) is None or k)


# --- masks ----------------------------------------------------------------------------------------


def test_a_cell_is_painted_if_any_of_its_pixels_is():
    assert torch.equal(cells(MASK)[0], PAINTED)
    for row, column in ((0, 0), (3, 5), (5, 9)):
        mask = np.zeros((6, 10), bool)
        mask[row, column] = True
        assert cells(mask)[0].nonzero().tolist() == [[row // 2, column // 2]]
        large = np.zeros((600, 1000), bool)
        large[100 * row + 50, 100 * column + 99] = True  # one pixel of 600,000
        assert cells(large, (60, 100))[0].nonzero().tolist() == [[row // 2, column // 2]]
    small = np.zeros((3, 5), np.float32)
    small[1, 2:] = 0.5
    assert torch.equal(cells(small, (300, 500))[0], PAINTED)


@pytest.mark.parametrize("size", [(60, 100), (60, 130), (90, 100), (4, 30), (7, 11)])
def test_a_mask_is_scaled_and_cut_as_its_picture(size):
    """Drawn white where the mask is: the cells that are bright in the picture are those that are painted."""
    height, width = size
    mask = np.zeros(size, np.uint8)
    mask[: height // 2 + 1, width // 2 :] = 255
    white, painted = fit_masks(read_masks(mask), [size], 6, 10, 3, 5)
    picture = preprocess(mask, 6, 10, 1)[0] > 0
    assert not (picture & ~white[0]).any() and (white[0] ^ picture).float().mean() < 0.2
    assert torch.equal(painted[0], white[0, 0].unflatten(0, (3, 2)).unflatten(2, (5, 2)).any(3).any(1))


def test_one_mask_in_every_form_is_the_same(pipe):
    floats = MASK.astype(np.float32) / 255
    tensor = torch.from_numpy(MASK > 0)
    picture = Image.fromarray(MASK)
    forms = [
        *(MASK, floats, MASK > 0, MASK[None, :, :, None], [MASK], np.stack([MASK] * 3, -1), 0.9 * floats),
        *(tensor, tensor[None], tensor[None, None], tensor.float(), [tensor]),
        *(picture, picture.convert("1"), picture.convert("RGB"), picture.convert("P"), picture.convert("RGBA")),
        picture.resize((40, 24), Image.Resampling.NEAREST),
    ]
    expected = draw(pipe, PIXELS, MASK, 0)
    for form in forms:
        assert torch.equal(cells(form, (6, 10))[0], PAINTED) and torch.equal(draw(pipe, PIXELS, form, 0), expected)


def test_turned_pictures_have_the_size_that_they_are_seen_in(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "turned.png", exif=exif)
    turned = Image.open(tmp_path / "turned.png")
    assert sizes([turned, Image.fromarray(PIXELS)]) == [(10, 6), (6, 10)]
    assert sizes(np.zeros((2, 4, 7, 3))) == sizes(torch.zeros(2, 1, 4, 7)) == [(4, 7)] * 2
    assert sizes(np.zeros((4, 7))) == sizes([torch.zeros(3, 4, 7)]) == sizes(np.zeros((4, 7, 1))) == [(4, 7)]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((6, 10)), "mask_image keeps everything"),
        (MASK // 255, "mask_image keeps everything.*255 as uint8"),
        ([MASK, MASK * 0], r"mask_image\[1\] keeps everything"),
        ([], "mask_image is empty"),
        (None, "mask_image is a NoneType"),
        ("mask.png", "mask_image is a str"),
        (np.full((6, 10), 255.0), "mask_image holds values from 255 to 255: .*divide by 255"),
        (np.full((6, 10), np.nan), "nan"),
        (np.ones((6, 10), np.int64), "mask_image is an array of int64"),
        (np.ones((2, 6, 10)), r"mask_image has shape \(2, 6, 10\)"),
        (torch.eye(3)[:, :, None, None].expand(3, 3, 6, 10).flatten(0, 1)[:3], "mask_image has colours.*B, 1, H, W"),
        (np.ones((10, 6)), "mask_image has 6 x 10 pixels, its picture 10 x 6: .*proportions .*exif_transpose"),
        (np.ones((6, 12)), "mask_image has 12 x 6 pixels, its picture 10 x 6"),
        (np.ones((3, 6, 10, 1)), "image holds 2 pictures, mask_image 3 masks, class_labels 1 labels: give as many"),
        (Image.new("RGBA", (10, 6), (255, 255, 255, 0)), "mask_image is transparent"),
        (Image.new("La", (10, 6)), "mask_image is transparent"),
        (Image.new("F", (10, 6)), "mask_image holds floating-point"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_mask(pipe, mask, message):
    pipe.vqvae.forward = pipe.vqvae.encode = None  # any work would fail otherwise
    with pytest.raises(ValueError, match=message):
        pipe([PIXELS, PIXELS], mask, 0)


def test_keep_pixels_is_no_word(pipe):
    with pytest.raises(ValueError, match="keep_pixels='no': must be True or False"):
        pipe(PIXELS, np.ones((6, 10)), 0, keep_pixels="no")
    for keep in (True, False):
        images = [draw(pipe, PIXELS, MASK, 0, output_type="np", keep_pixels=kind(keep)) for kind in (bool, np.bool_)]
        assert np.array_equal(*images)


def test_a_mask_of_16_bits_with_a_transparent_grey_is_refused(tmp_path):
    Image.fromarray(np.full((6, 10), 2000, np.uint16)).save(tmp_path / "deep.png", transparency=2000)
    with pytest.raises(ValueError, match="mask_image is transparent"):
        read_masks(Image.open(tmp_path / "deep.png"))


def test_white_that_is_cut_off_paints_nothing(pipe):
    wide = np.zeros((6, 30), np.uint8)
    wide[:, :9] = 255
    with pytest.raises(ValueError, match="keeps everything: .*middle part"):
        pipe(np.zeros((6, 30)), wide, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0}, "strength=0 changes nothing"),
        ({"strength": 1.5}, "strength=1.5"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"temperature": 0}, "temperature=0"),
        ({"class_labels": 9}, "classes are 0 to 4"),
        ({"output_type": "jpeg"}, "output_type='jpeg'"),
        ({"generator": [seeded(0), seeded(1)]}, "generator is a list of 2 for 1 images"),
        ({"generator": 42}, "generator holds 42"),
        ({"generator": [42]}, "generator holds 42"),
    ],
)
def test_other_arguments_are_refused_before_any_work(pipe, arguments, message):
    pipe.vqvae.forward = pipe.vqvae.encode = None
    with pytest.raises(ValueError, match=message):
        pipe(PIXELS, MASK, **{"class_labels": 0, **arguments})


# --- batches --------------------------------------------------------------------------------------


def test_pictures_masks_and_labels_pair_up(pipe):
    two, masks = np.stack([PIXELS, 255 - PIXELS]), [MASK, np.roll(MASK, 2, 0)]
    codes = pipe.encode_images(two)
    several = draw(pipe, two, masks, [0, 3], num_images_per_prompt=np.int64(2))
    for i, image in enumerate(several):
        kept = ~cells(masks[i // 2])[0]
        assert torch.equal(image[kept], codes[i // 2][kept])
    assert draw(pipe, PIXELS, masks, 0).shape == (2, 3, 5)
    assert draw(pipe, PIXELS, MASK, [0, 3, 4]).shape == (3, 3, 5)
    assert draw(pipe, two, MASK, 0).shape == (2, 3, 5)
    assert draw(make_inpaint(num_classes=None), two, masks, num_images_per_prompt=2).shape == (4, 3, 5)


def test_an_image_with_its_own_generator_depends_on_nothing_else(pipe):
    two, masks = np.stack([PIXELS, 255 - PIXELS]), [MASK, np.roll(MASK, 2, 0)]
    both = draw(pipe, two, masks, [0, 3], generator=[seeded(1), seeded(2)])
    assert torch.equal(both[1:], draw(pipe, two[1], masks[1], 3, generator=[seeded(2)]))
    assert torch.equal(both, draw(pipe, two, masks, [0, 3], generator=[seeded(1), seeded(2)]))


# --- pictures, files, the verb --------------------------------------------------------------------


def test_own_pixels_lie_over_the_result_where_the_mask_is_black(pipe):
    mask = MASK.copy()
    mask[2, 4] = 0  # kept pixel of a painted cell
    black = torch.from_numpy(mask == 0)
    own = torch.from_numpy(PIXELS).movedim(2, 0) / 255
    pasted, bare = (draw(pipe, PIXELS, mask, 0, output_type="pt", keep_pixels=keep)[0] for keep in (True, False))
    assert torch.allclose(pasted[:, black], own[:, black], atol=1e-6)
    assert torch.allclose(pasted[:, ~black], bare[:, ~black], atol=1e-6) and not torch.allclose(bare, pasted, atol=0.01)
    codes = draw(pipe, PIXELS, mask, 0)
    assert torch.allclose(bare, (pipe.decode_latents(codes)[0] / 2 + 0.5).clamp(0, 1), atol=1e-6)
    picture = np.asarray(draw(pipe, Image.fromarray(PIXELS), mask, 0, output_type="pil")[0])
    assert np.array_equal(picture[mask == 0], PIXELS[mask == 0])
    array = pipe(PIXELS, mask, 0, output_type="np", generator=seeded(0), return_dict=False)[0]
    assert array.shape == (1, 6, 10, 3) and np.allclose(array[0], pasted.movedim(0, 2).numpy(), atol=1e-6)


def test_grey_tokenizers_take_colour_pictures():
    picture = make_inpaint(1)(Image.fromarray(PIXELS), MASK, "tench").images[0]
    assert picture.size == (10, 6) and picture.mode == "L"


def test_it_loads_the_same_folder_and_travels(pipe, tmp_path):
    XDLMPipeline.from_pipe(pipe).save_pretrained(tmp_path / "plain")
    loaded = XDLMInpaintPipeline.from_pretrained(tmp_path / "plain")
    loaded.set_progress_bar_config(disable=True)
    expected = draw(pipe, PIXELS, MASK, "tench")
    assert torch.equal(draw(loaded, PIXELS, MASK, "tench"), expected)
    loaded.save_for_hub(tmp_path / "hub", card="# A card")
    program = f"""
import numpy as np
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(tmp_path / "hub")!r}, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
pixels = np.array({PIXELS.tolist()}, dtype=np.uint8)
mask = np.array({MASK.tolist()}, dtype=np.uint8)
generator = torch.Generator().manual_seed(0)
codes = pipe(pixels, mask, "tench", generator=generator, output_type="latent").images
found.update(kind=type(pipe).__name__, codes=codes.tolist())
"""
    found, _ = run(program, tmp_path, clean=True)
    assert found == {"kind": "XDLMInpaintPipeline", "codes": expected.tolist()}


def test_arguments_stand_as_in_the_pipelines_beside_it():
    names = [list(inspect.signature(c.__call__).parameters) for c in (XDLMInpaintPipeline, XDLMImg2ImgPipeline)]
    assert [name for name in names[0] if name not in ("mask_image", "keep_pixels")] == names[1]


def test_offloaded_parts_draw_the_same(pipe):
    expected = draw(pipe, PIXELS, MASK, 0)
    cpu_offload(pipe.vqvae, torch.device("cpu"))
    assert pipe.vqvae.quantize.embedding.weight.device.type == "meta"
    assert torch.equal(draw(pipe, PIXELS, MASK, 0), expected)


def test_the_verb_sample_turns_a_photograph_once(tmp_path):
    """A tall picture that its file holds lying down, as phones write them; the mask is made for how it is seen."""
    pipeline = save_pipeline(tmp_path / "pipeline")
    height, width = XDLMPipeline.from_pretrained(pipeline).image_size
    upright = np.random.default_rng(1).integers(0, 256, (2 * height, width), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "photo.png", exif=exif)
    mask = np.zeros_like(upright)
    mask[:, width // 2 :] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    command = ["sample", "--pipeline", str(pipeline), "--images_per_class", "1", "--num_steps", "2", "--device", "cpu"]
    command += ["--output", str(tmp_path / "grid.png"), "--images_dir", str(tmp_path / "images")]
    assert main([*command, "--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png")]) == 0
    files = sorted((tmp_path / "images").rglob("*.png"))
    middle = upright[height // 2 : height // 2 + height]
    for file in files:
        assert np.array_equal(np.asarray(Image.open(file))[:, : width // 2, 0], middle[:, : width // 2])
    assert files


def test_the_verb_sample_paints_within_a_picture(tmp_path, capsys):
    pipeline = save_pipeline(tmp_path / "pipeline")
    height, width = XDLMPipeline.from_pretrained(pipeline).image_size
    pixels = np.random.default_rng(1).integers(0, 256, (height, width), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :] = 255
    for name, picture in (("init", pixels), ("mask", mask), ("black", 0 * mask)):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    command = ["sample", "--pipeline", str(pipeline), "--images_per_class", "1", "--num_steps", "2", "--device", "cpu"]
    command += ["--output", str(tmp_path / "grid.png"), "--images_dir", str(tmp_path / "images")]
    image, masked = (["--image", str(tmp_path / "init.png")], ["--mask", str(tmp_path / "mask.png")])
    for more, message in (
        (masked, "mask"),
        ([*image, "--mask", str(tmp_path / "no.png")], "no.png"),
        ([*image, "--mask", str(tmp_path / "black.png")], "keeps everything"),
    ):
        try:
            status = main([*command, *more])
        except SystemExit as stop:
            status = stop.code
        assert status == 2 and message in capsys.readouterr().err and not (tmp_path / "grid.png").exists()
    assert main([*command, *image, *masked, "--trace"]) == 0
    files = sorted((tmp_path / "images").rglob("*.png"))
    for file in files:
        picture = np.asarray(Image.open(file))
        assert np.array_equal(picture[mask == 0, 0], pixels[mask == 0])
        assert not np.array_equal(picture[mask > 0, 0], pixels[mask > 0])
    assert files and (tmp_path / "grid.png").exists() and (tmp_path / "grid.trace.png").exists()
