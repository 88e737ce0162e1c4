"""A reference folder in the place of the images: the same numbers, and everything that does not fit refused."""

import dataclasses
import json
import shutil

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_parts import extractor_recipe, save_pipeline

from xdlm_image.evaluation import references, sweep
from xdlm_image.evaluation.references import reference
from xdlm_image.evaluation.sweep import evaluate
from xdlm_image.evaluation.tables import number
from xdlm_image.features.extractor_training import train_extractor
from xdlm_image.files import sha256_of_file
from xdlm_image.recipes import DataOptions, ReferenceRecipe

pytestmark = pytest.mark.filterwarnings("ignore:.*images are few for the.*:UserWarning")


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """A reference folder whose images are then hidden."""
    folder = tmp_path_factory.mktemp("reference")
    tokenizer = parts.pipelines["mdlm"] + "/vqvae"
    recipe = ReferenceRecipe(
        str(folder),
        parts.data,
        str(parts.extractor),
        tokenizers=[tokenizer],
        num_samples=[18, 36],
        batch_size=7,
        device="cpu",
    )
    reference(recipe)
    return folder


def _recipe(parts, output, folder, **changes):
    changes = {"num_steps": [2], "seeds": [0], "data": DataOptions(), "reference": str(folder), **changes}
    return parts.recipe(output, **changes)


def _content(path):
    content = json.loads(path.read_text())
    for cell in content["cells"]:
        del cell["sampling_seconds"], cell["images_per_second"]
    return content


def test_a_folder_gives_the_numbers_of_the_images_without_them(parts, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "GRID_IMAGES", 1)
    assert not (folder / ".floors").exists() and str(parts.data.root) not in (folder / "reference.json").read_text()
    direct = _content(evaluate(parts.recipe(tmp_path / "direct", num_steps=[2], seeds=[0])))
    monkeypatch.setattr("xdlm_image.evaluation.plan.open_reference_images", None)  # the images are not at hand
    through = _content(evaluate(_recipe(parts, tmp_path / "through", folder)))
    for content in (direct, through):  # the files' own hashes: their headers are written in no fixed order
        content["protocol"]["reference"].pop("statistics_sha256")
        content["floors"]["reconstruction"][0].pop("statistics")
    for part in ("cells", "floors"):
        assert through[part] == direct[part]
    assert through["protocol"]["reference"] == direct["protocol"]["reference"]
    assert direct["floors"]["reconstruction"][0]["train"]["num_images"] == 18


