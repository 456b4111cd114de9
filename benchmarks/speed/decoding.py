# SPDX-License-Identifier: Apache-2.0
"""Part "decode": steps of `generate` behind a long context, by batch, with a plain and with a static cache.

The base's cache is filled with random keys and values instead of a prefill, the same in all layers and rows; ours
holds a memory of random text, compressed once and shared by all rows. The first steps do not count: in them caches
are allocated and steps compiled or recorded. Where asked for, ours is measured with merged read adapters too, by
itself behind the other two.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from compiled import compiled_graphs
from context import TOO_LARGE, Context, Key, Results, Settings
from timing import OK, UNAVAILABLE, Sample, free, wait
from transformers import DynamicCache, StaticCache, StoppingCriteria

STATIC = ("sdpa", "eager")
"""Attentions that static caches behind a memory run with."""
SKIPPED = 8
"""Steps at the start of a call that do not count; fewer where fewer are generated."""


class Clock(StoppingCriteria):
    """Never stops anything; notes when the first steps were over, and when the last one was."""

    def __init__(self, device: torch.device, num_tokens: int):
        self.device, self.skipped, self.last = device, min(SKIPPED, num_tokens // 2), num_tokens
        self.count, self.times = 0, list[float]()

    def __call__(self, input_ids, scores, **kwargs):
        self.count += 1
        if self.count in (self.skipped, self.last):
            wait(self.device)
            self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def seconds(self) -> float:
        """Of one step."""
        return (self.times[1] - self.times[0]) / (self.last - self.skipped)


def keys(settings: Settings) -> Iterator[Key]:
    for cache in settings.caches:
        for batch in settings.batches:
            yield {"length": settings.decode_length, "batch": batch, "cache": cache}


def measure(context: Context, key: Key) -> Results:
    length, batch, cache = key["length"], key["batch"], key["cache"]
    prompt = context.pair.random_ids(batch, context.settings.prompt)
    prepare(context)

    def base() -> Sample:
        ids = torch.cat([context.pair.random_ids(batch, length), prompt], 1)
        return steps(context, "base", cache, input_ids=ids, past_key_values=filled_cache(context, key))

    def rcc() -> Sample:
        return steps(context, "rcc", cache, input_ids=prompt, memory=context.memory_of(length))

    sides = {"base": base, "rcc": rcc}
    found: Results = {}
    if not context.fits(batch * length):
        del sides["base"]
        found["base"] = dict(TOO_LARGE["base"])
    if cache == "static" and context.names.get("attention") not in STATIC:
        del sides["rcc"]
        found["rcc"] = {"status": UNAVAILABLE, "reason": f"static caches behind a memory run with {', '.join(STATIC)}"}
    found |= context.compare(sides, warm_up=True)
    if context.settings.fuse:
        found["rcc_fused"] = fused(context, rcc) if "rcc" in sides else dict(found["rcc"])
    for result in found.values():
        if result["status"] == OK:
            result["tokens_per_second"] = batch / result["median_seconds"]
    for side in ("rcc", "rcc_fused"):
        if found.get(side, {}).get("status") == OK:
            memory = context.memory_of(length)
            found[side] |= {"slots": memory.num_slots, "kept_bytes": batch * memory.nbytes}
    return context.add_memory_facts(found, batch * length)


def fused(context: Context, rcc: Callable[[], Sample]) -> dict[str, Any]:
    """Our side with its read adapters in the weights, of which there is a second copy meanwhile."""
    model = context.pair.rcc
    prepare(context)
    model.fuse_adapters("read")  # once for all runs: recorded steps are bound to where weights are
    try:
        found = context.compare({"rcc_fused": rcc}, warm_up=True)["rcc_fused"]
    finally:
        model.unfuse_adapters()
    adapters = [part for layer in model.model.language_model.layers for part in layer.rcc.read.values()]
    found["fused_bytes"] = sum(part.up.shape[0] * part.down.shape[1] for part in adapters) * model.dtype.itemsize
    return found


def steps(context: Context, side: str, cache: str, **arguments: Any) -> Sample:
    """The seconds of one step, the mean over one call of `generate`."""
    clock = Clock(context.device, context.settings.new_tokens)
    if cache == "static" and "past_key_values" not in arguments:
        arguments["cache_implementation"] = "static"
    graphs = compiled_graphs()
    context.generate(side, max_new_tokens=context.settings.new_tokens, stopping_criteria=[clock], **arguments)
    facts = {"compiled": context.device.type == "cuda" and cache == "static", "graphs": compiled_graphs() - graphs}
    return Sample(clock.seconds(), facts)


def prepare(context: Context) -> None:
    """Forget compiled steps: for a second batch size they would be compiled for any, and be slower."""
    if context.device.type == "cuda":
        torch.compiler.reset()
    # ours remembers the longest static cache, and would go on making such
    context.pair.rcc._previous_max_cache_length = 0
    free(context.device)


def filled_cache(context: Context, key: Key) -> DynamicCache | StaticCache:
    """A cache of the base in which a context of random keys and values stands."""
    config, model = context.pair.base.config, context.pair.base
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    room = key["length"] + context.settings.prompt + context.settings.new_tokens
    if key["cache"] == "static":
        cache = StaticCache(config=config, max_cache_len=room)
    else:
        cache = DynamicCache(config=config)
    entries = torch.randn(
        1, config.num_key_value_heads, key["length"], width, dtype=model.dtype, device=context.device
    ).expand(key["batch"], -1, -1, -1)
    for layer in range(config.num_hidden_layers):
        cache.update(entries, entries, layer)
    return cache
