# SPDX-License-Identifier: Apache-2.0
"""The Trainer of transformers for a compressor: its loss, its optimizer, and checkpoints without the frozen base."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from rcc_hf.modeling.families_rcc import scale_logits
from rcc_hf.modeling.modeling_rcc import RCCForCausalLM
from rcc_hf.training.engines import ENGINES, choose_engine
from rcc_hf.training.graphs import (
    CudaRecorder,
    FlatGradients,
    StepGraphs,
    can_record,
    causal_attention,
)
from rcc_hf.training.losses import HeadLoss, Teacher, entropy_of, predicting_places
from rcc_hf.training.meters import Meter
from rcc_hf.training.parts import parameter_groups, part_of
from rcc_hf.training.sequences import LongSequences
from rcc_hf.training.settings import TrainSettings
from rcc_hf.training.throughput import Throughput

__all__ = ["RCCTrainer"]


class RCCTrainer(Trainer):
    """A Trainer for batches of `context_ids`, `input_ids` and `labels`, with `teacher_ids` and `teacher_labels` if the
    base itself is to be imitated.

    Checkpoints hold the compressor alone, unless the base is trained too. The base may be quantised, by a method that
    transformers can train adapters on.
    """

    model_accepts_loss_kwargs: bool

    def __init__(self, model: RCCForCausalLM, *args: Any, settings: TrainSettings, **kwargs: Any):
        self.settings = settings
        self._meters = {True: Meter(), False: Meter()}  # of training and of evaluation
        self._entropy = torch.compile(entropy_of, dynamic=True) if settings.compile_blocks else entropy_of
        self._graphs: StepGraphs | None = None
        self._gradients: FlatGradients | None = None  # if this class adds them up and averages them itself
        with _compressor_counts_as_adapters(model):
            super().__init__(model, *args, **kwargs)
        if settings.cuda_graphs or settings.gradient_engine:
            trained = [p for p in model.parameters() if p.requires_grad]
            self._gradients = FlatGradients(trained)
            if settings.cuda_graphs:
                self._graphs = StepGraphs(self._graphed_loss, self._gradients, CudaRecorder(trained))
        self.throughput = Throughput(self.core(), ceiling=settings.ceiling_tflops and settings.ceiling_tflops * 1e12)

    def core(self) -> RCCForCausalLM:
        """The model below what distributed training puts around it."""
        return self.accelerator.unwrap_model(self.model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy per labelled token, and the divergence from the plain base if that is asked for.

        `num_items_in_batch` are the labelled tokens of all batches and processes of the optimizer step. The gradients
        of processes are averaged, so the loss, a share of the sum over all of them, is multiplied by their number.
        """
        inputs, objective = self._count(inputs)
        loss, sums, outputs = self._loss(model, inputs, num_items_in_batch)
        self._meters[self.core().training].add(objective, sums)
        return (loss, outputs) if return_outputs else loss

    def _count(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Count a batch of training; returns what the loss needs of it, and its objective."""
        if self.core().training:
            self.throughput.count(inputs)
        return {name: value for name, value in inputs.items() if name != "objective"}, inputs.get("objective", "")

    def _loss(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Any]:
        """The loss of a batch, the sums of `HeadLoss`, and the model's outputs."""
        inputs = dict(inputs)
        teacher = self._teacher({name: inputs.pop(name) for name in list(inputs) if name.startswith("teacher_")})
        places = inputs.pop("label_places", None)
        loss_of = self._head_loss(inputs["labels"], num_items_in_batch, places=places, teacher=teacher)
        outputs = model(**inputs, hidden_loss=loss_of)
        loss = outputs["loss"]
        assert loss_of.sums is not None
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return loss, loss_of.sums, outputs

    def _teacher(self, batch: dict[str, Tensor]) -> Teacher | None:
        """The plain base's hidden states behind the text itself: no pass, no memory, no gradient."""
        if not self.settings.distillation_weight or "teacher_ids" not in batch:
            return None
        places = batch["teacher_places"] if "teacher_places" in batch else predicting_places(batch["teacher_labels"])
        with torch.no_grad(), self.accelerator.autocast():
            outputs = self.core().model(
                input_ids=batch["teacher_ids"],
                attention_mask=batch.get("teacher_mask"),
                use_cache=False,
                compress=False,
            )
        return Teacher(
            hidden=outputs.last_hidden_state.flatten(0, 1)[places],
            weight=self.settings.distillation_weight,
            temperature=self.settings.distillation_temperature,
        )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As the Trainer, or with CUDA graphs or a gradient engine; the first one starts the clock."""
        self.throughput.begin()
        if "sequence_ids" in inputs and self.settings.gradient_engine is None:
            raise ValueError(
                "long texts (sequence_ids) need a way for their gradients; give gradient_engine, of "
                f"{', '.join(ENGINES)}"
            )
        if self._gradients is not None:
            return self._own_step(self._gradients, inputs, num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)

    def _own_step(
        self, gradients: FlatGradients, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """A step around what distributed training puts around the model, whose gradients are averaged here."""
        if num_items_in_batch is None:
            raise ValueError("a step needs num_items_in_batch here, as Trainer.train gives it")
        core = self.core()
        core.train()
        batch, objective = self._count(self._prepare_inputs(inputs))
        num_items = torch.as_tensor(num_items_in_batch, device=core.device)
        gradients.attach()
        if "sequence_ids" in batch:
            loss, sums = self._sequence_loss(batch, num_items)
        elif self._graphs is not None:
            records = can_record(core, batch)
            with causal_attention(core) if records else nullcontext():
                loss, sums = self._graphs.run(batch, num_items, record=records)
        else:
            with self.accelerator.autocast():
                loss, sums, _ = self._loss(core, batch, num_items)
            self._backward(loss)
        self._meters[True].add(objective, sums)
        if self.accelerator.sync_gradients:
            gradients.average(self.accelerator.num_processes)
        return loss.detach()

    def _sequence_loss(self, batch: Mapping[str, Any], num_items: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and sums of long texts, whose gradients an engine takes."""
        core, settings = self.core(), self.settings
        share = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        problem = LongSequences(
            core,
            batch["sequence_ids"],
            batch["labels"],
            ratio=batch.get("ratio"),
            loss_of=partial(self._head_loss, num_items=num_items),
            propagate=lambda loss: self._backward(loss * share),
            at_a_time=settings.engine_segments,
        )
        assert settings.gradient_engine is not None
        # others are held in every step, and the same on a run that goes on
        seed = settings.seed * 1_000_003 + self.state.global_step
        engine = choose_engine(settings.gradient_engine, size=settings.engine_segments, seed=seed)
        with self.accelerator.autocast():
            return engine(problem) * share, problem.sums

    def _head_loss(self, labels: Tensor, num_items: Tensor | int | None, **options: Any) -> HeadLoss:
        """The loss of labels `[B, T]` as a function of hidden states."""
        core = self.core()
        return HeadLoss(
            partial(_logits, core),
            list(core.lm_head.parameters()),
            labels,
            num_items=num_items,
            chunk=self.settings.loss_chunk,
            entropy=self._entropy if core.training else entropy_of,
            **options,
        )

    def _backward(self, loss: Tensor) -> None:
        """Backward from a loss, scaled where mixed precision in float16 asks for it."""
        scaler = self.accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def _graphed_loss(self, batch: Mapping[str, Any], num_items: Tensor) -> tuple[Tensor, Tensor]:
        loss, sums, _ = self._loss(self.core(), batch, num_items)
        return loss, sums

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of a batch, for `total_flos`; the library's own estimate knows of no compressor, and takes its time."""
        return int(self.throughput.operations(inputs))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate for each part."""
        if self.optimizer is None:
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.core())
            self.optimizer = optimizer(parameter_groups(model or self.core(), self.settings), **options)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer, with losses and accuracy by objective, and speed."""
        if "loss" in logs:
            logs = logs | self._meters[True].take() | self.throughput.take()
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the Trainer, but `eval_loss` is the cross-entropy of all labelled tokens, and there is token accuracy."""
        self._meters[False] = Meter()
        with self.throughput.paused():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        found = self._meters[False].take(f"{metric_key_prefix}_")
        if output.metrics is not None and found:
            output.metrics.update(found | {f"{metric_key_prefix}_loss": found[f"{metric_key_prefix}_cross_entropy"]})
        return output

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        # a mixture is random by itself, and its examples belong together in the order that it gives them
        if getattr(dataset, "is_shuffled", False):
            return SequentialSampler(dataset)
        return super()._get_train_sampler(dataset)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.throughput.paused():
            super()._save_checkpoint(*args, **kwargs)

    def _trains_base(self) -> bool:
        return any(p.requires_grad and part_of(name) == "base" for name, p in self.core().named_parameters())

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.core().save_pretrained(folder, adapter_only=not self._trains_base(), state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._trains_base():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.accelerator.unwrap_model(model or self.model).load_compressor(resume_from_checkpoint)


def _logits(model: RCCForCausalLM, hidden: Tensor) -> Tensor:
    return scale_logits(model.lm_head(hidden), model.config.text_config)


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
