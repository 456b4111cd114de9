# SPDX-License-Identifier: Apache-2.0
"""Runs a recipe: model, examples and settings go to `train`."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from torch.utils.data import ConcatDataset, Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from rcc_hf.checkpoints import ensure_reconstruction_prompt, load_model, load_tokenizer
from rcc_hf.modeling.modeling_rcc import RCCForCausalLM
from rcc_hf.objectives import Mixture, Objective, Phase, Phases, Shape, collate
from rcc_hf.recipes.building import build_objectives
from rcc_hf.recipes.recipe import Recipe
from rcc_hf.recipes.sources import read_sources
from rcc_hf.training import QualitySettings, TrainSettings, quality_callbacks, train

__all__ = ["mixture_of", "run_recipe"]

LENGTHS = 32
"""With CUDA graphs, lengths are multiples of it (four times of it up to sixteen): each is a graph of its own."""

MIXTURE = "mixture.json"
"""File in the output folder that says by what examples and steps belong together."""


def run_recipe(
    recipe: Recipe,
    settings: TrainSettings,
    *,
    base: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    held_out_examples: int = 64,
    held_out_ratios: Sequence[int] | None = None,
    quality: QualitySettings | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, float]:
    """Train what a recipe says, and save it in `settings.output`.

    Several processes (`torchrun`, `accelerate launch`) share each step, each with batches of its own.

    Args:
        recipe: What is trained on what; its own settings are not looked at.
        settings: How.
        base: Where an adapter-only checkpoint finds its base, if that has moved.
        dtype: Of the base: auto, float32, bfloat16 or float16.
        attn_implementation: Name of an attention, "auto" for the best (see `rcc_hf.attention`); None: the library's.
        held_out_examples: About how many of the held-out texts, if there are any, over all ratios and lengths of the
            last phase.
        held_out_ratios: Ratios at which these are measured, if not those of the last phase.
        quality: What is measured on the way by generating freely.
        callbacks: Further callbacks of the Trainer, in front of those that measure.

    Returns:
        The metrics of `train`.

    Raises:
        ImportError: the attention does not work here.
        ValueError: the recipe asks for what there is not, or settings do not fit it.
    """
    set_seed(settings.seed)
    model = load_model(recipe.model, base, dtype, attn_implementation, **recipe.compressor)
    tokenizer = load_tokenizer(model, recipe.model, base)
    mixture = _mixture(recipe, settings, model, tokenizer)
    _record(Path(settings.output), settings)
    held_out = None
    if recipe.held_out:
        shapes = _held_out_shapes(recipe.phases, held_out_ratios)
        held_out = _held_out(recipe, settings, model, tokenizer, shapes, held_out_examples)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    prompt_ids = ensure_reconstruction_prompt(model, tokenizer)
    measuring = quality_callbacks(model, tokenizer, quality or QualitySettings(), prompt_ids)
    pad = partial(collate, pad_id=pad_id, multiple=LENGTHS if settings.cuda_graphs else 1, most=_most_local(model))
    return train(model, settings, mixture, held_out, tokenizer, [*callbacks, *measuring], collate=pad)


def _mixture(
    recipe: Recipe, settings: TrainSettings, model: RCCForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    sources = read_sources(tokenizer, texts=recipe.texts, questions=recipe.questions, chats=recipe.chats)
    objectives = build_objectives(recipe.drawn(), sources, tokenizer, ensure_reconstruction_prompt(model, tokenizer))
    mixture = mixture_of(recipe, settings, objectives, model.config.segment_length, _num_processes())
    _check_shapes(objectives, recipe.phases, model.config.segment_length)
    return mixture


def mixture_of(
    recipe: Recipe,
    settings: TrainSettings,
    objectives: Mapping[str, Objective],
    segment_length: int,
    num_processes: int,
) -> Mixture:
    """The examples of a recipe's training, of objectives by name, as so many processes share them."""
    return Mixture(
        objectives,
        recipe.phases,
        seed=settings.seed,
        num_steps=settings.max_steps,
        examples_per_step=settings.batch_size * settings.accumulation_steps * num_processes,
        group_size=settings.batch_size,
        segment_length=segment_length,
    )


