"""The verb `encode`: what its caches hold, going on after a kill, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizer_parts import home, pictures_fixture, tiny_recipe, trained_fixture  # noqa: F401

from xdlm_image.data import code_blocks
from xdlm_image.data.code_blocks import CodeBlocks
from xdlm_image.data.code_cache import CodeCache, Manifest
from xdlm_image.data.images import open_images
from xdlm_image.processes import only_command
from xdlm_image.recipes import EncodeRecipe
from xdlm_image.tokenizer import encode as encode_module
from xdlm_image.tokenizer import train as train_module
from xdlm_image.tokenizer.codes import encode_images, load_tokenizer
from xdlm_image.tokenizer.encode import encode
from xdlm_image.tokenizer.measure import measure_tokenizer
from xdlm_image.tokenizer.train import build_vqvae, train_tokenizer
from xdlm_image.training.loop import refuse_other_images


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


def test_a_cache_shows_what_its_codes_decode_to(trained, tmp_path, pictures, capsys):
    data = dataclasses.replace(pictures, crop="center")
    recipe = EncodeRecipe(str(trained), str(tmp_path / "codes"), data, splits=["test"], flip=False)
    cache = encode(recipe) / "test"
    report = json.loads((cache / "report.json").read_text())
    measured = measure_tokenizer(load_tokenizer(trained), open_images(data, "test"), batch_size=5)
    assert report["images"] == report["psnr_of_images"] == 12  # all, as they are so few
    for name in ("psnr", "codes_used", "perplexity"):
        assert report[name] == pytest.approx(measured[name], rel=1e-5)
    assert f"12 images have PSNR {report['psnr']:.1f} dB" in capsys.readouterr().out
    picture = (cache / "reconstructions.png").read_bytes()
    trained_on = Path(trained) / "reconstructions.png"
    assert Image.open(cache / "reconstructions.png").size == Image.open(trained_on).size

    (cache / "report.json").unlink()
    (cache / "reconstructions.png").unlink()
    (tmp_path / "codes" / ".test.blocks").mkdir()  # killed before they were removed
    encode(recipe)  # kept, and told again
    assert [path.name for path in (tmp_path / "codes").iterdir()] == ["test"]
    assert json.loads((cache / "report.json").read_text()) == report
    assert (cache / "reconstructions.png").read_bytes() == picture

    def wrong(vqvae, images):  # codes of other images: what is shown comes from the cache
        return encode_images(vqvae, images).roll(1, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_module, "encode_images", wrong)
        encode(dataclasses.replace(recipe, overwrite=True))
    assert json.loads((cache / "report.json").read_text())["psnr"] != report["psnr"]
    assert (cache / "reconstructions.png").read_bytes() != picture


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
    assert sorted(p.name for p in output.iterdir()) == [".test.blocks", "train"]
    first = (output / "train" / "manifest.json").stat()
    capfd.readouterr()
    encode(recipe)
    assert "".join(capfd.readouterr()).count("kept") == 1
    again = (output / "train" / "manifest.json").stat()
    assert (again.st_mtime_ns, again.st_ino) == (first.st_mtime_ns, first.st_ino)
    CodeCache.open(output / "test").verify()
    assert sorted(p.name for p in output.iterdir()) == ["test", "train"]

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


def test_a_killed_encoding_goes_on_with_the_block_it_was_at(trained, tmp_path, pictures, monkeypatch):
    data = dataclasses.replace(pictures, crop="center")
    recipe = EncodeRecipe(str(trained), str(tmp_path / "whole"), data, splits=["train"], batch_size=7)
    whole = encode(recipe) / "train"  # 40 images in one block
    monkeypatch.setattr(encode_module, "BLOCK", 15)  # 14, 14 and 12 images
    seen = []

    def dies_in(batch):
        def encode_or_die(vqvae, images):
            seen.append(len(images))
            if len(seen) == 2 * batch:  # each batch comes plain and mirrored
                raise KeyboardInterrupt
            return encode_images(vqvae, images)

        return encode_or_die

    def run(batch, **changes):
        seen.clear()
        monkeypatch.setattr(encode_module, "encode_images", dies_in(batch))
        encode(dataclasses.replace(recipe, output_dir=str(tmp_path / "codes"), **changes))

    with pytest.raises(KeyboardInterrupt):
        run(4)
    with pytest.raises(KeyboardInterrupt):
        run(3)
    assert seen == [7] * 6  # the second block, and the first batch of the third
    blocks = tmp_path / "codes" / ".train.blocks"
    assert sorted(p.name for p in blocks.iterdir()) == ["000000000.npy", "000000014.npy", "of.json"]
    (blocks / "000000014.npy").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"000000014\.npy is damaged.*start again"):
        run(0)
    assert seen == [7, 7, 5, 5]
    run(0)
    assert seen == [7] * 4 and not blocks.exists()
    assert sorted(path.name for path in (tmp_path / "codes").iterdir()) == ["train"]
    for name in ("codes.bin", "labels.bin"):
        assert (tmp_path / "codes" / "train" / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run(6, overwrite=True)
    run(0, overwrite=True, batch_size=8)  # blocks of other batches are of no use
    assert seen == [8] * 10


def test_a_block_that_is_seen_late_is_waited_for_and_none_is_lost(tmp_path, pictures, monkeypatch):
    images = open_images(dataclasses.replace(pictures, crop="center"), "train")
    manifest = Manifest("", "", "train", 16, 1, "center", [1, 1], 16, len(images), 1, ["a"], "<u2", "<u2")
    blocks = CodeBlocks(tmp_path / "codes" / "train", manifest, size=15)
    blocks.begin()
    for block in blocks.missing():
        blocks.write(block, np.full((len(block), 1, 1), block.start % 16))
    file = blocks.folder / "000000015.npy"
    slept = []

    def comes_after(seconds):
        def sleep(wait):
            slept.append(wait)
            if sum(slept) > seconds and (tmp_path / "late").exists():
                (tmp_path / "late").rename(file)

        return sleep

    monkeypatch.setattr(code_blocks.time, "sleep", comes_after(2))
    file.rename(tmp_path / "late")
    assert [codes.flat[0] for _, codes in blocks.read()] == [0, 15, 14] and slept == [0, 1, 2]
    file.rename(tmp_path / "late")
    monkeypatch.setattr(code_blocks.time, "sleep", comes_after(1000))
    with pytest.raises(OSError, match=r"000000015\.npy cannot be read.*one folder that all nodes see"):
        list(blocks.read())
    (tmp_path / "late").rename(file)

    def fails(*arguments, **named):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot be read"):
        patch.setattr(np, "load", fails)
        list(blocks.read())
    assert not blocks.missing()


RANK = """
import os, sys, time
from xdlm_image import cli
from xdlm_image.tokenizer import encode as module

