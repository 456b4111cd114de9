# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of a step as one CUDA graph for every shape of batch: recorded once, and launched at once.

A step of a small model launches thousands of kernels, and a GPU that waits for Python to launch them is idle for most
of it. Replaying a recording needs one launch. Gradients are added to buffers that stay where they are, and averaged
over processes afterwards, outside of the recording.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rcc_hf.modeling.modeling_rcc import RCCForCausalLM
from rcc_hf.modeling.positions_rcc import slots_reach

__all__ = [
    "CudaRecorder",
    "FlatGradients",
    "Recorder",
    "StepGraphs",
    "can_record",
    "causal_attention",
    "check_recordable",
]

_CAUSAL = "rcc_causal_sdpa"
"""Attention as "sdpa" computes it, for batches without masks: while recording, the library would build one."""

Batch = Mapping[str, Any]
Compute = Callable[[Batch, Tensor], tuple[Tensor, Tensor]]
"""From a batch and its number of items to the loss, a scalar with a graph, and sums to log."""

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function launches on the device, without running it, and returns what runs it."""


class CudaRecorder:
    """Records CUDA graphs, all in one pool of memory, since one runs after the other.

    Args:
        parameters: What gradients are taken of, on their device, before distributed training puts anything around them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        # Where a parameter enters a graph is a node, which belongs to the stream that it was made on and which
        # distributed training keeps alive; made on the default stream, it could not take part in a recording.
        with torch.cuda.stream(self._stream):
            self._nodes = [torch.autograd.graph.get_gradient_edge(parameter).node for parameter in parameters]

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # other threads copy batches and watch over communication meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        replay: Callable[[], None] = graph.replay
        return replay


