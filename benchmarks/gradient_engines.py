# SPDX-License-Identifier: Apache-2.0
"""Gradients through long texts: seconds a token and peak memory by length, for each engine, until memory is out.

    python benchmarks/gradient_engines.py OUTPUT.json [--model smollm2] [--segments 4 16 64 195] [--plot FILE.png]

One backward pass over a text of random tokens, compressor and decoder of a fresh compressor; the median of several
after one that does not count. An engine that runs out of memory at a length is not tried at longer ones. Memory is what
tensors take on a CUDA device at most, or on a CPU what graphs hold at most. Rows are written as they come.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcc_hf import RCCForCausalLM
from rcc_hf.checkpoints import load_model
from rcc_hf.objectives import IGNORED
from rcc_hf.plotting.figures import save
from rcc_hf.plotting.styles import add_legend, assign_styles, figure_style, new_figure
from rcc_hf.surroundings import surroundings
from rcc_hf.training.engines import ENGINES, choose_engine
from rcc_hf.training.losses import HeadLoss
from rcc_hf.training.parts import TRAINED_BY_DEFAULT, choose_parts, set_dtype
from rcc_hf.training.sequences import LongSequences


class GraphBytes:
    """Most bytes that graphs hold at a time, counted where tensors are saved for backward."""

    class _Box:
        def __init__(self, owner: "GraphBytes", tensor: Tensor):
            self.owner, self.tensor = owner, tensor.detach()
            owner.now += tensor.nbytes
            owner.most = max(owner.most, owner.now)

        def __del__(self) -> None:
            self.owner.now -= self.tensor.nbytes

    def __init__(self) -> None:
        self.now = self.most = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Graphs that are made in the block count."""
        with torch.autograd.graph.saved_tensors_hooks(lambda x: self._Box(self, x), lambda box: box.tensor):
            yield


def problem_of(model: RCCForCausalLM, num_segments: int, settings: argparse.Namespace) -> LongSequences:
    """A text of random tokens; its loss is the mean over all that is predicted."""
    width = model.config.segment_length
    generator = torch.Generator().manual_seed(num_segments)
    shape = (settings.batch, num_segments * width)
    ids = torch.randint(model.config.text_config.vocab_size, shape, generator=generator).to(model.device)
    labels = ids.clone()
    labels[:, :width] = IGNORED
    count = settings.batch * (num_segments - 1) * (width - 1)

    def loss_of(part: Tensor) -> HeadLoss:
        return HeadLoss(model.lm_head, list(model.lm_head.parameters()), part, num_items=count, chunk=4096)

    return LongSequences(
        model, ids, labels, ratio=None, loss_of=loss_of, propagate=Tensor.backward, at_a_time=settings.engine_segments
    )


def measure(model: RCCForCausalLM, num_segments: int, engine: Callable, settings: argparse.Namespace) -> dict[str, Any]:
    """One row: seconds, and the most memory."""
    is_cuda, seconds, held = model.device.type == "cuda", [], GraphBytes()
    for repeat in range(settings.repeats + 1):
        problem = problem_of(model, num_segments, settings)
        model.zero_grad(set_to_none=True)
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        if is_cuda or repeat:
            engine(problem)
        else:
            with held.counted():
                engine(problem)
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    tokens = settings.batch * num_segments * model.config.segment_length
    median = statistics.median(seconds[1:])
    peak = torch.cuda.max_memory_allocated() if is_cuda else held.most
    return {"seconds": median, "microseconds_per_token": 1e6 * median / tokens, "peak_bytes": peak}


def run(settings: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows; written after each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"segment_length": settings.segment_length, "ratio": settings.ratio, "fit_positions": True}
    model = load_model(settings.model, dtype=settings.dtype, **options)
    torch.nn.Module.to(model, device).train()
    choose_parts(model, TRAINED_BY_DEFAULT)
    set_dtype(model, torch.float32)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    rows: list[dict[str, Any]] = []
    report = {**surroundings(device), "settings": {k: str(v) for k, v in vars(settings).items()}, "rows": rows}
    for name in settings.engines:
        for num_segments in sorted(settings.segments):
            engine = choose_engine(name, size=settings.engine_segments, seed=0)
            row: dict[str, Any] = {"engine": name, "num_segments": num_segments}
            row["num_tokens"] = num_segments * settings.segment_length
            try:
                row |= measure(model, num_segments, engine, settings)
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
            rows.append(row)
            settings.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            sys.stdout.write(line(row))
            sys.stdout.flush()
            if "error" in row:
                model.zero_grad(set_to_none=True)
                break
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    found = row.get("error") or (
        f"{row['seconds']:.2f} | {row['microseconds_per_token']:.1f} | {row['peak_bytes'] / 2**30:.2f}"
    )
    return f"| {row['engine']} | {row['num_tokens']:,} | {found} |\n"


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Time a token and memory against length."""
    styles = assign_styles([row["engine"] for row in rows])
    with figure_style():
        figure, axes = new_figure("Gradients through long texts", height=3.6, columns=2)
        handles = []
        for name, style in styles.items():
            done = [row for row in rows if row["engine"] == name and "error" not in row]
            lengths = [row["num_tokens"] for row in done]
            for one, key, scale in zip(axes, ("microseconds_per_token", "peak_bytes"), (1, 2**30), strict=True):
                (drawn,) = one.plot(lengths, [row[key] / scale for row in done], **style.line(), label=name)
            handles.append(drawn)
        for one, label in zip(axes, ("microseconds a token", "peak memory, GiB"), strict=True):
            one.set_xscale("log", base=2)
            one.set_xlabel("tokens of the text")
            one.set_ylabel(label)
            one.set_ylim(bottom=0)
        add_legend(figure, handles)
    save({file.stem: figure}, file.parent, [file.suffix.removeprefix(".")])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON")
    parser.add_argument("--model", default="smollm2", help="base (default: smollm2)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="only these")
    parser.add_argument("--segments", type=int, nargs="+", default=[4, 16, 64, 195], help="(default: 4 16 64 195)")
    parser.add_argument("--segment_length", type=int, default=512, help="(default: 512)")
    parser.add_argument("--ratio", type=int, default=32, help="(default: 32)")
    parser.add_argument("--batch", type=int, default=1, help="texts at a time (default: 1)")
    parser.add_argument("--engine_segments", type=int, default=2, help="as of the training settings (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="measured passes (default: 3)")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="recompute layers in backward")
    parser.add_argument("--dtype", default="bfloat16", help="of the base (default: bfloat16)")
    parser.add_argument("--plot", type=Path, help="picture, .png or .svg")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, write, and draw."""
    settings = parse(argv)
    sys.stdout.write("| engine | tokens | seconds | µs a token | peak GiB |\n|---|---|---|---|---|\n")
    rows = run(settings)
    if settings.plot is not None:
        draw(rows, settings.plot)


if __name__ == "__main__":
    main()
