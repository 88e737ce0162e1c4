"""Class labels: ids, names, synonyms and synsets; what is ambiguous or unknown; where names come from and stay."""

import json

import numpy as np
import pytest
import torch
from test_pipeline import draw, make_pipe

from xdlm_image import XDLMImg2ImgPipeline, XDLMPipeline
from xdlm_image.data.labels import Labels, imagenet_labels, labels_of_folders, same_classes
from xdlm_image.pipelines.class_labels import read_names, read_synsets, resolve

NAMES = {0: "goldfish, Carassius auratus", 1: "crane", 2: "crane", 3: "Cardigan, Welsh corgi", 4: "cardigan"}
SYNSETS = {0: "n01443537", 1: "n02012849", 2: "n03126707", 3: "n02113186", 4: "n02963159"}


@pytest.fixture(scope="module")
def imagenet() -> Labels:
    return imagenet_labels()


def ids(labels, count=5, names=NAMES, synsets=SYNSETS):
    return resolve(labels, count, names, synsets)


# --- finding --------------------------------------------------------------------------------------


def test_ids_names_and_synsets_mix():
    mixed = [4, "goldfish", np.int64(1), torch.tensor(2), ["n02113186", ("CARASSIUS  auratus",)], np.array([0, 1])]
    assert ids(mixed) == [4, 0, 1, 2, 3, 0, 0, 1]
    assert ids("goldfish, Carassius auratus") == ids("N01443537") == ids(0) == ids(np.str_("goldfish")) == [0]
    assert ids(torch.tensor([[1, 2], [3, 4]])) == [1, 2, 3, 4] and ids(range(3)) == [0, 1, 2]


def test_letters_as_written_go_before_upper_and_lower_case_alike():
    assert ids(["Cardigan", "cardigan"]) == [3, 4]
    with pytest.raises(ValueError, match="fits several"):
        ids("CARDIGAN")


def test_a_text_of_digits_is_a_name_first_and_an_id_otherwise():
    assert ids(["2", 2, "1"], 3, {0: "2", 1: "bee"}) == [0, 2, 1]
    with pytest.raises(ValueError, match="holds '7': the classes are 0 to 4"):
        ids("7")


def test_an_ambiguous_name_lists_its_classes_and_each_can_be_passed():
    with pytest.raises(ValueError, match=r"'crane' fits several.*1: 'crane' \(n02012849\); 2: 'crane' \(n03126707\)"):
        ids("crane")
    with pytest.raises(
        ValueError, match=r"'crane' fits several classes, pass one of their ids: 1: 'crane'; 2: 'crane'"
    ):
        ids("crane", synsets=None)
    assert ids(["n02012849", "n03126707", 1, 2]) == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("text", "candidates"),
    [("crane", (134, 517)), ("maillot", (638, 639)), ("missile", (657, 744)), ("Panda", (387, 388))],
)
def test_ambiguous_names_of_imagenet(imagenet, text, candidates):
    with pytest.raises(ValueError, match="fits several") as caught:
        resolve(text, 1000, *imagenet)
    for index in candidates:
        assert f"{index}: {imagenet.id2label[index]!r} ({imagenet.id2synset[index]})" in str(caught.value)
        assert resolve([imagenet.id2synset[index], index], 1000, *imagenet) == [index, index]


def test_an_unknown_name_lists_the_nearest(imagenet):
    with pytest.raises(ValueError, match="'goldfsh' is no class.*nearest.*'goldfish'"):
        ids("goldfsh")
    with pytest.raises(ValueError, match="golden retriever.*Labrador retriever"):
        resolve("retriever", 1000, *imagenet)
    with pytest.raises(ValueError, match="nearest are.*n02012849"):
        ids("n02012840")
    with pytest.raises(ValueError, match="no id2label"):
        ids("goldfish", names=None, synsets=None)
    with pytest.raises(ValueError, match="no class") as caught:
        ids("x" * 100_000)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (-1, "holds -1: the classes are 0 to 4"),
        ("-1", "holds '-1'"),
        (5, "holds 5"),
        ([0, 2**70], "holds 1180591620717411303424"),
        (1.0, "holds 1.0"),
        (np.float32(1), "holds 1.0"),
        (True, "holds True"),
        ([np.bool_(False)], "holds .*False"),
        (torch.tensor([True]), "holds True"),
        ([None], "holds None"),
        (b"goldfish", "bytes"),
        ({0: "goldfish"}, "dict"),
        ({0, 1}, "set"),
        ([], "empty"),
        ([[], ()], "empty"),
        (torch.zeros(0, dtype=torch.int64), "empty"),
        ("", "no class"),
        (None, "needs ids \\(0 to 4\\) or names"),
    ],
    ids=str,
)
def test_bad_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        ids(labels)


