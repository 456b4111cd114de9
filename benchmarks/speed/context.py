# SPDX-License-Identifier: Apache-2.0
"""What every part of the benchmark works with: settings, the two models, limits, and what was seen so far."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from record import Record
from shapes import Pair, kv_bytes
from timing import NO_MEMORY, Limits, Sample, compare, timed

from rcc_hf import RCCMemory

Key = dict[str, Any]
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        lengths: Tokens of contexts.
        batch_tokens: What the compressor sees in one call, of the part `compression`.
        batches: Rows that are decoded together.
        decode_length: Tokens of the context behind which they are decoded.
        prompts: Tokens of short prompts.
        prompt: Tokens of the prompt behind a context.
        prefill_chunk: Tokens of the base's chunks, where its prefill as a whole needs too much memory.
        new_tokens: How many are generated where steps are timed.
        caches: Of `generate`: "dynamic" is its default, "static" compiles steps on a GPU.
        compile: Whether both sides are measured with compiled layers as well, where contexts are read.
        fuse: Whether ours is measured with its read adapters in the weights as well, where steps are timed.
    """

    lengths: tuple[int, ...] = (8192, 32768, 131072, 524288, 1048576)
    batch_tokens: tuple[int, ...] = (16384, 65536)
    batches: tuple[int, ...] = (1, 4, 16)
    decode_length: int = 131072
    prompts: tuple[int, ...] = (512,)
    prompt: int = 32
    prefill_chunk: int = 8192
    new_tokens: int = 48
    caches: tuple[str, ...] = ("static", "dynamic")
    compile: bool = False
    fuse: bool = False

    def sides(self, part: str) -> tuple[str, ...]:
        """What is measured in the rows of a part."""
        if self.compile and part in ("compression", "first_token"):
            return "base", "rcc", "base_compiled", "rcc_compiled"
        return ("base", "rcc", "rcc_fused") if self.fuse and part == "decode" else ("base", "rcc")


def is_base(side: str) -> bool:
    return side.startswith("base")


@dataclass
class Context:
    """One shape with one attention."""

    pair: Pair
    settings: Settings
    limits: Limits
    record: Record
    names: Mapping[str, str]
    walls: dict[str, tuple[int, float]] = field(default_factory=dict)
    memories: dict[int, RCCMemory] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.pair.device

    def generate(self, side: str, **arguments: Any) -> torch.Tensor:
        """Greedy, as many tokens as asked for: no token ends them early."""
        model = self.pair.sides()[side]
        mask = torch.ones_like(arguments["input_ids"])
        return model.generate(**arguments, attention_mask=mask, do_sample=False, eos_token_id=None, pad_token_id=0)

    def wall(self, function: Callable[[], Mapping[str, Any]]) -> Sample:
        """A sample whose seconds are those of the whole function, which returns facts."""
        facts, seconds = timed(function, self.device)
        return Sample(seconds, facts)

    def compare(self, sides: Mapping[str, Callable[[], Sample]], **options: Any) -> Results:
        """See `timing.compare`; nothing keeps a graph."""
        with torch.no_grad():
            return compare(sides, self.limits, self.device, **options)

    def by_length(self, length: int, sides: Mapping[str, Callable[[], Sample]], limits: Limits) -> Results:
        """As `compare`, with what a run will take about, by that of the last length: the base's may be quadratic."""
        expected = {}
        for side, (before, seconds) in self.walls.items():
            expected[side] = seconds * (length / before) ** (2 if is_base(side) else 1)
        with torch.no_grad():
            found = compare(sides, limits, self.device, expected=expected)
        for side, result in found.items():
            if "wall_seconds" in result:
                self.walls[side] = length, result["wall_seconds"]
        return found

    def memory_of(self, length: int) -> RCCMemory:
        """That of random tokens, compressed once."""
        if length not in self.memories:
            self.memories.clear()
            self.memories[length] = self.pair.rcc.compress(self.pair.random_ids(1, length))
        return self.memories[length]

    def add_memory_facts(self, found: Results, length: int) -> Results:
        """Bytes of the weights of each side and of an uncompressed cache; peaks as if either side were alone."""
        weights = self.pair.weight_bytes()
        for side, result in found.items():
            own = weights["base" if is_base(side) else "rcc"] + result.get("fused_bytes", 0)
            result["weight_bytes"] = own
            if is_base(side):
                result["kept_bytes"] = length * kv_bytes(self.pair.base.config, self.pair.base.dtype)
            if result.get("peak_bytes"):
                if is_base(side):  # our adapters were there, and maybe a memory
                    ours = sum(memory.nbytes for memory in self.memories.values())
                    result["peak_bytes"] -= ours + weights["rcc"] - weights["base"]
                result["peak_beside_weights_bytes"] = result["peak_bytes"] - own
        return found

    def fits(self, length: int) -> bool:
        """Whether weights and the base's cache of so many tokens could be in the GPU's memory at all."""
        if self.device.type != "cuda":
            return True
        needed = self.pair.weight_bytes()["rcc"] + length * kv_bytes(self.pair.base.config, self.pair.base.dtype)
        return needed < torch.cuda.get_device_properties(self.device).total_memory


TOO_LARGE: Results = {"base": {"status": NO_MEMORY, "reason": "weights and KV cache are more than the GPU has"}}
"""Of a row that `Context.fits` refuses: filling the cache until it is full may take minutes."""


class Part(Protocol):
    """A module that measures one thing."""

    def keys(self, settings: Settings) -> Iterator[Key]:
        """Its rows, in the order in which they are measured."""

    def measure(self, context: Context, key: Key) -> Results:
        """All sides of one of them."""
