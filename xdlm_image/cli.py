"""The command `xdlm-image VERB`: a recipe file, overrides from the command line, then the verb.

Owns parsing and error messages; what the options mean stands in `recipes/`, what a verb does in its package, which is
imported when the verb runs, so that `--help` answers at once.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.resources
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from xdlm_image import recipes
from xdlm_image.recipes.recipe_file import check_recipe_file

VERBS: dict[str, tuple[type, str, str]] = {
    "train-extractor": (
        recipes.ExtractorRecipe,
        "xdlm_image.features.extractor_training:train_extractor",
        "Train a small classifier, whose features serve FID where Inception's weights cannot be downloaded.",
    ),
    "train-tokenizer": (
        recipes.TokenizerRecipe,
        "xdlm_image.tokenizer.train:train_tokenizer",
        "Train a VQ tokenizer; report PSNR, rFID, codebook usage and perplexity, with a picture.",
    ),
    "encode": (
        recipes.EncodeRecipe,
        "xdlm_image.tokenizer.encode:encode",
        "Encode images to memory-mapped codes that know their tokenizer and their images.",
    ),
    "train": (
        recipes.TrainRecipe,
        "xdlm_image.training.loop:train",
        "Train a transformer on codes with the XDLM objective (k = 0 is MDLM, k = 1 is UDLM); resumes by itself.",
    ),
    "sample": (
        recipes.SampleRecipe,
        "xdlm_image.drawing.sample:sample",
        "Draw a class-conditional grid, and each image if asked.",
    ),
    "app": (
        recipes.AppRecipe,
        "xdlm_image.app.serving:app",
        "Draw on a page in the browser: classes, steps, temperature, guidance, a picture to begin at or paint over.",
    ),
    "reference": (
        recipes.ReferenceRecipe,
        "xdlm_image.evaluation.references:reference",
        "Measure real images once, so that samples can be judged where the images are not at hand.",
    ),
    "evaluate": (
        recipes.EvaluateRecipe,
        "xdlm_image.evaluation.sweep:evaluate",
        "FID of several pipelines over step counts: JSON with the protocol, table, plot, grids; resumes by itself.",
    ),
    "neighbours": (
        recipes.NeighboursRecipe,
        "xdlm_image.evaluation.neighbours:neighbours",
        "Show the training images nearest to samples, and how near held-out images lie: are samples copies?",
    ),
    "nelbo": (
        recipes.NelboRecipe,
        "xdlm_image.evaluation.nelbo:nelbo",
        "NELBO of pipelines on held-out codes: bits per token with intervals, over k and over training; resumes.",
    ),
    "demo": (
        recipes.DemoRecipe,
        "xdlm_image.evaluation.demo:demo",
        "Draw and judge the models that come with a checkout: grids at 8 steps and FID over step counts, in minutes.",
    ),
    "export": (
        recipes.ExportRecipe,
        "xdlm_image.hub.export:export",
        "Write a pipeline as a folder that loads without this package, with a model card; push it to a hub if asked.",
    ),
    "convert-llamagen": (
        recipes.ConversionRecipe,
        "xdlm_image.conversion.vq_tokenizers:convert_llamagen",
        "Turn LlamaGen's VQ-16 or VQ-8 into a tokenizer folder, exactly; the file is read without running it.",
    ),
    "convert-taming": (
        recipes.ConversionRecipe,
        "xdlm_image.conversion.vq_tokenizers:convert_taming",
        "Turn a taming VQGAN (f16 with 1,024 or 16,384 codes) into a tokenizer folder, exactly.",
    ),
    "convert-xdlm": (
        recipes.ConvertXDLMRecipe,
        "xdlm_image.conversion.official_xdlm:convert_xdlm",
        "Turn an official XDLM, MDLM or UDLM checkpoint into a pipeline with the same logits.",
    ),
}

BY_CHECKPOINT = ("train-extractor", "train-tokenizer", "train")
# verbs that keep nothing of what was not finished
AT_ONCE = ("sample", "app", "neighbours", "export", "convert-llamagen", "convert-taming", "convert-xdlm")
KINDS = {"float": "a finite number", "int": "a whole number", "bool": "true or false", "str": "a text"}
SHARING = ("train-tokenizer", "encode", "train", "evaluate", "nelbo")  # verbs that share their work over processes


class RecipeParser(ArgumentParser):
    """jsonargparse, with errors of two lines: what is wrong, and the nearest name that would be right."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        for pattern in (r"unrecognized arguments: --?([\w.]+)", r"Group '([\w.]+)' does not accept option '([\w.]+)'",
                        r"[Oo]ption '([\w.]+)' is not accepted"):  # fmt: skip
            found = re.search(pattern, message)
            if found:
                near = nearest_option(".".join(found.groups()), list(self._options()))
                of_a_file = "; is the recipe of --config one of another verb?" * ("not accepted" in message)
                message += f"; did you mean {near!r}?" if near else of_a_file
                break
        if re.search(r"unrecognized arguments: [^-]", message):
            message += "; an option takes one value, and several stand in brackets, as in '[a, b]'"
        if union := re.search(
            r'key "([\w.]+)":\s+Does not validate.*Subtypes: \[(.+?)\]\n.*Given value: (.*)', message, re.S
        ):
            name, kinds, value = union.groups()
            for jargon, plain in ((r"<class '(\w+)'>", r"\1"), ("typing.Literal|tuple", ""), ("NoneType", "null")):
                kinds = re.sub(jargon, plain, kinds)
            message = f"{name}={value}: must be one of {kinds}; lists stand in brackets"
        if bare_list := re.search(r'key "([\w.]+)":\s+Expected a <class \'list\'>\. Got value: (.*)', message):
            name, value = bare_list.groups()
            example = "" if value.startswith("{") else f", as in --{name} '[{value}]'"
            message = f"{name}={value}: must be a list; lists stand in brackets{example}"
        if typed := re.search(
            r'key "([\w.]+)":\s+Expected a (<class \'(\w+)\'>|typing\.Literal(\[.+?\]))\. Got value: (.*)', message
        ):
            name, _, kind, choices, value = typed.groups()
            wanted = f"one of {choices}" if choices else KINDS.get(kind, kind)
            message = f"{name}={value}: must be {wanted}"
            if kind == "dict":
                message = f"{name}={value}: must have a name, as in --{name}.NAME {value}"
        print(f"{self.prog}: error: {message}\nAll options: {self.prog} --help", file=sys.stderr)
        sys.exit(2)

    def _options(self) -> Iterator[str]:
        for action in self._actions:
            yield from (option.removeprefix("--") for option in action.option_strings if option.startswith("--"))


