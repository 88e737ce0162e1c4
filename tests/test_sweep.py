"""Sweeps end to end on tiny pipelines."""

import copy
import csv
import dataclasses
import json
import math
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from tiny_parts import CLASSES, NUM_CODES, save_pipeline, statistics_of

from xdlm_image.data.image_batches import real_batches
from xdlm_image.data.images import Uint8Images, normalise, open_images
from xdlm_image.drawing.draw import decode, draw_codes
from xdlm_image.drawing.opening import open_pipeline
from xdlm_image.drawing.sampler_settings import SamplerSettings, with_scheduler
from xdlm_image.evaluation import caveats, plan, references, sweep
from xdlm_image.evaluation.code_pairs import PairFrequencies
from xdlm_image.evaluation.comparing import fids
from xdlm_image.evaluation.feature_metrics import kid_of_classes, manifold_metrics, unbiased_mmd
from xdlm_image.evaluation.measuring import cached_measure
from xdlm_image.evaluation.report import markdown
from xdlm_image.evaluation.sweep import evaluate
from xdlm_image.evaluation.tables import mean_and_spread
from xdlm_image.features.extractor import load_extractor
from xdlm_image.schedulers import XDLMOrderedScheduler, XDLMPsiScheduler, XDLMScheduler
from xdlm_image.seeds import image_generators
from xdlm_image.tokenizer.codes import encode_images, reconstructed_batches

