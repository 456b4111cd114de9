# SPDX-License-Identifier: Apache-2.0
"""Training a compressor: the Trainer of transformers on a frozen base."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer, TrainingArguments, default_data_collator
from transformers.trainer_utils import get_last_checkpoint

from rcc_hf.modeling.checking_rcc import slot_dtype
from rcc_hf.modeling.fingerprint_rcc import is_trained_part
from rcc_hf.modeling.modeling_rcc import RCCForCausalLM
from rcc_hf.objectives import token_accuracy


@dataclass(kw_only=True)
class TrainSettings:
    """How a compressor is trained; the help of `rcc train` is made from it."""

    output: str = field(metadata={"help": "Folder for checkpoints, logs and the trained compressor."})
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=8, metadata={"help": "Contexts per device and step."})
    accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimizer step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW (0.9, 0.95)."})
    warmup_steps: int = field(default=50, metadata={"help": "Steps of linear warm-up; linear decay follows."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient norm at which gradients are clipped."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute layers in backward."})
    seed: int = field(default=0, metadata={"help": "Seed of data order and adapters."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between log lines."})
    eval_steps: int | None = field(default=None, metadata={"help": "Steps between evaluations; none: at the end."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints; the last two are kept."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in the output folder."})
    report_to: str = field(default="none", metadata={"help": "Where metrics go too: none, tensorboard, wandb, ..."})

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class RCCTrainer(Trainer):
    """A Trainer whose checkpoints hold the compressor alone: the base is frozen and lies elsewhere.

    The base may be quantised, by a method that transformers can train adapters on.
    """

    def __init__(self, model: RCCForCausalLM, *args: Any, **kwargs: Any):
        with _compressor_counts_as_adapters(model):
            super().__init__(model, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, adapter_only=True, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.accelerator.unwrap_model(model or self.model).load_compressor(resume_from_checkpoint)


@contextmanager
def _compressor_counts_as_adapters(model: Any) -> Iterator[None]:
    """In the block a quantised base with a compressor is no purely quantised model, which the Trainer would refuse."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or not quantizer.is_trainable:
        yield
        return
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True


def train(
    model: RCCForCausalLM,
    settings: TrainSettings,
    train_dataset: Dataset,
    eval_dataset: Dataset | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: list | None = None,
) -> dict[str, float]:
    """Train the compressor of `model` in place and save it, adapter-only, in `settings.output`.

    The base is frozen. The compressor is trained in float32 whatever the model's dtype, and has that dtype afterwards.

    Args:
        model: from `from_base`, or a checkpoint to go on with.
        settings: see there.
        train_dataset: examples as `rcc_hf.objectives` makes them, all of one length.
        eval_dataset: held-out examples; their loss and token accuracy are measured at the end, and every `eval_steps`.
        tokenizer: saved along.
        callbacks: further callbacks of the Trainer.

    Returns:
        The last metrics: `train_loss`, `train_runtime` in seconds, and with `eval_dataset` `eval_loss` and
        `eval_token_accuracy`.

    Raises:
        ValueError: if `settings.resume` finds no checkpoint.
    """
    checkpoint = _last_checkpoint(settings) if settings.resume else None
    model.freeze_base()
    _set_compressor_dtype(model, torch.float32)
    trainer = RCCTrainer(
        model=model,
        args=_arguments(settings, has_eval=eval_dataset is not None),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=callbacks,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=_metrics,
    )
    try:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        if eval_dataset is not None:
            metrics |= trainer.evaluate()
    finally:
        _set_compressor_dtype(model, slot_dtype(model))
        model.eval()
    trainer.save_model()
    trainer.save_metrics("all", metrics, combined=False)
    return metrics


def _arguments(settings: TrainSettings, has_eval: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=settings.output,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation_steps,
        learning_rate=settings.learning_rate,
        warmup_steps=min(settings.warmup_steps, settings.max_steps - 1),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        adam_beta2=0.95,
        gradient_checkpointing=settings.gradient_checkpointing,
        seed=settings.seed,
        logging_steps=settings.logging_steps,
        eval_strategy="steps" if has_eval and settings.eval_steps else "no",
        eval_steps=settings.eval_steps,
        save_steps=settings.save_steps,
        save_total_limit=2,
        report_to=settings.report_to,
        disable_tqdm=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
    )


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    predictions, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    return {"token_accuracy": token_accuracy(predictions, labels)}


def _set_compressor_dtype(model: RCCForCausalLM, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if is_trained_part(name):
            parameter.data = parameter.data.to(dtype)


def _last_checkpoint(settings: TrainSettings) -> str:
    found = get_last_checkpoint(settings.output) if Path(settings.output).is_dir() else None
    if found is None:
        raise ValueError(f"there is no checkpoint in {settings.output} to go on from; leave out resume to start anew")
    return found
