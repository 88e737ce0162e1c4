"""What is pushed to the hub, and the verb `export`."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard
from test_hub_export import codes, load, texts
from tiny_parts import save_pipeline

from xdlm_image.cli import main
from xdlm_image.hub.export import export
from xdlm_image.recipes import ExportRecipe


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("saved") / "pipeline", k=0.3)


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory) -> Path:
    return load(saved).save_for_hub(tmp_path_factory.mktemp("hub") / "tiny", card="# A card\n")


@pytest.fixture
def hub_calls(monkeypatch, tmp_path) -> dict:
    """What would go to the hub: every call's arguments, and a copy of the uploaded folder."""
    calls: dict = {"order": [], "has_card": False}

    def note(name, result=lambda **kwargs: None):
        def call(self, *args, **kwargs):
            given = dict(zip(("repo_id", "filename"), args)) | kwargs
            calls["order"].append(name)
            calls[name] = given | {"token": self.token}
            return result(**given)

        monkeypatch.setattr(HfApi, name, call)

    def keep(folder_path, **kwargs):
        shutil.copytree(folder_path, tmp_path / "uploaded", dirs_exist_ok=True)
        return type("Info", (), {"oid": "c" * 40})()

    note("create_repo", lambda repo_id, **_: type("Url", (), {"repo_id": repo_id.replace("mine", "me/mine")})())
    note("create_branch")
    note("file_exists", lambda **_: calls["has_card"])
    note("upload_folder", keep)
    calls["folder"] = tmp_path / "uploaded"
    return calls


def test_push_uploads_code_and_card(exported, hub_calls):
    options = {"private": True, "token": "hf_x", "revision": "next", "commit_message": "First", "create_pr": True}
    info = load(exported).push_to_hub("me/tiny", **options)
    assert info.oid == "c" * 40
    assert hub_calls["order"] == ["create_repo", "create_branch", "file_exists", "upload_folder"]
    assert hub_calls["create_repo"] == {"repo_id": "me/tiny", "private": True, "exist_ok": True, "token": "hf_x"}
    assert hub_calls["create_branch"]["branch"] == "next"
    sent = hub_calls["upload_folder"]
    assert (sent["repo_id"], sent["commit_message"], sent["revision"]) == ("me/tiny", "First", "next")
    assert sent["create_pr"] is True and sent["token"] == "hf_x"
    assert texts(hub_calls["folder"]) == texts(exported)  # the folder's own code, and its card
    stale = re.compile(sent["delete_patterns"][0].replace("*", ".*").replace(".py", r"\.py"))
    assert all(stale.fullmatch(name) for name in texts(exported) if name.endswith(".py"))
    assert not stale.fullmatch("my_script.py")


def test_push_writes_a_card_and_keeps_an_edited_one(saved, hub_calls):
    pipe = load(saved)
    pipe.push_to_hub("me/tiny", licence="mit", picture="none")
    card = ModelCard((hub_calls["folder"] / "README.md").read_text())
    assert card.data.license == "mit" and "me/tiny" in card.text and hub_calls["upload_folder"]["revision"] is None
    shutil.rmtree(hub_calls["folder"])
    hub_calls["has_card"] = True
    pipe.push_to_hub("me/tiny")
    assert not (hub_calls["folder"] / "README.md").exists() and list(hub_calls["folder"].glob("pipeline_xdlm_*.py"))
    hub_calls["order"].clear()
    pipe.push_to_hub("mine", revision="new")  # an own repository by its name alone, a branch made from main
    assert hub_calls["order"] == ["create_repo", "create_branch", "file_exists", "upload_folder"]
    assert (hub_calls["file_exists"]["repo_id"], hub_calls["file_exists"]["revision"]) == ("me/mine", "new")
    assert not (hub_calls["folder"] / "README.md").exists()
    hub_calls["order"].clear()
    pipe.push_to_hub("mine", revision="refs/pr/1")  # a pull request's is no branch to be made
    assert hub_calls["order"] == ["create_repo", "file_exists", "upload_folder"]
    assert hub_calls["upload_folder"]["revision"] == "refs/pr/1"


