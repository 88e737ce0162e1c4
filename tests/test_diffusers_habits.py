"""What users of diffusers do with any pipeline, done with ours: precision, files, parts, compilation, memory."""

import json
import shutil
import types

import numpy as np
import pytest
import torch
from diffusers import VQModel
from diffusers.models.attention_dispatch import attention_backend
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

from xdlm_image import XDLMImg2ImgPipeline, XDLMPipeline, XDLMScheduler, XDLMTransformer2DModel
from xdlm_image.pipelines.folder_check import check_all_loaded

CODES, CLASSES = 16, 5


def make_pipe(time_conditioning: str = "time", **pipeline) -> XDLMPipeline:
    """A pipeline on a 3 x 4 grid of 16 codes whose every weight is drawn, so that nothing hides behind a zero."""
    torch.manual_seed(0)
    transformer = XDLMTransformer2DModel(
        sample_size=[3, 4],
        num_embeds=CODES + 1,
        out_channels=CODES,
        num_classes=CLASSES,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        time_conditioning=time_conditioning,
    )
    for parameter in (parameter for parameter in transformer.parameters() if parameter.ndim > 1):
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(transformer.token_embed.weight)  # codes must matter
    vqvae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=CODES,
        lookup_from_codebook=True,
    )
    pipeline.setdefault("id2label", {i: f"class {i}" for i in range(CLASSES)})
    pipe = XDLMPipeline(transformer.eval(), XDLMScheduler(k=0.3, num_codes=CODES), vqvae.eval(), **pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> XDLMPipeline:
    return make_pipe()


def draw(pipe: XDLMPipeline, labels=(0, 3), **kwargs):
    """Codes of two images, the same in every call."""
    arguments = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", "num_inference_steps": 4}
    return pipe(list(labels), **(arguments | kwargs)).images


def network_input(batch: int = 2) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randint(CODES + 1, (batch, 12), generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "class_labels": torch.randint(CLASSES + 1, (batch,), generator=generator),
    }


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.03), (torch.float16, 0.004)], ids=str)
def test_half_precision_predicts_the_same(pipe, tmp_path, dtype, bound):
    """Total variation between what the float32 network and the half one predict, however the half one came to be."""
    expected = pipe.transformer(**network_input()).sample.softmax(-1)
    pipe.save_pretrained(tmp_path)
    loaded = XDLMPipeline.from_pretrained(tmp_path, dtype=dtype)
    for half in (loaded, pipe.to(dtype)):
        assert {part.dtype for part in (half.transformer, half.vqvae)} == {dtype}
        logits = half.transformer(**network_input()).sample
        assert logits.dtype == dtype
        distance = (logits.float().softmax(-1) - expected).abs().sum(-1) / 2  # (B, L)
        assert distance.mean() < bound
        assert half.decode_latents(draw(half)).dtype == draw(half, output_type="pt").dtype == torch.float32
        images = draw(half, output_type="np", guidance_scale=2.0)
        assert images.dtype == np.float32 and np.isfinite(images).all() and images.std() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_reads_half_precision_logits_in_float32(dtype):
    """Temperature and softmax act in float32: rounding the logits is all that half precision costs."""
    scheduler = XDLMScheduler(k=0.3, num_codes=CODES)
    scheduler.set_timesteps(3)
    z = scheduler.prior((64, 12), torch.Generator().manual_seed(0))
    logits = (5 * torch.randn(64, 12, CODES, generator=torch.Generator().manual_seed(1))).to(dtype)
    step = lambda logits: scheduler.step(logits, 1.0, z, torch.Generator().manual_seed(2), temperature=0.7).prev_sample
    assert torch.equal(step(logits), step(logits.float()))


# --- files ----------------------------------------------------------------------------------------


