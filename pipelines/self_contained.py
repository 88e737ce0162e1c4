"""Loading and saving a pipeline: run folders, self-contained folders (code beside weights) and model hubs.

This file owns what is written where, whose code runs when a folder is loaded, and the upload. It never decides what a
model card tells of a training run. It imports only the standard library, diffusers, huggingface_hub and its siblings,
and travels beside the weights: a pipeline that was loaded without the package can be saved and pushed again.
"""

import difflib
import importlib
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import CommitInfo, HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from .folder_check import (
    CARD,
    PICTURE,
    WEIGHTS,
    check_all_loaded,
    check_index,
    own_file,
    part_classes,
    refuse_other_content,
)
from .plain_card import plain_card
from .travelling_code import REMOTE, VERSIONED, add_code

PACKAGE = __name__.partition(".")[0]
TRAVELS = PACKAGE == REMOTE  # whether this very file was loaded as remote code
STALE_CODE = "*_" + "[0-9a-f]" * 8 + ".py"  # what an upload replaces: code files of earlier uploads


class SelfContainedPipeline(DiffusionPipeline):
    """A diffusers pipeline that can take its code along, and that runs other people's code only when told to."""

    # --- loading ----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a folder or a hub's repository, and see that the weights are whole.

        The package runs its own code, never code from the folder, of which not even a copy is downloaded. With
        `trust_remote_code=True` the folder's code runs instead, as with `DiffusionPipeline.from_pretrained`.

        Args:
            pretrained_model_name_or_path: A folder, or the id of a repository, `OWNER/NAME`.
            **kwargs: As diffusers takes them.

        Raises:
            OSError: If a file is missing or truncated, or there is no such folder or repository.
            ValueError: If a tensor is missing; diffusers alone would draw it at random and only warn. If code of a
                repository is trusted without `revision` naming a commit by its full hash. If `custom_pipeline` is
                given.
        """
        path, local = pretrained_model_name_or_path, Path(pretrained_model_name_or_path).is_dir()
        if local and not (Path(path) / "model_index.json").is_file() and (Path(path) / "pipeline").is_dir():
            raise FileNotFoundError(
                f"{str(path)!r} is the folder of a training run: name {str(Path(path) / 'pipeline')!r}"
            )
        if kwargs.get("custom_pipeline") is not None:
            raise ValueError(
                f"custom_pipeline={kwargs['custom_pipeline']!r}: {cls.__name__} runs its own code; use diffusers' "
                "DiffusionPipeline for another"
            )
        if kwargs.get("trust_remote_code") and not local:
            _require_pinned(path, kwargs.get("revision"))
        theirs = bool(kwargs.get("trust_remote_code")) and (not local or bool(part_classes(path)))
        folder = path if local or theirs or TRAVELS else _download(cls, path, kwargs)
        if Path(folder).is_dir() and not any(Path(folder).rglob("*.bin")):  # never look, or ask, for pickled weights
            kwargs.setdefault("use_safetensors", True)
        if not theirs and not TRAVELS:
            check_index(folder, kwargs, PACKAGE)
        if theirs:
            pipeline = DiffusionPipeline.from_pretrained(folder, **kwargs)
            if cls.__name__ not in [base.__name__ for base in type(pipeline).__mro__]:
                raise ValueError(
                    f"{cls.__name__}: the code in {str(path)!r} makes a {type(pipeline).__name__}; load it by that "
                    f"name, or without trust_remote_code, which makes a {cls.__name__} of its weights"
                )
        else:
            pipeline = super().from_pretrained(folder, **kwargs)
        pipeline.register_to_config(_name_or_path=str(path))
        for name in ("transformer", "vqvae"):
            if name not in kwargs and getattr(pipeline, name) is not None:  # given modules are the caller's
                check_all_loaded(name, getattr(pipeline, name), kwargs.get("variant"))
        return pipeline

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As diffusers', with the package's own classes in the place of code beside the weights."""
        loaded = super().load_config(*args, **kwargs)
        if not TRAVELS:
            _name_installed_classes(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    # --- saving -----------------------------------------------------------------------------------

    def check_labels(self) -> None:
        """Raise ValueError if classes that have names are none of the transformer's, which may have been exchanged."""
        if self.transformer is None:
            return
        classes = self.transformer.config.num_classes or 0
        for table in ("id2label", "id2synset"):
            strange = [index for index in self.config.get(table) or {} if int(index) >= classes]
            if strange:
                raise ValueError(
                    f"{table} names classes {strange[:5]}, the transformer has {classes}; "
                    f"{type(self).__name__}.from_pipe(pipe, {table}=...) takes the names of its own"
                )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as every diffusers pipeline: weights and configurations, which the package loads.

        A pipeline whose own code came from a folder keeps that code beside the weights, as nothing else could load it.

        Args:
            save_directory: Where.
            safe_serialization: False writes pickles, which a hub will not get.
            variant: Part of the weights' file names.
            max_shard_size: Larger weights are split.
            push_to_hub: Push too, with code and card; see `push_to_hub`.
            **kwargs: Of `push_to_hub`; `repo_id` is the folder's name by default.

        Raises:
            ValueError: If names of classes are not the transformer's: the folder would not load.
        """
        if kwargs.pop("use_flashpack", False):
            raise ValueError("use_flashpack=True: weights are saved as safetensors or pickles only; leave it out")
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained: {', '.join(kwargs)} are for push_to_hub=True")
        self.check_labels()
        options: dict[str, Any] = {"variant": variant, "max_shard_size": max_shard_size}
        super().save_pretrained(save_directory, safe_serialization=safe_serialization, **options)
        if TRAVELS:
            add_code(self, Path(save_directory))
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(os.path.abspath(save_directory)).name)
            self.push_to_hub(repo_id, safe_serialization=safe_serialization, **options, **kwargs)

    def save_for_hub(
        self,
        save_directory: str | os.PathLike,
        card: str | ModelCard | None = None,
        overwrite: bool = False,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        **about: Any,
    ) -> Path:
        """Write a self-contained folder, code beside weights, that loads without the package; whole or not at all.

        Args:
            save_directory: Where; an earlier self-contained folder there is replaced.
            card: The model card; None writes it from the files of the run that the pipeline was loaded from.
            overwrite: Also replace a folder that holds anything else.
            variant: Part of the weights' file names.
            max_shard_size: Larger weights are split.
            **about: What the card cannot know by itself, see `xdlm_image.hub.card.write_card`; needs the package.

        Returns:
            The folder.

        Raises:
            FileExistsError: The folder holds something else, and `overwrite` is False.
            ValueError: A part's code cannot travel, as it imports what need not stand elsewhere.
        """
        folder = Path(os.path.abspath(save_directory))  # "." has no name to put a temporary one beside
        refuse_other_content(folder, overwrite)
        with tempfile.TemporaryDirectory() as scratch:
            text, files = self.make_card(card, folder.name, Path(scratch), about)
            write_folder(self, folder, text, files, {"variant": variant, "max_shard_size": max_shard_size})
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        revision: str | None = None,
        card: str | ModelCard | None = None,
        **about: Any,
    ) -> CommitInfo:
        """Upload the pipeline as a self-contained folder: it loads from the hub without the package.

        Code files of earlier uploads go in the same change. A card that is in the repository already stays, unless
        `card`, or anything about it, is given.

        Args:
            repo_id: `OWNER/NAME`, made if it is not there; `NAME` alone is the user's own.
            commit_message: None says what was uploaded.
            private: Of a new repository; None is the owner's default.
            token: The user's; None takes the stored one.
            create_pr: Open a pull request instead of changing the branch.
            safe_serialization: True only: a hub gets no pickles.
            variant: Part of the weights' file names.
            max_shard_size: Larger weights are split.
            revision: Branch, made if it is not there; None is the main one.
            card: As in `save_for_hub`.
            **about: As in `save_for_hub`.

        Raises:
            ValueError: `safe_serialization=False`, or code that cannot travel.
            OSError: The hub refuses, before anything is saved.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False: only safetensors go to a hub; leave it out")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "folder"
            api = HfApi(token=token)
            text: str | None = None
            files: dict[str, Path] = {}
            told = card is not None or bool(about)
            if told:  # and may be refused: before the repository is made
                text, files = self.make_card(card, repo_id, Path(scratch), about)
            repo_id = open_repository(api, repo_id, private, revision)
            if not told and not api.file_exists(repo_id, CARD, revision=revision):  # a new branch has main's card
                text, files = self.make_card(None, repo_id, Path(scratch), {})
            write_folder(self, folder, text, files, {"variant": variant, "max_shard_size": max_shard_size})
            return upload(api, folder, repo_id, commit_message, revision, create_pr)

    def make_card(
        self, card: str | ModelCard | None, name: str, scratch: Path, about: Mapping[str, Any]
    ) -> tuple[str, dict[str, Path]]:
        """Text of the model card, and files that go with it: name in the folder -> where they are.

        Args:
            card: The text, if it is written already.
            name: Of the model.
            scratch: Folder for a picture.
            about: What the card cannot know by itself. Where nothing is said, a self-contained folder keeps its card.
        """
        if card is not None and about:
            raise TypeError(f"card: it is given, so {', '.join(about)} would not be read; give one or the other")
        if card is not None:
            return str(card), {}
        if TRAVELS and about:
            raise TypeError(f"{', '.join(about)}: writing a card needs the package xdlm-image; give card instead")
        came_from = getattr(self.transformer.config, "_name_or_path", None)
        folder = Path(came_from).parent if came_from else None
        if not about and folder and part_classes(folder) and own_file(folder, CARD):  # what it said of itself
            files = {PICTURE: folder / PICTURE} if own_file(folder, PICTURE) else {}
            return (folder / CARD).read_text(encoding="utf-8"), files
        if TRAVELS:
            return plain_card(self, name), {}
        hub_card = importlib.import_module(f"{PACKAGE}.hub.card")
        known = inspect.signature(hub_card.write_card).parameters
        for stranger in set(about) - set(known):
            near = difflib.get_close_matches(stranger, known, n=1)
            raise TypeError(f"{stranger}: nothing that a card says" + (f"; did you mean {near[0]}?" if near else ""))
        return hub_card.write_card(self, name, scratch, **about)


# --- folders --------------------------------------------------------------------------------------


def write_folder(
    pipeline: SelfContainedPipeline,
    folder: Path,
    card: str | None,
    files: Mapping[str, Path],
    options: Mapping[str, Any],
) -> None:
    """Write the self-contained folder beside its place, then move it there; what a killed call left is tidied up.

    One process at a time writes a folder.
    """
    pipeline.check_labels()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    _put_back(old, folder)
    try:
        DiffusionPipeline.save_pretrained(pipeline, partial, safe_serialization=True, **options)
        add_code(pipeline, partial)
        if card is not None:
            (partial / CARD).write_text(card, encoding="utf-8")
        for name, source in files.items():
            shutil.copyfile(source, partial / name)
        allowed = (partial / "model_index.json").stat().st_mode  # by the umask; safetensors lets only the owner read
        for path in partial.rglob("*"):
            path.chmod(path.stat().st_mode | (allowed if path.is_file() else 0))
        if folder.is_dir() and not folder.is_symlink():
            os.replace(folder, old)
        else:  # of a link the link alone goes, what it leads to stays
            folder.unlink(missing_ok=True)
        os.replace(partial, folder)
    finally:
        _put_back(old, folder)
        shutil.rmtree(partial, ignore_errors=True)


def _put_back(old: Path, folder: Path) -> None:
    """What had to make room comes back where a call was stopped before another took its place, else it goes."""
    if old.is_dir() and not os.path.lexists(folder):
        os.replace(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def _name_installed_classes(config: dict[str, Any]) -> None:
    """Put the package's own classes in the place of code beside the weights.

    Raises:
        ValueError: The package has no class of that name.
    """
    if isinstance(config.get("_class_name"), list):
        config["_class_name"] = config["_class_name"][1]
    homes = [importlib.import_module(f"{PACKAGE}.{room}") for room in ("models", "schedulers")]
    for part, value in config.items():
        if isinstance(value, list) and len(value) == 2 and VERSIONED.fullmatch(str(value[0])):
            found = next((getattr(home, value[1]) for home in homes if hasattr(home, value[1])), None)
            if found is None:
                raise ValueError(
                    f"{part}: the package has no class {value[1]!r}; read the code beside the weights, then load with "
                    "diffusers' DiffusionPipeline.from_pretrained(..., trust_remote_code=True)"
                )
            config[part] = [found.__module__, value[1]]


# --- hub ------------------------------------------------------------------------------------------


def open_repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Make the repository, and the branch, where they are missing: fails before weights are saved. Returns its id."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def upload(
    api: HfApi, folder: Path, repo_id: str, commit_message: str | None, revision: str | None, create_pr: bool
) -> CommitInfo:
    """Upload a self-contained folder; code files of earlier uploads go in the same change."""
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message or "Upload the pipeline with its code",
        revision=revision,
        create_pr=create_pr,
        delete_patterns=[STALE_CODE],
    )