module.BLOCK = 7
whole, calls = module.encode_images, []

def counting(vqvae, images):
    calls.append(len(images))
    if os.environ.get("DIES") and os.environ["RANK"] == "1" and len(calls) == 3:
        while not os.path.exists(os.environ["DIES"]):  # the other's block, which a busy machine writes late
            time.sleep(0.05)
        os._exit(9)
    if os.environ.get("DIES") and os.environ["RANK"] == "0" and len(calls) == 3:
        time.sleep(60)
    return whole(vqvae, images)

module.encode_images = counting
status = cli.main(sys.argv[1:])
print(f"rank {os.environ['RANK']} encoded {sum(calls)}")
sys.exit(status)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_killed_on_the_way_write_what_one_writes(trained, tmp_path, pictures):
    data = dataclasses.replace(pictures, crop="center")
    one = encode(EncodeRecipe(str(trained), str(tmp_path / "one"), data, splits=["train", "test"], batch_size=7))
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "rank.py"), "encode", f"--tokenizer={trained}", f"--output_dir={tmp_path / 'two'}"]
    images = [f"--data.{name}={getattr(data, name)}" for name in ("root", "image_size", "channels")]
    command += [*images, "--splits=[train,test]", "--batch_size=7"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    first = str(tmp_path / "two" / ".train.blocks" / "000000000.npy")
    died = subprocess.run(command, env=environment | {"DIES": first}, capture_output=True, text=True, timeout=200)
    assert died.returncode != 0
    blocks = sorted(path.name for path in (tmp_path / "two" / ".train.blocks").glob("*.npy"))
    assert blocks == ["000000000.npy", "000000021.npy"]  # each process got through one of its three
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 0 encoded 42" in done.stdout  # 14 + 7 images, plain and mirrored
    assert "rank 1 encoded 34" in done.stdout  # 12 + 5
    assert done.stdout.count("images x 2 views") == 2  # one process tells of each split
    for split in ("train", "test"):
        for name in ("codes.bin", "labels.bin", "manifest.json"):
            assert (tmp_path / "two" / split / name).read_bytes() == (one / split / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["test", "train"]


def test_workers_are_what_the_machine_can_give(pictures, monkeypatch):
    images = open_images(pictures, "test")
    recipe = EncodeRecipe("t", "o")
    for cores, processes, wanted in ((2, 1, 0), (4, 1, 0), (6, 1, 5), (64, 1, 8), (64, 8, 7), (16, 8, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert encode_module._workers(recipe, images) == wanted
    assert encode_module._workers(EncodeRecipe("t", "o", num_workers=3), images) == 3
    with pytest.raises(ValueError, match="num_workers=-1"):
        EncodeRecipe("t", "o", num_workers=-1)


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
    assert not any((tmp_path / "run").iterdir()) and not any((tmp_path / "codes").iterdir())


def test_a_folder_that_cannot_be_written_or_is_at_work_is_known_before_an_image_is_read(
    trained, tmp_path, pictures, monkeypatch
):
    """And a second command finds the first one's images untouched."""
    data = dataclasses.replace(pictures, crop="center")
    (tmp_path / "file").touch()

    def never(*arguments):
        raise AssertionError("read")

    for module in (encode_module, train_module):
        monkeypatch.setattr(module, "check_images", never)
    for start in (
        lambda output: encode(EncodeRecipe(str(trained), str(output), data)),
        lambda output: train_tokenizer(tiny_recipe(output, data)),
    ):
        with pytest.raises(OSError, match=r"output_dir='.*file.run': cannot be written to"):
            start(tmp_path / "file" / "run")
    recipe = EncodeRecipe(str(trained), str(tmp_path / "codes"), data)
    with only_command(tmp_path / "codes", True), pytest.raises(ValueError, match="output_dir='.*codes': another comm"):
        encode(recipe)


def test_a_cache_does_not_fit_changed_images(trained, tmp_path, pictures):
    root = tmp_path / "copy"
    shutil.copytree(pictures.root, root)
    data = dataclasses.replace(pictures, root=str(root), crop="center")
    output = encode(EncodeRecipe(str(trained), str(tmp_path / "codes"), data, splits=["test"]))
    (root / "test" / "down" / "05.png").unlink()
    with pytest.raises(ValueError, match="not the ones"):
        CodeCache.open(output / "test").check(data=open_images(data, "test"))


def test_splits_that_were_cut_differently_do_not_train_and_validate(trained, tmp_path, pictures, capsys):
    """Cut alike they have no image in common; caches of before cannot be told apart, and this is said."""
    data = dataclasses.replace(pictures, root=str(Path(pictures.root) / "train"), crop="center")  # flat
    info = json.loads((trained / "tokenizer.json").read_text())
    shutil.copytree(trained, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("checkpoints"))
    info["data"] |= {"root": data.root, "validation_fraction": 0.0}
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(info))
    caches = {}
    for fraction, split in ((0.0, "train"), (0.4, "train"), (0.4, "validation")):
        recipe = EncodeRecipe(str(tmp_path / "tokenizer"), str(tmp_path / f"{fraction}"), splits=[split])
        recipe.data = dataclasses.replace(data, validation_fraction=fraction)
        caches[fraction, split] = CodeCache.open(encode(recipe) / split)
        assert ("trained with data.validation_fraction=0.0, not 0.4" in capsys.readouterr().out) == (fraction > 0)
    validation = caches[0.4, "validation"]
    with pytest.raises(ValueError, match=r"data.validation_fraction=0.4, codes with 0.0.*encode both"):
        refuse_other_images(caches[0.0, "train"], validation)
    assert refuse_other_images(caches[0.4, "train"], validation) == []
    validation.manifest.cut = None
    assert "cannot be ruled out" in refuse_other_images(caches[0.0, "train"], validation)[0]


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
