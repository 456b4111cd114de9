# SPDX-License-Identifier: Apache-2.0
"""`rcc train RECIPE.yaml`: a training as a file says, with flags that take the place of its values."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers import HfArgumentParser

from rcc_hf.cli.settings import ModelSettings
from rcc_hf.recipes.recipe import Recipe, read_recipe
from rcc_hf.training import QualitySettings, TrainSettings

SUFFIXES = (".yaml", ".yml")


@dataclass(kw_only=True)
class RecipeSettings:
    """What takes the place of a recipe's values."""

    tiny: bool = field(default=False, metadata={"help": "A trial run with the smaller values of its field tiny."})
    model: str | None = field(default=None, metadata={"help": "Checkpoint or base, instead of the recipe's."})
    texts: list[str] | None = field(
        default=None, metadata={"help": "Sources of documents, or one folder of rcc tokenize."}
    )
    held_out: list[str] | None = field(default=None, metadata={"help": "Sources of held-out documents."})
    questions: list[str] | None = field(default=None, metadata={"help": "Files with questions and contexts."})
    chats: list[str] | None = field(default=None, metadata={"help": "Files with conversations."})
    held_out_examples: int = field(default=64, metadata={"help": "How many of the held-out documents are used."})

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with the values that are given."""
        names = ("model", "texts", "held_out", "questions", "chats")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(recipe, **given)


def is_recipe(argv: list[str]) -> bool:
    """Whether a command line begins with a recipe."""
    return bool(argv) and argv[0].endswith(SUFFIXES)


def run(argv: list[str]) -> dict[str, float]:
    """Train as the recipe says; the metrics.

    Raises:
        ValueError: the recipe is none, or asks for what there is not.
    """
    file, *flags = argv
    classes: list[Any] = [RecipeSettings, TrainSettings, QualitySettings, ModelSettings]
    parser = HfArgumentParser(
        classes,
        prog=f"rcc train {file}",
        description="Train as a recipe says. Flags take the place of its values; defaults shown are without a recipe.",
    )
    recipe = read_recipe(file, tiny="--tiny" in flags)
    known = {one.name for kind in (TrainSettings, QualitySettings) for one in fields(kind)}
    unknown = sorted(set(recipe.training) - known)
    if unknown:
        raise ValueError(f"{file}: training has no setting {', '.join(unknown)}; rcc train --help shows them")
    parser.set_defaults(**recipe.training)
    changes, settings, quality, how = parser.parse_args_into_dataclasses(args=flags)
    if how.device != "auto":
        raise ValueError(
            f"device={how.device} has no effect on a recipe, which trains on all devices that it sees; choose with "
            "CUDA_VISIBLE_DEVICES"
        )
    from rcc_hf.recipes.running import run_recipe  # what trains is slow to import, and --help does not need it

    return run_recipe(
        changes.apply(recipe),
        settings,
        base=how.base,
        dtype=how.dtype,
        attn_implementation=how.attn_implementation,
        held_out_examples=changes.held_out_examples,
        quality=quality,
    )