def nearest_option(name: str, options: list[str]) -> str | None:
    """The option nearest to a misspelt or misplaced one; None if none is near."""
    last = {option.rpartition(".")[2]: option for option in options}
    if name.rpartition(".")[2] in last:
        return last[name.rpartition(".")[2]]
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if near:
        return near[0]
    near = difflib.get_close_matches(name.rpartition(".")[2], list(last), n=1, cutoff=0.7)
    return last[near[0]] if near else None


def parse(verb: str, arguments: Sequence[str]) -> Any:
    """The recipe of a verb from its arguments; exits with a message if they are wrong."""
    recipe_class, _, description = VERBS[verb]
    names = shipped_recipes({field.name for field in fields(recipe_class)})
    parser = RecipeParser(
        prog=f"xdlm-image {verb}",
        description=description,
        epilog="Options on the command line win over the recipe file, which wins over the defaults shown.",
        allow_abbrev=False,
    )
    shipped = f", or the name of a shipped one: {', '.join(names)}" if names else " of yours; none is shipped for this"
    parser.add_argument("--config", action="config", help=f"Recipe: a YAML file{shipped}.")
    parser.add_class_arguments(recipe_class, None)
    if "data" in {field.name for field in fields(recipe_class)}:
        # the default images have found theirs, which depend on data.root
        parser.set_defaults({f"data.{name}": None for name in ("name", "image_size", "channels")})
    try:
        free = {field.name for field in fields(recipe_class) if str(field.type).startswith("dict")}
        bare = {f"--{f.name}": f.metadata.get("bare", "true") for f in fields(recipe_class) if _may_be_bare(f)}
        groups = {field.name for field in fields(recipe_class) if is_dataclass(field.default_factory)}
        spelled = _recipe_first([*_spelled(arguments, free, groups, names)])
        settings = parser.parse_args([*_in_brackets(_with_values(spelled, bare), {*_lists(recipe_class)})])
        recipe = parser.instantiate(settings)
        return recipe_class(**{key: _from_home(value) for key, value in vars(recipe).items() if key != "config"})
    except ValueError as error:
        parser.error(str(error))