def test_variant_and_shards(pipe, tmp_path):
    pipe.to(torch.float16).save_pretrained(tmp_path, variant="fp16", max_shard_size="10KB")
    files = {file.name for file in (tmp_path / "transformer").glob("*.safetensors")}
    assert len(files) > 2 and all(".fp16-0" in name for name in files)
    loaded = XDLMPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert torch.equal(draw(loaded), draw(pipe))
    with pytest.raises((OSError, ValueError), match="variant|diffusion_pytorch_model"):
        XDLMPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("part", ["transformer", "vqvae"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_tensor_is_looked_for_in_the_file_that_was_loaded(pipe, tmp_path, part, variant, low_cpu_mem_usage):
    """Whole weights of another variant beside it hide nothing, and damaged ones harm nothing."""
    for each in (None, "fp16"):
        pipe.save_pretrained(tmp_path, variant=each)
    names = {None: "diffusion_pytorch_model.safetensors", "fp16": "diffusion_pytorch_model.fp16.safetensors"}
    options = {"variant": variant, "low_cpu_mem_usage": low_cpu_mem_usage}
    asked, other = (tmp_path / part / name for name in (names.pop(variant), *names.values()))
    kept = other.read_bytes()
    for damage in (b"", b"\xff" * 8 + b"{}"):
        other.write_bytes(damage)
        assert torch.equal(draw(XDLMPipeline.from_pretrained(tmp_path, **options)), draw(pipe))
    other.write_bytes(kept)
    whole = load_file(asked)
    lost = sorted(whole)[3]
    save_file({k: v for k, v in whole.items() if k != lost}, asked, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{part}: 1 tensors are not in .*{lost}"):
        XDLMPipeline.from_pretrained(tmp_path, **options)
    if variant:  # a part that has none of it comes from its plain weights
        asked.unlink()
        assert torch.equal(draw(XDLMPipeline.from_pretrained(tmp_path, **options)), draw(pipe))


def test_shards_are_those_of_the_index(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, max_shard_size="10KB")
    index = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    shard = index.parent / json.loads(index.read_text())["weight_map"]["proj_out.weight"]
    shutil.copy(shard, index.parent / "diffusion_pytorch_model-00099-of-00099.safetensors")  # of an earlier saving
    rest = {k: v for k, v in load_file(shard).items() if k != "proj_out.weight"}
    save_file(rest, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="transformer: 1 tensors are not in .*proj_out.weight"):
        XDLMPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)  # where diffusers draws it at random


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"low_cpu_mem_usage": False}], ids=str)
def test_every_way_to_load_gives_the_same_codes(pipe, tmp_path, options):
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(XDLMPipeline.from_pretrained(tmp_path, **options)), draw(pipe))


# --- exchange of parts ----------------------------------------------------------------------------


def test_swapping_the_scheduler(pipe):
    before, times = draw(pipe), []
    pipe.scheduler = XDLMScheduler.from_config(pipe.scheduler.config, time_grid="cosine")
    note = lambda pipe, i, t, kwargs: times.append(float(t)) or kwargs
    after = draw(pipe, callback_on_step_end=note)
    assert pipe.scheduler.process.k == 0.3 and not torch.equal(before, after)
    np.testing.assert_allclose(times, np.cos(np.pi / 2 * np.arange(4) / 4))


def test_a_network_of_fewer_classes_needs_names_of_its_own(pipe, tmp_path):
    config = dict(pipe.transformer.config) | {"num_classes": 3}
    pipe.transformer = XDLMTransformer2DModel.from_config(config).eval()
    message = "id2label names classes .3, 4., the transformer has 3; XDLMPipeline.from_pipe.pipe, id2label="
    saving = (lambda: pipe.save_pretrained(tmp_path / "a"), lambda: pipe.save_for_hub(tmp_path / "b", card="# Mine"))
    for call in (lambda: draw(pipe, [0]), *saving):
        with pytest.raises(ValueError, match=message):
            call()
    assert not list(tmp_path.iterdir())
    named = XDLMPipeline.from_pipe(pipe, id2label={0: "ant"})
    named.save_pretrained(tmp_path)
    assert XDLMPipeline.from_pretrained(tmp_path).id2label == {0: "ant"}


def test_another_pipeline_of_the_same_parts(pipe):
    pipe.register_to_config(supports_guidance=False)
    for other in (XDLMPipeline.from_pipe(pipe), XDLMPipeline(**pipe.components)):
        other.set_progress_bar_config(disable=True)
        assert other.transformer is pipe.transformer and torch.equal(draw(other), draw(pipe))
    parts = pipe.components | {"safety_checker": torch.nn.Identity()}
    more = types.SimpleNamespace(components=parts, config=pipe.config)  # a pipeline with a part that this one has not
    assert XDLMPipeline.from_pipe(more).components == pipe.components
    derived = XDLMPipeline.from_pipe(pipe)
    assert derived.id2label == pipe.id2label and derived.config.supports_guidance is False


