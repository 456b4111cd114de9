# SPDX-License-Identifier: Apache-2.0
"""What a decoding step costs behind a memory, in a dynamic, a static, and a static cache with compiled steps.

    python benchmarks/static_decode.py OUTPUT.json [--help]

"Fused" are read adapters that `fuse_adapters` has put into a copy of the weights. The yardstick is the plain base,
whose cache holds as many raw tokens as the memory has slots. All get the same prompt behind that. All variants take
turns, round by round; prefill, compilation and the first steps are not counted. The compressor is fresh (nothing is
trained), which changes no timing.
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, CompileConfig, StoppingCriteria

from rcc_hf import RCCForCausalLM
from rcc_hf.checkpoints import DTYPES
from rcc_hf.smollm import smollm2_path
from rcc_hf.surroundings import surroundings

SKIPPED = 2  # steps at the start of each call that are not counted: the prefill, and the first in its cache


@dataclass(frozen=True)
class Result:
    """Steps of one variant: their number, how long they took, and what they attended to in the first of them.

    `graphs_while_timed` is how often a step was compiled in spite of the warm-up.
    """

    model: str
    cache: str
    entries: int
    steps: int
    median_ms: float
    quartiles_ms: tuple[float, float]
    median_ms_of_rounds: list[float]
    graphs_while_timed: int


class Clock(StoppingCriteria):
    """Never stops anything; notes when each token was there."""

    def __init__(self, device: str):
        self.synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
        self.times: list[float] = []

    def __call__(self, input_ids, scores, **kwargs):
        self.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def cache_options() -> dict[str, dict]:
    """Arguments of `generate` for each kind of cache."""
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True
    return {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "static, compiled": {"cache_implementation": "static", "compile_config": config},
    }


@torch.no_grad()
def prepare(settings: argparse.Namespace) -> dict[str, tuple]:
    """The models, each with the arguments of `generate` that make it attend to as many entries."""
    torch.manual_seed(0)
    dtype, slots = DTYPES[settings.dtype], settings.slots
    options = {"ratio": settings.ratio, "segment_length": settings.segment_length}
    model = RCCForCausalLM.from_base(smollm2_path(), dtype=dtype, **options).to(settings.device).eval()
    base = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=dtype).to(settings.device).eval()
    size = base.config.vocab_size
    prompt, context = (
        torch.randint(size, (1, n), device=settings.device) for n in (settings.prompt, slots * settings.ratio)
    )
    behind = {"input_ids": prompt, "memory": model.compress(context)}
    fused = copy.deepcopy(model)
    fused.fuse_adapters("read")
    raw = {"input_ids": torch.cat([context[:, :slots], prompt], 1)}
    return {"memory": (model, behind), "memory, fused": (fused, behind), "raw tokens": (base, raw)}


def steps_of(model, arguments: dict, count: int, device: str) -> list[float]:
    """Milliseconds of each step but the first ones of one call of `generate`."""
    clock = Clock(device)
    settings = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
    model.generate(
        **arguments, **settings, attention_mask=torch.ones_like(arguments["input_ids"]), stopping_criteria=[clock]
    )
    times = clock.times[SKIPPED - 1 :]
    return [1000 * (after - before) for before, after in itertools.pairwise(times)]


def measure(settings: argparse.Namespace) -> list[Result]:
    """All variants, in turns."""
    models, options = prepare(settings), cache_options()
    variants = [(name, cache) for name in models for cache in options]

    def run(name: str, cache: str) -> list[float]:
        model, arguments = models[name]
        return steps_of(model, {**arguments, **options[cache]}, settings.new, settings.device)

    for variant in variants:
        run(*variant)
    counters = torch._dynamo.utils.counters
    counters.clear()
    rounds: dict[tuple[str, str], list[list[float]]] = {variant: [] for variant in variants}
    compiled = dict.fromkeys(variants, 0)
    for _ in range(settings.rounds):
        for variant in variants:
            rounds[variant].append(run(*variant))
            compiled[variant] += counters["stats"]["unique_graphs"]
            counters.clear()
    results = []
    for (name, cache), times in rounds.items():
        every = [step for one in times for step in one]
        low, middle, high = statistics.quantiles(every, n=4)
        results.append(
            Result(
                name,
                cache,
                entries=settings.slots + settings.prompt + SKIPPED,
                steps=len(every),
                median_ms=middle,
                quartiles_ms=(low, high),
                median_ms_of_rounds=[statistics.median(one) for one in times],
                graphs_while_timed=compiled[name, cache],
            )
        )
    return results


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--slots", type=int, default=512, help="slots of the memory (default: 512)")
    parser.add_argument("--prompt", type=int, default=32, help="raw tokens behind it (default: 32)")
    parser.add_argument("--new", type=int, default=34, help="tokens that each call of generate() makes (default: 34)")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each variant (default: 5)")
    parser.add_argument("--ratio", type=int, default=8, help="tokens per slot (default: 8)")
    parser.add_argument("--segment-length", type=int, default=1024, help="tokens per segment (default: 1024)")
    parser.add_argument("--dtype", choices=[n for n in DTYPES if n != "auto"], default="float32", help="of the models")
    parser.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    settings = parser.parse_args()
    results = measure(settings)
    lines = [f"{'in front':13} {'cache':17} {'entries':>7} {'steps':>5} {'ms a token':>10} {'quartiles':>17}"]
    lines += [
        f"{r.model:13} {r.cache:17} {r.entries:7} {r.steps:5} {r.median_ms:10.2f} "
        f"{r.quartiles_ms[0]:8.2f}{r.quartiles_ms[1]:9.2f}"
        for r in results
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    report = {**surroundings(settings.device), "results": [asdict(result) for result in results]}
    settings.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
