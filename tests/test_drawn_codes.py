"""Codes of drawn images on disk: they come back, sets grow, and nothing of another set or damaged is taken."""

import json
import os

import numpy as np
import pytest
import torch

from xdlm_image.drawing.drawn_codes import DrawnCodes

KEY = {"seed": 1, "weights": "abc"}


def open_set(folder, num_samples=10, num_codes=24, key=KEY, now="here") -> DrawnCodes:
    return DrawnCodes(folder, key, num_samples, (2, 3), num_codes, {"device": now})


def some_codes(number: int, num_codes: int = 24) -> torch.Tensor:
    return torch.randint(num_codes, (number, 2, 3), generator=torch.Generator().manual_seed(number))


def test_codes_come_back_and_a_set_knows_what_it_lacks(tmp_path):
    drawn = open_set(tmp_path)
    assert not drawn.is_drawn(0, 1)
    drawn.write(0, some_codes(4), 0.5)
    drawn.write(8, some_codes(2), 0.5)
    again = open_set(tmp_path)  # after a kill
    assert again.is_drawn(0, 4) and again.is_drawn(8, 10) and not again.is_drawn(3, 5)
    assert torch.equal(again.read(0, 4), some_codes(4)) and torch.equal(again.read(8, 10), some_codes(2))
    assert again.read(0, 4).dtype == torch.int64 and again.seconds == pytest.approx(3.0)


def test_the_usual_time_of_an_image_has_no_pause_in_it(tmp_path):
    drawn = open_set(tmp_path)
    for start, seconds in ((0, 90.0), (4, 0.5), (8, 0.5)):  # the first batch was compiled
        drawn.write(start, some_codes(min(4, 10 - start)), seconds)
    assert drawn.usual_seconds == 0.5 and drawn.seconds == pytest.approx(4 * 90 + 6 * 0.5)


def test_a_set_grows_and_a_smaller_one_is_its_beginning(tmp_path):
    open_set(tmp_path, 4).write(0, some_codes(4), 0.25)
    larger = open_set(tmp_path, 10)
    assert larger.is_drawn(0, 4) and not larger.is_drawn(4, 5)
    larger.write(4, some_codes(6), 9.0)
    smaller = open_set(tmp_path, 4)
    assert smaller.is_drawn(0, 4) and smaller.seconds == pytest.approx(1.0)
    assert open_set(tmp_path, 10).is_drawn(0, 10)


def test_large_codebooks_keep_their_ids(tmp_path):
    codes = some_codes(3, 100_000)
    drawn = open_set(tmp_path, 3, 100_000)
    drawn.write(0, codes, 1.0)
    assert torch.equal(open_set(tmp_path, 3, 100_000).read(0, 3), codes) and codes.max() > 65_535


def test_who_drew_is_kept_and_who_only_reads_is_not_told_of(tmp_path):
    open_set(tmp_path).write(0, some_codes(4), 0.5)
    open_set(tmp_path).write(4, some_codes(4), 0.5)
    there = open_set(tmp_path, now="there")
    there.write(8, some_codes(2), 0.5)
    assert there.drawn_by == [{"device": "here"}, {"device": "there"}] == open_set(tmp_path, now="elsewhere").drawn_by
    larger = open_set(tmp_path, 30, now="elsewhere")
    larger.write(10, some_codes(20), 0.5)
    assert [start["device"] for start in larger.drawn_by] == ["elsewhere", "here", "there"]  # by images
    assert open_set(tmp_path, 8).drawn_by == [{"device": "here"}]  # the others drew none of these
    about = json.loads((tmp_path / "about.json").read_text())
    del about["drawn_by"]  # of before it was kept
    (tmp_path / "about.json").write_text(json.dumps(about))
    (tmp_path / "starts.bin").unlink()
    assert open_set(tmp_path).drawn_by == []


def test_no_room_is_said_before_anything_is_drawn(tmp_path, monkeypatch):
    open_set(tmp_path, 4).write(0, some_codes(4), 0.25)

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match=r"codes\.bin: no room for the codes of 10 images .*No space.*output_dir"):
            open_set(tmp_path, 10)
    assert open_set(tmp_path, 4).is_drawn(0, 4) and not open_set(tmp_path, 10).is_drawn(4, 10)
    assert (tmp_path / "codes.bin").stat().st_blocks * 512 >= 10 * 6 * 2  # no hole


def test_a_start_that_is_killed_while_its_files_grow_loses_nothing(tmp_path):
    open_set(tmp_path, 4).write(0, some_codes(4), 0.25)
    grown = {"codes.bin": 12, "starts.bin": 2, "seconds.bin": 4}  # bytes an image, in the order in which they grow
    for name in grown:
        with open(tmp_path / name, "ab") as file:
            file.write(bytes(grown[name] + 1))  # an image and a part of one
        larger = open_set(tmp_path, 10)
        assert torch.equal(larger.read(0, 4), some_codes(4)) and larger.is_drawn(0, 4) and not larger.is_drawn(4, 5)
        assert larger.drawn_by == [{"device": "here"}]
        for later in list(grown)[list(grown).index(name) + 1 :]:
            os.truncate(tmp_path / later, 4 * grown[later])  # as before it grew


def test_another_set_and_damage_are_refused(tmp_path):
    open_set(tmp_path).write(0, some_codes(10), 1.0)
    with pytest.raises(ValueError, match="codes of another set of images; remove it"):
        open_set(tmp_path, key={**KEY, "seed": 2})
    assert json.loads((tmp_path / "about.json").read_text())["key"] == KEY
    damaged = np.memmap(tmp_path / "codes.bin", "<u2", "r+")
    damaged[0] = 24
    damaged.flush()
    with pytest.raises(ValueError, match="an id is 24, of 24 codes: damaged"):
        open_set(tmp_path).read(0, 2)
    about = (tmp_path / "about.json").read_text()
    (tmp_path / "about.json").write_text(about[:-20])
    with pytest.raises(ValueError, match=r"about\.json: damaged .*; remove the folder"):
        open_set(tmp_path)
    (tmp_path / "about.json").write_text(about)
    file = tmp_path / "codes.bin"
    for cut in (1, 12):  # a byte, an image
        file.write_bytes(file.read_bytes()[:-cut])
        with pytest.raises(ValueError, match="was cut off: damaged"):
            open_set(tmp_path)