def _require_pinned(path: Any, revision: Any) -> None:
    if not re.fullmatch(r"[0-9a-f]{40}", str(revision)):
        raise ValueError(
            f"revision={revision!r}: trust_remote_code=True runs code of {str(path)!r}, and a branch can change at any "
            "time; name the commit whose code you have read, by its full hash of 40 digits"
        )


def _download(cls: type[DiffusionPipeline], path: Any, kwargs: Mapping[str, Any]) -> str:
    """The folder of a hub's repository on this machine: configurations and safetensors, never code or pickles.

    Of the weights of a part only those that will be loaded: the variant's, or plain ones where there are none of it.
    """
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path)):
        raise FileNotFoundError(f"{str(path)!r}: no such folder, and no id of a repository, OWNER/NAME")
    parts = [part for part in cls._get_signature_keys(cls)[0] if part not in kwargs]
    names = ("revision", "cache_dir", "token", "force_download", "local_files_only")
    options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    settings = ["model_index.json", CARD, PICTURE, *(f"{part}/*.json" for part in parts)]
    folder = ""
    try:
        for kind in [f".{kwargs['variant']}", ""] if kwargs.get("variant") else [""]:
            files = [f"{WEIGHTS}{kind}{end}.safetensors" for end in ("", "-*")]  # whole, shards
            weights = [f"{part}/{file}" for part in parts for file in files]
            folder = snapshot_download(str(path), allow_patterns=settings + weights, **options)
            bare = [part for part in parts if not any(any(Path(folder, part).glob(file)) for file in files)]
            if bare == parts:  # nothing of this kind: diffusers says so
                break
            parts = bare  # go on to their plain weights
        return folder
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{str(path)!r}: no such folder, and no repository of that id could be had ({error})"
        ) from error
