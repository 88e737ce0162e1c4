"""The pipeline as a user calls it: labels, steps, guidance, generators, outputs, files, and every refusal."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, VQModel
from safetensors.torch import load_file, save_file

import xdlm_image
from xdlm_image import XDLMPipeline, XDLMScheduler, XDLMTransformer2DModel

NAMES = {0: "goldfish, Carassius auratus", 1: "crane", 2: "crane", 3: "tench, Tinca tinca", 4: "T-shirt"}
TINY = {"num_embeds": 17, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}


def make_vqvae(channels: int = 1, **config) -> VQModel:
    torch.manual_seed(1)
    return VQModel(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        **({"num_vq_embeddings": 16, "vq_embed_dim": 4, "lookup_from_codebook": True} | config),
    ).eval()


def make_pipe(num_classes: int | None = 5, k: float = 0.3, channels: int = 1, **pipeline) -> XDLMPipeline:
    """A pipeline with random weights (none zero) on a 3 x 5 grid of 16 codes: images of 6 x 10 pixels."""
    torch.manual_seed(0)
    transformer = XDLMTransformer2DModel(
        sample_size=[3, 5], out_channels=16, num_classes=num_classes, time_conditioning="time", **TINY
    ).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    for embedding in (transformer.token_embed, *transformer.conditioning.children()):
        if isinstance(embedding, torch.nn.Embedding):
            torch.nn.init.normal_(embedding.weight)  # codes and classes must matter
    torch.nn.init.ones_(transformer.norm_out.weight)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.4)
    if num_classes is not None:
        pipeline.setdefault("id2label", {i: name for i, name in NAMES.items() if i < num_classes})
    pipe = XDLMPipeline(transformer, XDLMScheduler(k=k, num_codes=16), make_vqvae(channels), **pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> XDLMPipeline:
    return make_pipe()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipe: XDLMPipeline, *args, seed: int = 0, **kwargs):
    kwargs.setdefault("generator", seeded(seed))
    kwargs.setdefault("output_type", "latent")
    return pipe(*args, **kwargs).images


# --- labels ---------------------------------------------------------------------------------------


def test_label_names(pipe):
    assert pipe.get_label_ids("goldfish") == [0]  # not g, o, l, d...
    assert pipe.get_label_ids(["goldfish, Carassius auratus", "carassius  AURATUS", "tench"]) == [0, 0, 3]
    assert pipe.get_label_ids("t-shirt") == [4]


def test_label_errors_list_what_could_be_meant(pipe):
    with pytest.raises(ValueError, match=r"'crane' fits several.*1: 'crane'; 2: 'crane'"):
        pipe.get_label_ids("crane")
    with pytest.raises(ValueError, match="goldfsh.*nearest.*'goldfish'"):
        pipe.get_label_ids("goldfsh")
    with pytest.raises(
        ValueError, match="'spaceship'.*its classes are .'goldfish, Carassius auratus', 'crane', 'crane'"
    ):
        pipe.get_label_ids("spaceship")
    with pytest.raises(ValueError, match="no id2label"):
        make_pipe(id2label=None).get_label_ids("goldfish")
    with pytest.raises(ValueError, match=r"id2label names classes \[7\]"):
        make_pipe(id2label={7: "no such class"})


@pytest.mark.parametrize(
    "labels",
    ["tench", 3, [3], [["tench"]], ("tench",), torch.tensor(3), torch.tensor([3]), np.int64(3), np.array([3])],
    ids=repr,
)
def test_every_way_to_say_a_class_is_the_same(pipe, labels):
    assert torch.equal(draw(pipe, labels), draw(pipe, 3))
    assert draw(pipe, [0, "tench", 4]).shape == (3, 3, 5)


@pytest.mark.parametrize(
    "labels, message",
    [
        (None, "class_labels=None"),
        ([], "empty"),
        (5, "classes are 0 to 4"),
        (-1, "classes are 0 to 4"),
        ([0, 17], "holds 17"),
        ([0, 1.5], "holds 1.5"),
        (True, "holds True"),
        (torch.tensor([0.0]), "holds 0.0"),
        (torch.tensor(True), "holds True"),
        ([[1], [7]], "holds 7"),
        ("zebra", "no class"),
    ],
    ids=str,
)
def test_bad_labels_are_refused_before_any_work(pipe, labels, message):
    pipe.transformer.forward = None  # any work would fail otherwise
    with pytest.raises(ValueError, match=message):
        pipe(labels)


def test_labels_reach_the_network(pipe):
    assert not torch.equal(draw(pipe, 0), draw(pipe, 3))


def test_unconditional_model():
    pipe = make_pipe(num_classes=None)
    assert draw(pipe, num_images_per_prompt=4).shape == (4, 3, 5)
    with pytest.raises(ValueError, match="unconditional"):
        pipe(0)
    with pytest.raises(ValueError, match="guidance_scale=2: an unconditional model takes 1 only"):
        pipe(guidance_scale=2)

    def guide(pipe, i, t, given):
        pipe._guidance_scale = 3.0
        return given

    with pytest.raises(ValueError, match="guidance_scale=3.0: an unconditional model takes 1 only"):
        pipe(num_steps=2, callback_on_step_end=guide)


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, steps",
    [
        ({}, 8),
        ({"num_steps": 3}, 3),
        ({"num_inference_steps": 5}, 5),
        ({"num_steps": torch.tensor(4), "num_inference_steps": 4}, 4),
    ],
    ids=str,
)
def test_num_steps_and_num_inference_steps_are_one_argument(pipe, arguments, steps):
    seen = []
    callback = lambda pipe, i, t, kwargs: seen.append((i, float(t))) or kwargs
    draw(pipe, 0, callback_on_step_end=callback, **arguments)
    assert [i for i, _ in seen] == list(range(steps)) and pipe.num_timesteps == steps
    np.testing.assert_allclose([t for _, t in seen], 1 - np.arange(steps) / steps)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_steps": 8, "num_inference_steps": 9},
        {"num_steps": 0},
        {"num_inference_steps": 2.5},
        {"num_steps": torch.tensor(2.5)},
        {"num_steps": True},
        {"num_steps": 2, "num_inference_steps": 2.0},
    ],
    ids=str,
)
def test_bad_step_counts(pipe, arguments):
    with pytest.raises(ValueError, match="num_(inference_)?steps="):
        pipe(0, **arguments)


@pytest.mark.parametrize("k", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_k_and_step_count_ends_in_codes(k, steps):
    codes = draw(make_pipe(k=k), [0, 1, 2, 3], num_steps=steps)
    assert codes.dtype == torch.int64 and codes.shape == (4, 3, 5)
    assert codes.min() >= 0 and codes.max() < 16


def test_temperature_reaches_the_scheduler(pipe):
    cold = draw(pipe, [0] * 30, temperature=1e-4, num_steps=1, latents=torch.full((30, 3, 5), 16))
    assert (cold == cold[0]).all()  # argmax of the same masks
    assert not torch.equal(cold, draw(pipe, [0] * 30, num_steps=1, latents=torch.full((30, 3, 5), 16)))


# --- guidance -------------------------------------------------------------------------------------


def test_guidance_is_the_formula_in_float32(pipe, monkeypatch):
    labels, scale, seen = torch.tensor([0, 3]), 2.5, []
    step = pipe.scheduler.step

    def spy(logits, t, codes, **kwargs):
        seen.append((logits, t, codes))
        return step(logits, t, codes, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", spy)
    draw(pipe, labels, guidance_scale=scale, num_steps=3)
    assert len(seen) == 3
    for logits, t, codes in seen:
        assert codes.shape == (2, 3, 5)  # the grid's own shape, which an order may go over
        codes, logits = codes.flatten(1), logits.flatten(1, 2)
        cond = pipe.transformer(codes, timestep=t, class_labels=labels).sample
        uncond = pipe.transformer(codes, timestep=t, class_labels=torch.tensor([5, 5])).sample
        torch.testing.assert_close(logits, uncond + scale * (cond - uncond), atol=1e-5, rtol=1e-5)
    seen.clear()
    draw(pipe.to(dtype=torch.bfloat16), labels, guidance_scale=scale, num_steps=1)
    assert seen[0][0].dtype == torch.float32


def test_guidance_costs_a_doubled_batch_only_where_it_is_used(pipe, monkeypatch):
    batches, forward = [], pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda z, **kw: batches.append(len(z)) or forward(z, **kw))

    def guide_late(pipe, i, t, kwargs):
        pipe._guidance_scale = 1.0 if i else 3.0  # a schedule: the second step only
        return kwargs

    draw(pipe, [0, 1], num_steps=3)
    draw(pipe, [0, 1], num_steps=3, callback_on_step_end=guide_late)
    assert batches == [2, 2, 2, 2, 4, 2]


def test_guidance_needs_a_trained_null_class(tmp_path):
    def guide(pipe, i, t, given):
        pipe._guidance_scale = 3.0
        return given

    with pytest.raises(ValueError, match="guidance_scale=3.0: this model was trained without its null class"):
        make_pipe(supports_guidance=False)([0], num_steps=2, output_type="latent", callback_on_step_end=guide)
    make_pipe(supports_guidance=False).save_pretrained(tmp_path)
    pipe = XDLMPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="null class"):
        pipe(0, guidance_scale=2.0)


# --- randomness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_an_image_with_its_own_generator_is_the_same_in_any_batch(pipe, guidance_scale):
    labels = [0, 3, 3, 1, 4]
    together = draw(pipe, labels, generator=[seeded(i) for i in range(5)], guidance_scale=guidance_scale)
    alone = [draw(pipe, y, generator=seeded(i), guidance_scale=guidance_scale)[0] for i, y in enumerate(labels)]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.equal(together[1], together[2])


def test_the_global_generator_is_neither_read_nor_moved(pipe):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    a = draw(pipe, [0, 1])
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(6)
    assert torch.equal(a, draw(pipe, [0, 1]))
    assert not torch.equal(a, draw(pipe, [0, 1], seed=1))


def test_generator_lists_have_one_an_image(pipe):
    generators = [seeded(i) for i in range(4)]
    assert draw(pipe, [0, 1], num_images_per_prompt=2, generator=generators).shape == (4, 3, 5)
    with pytest.raises(ValueError, match="list of 4 for 2 images"):
        pipe([0, 1], generator=generators)


def test_images_of_a_label_stand_together(pipe):
    generators = lambda: [seeded(i) for i in range(6)]
    a = draw(pipe, [0, 3], num_images_per_prompt=np.int64(3), num_steps=np.int64(8), generator=generators())
    assert torch.equal(a, draw(pipe, [0, 0, 0, 3, 3, 3], generator=generators()))


def test_own_latents(pipe):
    start = torch.full((2, 3, 5), 16)
    before = start.clone()
    a, b = (draw(pipe, [0, 1], latents=start, seed=s) for s in (0, 0))
    assert torch.equal(a, b) and torch.equal(start, before)
    others = [draw(pipe, [0, 1], latents=torch.full_like(start, code)) for code in range(16)]
    assert not all(torch.equal(a, other) for other in others)  # what it starts from reaches the images
    for bad, message in (
        (start[:1], "shape"),
        (start.flatten(1), "shape"),
        (start.float(), "float32"),
        (start + 1, r"from 17 to 17.*\[0, 17\)"),
        (start - 17, "from -1"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe([0, 1], latents=bad)


# --- outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_output_types_agree(channels, mode):
    pipe = make_pipe(channels=channels)
    codes = draw(pipe, [0, 1])
    arrays = draw(pipe, [0, 1], output_type="np")
    tensors = draw(pipe, [0, 1], output_type="pt")
    pictures = draw(pipe, [0, 1], output_type="pil")
    assert arrays.shape == (2, 6, 10, channels) and arrays.dtype == np.float32
    assert arrays.min() >= 0 and arrays.max() <= 1 and arrays.std() > 0.01
    np.testing.assert_array_equal(tensors.permute(0, 2, 3, 1).numpy(), arrays)
    assert [p.mode for p in pictures] == [mode] * 2
    rounded = np.rint(arrays * 255).astype(np.uint8)  # to nearest, not down
    np.testing.assert_array_equal(np.stack([np.array(p).reshape(6, 10, channels) for p in pictures]), rounded)
    vectors = pipe.vqvae.quantize.embedding(codes).permute(0, 3, 1, 2)  # (B, d, h, w)
    decoded = pipe.vqvae.decoder(pipe.vqvae.post_quant_conv(vectors))
    torch.testing.assert_close(tensors, (decoded / 2 + 0.5).clamp(0, 1))


def test_return_dict(pipe):
    (images,) = pipe(0, generator=seeded(0), output_type="latent", return_dict=False)
    assert torch.equal(images, draw(pipe, 0))


def test_a_vqvae_that_decodes_vectors_only_gives_the_same_images(pipe):
    expected = draw(pipe, [0, 1], output_type="np")
    other = make_vqvae(lookup_from_codebook=False)
    pipe.vqvae = other
    np.testing.assert_array_equal(draw(pipe, [0, 1], output_type="np"), expected)
    assert other.config.lookup_from_codebook is False  # components are not changed


def test_masks_are_never_decoded(pipe):
    def stop(pipe, i, t, kwargs):
        pipe._interrupt = True
        return kwargs

    codes = draw(pipe, 0, num_steps=64, callback_on_step_end=stop)
    assert (codes == 16).any() and pipe.interrupt
    with pytest.raises(ValueError, match="masks are left"):
        pipe(0, num_steps=64, generator=seeded(0), callback_on_step_end=stop)
    draw(pipe, 0, output_type="np")  # the next call starts afresh
    for latents, message in ((codes.flatten(1), r"shape \(1, 15\)"), (codes.float(), "float32")):
        with pytest.raises(ValueError, match=rf"latents has .*{message}.*: expected \(batch, rows, columns\), int64"):
            pipe.decode_latents(latents)


# --- callbacks ------------------------------------------------------------------------------------


def test_callback_replaces_latents(pipe):
    def blacken(pipe, i, t, kwargs):
        assert set(kwargs) == {"latents"} and kwargs["latents"].shape == (2, 3, 5)
        if i == pipe.num_timesteps - 1:
            kwargs["latents"] = torch.full_like(kwargs["latents"], 9)
        return kwargs

    assert (draw(pipe, [0, 1], callback_on_step_end=blacken) == 9).all()
    nothing = lambda pipe, i, t, kwargs: kwargs
    assert torch.equal(draw(pipe, 0, callback_on_step_end=nothing), draw(pipe, 0))
    assert torch.equal(
        draw(pipe, 0, callback_on_step_end=nothing, callback_on_step_end_tensor_inputs=[]), draw(pipe, 0)
    )
    with pytest.raises(ValueError, match="callback_on_step_end=5: must be a function"):
        draw(pipe, 0, callback_on_step_end=5)
    with pytest.raises(ValueError, match="latents holds ids"):
        draw(pipe, 0, callback_on_step_end=lambda *a: {"latents": torch.full((1, 3, 5), 99)})
    for code in (-1, 600):
        with pytest.raises(ValueError, match=f"latents holds ids from {code} to {code}"):
            draw(pipe, 0, num_steps=1, callback_on_step_end=lambda *a, c=code: a[3]["latents"].fill_(c) is None or a[3])


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"guidance_scale": float("nan")},
        {"guidance_scale": "strong"},
        {"num_images_per_prompt": 0},
        {"output_type": "jpeg"},
        {"callback_on_step_end_tensor_inputs": ["logits"]},
        {"callback_on_step_end_tensor_inputs": None},
        {"callback_on_step_end_tensor_inputs": "latents"},
        {"timesteps": 0.5},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_named(pipe, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        pipe(0, **arguments)


def test_parts_that_do_not_belong_together(pipe):
    pipe.scheduler = XDLMScheduler(num_codes=32)
    with pytest.raises(ValueError, match="transformer takes 17 ids"):
        pipe(0)
    pipe.scheduler = XDLMScheduler(num_codes=16)
    pipe.vqvae = make_vqvae(num_vq_embeddings=8)
    with pytest.raises(ValueError, match="vqvae has 8"):
        pipe(0)


# --- files ----------------------------------------------------------------------------------------


def test_save_and_load_give_the_same_images(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    loaded = XDLMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.id2label == NAMES and all(isinstance(key, int) for key in loaded.id2label)
    assert loaded.scheduler.process == pipe.scheduler.process
    a, b = (draw(p, ["goldfish", 3], guidance_scale=1.5, output_type="np") for p in (pipe, loaded))
    np.testing.assert_array_equal(a, b)
    loaded.save_pretrained(tmp_path / "again")
    first, again = (json.loads((tmp_path / d / "model_index.json").read_text()) for d in (".", "again"))
    assert again == first | {"_name_or_path": str(tmp_path)}


@pytest.mark.parametrize("part", ["transformer", "vqvae"])
def test_damaged_weights_are_refused(pipe, tmp_path, part):
    pipe.save_pretrained(tmp_path)
    weights = tmp_path / part / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    lost = sorted(whole)[3]
    save_file({k: v for k, v in whole.items() if k != lost}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{part}: 1 tensors .*{lost}"):
        XDLMPipeline.from_pretrained(tmp_path)
    save_file(whole, weights, metadata={"format": "pt"})
    XDLMPipeline.from_pretrained(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match="diffusion_pytorch_model.safetensors"):
        XDLMPipeline.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(OSError, match=f"diffusion_pytorch_model.safetensors .*{part}"):
        XDLMPipeline.from_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path / "pickles", safe_serialization=False)
    weights = tmp_path / "pickles" / part / "diffusion_pytorch_model.bin"
    torch.save({k: v for k, v in whole.items() if k != lost}, weights)
    with pytest.raises(ValueError, match=f"{part}: 1 tensors .*{lost}"):
        XDLMPipeline.from_pretrained(tmp_path / "pickles")
    torch.save(whole, weights)
    XDLMPipeline.from_pretrained(tmp_path / "pickles")


def test_the_package_is_lazy():
    script = "import sys, xdlm_image as x; print(x.__version__, 'torch' in sys.modules, 'XDLMPipeline' in dir(x))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [xdlm_image.__version__, "False", "True"]
    assert issubclass(xdlm_image.XDLMPipeline, DiffusionPipeline)
    with pytest.raises(AttributeError, match="no attribute 'XDLMPipelin'"):
        _ = xdlm_image.XDLMPipelin


def test_a_saved_pipeline_loads_in_a_fresh_process(tmp_path) -> None:
    """The README's two lines: nothing but the name of the pipeline is imported."""
    make_pipe().save_pretrained(tmp_path)
    program = f"from xdlm_image import XDLMPipeline; XDLMPipeline.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_parts_and_arguments_of_other_kinds_are_named(pipe):
    def refuses(message, **arguments):
        with pytest.raises(ValueError, match=message):
            pipe(0, num_steps=1, **arguments)

    refuses("generator holds 42: give torch.Generator", generator=42)
    refuses("generator holds 1: give torch.Generator", generator=[1])
    refuses("callback_on_step_end returned a NoneType", callback_on_step_end=lambda *_: None)
    refuses("num_images_per_prompt=True: must be a whole number", num_images_per_prompt=True)
    refuses("latents is a list: give a tensor", latents=[1])
    refuses("temperature=1e-40: must be at least 1e-6", temperature=1e-40)
    assert len(pipe(0, num_steps=1, temperature=np.float32(0.5)).images) == 1
    for part, message in (("scheduler", "must be an XDLMScheduler"), ("transformer", "must be an XDLMTransformer2D")):
        own = getattr(pipe, part)
        try:
            setattr(pipe, part, DDIMScheduler() if part == "scheduler" else torch.nn.Linear(1, 1))
            refuses(message)
        finally:
            setattr(pipe, part, own)
    with pytest.raises(ValueError, match="scheduler is a DDIMScheduler: must be"):
        XDLMPipeline(pipe.transformer, DDIMScheduler(), pipe.vqvae)
    with pytest.raises(ValueError, match="transformer is a VQModel: must be"):
        XDLMPipeline(pipe.vqvae, pipe.scheduler, pipe.transformer)
    with pytest.raises(ValueError, match="k='x': must be a number"):
        XDLMScheduler(k="x")
    with pytest.raises(ValueError, match=r"time_grid=\['x'\]: must be one of"):
        XDLMScheduler(time_grid=["x"])
    with pytest.raises(ValueError, match="supports_guidance='false': must be True or False"):
        make_pipe(supports_guidance="false")
