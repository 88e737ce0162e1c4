"""The small classifier: what it learns, what it takes, what it refuses, and its place in torch-fidelity."""

import dataclasses
import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import CLASSES, SIZE, extractor_recipe, write_images
from torch_fidelity.utils import create_feature_extractor

from xdlm_image.evaluation.plan import metric_name
from xdlm_image.features import extractor_training
from xdlm_image.features import inception as module
from xdlm_image.features.dinov2 import DINOv2, positions
from xdlm_image.features.extractor import load_extractor
from xdlm_image.features.extractor_training import augment, train_extractor
from xdlm_image.features.small_classifier import SMALL_CLASSIFIER, SmallClassifier
from xdlm_image.files import sha256_of_file
from xdlm_image.processes import only_command

DINO = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), {"train": 40, "val": 12})


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    return train_extractor(extractor_recipe(data, tmp_path_factory.mktemp("runs") / "extractor"))


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_training_learns_and_leaves_a_whole_folder(folder):
    report = json.loads((folder / "report.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert report["test_accuracy"] > 0.9  # three plain patterns; chance is 0.33
    assert report["loss_curve"][-1]["loss"] < 0.5  # nats; log 3 = 1.1 at the start
    assert config["class_names"] == CLASSES and config["test_accuracy"] == report["test_accuracy"]
    assert config["weights_sha256"] == sha256_of_file(folder / "model.safetensors")
    assert load_extractor(folder, "cpu").weights_hash == config["weights_sha256"]
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "report.json"]


def test_training_is_reproducible_and_never_replaces_another_extractor(data, folder, tmp_path):
    again = train_extractor(extractor_recipe(data, tmp_path / "again"))
    assert sha256_of_file(again / "model.safetensors") == sha256_of_file(folder / "model.safetensors")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    train_extractor(extractor_recipe(data, folder))  # the same recipe: nothing to do
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="another recipe"):
        train_extractor(extractor_recipe(data, folder, seed=1))
    with only_command(tmp_path / "busy", True), pytest.raises(ValueError, match="another command is at work there"):
        train_extractor(extractor_recipe(data, tmp_path / "busy"))


def test_killed_and_resumed_is_bitwise_the_same(data, folder, tmp_path, monkeypatch):
    """Killed in the third of four epochs, and once more while accuracy is measured."""
    recipe = extractor_recipe(data, tmp_path / "killed")
    step, steps = torch.optim.AdamW.step, []
    per_epoch = 3 * 40 // 16

    def dies(*arguments):
        raise KeyboardInterrupt

    def dies_in_the_third_epoch(*arguments, **named):
        steps.append(1)
        return dies() if len(steps) == 2 * per_epoch + 3 else step(*arguments, **named)

    for owner, name, death in ((torch.optim.AdamW, "step", dies_in_the_third_epoch),
                              (extractor_training, "measure_accuracy", dies)):  # fmt: skip
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, death)
            train_extractor(recipe)
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()] == ["step-00000004"]
    with pytest.raises(ValueError, match="learning_rate=0.02, but the run in .* began with 0.01"):
        train_extractor(dataclasses.replace(recipe, learning_rate=2e-2))
    monkeypatch.setattr(torch.optim.AdamW, "step", dies)  # only the end is left
    train_extractor(recipe)
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    reports = [json.loads((path / "report.json").read_text()) for path in (tmp_path / "killed", folder)]
    assert reports[0]["loss_curve"] == reports[1]["loss_curve"]
    assert not (tmp_path / "killed" / "checkpoints").exists()