pytestmark = pytest.mark.filterwarnings("ignore:.*images are few for the.*:UserWarning")


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory):
    """Output folder of a whole sweep."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "GRID_IMAGES", 2)
        return evaluate(parts.recipe(tmp_path_factory.mktemp("sweep"))).parent


def _numbers(folder):
    """The cells without what differs from run to run: times."""
    cells = json.loads((folder / "fid.json").read_text())["cells"]
    drop = ("sampling_seconds", "images_per_second", "batch_size", "drawn_by")
    return [{key: value for key, value in cell.items() if key not in drop} for cell in cells]


def test_a_sweep_records_numbers_floors_and_protocol(parts, finished):
    content = json.loads((finished / "fid.json").read_text())
    assert [(c["pipeline"], c["num_steps"], c["seed"]) for c in content["cells"]] == [
        (name, steps, seed) for name in ("mdlm", "xdlm-0.1") for steps in (1, 3) for seed in (0, 1)
    ]
    protocol, floors = content["protocol"], content["floors"]
    assert "not Inception FID" in content["metric"]
    assert protocol["num_samples"] == 18 and protocol["samples_per_class"] == 6
    assert protocol["reference"]["num_images"] == 36 and protocol["reference"]["split"] == "test"
    assert protocol["extractor"]["weights_sha256"] == load_extractor(parts.extractor, "cpu").weights_hash
    assert set(protocol["reference"]["statistics_sha256"]) == {"pooled", "spatial"}
    assert {"torch", "diffusers", "torch-fidelity", "numpy"} <= set(protocol["versions"])
    assert protocol["pipelines"]["mdlm"]["scheduler"]["k"] == 0.0
    assert len(floors["reconstruction"]) == 1  # both pipelines share one tokenizer: computed once
    assert floors["reconstruction"][0]["pipelines"] == ["mdlm", "xdlm-0.1"]
    assert len(content["warnings"]) == 2  # 18 images are few for either layer
    cell = content["cells"][-1]
    assert cell["nfe"] == 3 and 0 <= cell["class_accuracy"] <= 1 and cell["images_per_second"] > 0
    # the floor of real images is far below random pipelines; the numbers are those of the images themselves
    assert floors["train_against_reference"]["fid"]["pooled"] < cell["fid"]["pooled"]
    pipeline = open_pipeline(parts.pipelines["xdlm-0.1"], torch.device("cpu"))
    codes = draw_codes(pipeline, [i % 3 for i in range(18)], range(18), 1, SamplerSettings(3))
    images = decode(pipeline, codes)
    reference = torch.stack([item[0] for item in Uint8Images(open_images(parts.data, "test"))])
    expected = fids(*(statistics_of(load_extractor(parts.extractor, "cpu"), of) for of in (images, reference)))
    for layer in ("pooled", "spatial"):
        assert cell["fid"][layer] == pytest.approx(expected[layer], rel=1e-4)
    extractor = load_extractor(parts.extractor, "cpu")
    ours, theirs = extractor(images)["pooled"], extractor(reference)["pooled"]
    assert cell["kid"]["mean"] == pytest.approx(unbiased_mmd(ours, theirs[:18]), rel=1.0)  # subsets of 18 of 36 images
    labels = torch.arange(18) % 3
    classes = kid_of_classes(ours, labels, theirs, torch.tensor(open_images(parts.data, "test").labels))
    assert cell["kid_of_classes"] == pytest.approx({str(label): value for label, value in classes.items()}, rel=1e-3)
    found = {name: cell[name] for name in ("precision", "recall", "coverage")}
    assert found == pytest.approx(manifold_metrics(ours, theirs))
    assert floors["train_against_reference"]["coverage"] > cell["coverage"]
    held_out = PairFrequencies(NUM_CODES)
    held_out.update(encode_images(pipeline.vqvae, normalise(reference)))
    drawn = PairFrequencies(NUM_CODES)
    drawn.update(codes)
    assert cell["code_pair_total_variation"] == pytest.approx(drawn.total_variation(held_out))
    assert 0 <= floors["reconstruction"][0]["train"]["code_pair_total_variation"]["near"] <= 1
    for name in ("fid.md", "fid.png", "grid_mdlm.png", "strip_xdlm-0.1.png"):
        assert (finished / name).stat().st_size > 200
    assert not list(finished.rglob("*.partial*"))


def test_the_table_reads_as_it_should(finished):
    page = (finished / "fid.md").read_text()
    assert re.search(r"\| pipeline \| 1 step \| 3 steps \|", page)
    assert re.search(r"\| mdlm \| \d+\.\d+ ± \d+\.\d+ \| \d+\.\d+ ± \d+\.\d+ \|", page)
    assert page.count("Floors: reconstruction of mdlm, xdlm-0.1") == 7  # FID for each layer, five tables of features
    assert re.search(r"## Recall \(%\), features `pooled`\n\n.*\n.*\n\| mdlm \| \d", page)
    assert "Warning:" in page and "not Inception FID" in page and "guidance 1, temperature 1" in page
    assert mean_and_spread([0.0881]) == "0.088" and mean_and_spread([20.0, 40.0]) == "30.00 ± 14.14"
    without = json.loads((finished / "fid.json").read_text())
    for cell in without["cells"]:  # as an unconditional pipeline beside a conditional one
        if cell["pipeline"] == "mdlm":
            cell["class_accuracy"] = None
    accuracies = markdown(without).split("## Class accuracy")[1]
    assert re.search(r"\| mdlm \| – \| – \|\n\| xdlm-0.1 \| \d", accuracies)
    partial = json.loads((finished / "fid.json").read_text())
    partial["cells"] = partial["cells"][:2]
    assert "| xdlm-0.1 | – | – |" in markdown(partial)


def test_metrics_that_are_not_wanted_are_left_out_and_the_rest_is_the_same(parts, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "sweep")
    recipe = parts.recipe(tmp_path / "sweep", pipelines={"mdlm": parts.pipelines["mdlm"]}, num_steps=[3], seeds=[0])
    before = next(c for c in _numbers(finished) if (c["pipeline"], c["num_steps"], c["seed"]) == ("mdlm", 3, 0))
    evaluate(dataclasses.replace(recipe, feature_metrics=["coverage"]))  # cells with all metrics are not taken for it
    cell = _numbers(tmp_path / "sweep")[0]
    assert json.loads((tmp_path / "sweep" / "fid.json").read_text())["protocol"]["feature_metrics"] == ["coverage"]
    for name in ("fid", "coverage"):
        assert cell[name] == before[name] is not None
    for name in ("kid", "kid_of_classes", "precision", "recall"):
        assert cell[name] is None and before[name] is not None
    page = (tmp_path / "sweep" / "fid.md").read_text()
    assert "Coverage" in page and "KID" not in page and "Precision" not in page
    evaluate(recipe)
    assert _numbers(tmp_path / "sweep")[0]["kid"] == before["kid"]


def test_a_cell_of_another_number_of_images_is_no_result(parts, tmp_path, monkeypatch):
    original = sweep.measure
    monkeypatch.setattr(sweep, "measure", lambda extractor, batches, *rest: original(extractor, [*batches][1:], *rest))
    with pytest.raises(RuntimeError, match="mdlm-steps1-seed0: 11 images were measured, num_samples is 18"):
        evaluate(parts.recipe(tmp_path))
    assert not list(tmp_path.glob("cells/*"))


def test_numbers_do_not_depend_on_the_batch_size(parts, finished, tmp_path):
    evaluate(parts.recipe(tmp_path, batch_size=18, pipelines={"xdlm-0.1": parts.pipelines["xdlm-0.1"]}, seeds=[1]))
    expected = [c for c in _numbers(finished) if c["pipeline"] == "xdlm-0.1" and c["seed"] == 1]
    for cell, other in zip(_numbers(tmp_path), expected, strict=True):
        for layer in ("pooled", "spatial"):
            assert cell["fid"][layer] == pytest.approx(other["fid"][layer], rel=1e-4)
        assert cell["class_accuracy"] == other["class_accuracy"]


def test_a_sweep_over_settings_has_a_row_for_each(parts, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_draw_pictures", lambda *args: None)
    axes = {"num_steps": [3], "seeds": [0], "guidance_scale": [1.0, 2.0], "time_grid": ["linear", "cosine"]}
    evaluate(parts.recipe(tmp_path, pipelines={"mdlm": parts.pipelines["mdlm"]}, **axes))
    content = json.loads((tmp_path / "fid.json").read_text())
    found = {(c["guidance_scale"], c["time_grid"]): c for c in content["cells"]}
    assert list(found) == [(1.0, "linear"), (1.0, "cosine"), (2.0, "linear"), (2.0, "cosine")]
    assert len({cell["fid"]["pooled"] for cell in found.values()}) == 4
    assert [cell["nfe"] for cell in found.values()] == [3, 3, 6, 6]
    plain = next(c for c in _numbers(finished) if (c["pipeline"], c["num_steps"], c["seed"]) == ("mdlm", 3, 0))
    assert found[1.0, "linear"]["fid"] == pytest.approx(plain["fid"])  # the grid that the pipeline was saved with
    page = (tmp_path / "fid.md").read_text()
    assert re.search(r"\| mdlm, guidance 2, grid cosine \| \d", page) and "guidance 1, 2, temperature 1," in page
    pipeline = open_pipeline(parts.pipelines["mdlm"], torch.device("cpu"))
    # the codes that the sweep kept are those of the pipeline's own call
    folder = next((tmp_path / "codes").glob("mdlm-steps3-guidance2.0-cosine-seed0-*"))
    stored = np.memmap(folder / "codes.bin", "<u2", "r").reshape(-1, 4, 4)
    pipeline.scheduler = XDLMScheduler.from_config(pipeline.scheduler.config, time_grid="cosine")
    call = {"num_steps": 3, "guidance_scale": 2.0, "generator": image_generators(0, range(7)), "output_type": "latent"}
    assert np.array_equal(pipeline([i % 3 for i in range(7)], **call).images.numpy(), stored[:7])
    with pytest.raises(ValueError, match=r"pipelines\.mdlm=.*temperature=0\.0: must be at least 1e-6"):
        evaluate(parts.recipe(tmp_path, temperature=[1.0, 0.0]))
    with pytest.raises(ValueError, match="guidance_scale=.*each only once"):
        parts.recipe(tmp_path, guidance_scale=[1.0, 1.0])


def test_samplers_are_an_axis_and_cells_from_before_it_stay_good(parts, finished, tmp_path, monkeypatch):
    """The cells of `finished` lose what they know of samplers, as if they were measured before there were any."""
    monkeypatch.setattr(sweep, "_draw_pictures", lambda *args: None)
    measured, original = [], sweep.measure

    def notes(extractor, batches, *rest):
        measured.append((batches.settings.sampler, batches.settings.num_steps))
        return original(extractor, batches, *rest)

    monkeypatch.setattr(sweep, "measure", notes)
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "cells").iterdir():
        content = json.loads(file.read_text())
        assert "sampler" not in content["key"]
        assert content["result"].pop("sampler") is None
        file.write_text(json.dumps(content))
    recipe = parts.recipe(tmp_path, pipelines={"xdlm-0.1": parts.pipelines["xdlm-0.1"]}, num_steps=[3], seeds=[0])
    evaluate(recipe)
    assert measured == [] and _numbers(tmp_path)[0]["sampler"] is None
    assert list(_numbers(tmp_path)[0]) == list(_numbers(finished)[0])  # columns in their order, too
    assert "time grid as saved, sampler as saved" in (tmp_path / "fid.md").read_text()

    recipe = dataclasses.replace(recipe, sampler=["ancestral", "confidence", "halton", "psi"], time_grid="cosine")
    for _ in range(2):  # the second time all cells are found again
        evaluate(recipe)
        assert measured == [("ancestral", 3), ("confidence", 3), ("halton", 3), ("psi", 3)]
    content = json.loads((tmp_path / "fid.json").read_text())
    assert content["schema_version"] == 8
    assert content["protocol"]["sampler"]["sampler"] == ["ancestral", "confidence", "halton", "psi"]
    cells = {cell["sampler"]: cell for cell in content["cells"]}
    assert len({cell["fid"]["pooled"] for cell in cells.values()}) == 4 and {c["nfe"] for c in cells.values()} == {3}
    with (tmp_path / "fid.csv").open() as file:
        assert [line["sampler"] for line in csv.DictReader(file)] == list(cells)
    page = (tmp_path / "fid.md").read_text()
    for sampler in cells:
        assert re.search(rf"\| xdlm-0.1, sampler {sampler} \| \d", page)
    assert "time grid cosine, sampler ancestral, confidence, halton, psi" in page
    # the codes that the sweep kept are those of the pipeline with the scheduler exchanged by hand
    pipeline = open_pipeline(parts.pipelines["xdlm-0.1"], torch.device("cpu"))
    config = pipeline.scheduler.config
    for sampler, scheduler in (
        ("ancestral", XDLMScheduler.from_config(config, time_grid="cosine")),
        ("confidence", XDLMOrderedScheduler.from_config(config, time_grid="cosine")),
        ("halton", XDLMOrderedScheduler.from_config(config, time_grid="cosine", unmasking="halton")),
        ("psi", XDLMPsiScheduler.from_config(config, time_grid="cosine")),
    ):
        pipeline.scheduler = scheduler
        folder = next((tmp_path / "codes").glob(f"xdlm-0.1-steps3-cosine-{sampler}-seed0-*"))
        assert len(list((tmp_path / "cells").glob(f"xdlm-0.1-steps3-cosine-{sampler}-seed0-*.json"))) == 1
        stored = np.memmap(folder / "codes.bin", "<u2", "r").reshape(-1, 4, 4)
        call = {"num_steps": 3, "generator": image_generators(0, range(7)), "output_type": "latent"}
        assert np.array_equal(pipeline([i % 3 for i in range(7)], **call).images.numpy(), stored[:7])


def test_a_sampler_is_chosen_whatever_the_pipeline_was_saved_with(parts, tmp_path):
    pipeline = open_pipeline(parts.pipelines["xdlm-0.1"], torch.device("cpu"))
    pipeline.scheduler = XDLMPsiScheduler.from_config(pipeline.scheduler.config, kappa=0.3)
    pipeline.scheduler = XDLMOrderedScheduler.from_config(pipeline.scheduler.config, choice_temperature=0.5)
    pipeline.save_pretrained(tmp_path)
    saved = open_pipeline(tmp_path, torch.device("cpu"))
    kept = with_scheduler(saved, SamplerSettings(1, time_grid="arccos")).scheduler
    assert kept.choice_temperature == 0.5 and kept.config.time_grid == "arccos"
    samplers = ("ancestral", "confidence", "halton", "psi")
    chosen = {name: with_scheduler(saved, SamplerSettings(1, sampler=name)) for name in samplers}
    assert type(chosen["ancestral"].scheduler) is XDLMScheduler
    assert chosen["confidence"].scheduler.choice_temperature == 4.5
    assert chosen["halton"].scheduler.config.unmasking == "halton"
    assert type(chosen["psi"].scheduler) is XDLMPsiScheduler and chosen["psi"].scheduler.config.kappa == 0.2
    assert all(other.transformer is saved.transformer for other in chosen.values())
    assert with_scheduler(saved, SamplerSettings(1)) is saved and saved.scheduler.choice_temperature == 0.5


def test_a_network_in_bfloat16_draws_almost_the_same_and_is_told_of(parts, finished, tmp_path, monkeypatch):
    dtypes, original = [], sweep.measure

    def notes_dtypes(extractor, batches, *rest):
        dtypes.append((batches.pipeline.transformer.dtype, batches.pipeline.vqvae.dtype))
        return original(extractor, batches, *rest)

    monkeypatch.setattr(sweep, "measure", notes_dtypes)
    evaluate(parts.recipe(tmp_path, dtype="bfloat16", pipelines={"mdlm": parts.pipelines["mdlm"]}, seeds=[0]))
    assert dtypes == [(torch.bfloat16, torch.float32)] * 2
    assert json.loads((tmp_path / "fid.json").read_text())["protocol"]["sampler"]["dtype"] == "bfloat16"
    assert "network in bfloat16;" in (tmp_path / "fid.md").read_text()
    assert "network in float32;" in (finished / "fid.md").read_text()
    exact = [c for c in _numbers(finished) if c["pipeline"] == "mdlm" and c["seed"] == 0]
    for cell, other in zip(_numbers(tmp_path), exact, strict=True):
        assert 0.5 < cell["fid"]["pooled"] / other["fid"]["pooled"] < 2


@pytest.mark.slow  # a minute of a C++ compiler
def test_a_compiled_network_draws_the_same(parts, finished, tmp_path):
    evaluate(parts.recipe(tmp_path, compile=True, batch_size=9, pipelines={"mdlm": parts.pipelines["mdlm"]}, seeds=[0]))
    expected = [c for c in _numbers(finished) if c["pipeline"] == "mdlm" and c["seed"] == 0]
    for cell, other in zip(_numbers(tmp_path), expected, strict=True):
        assert cell["fid"]["pooled"] == pytest.approx(other["fid"]["pooled"], rel=1e-3)


def test_wrong_recipes_are_refused_before_anything_is_drawn(parts, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("drawn or measured")

    monkeypatch.setattr(references, "cached_measure", never)
    monkeypatch.setattr(sweep, "measure", never)
    good = parts.pipelines["mdlm"]
    truncated = tmp_path / "truncated"
    shutil.copytree(good, truncated)
    weights = next((truncated / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    grey = save_pipeline(tmp_path / "grey", channels=1)
    four = save_pipeline(tmp_path / "four", num_classes=4)
    udlm = save_pipeline(tmp_path / "udlm", k=1.0)
    swapped = tmp_path / "swapped"
    shutil.copytree(good, swapped)
    index = json.loads((swapped / "model_index.json").read_text())
    index["id2label"] = dict(enumerate(CLASSES[::-1]))
    (swapped / "model_index.json").write_text(json.dumps(index))
    cases = [
        (dict(pipelines={"a": str(tmp_path / "none")}), FileNotFoundError, r"pipelines\.a=.*none.*no saved pipeline"),
        (dict(pipelines={"a": good, "b": str(truncated)}), ValueError, r"pipelines\.b=.*truncated.*cannot be loaded"),
        (dict(pipelines={"a": str(grey)}), ValueError, r"pipelines\.a=.*\(1, 16\).*\(3, 16\)"),
        (dict(pipelines={"a": str(four)}), ValueError, r"pipelines\.a=.*4 classes.*3"),
        (dict(pipelines={"a": str(swapped)}), ValueError, r"pipelines\.a=.*would not mean the same"),
        (dict(pipelines={"../a": good}), ValueError, r"'\.\./a'"),
        (dict(num_samples=20), ValueError, "num_samples=20.*multiple of the 3 classes.*21"),
        (dict(num_samples=0), ValueError, "num_samples=0"),
        (dict(num_samples=3 * 2**18), ValueError, "num_samples=786432: at most 262144"),
        (dict(guidance_scale=[1.0, math.inf]), ValueError, "guidance_scale=inf: must be a finite number"),
        (dict(guidance_scale=-2.0), ValueError, "guidance_scale=-2.0: must not be negative"),
        (dict(temperature=math.nan), ValueError, "temperature=nan: must be a finite number"),
        (dict(num_steps=[4, 4]), ValueError, r"num_steps=\[4, 4\]"),
        (dict(num_steps=[4, 10**6]), ValueError, r"pipelines\.mdlm=.*steps=1000000: .* from 1 to 100,000"),
        (dict(seeds=[-1]), ValueError, "seeds=-1"),
        (dict(batch_size=0), ValueError, "batch_size=0"),
        (dict(sampler=["halton", "halton"]), ValueError, "sampler=.*each only once"),
        (
            dict(pipelines={"a": good, "u": str(udlm)}, sampler="halton"),
            ValueError,
            r"pipelines\.u=.*'halton': k=1.0: ",
        ),
        (dict(extractor=str(tmp_path / "none")), FileNotFoundError, "extractor=.*none"),
        (
            dict(extractor=str(tmp_path / "none"), pipelines={"a": "nowhere"}),
            FileNotFoundError,
            r"pipelines\.a='nowhere'",
        ),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            evaluate(parts.recipe(tmp_path / "out", **changes))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=r"output_dir=.*cannot be written"):
        evaluate(parts.recipe(tmp_path / "file" / "out"))
    data = copy.deepcopy(parts.data)
    data.crop = "random"
    for split in ("test", "train"):
        with pytest.raises(ValueError, match=r"data\.crop='random'.*set data\.crop: center"):
            evaluate(parts.recipe(tmp_path / "out", data=data, reference_split=split))
    data = copy.deepcopy(parts.data)
    data.image_size = 32
    with pytest.raises(ValueError, match="trained on 3 x 16 x 16 images, the data have 3 x 32 x 32"):
        evaluate(parts.recipe(tmp_path / "out", data=data))
    assert not (tmp_path / "out").exists()


def test_the_floor_is_never_a_part_of_the_reference(parts, tmp_path):
    for split, floor in (("test", "train"), ("validation", "train"), ("train", "test")):
        plan = sweep.check(parts.recipe(tmp_path, reference_split=split))
        assert tuple(images.split for images in plan.images) == (split, floor)


def test_a_sweep_against_the_training_images_says_what_its_floor_is(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "GRID_IMAGES", 1)
    recipe = parts.recipe(tmp_path, reference_split="train", num_steps=[1], seeds=[0])
    recipe.pipelines = {"mdlm": parts.pipelines["mdlm"]}
    floor = json.loads(evaluate(recipe).read_text())["floors"]["train_against_reference"]
    assert floor["split"] == "test" and floor["fingerprint"] == open_images(parts.data, "test").fingerprint
    page = (tmp_path / "fid.md").read_text()
    assert "18 test images against the reference" in page and "training images" not in page


def test_cached_pairs_are_bound_to_their_statistics(parts, tmp_path, capsys):
    extractor = load_extractor(parts.extractor, "cpu")
    pipeline = open_pipeline(parts.pipelines["mdlm"], torch.device("cpu"))
    images = open_images(parts.data, "test")

    def measured():
        batches = lambda: reconstructed_batches(pipeline.vqvae, real_batches(images, 36))  # noqa: E731
        return cached_measure(tmp_path, "a", {}, extractor, batches, 36, NUM_CODES).pairs

    before = measured()
    file = next(tmp_path.rglob("pairs.safetensors"))
    other = PairFrequencies(NUM_CODES)
    other.update(torch.zeros(1, 4, 4, dtype=torch.int64))
    other.save(file, {"num_codes": str(NUM_CODES)})  # whole, but of other images
    assert measured().total_variation(before) == {"near": 0.0, "far": 0.0}
    assert "do not belong together" in capsys.readouterr().out


def test_few_samples_are_warned_of(parts, tmp_path):
    mine = {"mine": f"{parts.data.root}/val"}
    for changes, sets in (
        ({"num_samples": 33}, "33 images"),
        ({"pipelines": {}, "images": mine, "num_samples": 5000}, "mine: 36 images"),  # 5,000 are not drawn
        ({"images": mine | {"again": mine["mine"]}, "num_samples": 36}, "a cell, mine, again: 36 images"),  # told once
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sweep.check(parts.recipe(tmp_path, **changes))
        (text,) = [str(w.message) for w in caught if "images are few" in str(w.message)]
        assert text.startswith(f"{sets} are few for the 64 features of 'spatial'")


def test_of_a_small_reference_it_is_told_that_it_is_small(parts):
    extractor = load_extractor(str(parts.extractor), torch.device("cpu"))
    said = caveats.of_numbers(500, {}, 36, extractor, keeps_features=False)
    assert said[-1].startswith("the reference's 36 images are few for the 64 features of 'spatial'")


def test_a_judge_that_has_learned_nothing_is_told_of(parts):
    extractor = load_extractor(str(parts.extractor), torch.device("cpu"))
    names = list(extractor.config.class_names)
    assert caveats.of_judge(extractor, names, None, None) == []
    blind = dataclasses.replace(extractor.config, test_accuracy=0.34)
    (told,) = caveats.of_judge(dataclasses.replace(extractor, config=blind), names, None, None)
    assert "34.0 % of its test images rightly, little more than chance" in told
    for classes, accuracy, near in (
        (2, 0.52, True),
        (2, 0.9, False),
        (10, 0.15, True),
        (10, 0.3, False),
        (1000, 0.01, False),
    ):
        of = dataclasses.replace(blind, class_names=[*map(str, range(classes))], test_accuracy=accuracy)
        assert of.is_near_chance == near, (classes, accuracy)


@pytest.mark.parametrize(
    ("temperature", "is_told"), [([1.0, 0.2], True), ([0.2, 1.0], False), ([(1.0, 0.2)], False), ([1.0], False)]
)
def test_two_temperatures_that_look_like_a_falling_one_are_told_of(parts, tmp_path, capsys, temperature, is_told):
    sweep.check(parts.recipe(tmp_path, temperature=temperature))
    said = "note: temperature=[1.0, 0.2] is two constant temperatures; one that falls from 1 to 0.2 is [[1, 0.2]]"
    assert (said in capsys.readouterr().out) == is_told


def test_a_number_of_images_that_nobody_gave_is_whole_classes(parts, tmp_path):
    assert plan.check(parts.recipe(tmp_path, num_samples=None)).num_samples == 5001
    mine = {"mine": f"{parts.data.root}/val"}  # nothing is drawn: floors are of the usual number
    assert plan.check(parts.recipe(tmp_path, num_samples=None, pipelines={}, images=mine)).num_samples == 5000
