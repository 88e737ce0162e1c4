"""Files that nobody vouches for: none of their code runs, and each is refused in words that help."""

import io
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from xdlm_image.cli import main
from xdlm_image.conversion.checkpoint_file import Inert, check_tensor, check_tensors, read_checkpoint, setting
from xdlm_image.conversion.official_xdlm import convert_xdlm
from xdlm_image.conversion.vq_tokenizers import convert_llamagen, convert_taming
from xdlm_image.recipes import ConversionRecipe, ConvertXDLMRecipe


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def payloads(marker) -> dict:
    write = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "posix by its own name": Call(sys.modules["posix"].system, f"touch {marker}"),
        "eval": Call(eval, write),
        "exec": Call(exec, write),
        "Popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "open": Call(open, str(marker), "w"),
        "torch.load": Call(torch.load, str(marker)),
    }


PAYLOADS = list(payloads("marker"))
PLACES = {
    "alone": lambda payload: payload,
    "beside tensors": lambda payload: {"model": {"a": torch.zeros(2)}, "extra": payload},
    "deep in the settings": lambda payload: {
        "state_dict": {"a": torch.zeros(2)},
        "hyper_parameters": {"config": {"algo": [1, {"name": payload}]}},
    },
    "as a key": lambda payload: {"state_dict": {"a": torch.zeros(2)}, "callbacks": {("x", payload): 1}},
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("payload", PAYLOADS)
def test_calls_are_refused_by_name_and_never_made(tmp_path, payload, place):
    marker = tmp_path / "marker"
    torch.save(place(payloads(marker)[payload]), tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match="is a pickle of more than tensors: it names .*weights_only=False") as error:
        read_checkpoint(tmp_path / "hostile.pt")
    assert not marker.exists()
    assert any(
        name in str(error.value) for name in ("system", "eval", "exec", "Popen", "getattr", "open", "torch.serial")
    )


def test_every_verb_refuses_and_leaves_nothing(tmp_path, capsys):
    marker = tmp_path / "marker"
    torch.save({"model": {}, "state_dict": {}, "ema": payloads(marker)["os.system"]}, tmp_path / "hostile.pt")
    recipe = ConversionRecipe(str(tmp_path / "hostile.pt"), str(tmp_path / "out"))
    for verb in (convert_llamagen, convert_taming):
        with pytest.raises(ValueError, match="system"):
            verb(recipe)
    with pytest.raises(OSError, match="tokenizer"):  # the tokenizer comes first
        convert_xdlm(ConvertXDLMRecipe(checkpoint=recipe.checkpoint, output=recipe.output, tokenizer="nowhere", k=0))
    arguments = ["convert-llamagen", "--checkpoint", recipe.checkpoint, "--output", recipe.output]
    assert main(arguments) == 2 and "more than tensors" in capsys.readouterr().err
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_settings_are_never_brought_to_life(tmp_path, monkeypatch):
    """A name that is let through as a setting is not imported and not called, even where it exists and would act."""
    marker = tmp_path / "marker"
    package = tmp_path / "vision_datasets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "evil.py").write_text(
        f"def act(*a):\n    open({str(marker)!r}, 'a').write('called')\n\n\nclass Thing:\n"
        "    def __setstate__(self, s):\n        act()\n\n"
        "    def __reduce_ex__(self, p):\n        return (Thing, (), {'secret': 3})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import vision_datasets.evil as evil

    content = {"hyper_parameters": {"a": Call(evil.act, 1), "b": evil.Thing()}, "state_dict": {"w": torch.ones(2)}}
    torch.save(content, tmp_path / "lightning.ckpt")
    (package / "evil.py").write_text(f"open({str(marker)!r}, 'a').write('imported')\n")
    for name in ("vision_datasets.evil", "vision_datasets"):
        monkeypatch.delitem(sys.modules, name)
    allowed = torch.serialization.get_safe_globals()
    file = read_checkpoint(tmp_path / "lightning.ckpt")
    assert torch.serialization.get_safe_globals() == allowed  # nothing stays allowed
    assert not marker.exists() and "vision_datasets.evil" not in sys.modules
    assert isinstance(file.content["hyper_parameters"]["a"], Inert)
    assert setting(file.content, "hyper_parameters", "b", "secret") == 3
    assert torch.equal(file.content["state_dict"]["w"], torch.ones(2))
    assert file.inert == ["vision_datasets.evil.Thing", "vision_datasets.evil.act"]


# --- damaged files, and files that are something else ---------------------------------------------


def whole(path, content=None):
    torch.save({"model": {"a": torch.randn(1000)}} if content is None else content, path)
    return path.read_bytes()


def forged(path, pickled: bytes, data: bytes = b"\0" * 16, compression=zipfile.ZIP_STORED):
    """An archive as torch.save writes it, around a pickle of ours."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in (("data.pkl", pickled), ("byteorder", b"little"), ("data/0", data), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", content)


def pickled_tensor(numel: int, size: tuple, storage=torch.FloatStorage) -> bytes:
    """A tensor of `size` on a storage that claims `numel` numbers."""

    class Forger(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", storage, "0", "cpu", numel) if value == "here" else None

    buffer = io.BytesIO()
    strides = (1,) * len(size)
    Forger(buffer, protocol=2).dump(
        {"model": {"a": Call(torch._utils._rebuild_tensor_v2, "here", 0, size, strides, False, None)}}
    )
    return buffer.getvalue()


def refuse(path, match):
    with pytest.raises(ValueError, match=match):
        read_checkpoint(path)


def test_truncated_files(tmp_path):
    data = whole(tmp_path / "a.pt")
    for length in (len(data) - 1, len(data) // 2, 64, 5):
        (tmp_path / "a.pt").write_bytes(data[:length])
        refuse(tmp_path / "a.pt", "is truncated or damaged .*; fetch it again")
    save_file({"a": torch.randn(1000)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    for length in (len(data) - 1, 60, 20):
        (tmp_path / "a.safetensors").write_bytes(data[:length])
        refuse(tmp_path / "a.safetensors", "truncated safetensors file")


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "weights.pt"
    page = b"\n<!DOCTYPE html>\n<html><body>Sign in to download</body></html>"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 287000000\n"
    for content, match in (
        (b"", "is empty"),
        (page, "is a web page"),
        (pointer, "is a git-lfs pointer.*git lfs pull"),
        (b"\x1f\x8b" + bytes(100), "neither a safetensors file nor one of torch.save"),
        (b"QK\x03\x04" + whole(tmp_path / "a.pt")[4:], "neither"),  # wrong magic
        (pickle.dumps({"a": 1}), "is a bare pickle"),
    ):
        path.write_bytes(content)
        refuse(path, match)
    torch.save({"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    refuse(path, "older than PyTorch 1.6's file format")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    refuse(path, "TorchScript archive")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/readme.txt", "hello")
    refuse(path, "is a zip archive, but none of torch.save")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_checkpoint(tmp_path)


def test_a_bare_pickle_is_not_run(tmp_path):
    marker = tmp_path / "marker"
    for protocol in (0, 2, 4):
        (tmp_path / "a.pt").write_bytes(pickle.dumps(payloads(marker)["os.system"], protocol=protocol))
        refuse(tmp_path / "a.pt", "bare pickle|neither")
    assert not marker.exists()


def test_names_that_are_made_on_the_stack_are_refused(tmp_path):
    """Protocol 4 builds names from strings, past what a search for names would see."""
    marker = tmp_path / "marker"
    forged(tmp_path / "a.pt", pickle.dumps(payloads(marker)["os.system"], protocol=4))
    refuse(tmp_path / "a.pt", "cannot be taken apart safely")
    assert not marker.exists()


def test_sizes_that_the_file_does_not_hold_are_refused_without_allocating(tmp_path):
    path = tmp_path / "a.pt"
    recipe = ConversionRecipe(str(path), str(tmp_path / "out"))
    forged(path, pickled_tensor(4, (4,)))
    assert read_checkpoint(path).content["model"]["a"].shape == (4,)  # the forgery itself is well-formed
    for numel, size, match in (
        (10**13, (10**13,), "cannot be read"),
        (4, (10**13,), "cannot be read"),
        (10**13, (4,), "is not a LlamaGen"),  # 40 TB of storage, claimed and never made
    ):
        forged(path, pickled_tensor(numel, size))
        with pytest.raises(ValueError, match=match):
            convert_llamagen(recipe)
    forged(path, pickled_tensor(4, (4,)), compression=zipfile.ZIP_DEFLATED)
    refuse(path, "compressed entries")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_that_are_no_plain_numbers_are_named():
    for tensor, message in (
        (torch.ones(2, 2).to_sparse(), "a is torch.float32, torch.sparse_coo: no plain"),
        (torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), "a is torch.qint8"),
        (torch.ones(2, device="meta"), "a is torch.float32, torch.strided: no plain"),
        (torch.ones(2, dtype=torch.int64), "a is torch.int64"),
        (torch.ones(1).expand(2), r"a claims \(2,\) numbers"),
    ):
        with pytest.raises(ValueError, match=f"^here: {message}"):
            check_tensor("a", tensor, "here")
    check_tensor("a", torch.ones(2, 2).T, "here")
    memory = torch.zeros(10).untyped_storage()  # entries of a forged archive may lie over each other
    numbers = [torch.empty(0).set_(memory[start : start + 20]) for start in (0, 20, 4)]
    check_tensors({"a": numbers[0], "b": numbers[1]}, "here")
    with pytest.raises(ValueError, match="here: its tensors claim 40 bytes out of the same 24"):
        check_tensors({"a": numbers[0], "b": numbers[2]}, "here")


def test_nested_containers_do_not_explode(tmp_path):
    level: object = "x"
    for _ in range(60):  # 2^60 leaves, shared
        level = {"config": level, "other": level}
    torch.save({"hyper_parameters": level, "state_dict": {"a": torch.zeros(1)}}, tmp_path / "a.pt")
    file = read_checkpoint(tmp_path / "a.pt")
    assert setting(file.content, "hyper_parameters", "config", "algo", "name") is None
    itself: list = []
    itself.append(itself)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "loop": itself}, tmp_path / "a.pt")
    assert set(read_checkpoint(tmp_path / "a.pt").content) == {"state_dict", "loop"}