def _from_home(value: Any) -> Any:
    """Paths `~/...` from the home folder: in YAML and in `--output=~/...` no shell has expanded them."""
    if isinstance(value, str):
        return os.path.expanduser(value) if value.startswith("~/") else value
    if isinstance(value, list):
        return [_from_home(item) for item in value]
    return {key: _from_home(item) for key, item in value.items()} if isinstance(value, dict) else value


def _may_be_bare(field: Field) -> bool:
    return str(field.type) == "bool" or "bare" in field.metadata


def _with_values(arguments: Sequence[str], bare: dict[str, str]) -> Iterator[str]:
    """Options typed without a value, `--full` or `--trace`, get the value that they then stand for."""
    for i, argument in enumerate(arguments):
        alone = i + 1 == len(arguments) or arguments[i + 1].startswith("--")
        yield f"{argument}={bare[argument]}" if alone and argument in bare else argument


def _lists(recipe_class: type, before: str = "--") -> Iterator[str]:
    """Options that take nothing but a list."""
    for field in fields(recipe_class):
        if is_dataclass(field.default_factory):
            yield from _lists(field.default_factory, f"{before}{field.name}.")
        elif re.fullmatch(r"list\[.*\]", str(field.type)):
            yield before + field.name


def _in_brackets(arguments: Iterable[str], lists: set[str]) -> Iterator[str]:
    """`--num_steps 4` is `--num_steps [4]`: a value that stands alone where a list is wanted."""
    name = ""
    for argument in arguments:
        head, value = "", argument
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            head = name + equals
        if name in lists and re.fullmatch(r"[^\[{,][^,]*", value):
            name, value = "", f"[{value}]"
        yield head + value


def _recipe_first(arguments: Sequence[str]) -> list[str]:
    """`--config X` and `--config=X` before the options, which win over it wherever it was typed."""
    first: list[str] = []
    rest: list[str] = []
    for argument in arguments:
        is_recipe = argument.startswith("--config=") or argument == "--config" or first[-1:] == ["--config"]
        (first if is_recipe else rest).append(argument)
    return first + rest


def _spelled(arguments: Sequence[str], free: set[str], groups: set[str], recipes: list[str]) -> Iterator[str]:
    """`--output-dir` is `--output_dir`; the name of a shipped recipe is its file.

    Args:
        arguments: As typed.
        free: Options whose keys are the user's own words (`--pipelines.my-run`), which stay as they are.
        groups: Options that hold options, for `check_recipe_file`.
        recipes: Names of the shipped recipes of this verb.
    """
    is_config = False
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            head, dot, key = name[2:].partition(".")
            head = head.replace("-", "_")
            name = "--" + head + dot + (key if head in free else key.replace("-", "_"))
            if head in free and "." in key:
                raise ValueError(f"{name}: a name with a dot goes in braces, as in --{head} '{{{key}: VALUE}}'")
            if name[2:] in groups:
                raise ValueError(f"{name}: name one of its options, as in {name}.NAME VALUE")
            if name == "--config" and equals:
                value = _recipe_file(value, groups, recipes)
            yield name + equals + value
            is_config = name == "--config" and not equals
        else:
            yield _recipe_file(argument, groups, recipes) if is_config else argument
            is_config = False


