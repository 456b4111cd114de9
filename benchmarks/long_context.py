# SPDX-License-Identifier: Apache-2.0
"""What compressing up to a million tokens costs: time, and memory beside the result itself, which should stay the same.

    python benchmarks/long_context.py OUTPUT.json [--help]

The model is tiny and made here, so times say how cost grows, not what it is for a real base; its KV cache is computed,
for comparison. Each row is measured in processes of its own, since the peak of resident memory (RSS) is one of a
process, as Linux counts it. glibc keeps much of what is freed, more of it the longer a process runs; so there are two
processes: one as it is, for the times and the peak that a user sees, and a slower one in which large blocks go back at
once (MALLOC_MMAP_THRESHOLD_), whose peak is what is really in use.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from rcc_hf import RCCConfig, RCCForCausalLM, RCCMemory
from rcc_hf.surroundings import surroundings

LENGTHS = (15_625, 62_500, 250_000, 1_000_000)
PROMPT = 16
ALLOCATORS = {"used": {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}, "seen": {}}
"""Variables of the environment of each process; times are those of the last."""


@dataclass(frozen=True)
class Result:
    """One length: times in seconds, sizes in bytes; working memory is the peak beside what was there and the result."""

    tokens: int
    seconds: float
    tokens_per_second: float
    num_slots: int
    num_local: int
    bytes_of_memory: int
    bytes_of_base_kv_cache: int
    peak_over_start_in_use: int
    working_memory_in_use: int
    peak_over_start_as_seen: int
    working_memory_as_seen: int
    seconds_to_first_token: float


def make_model() -> RCCForCausalLM:
    """A Llama of 4 layers of width 128 in float32, in whose 2,048 positions the slots are fitted."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    ranks = {"write_rank": 4, "read_rank": 4, "map_rank": 4}
    return RCCForCausalLM(
        RCCConfig(text_config=text, segment_length=512, ratio=32, fit_positions=True, scheme_options=ranks)
    ).eval()


def kv_cache_bytes(text: LlamaConfig, num_tokens: int) -> int:
    """The size of the base's own KV cache in float32."""
    head = text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head * torch.float32.itemsize * num_tokens


def resident_bytes() -> int:
    """RSS of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_bytes() -> int:
    """The highest RSS of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def first_token_seconds(model: RCCForCausalLM, memory: RCCMemory) -> float:
    """How long `generate` takes for one token behind the memory: the median of five calls after a first one."""
    prompt, times = torch.randint(3, model.config.text_config.vocab_size, (1, PROMPT)), []
    for _ in range(6):
        start = time.perf_counter()
        model.generate(prompt, memory=memory, max_new_tokens=1, do_sample=False, pad_token_id=0)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure(num_tokens: int) -> dict[str, float]:
    """Compress and decode in this process, which must not have done so before.

    Raises:
        RuntimeError: if something before compressing took more memory than compressing, which then cannot be seen.
    """
    model = make_model()
    ids = torch.randint(3, model.config.text_config.vocab_size, (1, num_tokens))
    before, former_peak, start = resident_bytes(), peak_bytes(), time.perf_counter()
    memory = model.compress(ids)
    seconds, peak = time.perf_counter() - start, peak_bytes()
    if peak <= former_peak:
        raise RuntimeError(f"the peak of {peak} bytes was there before compress(); choose a longer context")
    return {
        "seconds": seconds,
        "num_slots": memory.num_slots,
        "num_local": memory.num_local,
        "bytes_of_memory": memory.nbytes,
        "bytes_of_base_kv_cache": kv_cache_bytes(model.config.text_config, num_tokens),
        "peak_over_start": peak - before,
        "seconds_to_first_token": first_token_seconds(model, memory),
    }


def measure_apart(num_tokens: int) -> Result:
    """One row, from one process for each allocator."""
    command = [sys.executable, __file__, "--measure", str(num_tokens)]
    found = {
        name: json.loads(subprocess.run(command, env=os.environ | extra, check=True, stdout=subprocess.PIPE).stdout)
        for name, extra in ALLOCATORS.items()
    }
    used, seen = found["used"]["peak_over_start"], found["seen"]["peak_over_start"]
    once, size = found["seen"], found["seen"]["bytes_of_memory"]
    return Result(
        tokens=num_tokens,
        seconds=once["seconds"],
        tokens_per_second=num_tokens / once["seconds"],
        num_slots=once["num_slots"],
        num_local=once["num_local"],
        bytes_of_memory=size,
        bytes_of_base_kv_cache=once["bytes_of_base_kv_cache"],
        peak_over_start_in_use=used,
        working_memory_in_use=used - size,
        peak_over_start_as_seen=seen,
        working_memory_as_seen=seen - size,
        seconds_to_first_token=once["seconds_to_first_token"],
    )


def growth(results: list[Result]) -> dict[str, float]:
    """Working memory at the longest length over that at the second, the first whose batches are full; 1 is flat."""
    first, last = results[min(1, len(results) - 1)], results[-1]
    return {
        "from_tokens": first.tokens,
        "to_tokens": last.tokens,
        "working_memory_in_use": last.working_memory_in_use / first.working_memory_in_use,
        "working_memory_as_seen": last.working_memory_as_seen / first.working_memory_as_seen,
    }


def table(results: list[Result], grown: dict[str, float]) -> str:
    """The results for reading."""
    head = (
        f"{'tokens':>9} {'seconds':>8} {'tokens/s':>9} {'slots':>7} {'memory':>8} {'base KV':>9} "
        f"{'peak':>8} {'working':>8} {'(as seen)':>10} {'first token':>12}"
    )
    lines = [
        f"{r.tokens:9,} {r.seconds:8.2f} {r.tokens_per_second:9,.0f} {r.num_slots:7,} {r.bytes_of_memory / 1e6:8.2f} "
        f"{r.bytes_of_base_kv_cache / 1e6:9.2f} {r.peak_over_start_in_use / 1e6:8.2f} "
        f"{r.working_memory_in_use / 1e6:8.2f} {r.working_memory_as_seen / 1e6:10.2f} {r.seconds_to_first_token:11.4f}s"
        for r in results
    ]
    last = (
        f"working memory at {grown['to_tokens']:,} tokens over that at {grown['from_tokens']:,}: "
        f"{grown['working_memory_in_use']:.3f} in use, {grown['working_memory_as_seen']:.3f} as seen"
    )
    return "\n".join(["sizes in MB of a million bytes", head, *lines, last]) + "\n"


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", help="JSON file to write")
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, help="lengths (default: 15625 to 1000000)")
    parser.add_argument("--measure", type=int, metavar="TOKENS", help="measure one length here, and print it as JSON")
    settings = parser.parse_args()
    if settings.measure is not None:
        sys.stdout.write(json.dumps(measure(settings.measure)))
        return
    if settings.output is None:
        parser.error("OUTPUT.json is missing")
    here = surroundings()
    results = [measure_apart(num_tokens) for num_tokens in sorted(settings.tokens)]
    grown = growth(results)
    sys.stdout.write(table(results, grown))
    report = {**here, "results": [asdict(result) for result in results], "growth": grown}
    settings.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
