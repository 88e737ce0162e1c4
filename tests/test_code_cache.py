"""The code cache: what goes in comes out, damage and mismatches are told, and nothing half-written is left."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xdlm_image.data.code_cache import CodeCache, Manifest, code_dtype, write_code_cache
from xdlm_image.tokenizer.codebook import usage_of_cache


def manifest(**changes) -> Manifest:
    values = {
        "tokenizer_hash": "t" * 64, "data_fingerprint": "d" * 64, "split": "train", "image_size": 8, "channels": 1,
        "crop": "center", "grid": [2, 3], "num_codes": 50, "num_images": 7, "num_views": 2,
        "class_names": ["a", "b", "c"],
        "dtype": "<u2", "label_dtype": "<u2",
    }  # fmt: skip
    return Manifest(**(values | changes))


def content(about: Manifest, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    shape = (about.num_images, about.num_views, about.grid[0] * about.grid[1])
    return random.integers(0, about.num_codes, shape), random.integers(0, len(about.class_names), shape[:1])


def write(path: Path, about: Manifest, seed: int = 0, **options) -> tuple[np.ndarray, np.ndarray]:
    codes, labels = content(about, seed)
    write_code_cache(path, about, [(codes[:4], labels[:4]), (codes[4:], labels[4:])], **options)
    return codes, labels


def test_round_trip(tmp_path):
    codes, labels = write(tmp_path / "cache", manifest())
    cache = CodeCache.open(tmp_path / "cache")
    assert len(cache) == 7 and cache.codes.dtype == np.uint16
    assert np.array_equal(cache.codes, codes) and np.array_equal(cache.labels, labels)
    got, got_labels = cache.batch(torch.tensor([6, 0, 6]), torch.tensor([True, False, False]))
    assert got.dtype == got_labels.dtype == torch.int64
    assert np.array_equal(got, np.stack([codes[6, 1], codes[0, 0], codes[6, 0]]))
    assert np.array_equal(got_labels, labels[[6, 0, 6]])
    assert np.array_equal(cache.batch(np.arange(7))[0], codes[:, 0])
    cache.verify()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]  # no temporary folder is left
    with pytest.raises(ValueError, match="read-only"):
        cache.codes[0] = 0


@settings(max_examples=20)
@given(num_codes=st.sampled_from([2, 512, 65_535, 65_536, 200_000]), seed=st.integers(0, 2**30))
def test_every_code_survives_in_its_dtype(tmp_path_factory, num_codes, seed):
    path = tmp_path_factory.mktemp("wide") / "cache"
    about = manifest(num_codes=num_codes, dtype=code_dtype(num_codes).str)
    codes, labels = content(about, seed)
    codes[0, 0, 0] = num_codes - 1
    write_code_cache(path, about, [(codes, labels)])
    cache = CodeCache.open(path)
    assert np.array_equal(cache.codes, codes)
    assert cache.codes.dtype == (np.uint16 if num_codes < 65_536 else np.int32)


def test_writing_refuses_what_a_training_would_trip_over(tmp_path):
    about = manifest()
    codes, labels = content(about)
    path = tmp_path / "cache"
    for bad in (50, -1):
        wrong = codes.copy()
        wrong[3, 1, 2] = bad
        with pytest.raises(ValueError, match=r"codes run from .* outside \[0, 50\)"):
            write_code_cache(path, about, [(wrong, labels)])
    with pytest.raises(ValueError, match=r"labels run from .* outside \[0, 3\)"):
        write_code_cache(path, about, [(codes, labels + 3)])
    with pytest.raises(ValueError, match="num_images=7, but 6 were written"):
        write_code_cache(path, about, [(codes[:6], labels[:6])])
    with pytest.raises(ValueError, match=r"need \('b', 2, 6\)"):
        write_code_cache(path, about, [(codes[:, :1], labels)])

    def dies():
        yield codes[:4], labels[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_code_cache(path, about, dies())
    assert list(tmp_path.iterdir()) == []


def test_overwriting_is_asked_for_and_keeps_the_old_until_the_new_is_whole(tmp_path):
    path = tmp_path / "cache"
    old, _ = write(path, manifest())
    with pytest.raises(FileExistsError, match="overwrite"):
        write(path, manifest(), seed=1)
    codes, labels = content(manifest(), 1)
    with pytest.raises(ValueError, match="were written"):
        write_code_cache(path, manifest(), [(codes[:2], labels[:2])], overwrite=True)
    assert np.array_equal(CodeCache.open(path).codes, old)
    new, _ = write(path, manifest(), seed=1, overwrite=True)
    assert np.array_equal(CodeCache.open(path).codes, new)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dear.jpg").write_bytes(b"x")
    with pytest.raises(FileExistsError, match="no code cache"):
        write(tmp_path / "photos", manifest(), overwrite=True)
    assert (tmp_path / "photos" / "dear.jpg").exists()


@pytest.mark.parametrize("name", ["codes.bin", "labels.bin"])
def test_truncated_missing_and_flipped_files(tmp_path, name):
    write(tmp_path / "cache", manifest())
    file = tmp_path / "cache" / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{name} has {len(whole) - 1} bytes.*tells of {len(whole)}.*encode again"):
        CodeCache.open(tmp_path / "cache")
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    cache = CodeCache.open(tmp_path / "cache")
    with pytest.raises(ValueError, match=rf"{name}: sha256"):
        cache.verify()
    file.write_bytes(b"\xff" * len(whole))
    with pytest.raises(ValueError, match=rf"65535.*{name} is damaged"):
        CodeCache.open(tmp_path / "cache").batch([0, 1])
    file.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        CodeCache.open(tmp_path / "cache")


def test_manifest_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no code cache"):
        CodeCache.open(tmp_path / "nothing")
    write(tmp_path / "cache", manifest())
    with pytest.raises(FileNotFoundError, match=r"no code cache .* there; name one of \['.*/cache'\]$"):
        CodeCache.open(tmp_path)
    file = tmp_path / "cache" / "manifest.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps(told | {"schema_version": 99}))
    with pytest.raises(ValueError, match=r"schema_version=99, but this xdlm_image reads 1"):
        CodeCache.open(tmp_path / "cache")
    file.write_text(json.dumps(told | {"colour": "red"}))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged.*colour"):
        CodeCache.open(tmp_path / "cache")
    file.write_text(json.dumps({k: v for k, v in told.items() if k != "grid"}))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged.*grid"):
        CodeCache.open(tmp_path / "cache")
    file.write_text(json.dumps(told)[:40])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        CodeCache.open(tmp_path / "cache")


def test_batch_arguments(tmp_path):
    write(tmp_path / "cache", manifest(num_views=1))
    cache = CodeCache.open(tmp_path / "cache")
    assert cache.batch([0, 1], [False, False])[0].shape == (2, 6)
    with pytest.raises(ValueError, match="plain views only"):
        cache.batch([0, 1], [False, True])
    with pytest.raises(ValueError, match="flips of shape"):
        cache.batch([0, 1], [False])
    for outside in (7, -1):
        with pytest.raises(IndexError, match="holds 7 images"):
            cache.batch([0, outside])


def test_usage_is_counted_over_all_views(tmp_path):
    about = manifest(num_images=2)
    codes = np.zeros((2, 2, 6), np.int64)
    codes[1, 1] = 7
    codes[0, 1] = 7
    write_code_cache(tmp_path / "cache", about, [(codes, np.array([0, 1]))])
    usage = usage_of_cache(CodeCache.open(tmp_path / "cache"))
    assert usage["codes_used"] == 2 and usage["codes_used_percent"] == 4
    assert usage["perplexity"] == pytest.approx(2)
