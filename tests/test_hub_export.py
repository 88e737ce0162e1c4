"""Self-contained folders: they load without the package, run no code unasked, keep their code."""

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from hub_server import HubServer
from huggingface_hub import ModelCard
from tiny_parts import NUM_CODES, save_pipeline

from xdlm_image.drawing.opening import open_pipeline
from xdlm_image.pipelines import XDLMImg2ImgPipeline, XDLMPipeline
from xdlm_image.pipelines.folder_check import own_file
from xdlm_image.pipelines.self_contained import write_folder
from xdlm_image.pipelines.travelling_code import code_of

LABELS = ["cat", 0, "wasp"]
CLEAN = """
import importlib.abc, json, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "xdlm_image":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Refuse())
sys.path.append(SITE)
try:
    import xdlm_image
    sys.exit("xdlm_image can be imported: this proves nothing")
except ModuleNotFoundError:
    pass
"""
DRAW = """
import torch
def codes(pipe):
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    return pipe(LABELS, num_steps=4, guidance_scale=1.5, generator=generators, output_type="latent").images.tolist()
"""


def load(folder: Path) -> XDLMPipeline:
    return XDLMPipeline.from_pretrained(folder)


def codes(pipe) -> list:
    scope: dict = {"LABELS": LABELS}
    exec(DRAW, scope)
    return scope["codes"](pipe)


def run(program: str, folder: Path, clean: bool, **environment: str) -> tuple[dict, str]:
    """Run a program in its own process, without the package if `clean`; what it put into `found`, and its stderr."""
    head = f"SITE, LABELS = {str(Path(diffusers.__file__).parents[1])!r}, {LABELS!r}\nimport json\nfound = {{}}\n"
    text = head + (CLEAN if clean else "") + DRAW + program + "\nprint('FOUND', json.dumps(found))"
    hub = {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, *(["-I", "-S"] if clean else []), "-c", text],
        env=os.environ | hub | environment, capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))
    return json.loads(line.removeprefix("FOUND")), done.stderr


def texts(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): p.read_text(encoding="utf-8")
        for p in sorted(folder.rglob("*"))
        if p.suffix in (".py", ".json", ".md")
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("saved") / "pipeline", k=0.3)


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory) -> Path:
    return load(saved).save_for_hub(tmp_path_factory.mktemp("hub") / "tiny", card="# A card\n")


def test_an_export_that_is_stopped_leaves_the_folder_that_was_there(saved, tmp_path, monkeypatch):
    folder, rename = tmp_path / "tiny", os.replace
    load(saved).save_for_hub(folder, card="# The first\n")

    def interrupted(source, target):
        if Path(target) == folder and str(source).endswith(".partial"):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        load(saved).save_for_hub(folder, card="# The second\n")
    assert [*tmp_path.iterdir()] == [folder] and "# The first" in (folder / "README.md").read_text()


def test_an_export_after_one_that_was_killed_tidies_up(saved, tmp_path):
    """Killed while it wrote, and between the two renamings: no process is left that would put anything back."""
    folder, old = tmp_path / "tiny", tmp_path / ".tiny.old"
    load(saved).save_for_hub(folder, card="# The first\n")
    folder.rename(old)
    (tmp_path / ".tiny.partial").mkdir()
    (tmp_path / ".tiny.partial" / "weights").touch()
    pipe = load(saved)
    with pytest.raises(TypeError):
        write_folder(pipe, folder, None, {"a": None}, {})  # fails on the way, and what was there is back
    assert [*tmp_path.iterdir()] == [folder] and "# The first" in (folder / "README.md").read_text()
    folder.rename(old)
    pipe.save_for_hub(folder, card="# The second\n")
    assert [*tmp_path.iterdir()] == [folder] and "# The second" in (folder / "README.md").read_text()


# --- what is written ------------------------------------------------------------------------------


