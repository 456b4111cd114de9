# SPDX-License-Identifier: Apache-2.0
"""One variant of ablations.py in a process of its own: how fast it trains, then as many steps as fit into the time.

    python benchmarks/ablation_variant.py FOLDER

`FOLDER/job.json` says what is trained, and `FOLDER/result.json` what came of it. A trial goes through every kind of
batch that the curriculum draws; it compiles what the training behind it uses again, and times the second half of each
kind, when that is done. So the number of steps is known before the first one, and the schedule ends in time.
"""

import gc
import itertools
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerCallback

from rcc_hf.objectives import Mixture, Phase, Phases
from rcc_hf.recipes import Recipe
from rcc_hf.recipes.running import run_recipe
from rcc_hf.surroundings import surroundings
from rcc_hf.training import QualitySettings, TrainSettings

JOB, RESULT = "job.json", "result.json"

Kind = tuple[int, int, str]
"""Ratio, number of segments and objective of a batch."""


class Clock(TrainerCallback):
    """Notes when some steps were done, by their number; waits for the device then, and then alone."""

    def __init__(self, steps: Iterable[int]):
        self._steps, self.times = set(steps), {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self._steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times[state.global_step] = time.perf_counter()


class Watch(Clock):
    """What a training of so many steps took, all of them but the first, in which workers start."""

    def __init__(self, num_steps: int):
        super().__init__((1, num_steps))
        self._last, self.found, self.quality = num_steps, {}, {}

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.found["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._graphs, self._mixture = compiled_graphs(), train_dataloader.dataset

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step == self._last:
            tokens = source_tokens(self._mixture)
            seconds = self.times[self._last] - self.times[1]
            self.found |= {
                "steps": self._last,
                "seconds": seconds,
                "source_tokens": sum(tokens),
                "source_tokens_per_second": sum(tokens[len(tokens) // self._last :]) / seconds,
                "graphs_while_timed": compiled_graphs() - self._graphs,
                "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
            }

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.quality |= {name: value for name, value in logs.items() if name.startswith("eval_bleu4_r")}


def compiled_graphs() -> int:
    """How many graphs this process has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def source_tokens(mixture: Mixture) -> list[int]:
    """Of every example."""
    return [mixture.plan(index)[1].context_length for index in range(len(mixture))]


def shares(phases: Phases) -> dict[Kind, float]:
    """Of all steps, by the kinds of batches that a curriculum draws."""
    found: dict[Kind, float] = {}
    start = 0.0
    for phase in phases:
        for objective in phase.objectives:
            drawn = (phase.ratios_for(objective), phase.segments_for(objective), phase.objectives)
            ratios, segments, objectives = ({k: w / sum(one.values()) for k, w in one.items()} for one in drawn)
            for ratio, number in itertools.product(ratios, segments):
                kind, share = (ratio, number, objective), ratios[ratio] * segments[number] * objectives[objective]
                found[kind] = found.get(kind, 0.0) + (phase.until - start) * share
        start = phase.until
    return found


def one_by_one(kinds: Iterable[Kind]) -> Phases:
    """A curriculum of as many steps of each kind, one kind after the other."""
    kinds = list(kinds)
    return Phases(
        Phase(until=number / len(kinds), ratios={ratio: 1.0}, segments={segments: 1.0}, objectives={objective: 1.0})
        for number, (ratio, segments, objective) in enumerate(kinds, 1)
    )


def seconds_per_step(recipe: Recipe, steps: int, ratios: list[int], dtype: str) -> float:
    """Of the curriculum's mean step, after a trial of so many steps (at least two) of every kind.

    A few held-out texts are measured as well: those that cannot be are refused now, and not after the training.
    """
    kinds = shares(recipe.phases)
    ends = range(steps, steps * len(kinds) + 1, steps)
    half = steps // 2
    clock = Clock(step for end in ends for step in (end - half, end))
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(recipe, folder, steps * len(kinds))
        trial = replace(recipe, phases=one_by_one(kinds))
        run_recipe(trial, settings, dtype=dtype, held_out_examples=1, held_out_ratios=ratios, callbacks=[clock])
    gc.collect()  # model and recorded graphs refer to each other, and their memory would count as the training's
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return sum(
        share * (clock.times[end] - clock.times[end - half]) / half
        for end, share in zip(ends, kinds.values(), strict=True)
    )


def settings_of(recipe: Recipe, output: str | Path, num_steps: int) -> TrainSettings:
    """The recipe's, for so many steps; saved at the end alone."""
    return TrainSettings(**{**recipe.training, "output": str(output), "max_steps": num_steps, "save_steps": num_steps})


def train(job: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Train and measure; the checkpoint goes to `output`."""
    recipe, ratios = Recipe.parse(job["recipe"]), job["ratios"]
    rate = seconds_per_step(recipe, job["trial_steps"], ratios, job["dtype"])
    num_steps = max(2, round(job["seconds"] / rate))
    settings = settings_of(recipe, output, num_steps)
    watch, lengths = Watch(num_steps), sorted(recipe.phases[-1].segments_for("reconstruction"))
    quality = QualitySettings()
    if job["bleu"]:
        quality = QualitySettings(
            quality_data=job["bleu_texts"],
            quality_ratios=ratios,
            quality_examples=job["bleu"],
            quality_steps=num_steps,
        )
    per_ratio = job["held_out_tokens"] / (statistics.fmean(lengths) * recipe.compressor["segment_length"])
    metrics = run_recipe(
        recipe,
        settings,
        dtype=job["dtype"],
        held_out_examples=max(1, round(per_ratio * len(lengths) * len(ratios))),
        held_out_ratios=ratios,
        quality=quality,
        callbacks=[watch],
    )
    for folder in output.glob("checkpoint-*"):
        shutil.rmtree(folder)  # with the state of the optimizer; what was trained is saved beside it
    found = {ratio: held_out(metrics, watch.quality, ratio, lengths) for ratio in ratios}
    return {**watch.found, "checkpoint_bytes_in_bf16": bytes_in_bf16(output), "held_out": found}


def held_out(
    metrics: Mapping[str, float], quality: Mapping[str, float], ratio: int, lengths: list[int]
) -> dict[str, float]:
    """Loss, token accuracy and, if it was measured, BLEU-4 at a ratio; the mean over numbers of segments."""
    ends = [f"reconstruction_r{ratio}_s{number}" for number in lengths]
    found = {
        "loss": statistics.fmean(metrics[f"eval_cross_entropy_{end}"] for end in ends),
        "token_accuracy": statistics.fmean(metrics[f"eval_token_accuracy_{end}"] for end in ends),
    }
    bleu = quality.get(f"eval_bleu4_r{ratio}")
    return found if bleu is None else {**found, "bleu4": bleu}


def bytes_in_bf16(folder: Path) -> int:
    """The size of the tensors of a checkpoint, two bytes a value."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            count += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())
    return 2 * count


def main() -> None:
    """Do the job of a folder."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    result = train(job, folder / "model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    partly = folder / f"{RESULT}.partly"
    partly.write_text(json.dumps({**surroundings(device), "result": result}, indent=2) + "\n", encoding="utf-8")
    partly.rename(folder / RESULT)


if __name__ == "__main__":
    main()