def test_a_part_given_when_loading_is_used(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    own = XDLMTransformer2DModel.from_pretrained(tmp_path / "transformer")
    own.register_buffer("counter", torch.zeros(()))  # what its file does not hold is its owner's matter
    for transformer in (pipe.transformer, own):
        loaded = XDLMPipeline.from_pretrained(tmp_path, transformer=transformer)
        assert loaded.transformer is transformer
    assert XDLMImg2ImgPipeline.from_pipe(loaded).name_or_path == str(tmp_path)


def test_codes_need_no_tokenizer_and_pictures_do(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = XDLMPipeline.from_pretrained(tmp_path, vqvae=None)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded), draw(pipe))
    begins = XDLMImg2ImgPipeline.from_pipe(loaded)
    for call, message in (
        (lambda: loaded([0], output_type="pt"), "pictures need the tokenizer.*output_type='latent'"),
        (lambda: loaded.decode_latents(torch.zeros(1, 3, 4, dtype=torch.int64)), "pictures need the tokenizer"),
        (lambda: begins(torch.rand(1, 1, 8, 8), [0], output_type="latent"), "a picture to begin at needs .*; load it$"),
    ):
        with pytest.raises(ValueError, match=f"vqvae is None: {message}"):
            call()


def test_a_part_may_be_quantised_while_it_is_loaded(pipe, tmp_path):
    pytest.importorskip("torchao", reason="quantisation needs the package torchao")
    from diffusers import PipelineQuantizationConfig, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    pipe.save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig())})
    loaded = XDLMPipeline.from_pretrained(tmp_path, quantization_config=config)
    loaded.set_progress_bar_config(disable=True)
    assert draw(loaded).shape == draw(pipe).shape


def test_a_quantised_part_has_other_tensors_than_its_file(pipe, tmp_path):
    """Quantisers rename and add tensors (optimum-quanto: adaln_out.weight._data, adaln_out.input_scale)."""
    pipe.transformer.save_pretrained(tmp_path)
    transformer = XDLMTransformer2DModel.from_pretrained(tmp_path)
    transformer.register_buffer("input_scale", torch.ones(()))
    with pytest.raises(ValueError, match="transformer: 1 tensors are not in .*input_scale"):
        check_all_loaded("transformer", transformer)
    transformer.hf_quantizer = object()
    check_all_loaded("transformer", transformer)
    transformer.register_buffer("more", torch.ones((), device="meta"))
    with pytest.raises(ValueError, match="transformer: 1 tensors are not in .*more"):
        check_all_loaded("transformer", transformer)


# --- callbacks ------------------------------------------------------------------------------------


def test_a_callback_can_hold_codes(pipe):
    """The top row is set back after every step: it comes out so, and the rest is drawn to fit it."""

    def hold(pipe, i, t, kwargs):
        kwargs["latents"][:, 0] = 7
        return kwargs

    many = {"num_images_per_prompt": 8}
    free, held = draw(pipe, **many), draw(pipe, callback_on_step_end=hold, **many)
    assert held.shape == (16, 3, 4) and (held[:, 0] == 7).all()
    assert not torch.equal(held[:, 1:], free[:, 1:])


def test_logits_that_are_no_numbers_are_found_where_steps_are_skipped(pipe):
    def stop(pipe, i, t, kwargs):
        pipe._interrupt = True
        pipe.scheduler._finite = torch.tensor(False)  # as a step leaves it, without waiting for the device
        return kwargs

    with pytest.raises(ValueError, match="NaN|finite"):
        draw(pipe, callback_on_step_end=stop)


def test_offloaded_models_are_given_back_once_a_call(pipe, monkeypatch):
    calls = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: calls.append("given back"))
    draw(pipe)
    assert calls == ["given back"]