def test_the_folder_holds_code_weights_and_card_and_nothing_of_this_machine(saved, exported):
    names = {str(p.relative_to(exported)) for p in exported.rglob("*") if p.is_file()}
    versioned = {re.sub(r"_\d\w*?_[0-9a-f]{8}\.py$", ".py", name) for name in names}
    assert {"README.md", "model_index.json", "pipeline_xdlm.py", "class_labels.py", "self_contained.py"} <= versioned
    assert {"transformer/transformer_xdlm.py", "scheduler/scheduling_xdlm.py", "scheduler/process_xdlm.py"} <= versioned
    assert {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt"))]
    for name, text in texts(exported).items():
        assert str(saved.parent) not in text and (name.endswith(".py") or "_name_or_path" not in text)
    index = json.loads((exported / "model_index.json").read_text())
    version = re.sub(r"\W", "_", importlib.metadata.version("xdlm-image"))
    assert all(f"_{version}_" in name for name in names if name.endswith(".py"))
    assert f"{index['_class_name'][0]}.py" in names and index["_class_name"][1] == "XDLMPipeline"
    assert f"transformer/{index['transformer'][0]}.py" in names and index["vqvae"] == ["diffusers", "VQModel"]
    modes = {stat.S_IMODE(p.stat().st_mode) for p in exported.rglob("*") if p.is_file()}
    assert len(modes) == 1  # safetensors alone would be the owner's only


def test_code_names_follow_content(saved, exported, tmp_path):
    again = load(saved).save_for_hub(tmp_path / "again", card="x")
    assert {n: t for n, t in texts(again).items() if n != "README.md"} == {
        n: t for n, t in texts(exported).items() if n != "README.md"
    }


def altered_scheduler(folder: Path, monkeypatch) -> type:
    """The scheduler from a copy of its files, of which only the sibling is changed."""
    home = Path(sys.modules["xdlm_image.schedulers.scheduling_xdlm"].__file__).parent
    (folder / "altered").mkdir()
    (folder / "altered" / "__init__.py").touch()
    for name in ("scheduling_xdlm.py", "process_xdlm.py", "row_draw.py"):
        shutil.copy(home / name, folder / "altered")
    with (folder / "altered" / "process_xdlm.py").open("a") as file:
        file.write("\nXDLMProcess.altered = True\n")
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module("altered.scheduling_xdlm").XDLMScheduler


def test_exports_of_other_code_live_side_by_side(saved, exported, tmp_path, modules, monkeypatch):
    pipe = load(saved)
    pipe.register_modules(scheduler=altered_scheduler(tmp_path, monkeypatch)(k=0.3, num_codes=NUM_CODES))
    other = pipe.save_for_hub(tmp_path / "other", card="x")
    loaded = {
        folder: DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        for folder in (exported, other, exported)
    }
    one, two = loaded[exported].scheduler, loaded[other].scheduler
    assert not hasattr(one.process, "altered") and two.process.altered
    assert type(loaded[exported].transformer).__module__ == type(loaded[other].transformer).__module__  # the same code
    assert codes(loaded[exported]) == codes(loaded[other]) == codes(pipe)
    copies = [p.name for p in (modules / "diffusers_modules/local").rglob("process_xdlm*.py")]
    assert len(set(copies)) == 2


def test_code_that_cannot_travel_is_refused_and_leaves_nothing(saved, tmp_path, monkeypatch):
    (tmp_path / "strange").mkdir()
    source = {
        "library": ("import yaml\n", "line 1: imports 'yaml'"),
        "package": ("from xdlm_image.schedulers import XDLMScheduler\n", "imports 'xdlm_image.schedulers'"),
        "outside": ("from .. import models\n", "cannot travel; write 'from .name import"),
        "whole": ("from . import library\n", "cannot travel"),
        "dotted": ("from .a.b import X\n", "'from .a.b import X' cannot travel"),
        "circle": ("from .circle import Own\n", "code in circles"),
        "text": ('X = """\nfrom .nowhere import thing\n"""\n', "reads like an import of 'nowhere'"),
    }
    for name, (text, _) in source.items():
        (tmp_path / "strange" / f"{name}.py").write_text(text)
    for name, (_, error) in source.items():
        module = type(sys)(f"strange.{name}")
        module.__file__ = str(tmp_path / "strange" / f"{name}.py")
        monkeypatch.setitem(sys.modules, f"strange.{name}", module)
        if name != "text":
            with pytest.raises(ValueError, match=error):
                code_of(f"strange.{name}")
            continue
        pipe = load(saved)
        pipe.register_modules(scheduler=type("S", (type(pipe.scheduler),), {"__module__": "strange.text"})(k=0.3))
        with pytest.raises(ValueError, match=error):
            pipe.save_for_hub(tmp_path / "out", card="x")
        assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_code_is_cut_into_lines_as_python_does(tmp_path, monkeypatch):
    module = type(sys)("paged.own")
    module.__file__ = str(tmp_path / "own.py")
    (tmp_path / "own.py").write_text('"""A page.\fAnother."""\nfrom .sibling import X\n')
    (tmp_path / "sibling.py").write_text("X = 1\n")
    monkeypatch.setitem(sys.modules, "paged.own", module)
    own, sibling = code_of("paged.own").items()
    assert own[1] == f'"""A page.\fAnother."""\nfrom .{sibling[0]} import X\n'


def test_other_peoples_folders_are_not_replaced(saved, exported, tmp_path):
    pipe = load(saved)
    target = tmp_path / "out"
    shutil.copytree(exported, target)
    pipe.save_for_hub(target, card="new")  # an earlier export
    assert (target / "README.md").read_text() == "new"
    (target / ".git").mkdir()  # somebody works in it
    with pytest.raises(FileExistsError, match=r"no export wrote \(\.git\).*overwrite"):
        pipe.save_for_hub(target, card="newer")
    with pytest.raises(FileExistsError, match="no export wrote"):
        pipe.save_for_hub(saved, card="newer")
    (target / ".git").rmdir()
    for name in ("transformer/notes.txt", "vqvae/mine/x.bin", "scheduler/mine.py"):  # of somebody, in a part's folder
        own = target / name
        own.parent.mkdir(exist_ok=True)
        own.write_text("mine")
        with pytest.raises(FileExistsError, match=rf"no export wrote \({'/'.join(name.split('/')[:2])}\)"):
            pipe.save_for_hub(target, card="newer")
        assert own.read_text() == "mine"
        shutil.rmtree(own.parent) if own.parent.name == "mine" else own.unlink()
    pipe.save_for_hub(target, card="new", variant="fp16", max_shard_size="4KB")
    pipe.save_for_hub(target, card="new")  # over files of every name that an export gives
    (target / ".git").mkdir()
    assert (target / "README.md").read_text() == "new" and load(saved)
    pipe.save_for_hub(target, card="newer", overwrite=True)
    assert (target / "README.md").read_text() == "newer" and not (target / ".git").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "link").symlink_to(target, target_is_directory=True)
    pipe.save_for_hub(tmp_path / "link", card="newest")
    assert (tmp_path / "link" / "README.md").read_text() == "newest" and not (tmp_path / "link").is_symlink()
    assert (target / "README.md").read_text() == "newer"  # what the link led to
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "out"]