def _shipped_folder() -> Path:
    return Path(str(importlib.resources.files("xdlm_image.configs")))


def shipped_recipes(options: set[str] | None = None) -> list[str]:
    """Names that `--config` takes besides files; with `options`, those whose every option is among them."""
    folder = _shipped_folder()
    return sorted(
        str(path.relative_to(folder).with_suffix(""))
        for path in folder.rglob("*.yaml")
        if options is None or set(yaml.safe_load(path.read_text(encoding="utf-8"))) <= options
    )


def _recipe_file(name: str, groups: set[str], recipes: list[str]) -> str:
    if Path(name).exists():
        check_recipe_file(name, groups)
        return name
    shipped = _shipped_folder() / f"{name}.yaml"
    if str(Path(name)) in recipes:
        return str(shipped)
    if shipped.exists():
        raise ValueError(
            f"--config {name!r}: a recipe of another verb; shipped for this one: {', '.join(recipes) or 'none'}"
        )
    near = difflib.get_close_matches(name, shipped_recipes(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped recipes: {', '.join(shipped_recipes())}"
    raise ValueError(f"--config {name!r}: no such file, and no shipped recipe; {hint}")


def usage() -> str:
    """What `xdlm-image --help` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {description}" for verb, (_, _, description) in VERBS.items())
    return (
        "usage: xdlm-image VERB [--config RECIPE] [--option value ...]\n\n"
        "Class-conditional image generation in few steps by discrete diffusion (XDLM) on VQ codes.\n\n"
        f"verbs, in the order of work:\n{verbs}\n\n"
        "xdlm-image VERB --help       every option of a verb\n"
        "xdlm-image VERB ... --print_config   the whole recipe that would run\n"
        "xdlm-image --version\n"
    )


class Terminated(KeyboardInterrupt):
    """SIGTERM, with which queues end their jobs."""


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def _what_comes_next(verb: str, recipe: Any) -> str:
    """What a command does that was interrupted and is given again."""
    if verb in AT_ONCE:
        return "begins again"
    if verb not in BY_CHECKPOINT:
        return "resumes"
    if any(Path(recipe.output_dir, "checkpoints").glob("step-*")):
        return "resumes from its newest checkpoint"
    return "begins again, as there is no checkpoint yet"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0, 2 for wrong input, 130 when interrupted, 143 when terminated."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"xdlm-image {version('xdlm-image')}")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"xdlm-image: error: no verb {verb!r}{hint}\nVerbs: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    recipe = parse(verb, arguments[1:])
    if verb not in SHARING and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print(
            f"xdlm-image {verb}: error: WORLD_SIZE={os.environ['WORLD_SIZE']}: this verb runs in one process, and "
            f"several would do its work over and write the same files; start it without torchrun or accelerate launch "
            f"(several share {', '.join(SHARING)})",
            file=sys.stderr,
        )
        return 2
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without a line of our source
    module, _, function = VERBS[verb][1].partition(":")
    in_main = threading.current_thread() is threading.main_thread()  # signals are no other's
    before = signal.signal(signal.SIGTERM, _terminate) if in_main else None
    try:
        result = getattr(importlib.import_module(module), function)(recipe)
    except (ValueError, OSError) as error:
        if os.environ.get("XDLM_IMAGE_TRACEBACK"):
            raise
        print(f"xdlm-image {verb}: error: {error}\n(XDLM_IMAGE_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        number, how = (signal.SIGTERM, "terminated") if isinstance(stop, Terminated) else (signal.SIGINT, "interrupted")
        print(
            f"\nxdlm-image {verb}: {how}; nothing half-written is left, and the same command "
            f"{_what_comes_next(verb, recipe)}",
            file=sys.stderr,
        )
        return 128 + number
    finally:
        warnings.formatwarning = usual
        if in_main:
            signal.signal(signal.SIGTERM, before)
    print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
