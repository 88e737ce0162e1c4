"""The verb `encode`: what its caches hold, going on after a kill, and what it refuses."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from tokenizer_parts import home, pictures_fixture, tiny_recipe, trained_fixture  # noqa: F401

from xdlm_image.data.code_cache import CodeCache
from xdlm_image.data.images import open_images
from xdlm_image.recipes import EncodeRecipe
from xdlm_image.tokenizer import encode as encode_module
from xdlm_image.tokenizer.codes import encode_images, load_tokenizer
from xdlm_image.tokenizer.encode import encode
from xdlm_image.tokenizer.train import build_vqvae, train_tokenizer


def test_encode_writes_caches_that_know_what_they_hold(trained, tmp_path, pictures):
    data = dataclasses.replace(pictures, crop="center")
    recipe = EncodeRecipe(tokenizer=str(trained), output_dir=str(tmp_path / "codes"), data=data, batch_size=7)
    output = encode(recipe)
    vqvae = load_tokenizer(trained)
    for split, number in (("train", 40), ("validation", 8), ("test", 12)):
        cache, images = CodeCache.open(output / split), open_images(data, split)
        assert cache.codes.shape == (number, 2, 16)
        cache.verify()
        cache.check(tokenizer=vqvae, data=images)
        for i in (0, number - 1):
            plain = encode_images(vqvae, images[i][0][None]).flatten()
            mirrored = encode_images(vqvae, images[i][0].flip(-1)[None]).flatten()
            codes, labels = cache.batch([i, i], [False, True])
            assert torch.equal(codes, torch.stack([plain, mirrored]))
            assert labels.tolist() == [images[i][1]] * 2
    test = CodeCache.open(output / "test")
    with pytest.raises(ValueError, match=r"data\.split='train'.*'test'"):
        test.check(data=open_images(data, "train"))
    with pytest.raises(ValueError, match=r"data\.image_size=32.*16"):
        test.check(data=open_images(dataclasses.replace(data, image_size=32), "test"))
    other = build_vqvae(tiny_recipe(tmp_path, data))
    with pytest.raises(ValueError, match="encode again, or name that tokenizer"):
        test.check(tokenizer=other)
    encode(dataclasses.replace(recipe, overwrite=True, flip=False, splits=["test"]))
    assert CodeCache.open(output / "test").codes.shape == (12, 1, 16)


def test_encode_goes_on_and_refuses_caches_of_something_else(trained, tmp_path, pictures, monkeypatch, capfd):
    root = tmp_path / "copy"
    shutil.copytree(pictures.root, root)
    data = dataclasses.replace(pictures, root=str(root), crop="center")
    recipe = EncodeRecipe(str(trained), str(tmp_path / "codes"), data, splits=["train", "test"], batch_size=7)
    whole = encode_module.encode_images

    def dies_in_the_second_split(vqvae, images):
        if len(list((tmp_path / "codes").glob("train"))) == 1:
            raise KeyboardInterrupt
        return whole(vqvae, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encode_module, "encode_images", dies_in_the_second_split)
        encode(recipe)
    output = tmp_path / "codes"
    assert [p.name for p in output.iterdir()] == ["train"]
    first = (output / "train" / "manifest.json").stat()
    capfd.readouterr()
    encode(recipe)
    assert "".join(capfd.readouterr()).count("kept") == 1
    again = (output / "train" / "manifest.json").stat()
    assert (again.st_mtime_ns, again.st_ino) == (first.st_mtime_ns, first.st_ino)
    CodeCache.open(output / "test").verify()

    def never(*arguments):
        raise AssertionError("encoded")

    monkeypatch.setattr(encode_module, "encode_images", never)
    encode(recipe)  # everything is there
    with pytest.raises(FileExistsError, match=r"train was encoded with num_views=2, asked for is 1: set overwrite"):
        encode(dataclasses.replace(recipe, flip=False))
    with pytest.raises(FileExistsError, match=r"encoded with image_size=16, asked for is 32"):
        encode(dataclasses.replace(recipe, data=dataclasses.replace(data, image_size=32)))
    codes = output / "test" / "codes.bin"
    kept = codes.read_bytes()
    codes.write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
    with pytest.raises(FileExistsError, match=r"the file is damaged.*overwrite: true"):
        encode(recipe)
    codes.write_bytes(kept)
    (root / "test" / "down" / "05.png").unlink()
    with pytest.raises(FileExistsError, match="encoded with data_fingerprint="):
        encode(recipe)
    monkeypatch.undo()
    encode(dataclasses.replace(recipe, overwrite=True))
    assert len(CodeCache.open(output / "test")) == 11


def test_broken_images_are_found_before_training_and_encoding(trained, tmp_path, pictures, monkeypatch):
    root = tmp_path / "copy"
    shutil.copytree(pictures.root, root)
    whole = (root / "test" / "down" / "05.png").read_bytes()
    (root / "test" / "down" / "05.png").write_bytes(whole[:-30])
    data = dataclasses.replace(pictures, root=str(root), crop="center")
    with pytest.raises(ValueError, match=r"1 of 12 files of test are broken:\n.*05\.png"):
        train_tokenizer(tiny_recipe(tmp_path / "run", data))
    with pytest.raises(ValueError, match=r"1 of 12 files of test are broken:\n.*05\.png"):
        encode(EncodeRecipe(str(trained), str(tmp_path / "codes"), data))
    assert not (tmp_path / "run").exists() and not (tmp_path / "codes").exists()


def test_a_cache_does_not_fit_changed_images(trained, tmp_path, pictures):
    root = tmp_path / "copy"
    shutil.copytree(pictures.root, root)
    data = dataclasses.replace(pictures, root=str(root), crop="center")
    output = encode(EncodeRecipe(str(trained), str(tmp_path / "codes"), data, splits=["test"]))
    (root / "test" / "down" / "05.png").unlink()
    with pytest.raises(ValueError, match="not the ones"):
        CodeCache.open(output / "test").check(data=open_images(data, "test"))


def test_encode_refuses_what_cannot_be_right(trained, tmp_path, pictures):
    recipe = EncodeRecipe(str(trained), str(tmp_path / "codes"), dataclasses.replace(pictures, crop="center"))
    with pytest.raises(ValueError, match=r"data\.crop='random'"):
        encode(dataclasses.replace(recipe, data=pictures))
    with pytest.raises(ValueError, match=r"data\.channels=3"):
        encode(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, channels=3)))
    with pytest.raises(ValueError, match="name each split once"):
        encode(dataclasses.replace(recipe, splits=["test", "test"]))
    with pytest.raises(FileNotFoundError, match="train one with train-tokenizer"):
        encode(dataclasses.replace(recipe, tokenizer=str(tmp_path / "none")))
    assert not (tmp_path / "codes").exists()
