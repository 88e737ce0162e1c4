"""The command line as a user meets it: help, recipes by name, overrides, and errors that say what to do."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from xdlm_image.cli import SHARING, VERBS, main, nearest_option, parse, shipped_recipes

RECIPE = Path(__file__).parents[1] / "configs" / "fashion_mnist" / "xdlm.yaml"


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_option(verb: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for option in fields(VERBS[verb][0]):
        assert re.search(rf"--{option.name}[. ]", text), option.name
    explained = re.findall(r"\((?:required,\s+)?type:\s", text)
    assert len(explained) >= len(fields(VERBS[verb][0])) - 3 and "default: " in text


def test_help_lists_the_verbs_and_needs_no_torch() -> None:
    command = "import sys; from xdlm_image.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    for verb in VERBS:
        assert verb in done.stdout


def test_every_shipped_recipe_parses() -> None:
    verbs = {"tokenizer": "train-tokenizer", "extractor": "train-extractor", "encode": "encode", "evaluate": "evaluate"}
    verbs |= {"reproduce_table12": "evaluate", "nelbo": "nelbo"}
    assert len(shipped_recipes()) >= 14
    for name in shipped_recipes():
        parse(verbs.get(name.split("/")[-1], "train"), ["--config", name])


@pytest.mark.parametrize("data", ["fashion_mnist", "imagenet"])
def test_siblings_differ_in_k_and_folder_only(data: str) -> None:
    from dataclasses import asdict

    mdlm, xdlm, udlm = (asdict(parse("train", ["--config", f"{data}/{n}"])) for n in ("mdlm", "xdlm", "udlm"))
    assert [r["process"].pop("k") for r in (mdlm, xdlm, udlm)] == [0.0, 0.1, 1.0]
    assert len({r.pop("output_dir") for r in (mdlm, xdlm, udlm)}) == 3
    assert mdlm == xdlm == udlm


@pytest.mark.parametrize("name", ["mdlm", "xdlm", "udlm"])
def test_imagenet_networks_are_as_large_as_their_recipes_say(name: str) -> None:
    from dataclasses import asdict

    import torch

    from xdlm_image.models import XDLMTransformer2DModel
    from xdlm_image.models.transformer_xdlm import SIZES
    from xdlm_image.schedulers import XDLMProcess

    recipe = parse("train", ["--config", f"imagenet/{name}"])
    assert recipe.process.definition == "B" and recipe.batch_size * 8 == 512
    process = XDLMProcess(recipe.process.k, 16_384, "B", vocab_size=16_385, mask_id=16_384)
    with torch.device("meta"):
        network = XDLMTransformer2DModel(
            sample_size=[16, 16],
            num_embeds=process.num_ids,
            out_channels=process.logits_width,
            num_classes=1000,
            **asdict(recipe.model),
        )
    assert {key: value for key, value in asdict(recipe.model).items() if key in SIZES["xdlm-official"]} == SIZES[
        "xdlm-official"
    ]
    text = Path(__file__).parents[1].joinpath("configs", "imagenet", f"{name}.yaml").read_text()
    told = re.search(r"([\d,]+) parameters", text)
    assert told and int(told[1].replace(",", "")) == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("[3,4]", [3, 4]),
        ("[Sneaker, 3]", ["Sneaker", 3]),
        ("3", 3),
        ("Sneaker", "Sneaker"),
        ("T-shirt/top", "T-shirt/top"),
    ],
)
def test_class_labels_are_ids_or_names(text: str, labels) -> None:
    assert parse("sample", ["--pipeline=p", "--output=g.png", f"--class_labels={text}"]).class_labels == labels


def test_names_of_pipelines_stay_as_typed() -> None:
    recipe = parse("evaluate", ["--pipelines.my-run", "folder", "--output-dir", "out"])
    assert recipe.pipelines == {"my-run": "folder"}


@pytest.mark.parametrize("recipe", [["--config", "fashion_mnist/xdlm"], ["--config=fashion_mnist/xdlm"]])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_command_line_wins_over_the_recipe_wherever_it_is_named(recipe: list[str], place: int) -> None:
    options = ["--process.k=0.5", "--max-steps", "7000"]
    recipe = parse("train", [*options[:place], *recipe, *options[place:]])
    assert recipe.process.k == 0.5 and recipe.max_steps == 7000 and recipe.codes.endswith("codes/train")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tran"], ["no verb 'tran'", "did you mean 'train'"]),
        (["train", "--config", "fashion_mnist/mdlm", "--lerning_rate", "3"], ["did you mean 'learning_rate'"]),
        (["train", "--config", "fashion_mnist/mdlm", "--process.k", "1.5"], ["process.k=1.5", "[0, 1]"]),
        (["train", "--config", "fashion_mnist/mdlm", "--process.k", "-0.1"], ["process.k=-0.1"]),
        (["train", "--config", "fashion_mnist/mdlm", "--max_steps", "many"], ["max_steps", "many"]),
        (["train", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["train", "--codes", "a"], ["required", "output_dir"]),
        (
            ["train", "--config", "fashion_mnist/mdlm", "--tokenizer", "nowhere"],
            ["tokenizer='nowhere'", "train-tokenizer"],
        ),
        (["sample", "--pipeline", "nowhere", "--output", "grid.png"], ["nowhere"]),
        (["sample", "--pipeline", "p", "--output", "g.png", "--num_steps", "0"], ["num_steps=0"]),
        (["sample", "--pipeline", "p", "--output", "g.png", "--temperature", ".nan"], ["temperature=nan", "finite"]),
        (["neighbours", "--pipeline", "p", "--guidance_scale", ".inf"], ["guidance_scale=inf", "finite"]),
        (["sample", "--pipeline", "p", "--output", "g.png", "--device", "nonsense"], ["device='nonsense'"]),
    ],
)
def test_wrong_input_is_explained(arguments: list[str], words: list[str], capsys) -> None:
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and "Traceback" not in error
    for word in words:
        assert word in error


def test_verbs_that_cannot_share_their_work_refuse_several_processes(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert set(SHARING) < set(VERBS)
    required = {
        "train-extractor": ["--output_dir=o"], "sample": ["--pipeline=p", "--output=o.png"], "demo": [],
        "reference": ["--output_dir=o", "--extractor=e"], "neighbours": ["--pipeline=p"],
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for verb, options in required.items():
        assert main([verb, *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"xdlm-image {verb}: error: WORLD_SIZE=2") and error.count("\n") == 1
        assert "start it without torchrun" in error
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("WORLD_SIZE")
    assert main(["sample", "--pipeline=p", "--output=o.png"]) == 2
    assert "WORLD_SIZE" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "near"), [("modle:\n  num_layers: 3\n", "model.num_layers"), ("process:\n  K: 1\n", "process.k")]
)
def test_unknown_keys_of_a_recipe_suggest_the_nearest(tmp_path, capsys, text: str, near: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parse("train", ["--config", str(tmp_path / "recipe.yaml")])
    assert f"did you mean '{near}'" in capsys.readouterr().err


def test_nearest_option() -> None:
    options = ["learning_rate", "process.k", "model.num_layers"]
    assert nearest_option("leraning_rate", options) == "learning_rate"
    assert nearest_option("num_layers", options) == "model.num_layers"
    assert nearest_option("zebra", options) is None


@pytest.mark.parametrize(
    ("verb", "arguments", "field", "value"),
    [
        ("demo", ["--full"], "full", True),
        ("demo", ["--full", "false"], "full", False),
        ("sample", ["--trace", "--pipeline=p", "--output=o.png"], "trace", "strip"),
        ("sample", ["--pipeline=p", "--output=o.png", "--trace", "gif"], "trace", "gif"),
    ],
)
def test_options_that_may_stand_alone(verb, arguments, field, value):
    assert getattr(parse(verb, arguments), field) == value


def test_names_of_recipes_are_offered_where_they_fit(tmp_path, capsys):
    for arguments, words in (
        (["train", "--config", "fashion_mnist/xdml"], "did you mean 'fashion_mnist/xdlm'?"),
        (["train", "--config", "process: {k: 1}"], "no such file, and no shipped recipe; shipped recipes: "),
        (["train", "--process", "file.yaml"], "--process: name one of its options, as in --process.NAME VALUE"),
        (["sample", "--num_step", "3", "--pipeline=p", "--output=o.png"], "did you mean 'num_steps'?"),
        (["sample", "--config", str(RECIPE), "--pipeline=p", "--output=o.png"], "--config one of another verb?"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "fashion_mnist/mdlm, fashion_mnist/udlm, fashion_mnist/xdlm, imagenet/mdlm" in shown
        and "fashion_mnist/encode" not in shown
    )
    twice = tmp_path / "twice.yaml"
    twice.write_text("max_steps: 3\nmax_steps: 4\n")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(twice)])
    assert "has max_steps twice" in capsys.readouterr().err


def test_recipes_of_other_verbs_are_told_apart_from_none(capsys) -> None:
    with pytest.raises(SystemExit):
        parse("train", ["--config", "fashion_mnist/tokenizer"])
    error = capsys.readouterr().err
    assert (
        "--config 'fashion_mnist/tokenizer': a recipe of another verb; shipped for this one: fashion_mnist/m" in error
    )
    with pytest.raises(SystemExit):
        parse("demo", ["--config=fashion_mnist/xdlm"])
    assert "a recipe of another verb; shipped for this one: none\n" in capsys.readouterr().err


def test_one_value_of_a_list_needs_no_brackets() -> None:
    arguments = ["--output_dir=o", "--pipelines.a", "b", "--feature-metrics", "kid"]
    recipe = parse("evaluate", ["--num_steps", "4", "--seeds=0", *arguments])
    assert (recipe.num_steps, recipe.seeds, recipe.feature_metrics) == ([4], [0], ["kid"])
    recipe = parse("evaluate", ["--num_steps", "[4, 8]", "--feature_metrics=[]", "--extractor", "e", *arguments[:3]])
    assert (recipe.num_steps, recipe.feature_metrics, recipe.extractor) == ([4, 8], [], "e")
    recipe = parse("train-tokenizer", ["--output_dir=o", "--model.block_out_channels", "32"])
    assert recipe.model.block_out_channels == [32]


def test_names_with_a_dot_are_told_where_to_go(capsys) -> None:
    with pytest.raises(SystemExit):
        parse("evaluate", ["--pipelines.xdlm-0.1", "folder", "--output_dir", "out"])
    assert "--pipelines '{xdlm-0.1: VALUE}'" in capsys.readouterr().err
    recipe = parse("evaluate", ["--pipelines", "{xdlm-0.1: folder}", "--output_dir", "out"])
    assert recipe.pipelines == {"xdlm-0.1": "folder"}


def test_paths_of_the_home_folder_are_found_where_no_shell_expands_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("output_dir: ~/out\npipelines: {a: ~/a}\n")
    recipe = parse("evaluate", ["--config", str(tmp_path / "recipe.yaml"), "--extractor=~/eyes"])
    found = (recipe.output_dir, recipe.pipelines["a"], recipe.extractor)
    assert found == tuple(f"{tmp_path}/{name}" for name in ("out", "a", "eyes"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--guidance_scale", "1,4"], "guidance_scale=1,4: must be one of float, [float, float]; lists"),
        (["sample", "--guidance_interval", "0.5"], "guidance_interval=0.5: must be one of [float, float], null"),
        (["sample", "--guidance_scale", "[1, 2, 3]"], "guidance_scale=[1, 2, 3]: must be one of float, [float, float]"),
        (
            ["encode", "--splits", "train,test"],
            "splits=train,test: must be a list; lists stand in brackets, as in --splits '[train,test]'",
        ),
        (["encode", "--splits", "tset"], "splits=tset: must be one of ['train', 'validation', 'test']\n"),
        (["reference", "--tokenizers", "{x: f}"], "tokenizers={'x': 'f'}: must be a list; lists stand in brackets\n"),
        (
            ["sample", "--class_labels", "Bag", "Coat"],
            "unrecognized arguments: Coat; an option takes one value, and several stand in brackets, as in '[a, b]'\n",
        ),
        (["train-tokenizer", "--model.block_out_channels", "32,64"], "as in --model.block_out_channels '[32,64]'"),
        (["train", "--process.k", "nan"], "error: process.k=nan: must be a finite number\n"),
        (["train", "--max_steps", "1.5"], "error: max_steps=1.5: must be a whole number\n"),
        (["train", "--optimizer", "sgd"], "error: optimizer=sgd: must be one of ['adamw', 'muon']\n"),
        (["train", "--log_with", "foo"], "log_with=foo: must be one of ['tensorboard', 'wandb', 'none'], list["),
    ],
)
def test_values_of_no_type_that_fits_are_told_what_would(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments[0], arguments[1:])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status", "word"), [(2, 130, "interrupted"), (15, 143, "terminated")])
@pytest.mark.parametrize(
    ("verb", "checkpoint", "then"),
    [
        ("train", False, "begins again, as there is no checkpoint yet"),
        ("train", True, "resumes from its newest checkpoint"),
        ("sample", False, "begins again"),
        ("encode", False, "resumes"),
    ],
)
def test_who_interrupts_is_told_what_the_same_command_does(
    verb, checkpoint, then, number, status, word, monkeypatch, tmp_path, capsys
):
    def work(recipe):
        os.kill(os.getpid(), number)
        time.sleep(5)
        return "not interrupted"

    rooms = {"train": "training.loop", "sample": "drawing.sample", "encode": "tokenizer.encode"}
    monkeypatch.setattr(f"xdlm_image.{rooms[verb]}.{verb}", work)
    if checkpoint:
        (tmp_path / "checkpoints" / "step-00000250").mkdir(parents=True)
    options = {
        "train": ["--codes=c", "--tokenizer=t", f"--output_dir={tmp_path}"],
        "sample": ["--pipeline=p", "--output=o.png"],
        "encode": ["--tokenizer=t", f"--output_dir={tmp_path}"],
    }
    before = signal.getsignal(signal.SIGTERM)
    of_shell = signal.signal(signal.SIGINT, signal.default_int_handler)  # which ignores it for commands behind an &
    try:
        assert main([verb, *options[verb]]) == status
    finally:
        signal.signal(signal.SIGINT, of_shell)
    told = f"xdlm-image {verb}: {word}; nothing half-written is left, and the same command {then}\n"
    assert capsys.readouterr().err.endswith("\n" + told)
    assert signal.getsignal(signal.SIGTERM) is before