def test_any_number_of_classes():
    assert resolve("only", 1, {0: "only"}) == [0]
    with pytest.raises(ValueError, match="holds 1: the classes are 0 only"):
        resolve(1, 1)
    assert resolve([21840, "last"], 21841, {21840: "last"}) == [21840, 21840]
    assert resolve(None, None) is None
    with pytest.raises(ValueError, match="class_labels='goldfish': this model is unconditional"):
        resolve("goldfish", None)


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"a": "ant"}, "key 'a'"),
        ({-1: "ant"}, "key -1"),
        ({True: "ant"}, "key True"),
        ({0: ""}, "id2label\\[0\\] is ''"),
        ({0: 3}, "id2label\\[0\\] is 3"),
        ({1: "ant", "1": "bee"}, "class 1 twice"),
        ({5: "ant"}, r"names classes \[5\].*0 to 4"),
        (["ant"], "is a list"),
    ],
    ids=str,
)
def test_wrong_tables(names, message):
    with pytest.raises(ValueError, match=message):
        read_names("id2label", names, 5)


def test_wrong_synsets():
    with pytest.raises(ValueError, match="id2synset\\[0\\] is 'goldfish'"):
        read_synsets({0: "goldfish"}, 5)
    with pytest.raises(ValueError, match="'n01443537' to the classes 0 and 1"):
        read_synsets({0: "n01443537", 1: "n01443537"}, 5)
    with pytest.raises(ValueError, match="id2label names classes \\[0\\]: the transformer is unconditional"):
        make_pipe(num_classes=None, id2label={0: "ant"})


def test_names_and_synsets_survive_saving_and_sharing(tmp_path):
    pipe = make_pipe(id2label=NAMES, id2synset=SYNSETS)
    pipe.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "model_index.json").read_text())["id2synset"]["0"] == "n01443537"
    loaded = XDLMPipeline.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    again = XDLMPipeline.from_pretrained(tmp_path / "b")
    shared = XDLMImg2ImgPipeline.from_pipe(again)
    back = XDLMPipeline.from_pipe(shared)
    for one in (pipe, loaded, again, shared, back):
        assert one.id2label == NAMES and one.id2synset == SYNSETS
        assert one.get_label_ids(["n01443537", "goldfish", 2]) == [0, 0, 2]
    assert back.transformer is again.transformer and back.vqvae is again.vqvae
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, "n01443537"), draw(pipe, 0))


def test_one_class_and_many():
    one = make_pipe(num_classes=1, id2label={0: "only"})
    assert draw(one, "only", guidance_scale=2.0).shape == (1, 3, 5)  # the null class is 1, not 1000
    many = make_pipe(num_classes=21841, id2label={21840: "last"})
    assert draw(many, ["last", 0], guidance_scale=2.0).shape == (2, 3, 5)


# --- where names come from ------------------------------------------------------------------------


def test_imagenet_has_its_thousand_names_in_the_usual_order(imagenet):
    assert len(imagenet.id2label) == len(imagenet.id2synset) == len(set(imagenet.id2synset.values())) == 1000
    assert imagenet.id2label[1] == "goldfish, Carassius auratus" and imagenet.id2synset[1] == "n01443537"
    assert imagenet.id2label[207] == "golden retriever" and list(imagenet.id2synset.values())[-1] == "n15075141"
    assert read_synsets(imagenet.id2synset, 1000) == imagenet.id2synset
    assert len(imagenet_labels("imagenet-22k").id2label) == 21_841
    with pytest.raises(ValueError, match="subset='imagenet-2k'"):
        imagenet_labels("imagenet-2k")


def test_folders_of_wordnet_ids_get_names_others_keep_theirs():
    imagenette = ["n01440764", "n02102040", "n03888257"]
    labels = labels_of_folders(imagenette)
    assert labels.id2label == {
        0: "tench, Tinca tinca",
        1: "English springer, English springer spaniel",
        2: "parachute, chute",
    }
    assert labels.id2synset == dict(enumerate(imagenette))
    assert labels_of_folders(["n01440764", "n99999999"]).id2label[1] == "n99999999"
    assert labels_of_folders(["n01440764", "cats"]) == ({0: "n01440764", 1: "cats"}, {})
    assert labels_of_folders([]) == ({}, {})


def test_a_pipeline_and_the_folders_it_was_trained_on_are_the_same_classes():
    folders = ["n02012849", "n03126707"]
    labels = labels_of_folders(folders)
    assert same_classes(labels, folders) and not same_classes(labels, folders[::-1])  # both are called crane
    assert same_classes(Labels(labels.id2label, {}), folders)  # names alone
    assert same_classes(Labels(dict(enumerate(folders)), {}), folders)  # trained before names were known
    assert same_classes(Labels({0: "a"}, {}), ["a", "b"]) and not same_classes(Labels({1: "a"}, {}), ["a", "b"])
