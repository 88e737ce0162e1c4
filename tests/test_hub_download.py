"""What is asked of a hub when a pipeline is loaded: which files of which commit, and as whom."""

from collections.abc import Iterator

import pytest
from hub_server import HubServer
from huggingface_hub import constants
from test_hub_export import codes
from tiny_parts import save_pipeline

from xdlm_image import XDLMPipeline

WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture
def hub(monkeypatch) -> Iterator[HubServer]:
    with HubServer() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def files(hub: HubServer) -> set[str]:
    """The files that were asked for, without the name of the repository and the commit; asks afresh."""
    asked = {path.split("/", 4)[-1] for path in hub.asked if "/resolve/" in path}
    hub.asked.clear()
    return asked


def test_a_commit_is_loaded_as_the_one_who_asks(hub, tmp_path):
    folders = [save_pipeline(tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second"))]
    first, second = (hub.commit("me/tiny", folder) for folder in folders)
    one, two = (codes(XDLMPipeline.from_pretrained(folder)) for folder in folders)
    assert first != second and one != two
    options = {"cache_dir": tmp_path / "cache", "token": "hf_secret"}
    assert codes(XDLMPipeline.from_pretrained("me/tiny", revision=first, **options)) == one
    assert codes(XDLMPipeline.from_pretrained("me/tiny", **options)) == two
    assert {token for path, token in hub.tokens.items() if "me/tiny" in path} == {"Bearer hf_secret"}


def test_a_part_that_is_given_is_not_downloaded(hub, tmp_path):
    hub.commit("me/tiny", save_pipeline(tmp_path / "tiny"))
    pipe = XDLMPipeline.from_pretrained("me/tiny", vqvae=None, cache_dir=tmp_path / "cache")
    assert pipe.vqvae is None and not [name for name in files(hub) if name.startswith("vqvae/")]


@pytest.mark.parametrize("shards", [None, "2KB"])
def test_of_several_variants_only_the_one_asked_for_is_downloaded(hub, tmp_path, shards):
    folder = save_pipeline(tmp_path / "tiny")
    pipe = XDLMPipeline.from_pretrained(folder)
    for variant in ("fp16", "ema"):
        pipe.save_pretrained(folder, variant=variant, max_shard_size=shards)
    for file in (folder / "vqvae").glob("*.fp16*"):  # so that its plain weights are needed
        file.unlink()
    hub.commit("me/tiny", folder)
    every = {str(path.relative_to(folder)) for path in folder.glob("*/*.safetensors")}
    plain = {f"{part}/{WEIGHTS}.safetensors" for part in ("transformer", "vqvae")}
    half = {name for name in every if name.startswith(f"transformer/{WEIGHTS}.fp16")} | {f"vqvae/{WEIGHTS}.safetensors"}
    assert plain < every and len(half) == 2 if shards is None else len(half) > 2
    for variant, expected in ((None, plain), ("fp16", half)):
        loaded = XDLMPipeline.from_pretrained("me/tiny", variant=variant, cache_dir=tmp_path / f"cache {variant}")
        assert {name for name in files(hub) if name.endswith(".safetensors")} == expected
        assert codes(loaded) == codes(pipe)
    with pytest.raises(ValueError, match="variant=fp8"):
        XDLMPipeline.from_pretrained("me/tiny", variant="fp8", cache_dir=tmp_path / "cache fp8")
    assert not [name for name in files(hub) if name.endswith(".safetensors")]  # not even plain ones for nothing