def test_links_of_a_folder_from_elsewhere_carry_nothing_of_this_machine(exported, tmp_path):
    (tmp_path / "key").write_text("a secret of this machine")
    theirs = shutil.copytree(exported, tmp_path / "theirs")
    (theirs / "README.md").unlink()
    for name in ("README.md", "samples.png"):
        (theirs / name).symlink_to("../key")
    text, files = load(theirs).make_card(None, "name", tmp_path, {})
    assert "secret" not in text and "secret" not in str([p.read_bytes()[:99] for p in files.values()])
    cache = tmp_path / "models--me--tiny"  # the hub's own links are followed
    (cache / "blobs").mkdir(parents=True)
    snapshot = shutil.copytree(exported, cache / "snapshots" / "1234")
    (snapshot / "README.md").rename(cache / "blobs" / "ab")
    (snapshot / "README.md").symlink_to("../../blobs/ab")
    assert load(snapshot).make_card(None, "name", tmp_path, {}) == ("# A card\n", {})
    (tmp_path / "blobs").mkdir()  # of no cache: one level too high
    (cache / "blobs" / "ab").rename(tmp_path / "blobs" / "ab")
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to("../../../blobs/ab")
    assert (snapshot / "README.md").read_text() == "# A card\n" and not own_file(snapshot, "README.md")


