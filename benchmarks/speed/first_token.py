# SPDX-License-Identifier: Apache-2.0
"""Part "first_token": seconds from the ids of a context and a prompt to the first new token, and the memory it takes.

The base prefills both by `generate`, with the library's own cache and the logits of the last token alone; in chunks
where that takes more memory than there is. Ours compresses the context, then generates one token behind the memory.
Where asked for, both are measured with compiled layers too: the base's for any length, ours for batches of segments.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from compiled import compiled_side
from context import TOO_LARGE, Context, Key, Results, Settings, is_base
from shapes import Pair
from timing import NO_MEMORY, Limits, Sample, timed


def keys(settings: Settings) -> Iterator[Key]:
    for length in sorted(settings.lengths):
        yield {"length": length}


def measure(context: Context, key: Key, limits: Limits | None = None) -> Results:
    length = key["length"]
    limits = context.limits if limits is None else limits
    ids, prompt = context.pair.random_ids(1, length), context.pair.random_ids(1, context.settings.prompt)
    sides, possible = _sides(context, ids, prompt), context.fits(length)
    found = context.by_length(length, {n: s for n, s in sides.items() if possible or not is_base(n)}, limits)
    in_chunks = _sides(context, ids, prompt, prefill_chunk_size=context.settings.prefill_chunk)
    again = {n: in_chunks[n] for n in found if is_base(n) and found[n]["status"] == NO_MEMORY}
    found |= context.by_length(length, again, limits)
    found |= {n: dict(TOO_LARGE["base"]) for n in sides if n not in found}
    return context.add_memory_facts({n: found[n] for n in sides}, length)


def _sides(context: Context, ids: torch.Tensor, prompt: torch.Tensor, **how: int) -> dict[str, Callable[[], Sample]]:
    """What is run, with options of the base's `generate`."""
    pair, length = context.pair, ids.shape[1]

    def base(ids: torch.Tensor = ids) -> dict[str, Any]:
        context.generate("base", input_ids=torch.cat([ids, prompt], 1), max_new_tokens=1, **how)
        return how

    def base_first() -> None:
        for tokens in (1000, 1500):  # the second compiles for any length
            base(pair.random_ids(1, 2 * how.get("prefill_chunk_size", 0) + tokens))

    def rcc(ids: torch.Tensor = ids) -> dict[str, Any]:
        memory, seconds = timed(lambda: pair.rcc.compress(ids), context.device)
        context.generate("rcc", input_ids=prompt, memory=memory, max_new_tokens=1)
        return {"compress_seconds": seconds, "kept_bytes": memory.nbytes, "slots": memory.num_slots}

    sides = {"base": lambda: context.wall(base), "rcc": lambda: context.wall(rcc)}
    if context.settings.compile:
        sides["base_compiled"] = compiled_side(context, "base_compiled", base, base_first)
        short = ids[:, : first_length(pair, length)]
        sides["rcc_compiled"] = compiled_side(context, "rcc_compiled", rcc, lambda: rcc(short))
    return sides


def first_length(pair: Pair, length: int) -> int:
    """Tokens of the shortest context whose batches of segments have all the shapes that those of `length` have."""
    segment = pair.rcc.config.segment_length
    batch = max(1, pair.rcc.config.batch_tokens(pair.device.type) // segment) * segment
    return length if length <= batch else batch + length % batch
