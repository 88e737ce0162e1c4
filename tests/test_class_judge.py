"""Who says which class an image shows: timm's classifiers as timm itself runs them, and small ones."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from tiny_parts import extractor_recipe

from xdlm_image.data.images import Uint8Images, open_images
from xdlm_image.evaluation import sweep
from xdlm_image.evaluation.references import reference
from xdlm_image.features.class_judge import load_class_judge
from xdlm_image.features.extractor_training import train_extractor
from xdlm_image.recipes import DataOptions, ReferenceRecipe

MODEL = "test_resnet"
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*images are few for the.*:UserWarning")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """timm's smallest ImageNet classifier, of random weights that tell images apart."""
    torch.manual_seed(0)
    net = timm.create_model(MODEL).eval()
    head = net.get_classifier()
    torch.nn.init.normal_(head.weight)
    with torch.no_grad():  # features of random networks hardly differ: take out what they share
        shown = create_shown(net)
        features = net.forward_head(net.forward_features(shown), pre_logits=True)
        head.bias.copy_(-features.mean(0) @ head.weight.T)
    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file(net.state_dict(), path)
    return net, path


def pictures() -> np.ndarray:
    """24 colour pictures of 3 x 3 patches, uint8 (24, 192, 192, 3)."""
    return np.random.default_rng(0).integers(0, 256, (24, 3, 3, 3), np.uint8).repeat(64, 1).repeat(64, 2)


def create_shown(net) -> torch.Tensor:
    """The pictures as timm's own transform hands them to the network."""
    transform = create_transform(**resolve_model_data_config(net))
    return torch.stack([transform(Image.fromarray(image)) for image in pictures()])


def test_timm_classifiers_see_what_timm_shows_them(weights):
    net, path = weights
    with torch.no_grad():
        wanted = net(create_shown(net)).argmax(1)
    synsets = ImageNetInfo().label_names()
    images = torch.from_numpy(pictures()).permute(0, 3, 1, 2)
    judge = load_class_judge(f"timm:{MODEL}:{path}", synsets, (3, 16), CPU)
    agreed = (judge.classify(images) == wanted).float().mean()
    assert len(wanted.unique()) > 4 and agreed > 0.9  # Pillow's and torch's resize differ in rounding
    kept = [synsets[i] for i in wanted.unique().tolist()][::-1]  # a part of the classes, in another order
    part = load_class_judge(f"timm:{MODEL}:{path}", kept[:-1], (3, 16), CPU).classify(images)
    names = [synsets[i] for i in judge.classify(images).tolist()]
    assert [kept[i] if i >= 0 else None for i in part.tolist()] == [n if n in kept[:-1] else None for n in names]


def test_strange_classes_and_files_are_refused(weights, tmp_path):
    with pytest.raises(ValueError, match="knows ImageNet-1K's classes, the data's are ant"):
        load_class_judge(f"timm:{MODEL}:{weights[1]}", ["ant", "n01440764"], (3, 16), CPU)
    with pytest.raises(OSError, match="could not be loaded .* name it as timm:MODEL:FILE"):
        load_class_judge("timm:no_such_model", ["n01440764"], (3, 16), CPU)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(OSError, match="could not be loaded"):
        load_class_judge(f"timm:{MODEL}:{tmp_path / 'other.safetensors'}", ["n01440764"], (3, 16), CPU)
    with pytest.raises(FileNotFoundError, match="^classifier=.*cannot be opened"):
        load_class_judge(str(tmp_path / "nothing"), ["ant"], (3, 16), CPU)


def test_a_small_judge_of_other_images_is_refused_at_once(parts):
    names = ["ant", "bee, wasp", "cat"]
    with pytest.raises(ValueError, match=r"takes images of \(channels, size\) \(3, 16\), these have \(3, 32\)"):
        load_class_judge(str(parts.extractor), names, (3, 32), CPU)
    with pytest.raises(ValueError, match="its classes are"):
        load_class_judge(str(parts.extractor), names[:2], (3, 16), CPU)


def test_an_independent_classifier_judges_the_sweep_and_its_floors(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_draw_pictures", lambda *args: None)
    judge = train_extractor(extractor_recipe(parts.data, tmp_path / "judge", seed=9, epochs=1, width=16))
    recipe = parts.recipe(tmp_path / "out", num_steps=[1], seeds=[0], classifier=str(judge))
    plain = json.loads(sweep.evaluate(parts.recipe(tmp_path / "out", num_steps=[1], seeds=[0])).read_text())
    content = json.loads(sweep.evaluate(recipe).read_text())  # in the same folder: other cells, the same codes
    judged = load_class_judge(str(judge), content["protocol"]["reference"]["class_names"], (3, 16), CPU)
    images = list(Uint8Images(open_images(parts.data, "test")))
    right = judged.classify(torch.stack([image for image, _ in images])) == torch.tensor([label for _, label in images])
    assert content["floors"]["reference_class_accuracy"] == pytest.approx(float(right.float().mean()))
    assert content["protocol"]["extractor"]["classifier"]["weights_sha256"] == judged.weights_hash
    for ours, theirs in zip(content["cells"], plain["cells"]):
        assert ours["fid"] == pytest.approx(theirs["fid"]) and 0 <= ours["class_accuracy"] <= 1
    assert len(list((tmp_path / "out" / "cells").glob("mdlm-*.json"))) == 2  # judged anew, not taken for the same
    assert "judged by xdlm-small-classifier judge (test" in (tmp_path / "out" / "fid.md").read_text()

    folder = tmp_path / "reference"
    tokenizer = parts.pipelines["mdlm"] + "/vqvae"
    reference(
        ReferenceRecipe(
            str(folder), parts.data, str(parts.extractor), tokenizers=[tokenizer], num_samples=[18], device="cpu"
        )
    )
    recipe = parts.recipe(
        tmp_path / "through", num_steps=[1], seeds=[0], classifier=str(judge), data=DataOptions(), reference=str(folder)
    )
    with pytest.warns(UserWarning, match="judged by another classifier"):
        through = json.loads(sweep.evaluate(recipe).read_text())
    assert through["floors"]["reference_class_accuracy"] is None
    assert [c["class_accuracy"] for c in through["cells"]] == [c["class_accuracy"] for c in content["cells"]]