def test_floors_have_the_metrics_of_the_sweep_and_are_computed_once(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_draw_pictures", lambda *args: None)
    computed = []
    for name in ("distances", "fids"):
        function = getattr(references, name)
        counted = lambda *args, name=name, function=function: computed.append(name) or function(*args)  # noqa: E731
        monkeypatch.setattr(references, name, counted)

    def floors(**changes):
        computed.clear()
        content = _content(evaluate(parts.recipe(tmp_path, num_steps=[1], seeds=[0], **changes)))
        return content["floors"]

    plain = floors(feature_metrics=[])
    assert sorted(computed) == ["distances", "distances", "fids"]
    for floor in (plain["train_against_reference"], plain["reconstruction"][0]):
        assert floor["fid"]["pooled"] > 0 and floor["kid"] is floor["precision"] is floor["coverage"] is None
    assert floors(feature_metrics=[]) == plain and computed == []
    whole = floors()
    assert computed == ["distances", "distances"] and whole["train_against_reference"]["kid"]["mean"] is not None
    assert 0 <= whole["reconstruction"][0]["coverage"] <= 1
    damaged = max((tmp_path / "reference" / ".floors").glob("distances-*.json"), key=lambda path: path.stat().st_size)
    damaged.write_text(damaged.read_text()[:-20])
    assert floors() == whole and computed == ["distances"]


def test_what_the_folder_lacks_is_said_and_left_out(parts, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "GRID_IMAGES", 1)
    other = save_pipeline(tmp_path / "other", seed=3)
    weights = other / "vqvae" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["quantize.embedding.weight"] *= 1.5
    save_file(tensors, weights, metadata={"format": "pt"})
    recipe = _recipe(parts, tmp_path / "out", folder, num_samples=21, pipelines={"other": str(other)})
    with pytest.warns(UserWarning, match="no reconstructions by the tokenizer of other"):
        content = _content(evaluate(recipe))
    assert content["cells"][0]["fid_against_reconstructions"] is None and content["cells"][0]["fid"]["pooled"] > 0
    assert content["floors"] == {
        "reference_class_accuracy": content["floors"]["reference_class_accuracy"],
        "train_against_reference": None,
        "reconstruction": [],
        "image_sets": [],
    }
    assert any("floors for 18, 36 images, none for 21" in warning for warning in content["warnings"])
    page = (tmp_path / "out" / "fid.md").read_text()
    assert (
        "against reconstructions" not in page
        and "Pairs of codes" not in page
        and (tmp_path / "out" / "fid.png").stat().st_size > 200
    )


def test_given_images_stand_over_the_floor_of_as_many(parts, folder, tmp_path):
    images = {"val": f"{parts.data.root}/val"}  # 36
    content = _content(evaluate(_recipe(parts, tmp_path, folder, pipelines={}, images=images, num_samples=18)))
    assert [floor["num_images"] for floor in content["floors"]["image_sets"]] == [18, 36]
    page = (tmp_path / "fid.md").read_text()
    assert "Floors: 18 training images against the reference: FID" in page and "; 36 training images against" in page
    assert not any("floors" in warning for warning in content["warnings"])


def test_fid_against_further_references_is_that_against_each_alone(parts, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_draw_pictures", lambda *args: None)
    of_training = ReferenceRecipe(str(tmp_path / "train"), parts.data, str(parts.extractor), "train", device="cpu")
    reference(of_training)
    one = {"num_steps": [2], "seeds": [0], "images": {"val": f"{parts.data.root}/val"}}
    alone = _content(evaluate(_recipe(parts, tmp_path / "alone", tmp_path / "train", reference_split="train", **one)))
    plain = _content(evaluate(_recipe(parts, tmp_path / "both", folder, **one)))
    further = {"further_references": {"training": str(tmp_path / "train"), "same": str(folder)}}
    both = _content(evaluate(_recipe(parts, tmp_path / "both", folder, **one, **further)))
    for kind in ("cells", "image_sets"):
        assert both[kind] and all("fid_further" not in found for found in plain[kind])
        for ours, theirs, before in zip(both[kind], alone[kind], plain[kind]):
            found = ours.pop("fid_further")
            assert found == {"training": theirs["fid"], "same": ours["fid"]} and ours == before
    (rebuilt,) = both["floors"]["further"]["training"]["reconstruction"]
    assert rebuilt["pipelines"] == ["mdlm", "xdlm-0.1"] and rebuilt["fid"]["pooled"] > 0
    assert both["floors"]["further"]["same"]["reference"]["fid"]["pooled"] == pytest.approx(0, abs=1e-6)
    told = both["protocol"]["further_references"]["training"]
    assert told["split"] == "train" and told["statistics_sha256"]["pooled"]
    page = (tmp_path / "both" / "fid.md").read_text()
    title = "## FID, features `pooled`, against training"
    table = page.split(title)[1].split("##")[0]
    assert f"| mdlm | {number(alone['cells'][0]['fid']['pooled'])} |" in table
    assert "\ntraining is 117 images, split train" in table
    assert "reconstruction of mdlm, xdlm-0.1 " in table and "; the real images " in table
    assert "FID `pooled` against training" in page.split("## Sets of images")[1].split("##")[0]
    assert "fid_further.training.pooled" in (tmp_path / "both" / "fid.csv").read_text()

    for place, error, message in (
        (str(tmp_path / "none"), FileNotFoundError, "further_references.other: reference=.*no reference folder"),
        ("adm-imagenet-256", ValueError, "further_references.other: .*published statistics are of Inception"),
    ):
        with pytest.raises(error, match=message):
            evaluate(_recipe(parts, tmp_path / "out", folder, further_references={"other": place}))
    with pytest.raises(ValueError, match=r"further_references: the name 'a/b' becomes part"):
        evaluate(_recipe(parts, tmp_path / "out", folder, further_references={"a/b": str(folder)}))
    sized = shutil.copytree(folder, tmp_path / "sized")
    about = json.loads((sized / "reference.json").read_text())
    monkeypatch.setattr(
        "xdlm_image.evaluation.further_references.open_reference",
        lambda *_: references.Reference(about | {"images": about["images"] | {"image_size": 32}}, None, {}),
    )
    with pytest.raises(ValueError, match=r"further_references.other=.*\(3, 32\), the sweep's are \(3, 16\)"):
        evaluate(_recipe(parts, tmp_path / "out", folder, further_references={"other": str(sized)}))
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_fit_are_refused(parts, folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"reference=.*xdlm-image reference"):
        evaluate(_recipe(parts, out, tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="adm-imagenet-265.*or adm-imagenet-256, mar-imagenet-256"):
        evaluate(_recipe(parts, out, "adm-imagenet-265"))
    with pytest.raises(ValueError, match="reference_split='train': the images of .* are of the split 'test'"):
        evaluate(_recipe(parts, out, folder, reference_split="train"))
    with pytest.raises(ValueError, match=r"reference=.* data\.name='folder', .*data\.image_size=16.*one of the two"):
        evaluate(_recipe(parts, out, folder, data=parts.data))
    stranger = train_extractor(extractor_recipe(parts.data, tmp_path / "stranger", seed=5, epochs=1))
    with pytest.raises(ValueError, match="numbers of two extractors do not compare"):
        evaluate(_recipe(parts, out, folder, extractor=str(stranger)))
    changed = shutil.copytree(folder, tmp_path / "changed")
    for about in (changed / "statistics").rglob("about.json"):  # whole in itself, but not what was measured
        file = about.parent / "pooled.safetensors"
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, opened.metadata())
        content = json.loads(about.read_text())
        content["statistics_sha256"]["pooled"] = sha256_of_file(file)
        about.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"other statistics than reference\.json tells of"):
        evaluate(_recipe(parts, out, changed))
    gaps = shutil.copytree(folder, tmp_path / "gaps")
    whole = (gaps / "reference.json").read_text()
    for place, name in (("images", "class_names"), ("", "train"), ("train", "floors"), ("", "class_accuracy")):
        about = json.loads(whole)
        (about[place] if place else about).pop(name)
        (gaps / "reference.json").write_text(json.dumps(about))
        with pytest.raises(ValueError, match=f"cannot be used .reference.json holds no '{name}'.; make it again"):
            evaluate(_recipe(parts, out, gaps))
    (gaps / "reference.json").write_text(whole.replace("bicubic with antialiasing", "bilinear"))
    with pytest.raises(ValueError, match="its images were resized by 'shorter side to image_size, bilinear"):
        evaluate(_recipe(parts, out, gaps))
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    file = next((damaged / "statistics").rglob("pooled.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="statistics cannot be used.*make it again"):
        evaluate(_recipe(parts, out, damaged))
    (damaged / "reference.json").write_text('{"schema_version": 7}')
    with pytest.raises(ValueError, match="make it again"):
        evaluate(_recipe(parts, out, damaged))
    assert not out.exists()
    (out / "floors").mkdir(parents=True)  # somebody's own
    (out / "floors" / "plan.txt").touch()
    images = shutil.copytree(parts.data.root, tmp_path / "images")
    data = dataclasses.replace(parts.data, root=str(images))
    small = ReferenceRecipe(str(out), data, str(parts.extractor), num_samples=[18], batch_size=7, device="cpu")
    reference(small)
    assert {path.name for path in out.iterdir()} == {"floors", "reference.json", "statistics"}
    assert (out / "floors" / "plan.txt").exists()
    shutil.rmtree(out)
    for path in (images / "train").rglob("*.png"):  # of which the floor takes some
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match="18 of 18 files of train are broken"):
        reference(small)
    assert list(out.iterdir()) == []
    out.rmdir()
    grey = save_pipeline(tmp_path / "grey", channels=1) / "vqvae"
    with pytest.raises(ValueError, match=r"tokenizers: .*takes 1 channels, data\.channels is 3"):
        reference(ReferenceRecipe(str(out), parts.data, str(parts.extractor), tokenizers=[str(grey)], device="cpu"))
    assert not out.exists()
