# SPDX-License-Identifier: Apache-2.0
"""Runs a recipe: model, examples and settings go to `train`."""

from functools import partial

from accelerate import PartialState  # type: ignore[import-untyped]
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, set_seed

from rcc_hf.checkpoints import ensure_reconstruction_prompt, load_model, load_tokenizer
from rcc_hf.modeling.modeling_rcc import RCCForCausalLM
from rcc_hf.objectives import Mixture, Objective, Phase, Phases, collate
from rcc_hf.recipes.building import build_objectives
from rcc_hf.recipes.recipe import Recipe
from rcc_hf.recipes.sources import read_sources
from rcc_hf.training import QualitySettings, TrainSettings, quality_callbacks, train

__all__ = ["run_recipe"]


def run_recipe(
    recipe: Recipe,
    settings: TrainSettings,
    *,
    base: str | None = None,
    dtype: str = "auto",
    held_out_examples: int = 64,
    quality: QualitySettings | None = None,
) -> dict[str, float]:
    """Train what a recipe says, and save it in `settings.output`.

    Several processes (`torchrun`, `accelerate launch`) share each step: its batch is theirs together.

    Args:
        recipe: What is trained on what; its own settings are not looked at.
        settings: How.
        base: Where an adapter-only checkpoint finds its base, if that has moved.
        dtype: Of the base: auto, float32, bfloat16 or float16.
        held_out_examples: How many of the held-out texts, if there are any; those of the last phase.
        quality: What is measured on the way by generating freely.

    Returns:
        The metrics of `train`.

    Raises:
        ValueError: the recipe asks for what there is not, or settings do not fit it.
    """
    set_seed(settings.seed)
    model = load_model(recipe.model, base=base, dtype=dtype, **recipe.compressor)
    tokenizer = load_tokenizer(model, recipe.model, base)
    mixture = _mixture(recipe, settings, model, tokenizer)
    held_out = _held_out(recipe, settings, model, tokenizer, held_out_examples) if recipe.held_out else None
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    prompt_ids = ensure_reconstruction_prompt(model, tokenizer)
    callbacks = quality_callbacks(model, tokenizer, quality or QualitySettings(), prompt_ids)
    return train(model, settings, mixture, held_out, tokenizer, callbacks, collate=partial(collate, pad_id=pad_id))


def _mixture(
    recipe: Recipe, settings: TrainSettings, model: RCCForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    sources = read_sources(tokenizer, texts=recipe.texts, questions=recipe.questions, chats=recipe.chats)
    objectives = build_objectives(recipe.drawn(), sources, tokenizer, ensure_reconstruction_prompt(model, tokenizer))
    group = settings.batch_size * PartialState().num_processes
    return Mixture(
        objectives,
        recipe.phases,
        seed=settings.seed,
        num_steps=settings.max_steps,
        examples_per_step=group * settings.accumulation_steps,
        group_size=group,
        segment_length=model.config.segment_length,
    )


def _held_out(
    recipe: Recipe, settings: TrainSettings, model: RCCForCausalLM, tokenizer: PreTrainedTokenizerBase, count: int
) -> Dataset:
    """Reconstruction of held-out texts at the ratios and lengths of the last phase."""
    sources = read_sources(tokenizer, texts=recipe.held_out)
    prompt_ids = ensure_reconstruction_prompt(model, tokenizer)
    objectives: dict[str, Objective] = build_objectives({"reconstruction": {}}, sources, tokenizer, prompt_ids)
    last = recipe.phases[-1]
    phase = Phase(ratios=last.ratios, segments=last.segments, objectives={"reconstruction": 1.0})
    group = settings.batch_size * PartialState().num_processes
    return Mixture(
        objectives,
        Phases([phase]),
        seed=settings.seed + 1,
        num_steps=max(1, count // group),
        examples_per_step=group,
        group_size=group,
        segment_length=model.config.segment_length,
    )
