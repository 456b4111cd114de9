# SPDX-License-Identifier: Apache-2.0
"""Attention of one decoding step over a static cache, computed in several ways: which of them is worth building in.

    python benchmarks/decode_attention.py OUTPUT.json [--entries 4352 33024] [--batches 1 4 16] [--help]

One query token for each row looks at `entries` keys and values, of which the last few are room that a mask hides, as a
static cache has it. All ways get the same tensors, and are compared with the first, which is what transformers computes
where there is a mask. On a GPU each is recorded into a CUDA graph, so that no launch is timed, and keys and values
change from call to call, so that none comes out of a cache of the chip.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from rcc_hf.checkpoints import DTYPES
from rcc_hf.surroundings import surroundings

Way = Callable[..., Tensor]
COPIES = 8
"""Sets of keys and values that calls take in turn."""


@dataclass(frozen=True)
class Shape:
    """Of one layer."""

    query_heads: int
    key_heads: int
    width: int


def repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Keys and values are copied for every head that shares them."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])


def shared(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The kernel is told that heads share keys and values."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], enable_gqa=True)


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Heads that share keys and values stand as if they were tokens of one head."""
    rows = q.view(q.shape[0], k.shape[1], -1, q.shape[-1])
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask[:, None, None]).view(q.shape)


def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As `grouped`, by two matrix products with a softmax between them."""
    rows = q.view(q.shape[0], k.shape[1], -1, q.shape[-1])
    scores = (rows @ k.mT).float() * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1).to(v.dtype)
    return (weights @ v).view(q.shape)


def unmasked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Keys and values without the room, and no mask: what an exactly long cache would allow."""
    length = mask.shape[1] - ROOM
    return F.scaled_dot_product_attention(q, k[:, :, :length], v[:, :, :length], enable_gqa=True)


ROOM = 64
"""Entries at the end of the cache that are not in use yet."""


def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """flex_attention, which has a kernel for few queries that splits the keys."""
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)


def block_mask(mask: Tensor) -> BlockMask:
    """What `flex` takes for a mask `[B, S]`; a model would make it once a step, for all layers."""
    if not mask.is_cuda:
        raise RuntimeError("needs a GPU: without one it makes all scores")
    return create_block_mask(lambda batch, head, query, key: mask[batch, key], len(mask), None, 1, mask.shape[1])


WAYS: dict[str, Way] = {way.__name__: way for way in (repeated, shared, grouped, products, flex, unmasked)}


def inputs(shape: Shape, batch: int, entries: int, dtype: torch.dtype, device: str) -> Iterator[tuple[Tensor, ...]]:
    """Query `[B, H, 1, D]`, keys and values `[B, H_kv, S, D]` and the mask `[B, S]`, `COPIES` times."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(batch, heads, length, shape.width, generator=generator, device=device, dtype=dtype)

    mask = torch.arange(entries, device=device).expand(batch, -1) < entries - ROOM
    for _ in range(COPIES):
        yield normal(shape.query_heads, 1), normal(shape.key_heads, entries), normal(shape.key_heads, entries), mask


def recorded(way: Way, sets: list[tuple[Tensor, ...]]) -> Callable[[], None]:
    """A function that runs the way once on each set."""

    def run() -> None:
        for one in sets:
            way(*one)

    if not sets[0][0].is_cuda:
        return run
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            way(*sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds(run: Callable[[], None], repeats: int, is_cuda: bool) -> float:
    """The median of one call, for one of its sets."""
    times = []
    for _ in range(repeats + 1):
        if is_cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        if is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:]) / COPIES


def measure(settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each way, batch and number of entries."""
    shape = Shape(settings.query_heads, settings.key_heads, settings.width)
    is_cuda = torch.device(settings.device).type == "cuda"
    for entries in settings.entries:
        for batch in settings.batches:
            sets = list(inputs(shape, batch, entries, DTYPES[settings.dtype], settings.device))
            expected = repeated(*sets[0]).float()
            read = 2 * sets[0][1].numel() * sets[0][1].element_size()
            for name in settings.ways:
                row: dict[str, Any] = {"entries": entries, "batch": batch, "way": name}
                try:
                    torch.compiler.reset()
                    given = [(*qkv, block_mask(mask)) for *qkv, mask in sets] if name == "flex" else sets
                    way = torch.compile(WAYS[name], dynamic=False) if is_cuda else WAYS[name]
                    found = way(*given[0]).float()
                    took = seconds(recorded(way, given), settings.repeats, is_cuda)
                except Exception as error:  # noqa: BLE001  # a way that does not work here is a result, too
                    yield row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
                    continue
                difference = float((found - expected).norm() / expected.norm())
                yield row | {"seconds": took, "gigabytes_per_second": read / took / 1e9, "difference": difference}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON")
    parser.add_argument(
        "--entries", type=int, nargs="+", default=[4352, 33024], help="keys a row (default: 4352 33024)"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="rows (default: 1 4 16)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="only these")
    parser.add_argument("--query_heads", type=int, default=32, help="of a layer (default: 32, as Llama 3.1 8B)")
    parser.add_argument("--key_heads", type=int, default=8, help="of a layer (default: 8)")
    parser.add_argument("--width", type=int, default=128, help="of a head (default: 128)")
    parser.add_argument("--repeats", type=int, default=20, help="measured runs (default: 20)")
    parser.add_argument("--dtype", choices=[n for n in DTYPES if n != "auto"], default="bfloat16", help="of tensors")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    settings = parser.parse_args(arguments)
    report = {**surroundings(settings.device), "copies": COPIES, "room": ROOM, "rows": []}
    sys.stdout.write("| entries | batch | way | microseconds | GB/s | difference |\n|---|---|---|---|---|---|\n")
    with torch.no_grad():
        for row in measure(settings):
            report["rows"].append(row)
            settings.output.write_text(json.dumps(report, indent=2) + "\n")
            head = f"| {row['entries']:,} | {row['batch']} | {row['way']} | "
            if "error" in row:
                sys.stdout.write(f"{head}{row['error']} | | |\n")
                continue
            numbers = f"{1e6 * row['seconds']:.1f} | {row['gigabytes_per_second']:.0f} | {row['difference']:.1e} |"
            sys.stdout.write(f"{head}{numbers}\n")


if __name__ == "__main__":
    main()
