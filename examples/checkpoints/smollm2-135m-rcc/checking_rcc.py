# SPDX-License-Identifier: Apache-2.0
"""What a model accepts: memories that it can decode from, and inputs of the right kind."""

from dataclasses import asdict

import torch
from torch import Tensor

from .compressed_rcc import Origin, RCCMemory
from .fingerprint_rcc import fingerprint_parts
from .packed_rcc import find_documents


def origin_of(model) -> Origin:
    """The mark that memories of this model carry."""
    return Origin(model.config.scheme, *fingerprint_parts(model))


def check_memory(model, memory: RCCMemory) -> None:
    """Refuse a memory that this model cannot decode from.

    Raises:
        TypeError: if it is no `RCCMemory`.
        ValueError: if another model wrote it, or it lies on another device or in another dtype.
    """
    if type(memory).__name__ != "RCCMemory":  # by name: remote code has a class of its own
        raise TypeError(f"memory must be an RCCMemory, as compress() returns it, not a {type(memory).__name__}")
    expected = origin_of(model)
    if asdict(memory.origin) != asdict(expected):  # values: remote code has a class of its own
        raise ValueError(
            f"this memory was written by another model: it carries {memory.origin}, this model is {expected}. "
            "Use the model (base and compressor) that wrote it, or compress the context again."
        )
    embedding = model.get_input_embeddings().weight
    if memory.dtype not in (slot_dtype(model), torch.int8):
        raise ValueError(
            f"the memory is in {memory.dtype} and the model in {slot_dtype(model)}; "
            "convert it with memory.to(dtype=model.dtype)"
        )
    if memory.local_ids.device != embedding.device and embedding.device.type != "meta":
        raise ValueError(
            f"the memory is on {memory.local_ids.device} and the model on {embedding.device}; "
            "move it with memory.to(model.device)"
        )


def check_inputs(model, inputs: Tensor, mask: Tensor | None) -> None:
    """Refuse inputs of the wrong kind.

    Raises:
        TypeError: if ids are no integers, or embeddings are.
        ValueError: if shapes do not fit, or the inputs lie on another device than the model.
    """
    if inputs.ndim == 2 and (inputs.is_floating_point() or inputs.dtype == torch.bool):
        raise TypeError(f"input_ids must be integers, not {inputs.dtype}; embeddings are given as inputs_embeds")
    if inputs.ndim not in (2, 3):
        raise ValueError(
            f"inputs have shape {tuple(inputs.shape)}; ids are [batch, tokens], embeddings have a width too"
        )
    if mask is not None and tuple(mask.shape) != tuple(inputs.shape[:2]):
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; the inputs need {tuple(inputs.shape[:2])}")
    device = model.get_input_embeddings().weight.device
    if device.type != "meta" and inputs.device != device:
        raise ValueError(
            f"the inputs are on {inputs.device} and the model on {device}; move them with .to(model.device)"
        )


def check_not_packed(position_ids: Tensor | None, mask: Tensor | None) -> None:
    """Refuse packed sequences, where they could not be told apart.

    Raises:
        ValueError: if positions `[B, T]` begin anew within a row.
    """
    if find_documents(position_ids, mask) is not None:
        raise ValueError(
            "position_ids begin anew within a row (packed sequences), which cannot be told apart behind a memory or a "
            "context: documents of a row would read each other. Give each document a row of its own"
        )


def slot_dtype(model) -> torch.dtype:
    """The dtype of the slots that the model writes and reads."""
    weight = model.get_input_embeddings().weight
    return weight.dtype if weight.dtype.is_floating_point else model.dtype
