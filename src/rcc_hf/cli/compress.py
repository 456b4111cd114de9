# SPDX-License-Identifier: Apache-2.0
"""`rcc compress`: a text becomes a memory on disk."""

import time
from dataclasses import dataclass, field

from rcc_hf.cli.loading import compress_with_progress, encode, load, plain_kv_bytes, read_text
from rcc_hf.cli.settings import ModelSettings, parse
from rcc_hf.modeling.compressed_rcc import RCCMemory


@dataclass(kw_only=True)
class CompressSettings:
    """How far, and behind what."""

    ratio: int | None = field(default=None, metadata={"help": "Source tokens per slot; default: the checkpoint's."})
    max_slots: int | None = field(default=None, metadata={"help": "Instead: the smallest ratio with so few slots."})
    append_to: str | None = field(default=None, metadata={"help": "Folder of a memory to which the text is appended."})


def run(argv: list[str]) -> int:
    """Compress and save."""
    positionals = {"model": "RCC checkpoint", "text": "text file, or - for standard input", "output": "folder to write"}
    how, settings, names = parse(
        argv, "compress", "Compress a text into a memory and save it.", positionals, ModelSettings, CompressSettings
    )
    model, tokenizer = load(names.model, how)
    memory = None if settings.append_to is None else RCCMemory.from_pretrained(settings.append_to, model.device)
    input_ids = encode(tokenizer, read_text(names.text), model.device)
    start = time.perf_counter()
    memory = compress_with_progress(model, input_ids, memory=memory, ratio=settings.ratio, max_slots=settings.max_slots)
    seconds = time.perf_counter() - start
    memory.save_pretrained(names.output)
    plain = plain_kv_bytes(model, memory.num_tokens)
    print(f"source tokens   {memory.num_tokens:,} ({memory.num_local:,} of them raw, behind the last whole segment)")
    print(f"slots           {memory.num_slots:,}")
    print(f"bytes           {memory.nbytes:,} (plain KV cache: {plain:,}, {plain / memory.nbytes:.1f} times as much)")
    print(f"seconds         {seconds:.1f}")
    print(f"wrote {names.output}")
    return 0
