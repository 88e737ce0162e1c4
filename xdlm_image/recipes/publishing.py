"""Recipe of the verb `export`: which pipeline, where it goes, and what its card cannot know by itself."""

from __future__ import annotations

from dataclasses import dataclass

from xdlm_image.recipes.checks import require
from xdlm_image.seeds import check_seed


@dataclass
class ExportRecipe:
    """Write a pipeline as a folder that loads without this package, with a model card; push it if asked.

    Attributes:
        pipeline: Folder of the saved pipeline, or of the training run that holds it.
        output: Folder to write; an earlier export there is replaced.
        evaluation: `fid.json` of an evaluation of this pipeline, for the card; None leaves quality unknown.
        row: Name of the pipeline in the evaluation; None finds it by the hash of its weights, or by its folder.
        tokenizer: Folder of the tokenizer, for its report and origin; None takes the one the run's recipe names.
        licence: Licence of the weights, as the hub calls it (`apache-2.0`); None leaves it unstated.
        dataset: Id of the training data on the hub; None is known for Fashion-MNIST only.
        picture: Image file for the card; None draws a class grid in 8 steps, `none` leaves it out.
        seed: Of the picture that is drawn.
        card: A model card of your own, a Markdown file, instead of the one that is written.
        overwrite: Also replace a folder that holds anything but an earlier export.
        push_to: Repository on the hub, OWNER/NAME, made if it is not there; None writes the folder only. Log in first
            with `hf auth login`, or set HF_TOKEN.
        private: Whether a new repository is private; None is the owner's default.
        revision: Branch to push to; None is the main one.
        commit_message: Of the push.
        create_pr: Open a pull request instead of changing the branch.
        device: torch device for the picture; None picks the best there is.
    """

    pipeline: str
    output: str
    evaluation: str | None = None
    row: str | None = None
    tokenizer: str | None = None
    licence: str | None = None
    dataset: str | None = None
    picture: str | None = None
    seed: int = 0
    card: str | None = None
    overwrite: bool = False
    push_to: str | None = None
    private: bool | None = None
    revision: str | None = None
    commit_message: str | None = None
    create_pr: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.push_to is None:
            for name in ("private", "revision", "commit_message"):
                value = getattr(self, name)
                require(value is None, name, value, "it is for push_to, which is not given")
            require(not self.create_pr, "create_pr", self.create_pr, "it is for push_to, which is not given")
        if self.card is not None:
            for name in ABOUT:
                value, default = getattr(self, name), getattr(type(self), name)
                require(value == default, name, value, "card is given, so it would not be read; give one or the other")


ABOUT = ("evaluation", "row", "tokenizer", "licence", "dataset", "picture", "seed")  # what goes into the card