def test_layers_belong_together_and_to_the_classifier(folder, images):
    extractor = load_extractor(folder, "cpu")
    features = extractor(images)
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "pooled": (5, 16),
        "spatial": (5, 64),
        "logits": (5, 3),
    }
    assert extractor.feature_dims == {"pooled": 16, "spatial": 64} and not extractor.is_inception
    torch.testing.assert_close(features["spatial"].unflatten(1, (16, 4)).mean(-1), features["pooled"])
    classifier = SmallClassifier(SIZE, 3, 3, 8, 16).eval()
    classifier.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(features["logits"], classifier(images.float() / 127.5 - 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("size", "side"), [(8, 4), (16, 4), (28, 4), (64, 4), (100, 4)])
def test_the_last_grid_is_small_at_every_image_size(size, side):
    classifier = SmallClassifier(size, 1, 10, 8, 32).eval()
    grid = classifier.net.forward_features(torch.zeros(1, 1, size, size))
    assert grid.shape == (1, 32, side, side)


def test_torch_fidelity_creates_it_by_name(folder, images):
    created = create_feature_extractor(
        SMALL_CLASSIFIER, ["spatial"], cuda=False, feature_extractor_weights_path=str(folder), verbose=False
    )
    torch.testing.assert_close(created(images)[0], load_extractor(folder, "cpu")(images)["spatial"])


def test_wrong_images_are_refused(folder, images):
    extractor = load_extractor(folder, "cpu")
    with pytest.raises(ValueError, match="float32.*uint8"):
        extractor(images.float())
    with pytest.raises(ValueError, match=r"\(5, 3, 16, 8\).*takes \(B, 3, 16, 16\)"):
        extractor(images[..., :8])
    with pytest.raises(ValueError, match="trained on 3 x 16 x 16"):
        extractor.check_images(1, 16)


def test_a_grey_extractor_takes_grey_files_read_as_rgb(data, tmp_path):
    grey = dataclasses.replace(data, channels=1)
    extractor = load_extractor(train_extractor(extractor_recipe(grey, tmp_path / "grey", epochs=1)), "cpu")
    images = torch.randint(0, 256, (2, 1, SIZE, SIZE), dtype=torch.uint8)
    torch.testing.assert_close(extractor(images.expand(-1, 3, -1, -1))["pooled"], extractor(images)["pooled"])
    colour = images.repeat(1, 3, 1, 1)
    colour[0, 1, 0, 0] ^= 1
    with pytest.raises(ValueError, match="colour images"):
        extractor(colour)


def test_damaged_folders_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*train-extractor"):
        load_extractor(tmp_path / "nowhere", "cpu")
    broken = tmp_path / "broken"

    def fresh():
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(folder, broken)
        return broken

    (fresh() / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_extractor(broken, "cpu")
    weights = fresh() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or belongs to another"):
        load_extractor(broken, "cpu")
    config = fresh() / "config.json"
    config.write_text(config.read_text()[:40])
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_extractor(broken, "cpu")
    config.write_text('{"_class_name": "VQModel"}')
    with pytest.raises(ValueError, match="holds a VQModel, no extractor"):
        load_extractor(broken, "cpu")
    values = json.loads((fresh() / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**values, "feature_dim": 32}))
    with pytest.raises(ValueError, match="do not fit the sizes"):
        load_extractor(broken, "cpu")
    (broken / "config.json").write_text(json.dumps({**values, "schema_version": 99}))
    with pytest.raises(ValueError, match="schema_version=99"):
        load_extractor(broken, "cpu")
    state = load_file(fresh() / "model.safetensors")
    save_file({name: value for name, value in state.items() if "head" not in name}, broken / "model.safetensors")
    (broken / "config.json").write_text(
        json.dumps({**values, "weights_sha256": sha256_of_file(broken / "model.safetensors")})
    )
    with pytest.raises(ValueError, match="do not fit the sizes"):
        load_extractor(broken, "cpu")


def test_augment_mirrors_and_shifts_and_nothing_else():
    images = torch.rand(64, 2, 8, 8)
    plain = augment(images, 0, torch.Generator().manual_seed(0))
    mirrored = torch.tensor([torch.equal(new, old.flip(-1)) for new, old in zip(plain, images)])
    same = torch.tensor([torch.equal(new, old) for new, old in zip(plain, images)])
    assert (mirrored ^ same).all() and 16 < mirrored.sum() < 48
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    moved = augment(images, 1, torch.Generator().manual_seed(0))
    for new, old in zip(moved, padded):
        crops = [old[:, r : r + 8, c : c + 8] for r in range(3) for c in range(3)]
        assert any(torch.equal(new, crop) or torch.equal(new, crop.flip(-1)) for crop in crops)


def test_inception_without_network_names_the_remedy(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(OSError, match="no route to host.*inception:FILE.*FOLDER of a small.*train-extractor"):
        load_extractor("inception", "cpu")


@pytest.fixture
def inception_weights(monkeypatch, tmp_path):
    """A file in the place of the released weights, and random weights in the real network: those are 95 MB."""
    weights = tmp_path / "checkpoints" / module.URL_INCEPTION_V3.rsplit("/", 1)[1]
    weights.parent.mkdir()
    torch.save({}, weights)
    monkeypatch.setattr(module, "RELEASED", sha256_of_file(weights)[:8])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    return weights


def test_inception_takes_grey_images_and_gives_the_layers_of_fid_sfid_and_score(inception_weights):
    extractor = load_extractor("inception", "cpu")
    assert extractor.is_inception and extractor.feature_dims == {"2048": 2048, "spatial": 2023}
    assert extractor.score_layer == "logits_unbiased"
    assert extractor.weights_hash == sha256_of_file(inception_weights)
    grey = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    features = extractor(grey)
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "2048": (2, 2048), "spatial": (2, 2023), "logits_unbiased": (2, 1008),
    }  # fmt: skip
    torch.testing.assert_close(features["2048"], extractor(grey.repeat(1, 3, 1, 1))["2048"])


def test_the_layer_of_sfid_is_the_seventh_part_of_a_branch_in_adms_order(inception_weights):
    network = module.Inception(inception_weights).eval()
    grids = []
    network.net.Mixed_6d.branch1x1.bn.register_forward_hook(lambda *args: grids.append(torch.relu(args[2])))
    found = network(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))["spatial"]
    assert grids[0].shape == (2, 192, 17, 17)
    for row, column, channel in ((0, 0, 0), (3, 16, 6), (16, 2, 1)):
        torch.testing.assert_close(found[:, (row * 17 + column) * 7 + channel], grids[0][:, channel, row, column])


