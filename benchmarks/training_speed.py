# SPDX-License-Identifier: Apache-2.0
"""How fast training steps are: source tokens a second by batch size, plain, with compiled layers, and with CUDA graphs.

    python benchmarks/training_speed.py OUTPUT.json [--batches 32 64 128] [--modes eager compiled graphs] [--help]

Steps are those of `rcc_hf.training.train`: the Trainer, clipping, AdamW, and its data loader, on random tokens that are
reconstructed. The median of the log's lines counts, without the first ones, in which all is compiled. For how the time
of a step is spent, `--profile FILE` writes a table of kernels of the last run.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import Dataset
from transformers import TrainerCallback

from rcc_hf import RCCForCausalLM
from rcc_hf.checkpoints import load_model
from rcc_hf.objectives import collate, reconstruction_example
from rcc_hf.surroundings import surroundings
from rcc_hf.training import TrainSettings, train

MODES = {
    "eager": {},
    "compiled": {"compile_blocks": True},
    "graphs": {"compile_blocks": True, "cuda_graphs": True},
}
LINES, SKIPPED = 6, 3
"""Lines of the log in each run, and how many at its start do not count."""


@dataclass(frozen=True)
class Result:
    """Medians over lines of the log; `first_seconds` passed before the first line, with all that is compiled."""

    mode: str
    batch_size: int
    source_tokens_per_second: float
    step_ms: float
    ceiling_share: float | None
    peak_memory_gib: float | None
    first_seconds: float


class RandomTexts(Dataset):
    """Random tokens, to be reconstructed; an example depends on its index alone."""

    def __init__(self, size: int, length: int, vocab_size: int, ratio: int):
        self.size, self.length, self.vocab_size, self.ratio = size, length, vocab_size, ratio

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, self.vocab_size, (self.length,), generator=generator)
        return reconstruction_example(ids, [3, 4, 5, 6, 7, 8], end_id=2) | {"ratio": self.ratio}


class Lines(TrainerCallback):
    """Keeps the lines of the log, and when they came."""

    def __init__(self) -> None:
        self.start, self.lines = time.perf_counter(), list[tuple[float, dict[str, float]]]()

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if logs and "source_tokens_per_second" in logs:
            self.lines.append((time.perf_counter() - self.start, logs))


def measure(settings: argparse.Namespace, mode: str, batch_size: int) -> Result:
    """Train for a while."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    ranks = dict(zip(("write_rank", "read_rank", "map_rank"), settings.ranks, strict=True))
    length = settings.segment_length
    model = load_model(settings.model, dtype=settings.dtype, segment_length=length, ratio=settings.ratio, **ranks)
    assert isinstance(model, RCCForCausalLM)
    steps, lines = LINES * settings.steps, Lines()
    examples = RandomTexts(steps * batch_size, length, model.config.text_config.vocab_size, settings.ratio)
    with tempfile.TemporaryDirectory() as folder:
        how = TrainSettings(
            output=folder,
            max_steps=steps,
            batch_size=batch_size,
            logging_steps=settings.steps,
            save_steps=steps + 1,
            num_workers=settings.workers,
            loss_chunk=settings.loss_chunk,
            **MODES[mode],
        )
        train(model, how, examples, callbacks=[lines], collate=partial(collate, pad_id=0))
    counted = [logs for _, logs in lines.lines[SKIPPED:]]

    def median(name: str) -> float | None:
        found = [logs[name] for logs in counted if name in logs]
        return statistics.median(found) if found else None

    rate = median("source_tokens_per_second")
    assert rate is not None
    return Result(
        mode,
        batch_size,
        source_tokens_per_second=rate,
        step_ms=1000 * batch_size * length / rate,
        ceiling_share=median("ceiling_share"),
        peak_memory_gib=median("peak_memory_gib"),
        first_seconds=lines.lines[0][0],
    )


@contextmanager
def profiled(file: Path | None) -> Iterator[None]:
    """Write where the device's time went, if a file is given."""
    if file is None:
        yield
        return
    is_cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]) as found:
        yield
    order = "self_cuda_time_total" if is_cuda else "self_cpu_time_total"
    file.write_text(found.key_averages().table(sort_by=order, row_limit=40), encoding="utf-8")


def line_of(result: Result) -> str:
    """A row of the table."""
    share = "-" if result.ceiling_share is None else f"{100 * result.ceiling_share:.0f} %"
    memory = "-" if result.peak_memory_gib is None else f"{result.peak_memory_gib:.0f} GiB"
    return (
        f"{result.mode:10}{result.batch_size:6}{result.source_tokens_per_second:14,.0f}{result.step_ms:11.1f}"
        f"{share:>9}{memory:>10}{result.first_seconds:9.0f} s"
    )


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--model", default="smollm2", help="base of a fresh compressor (default: smollm2)")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128], help="contexts a step (default: 32 128)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="(default: all)")
    parser.add_argument("--steps", type=int, default=12, help=f"of each of {LINES} lines of the log (default: 12)")
    parser.add_argument("--ratio", type=int, default=32, help="tokens per slot (default: 32)")
    parser.add_argument("--segment_length", type=int, default=512, help="tokens of a context (default: 512)")
    parser.add_argument("--ranks", type=int, nargs=3, default=[32, 16, 32], help="write, read, map (default: 32 16 32)")
    parser.add_argument("--loss_chunk", type=int, default=16384, help="tokens whose logits exist (default: 16384)")
    parser.add_argument("--workers", type=int, default=4, help="processes that prepare examples (default: 4)")
    parser.add_argument("--dtype", default="bfloat16", help="of the base (default: bfloat16)")
    parser.add_argument("--profile", type=Path, help="text file for the kernels of the last run")
    settings = parser.parse_args()
    runs = [(mode, batch) for mode in settings.modes for batch in settings.batches]
    sys.stdout.write(
        f"{'mode':10}{'batch':>6}{'tokens/s':>14}{'ms/step':>11}{'ceiling':>9}{'memory':>10}{'first':>11}\n"
    )
    results = []
    for number, run in enumerate(runs, 1):
        with profiled(settings.profile if number == len(runs) else None):
            results.append(measure(settings, *run))
        sys.stdout.write(line_of(results[-1]) + "\n")
        sys.stdout.flush()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = {**surroundings(device), "results": [asdict(result) for result in results]}
    settings.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
