# SPDX-License-Identifier: Apache-2.0
"""Objectives of a recipe, made from their names and options."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.fillers import FILLERS
from rcc_hf.objectives import (
    Cloze,
    Continuation,
    Conversations,
    FillerText,
    Haystack,
    Instructions,
    LongText,
    Needles,
    Objective,
    PassageReconstruction,
    QuestionAnswering,
    Reconstruction,
    ShardText,
)
from rcc_hf.recipes.sources import Sources
from rcc_hf.texts import TokenShards

__all__ = ["OBJECTIVES", "Sources", "build_objectives"]

TEXTS = "texts"
"""The name of the recipe's own documents where other text is chosen from."""


@dataclass(frozen=True)
class Kind:
    """How an objective of one type is made.

    Attributes:
        make: Its class.
        given: Arguments that are not options, made of the sources, the tokenizer and the reconstruction prompt.
    """

    make: Callable[..., Objective]
    given: Callable[["_Parts"], dict[str, Any]]

    def options(self) -> set[str]:
        """Names of the options that a recipe may give."""
        parameters = inspect.signature(self.make).parameters
        return set(parameters) - {"shards", "rows", "tokenizer", "prompt_ids", "end_id", "name", "progress", "template"}


@dataclass(frozen=True)
class _Parts:
    sources: Sources
    tokenizer: PreTrainedTokenizerBase
    prompt_ids: list[int]
    options: dict[str, Any]

    def texts(self) -> TokenShards:
        if self.sources.texts is None:
            raise ValueError("it needs documents, and the recipe has no texts")
        return self.sources.texts

    def haystack(self, name: str) -> Haystack:
        """Text of the recipe's documents, or of a filler of evaluation."""
        if name == TEXTS:
            return ShardText(self.texts())
        if name not in FILLERS:
            raise ValueError(f"there is no text {name!r}; choose of {', '.join([TEXTS, *FILLERS])}")
        return FillerText(FILLERS[name](), self.tokenizer)


def _reconstruction(parts: _Parts) -> dict[str, Any]:
    return {"shards": parts.texts(), "prompt_ids": parts.prompt_ids, "end_id": parts.tokenizer.eos_token_id}


def _rows(parts: _Parts) -> dict[str, Any]:
    if not parts.sources.questions:
        raise ValueError("it needs questions, and the recipe names none")
    haystack = parts.options.pop("haystack", None)
    found = {"rows": parts.sources.questions, "tokenizer": parts.tokenizer, "progress": False}
    return found if haystack is None else {**found, "haystack": parts.haystack(haystack)}


def _chats(parts: _Parts) -> dict[str, Any]:
    if not parts.sources.chats:
        raise ValueError("it needs conversations, and the recipe names no chats")
    return {"rows": parts.sources.chats, "tokenizer": parts.tokenizer, "progress": False}


def _needles(parts: _Parts) -> dict[str, Any]:
    names = parts.options.pop("haystacks", [TEXTS])
    return {"haystacks": [parts.haystack(name) for name in names], "tokenizer": parts.tokenizer}


OBJECTIVES: dict[str, Kind] = {
    "reconstruction": Kind(Reconstruction, _reconstruction),
    "passage": Kind(PassageReconstruction, lambda parts: {"shards": parts.texts()}),
    "continuation": Kind(Continuation, lambda parts: {"shards": parts.texts()}),
    "cloze": Kind(Cloze, lambda parts: {"shards": parts.texts(), "tokenizer": parts.tokenizer}),
    "questions": Kind(QuestionAnswering, _rows),
    "needles": Kind(Needles, _needles),
    "instructions": Kind(Instructions, _rows),
    "conversations": Kind(Conversations, _chats),
    "long_text": Kind(LongText, lambda parts: {"shards": parts.texts()}),
}
"""Types of objectives that a recipe may name."""


def build_objectives(
    wanted: Mapping[str, Mapping[str, Any]],
    sources: Sources,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
) -> dict[str, Objective]:
    """The objectives of a recipe by name.

    Args:
        wanted: Options by name; the type is the name unless an option `type` says otherwise.
        sources: What examples are made of.
        tokenizer: Of the model.
        prompt_ids: Ask for reconstruction (`RCCConfig.reconstruction_prompt_ids`).

    Raises:
        ValueError: a type or an option is unknown, an option is out of range, or sources are missing.
    """
    made = {}
    for name, given in wanted.items():
        options = dict(given)
        kind_name = options.pop("type", name)
        if kind_name not in OBJECTIVES:
            raise ValueError(f"objective {name}: there is no type {kind_name!r}; choose of {', '.join(OBJECTIVES)}")
        kind = OBJECTIVES[kind_name]
        unknown = sorted(set(options) - kind.options())
        if unknown:
            allowed = ", ".join(sorted(kind.options()))
            raise ValueError(f"objective {name}: {kind_name} has no option {', '.join(unknown)}; it has {allowed}")
        try:
            fixed = kind.given(_Parts(sources, tokenizer, prompt_ids, options))
            made[name] = kind.make(**fixed, **options, name=name)
        except (TypeError, ValueError) as error:
            raise ValueError(f"objective {name}: {error}") from error
    return made