def test_inception_weights_can_be_named(inception_weights, tmp_path, monkeypatch):
    elsewhere = shutil.copy(inception_weights, tmp_path / "mine.pth")
    inception_weights.unlink()
    named = load_extractor(f"inception:{elsewhere}", "cpu")
    assert named.weights_hash == sha256_of_file(elsewhere) and named.is_inception and not named.unreleased
    with pytest.raises(OSError, match=r"from .*nowhere\.pth"):
        load_extractor(f"inception:{tmp_path / 'nowhere.pth'}", "cpu")

    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"state": Evil()}, elsewhere)
    with pytest.raises(OSError, match="(?s)weights_only|Unsupported"):
        load_extractor(f"inception:{elsewhere}", "cpu")


def test_other_weights_than_the_released_ones_are_no_inception_fid(inception_weights, monkeypatch):
    monkeypatch.undo()
    assert module.RELEASED == "6726825d"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(inception_weights.parents[1]))
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    with pytest.raises(OSError, match=r"is not the released file: its SHA-256 begins with \w{8}, not with 6726825d"):
        load_extractor("inception", "cpu")
    mine = load_extractor(f"inception:{inception_weights}", "cpu")
    assert mine.unreleased and not mine.is_inception and not mine.describe()["is_inception"]
    assert metric_name(mine).startswith(
        "Fréchet distance of features of inception-v3-compat (not the released weights)"
    )
    assert "This is not Inception FID" in metric_name(mine)


# ------------------------------------------------------------------------------------------------ DINOv2


