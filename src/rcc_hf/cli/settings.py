# SPDX-License-Identifier: Apache-2.0
"""Command lines from dataclasses: flags, help and defaults are written once, in the fields."""

from dataclasses import dataclass, field
from typing import Any

from transformers import HfArgumentParser

from rcc_hf.modeling.schemes_rcc import SCHEMES


@dataclass(kw_only=True)
class CompressorSettings:
    """A fresh compressor on a base; a trained checkpoint has values of its own, and these are then left out."""

    scheme: str | None = field(default=None, metadata={"help": f"Memory scheme: {', '.join(SCHEMES)} (default: rcc)."})
    ratio: int | None = field(default=None, metadata={"help": "Source tokens per slot (default: 32)."})
    segment_length: int | None = field(default=None, metadata={"help": "Tokens per segment (default: 1024)."})
    window: int | None = field(default=None, metadata={"help": "Raw tokens that generate keeps of a long prompt."})
    wiring: str | None = field(default=None, metadata={"help": "How slots enter the decoder: replace (default), add."})
    write_rank: int | None = field(
        default=None, metadata={"help": "Rank of the compressor's adapters (default: 32, uio: 128)."}
    )
    read_rank: int | None = field(
        default=None, metadata={"help": "Rank of the decoder's adapters (default: 16, uio: 128)."}
    )
    map_rank: int | None = field(default=None, metadata={"help": "Rank of the slot maps (default: 32)."})
    spread_slots: bool | None = field(
        default=None, metadata={"help": "Slots stand where their text stood, not at 0, 1, ... (default: no)."}
    )
    mark_slots: bool | None = field(
        default=None, metadata={"help": "Tell the compressor which tokens become slots (default: no)."}
    )
    slot_vectors: int | None = field(
        default=None, metadata={"help": "uio: a vector for each of so many slots of a segment (default: one for all)."}
    )


@dataclass(kw_only=True)
class ModelSettings:
    """Which model is loaded, and how."""

    base: str | None = field(default=None, metadata={"help": "Base of an adapter-only checkpoint, if it has moved."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1, ...; auto: a GPU if there is one."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "flash_attention_4, flash_attention_3, flash_attention_2, sdpa or eager; auto: the fastest "
                  "that is installed. Default: sdpa."},
    )  # fmt: skip


def parse(argv: list[str], command: str, description: str, positionals: dict[str, str], *settings: Any) -> tuple:
    """Instances of the dataclasses, then the positional arguments as a namespace."""
    parser = HfArgumentParser(list(settings), prog=f"rcc {command}", description=description)
    for name, text in positionals.items():
        parser.add_argument(name, help=text)
    return parser.parse_args_into_dataclasses(args=argv)
