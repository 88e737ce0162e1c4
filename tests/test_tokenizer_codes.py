"""Using a tokenizer: codes and pictures, its hash, and folders that are damaged."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import VQModel
from tokenizer_parts import home, pictures_fixture, trained_fixture  # noqa: F401

from xdlm_image.tokenizer.codes import decode_codes, encode_images, grid_of, load_tokenizer
from xdlm_image.weights import weights_hash


def test_codes_and_pictures_agree_with_vqmodel_itself(trained):
    vqvae = load_tokenizer(trained)
    images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = encode_images(vqvae, images)
    assert codes.shape == (3, 4, 4) and codes.dtype == torch.int64
    with torch.no_grad():
        assert torch.allclose(decode_codes(vqvae, codes), vqvae(images).sample, atol=1e-5)
    latents = vqvae.encode(images).latents.permute(0, 2, 3, 1)[:, :, :, None]  # (B, h, w, 1, D)
    brute = (latents - vqvae.quantize.embedding.weight).square().sum(-1).argmin(-1)
    assert torch.equal(codes, brute)
    vqvae.register_to_config(lookup_from_codebook=False)
    with torch.no_grad():
        assert torch.allclose(decode_codes(vqvae, codes), vqvae(images).sample, atol=1e-5)


def test_codes_outside_the_codebook_are_refused(trained):
    vqvae = load_tokenizer(trained)
    for bad in (16, -1):
        codes = torch.zeros(1, 4, 4, dtype=torch.int64)
        codes[0, 1, 2] = bad
        with pytest.raises(ValueError, match="ids 0 to 15"):
            decode_codes(vqvae, codes)
    with pytest.raises(ValueError, match=r"need \(B, h, w\)"):
        decode_codes(vqvae, torch.zeros(1, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"takes \(B, 1, S, S\)"):
        encode_images(vqvae, torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="multiple"):
        grid_of(vqvae, 15)


def test_hash_sees_values_only(trained, tmp_path):
    vqvae = load_tokenizer(trained)
    first = weights_hash(vqvae)
    assert weights_hash(vqvae.double()) == first
    vqvae.float().save_pretrained(tmp_path)
    assert weights_hash(VQModel.from_pretrained(tmp_path)) == first
    with torch.no_grad():
        vqvae.quantize.embedding.weight[3, 1] += 1e-6
    assert weights_hash(vqvae) != first


def test_the_folder_of_a_pipeline_is_no_tokenizer_and_the_error_names_its_own(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "pipeline" / "vqvae")
    with pytest.raises(FileNotFoundError, match="no saved VQModel; name '.*pipeline/vqvae'"):
        load_tokenizer(tmp_path / "pipeline")


def test_damaged_tokenizers_are_refused(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder; train one"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="a file, not a folder; train one"):
        load_tokenizer(__file__)
    with pytest.raises(FileNotFoundError, match="`hf download somebody/vq-16 --local-dir DIR`"):
        load_tokenizer("somebody/vq-16")
    folder = tmp_path / "tokenizer"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoints"))
    weights = folder / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-64])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_tokenizer(folder)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"not those its tokenizer\.json tells of"):
        load_tokenizer(folder)
    weights.write_bytes(whole)
    told = (folder / "tokenizer.json").read_text()
    for damaged in (told[: len(told) // 2], "[]"):
        (folder / "tokenizer.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
            load_tokenizer(folder)
    (folder / "tokenizer.json").write_text(told)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model\.safetensors"):
        load_tokenizer(folder)
