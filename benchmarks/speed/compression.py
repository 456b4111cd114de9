# SPDX-License-Identifier: Apache-2.0
"""Part "compression": source tokens a second, beside the plain base's forward over the same segments.

`tflops` counts 2 operations for each parameter of the base's linear maps inside the layers and each token, so that it
says how fast text gets done; what adapters, slots and attention need besides is in `tflops_done` alone.
"""

from collections.abc import Iterator
from typing import Any

import torch
from compiled import compiled_side
from context import Context, Key, Results, Settings
from timing import OK

from rcc_hf.training.flops import FlopsCounter


def keys(settings: Settings) -> Iterator[Key]:
    # one length is enough to see the rate: segments are independent, and `first_token` has all lengths
    length = max([n for n in settings.lengths if n <= settings.decode_length] or settings.lengths[:1])
    for tokens in dict.fromkeys(min(tokens, length) for tokens in settings.batch_tokens):
        yield {"length": length, "batch_tokens": tokens}


def measure(context: Context, key: Key) -> Results:
    pair, ids = context.pair, context.pair.random_ids(1, key["length"])
    segment = pair.rcc.config.segment_length
    segments = ids[:, : key["length"] // segment * segment].view(-1, segment)
    step = max(1, key["batch_tokens"] // segment)

    def base() -> dict[str, Any]:
        for batch in segments.split(step):
            pair.base.model(input_ids=batch, use_cache=False)
        return {}

    def rcc() -> dict[str, Any]:
        memory = pair.rcc.compress(ids)
        return {"kept_bytes": memory.nbytes, "slots": memory.num_slots}

    before, pair.rcc.config.encode_batch_tokens = pair.rcc.config.encode_batch_tokens, key["batch_tokens"]
    try:
        sides = {"base": lambda: context.wall(base), "rcc": lambda: context.wall(rcc)}
        if context.settings.compile:
            torch.compiler.reset()  # for a second number of segments it would compile for any
            sides |= {
                "base_compiled": compiled_side(context, "base_compiled", base, base),
                "rcc_compiled": compiled_side(context, "rcc_compiled", rcc, rcc),
            }
        found = context.compare(sides)
    finally:
        pair.rcc.config.encode_batch_tokens = before
    for side, result in found.items():
        if result["status"] == OK:
            result |= rates(context, side, segments.numel(), result["median_seconds"])
    return found


def rates(context: Context, side: str, tokens: int, seconds: float) -> dict[str, float]:
    """Tokens and operations a second, and the shares of the ceiling that was measured in this call."""
    counts = operations(context, tokens)
    ceiling = context.record.data["runs"][-1]["ceiling_tflops"]
    wanted = counts["wanted"] / seconds / 1e12
    found = {"tokens_per_second": tokens / seconds, "tflops": wanted, "ceiling_share": wanted / ceiling}
    if side in counts:  # what compiled code does of adapters is the compiler's choice
        done = counts[side] / seconds / 1e12
        found |= {"tflops_done": done, "ceiling_share_done": done / ceiling}
    return found


def operations(context: Context, tokens: int) -> dict[str, float]:
    """Floating-point operations for so many tokens: what is wanted, and what either side does."""
    config, counter = context.pair.rcc.config, FlopsCounter(context.pair.rcc)
    sizes, segment, slots = counter.sizes, config.segment_length, tokens // config.ratio
    attention = 2.0 * tokens * segment * counter.attention
    of_slots = 2.0 * slots * (sizes["base"] + sizes["read"] + sizes["maps"])
    of_slots += 2.0 * slots * (segment // config.ratio) * counter.attention
    return {
        "wanted": 2.0 * tokens * sizes["base"],
        "base": 2.0 * tokens * sizes["base"] + attention,
        "rcc": 2.0 * tokens * (sizes["base"] + sizes["write"]) + attention + of_slots,
    }
