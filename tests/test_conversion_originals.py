"""The converters against the originals' own code, at its real size; skipped visibly without their checkouts.

    LLAMAGEN_REPOSITORY=... TAMING_REPOSITORY=... XDLM_REPOSITORY=... pytest -s tests/test_conversion_originals.py

Each names the checkout of github.com/FoundationVision/LlamaGen, CompVis/taming-transformers or MzeroMiko/XDLM. The last
two need the package einops. Every weight is random; `-s` shows parameter counts and the largest differences.
"""

import importlib.util
import os
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from xdlm_image import XDLMPipeline
from xdlm_image.conversion.official_xdlm import convert_xdlm
from xdlm_image.conversion.vq_tokenizers import convert_llamagen, convert_taming
from xdlm_image.recipes import ConversionRecipe, ConvertXDLMRecipe
from xdlm_image.tokenizer.codes import decode_codes, encode_images, load_tokenizer


def checkout(variable: str):
    """Skips unless the environment names the checkout."""
    return pytest.mark.skipif(not os.environ.get(variable), reason=f"{variable} names no checkout of the original")


def load(variable: str, file: str, **stand_ins: types.ModuleType):
    """A module of an original, with stand-ins for what it imports and this test does not need."""
    path = Path(os.environ[variable]) / file
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(os.environ[variable])
        for name, stand_in in stand_ins.items():
            patch.setitem(sys.modules, name.replace("__", "."), stand_in)
        before = set(sys.modules)
        spec = importlib.util.spec_from_file_location(f"original_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec.loader.exec_module(module)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("taming", "models"):
                del sys.modules[name]
    return module


def module_of(**attributes) -> types.ModuleType:
    module = types.ModuleType("stand_in")
    module.__dict__.update(attributes)
    return module


def randomise(model: nn.Module) -> nn.Module:
    """Random norms and biases too, and no gate that hides what is behind it."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0 if parameter.min() == parameter.max() == 1 else 0.0, std=0.1)
        elif not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False)


def quietly(verb, recipe):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return verb(recipe)


def compare_tokenizers(name, original, ours, parameters, latents_of, entry_of):
    """Latents, codes and pictures of one 64 x 64 image."""
    assert sum(p.numel() for p in ours.parameters()) == parameters
    torch.manual_seed(1)
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    latents = latents_of(images)
    ours_latents = ours.encode(images).latents
    codes = original.encode(images)[2][2].reshape(1, *latents.shape[2:])
    assert len(codes.unique()) > 2 and torch.equal(encode_images(ours, images), codes)
    torch.testing.assert_close(ours_latents, latents, atol=1e-5, rtol=1e-5)
    drawn = torch.randint(ours.config.num_vq_embeddings, (1, 4, 4))
    single = (decode_codes(ours, drawn) - original.decode(entry_of(drawn))).abs().max()
    ours, original = ours.double(), original.double()  # float32 rounds by about 1e-5 over so many layers
    pictures = original.decode(entry_of(drawn))
    double = (decode_codes(ours, drawn) - pictures).abs().max()
    print(f"\n{name}: {parameters} parameters; codes equal; latents (std {latents.std():.2g}) differ by "
          f"{(ours_latents - latents).abs().max():.2g}; pictures (std {pictures.std():.2g}) by {single:.2g}, "
          f"in float64 by {double:.2g}")  # fmt: skip
    assert single < 1e-4 and double < 1e-6


@checkout("LLAMAGEN_REPOSITORY")
@pytest.mark.parametrize(("name", "parameters"), [("VQ-16", 71_883_403), ("VQ-8", None)])
def test_llamagen(tmp_path, name, parameters):
    code = load("LLAMAGEN_REPOSITORY", "tokenizer/tokenizer_image/vq_model.py")
    torch.manual_seed(0)
    original = randomise(code.VQ_models[name]())
    rows = original.quantize.embedding.weight
    rows.mul_(1 + 0.1 * torch.rand(len(rows), 1))  # as training leaves them
    torch.save({"model": original.state_dict()}, tmp_path / "vq.pt")
    quietly(convert_llamagen, ConversionRecipe(str(tmp_path / "vq.pt"), str(tmp_path / "out")))
    compare_tokenizers(
        name,
        original,
        load_tokenizer(tmp_path / "out"),
        parameters or sum(p.numel() for p in original.parameters()),
        lambda images: original.quant_conv(original.encoder(images)),
        lambda codes: original.quantize.get_codebook_entry(codes.flatten(), (1, 8, 4, 4)),
    )


@checkout("TAMING_REPOSITORY")
@pytest.mark.parametrize("codes", [1024, 16384])
def test_taming(tmp_path, codes):
    pytest.importorskip("einops")
    lightning = module_of(LightningModule=nn.Module)
    loss = module_of(instantiate_from_config=lambda config: nn.Linear(3, 3))
    code = load("TAMING_REPOSITORY", "taming/models/vqgan.py", pytorch_lightning=lightning, main=loss)
    torch.manual_seed(0)
    sizes = dict(double_z=False, z_channels=256, resolution=256, in_channels=3, out_ch=3, ch=128)
    sizes |= dict(ch_mult=[1, 1, 2, 2, 4], num_res_blocks=2, attn_resolutions=[16], dropout=0.0)
    original = randomise(code.VQModel(sizes, None, codes, 256))
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    latents = original.quant_conv(original.encoder(images))
    rows = original.quantize.embedding.weight  # laid among the latents, so that several are in use
    rows.copy_(latents.mean((0, 2, 3)) + latents.std((0, 2, 3)) * torch.randn_like(rows))
    torch.save({"state_dict": original.state_dict(), "global_step": 1}, tmp_path / "last.ckpt")
    convert_taming(ConversionRecipe(str(tmp_path / "last.ckpt"), str(tmp_path / "out")))
    compare_tokenizers(
        f"taming f16, {codes} codes",
        original,
        load_tokenizer(tmp_path / "out"),
        sum(p.numel() for name, p in original.named_parameters() if not name.startswith("loss.")),
        lambda images: original.quant_conv(original.encoder(images)),
        lambda codes: original.quantize.get_codebook_entry(codes.flatten(), (1, 4, 4, 256)),
    )


def turned(x, cos, sin):
    """flash_attn's rotary positions on CPU: x (B, L, H, d), cos and sin (L, d/2), halves of the channels are pairs."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@checkout("XDLM_REPOSITORY")
def test_official_xdlm(tmp_path):
    pytest.importorskip("einops")
    rotary = module_of(apply_rotary_emb_torch=turned)
    layers = module_of(rotary=rotary)
    stand_ins = dict(flash_attn=module_of(layers=layers), flash_attn__layers=layers, flash_attn__layers__rotary=rotary)
    code = load("XDLM_REPOSITORY", "models/dit.py", omegaconf=module_of(), **stand_ins)
    averages = load("XDLM_REPOSITORY", "models/ema.py")
    settings = types.SimpleNamespace
    config = settings(
        algo=settings(causal_attention=False),
        model=settings(hidden_size=768, cond_dim=128, n_heads=12, n_blocks=12, dropout=0.1, scale_by_sigma=True),
        training=settings(guidance=True),
        data=settings(class_dropout_prob=0.1, num_classes=1000),
    )
    torch.manual_seed(0)
    original = randomise(code.DIT(config, vocab_size=16387)).requires_grad_(True)
    ema = averages.ExponentialMovingAverage(original.parameters(), decay=0.9999)
    original.requires_grad_(False)
    torch.save({"ema": ema.state_dict()}, tmp_path / "official.ckpt")

    # a tokenizer of 16,384 codes, small in all else
    from original_tokenizers import random_tokenizer

    torch.save({"model": random_tokenizer("llamagen", codes=16384).state_dict()}, tmp_path / "vq.pt")
    quietly(convert_llamagen, ConversionRecipe(str(tmp_path / "vq.pt"), str(tmp_path / "tokenizer")))
    convert_xdlm(
        ConvertXDLMRecipe(
            checkpoint=str(tmp_path / "official.ckpt"),
            output=str(tmp_path / "pipeline"),
            tokenizer=str(tmp_path / "tokenizer"),
            k=0.1,
        )
    )
    ours = XDLMPipeline.from_pretrained(tmp_path / "pipeline").transformer
    assert sum(p.numel() for p in ours.parameters()) == 117_695_619
    ids = torch.randint(16387, (2, 256))
    ids[1, :128] = 16384
    labels = torch.tensor([7, 1000])
    expected = original(ids, torch.zeros(2), labels)
    logits = ours(ids, timestep=0.5, class_labels=labels).sample
    print(f"\nXDLM: 117695619 parameters, logits differ by {(logits - expected).abs().max():.2g} (std "
          f"{expected.std():.2g})")  # fmt: skip
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
