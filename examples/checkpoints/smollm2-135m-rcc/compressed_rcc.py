# SPDX-License-Identifier: Apache-2.0
"""`RCCMemory`: a context in compressed form, as a value that is kept, saved, and decoded from many times."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .compressed_files_rcc import CONFIG_NAME, WEIGHTS_NAME, find_weights, replace_files, upload
from .compressed_int8_rcc import FloatLayers, to_int8
from .compressed_ops_rcc import (
    concatenate,
    head_sizes,
    local_sizes,
    map_slots,
    row_blocks,
    slice_segments,
    stack,
    unstack,
)
from .compressed_parts_rcc import (
    PLAIN_TENSORS,
    MismatchError,
    Origin,
    description,
    fields_from_parts,
    named_tensors,
)


@dataclass(frozen=True, eq=False)
class RCCMemory:
    """What `RCCModel.compress` returns. Methods give new memories; none changes its own.

    Attributes:
        layers: for every decoder layer the tensors that the scheme keeps, batch first, slots on axis -2
            (RCC: a key and a value `[B, H, M, D]`, or with wiring "add" one state `[B, M, D]`).
        mask: `[B, M]`, 0 where a row has no slot; None if all rows have all M.
        head_ids: `[B, H]`, tokens at the start that stay raw in front of the slots.
        head_mask: `[B, H]`, 0 at padding; None if there is none.
        local_ids: `[B, P]`, tokens behind the last whole segment: raw, and decoded with every prompt.
        local_mask: `[B, P]`, 0 at padding; None if there is none.
        slot_counts: slots of each segment, in order (segments may have been compressed at different ratios).
        segment_length: source tokens of each segment.
        origin: the model that wrote it.
        scales: if the slots are int8, the factors of groups of their channels, with the number of groups as last size.
    """

    layers: tuple[tuple[Tensor, ...], ...]
    mask: Tensor | None
    head_ids: Tensor
    head_mask: Tensor | None
    local_ids: Tensor
    local_mask: Tensor | None
    slot_counts: tuple[int, ...]
    segment_length: int
    origin: Origin
    scales: tuple[tuple[Tensor, ...], ...] | None = None

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return len(self.local_ids)

    @property
    def row_tokens(self) -> tuple[int, ...]:
        """Source tokens of each row: head, segments and local ones."""
        counts = zip(head_sizes(self), row_blocks(self), local_sizes(self), strict=True)
        return tuple(head + len(blocks) * self.segment_length + local for head, blocks, local in counts)

    @property
    def num_slots(self) -> int:
        """Slots of the row that has most."""
        return sum(self.slot_counts) if self.mask is None else int(self.mask.sum(1).max())

    @property
    def num_tokens(self) -> int:
        """Source tokens of the row that has most, compressed and raw."""
        return max(self.row_tokens)

    @property
    def num_head(self) -> int:
        """Raw tokens in front of the slots of the row that has most."""
        return self.head_ids.shape[1]

    @property
    def num_local(self) -> int:
        """Local tokens of the row that has most."""
        return self.local_ids.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @property
    def device(self) -> torch.device:
        """Device of the first layer's slots."""
        return self.layers[0][0].device

    @property
    def dtype(self) -> torch.dtype:
        """Data type in which the slots are stored; `torch.int8` after `to_int8`."""
        return self.layers[0][0].dtype

    def __repr__(self) -> str:
        return (
            f"RCCMemory(batch_size={self.batch_size}, num_tokens={self.num_tokens}, num_slots={self.num_slots}, "
            f"num_head={self.num_head}, num_local={self.num_local}, nbytes={self.nbytes}, "
            f"scheme={self.origin.scheme!r})"
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "RCCMemory":
        """The memory on another device, or in another floating dtype.

        Raises:
            ValueError: if `dtype` is not a floating one.
        """
        memory = self if dtype is None else self.to_float(dtype)
        return memory.map_tensors(lambda tensor: tensor.to(device))

    def to_int8(self) -> "RCCMemory":
        """The memory in about half the bytes of bfloat16, which any model of the same weights decodes from as it is.

        Slots are rounded to 255 steps between minus and plus the largest entry of each slot and head (of states: of
        each slot and 64 channels). Appending to such a memory gives another one; its old slots keep every bit.

        Raises:
            ValueError: if a slot is not finite.
        """
        if self.scales is not None:
            return self
        pairs = [[to_int8(slots) for slots in layer] for layer in self.layers]
        return replace(
            self,
            layers=tuple(tuple(numbers for numbers, _ in layer) for layer in pairs),
            scales=tuple(tuple(scale for _, scale in layer) for layer in pairs),
        )

    def to_float(self, dtype: torch.dtype) -> "RCCMemory":
        """The memory in a floating dtype, whether or not it was in int8.

        Raises:
            ValueError: if `dtype` is not a floating one.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"a memory is stored in a floating dtype, not in {dtype}; for 8 bits use to_int8()")
        if self.scales is None:
            return map_slots(lambda slots: slots.to(dtype), self)
        return replace(self, layers=tuple(FloatLayers(self.layers, self.scales, dtype)), scales=None)

    def float_layers(self, dtype: torch.dtype) -> Sequence[tuple[Tensor, ...]]:
        """The layers as a scheme reads them; those of an int8 memory are made floating one by one."""
        return self.layers if self.scales is None else FloatLayers(self.layers, self.scales, dtype)

    def expand(self, batch_size: int) -> "RCCMemory":
        """The rows repeated (each one `batch_size / B` times in a row) for a larger batch of prompts.

        Raises:
            ValueError: if `batch_size` is not a multiple of the memory's.
        """
        if batch_size == self.batch_size:
            return self
        if batch_size % self.batch_size:
            raise ValueError(
                f"a memory of {self.batch_size} rows cannot serve a batch of {batch_size} prompts: the number of "
                "prompts must be a multiple of the number of rows"
            )
        return self.select(torch.arange(self.batch_size).repeat_interleave(batch_size // self.batch_size))

    def select(self, rows: Tensor) -> "RCCMemory":
        """The memory of the given rows `[n]`, in that order."""
        return self.map_tensors(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def slice(self, start: int = 0, stop: int | None = None) -> "RCCMemory":
        """What compressing segments `start` to `stop - 1` of every row alone would have given.

        Segments are counted in each row from its first one, as Python counts: a negative number counts from the row's
        last whole segment, and a row that has fewer segments gives what it has, be it nothing. The local tokens are a
        started segment behind the whole ones: they stay if `stop` is None or beyond the whole segments of their row.
        A head stays if nothing behind it is cut off. So `slice(0, n)` and `slice(n)`, joined by `concatenate`, are the
        memory again.

        Raises:
            ValueError: if the scheme keeps no slots by segment.
        """
        return slice_segments(self, start, stop)

    @staticmethod
    def concatenate(memories: "Sequence[RCCMemory]") -> "RCCMemory":
        """Memories of consecutive texts as one, row by row: the slots of each behind those of the one before.

        Only the first may have a head, only the last local tokens. Ratios may differ.

        Raises:
            ValueError: if there is no memory, raw tokens would stand between slots, or they differ in origin, rows,
                dtype, device or length of segments.
            TypeError: if one is no `RCCMemory`.
        """
        return concatenate(memories)

    @staticmethod
    def stack(memories: "Sequence[RCCMemory]") -> "RCCMemory":
        """The rows of all the memories, in order, as rows of one; shorter ones are padded in front.

        Raises:
            ValueError: if there is no memory, or they differ in origin, dtype or device.
            TypeError: if one is no `RCCMemory`.
        """
        return stack(memories)

    def unstack(self) -> "list[RCCMemory]":
        """Every row as a memory of its own, without padding."""
        return unstack(self)

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "RCCMemory":
        """The memory with every tensor replaced by what `function`, which keeps rows apart, makes of it."""
        plain = {name: getattr(self, name) for name in PLAIN_TENSORS}
        return replace(map_slots(function, self), **{n: t if t is None else function(t) for n, t in plain.items()})

    def _tensors(self) -> dict[str, Tensor]:
        return named_tensors(self)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `memory.safetensors` and `memory.json` (the first holds the second's content too, so the pair cannot
        mix); files are replaced only once their successors are complete.

        Raises:
            OSError: if the system refuses to write, as on a full disk; a memory that was there stays.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(description(self), indent=2)
        tensors = {name: t.detach().to("cpu").contiguous() for name, t in self._tensors().items()}
        replace_files(
            {
                folder / WEIGHTS_NAME: lambda path: save_file(tensors, path, metadata={"memory": text}),
                folder / CONFIG_NAME: lambda path: Path(path).write_text(text + "\n"),
            }
        )

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **kwargs
    ) -> Any:
        """Write the files of `save_pretrained` to a repository on the Hub, which is made if it does not exist.

        Args:
            repo_id: `owner/name`, or `name` for one of your own.
            private: whether a repository that is made now is private; None for the owner's default.
            token: for the Hub; None for the one that you logged in with.
            kwargs: arguments of `huggingface_hub.upload_folder`: `revision` (a branch, made if need be),
                `commit_message`, `create_pr`, ...

        Returns:
            The commit, as `huggingface_hub.upload_folder` describes it.
        """
        return upload(self.save_pretrained, repo_id, private=private, token=token, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        device: str | torch.device = "cpu",
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> "RCCMemory":
        """Read a memory that `save_pretrained` or `push_to_hub` wrote. It is checked against a model when it is used.

        Args:
            source: a folder, or (if there is no such folder) the name of a repository on the Hub.
            revision: branch, tag or commit on the Hub.
            token: for the Hub; None for the one that you logged in with.
            cache_dir: where files of the Hub are kept; None for the usual place.

        Raises:
            ValueError: if there is no memory, or a damaged one.
            ConnectionError: if the Hub cannot be reached and the cache does not hold the memory.
        """
        path = find_weights(source, revision=revision, token=token, cache_dir=cache_dir)
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                described = json.loads((file.metadata() or {})["memory"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            memory = cls(**fields_from_parts(described, tensors))
            if list(memory.row_tokens) != described["row_tokens"]:
                raise MismatchError(f"rows of {memory.row_tokens} tokens instead of {described['row_tokens']}")
            return memory
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, MismatchError) as error:
            raise ValueError(f"{path} is damaged or no memory ({error!r}). Compress the context again.") from error
