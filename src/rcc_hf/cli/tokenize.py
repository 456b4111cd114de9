# SPDX-License-Identifier: Apache-2.0
"""`rcc tokenize`: texts become token shards, from which training draws."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from rcc_hf.checkpoints import find_tokenizer
from rcc_hf.texts import build_shards, listed_files
from rcc_hf.texts.tokenizing import SHARD_TOKENS

SOURCE_HELP = (
    "prose (bundled books); a .txt, .md, .jsonl or .parquet file; a folder of them; or "
    "datasets:NAME?config=...&split=...&field=... (Hub, folder or format, streamed)"
)


@dataclass(kw_only=True)
class TokenizeSettings:
    """What is written, and how."""

    tokenizer: str = field(
        metadata={"help": "RCC checkpoint, base or tokenizer: id on the Hub, folder, or smollm2 (bundled).",
                  "aliases": ["--model"]},
    )  # fmt: skip
    output: str = field(metadata={"help": "Folder to write; a build that was killed goes on there."})
    files: str | None = field(
        default=None, metadata={"help": "Text file with the files to take, one path a line, of the one folder given."}
    )
    num_processes: int = field(default=1, metadata={"help": "Processes that tokenize; they change nothing else."})
    shard_tokens: int = field(default=SHARD_TOKENS, metadata={"help": "A shard is closed when it has so many tokens."})
    max_tokens: int | None = field(default=None, metadata={"help": "Stop behind the document that reaches so many."})
    progress: bool = field(default=True, metadata={"help": "Show a progress bar."})


def run(argv: list[str]) -> int:
    """Tokenize and save."""
    classes: list[Any] = [TokenizeSettings]
    parser = HfArgumentParser(classes, prog="rcc tokenize", description="Tokenize texts into shards on disk.")
    parser.add_argument("sources", nargs="+", help=SOURCE_HELP)
    settings, names = parser.parse_args_into_dataclasses(args=argv)
    sources = names.sources
    if settings.files is not None:
        if len(sources) != 1 or not Path(sources[0]).is_dir():
            raise ValueError(f"files names files of one folder, and the sources are {', '.join(sources)}")
        sources = listed_files(sources[0], settings.files)
    shards = build_shards(
        sources,
        find_tokenizer(settings.tokenizer),
        settings.output,
        num_processes=settings.num_processes,
        shard_tokens=settings.shard_tokens,
        max_tokens=settings.max_tokens,
        progress=settings.progress,
    )
    longest = shards.lengths.max()
    print(f"{shards.num_documents:,} documents, {shards.num_tokens:,} tokens, the longest document {longest:,}")
    print(f"wrote {settings.output}")
    return 0