@pytest.fixture(scope="module")
def dinov2_weights(tmp_path_factory):
    """Random weights of the smallest network, as timm's hub would give them: positions of 37 x 37 patches."""
    torch.manual_seed(0)
    network = timm.create_model(DINO, num_classes=0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("dinov2") / "model.safetensors"
    save_file(network.state_dict(), path)
    return path


def test_dinov2_features_are_timms_class_token_after_edm2s_resize(dinov2_weights):
    ours = DINOv2(dinov2_weights, DINO).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    x = torch.nn.functional.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(ours(images)["dinov2"], ours.net.forward_features(x)[:, 0])
    state = load_file(dinov2_weights)
    assert torch.equal(ours.net.pos_embed[:, 0], state["pos_embed"][:, 0])
    grid = torch.linspace(0, 1, 37).view(1, 37, 1, 1).expand(1, 37, 37, 4).reshape(1, 37 * 37, 4)
    smaller = positions(torch.cat([torch.full((1, 1, 4), 9.0), grid], 1), 16)
    assert smaller.shape == (1, 257, 4) and (smaller[:, 0] == 9).all()
    rows = smaller[0, 1:, 0].view(16, 16)  # row i looks at (i + 0.5) * 37 / 16.1 - 0.5 of 36
    torch.testing.assert_close(rows[:, 3], ((torch.arange(16) + 0.5) * 37 / 16.1 - 0.5) / 36, atol=4e-3, rtol=0)


def test_dinov2_without_weights_names_the_remedy(dinov2_weights, tmp_path):
    with pytest.raises(OSError, match="extractor='dinov2'.*dinov2:FILE"):
        load_extractor(f"dinov2:{tmp_path / 'nowhere.safetensors'}", "cpu")
    state = load_file(dinov2_weights)
    del state["norm.weight"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(OSError, match="holds other weights"):
        DINOv2(tmp_path / "part.safetensors", DINO)


# ------------------------------------------------------------------------------------------------ several


def test_several_extractors_are_one_whose_first_gives_the_main_layer(folder, images, inception_weights):
    both = load_extractor([str(folder)], "cpu")
    assert both.fid_layers == ("pooled", "spatial")
    with pytest.raises(ValueError, match="two of them have a layer 'spatial'"):
        load_extractor(["inception", folder], "cpu")
    with pytest.raises(ValueError, match="name one at least"):
        load_extractor([], "cpu")


def test_inception_and_dinov2_together(monkeypatch, inception_weights, dinov2_weights):
    monkeypatch.setattr("xdlm_image.features.dinov2.DINOv2.__init__.__defaults__", (None, DINO))
    both = load_extractor(["inception", f"dinov2:{dinov2_weights}"], "cpu")
    assert both.feature_dims == {"2048": 2048, "spatial": 2023, "dinov2": 384} and both.is_inception
    assert both.name == "inception-v3-compat + dinov2-vitl14" and both.score_layer == "logits_unbiased"
    alone = load_extractor("inception", "cpu")
    assert both.weights_hash != alone.weights_hash and both.describe()["fid_layers"] == ["2048", "spatial", "dinov2"]
    features = both(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    assert features["dinov2"].shape == (2, 384) and features["2048"].shape == (2, 2048)


def test_a_place_that_cannot_be_written_is_found_before_training(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("trained")

    monkeypatch.setattr(extractor_training, "_fit", never)
    data = write_images(tmp_path / "images", {"train": 2, "val": 1})
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="output_dir=.*cannot be written"):
        extractor_training.train_extractor(extractor_recipe(data, tmp_path / "file" / "extractor"))


def test_feature_widths_that_the_network_would_round_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="feature_dim=20: must be a multiple of 8"):
        extractor_recipe(data, tmp_path, feature_dim=20)
    for feature_dim in (8, 40):
        network = SmallClassifier(SIZE, 3, 3, 8, feature_dim).eval()
        assert network.layers(torch.zeros(1, 3, SIZE, SIZE))["pooled"].shape == (1, feature_dim)
