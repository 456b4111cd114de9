# SPDX-License-Identifier: Apache-2.0
"""`rcc compress`: a text becomes a memory on disk."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from rcc_hf.cli.loading import compress_with_progress, encode, load, plain_kv_bytes, read_text
from rcc_hf.cli.settings import ModelSettings, parse
from rcc_hf.compiling import compiled_compressor
from rcc_hf.modeling.compressed_rcc import RCCMemory
from rcc_hf.modeling.modeling_rcc import RCCForCausalLM


@dataclass(kw_only=True)
class CompressSettings:
    """How far, and behind what."""

    ratio: int | None = field(default=None, metadata={"help": "Source tokens per slot; default: the checkpoint's."})
    max_slots: int | None = field(default=None, metadata={"help": "Instead: the smallest ratio with so few slots."})
    append_to: str | None = field(default=None, metadata={"help": "Folder of a memory to which the text is appended."})
    replicas: list[str] = field(
        default_factory=list, metadata={"help": "Devices with copies of the model that compress too: cuda:1 cuda:2 ..."}
    )
    compile: bool = field(
        default=False,
        metadata={"help": "Compile the compressor first, by torch.compile, which takes about a minute. For texts of "
                  "millions of tokens on a GPU; needs a C compiler."},
    )  # fmt: skip


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
    with _compiled(model, settings.compile):
        memory = compress_with_progress(
            model,
            input_ids,
            memory=memory,
            ratio=settings.ratio,
            max_slots=settings.max_slots,
            replicas=model.replicate(settings.replicas) if settings.replicas else None,
        )
    seconds = time.perf_counter() - start
    memory.save_pretrained(names.output)
    plain = plain_kv_bytes(model, memory.num_tokens)
    print(f"source tokens   {memory.num_tokens:,} ({memory.num_local:,} of them raw, behind the last whole segment)")
    print(f"slots           {memory.num_slots:,}")
    print(f"bytes           {memory.nbytes:,} (plain KV cache: {plain:,}, {plain / memory.nbytes:.1f} times as much)")
    print(f"seconds         {seconds:.1f}{' (compiling included)' if settings.compile else ''}")
    print(f"wrote {names.output}")
    return 0


@contextmanager
def _compiled(model: RCCForCausalLM, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    try:
        with compiled_compressor(model):
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ValueError(f"torch.compile does not work here; leave --compile out. It says:\n{error}") from error