def test_saving_code_leaves_other_peoples_files_alone(exported, tmp_path, modules):
    pipe = DiffusionPipeline.from_pretrained(str(exported), trust_remote_code=True)
    (tmp_path / "models" / "other").mkdir(parents=True)
    theirs = {"list.json": "[1]", "other/config.json": '{"_name_or_path": "kept"}', "no.json": "{"}
    for name, text in theirs.items():
        (tmp_path / "models" / name).write_text(text)
    pipe.save_pretrained(tmp_path / "models")
    assert {name: (tmp_path / "models" / name).read_text() for name in theirs} == theirs
    own = texts(tmp_path / "models").items() - theirs.items()
    assert {"README.md": "# A card\n", **dict(own)} == texts(exported)


# --- loading --------------------------------------------------------------------------------------


def test_the_package_runs_its_own_code_only(saved, exported, tmp_path, modules):
    poisoned = tmp_path / "poisoned"
    shutil.copytree(exported, poisoned)
    for file in poisoned.rglob("*.py"):
        file.write_text("raise RuntimeError('code of the folder ran')\n")
    pipe = load(poisoned)
    assert type(pipe) is XDLMPipeline and type(pipe.transformer).__module__.startswith("xdlm_image.")
    assert codes(pipe) == codes(load(saved)) and not modules.exists()
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(poisoned)
    with pytest.raises(RuntimeError, match="code of the folder ran"):
        XDLMPipeline.from_pretrained(poisoned, trust_remote_code=True)
    pipe.save_pretrained(tmp_path / "light")  # the package's own form again
    assert codes(load(tmp_path / "light")) == codes(pipe)
    assert not list((tmp_path / "light").rglob("*.py"))


def test_a_class_that_the_package_lacks_is_named(exported, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    index = json.loads((other / "model_index.json").read_text())
    index["transformer"][1] = "NewTransformer"
    (other / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="transformer.*NewTransformer"):
        load(other)


def test_code_that_makes_another_pipeline_is_refused(exported, modules):
    with pytest.raises(ValueError, match="XDLMImg2ImgPipeline: the code in .* makes a XDLMPipeline; load it by that"):
        XDLMImg2ImgPipeline.from_pretrained(exported, trust_remote_code=True)
    assert type(XDLMImg2ImgPipeline.from_pretrained(exported)) is XDLMImg2ImgPipeline


def test_a_pipeline_without_its_tokenizer_is_saved_and_loaded(saved, tmp_path):
    without = XDLMPipeline.from_pretrained(saved, vqvae=None)
    without.save_pretrained(tmp_path)
    assert codes(again := load(tmp_path)) == codes(load(saved)) and again.vqvae is None
    with pytest.raises(ValueError, match="vqvae is None"):
        again(0)
    with pytest.raises(ValueError, match="saved without its tokenizer"):
        open_pipeline(tmp_path, torch.device("cpu"))
    exported = without.save_for_hub(tmp_path / "exported", card="# Codes only")
    program = f"""
from diffusers import DiffusionPipeline
found["codes"] = codes(DiffusionPipeline.from_pretrained({str(exported)!r}, trust_remote_code=True))
"""
    assert run(program, tmp_path, clean=True)[0]["codes"] == codes(load(saved))
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"scheduler": [None, None]}))
    with pytest.raises(ValueError, match="scheduler is .None, None., must be"):
        load(tmp_path)


