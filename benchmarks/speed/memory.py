# SPDX-License-Identifier: Apache-2.0
"""Part "memory": the peak of allocated memory by length, up to the first token, with and without the weights.

It is what `first_token` has seen, where that was measured; otherwise one run of it.
"""

from collections.abc import Iterator
from dataclasses import replace

import first_token
from context import Context, Key, Results, Settings
from timing import FINAL

KEPT = ("status", "reason", "peak_bytes", "peak_beside_weights_bytes", "weight_bytes", "kept_bytes")


def keys(settings: Settings) -> Iterator[Key]:
    yield from first_token.keys(settings)


def measure(context: Context, key: Key) -> Results:
    row = context.record.find({**key, "part": "first_token", **context.names})
    if row is not None and all(side["status"] in FINAL for side in row["sides"].values()):
        found = row["sides"]
    else:
        found = first_token.measure(context, key, replace(context.limits, repeats=0))
    return {side: {name: result[name] for name in KEPT if name in result} for side, result in found.items()}