def _most_local(model: RCCForCausalLM) -> int | None:
    """The length up to which local tokens may be padded: beyond, padding could need more positions than there are."""
    config = model.config
    if config.max_positions is None or config.slot_positions is None:
        return None
    return int(config.max_positions - config.slot_positions)


def _held_out_shapes(phases: Phases, ratios: Sequence[int] | None) -> list[tuple[int, int]]:
    """Ratios and numbers of segments at which held-out texts are measured."""
    last = phases[-1]
    return [
        (ratio, number)
        for ratio in sorted(ratios or last.ratios_for("reconstruction"))
        for number in sorted(last.segments_for("reconstruction"))
    ]


def _held_out(
    recipe: Recipe, settings: TrainSettings, model: RCCForCausalLM, tokenizer: PreTrainedTokenizerBase,
    shapes: Sequence[tuple[int, int]], count: int,
) -> Dataset:  # fmt: skip
    """Reconstruction of held-out texts, about as many of each shape."""
    sources = read_sources(tokenizer, texts=recipe.held_out)
    prompt_ids = ensure_reconstruction_prompt(model, tokenizer)
    (objective,) = build_objectives({"reconstruction": {}}, sources, tokenizer, prompt_ids).values()
    group = settings.batch_size
    steps = max(1, round(count / len(shapes) / group / _num_processes())) * _num_processes()
    parts = []
    for ratio, number in shapes:
        name = f"reconstruction_r{ratio}_s{number}"
        phases = Phases([Phase(ratios={ratio: 1.0}, segments={number: 1.0}, objectives={name: 1.0})])
        parts.append(
            Mixture(
                {name: objective},
                phases,
                seed=settings.seed + 1,
                num_steps=steps,
                examples_per_step=group,
                group_size=group,
                segment_length=model.config.segment_length,
            )
        )
    return ConcatDataset(parts)


def _check_shapes(objectives: Mapping[str, Objective], phases: Phases, segment_length: int) -> None:
    """Make one example of every objective at every length that a phase draws: hours later would be late to refuse it.

    Raises:
        ValueError: there is none of that length.
    """
    for number, phase in enumerate(phases, 1):
        for name in phase.objectives:
            for segments in phase.segments_for(name):
                shape = Shape(num_segments=segments, segment_length=segment_length, ratio=min(phase.ratios_for(name)))
                try:
                    objectives[name].example(np.random.default_rng([0, segments]), shape)
                except ValueError as error:
                    raise ValueError(f"phase {number}, objective {name}, {segments} segments: {error}") from error


def _record(folder: Path, settings: TrainSettings) -> None:
    """Write down by what step and example belong together; a run that goes on must have the same.

    Raises:
        ValueError: it has not.
    """
    here = {
        "seed": settings.seed,
        "max_steps": settings.max_steps,
        "examples_per_step": _examples_per_step(settings),
        "batch_size": settings.batch_size,
    }
    file = folder / MIXTURE
    if settings.resume and file.exists():
        there = json.loads(file.read_text(encoding="utf-8"))
        differing = [
            f"{name}={there.get(name)} there, {value} here" for name, value in here.items() if there.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"the run in {folder} would go on with other examples: {'; '.join(differing)}. Give the same "
                "(the batch size, and accumulation_steps x processes), or start anew in another folder"
            )
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(here) + "\n", encoding="utf-8")


def _examples_per_step(settings: TrainSettings) -> int:
    return settings.batch_size * settings.accumulation_steps * _num_processes()


def _num_processes() -> int:
    # as the Trainer counts them: left to itself, accelerate takes several processes without a GPU for single ones
    return int(PartialState(cpu=not torch.accelerator.is_available()).num_processes)
