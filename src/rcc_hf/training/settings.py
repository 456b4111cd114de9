# SPDX-License-Identifier: Apache-2.0
"""How a compressor is trained: settings, of which the help of `rcc train` and the Trainer's arguments are made."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from rcc_hf.training.engines import ENGINES
from rcc_hf.training.parts import PARTS, TRAINED_BY_DEFAULT

__all__ = ["SCHEDULES", "TrainSettings", "training_arguments"]

logger = logging.getLogger(__name__)

SCHEDULES = ("linear", "cosine", "constant_with_warmup")


@dataclass(kw_only=True)
class TrainSettings:
    """How a compressor is trained; the help of `rcc train` is made from it."""

    output: str = field(metadata={"help": "Folder for checkpoints, logs and the trained compressor."})
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=8, metadata={"help": "Contexts per device and step."})
    accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimizer step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW (0.9, 0.95)."})
    write_learning_rate: float | None = field(
        default=None, metadata={"help": "That of the write adapters, if another one."}
    )
    read_learning_rate: float | None = field(
        default=None, metadata={"help": "That of the read adapters, if another one."}
    )
    maps_learning_rate: float | None = field(default=None, metadata={"help": "That of the slot maps, if another one."})
    base_learning_rate: float | None = field(default=None, metadata={"help": "That of the base, if it is trained."})
    train_parts: list[str] = field(
        default_factory=lambda: list(TRAINED_BY_DEFAULT),
        metadata={"help": f"What is trained, of {', '.join(PARTS)}; the rest is frozen."},
    )
    warmup_steps: int = field(default=50, metadata={"help": "Steps of linear warm-up; the schedule follows."})
    schedule: str = field(default="linear", metadata={"help": f"Decay of the rates, of {', '.join(SCHEDULES)}."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient norm at which gradients are clipped."})
    distillation_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of KL(base that sees the text itself || model), added to the cross-entropy where "
                  "examples have a teacher's text; 0: none."},
    )  # fmt: skip
    distillation_temperature: float = field(default=1.0, metadata={"help": "Temperature of both in that."})
    loss_chunk: int = field(
        default=8192, metadata={"help": "Predicted tokens whose logits exist at a time; less needs less memory."}
    )
    bf16: bool = field(
        default=False, metadata={"help": "Autocast to bfloat16; for a base in float32 (one in bfloat16 needs none)."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute layers in backward."})
    compile_blocks: bool = field(
        default=False, metadata={"help": "Compile every decoder layer with torch.compile while training."}
    )
    compile_static: bool = field(
        default=False,
        metadata={
            "help": "Compile for every length anew, in kernels that are a little faster; for few ratios and lengths."
        },
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "Record forward and backward for every shape of batch and replay them at once: for a GPU that "
            "waits for Python, as with small models."
        },
    )
    gradient_engine: str | None = field(
        default=None,
        metadata={"help": f"How gradients of long texts reach what was written, of {', '.join(ENGINES)}; see "
                  "rcc_hf.training.engines."},
    )  # fmt: skip
    engine_segments: int = field(
        default=2,
        metadata={"help": "Segments whose graphs truncated and reservoir keep, or that two-pass writes at a time."},
    )
    ceiling_tflops: float | None = field(
        default=None,
        metadata={"help": "10^12 operations a second that a device does at most, of which a share is logged; none: "
                  "measured on CUDA."},
    )  # fmt: skip
    num_workers: int = field(default=0, metadata={"help": "Processes that prepare examples, per device."})
    seed: int = field(default=0, metadata={"help": "Seed of data order and adapters."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between log lines."})
    eval_steps: int | None = field(default=None, metadata={"help": "Steps between evaluations; none: at the end."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints; the last two are kept."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in the output folder."})
    report_to: str = field(default="none", metadata={"help": "Where metrics go too: none, tensorboard, wandb, ..."})

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "accumulation_steps", "loss_chunk", "logging_steps", "save_steps",
                     "engine_segments"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("distillation_weight", "num_workers", "warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.distillation_temperature <= 0:
            raise ValueError(f"distillation_temperature={self.distillation_temperature} must be above 0")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is not known; choose one of {', '.join(SCHEDULES)}")
        unknown = sorted(set(self.train_parts) - set(PARTS))
        if unknown or not self.train_parts:
            raise ValueError(f"train_parts={self.train_parts} must name one or more of {', '.join(PARTS)}")
        self._check_rates()
        if "base" in self.train_parts and self.distillation_weight:
            raise ValueError(
                f"distillation_weight={self.distillation_weight} takes the frozen base for a teacher, and "
                f"train_parts={self.train_parts} trains it; leave one of them out"
            )
        if self.gradient_engine is not None and self.gradient_engine not in ENGINES:
            raise ValueError(f"gradient_engine={self.gradient_engine!r} is not known; choose of {', '.join(ENGINES)}")
        if self.compile_static and not self.compile_blocks:
            raise ValueError("compile_static has no effect without compile_blocks; give both, or neither")

        if self.cuda_graphs and self.gradient_checkpointing:
            raise ValueError(
                "cuda_graphs and gradient_checkpointing exclude each other: replaying layers saves random states, "
                "which waits for the device; leave one of them out"
            )

    def _check_rates(self) -> None:
        for part in PARTS:
            rate = getattr(self, f"{part}_learning_rate")
            if rate is not None and part not in self.train_parts:
                raise ValueError(
                    f"{part}_learning_rate={rate} has no effect, since train_parts={self.train_parts} leaves {part} "
                    "frozen; leave it out, or train that part"
                )
            if rate is not None and rate < 0:
                raise ValueError(f"{part}_learning_rate={rate} must not be negative")

    def rate_of(self, part: str) -> float:
        """The peak learning rate of a part."""
        rate = getattr(self, f"{part}_learning_rate")
        return self.learning_rate if rate is None else float(rate)


def training_arguments(settings: TrainSettings, *, has_eval: bool) -> TrainingArguments:
    """The settings in the Trainer's words."""
    on_cuda = torch.cuda.is_available()
    # the newest transformers warns of this name, the oldest knows no other: so it is given only where it is needed
    checkpointing: dict[str, Any] = {"gradient_checkpointing": True} if settings.gradient_checkpointing else {}
    arguments = TrainingArguments(
        output_dir=settings.output,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation_steps,
        learning_rate=settings.learning_rate,
        warmup_steps=min(settings.warmup_steps, settings.max_steps - 1),
        lr_scheduler_type=settings.schedule,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        adam_beta2=0.95,
        optim="adamw_torch_fused" if on_cuda else "adamw_torch",
        bf16=settings.bf16,
        seed=settings.seed,
        logging_steps=settings.logging_steps,
        # it would wait for the device in every step, to hide losses that are no numbers
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_eval and settings.eval_steps else "no",
        eval_steps=settings.eval_steps,
        prediction_loss_only=True,
        save_steps=settings.save_steps,
        save_total_limit=2,
        report_to=settings.report_to,
        disable_tqdm=False,
        dataloader_num_workers=settings.num_workers,
        dataloader_pin_memory=on_cuda,
        # batches are copied while the device still computes the step before
        accelerator_config={"non_blocking": on_cuda},
        remove_unused_columns=False,
        # left to itself, accelerate takes several processes without a GPU for single ones
        use_cpu=not torch.accelerator.is_available(),
        **checkpointing,
    )
    if arguments.n_gpu > 1:
        logger.warning(
            "training uses one of %d GPUs; start it with torchrun --nproc_per_node to use them all", arguments.n_gpu
        )
        arguments._n_gpu = 1  # or the Trainer would put the model in nn.DataParallel, whose copies have no hooks
    return arguments
