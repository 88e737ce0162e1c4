"""Model cards: what a run's files say stands in them, what they do not say is unknown, and nothing private leaks."""

import dataclasses
import getpass
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from test_pipeline import make_pipe
from test_untrusted_input import png_that_claims
from tiny_parts import CLASSES, build_parts, save_pipeline

from xdlm_image.data.code_cache import Manifest
from xdlm_image.evaluation import sweep
from xdlm_image.evaluation.sweep import evaluate
from xdlm_image.hub import card
from xdlm_image.hub.export import export
from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.pipelines.plain_card import plain_card
from xdlm_image.recipes import ExportRecipe, TrainRecipe
from xdlm_image.weights import weights_hash

pytestmark = pytest.mark.filterwarnings("ignore:.*images are few for the.*:UserWarning")
JUDGE = {"name": "xdlm-small-classifier", "is_inception": False}
CURVE = [
    {"step": 100, "train/loss": 5.0, "train/images": 800},
    {"step": 200, "train/loss": 4.25, "train/images": 1600, "train/gradient_norm": None},  # it was infinite
    {"step": 200, "validation/bits_per_token": 5.93, "validation/bits_per_token_stderr": 0.05},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A directory with a run, its tokenizer and codes, and an evaluation of it."""
    root = tmp_path_factory.mktemp("secret-place")
    run = root / "runs" / "xdlm"
    pipeline = XDLMPipeline.from_pretrained(save_pipeline(run / "pipeline"))
    recipe = TrainRecipe("runs/codes", "runs/xdlm", "runs/tokenizer", "/home/somebody/codes", max_steps=200)
    (run / "recipe.yaml").write_text(yaml.safe_dump(dataclasses.asdict(recipe)))
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, CURVE)) + '\n{"step": 3')  # a kill cut the last line
    pipeline.vqvae.save_pretrained(root / "runs/tokenizer")
    report = {"split": "test", "images": 36, "psnr": 24.968, "codes_used": 20, "num_codes": 24, "perplexity": 17.4}
    report |= {"rfid": {"pooled": 0.5699}, "rfid_extractor": JUDGE}
    about = {"tokenizer_hash": weights_hash(pipeline.vqvae), "data": {"name": "folder", "root": str(root / "images")}}
    (root / "runs/tokenizer/report.json").write_text(json.dumps(report))
    (root / "runs/tokenizer/tokenizer.json").write_text(json.dumps(about))
    sizes = {"split": "train", "image_size": 16, "channels": 3, "crop": "center", "grid": [4, 4], "num_codes": 24}
    views = {"num_images": 1234, "num_views": 2, "class_names": CLASSES, "dtype": "<u2", "label_dtype": "<u2"}
    manifest = Manifest(
        weights_hash(pipeline.vqvae), "f" * 64, tokenizer=str(root / "runs/tokenizer"), **sizes, **views
    )
    (root / "runs/codes").mkdir()
    (root / "runs/codes/manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
    parts = build_parts(root / "parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "GRID_IMAGES", 1)
        names = {"ours": str(run / "pipeline"), "mdlm": parts.pipelines["mdlm"]}
        evaluate(parts.recipe(root / "evaluation", pipelines=names, num_steps=[1, 2], num_samples=6))
    return root


@pytest.fixture(scope="module")
def written(root, tmp_path_factory) -> Path:
    """The export of the run, with everything known."""
    output = tmp_path_factory.mktemp("out") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "COLUMNS", 2)
        evaluation = str(root / "evaluation/fid.json")
        export(ExportRecipe(str(root / "runs/xdlm"), str(output), evaluation=evaluation, licence="apache-2.0"))
    return output


def read(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def test_the_card_says_what_the_run_says(root, written):
    found = read(written)
    assert found.data.library_name == "diffusers" and found.data.license == "apache-2.0"
    assert found.data.datasets is None  # a folder of images: nobody knows its name on a hub
    text = found.text
    for part in (
        "3 classes: ant; bee; cat.",
        "k = 0.1, definition A",
        "a folder of images, not published with this card",
        "1,234 images of the split train, plain and mirrored, 16 x 16 pixels, 3 channel(s), crop center",
        "PSNR 24.97 dB, 20 of 24 codes used, perplexity 17",
        "(rFID) 0.570 (pooled features), by xdlm-small-classifier, which is not Inception",
        "training loss: 4.250 nats a code at step 200",
        "validation NELBO: 5.93 ± 0.05 (standard error) bits a code at step 200",
        "images seen: 1,600",
        "max_steps: 200",
        "trained from random weights by the recipe above",
        'revision="<full hash of the commit>"',
        "Weights: apache-2.0, as stated by whoever exported them.",
    ):
        assert part in text, part
    assert yaml.safe_load(text.split("```yaml")[1].split("```")[0])["process"] == {"definition": "A", "k": 0.1}


def test_the_numbers_are_the_evaluations_own(root, written):
    content = json.loads((root / "evaluation/fid.json").read_text())
    layer = content["protocol"]["extractor"]["fid_layers"][0]
    cells = [cell for cell in content["cells"] if cell["pipeline"] == "ours"]
    results = read(written).data.eval_results
    assert [result.metric_type for result in results] == ["frechet-distance"] * 2
    for result, steps in zip(results, (1, 2)):
        values = [cell["fid"][layer] for cell in cells if cell["num_steps"] == steps]
        assert result.metric_value == pytest.approx(np.mean(values), abs=1e-4) and f"{steps} step" in result.metric_name
    text = read(written).text
    assert "This is not Inception FID" in text and "| ours |" in text and "| mdlm |" not in text
    protocol = json.loads(text.split("```json")[1].split("```")[0])
    assert protocol["num_samples"] == 6 and protocol["seeds"] == [0, 1] and list(protocol["pipelines"]) == ["ours"]
    assert protocol["pipelines"]["ours"]["weights_hash"] and protocol["extractor"]["weights_sha256"]
    assert "their hash does not tell" not in text


def test_nothing_private_is_in_the_folder(root, written):
    for path in written.rglob("*"):
        if path.is_file() and path.suffix != ".py":
            content = path.read_bytes()
            for secret in ("secret-place", "/home/", str(Path.home()) + "/", f"/{getpass.getuser()}/"):
                assert secret.encode() not in content, (path.name, secret)


def test_the_picture_is_drawn_by_a_named_seed(root, written, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "COLUMNS", 2)
    assert "![Images of this model](samples.png)" in read(written).text and "seed 0;" in read(written).text
    recipe = ExportRecipe(str(root / "runs/xdlm"), str(tmp_path / "again"))
    export(recipe)
    export(dataclasses.replace(recipe, output=str(tmp_path / "other"), seed=1))
    first, again, other = (
        np.asarray(Image.open(f / "samples.png")) for f in (written, tmp_path / "again", tmp_path / "other")
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_given_picture_keeps_its_pixels_only(root, tmp_path):
    exif = Image.Exif()
    exif[0x013B] = "Some Body"  # the artist
    Image.new("RGB", (4, 4), "red").save(tmp_path / "mine.jpg", exif=exif, quality=100)
    assert b"Some Body" in (tmp_path / "mine.jpg").read_bytes()
    export(ExportRecipe(str(root / "runs/xdlm"), str(tmp_path / "out"), picture=str(tmp_path / "mine.jpg")))
    assert b"Some Body" not in (tmp_path / "out/samples.png").read_bytes()
    assert (
        Image.open(tmp_path / "out/samples.png").size == (4, 4) and "none was picked" not in read(tmp_path / "out").text
    )


def test_damaged_recipes_and_pictures_are_named(tmp_path):
    folder = save_pipeline(tmp_path / "run" / "pipeline")
    bomb = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 30))
    for text in ("a: [", "- 1\n", "", bomb, "a: !!python/name:os.system ''"):
        (tmp_path / "run/recipe.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"run/recipe\.yaml: cannot be read as the run's recipe"):
            export(ExportRecipe(str(folder), str(tmp_path / "out"), picture="none"))
    (tmp_path / "run/recipe.yaml").unlink()
    picture = png_that_claims(tmp_path / "bomb.png", 60_000, 60_000)
    with pytest.raises(ValueError, match=r"picture='.*bomb\.png': .*decompression bomb"):
        export(ExportRecipe(str(folder), str(tmp_path / "out"), picture=str(picture)))
    assert not (tmp_path / "out").exists()


def test_names_of_others_stay_in_their_line(tmp_path):
    folder = save_pipeline(tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"]["1"] = "cat\n# A heading\n<script>"
    index["id2label"]["2"] = "`dog` ![x](https://tracker.example/x.png) \\[y](https://example.org)"
    (folder / "model_index.json").write_text(json.dumps(index))
    origin = {"url": "here\n\n# A heading", "licence": "mit\n---\n<img src=x>", "notes": ["a\n# A heading ![x](y)"]}
    origin["source_file"] = "a` ![x](https://tracker.example) `b"
    (folder / "provenance.json").write_text(json.dumps(origin))
    export(ExportRecipe(str(folder), str(tmp_path / "out"), picture="none"))
    found = read(tmp_path / "out")
    assert found.text.count("# A heading") == 3 and found.data.license is None
    assert not re.search(
        r"^# A heading|<script|<img|\]\((https://(tracker|example)|y)|`dog|a`", found.text, flags=re.MULTILINE
    )
    assert "&#96;dog&#96; !&#91;x&#93;(https://tracker.example/x.png)" in found.text


@pytest.mark.parametrize(
    ("names", "example"),
    [
        ({0: "goldfish, Carassius auratus"}, '"goldfish", '),
        ({0: "crane, bird", 1: "crane, machine"}, '"bird", '),
        ({1: "crane", 2: "crane"}, "1, "),
        ({0: ", bird"}, '"bird", '),
        (None, "0, "),
    ],
)
def test_the_example_of_a_card_can_be_drawn(tmp_path, names, example):
    pipeline = XDLMPipeline.from_pretrained(save_pipeline(tmp_path / "pipeline"), id2label=names)
    assert f"pipe({example}num_steps=8)" in plain_card(pipeline, "me/tiny")
    assert len(pipeline.get_label_ids(json.loads(example.strip(", ")))) == 1


def test_the_example_of_an_unconditional_pipeline_names_no_class():
    assert "pipe(num_steps=8)" in plain_card(make_pipe(num_classes=None), "me/tiny")


def test_folders_in_lists_are_left_out_too():
    told = {
        "seeds": [0, 1],
        "sets": [{"root": "x", "name": "a", "from": "/home/alice"}, "/home/alice", "b"],
        "t": ("~",),
    }
    assert card._without_paths(told) == {"seeds": [0, 1], "sets": [{"name": "a"}, "b"], "t": []}


def test_what_is_not_known_is_called_so(tmp_path):
    save_pipeline(tmp_path / "bare")
    export(ExportRecipe(str(tmp_path / "bare"), str(tmp_path / "out"), picture="none"))
    found = read(tmp_path / "out")
    assert found.data.license is None and found.data.eval_results is None and found.data.datasets is None
    for part in (
        "Tokenizer trained on: not known.",
        "Images the transformer was trained on: not known.",
        "Recipe: not known.",
        "Distances to real images: not known.",
        "Weights: no licence stated.",
        "The tokenizer comes from: not known.",
    ):
        assert part in found.text, part
    assert "trained from random weights" not in found.text and not (tmp_path / "out/samples.png").exists()


def test_converted_weights_name_their_origin(root, tmp_path):
    folder = save_pipeline(tmp_path / "converted")
    origin = {"source_file": "xdlm.ckpt", "source_sha256": "a" * 64, "source_format": "official XDLM", "url": None}
    origin |= {"licence": "cc-by-nc-4.0", "converted_by": "xdlm-image 0.1.0", "notes": ["took the averaged weights"]}
    (folder / "provenance.json").write_text(json.dumps(origin))
    export(ExportRecipe(str(folder), str(tmp_path / "out"), tokenizer=str(root / "runs/tokenizer"), picture="none"))
    found = read(tmp_path / "out")
    assert found.data.license == "cc-by-nc-4.0"
    for part in (
        f"`xdlm.ckpt`, SHA-256 `{'a' * 64}`, format official XDLM",
        "published at: not known",
        "licence, as given at the conversion: cc-by-nc-4.0",
        "converted by xdlm-image 0.1.0",
        "took the averaged weights",
        "The tokenizer was trained with the same package.",
    ):
        assert part in found.text, part
    assert "trained from random weights" not in found.text


def test_numbers_of_other_weights_do_not_get_in(root, tmp_path):
    evaluation = str(root / "evaluation/fid.json")
    other = save_pipeline(tmp_path / "other", seed=7)
    recipe = ExportRecipe(str(other), str(tmp_path / "out"), evaluation=evaluation, picture="none")
    with pytest.raises(ValueError, match="None has the hash of its weights; name one with row: ours, mdlm"):
        export(recipe)
    export(dataclasses.replace(recipe, row="ours"))  # somebody says so: the card tells it was not checked
    assert "measured under the name `ours`" in read(tmp_path / "out").text
    pipeline = XDLMPipeline.from_pretrained(other)
    torch.nn.init.normal_(pipeline.vqvae.quantize.embedding.weight)
    pipeline.save_pretrained(tmp_path / "stranger")
    with pytest.raises(ValueError, match="row='ours'.*measured with another tokenizer's weights"):
        export(dataclasses.replace(recipe, pipeline=str(tmp_path / "stranger"), row="ours"))
    with pytest.raises(ValueError, match="no tokenizer with the weights of this pipeline's"):
        tokenizer = str(root / "runs/tokenizer")
        export(ExportRecipe(str(tmp_path / "stranger"), str(tmp_path / "out"), tokenizer=tokenizer, picture="none"))
    (tmp_path / "fid.json").write_text('{"cells": []}')
    with pytest.raises(ValueError, match="is no fid.json of this version"):
        export(dataclasses.replace(recipe, evaluation=str(tmp_path / "fid.json")))


def test_what_lay_beside_these_weights_in_the_evaluation_stays_there(root, tmp_path):
    """Sets of others, and files of this machine."""
    content = json.loads((root / "evaluation/fid.json").read_text())
    content["image_sets"] = [{**content["cells"][0], "name": "theirs", "path": "/home/alice/theirs"}]
    content["protocol"]["images"] = {"theirs": {"path": "/home/alice/theirs"}}
    (tmp_path / "fid.json").write_text(json.dumps(content))
    recipe = ExportRecipe(str(root / "runs/xdlm"), str(tmp_path / "out"), evaluation=str(tmp_path / "fid.json"))
    export(dataclasses.replace(recipe, picture="none"))
    assert "theirs" not in (tmp_path / "out/README.md").read_text()


def test_codes_of_another_tokenizer_are_not_said_to_be_these(root, tmp_path):
    shutil.copytree(root, tmp_path / "root")
    file = tmp_path / "root/runs/codes/manifest.json"
    export(ExportRecipe(str(tmp_path / "root/runs/xdlm"), str(tmp_path / "before"), picture="none"))
    assert "1,234 images" in (tmp_path / "before/README.md").read_text()
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_hash": "0" * 64}))  # encoded again since
    export(ExportRecipe(str(tmp_path / "root/runs/xdlm"), str(tmp_path / "after"), picture="none"))
    assert "1,234 images" not in (tmp_path / "after/README.md").read_text()


def test_the_method_takes_what_the_verb_takes(root, written, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "COLUMNS", 2)
    monkeypatch.chdir(tmp_path)
    pipeline = XDLMPipeline.from_pretrained(root / "runs/xdlm/pipeline")
    evaluation = root / "evaluation/fid.json"
    folder = pipeline.save_for_hub("tiny", evaluation=evaluation, licence="apache-2.0")
    assert folder == tmp_path / "tiny"
    assert re.sub(r"\s", "", str(read(folder))) == re.sub(r"\s", "", str(read(written)))
