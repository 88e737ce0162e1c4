"""Which files of a folder are of which split and class, and the errors."""

from __future__ import annotations

import hashlib
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from PIL import Image
from test_images import GREY, class_folder, folder_data

from xdlm_image import ranks
from xdlm_image.data import images as images_module
from xdlm_image.data.folders import find_split, hashed_split
from xdlm_image.data.images import open_images
from xdlm_image.features.extractor_training import train_extractor
from xdlm_image.recipes import DataOptions, ExtractorRecipe


def test_own_folders_are_used_and_val_is_the_test_set_of_imagenet(tmp_path):
    for split, number in (("train", 40), ("val", 4)):
        for name in ("a", "b"):
            class_folder(tmp_path / split, name, number)
    data = folder_data(tmp_path)
    sizes = {split: len(open_images(data, split)) for split in ("train", "validation", "test")}
    assert sizes["test"] == 8 and sizes["train"] + sizes["validation"] == 80 and 0 < sizes["validation"] < 20
    class_folder(tmp_path / "test", "a", 2)
    class_folder(tmp_path / "test", "b", 2)
    sizes = {split: len(open_images(data, split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 80, "validation": 8, "test": 4}


def test_flat_folder_is_split_by_name_whatever_else_is_there(tmp_path, capsys):
    for name in ("a", "b"):
        class_folder(tmp_path, name, 120)
    Image.fromarray(GREY).save(tmp_path / "of no class.png")
    data = folder_data(tmp_path)
    before = {s: set(open_images(data, s).paths) for s in ("train", "validation", "test")}
    assert sum(map(len, before.values())) == len(set().union(*before.values())) == 240
    assert capsys.readouterr().err.count("note: 1 images beside the class folders") == 1
    assert 2 <= len(before["validation"]) <= 30 and 2 <= len(before["test"]) <= 30
    Image.fromarray(GREY).save(tmp_path / "a" / "new.png")
    after = {s: set(open_images(data, s).paths) for s in ("train", "validation", "test")}
    assert all(before[s] <= after[s] for s in before)  # no image changes its split because another came


def paths_of(data: DataOptions, split: str) -> set[str]:
    return set(open_images(data, split).paths)


def test_what_is_cut_off_by_default_is_what_it_always_was(tmp_path):
    for i in range(300):
        twentieth = int.from_bytes(hashlib.sha256(f"a/{i}.png".encode()).digest()[:8], "big") * 20 >> 64
        for cut in (["validation", "test"], ["validation"]):
            fractions = {"validation": 0.05, "test": 0.05}
            wanted = cut[twentieth] if twentieth < len(cut) else "train"
            assert hashed_split(f"a/{i}.png", {name: fractions[name] for name in cut}) == wanted


@pytest.mark.parametrize("flat", [True, False])
def test_validation_fraction_moves_validation_alone(tmp_path, capsys, flat):
    class_folder(tmp_path if flat else tmp_path / "train", "a", 200)
    if not flat:
        class_folder(tmp_path / "val", "a", 4)  # as in ImageNet: the test images
    data = [folder_data(tmp_path, validation_fraction=fraction) for fraction in (0, 0.02, 0.05, 0.3)]
    tests = [paths_of(d, "test") for d in data]
    assert all(test == tests[0] for test in tests) and len(tests[0]) == (10 if flat else 4)
    inside: set[str] = set()
    for fraction, d in zip((0.02, 0.05, 0.3), data[1:]):
        validation, train = paths_of(d, "validation"), paths_of(d, "train")
        assert inside < validation and abs(len(validation) - 200 * fraction) < 15
        assert len(train | validation) == len(train) + len(validation) == (190 if flat else 200)
        inside = validation
    assert len(paths_of(data[0], "train")) == (190 if flat else 200)
    with pytest.raises(ValueError, match=r"data.validation_fraction=0: there is no validation split.*leave"):
        open_images(data[0], "validation")
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if line.startswith("validation: ")]
    assert len(told) == 3 and "images of 200 in" in told[1] and "cut by file name: 5 % for validation" in told[1]
    assert any(line.startswith(f"test: {len(tests[0])} images of ") for line in lines)
    open_images(data[2], "validation")
    assert capsys.readouterr().err == ""  # said once


def test_validation_fraction_that_does_nothing_is_refused(tmp_path):
    for split in ("train", "val", "test"):
        class_folder(tmp_path / split, "a", 2)
    with pytest.raises(ValueError, match="validation_fraction=0.1: .* has folders for validation and test"):
        open_images(folder_data(tmp_path, validation_fraction=0.1), "train")
    with pytest.raises(ValueError, match="validation_fraction=0.1: does nothing for fashion-mnist"):
        DataOptions(validation_fraction=0.1)
    with pytest.raises(ValueError, match="validation_fraction=0.6: must lie in"):
        folder_data(tmp_path, validation_fraction=0.6)


def test_images_without_class_folders_are_one_class(tmp_path):
    class_folder(tmp_path, "loose", 60)
    (tmp_path / "loose" / "notes.txt").write_text("no image")
    data = folder_data(tmp_path / "loose")
    images = {split: open_images(data, split) for split in ("train", "validation", "test")}
    assert sum(map(len, images.values())) == 60
    assert all(part.class_names == ["images"] and not part.labels.any() for part in images.values())
    assert images["train"][0][0].shape == (3, 8, 8)
    class_folder(tmp_path / "own", "train", 3)
    class_folder(tmp_path / "own", "val", 2)
    assert [len(open_images(folder_data(tmp_path / "own"), split)) for split in ("train", "test")] == [3, 2]
    with pytest.raises(ValueError, match="one class, 'images', teaches a classifier nothing"):
        train_extractor(ExtractorRecipe(str(tmp_path / "extractor"), data))


def test_folders_that_are_taken_for_one_class_are_told_of(tmp_path, capsys):
    for name in ("food", "people"):
        class_folder(tmp_path / "deep" / "a" / "b", name, 30)
    class_folder(tmp_path / "loose", "a", 30)
    class_folder(tmp_path / "loose" / "a", "more", 30)
    for root, wanted in (("deep", ["a"]), ("deep/a/b", ["food", "people"]), ("loose", ["a"])):
        assert open_images(folder_data(tmp_path / root), "train").class_names == wanted
        note = f"note: the 2 folders in {tmp_path / 'deep/a/b'} are one class, 'a'; if each is one, name that\n"
        assert (note in (said := capsys.readouterr().err)) == (root == "deep") == ("one class" in said)


def test_files_of_other_kinds_are_told_of(tmp_path, capsys):
    class_folder(tmp_path, "a", 3)
    for name in ("a/1.gif", "a/2.GIF", "a/notes", "a/.hidden", "list.csv"):
        (tmp_path / name).touch()
    open_images(folder_data(tmp_path), "train")
    told = capsys.readouterr().err
    assert "not taken (.gif 2, notes 1); .jpg .jpeg .png" in told and "csv" not in told and "hidden" not in told
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.heic").touch()
    with pytest.raises(ValueError, match=r"no images in b; files of other kinds are .*\.heic 1; \.jpg .* are taken"):
        open_images(folder_data(tmp_path), "train")


def test_fingerprint_tells_images_and_splits_apart(tmp_path):
    for split in ("train", "val", "test"):
        class_folder(tmp_path / split, "a")
    data = folder_data(tmp_path)
    first = open_images(data, "test").fingerprint
    assert first == open_images(data, "test").fingerprint
    assert first != open_images(data, "validation").fingerprint  # same files in another split
    Image.fromarray(GREY[:9]).save(tmp_path / "test" / "a" / "000.png")
    assert first != open_images(data, "test").fingerprint


def test_folder_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.root='.*nowhere'.*name a folder"):
        open_images(folder_data(tmp_path / "nowhere"), "train")
    with pytest.raises(FileNotFoundError, match=r"data\.root='.*\.py': a file, not a folder; name a folder"):
        open_images(folder_data(__file__), "train")
    with pytest.raises(ValueError, match="no folder of class folders.*put the images of each class into a folder"):
        open_images(folder_data(tmp_path), "train")
    class_folder(tmp_path, "a", 2)
    (tmp_path / "hollow").mkdir()
    with pytest.raises(ValueError, match="hollow"):
        open_images(folder_data(tmp_path), "train")
    (tmp_path / "hollow").rmdir()
    (tmp_path / "a" / "loop").symlink_to("..")
    with pytest.raises(ValueError, match="the link .*loop leads to .*take the link away"):
        open_images(folder_data(tmp_path), "train")
    (tmp_path / "a" / "loop").unlink()
    with pytest.raises(ValueError, match=r"split 'validation' is empty.* raise data\.validation_fraction"):
        open_images(folder_data(tmp_path), "validation")
    (tmp_path / "a" / "001.png").unlink()
    with pytest.raises(ValueError, match="split 'test' is empty.* test yourself, or leave the split out"):
        open_images(folder_data(tmp_path), "test")
    with pytest.raises(ValueError, match="split='dev'.*train, validation, test"):
        open_images(folder_data(tmp_path), "dev")


@pytest.mark.parametrize("folder", ["images", "images/a", "images/a/deeper"])
def test_a_folder_that_cannot_be_listed_is_an_error_and_no_loss(tmp_path, folder, monkeypatch):
    for inner in ("a/deeper", "b"):
        class_folder(tmp_path / "images", inner)
    scandir = os.scandir

    def refused(path):
        if str(path) == str(tmp_path / folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(ValueError, match=rf"data\.root: the folder .*{folder} cannot be listed \(Perm.*readable"):
        open_images(folder_data(tmp_path / "images"), "train")


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_the_first_rank_lists_for_all_and_all_raise_what_it_finds(tmp_path, monkeypatch, name):
    class_folder(tmp_path, "a")
    data = folder_data(tmp_path / name)
    told, listed, ends = [], [], []
    monkeypatch.setattr(images_module, "find_split", lambda *args: listed.append(1) or find_split(*args))
    monkeypatch.setattr(ranks, "of_first_rank", lambda value: (told.append(value), told[0])[1])
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "rank_and_world", lambda rank=rank: (rank, 2))
        try:
            ends.append(open_images(data, "train").paths)
        except FileNotFoundError as error:
            ends.append(str(error))
    assert ends[0] == ends[1] and len(ends[0]) > 0 and len(listed) == 1


def test_classes_that_a_cut_leaves_without_training_images_are_named(tmp_path, capsys):
    class_folder(tmp_path, "a", 60)
    cut = {"validation": 0.05, "test": 0.05}
    names = [f"{i:03d}" for i in range(100) if hashed_split(f"{i:03d}/000.png", cut) != "train"]
    assert len(names) > 5
    for name in names:
        class_folder(tmp_path, name, 1)
    open_images(folder_data(tmp_path), "validation")
    assert "note:" not in capsys.readouterr().err
    open_images(folder_data(tmp_path), "train")
    which = f"{len(names)} of {len(names) + 1} classes is left to train on ({', '.join(names[:5])}, ...)"
    assert f"note: no image of {which}" in capsys.readouterr().err


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "__MACOSX", "@eaDir"])
def test_what_is_hidden_is_no_class_and_no_image(tmp_path, hidden, capsys):
    for folder in (".", "a"):
        class_folder(tmp_path / "classes" / folder, hidden, 1)
    class_folder(tmp_path / "classes", "a/deeper")
    (tmp_path / "classes" / "a" / "._000.png").write_text("of macOS")
    images = open_images(folder_data(tmp_path / "classes", validation_fraction=0), "train")
    assert images.class_names == ["a"] and {Path(p).parent.name for p in images.paths} == {"deeper"}
    assert "; 1 class: a\n" in capsys.readouterr().err
    class_folder(tmp_path, "loose")
    class_folder(tmp_path / "loose", hidden)
    assert open_images(folder_data(tmp_path / "loose", validation_fraction=0), "train").class_names == ["images"]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["val", "test"], r"\['test', 'val'\] are called like splits, and none is 'train'; call"),
        (["training", "Test"], "none is 'train'"),
        (["train", "valid"], "'valid' beside 'train' would not be taken; call the folders of splits train, val"),
        (["train", "val", "validation"], "'validation' beside 'train'"),
        (["train", "val", "test"], None),
        (["train", "notes"], None),
        (["val", "a"], None),
    ],
)
def test_folders_called_like_splits_are_taken_or_refused(tmp_path, folders, message):
    for name in folders:
        class_folder(tmp_path / name, "a")
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        open_images(folder_data(tmp_path), "train")


def test_splits_must_have_the_same_classes(tmp_path):
    class_folder(tmp_path / "train", "a")
    class_folder(tmp_path / "train", "b")
    class_folder(tmp_path / "val", "a")
    with pytest.raises(ValueError, match=r"differ in the classes \['b'\]"):
        open_images(folder_data(tmp_path), "test")
