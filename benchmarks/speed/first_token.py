# SPDX-License-Identifier: Apache-2.0
"""Part "first_token": seconds from the ids of a context and a prompt to the first new token, and the memory it takes.

The base prefills both by `generate`, with the library's own cache and the logits of the last token alone; in chunks
where that takes more memory than there is. Ours compresses the context, then generates one token behind the memory.
"""

from collections.abc import Iterator
from typing import Any

import torch
from context import TOO_LARGE, Context, Key, Results, Settings
from timing import NO_MEMORY, Limits, timed


def keys(settings: Settings) -> Iterator[Key]:
    for length in sorted(settings.lengths):
        yield {"length": length}


def measure(context: Context, key: Key, limits: Limits | None = None) -> Results:
    length, pair = key["length"], context.pair
    limits = context.limits if limits is None else limits
    ids, prompt = pair.random_ids(1, length), pair.random_ids(1, context.settings.prompt)

    def base(**how: int) -> dict[str, Any]:
        context.generate("base", input_ids=torch.cat([ids, prompt], 1), max_new_tokens=1, **how)
        return how

    def rcc() -> dict[str, Any]:
        memory, seconds = timed(lambda: pair.rcc.compress(ids), context.device)
        context.generate("rcc", input_ids=prompt, memory=memory, max_new_tokens=1)
        return {"compress_seconds": seconds, "kept_bytes": memory.nbytes, "slots": memory.num_slots}

    sides = {"base": lambda: context.wall(base), "rcc": lambda: context.wall(rcc)}
    if not context.fits(length):
        del sides["base"]
    found = context.by_length(length, sides, limits)
    if "base" not in sides:
        found = {"base": dict(TOO_LARGE["base"]), **found}
    elif found["base"]["status"] == NO_MEMORY:
        chunk = {"prefill_chunk_size": context.settings.prefill_chunk}
        found |= context.by_length(length, {"base": lambda: context.wall(lambda: base(**chunk))}, limits)
    return context.add_memory_facts(found, length)
