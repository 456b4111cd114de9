# SPDX-License-Identifier: Apache-2.0
"""How fast we are beside the base, on models of published shapes with random weights, both sides in turns.

    python benchmarks/speed/run.py OUTPUT.json [--shapes llama-3.1-8b] [--parts first_token decode] [--help]

The file is written after every row; a call that was killed goes on where it was, with what failed or was skipped as
well. `report.py` makes tables and figures of it. Nothing is downloaded. Training steps have a benchmark of their own,
`benchmarks/training_speed.py`.

On a GPU, PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True leaves more room for the longest contexts.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from context import Context, Key, Part, Results, Settings
from options import PARTS, parse
from record import Record
from shapes import build
from timing import CRASHED, NO_MEMORY, OK, SKIPPED, UNAVAILABLE, Budget, Limits, free, is_out_of_memory, status_of

from rcc_hf.checkpoints import DTYPES
from rcc_hf.surroundings import surroundings
from rcc_hf.training.flops import matmul_rate

SIDES = ("base", "rcc")
SMALL = (
    "This is a SMALL run on a CPU with a tiny model. It shows that all parts work; its numbers say nothing of a GPU, "
    "nor of a real model."
)


def say(text: str) -> None:
    """A line, at once."""
    sys.stdout.write(f"[{datetime.now():%H:%M:%S}] {text}\n")
    sys.stdout.flush()


def plan(shapes: Sequence[str], attentions: Sequence[str], parts: Sequence[str], settings: Settings) -> Iterator[Key]:
    """The keys of all rows, those of one model together."""
    for shape in shapes:
        for attention in attentions:
            for part in PARTS:
                if part in parts:
                    for key in PARTS[part].keys(settings):
                        yield {"part": part, "shape": shape, "attention": attention, **key}


def text_of(row: dict[str, Any]) -> str:
    """A row in one line."""
    key, found = row["key"], row["sides"]
    told = []
    for side, result in found.items():
        if "median_seconds" in result:
            told.append(f"{side} {result['median_seconds']:.4g} s")
        elif result["status"] == OK:
            told.append(f"{side} {(result['peak_bytes'] or result['kept_bytes']) / 2**30:.3g} GiB")
        else:
            told.append(f"{side} {result['status']} ({result.get('reason', '')[:120]})")
    times = [found[side]["median_seconds"] for side in SIDES if "median_seconds" in found[side]]
    ratio = f", {times[0] / times[1]:.3g} times as fast" if len(times) == 2 else ""
    names = [str(key[name]) for name in ("part", "shape", "attention")]
    numbers = [f"{name}={value}" for name, value in key.items() if name not in ("part", "shape", "attention")]
    return f"{' '.join([*names, *numbers])}: {', '.join(told)}{ratio}"


def attention_versions() -> dict[str, str]:
    """Of what computes attention, where it is installed."""
    found = {"cuda": torch.version.cuda} if torch.version.cuda else {}
    for package in ("flash-attn", "flash-attn-3", "flash-attn-4", "triton"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def every(sides: Sequence[str], status: str, reason: str) -> Results:
    """Sides of a row in which nothing is measured."""
    return {side: {"status": status, "reason": reason} for side in sides}


def attempt(part: Part, context: Context, key: Key, sides: Sequence[str]) -> Results:
    """All sides of a row; what fails outside of one of them fails for all."""
    try:
        return part.measure(context, key)
    except Exception as error:  # noqa: BLE001 -- the reason is written down, and the other rows go on
        status, reason = status_of(error)
    if status != CRASHED:
        free(context.device)
    return every(sides, status, reason)


class Models:
    """The models of one shape and attention at a time; made when they are needed."""

    def __init__(self, options: argparse.Namespace, settings: Settings, limits: Limits, record: Record):
        self.options, self.settings, self.limits, self.record = options, settings, limits, record
        self.names: dict[str, str] = {}
        self.context: Context | None = None
        self.problem: tuple[str, str] | None = None

    def of(self, key: Key) -> Context | None:
        """Those of a row; None, with `problem` set, if they cannot be made."""
        names = {name: key[name] for name in ("shape", "attention")}
        if names != self.names:
            self.names, self.context, self.problem = names, None, None
            device = torch.device(self.options.device)
            torch.compiler.reset()  # compiled steps hold the model before
            free(device)
            start = time.perf_counter()
            try:
                pair = build(
                    names["shape"],
                    names["attention"],
                    device,
                    DTYPES[self.options.dtype],
                    ratio=self.options.ratio,
                    segment_length=self.options.segment_length,
                )
                self.context = Context(pair, self.settings, self.limits, self.record, names)
                say(f"made {' '.join(names.values())} in {time.perf_counter() - start:.0f} s")
            except (ImportError, RuntimeError) as error:
                self.problem = (NO_MEMORY if is_out_of_memory(error) else UNAVAILABLE), str(error)
        return self.context


def measure_all(planned: Sequence[Key], models: Models, record: Record, budget: Budget) -> None:
    """All rows that are not done, and a line for each.

    Raises:
        SystemExit: the GPU cannot be used any more by this process; another one goes on behind that row.
    """
    for number, key in enumerate(planned, 1):
        names = models.settings.sides(key["part"])
        if record.is_done(key, names):
            continue
        if budget.left() <= 0:
            sides = every(names, SKIPPED, "no time was left")
        elif (context := models.of(key)) is None:
            assert models.problem is not None
            sides = every(names, *models.problem)
        else:
            own = {name: value for name, value in key.items() if name not in ("part", "shape", "attention")}
            sides = attempt(PARTS[key["part"]], context, own, names)
        say(f"{number}/{len(planned)} {text_of(record.add(key, sides))}")
        if any(side["status"] == CRASHED for side in sides.values()):
            raise SystemExit("the GPU failed; call again to go on with the next row")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is not measured yet."""
    options, settings = parse(argv, str(__doc__))
    device = torch.device(options.device)
    if options.small:
        torch.set_num_threads(1)  # tiny models lose time on more, most of all where cores are shared
    logging.getLogger("transformers").setLevel(logging.ERROR)  # warnings of lengths that no weights were trained for
    here = surroundings(device)
    here["versions"] |= attention_versions()
    setup = {
        "hardware": here["hardware"],
        "dtype": options.dtype,
        "ratio": options.ratio,
        "segment_length": options.segment_length,
        "prompt": settings.prompt,
        "new_tokens": settings.new_tokens,
        "weights": "random",
        "small": options.small,
    }
    size, long = (8192, 1000) if device.type == "cuda" else (512, 40)
    # shares are of what is possible at once; products that go on for a second or two may be slowed down by heat
    ceiling, sustained = (matmul_rate(device, size, DTYPES[options.dtype], repeats=n) / 1e12 for n in (20, long))
    ceilings = {"ceiling_tflops": ceiling, "ceiling_sustained_tflops": sustained, "ceiling_size": size}
    record = Record(options.output, setup, {**here, **ceilings})
    budget = Budget(options.seconds)
    limits = Limits(options.repeats, options.row_seconds, budget)
    if options.small:
        say(SMALL)
    say(f"{here['hardware']}, {options.dtype}, random weights; {ceiling:.4g} TFLOP/s in square products of {size}")
    planned = list(plan(options.shapes, options.attention, options.parts, settings))
    measure_all(planned, Models(options, settings, limits, record), record, budget)
    record.write()
    if options.small:
        say(SMALL)


if __name__ == "__main__":
    main()
