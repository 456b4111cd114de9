# SPDX-License-Identifier: Apache-2.0
"""The command line of run.py: what is measured of which shapes, with defaults for a GPU, and small ones for a CPU."""

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import compression
import decoding
import first_token
import memory
import short_prompt
import torch
from context import Part, Settings
from shapes import SHAPES

from rcc_hf.attention import ATTENTIONS, best_attention
from rcc_hf.checkpoints import DTYPES

# in this order: nothing may have used a memory before `short_prompt`, and `memory` takes what `first_token` has seen
PARTS: dict[str, Part] = {
    "short_prompt": short_prompt,
    "compression": compression,
    "first_token": first_token,
    "memory": memory,
    "decode": decoding,
}
SMALL = Settings(
    lengths=(1024, 4096, 16384),
    batch_tokens=(4096,),
    batches=(1, 4),
    decode_length=8192,
    prompts=(128,),
    prompt=16,
    new_tokens=16,
)
_USUAL = {
    "shapes": ["smollm2", "llama-3.1-8b", "mistral-7b"],
    "repeats": 5,
    "row_seconds": 60.0,
    "segment_length": 1024,
}
_USUAL_SMALL = {
    "shapes": ["tiny"],
    "repeats": 3,
    "row_seconds": 2.0,
    "seconds": 80.0,
    "segment_length": 256,
    "device": "cpu",
}


def parse(argv: Sequence[str] | None, description: str) -> tuple[argparse.Namespace, Settings]:
    """How is measured, and what; `--small` changes defaults."""
    options = _parser(description).parse_args(argv)
    small = options.small
    for name, value in (_USUAL_SMALL if small else _USUAL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or ("float32" if torch.device(options.device).type == "cpu" else "bfloat16")
    best = best_attention(options.device, DTYPES[options.dtype])
    options.attention = options.attention or list(dict.fromkeys(["sdpa", best]))
    given = {field.name: getattr(options, field.name, None) for field in fields(Settings)}
    chosen = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
    return options, replace(SMALL if small else Settings(), **chosen)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file to write, or to go on with")
    add = parser.add_argument
    add("--small", action="store_true", help="a tiny model on a CPU, to see that all works")
    add("--shapes", nargs="+", choices=SHAPES, help="(default: smollm2 llama-3.1-8b mistral-7b)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    add("--attention", nargs="+", choices=ATTENTIONS, help="for both sides (default: sdpa, and the best that is there)")
    add("--lengths", type=int, nargs="+", help="tokens of contexts (default: 8K 32K 128K 512K 1M)")
    add("--batches", type=int, nargs="+", help="rows that are decoded together (default: 1 4 16)")
    add("--batch_tokens", type=int, nargs="+", help="tokens of a compressor's call (default: 16384 65536)")
    add("--decode_length", type=int, help="context behind which is decoded (default: 131072)")
    add("--prompts", type=int, nargs="+", help="tokens of short prompts (default: 512)")
    add("--new_tokens", type=int, help="where steps are timed (default: 48)")
    add("--prefill_chunk", type=int, help="of the base, where it has too little memory otherwise (default: 8192)")
    add("--caches", nargs="+", choices=["static", "dynamic"], help="of generate() (default: both)")
    add("--compile", action="store_true", help="contexts are read with compiled layers too (takes minutes)")
    add("--fuse", action="store_true", help="steps are timed with our read adapters in the weights too")
    add("--repeats", type=int, help="runs that count (default: 5)")
    add("--row_seconds", type=float, help="long runs are repeated no longer (default: 60)")
    add("--seconds", type=float, help="budget of the whole call; rows that do not fit are skipped")
    add("--ratio", type=int, default=32, help="tokens per slot (default: 32)")
    add("--segment_length", type=int, help="tokens per segment (default: 1024)")
    add("--dtype", choices=[n for n in DTYPES if n != "auto"], help="(default: bfloat16; on a CPU float32)")
    add("--device", help="(default: a GPU if there is one)")
    return parser