class FlatGradients:
    """Gradients of parameters as views of one buffer; zero, not None, where a step does not reach a parameter.

    Args:
        parameters: Of one dtype, on one device.

    Raises:
        ValueError: they are not.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
        if len(kinds) != 1:
            raise ValueError(f"cuda_graphs needs trained parameters of one dtype on one device; there are {kinds}")
        self.parameters = list(parameters)
        ((dtype, device),) = kinds
        self._flat = torch.zeros(sum(map(torch.numel, self.parameters)), dtype=dtype, device=device)
        parts = self._flat.split([parameter.numel() for parameter in self.parameters])
        self.views = [part.view_as(parameter) for part, parameter in zip(parts, self.parameters, strict=True)]

    def attach(self) -> None:
        """Make them the parameters' gradients, zero if there were none (a step begins)."""
        if any(parameter.grad is not view for parameter, view in zip(self.parameters, self.views, strict=True)):
            self._flat.zero_()
            for parameter, view in zip(self.parameters, self.views, strict=True):
                parameter.grad = view

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add gradients of the parameters; None for none."""
        pairs = [(view, new) for view, new in zip(self.views, gradients, strict=True) if new is not None]
        torch._foreach_add_([view for view, _ in pairs], [new for _, new in pairs])

    def average(self, num_processes: int) -> None:
        """Average over processes."""
        if num_processes > 1:
            torch.distributed.all_reduce(self._flat)
            self._flat.div_(num_processes)


@dataclass
class _Step:
    """What is known of one shape of batch.

    Attributes:
        seen: How often it came.
        replay: Runs it, once it is recorded.
        inputs: What the recording reads.
        outputs: What it writes: loss and sums.
    """

    seen: int = 0
    replay: Callable[[], None] | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: tuple[Tensor, ...] = ()


class StepGraphs:
    """Runs forward and backward of batches, and records those whose shapes come often.

    Args:
        compute: Loss of a batch; must not wait for the device.
        gradients: Where gradients are added.
        recorder: Records.
        warmups: Batches of a shape that run as usual before it is recorded, so that all is compiled by then.
        limit: Shapes that are recorded at most; others run as usual.
    """

    def __init__(
        self, compute: Compute, gradients: FlatGradients, recorder: Recorder, *, warmups: int = 2, limit: int = 96
    ):
        self._compute, self.gradients, self._recorder = compute, gradients, recorder
        self._warmups, self._limit = warmups, limit
        self._steps: dict[tuple, _Step] = {}

    @property
    def num_recorded(self) -> int:
        """How many shapes have been recorded."""
        return sum(step.replay is not None for step in self._steps.values())

    def run(self, batch: Batch, num_items: Tensor, *, record: bool = True) -> tuple[Tensor, Tensor]:
        """Loss and sums of a batch, whose gradients are added.

        Args:
            batch: Tensors, and values that are the same for batches of a shape.
            num_items: What the loss is divided by.
            record: Whether the batch may be recorded.
        """
        if not record:
            return self._run(batch, num_items)
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)} | {"": num_items}
        others = {name: value for name, value in batch.items() if name not in tensors}
        step = self._steps.setdefault(_shape_of(tensors, others), _Step())
        step.seen += 1
        if step.replay is None:
            if step.seen <= self._warmups or self.num_recorded >= self._limit:
                return self._run(batch, num_items)
            self._record(step, tensors, others)
        assert step.replay is not None
        for name, tensor in step.inputs.items():
            tensor.copy_(tensors[name])
        step.replay()
        loss, sums = (output.clone() for output in step.outputs)
        return loss, sums

    def _run(self, batch: Batch, num_items: Tensor) -> tuple[Tensor, Tensor]:
        loss, sums = self._compute(batch, num_items)
        self.gradients.add(torch.autograd.grad(loss, self.gradients.parameters, allow_unused=True))
        return loss.detach(), sums

    def _record(self, step: _Step, tensors: dict[str, Tensor], others: dict[str, Any]) -> None:
        step.inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        batch = others | step.inputs
        num_items = batch.pop("")
        # outside of the pool, where the next recording would write over them
        step.outputs = (torch.zeros((), device=num_items.device), torch.zeros(4, device=num_items.device))

        def run() -> None:
            for output, new in zip(step.outputs, self._run(batch, num_items), strict=True):
                output.copy_(new)

        step.replay = self._recorder(run)


def _shape_of(tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> tuple:
    shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(tensors.items()))
    return shapes, tuple(sorted(others.items()))


def can_record(model: RCCForCausalLM, batch: Batch) -> bool:
    """Whether a batch needs no mask and no look at values: whole segments, at positions that there are."""
    text, context = model.config.text_config, batch.get("context_ids")
    if not isinstance(context, Tensor) or any(name.endswith("_mask") for name in batch):
        return False
    segment_length = model.config.segment_length
    ratio = batch.get("ratio") or model.config.ratio
    num_tokens = context.shape[1] // segment_length * segment_length
    num_local = context.shape[1] - num_tokens + batch["input_ids"].shape[1]
    needed = num_local + max(num_tokens // ratio, slots_reach(model.config, num_tokens // ratio, num_tokens))
    longest = max(needed, segment_length, batch["teacher_ids"].shape[1] if "teacher_ids" in batch else 0)
    limits = [model.config.max_positions, getattr(text, "sliding_window", None)]
    if context.shape[1] < segment_length or model.config.head_length:
        return False
    return all(limit is None or longest <= limit for limit in limits)


def check_recordable(model: RCCForCausalLM) -> None:
    """Whether steps of a model can be recorded here at all.

    Raises:
        ValueError: there is no CUDA device, the base's attention is another than "sdpa", or its rotary positions are
            scaled by how long a text is.
    """
    if not torch.cuda.is_available():
        raise ValueError("cuda_graphs needs a CUDA device, and there is none; leave it out")
    scaled = rope_types(model.config.text_config) & {"dynamic", "longrope"}
    if scaled:
        raise ValueError(
            f"cuda_graphs does not go with rope_type {', '.join(sorted(scaled))}, which looks at positions in every "
            "pass; leave it out"
        )
    attention = model.model.language_model.config._attn_implementation
    if attention != "sdpa":
        raise ValueError(
            f"cuda_graphs needs a base with attn_implementation sdpa, and this one has {attention}; load it with "
            "sdpa, or leave cuda_graphs out"
        )


def rope_types(config: Any) -> set[str]:
    """How a base scales its rotary positions; some do it for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return {str(one["rope_type"]) for one in (parameters, *nested) if "rope_type" in one}


@contextmanager
def causal_attention(model: RCCForCausalLM) -> Iterator[None]:
    """In the block the base's attention, "sdpa", is causal, and masks are neither made nor looked at."""
    config = model.model.language_model.config
    before = config._attn_implementation
    AttentionInterface.register(_CAUSAL, sdpa_attention_forward)
    config._attn_implementation = _CAUSAL
    try:
        yield
    finally:
        config._attn_implementation = before
