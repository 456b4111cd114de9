# SPDX-License-Identifier: Apache-2.0
"""`RCCMemory`: a context in compressed form, as a value that is kept, saved, and decoded from many times."""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS_NAME = "memory.safetensors"
CONFIG_NAME = "memory.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Origin:
    """Which model wrote a memory.

    Attributes:
        scheme: name of the memory scheme.
        base: fingerprint of the base's weights.
        compressor: fingerprint of the compressor's weights.
    """

    scheme: str
    base: str
    compressor: str


@dataclass(frozen=True, eq=False)
class RCCMemory:
    """What `RCCModel.compress` returns. Methods give new memories; none changes its own.

    Attributes:
        layers: for every decoder layer the tensors that the scheme keeps, batch first, slots on axis -2
            (RCC: a key and a value `[B, H, M, D]`, or with wiring "add" one state `[B, M, D]`).
        mask: `[B, M]`, 0 where a row has no slot; None if all rows have all M.
        local_ids: `[B, P]`, tokens behind the last whole segment: raw, and decoded with every prompt.
        local_mask: `[B, P]`, 0 at padding; None if there is none.
        slot_counts: slots of each segment, in order (segments may have been compressed at different ratios).
        row_tokens: source tokens of each row, local ones included.
        origin: the model that wrote it.
    """

    layers: tuple[tuple[Tensor, ...], ...]
    mask: Tensor | None
    local_ids: Tensor
    local_mask: Tensor | None
    slot_counts: tuple[int, ...]
    row_tokens: tuple[int, ...]
    origin: Origin

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return len(self.row_tokens)

    @property
    def num_slots(self) -> int:
        """Slots of the row that has most."""
        return sum(self.slot_counts) if self.mask is None else int(self.mask.sum(1).max())

    @property
    def num_tokens(self) -> int:
        """Source tokens of the row that has most, compressed and local."""
        return max(self.row_tokens)

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
        """Data type of the slots."""
        return self.layers[0][0].dtype

    def __repr__(self) -> str:
        return (
            f"RCCMemory(batch_size={self.batch_size}, num_tokens={self.num_tokens}, num_slots={self.num_slots}, "
            f"num_local={self.num_local}, nbytes={self.nbytes}, scheme={self.origin.scheme!r})"
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "RCCMemory":
        """The memory on another device, or in another floating dtype."""
        return replace(
            self,
            layers=tuple(tuple(t.to(device=device, dtype=dtype) for t in layer) for layer in self.layers),
            mask=None if self.mask is None else self.mask.to(device),
            local_ids=self.local_ids.to(device),
            local_mask=None if self.local_mask is None else self.local_mask.to(device),
        )

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

        def pick(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, rows.to(tensor.device))

        return replace(
            self,
            layers=tuple(tuple(pick(t) for t in layer) for layer in self.layers),
            mask=None if self.mask is None else pick(self.mask),
            local_ids=pick(self.local_ids),
            local_mask=None if self.local_mask is None else pick(self.local_mask),
            row_tokens=tuple(self.row_tokens[i] for i in rows.tolist()),
        )

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"layers.{i}.{j}": t for i, layer in enumerate(self.layers) for j, t in enumerate(layer)}
        optional = {"mask": self.mask, "local_ids": self.local_ids, "local_mask": self.local_mask}
        return named | {name: t for name, t in optional.items() if t is not None}

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `memory.safetensors` and `memory.json` (the first holds the second's content too, so the pair cannot
        mix); a file is replaced only once its successor is complete."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        described = {
            "format_version": FORMAT_VERSION,
            "slot_counts": list(self.slot_counts),
            "row_tokens": list(self.row_tokens),
            "num_layers": len(self.layers),
            "origin": asdict(self.origin),
        }
        text = json.dumps(described, indent=2)
        tensors = {name: t.detach().to("cpu").contiguous() for name, t in self._tensors().items()}
        _replace_file(folder / WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata={"memory": text}))
        _replace_file(folder / CONFIG_NAME, lambda path: Path(path).write_text(text + "\n"))

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, device: str | torch.device = "cpu") -> "RCCMemory":
        """Read a memory that `save_pretrained` wrote. It is checked against the model when it is used.

        Raises:
            ValueError: if the directory holds no memory, or a damaged one.
        """
        path = Path(directory) / WEIGHTS_NAME
        if not path.is_file():
            raise ValueError(
                f"{directory} holds no memory: there is no {WEIGHTS_NAME}. Give a folder that "
                "RCCMemory.save_pretrained wrote."
            )
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                described = json.loads((file.metadata() or {})["memory"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            return cls._from_parts(described, tensors)
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged or no memory ({error!r}). Compress the context again.") from error

    @classmethod
    def _from_parts(cls, described: dict, tensors: dict[str, Tensor]) -> "RCCMemory":
        if described["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"the memory has format {described['format_version']}, this version reads {FORMAT_VERSION}; "
                "use the rcc_hf version that wrote it, or compress the context again"
            )
        names = [f.name for f in fields(Origin)]
        layers = []
        for i in range(described["num_layers"]):
            parts = [name for name in tensors if name.startswith(f"layers.{i}.")]
            layers.append(tuple(tensors[f"layers.{i}.{j}"] for j in range(len(parts))))
        return cls(
            layers=tuple(layers),
            mask=tensors.get("mask"),
            local_ids=tensors["local_ids"],
            local_mask=tensors.get("local_mask"),
            slot_counts=tuple(described["slot_counts"]),
            row_tokens=tuple(described["row_tokens"]),
            origin=Origin(**{name: described["origin"][name] for name in names}),
        )


def _replace_file(target: Path, write) -> None:
    """Have `write` fill a temporary file beside `target`, then put it in its place; on failure the old file stays."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        write(temporary)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