def test_save_pretrained_pushes_too(saved, hub_calls, tmp_path, monkeypatch):
    load(saved).save_pretrained(tmp_path / "tiny", push_to_hub=True, repo_id="me/tiny", token="hf_x", card="# Mine")
    assert (hub_calls["folder"] / "README.md").read_text() == "# Mine" and hub_calls["create_repo"]["token"] == "hf_x"
    assert not list((tmp_path / "tiny").rglob("*.py"))
    with pytest.raises(TypeError, match="repo_id are for push_to_hub=True"):
        load(saved).save_pretrained(tmp_path / "tiny", repo_id="me/tiny")
    with pytest.raises(ValueError, match="use_flashpack=True: .*leave it out"):
        load(saved).save_pretrained(tmp_path / "flash", use_flashpack=True)
    assert not (tmp_path / "flash").exists()
    monkeypatch.chdir(tmp_path / "tiny")
    load(saved).save_pretrained(".", push_to_hub=True, card="# Mine")
    assert hub_calls["create_repo"]["repo_id"] == "tiny"


def test_push_refuses_before_anything_is_saved(saved, hub_calls, monkeypatch):
    pipe = load(saved)
    with pytest.raises(ValueError, match="safe_serialization=False: only safetensors"):
        pipe.push_to_hub("me/tiny", safe_serialization=False)
    with pytest.raises(TypeError, match="card: it is given, so licence"):
        pipe.push_to_hub("me/tiny", card="# Mine", licence="mit")
    with pytest.raises(TypeError, match="license: nothing that a card says; did you mean licence"):
        pipe.push_to_hub("me/tiny", license="mit")
    assert not hub_calls["order"]  # no repository is made for nothing
    monkeypatch.setattr(DiffusionPipeline, "save_pretrained", lambda *_, **__: pytest.fail("saved"))
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("no such owner")))
    with pytest.raises(OSError, match="no such owner"):
        pipe.push_to_hub("nobody/tiny")


# --- the verb -------------------------------------------------------------------------------------


def test_the_verb_writes_and_pushes(saved, tmp_path, hub_calls, capsys):
    arguments = ["export", "--pipeline", str(saved), "--output", str(tmp_path / "out"), "--picture", "none"]
    assert main([*arguments, "--push_to", "me/tiny", "--private", "true", "--licence", "apache-2.0"]) == 0
    assert f"{tmp_path / 'out'}\npushed to me/tiny, commit {'c' * 40}" in capsys.readouterr().out
    assert hub_calls["create_repo"]["private"] is True
    assert texts(hub_calls["folder"]) == texts(tmp_path / "out")
    assert codes(load(tmp_path / "out")) == codes(load(saved))


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"private": True}, "private=True: it is for push_to"),
        ({"create_pr": True}, "create_pr=True: it is for push_to"),
        ({"card": "card.md", "licence": "mit"}, "licence='mit': card is given"),
        ({"card": "card.md"}, "card='card.md': no such file"),
        ({"pipeline": "nowhere"}, "pipeline='nowhere': no saved pipeline there"),
        ({"licence": "Apache 2.0"}, "licence='Apache 2.0': write it as the hub does"),
        ({"dataset": "my images"}, "dataset='my images'"),
        ({"row": "xdlm"}, "row='xdlm': it names a row of evaluation"),
        ({"evaluation": "nowhere.json"}, "evaluation='nowhere.json': no such file"),
        ({"tokenizer": "nowhere"}, "tokenizer='nowhere': no tokenizer with the weights"),
        ({"picture": "nowhere.png"}, "picture='nowhere.png': no such file"),
    ],
)
def test_the_verb_refuses(saved, tmp_path, changes, error):
    with pytest.raises((ValueError, OSError), match=re.escape(error)):
        export(ExportRecipe(**{"pipeline": str(saved), "output": str(tmp_path / "out"), **changes}))
    assert not list(tmp_path.iterdir())


def test_the_verb_takes_a_run_folder_and_an_own_card(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "card.md").write_text("# Mine\n")
    done = export(ExportRecipe(pipeline=str(saved.parent), output="out", card="card.md"))
    assert str(done) == "out" and (tmp_path / "out" / "README.md").read_text() == "# Mine\n"
    export(ExportRecipe(pipeline="out", output="copy"))  # what the folder says of itself is kept
    assert texts(tmp_path / "copy") == texts(tmp_path / "out")
    assert torch.equal(load(tmp_path / "copy").transformer.proj_out.weight, load(saved).transformer.proj_out.weight)
