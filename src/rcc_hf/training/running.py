# SPDX-License-Identifier: Apache-2.0
"""`train`: a model, settings and examples in; a trained compressor in a folder out."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from rcc_hf.modeling.checking_rcc import slot_dtype
from rcc_hf.modeling.modeling_rcc import RCCForCausalLM
from rcc_hf.training.batches import Batches, Collator, collate_equal
from rcc_hf.training.compiling import compiled_blocks
from rcc_hf.training.graphs import check_recordable
from rcc_hf.training.parts import choose_parts, set_dtype
from rcc_hf.training.quality import Quality
from rcc_hf.training.settings import TrainSettings, training_arguments
from rcc_hf.training.trainer import RCCTrainer

__all__ = ["train"]

PLACES = 4096
"""With CUDA graphs, logits are computed for a multiple of so many tokens: every number is a graph of its own."""


def train(
    model: RCCForCausalLM,
    settings: TrainSettings,
    train_dataset: Dataset,
    eval_dataset: Dataset | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: list[TrainerCallback] | None = None,
    *,
    collate: Collator = collate_equal,
) -> dict[str, float]:
    """Train the compressor of `model` in place and save it, adapter-only, in `settings.output`.

    The base is frozen, unless `settings.train_parts` names it; then the checkpoint is a full one. What is trained is
    trained in float32 whatever the model's dtype, and has that dtype afterwards.

    Args:
        model: from `from_base`, or a checkpoint to go on with.
        settings: see there.
        train_dataset: examples as `rcc_hf.objectives` makes them. They are shuffled, unless the data set has a true
            attribute `is_shuffled`: then it is random by itself, and read in its order.
        eval_dataset: held-out examples; their loss and token accuracy are measured at the end, and every `eval_steps`.
            Several processes that share them count a few twice if they do not divide evenly.
        tokenizer: saved along.
        callbacks: further callbacks of the Trainer.
        collate: makes batches of examples; by default all of one length.

    Returns:
        The last metrics: `train_loss`, `train_runtime` in seconds, and with `eval_dataset` `eval_loss`,
        `eval_token_accuracy` and more (see `rcc_hf.training.METRICS`).

    Raises:
        ValueError: if `settings.resume` finds no checkpoint, there is nothing to train, the model has a head, or
            `cuda_graphs` is impossible here.
    """
    if model.config.head_length:
        raise ValueError(
            f"head_length={model.config.head_length} would leave the end of training contexts raw, which are whole "
            "segments; train with head_length 0, and set it afterwards"
        )
    if settings.cuda_graphs:
        check_recordable(model)
    checkpoint = _last_checkpoint(settings) if settings.resume else None
    choose_parts(model, settings.train_parts)
    dtype = slot_dtype(model)
    set_dtype(model, torch.float32)
    trainer = RCCTrainer(
        model=model,
        args=training_arguments(settings, has_eval=eval_dataset is not None),
        settings=settings,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=Batches(
            collate,
            multiple=PLACES if settings.cuda_graphs else 1,
            teacher=bool(settings.distillation_weight),
        ),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    try:
        for callback in callbacks or []:
            if isinstance(callback, Quality):
                callback.trainer = trainer
        with _compiled(model, settings):
            metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        if eval_dataset is not None:
            metrics |= trainer.evaluate()
    finally:
        set_dtype(model, dtype)
        model.eval()
    trainer.save_model()
    trainer.save_metrics("all", metrics, combined=False)
    return metrics


def _compiled(model: RCCForCausalLM, settings: TrainSettings) -> AbstractContextManager[None]:
    if not settings.compile_blocks:
        return nullcontext()
    return compiled_blocks(model, dynamic=False if settings.compile_static else None)


def _last_checkpoint(settings: TrainSettings) -> str:
    found = get_last_checkpoint(settings.output) if Path(settings.output).is_dir() else None
    if found is None:
        raise ValueError(f"there is no checkpoint in {settings.output} to go on from; leave out resume to start anew")
    return found
