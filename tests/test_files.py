"""Permissions of written files, and folders that are replaced whole."""

import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import save_file

from xdlm_image.files import new_folder, replace_folder, share_permissions


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_files_become_as_readable_as_the_umask_allows(tmp_path):
    folder = tmp_path / "run" / "deep"
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, folder / "weights.safetensors")
    (folder / "weights.safetensors").chmod(0o600)  # what some versions of safetensors leave
    (folder / "tool").touch()
    (folder / "tool").chmod(0o700)
    (tmp_path / "outside").touch()
    (tmp_path / "outside").chmod(0o600)
    (folder / "link").symlink_to(tmp_path / "outside")
    before = os.umask(0o027)
    try:
        share_permissions(tmp_path / "run")
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((folder / name).stat().st_mode) for name in ("weights.safetensors", "tool", "link")}
    assert modes == {"weights.safetensors": 0o640, "tool": 0o740, "link": 0o600}
    assert list((tmp_path / "run").iterdir()) == [folder]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    for name, text in (("model", "old"), ("new", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    rename = os.replace

    def interrupted(source, target):
        if source == tmp_path / "new":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        replace_folder(tmp_path / "new", tmp_path / "model")
    assert (tmp_path / "model" / "file").read_text() == "old"
    (tmp_path / "model").rename(tmp_path / ".model.old")  # killed there
    (tmp_path / ".model.partial").mkdir()
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "model") as partial:
        assert (tmp_path / "model" / "file").read_text() == "old" and [*partial.iterdir()] == []
        raise KeyboardInterrupt
    assert sorted(tmp_path.iterdir()) == [tmp_path / "model", tmp_path / "new"]
    with new_folder(tmp_path / "model") as partial:
        (partial / "file").write_text("newer")
    assert (tmp_path / "model" / "file").read_text() == "newer"
    shutil.copytree(tmp_path / "model", tmp_path / ".model.old")  # killed before it was removed
    replace_folder(tmp_path / "new", tmp_path / "model")
    assert (tmp_path / "model" / "file").read_text() == "new" and [*tmp_path.iterdir()] == [tmp_path / "model"]
