# SPDX-License-Identifier: Apache-2.0
"""Part "short_prompt": `generate` for a prompt that fits the window, without memory, beside the base's.

Its first token, and a step behind that. "fresh": our model has not worked with a memory yet. "used": it has, and its
layers have the hooks that serve one.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from context import Context, Key, Results, Settings
from decoding import prepare, steps
from timing import Sample, compare


def keys(settings: Settings) -> Iterator[Key]:
    for state in ("fresh", "used"):  # in this order: hooks stay
        for prompt in settings.prompts:
            yield {"prompt": prompt, "cache": "dynamic", "measured": "first token", "state": state}
            for cache in settings.caches:
                if cache == "dynamic" or state == "used":  # hooks are compiled away: one state is enough
                    yield {"prompt": prompt, "cache": cache, "measured": "step", "state": state}


def measure(context: Context, key: Key) -> Results:
    ids = context.pair.random_ids(1, key["prompt"])
    if key["state"] == "used":
        with torch.no_grad():
            context.memory_of(context.pair.rcc.config.segment_length)
    prepare(context)

    def first(side: str) -> dict[str, Any]:
        context.generate(side, input_ids=ids, max_new_tokens=1)
        return {}

    def run(side: str) -> Sample:
        if key["measured"] == "first token":
            return context.wall(lambda: first(side))
        return steps(context, side, key["cache"], input_ids=ids)

    # the difference is small, and so are the calls
    limits = replace(context.limits, repeats=3 * context.limits.repeats)
    with torch.no_grad():
        return compare(
            {side: lambda side=side: run(side) for side in ("base", "rcc")}, limits, context.device, warm_up=True
        )