# --- compilation ----------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("time_conditioning, guidance_scale", [("none", 1.0), ("time", 1.0), ("time", 2.0)])
def test_compiles_once_for_all_steps_and_calls(fresh_dynamo, time_conditioning, guidance_scale):
    pipe = make_pipe(time_conditioning)
    expected = draw(pipe, guidance_scale=guidance_scale)
    backend = CompileCounter()
    pipe.transformer.compile(fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(draw(pipe, guidance_scale=guidance_scale), expected)
        draw(pipe, labels=(4, 1), guidance_scale=guidance_scale, num_inference_steps=6, temperature=0.9)
    assert backend.frame_count == 1


def test_guidance_switched_on_between_steps_compiles_each_batch_once(fresh_dynamo, pipe):
    def guide_late(pipe, i, t, kwargs):
        pipe._guidance_scale = 2.0 if i % 2 else 1.0
        return kwargs

    backend = CompileCounter()
    pipe.transformer.compile(fullgraph=True, backend=backend, dynamic=False)
    draw(pipe, callback_on_step_end=guide_late, num_inference_steps=6)
    assert backend.frame_count == 2  # a batch of 2 and one of 4


def test_repeated_blocks_compile_once(fresh_dynamo, pipe):
    expected, backend = draw(pipe), CompileCounter()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(draw(pipe), expected)
    assert backend.frame_count == 1  # two blocks, four steps, one graph


def test_a_compiled_module_as_a_part(fresh_dynamo, pipe, tmp_path):
    expected = draw(pipe)
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")
    assert torch.equal(draw(pipe), expected)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(XDLMPipeline.from_pretrained(tmp_path)), expected)


@pytest.mark.slow
def test_inductor(fresh_dynamo, pipe):
    expected = pipe.transformer(**network_input()).sample
    pipe.transformer.compile(fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        codes = draw(pipe)  # one graph for all steps ...
        assert torch.equal(draw(pipe), codes)  # ... and calls
    torch._dynamo.reset()  # a time an image is another graph
    with torch.no_grad():
        torch.testing.assert_close(pipe.transformer(**network_input()).sample, expected, rtol=1e-4, atol=1e-4)


# --- attention, memory ----------------------------------------------------------------------------


def test_attention_backends_agree(pipe):
    expected = pipe.transformer(**network_input()).sample
    with attention_backend("_native_math"):
        torch.testing.assert_close(pipe.transformer(**network_input()).sample, expected)
    for name in ("_native_math", "native"):
        pipe.transformer.set_attention_backend(name)
        try:
            torch.testing.assert_close(pipe.transformer(**network_input()).sample, expected)
        finally:
            pipe.transformer.reset_attention_backend()
    with pytest.raises(ValueError, match="no_such_backend"):
        pipe.transformer.set_attention_backend("no_such_backend")


def test_layerwise_casting(pipe):
    expected = pipe.transformer(**network_input()).sample.softmax(-1)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {parameter.dtype for parameter in pipe.transformer.parameters()}
    assert stored == {torch.float8_e4m3fn, torch.float32}  # embeddings, norms and modulation keep their precision
    distance = (pipe.transformer(**network_input()).sample.softmax(-1) - expected).abs().sum(-1) / 2
    assert 0 < distance.mean() < 0.1
    assert draw(pipe).max() < CODES


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(pipe, offload_type):
    """The hooks and the grouping; that memory moves needs another device."""
    expected = draw(pipe)
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type=offload_type, **blocks)
    assert torch.equal(draw(pipe), expected)


def test_offload_says_what_it_needs(pipe):
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator: see the next test")
    for enable in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        with pytest.raises(RuntimeError, match="requires accelerator"):
            enable()


@pytest.mark.gpu
@pytest.mark.parametrize("lookup", [True, False])
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offload(kind, lookup, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as exact as the CPU
    pipe = make_pipe()
    pipe.vqvae.register_to_config(lookup_from_codebook=lookup)
    expected = draw(pipe, output_type="np")
    getattr(pipe, f"enable_{kind}_cpu_offload")()
    for _ in range(2):
        np.testing.assert_allclose(draw(pipe, output_type="np"), expected, atol=1e-4)
    assert pipe.transformer.device.type == ("cpu" if kind == "model" else "meta")


def test_quantised_weights(pipe, tmp_path):
    pytest.importorskip("torchao", reason="quantisation needs the package torchao")
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    pipe.transformer.save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    quantised = XDLMTransformer2DModel.from_pretrained(tmp_path, quantization_config=config)
    expected = pipe.transformer(**network_input()).sample.softmax(-1)
    distance = (quantised(**network_input()).sample.softmax(-1) - expected).abs().sum(-1) / 2
    assert 0 < distance.mean() < 0.05