def test_other_code_and_no_folder_are_refused(saved):
    with pytest.raises(ValueError, match="custom_pipeline='me/other'.*runs its own code"):
        XDLMPipeline.from_pretrained(saved, custom_pipeline="me/other")
    with pytest.raises(FileNotFoundError, match="no such folder, and no id of a repository"):
        XDLMPipeline.from_pretrained("runs/not/there/pipeline")
    with pytest.raises(FileNotFoundError, match="'runs/nothere': no such folder, and no repository of that id"):
        XDLMPipeline.from_pretrained("runs/nothere", local_files_only=True)


def test_loads_draws_and_saves_without_the_package(saved, exported, tmp_path):
    """From a folder and from a hub, in a process in which the package cannot be imported."""
    with HubServer() as hub:
        commit = hub.commit("me/tiny", exported)
        program = f"""
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(exported)!r}, trust_remote_code=True)
found["folder"], found["module"] = codes(pipe), type(pipe).__module__
pipe.save_pretrained("plain")
pipe.save_for_hub("again")
found["again"] = codes(type(pipe).from_pretrained("plain", trust_remote_code=True))
unpinned = lambda: type(pipe).from_pretrained("me/tiny", trust_remote_code=True)
for call in (lambda: pipe.save_for_hub("x", licence="mit"), unpinned):
    try:
        call()
    except (TypeError, ValueError) as error:
        found.setdefault("errors", []).append(str(error))
pipe = DiffusionPipeline.from_pretrained("me/tiny", revision="{commit}", trust_remote_code=True)
found["hub"] = codes(pipe)
pipe.save_for_hub("from_hub")
"""
        found, stderr = run(program, tmp_path, clean=True, HF_ENDPOINT=hub.url)
    expected = codes(load(saved))
    assert found["folder"] == found["again"] == found["hub"] == expected
    assert found["module"].startswith("diffusers_modules.local.pipeline_xdlm_")
    assert "might require" not in stderr
    assert "needs the package xdlm-image" in found["errors"][0] and "full hash of 40 digits" in found["errors"][1]
    assert texts(tmp_path / "again") == texts(exported)  # its code and its card
    assert {**texts(tmp_path / "plain"), "README.md": "# A card\n"} == texts(exported)
    from_hub = texts(tmp_path / "from_hub")
    assert "licence of the weights: not stated" in from_hub["README.md"]
    assert ModelCard(from_hub.pop("README.md")).data.library_name == "diffusers"
    assert from_hub.items() <= texts(exported).items()


def test_the_package_loads_from_a_hub_without_its_code(saved, exported, tmp_path):
    with HubServer() as hub:
        hub.commit("me/light", saved)
        commit = hub.commit("me/tiny", exported)
        program = f"""
import sys
from xdlm_image import XDLMPipeline
for name in ("tiny", "light"):
    pipe = XDLMPipeline.from_pretrained("me/" + name)
    found[name] = [codes(pipe), type(pipe).__module__, pipe.name_or_path]
pipe = XDLMPipeline.from_pretrained("me/tiny", revision="{commit}", trust_remote_code=True)
found["theirs"] = [codes(pipe), type(pipe).__module__]
"""
        found, _ = run(program, tmp_path, clean=False, HF_ENDPOINT=hub.url)
        asked = hub.asked
    expected = codes(load(saved))
    assert found["tiny"] == [expected, "xdlm_image.pipelines.pipeline_xdlm", "me/tiny"]
    assert found["light"][0] == found["theirs"][0] == expected
    assert found["theirs"][1].startswith("diffusers_modules.")
    first_code = next(i for i, path in enumerate(asked) if path.endswith(".py"))
    assert any(
        path.startswith("me/light/") for path in asked[:first_code]
    )  # ours were done before any code was asked for
