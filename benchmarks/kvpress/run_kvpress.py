# SPDX-License-Identifier: Apache-2.0
"""Answers examples with a press of kvpress that keeps as many entries of each context as `rcc` would.

Runs in an environment of its own; see README.md beside this file. What it writes is the folder of a run of
`rcc evaluate`, but for metrics.json, which `score_run.py` makes of it.
"""

import argparse
import contextlib
import json
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from borrowed import Example, RunFolder, TextEncoder, budget, entry_nbytes, read_examples  # isort: skip
import torch
import transformers
from kvpress import KVPressTextGenerationPipeline
from presses import PRESSES, count_entries, make_press, without_template
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, PreTrainedModel


class Runner:
    """Reads contexts with a press, and asks about them."""

    def __init__(self, settings: argparse.Namespace):
        self.settings = settings
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model)
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype))
        self.model: PreTrainedModel = model.to(settings.device).eval()
        self.encode = TextEncoder(self.tokenizer, chat=settings.chat, max_context_length=settings.max_context_length)
        self.pipeline = KVPressTextGenerationPipeline(model=self.model, tokenizer=self.tokenizer)

    @torch.no_grad()
    def read(self, context: torch.Tensor) -> tuple[Cache, float]:
        """The cache of a context `[T]`, and the entries that are left of it.

        Raises:
            RuntimeError: the press has kept another number than it was asked to.
        """
        length, settings = len(context), self.settings
        filled = settings.fill_segments
        allowed = budget(length, settings.ratio, settings.segment_length, settings.head_length, filled=filled)
        allowed = min(length, allowed)  # what is filled up may have more slots than tokens
        press, cache = make_press(settings.press, length, allowed), DynamicCache()
        with contextlib.nullcontext() if press is None else press(self.model):
            # without the head, as kvpress's pipeline does
            self.model.model(input_ids=context[None].to(self.model.device), past_key_values=cache)
        kept = count_entries(self.model, cache, length)
        wanted = length if settings.press == "full" else allowed
        if abs(kept - wanted) > 0.01:
            raise RuntimeError(f"{settings.press} has kept {kept} of {length} entries; the budget is {wanted}")
        return cache, kept

    @torch.no_grad()
    def answer(self, cache: Cache, length: int, prompt: torch.Tensor, max_new_tokens: int) -> str:
        """What follows a prompt `[T]` behind a context of `length` tokens, whose cache stays as it is."""
        sizes = [cache.get_seq_length(index) for index in range(len(cache))]
        made = self.pipeline.generate_answer(
            question_ids=prompt[None].to(self.model.device),
            cache=cache,
            context_length=length,
            max_new_tokens=max_new_tokens,
        )
        for layer, size in zip(cache.layers, sizes, strict=True):
            layer.keys, layer.values = layer.keys[:, :, :size], layer.values[:, :, :size]
        return made

    def rows(self, examples: list[Example], indices: list[int]) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Index, answer and columns of examples that share a context."""
        encoded = [self.encode(examples[index]) for index in indices]
        context = encoded[0][0]
        (cache, kept), read_seconds = self.timed(self.read, context)
        for index, (_, prompt) in zip(indices, encoded, strict=True):
            limit = examples[index].max_new_tokens
            made, seconds = self.timed(self.answer, cache, len(context), prompt, limit)
            columns = {
                "context_tokens": len(context),
                "entries": kept,
                "nbytes": round(kept * entry_nbytes(self.model)),
                "compression_ratio": round(1 - kept / len(context), 6),
                "read_seconds": read_seconds / len(indices),
                "generate_seconds": seconds,
            }
            yield index, made, columns

    def timed(self, function, *arguments) -> tuple[Any, float]:
        """What a function returns, and the seconds until its work on the device is done."""
        wait = torch.cuda.synchronize if self.model.device.type == "cuda" else (lambda: None)
        wait()
        start = time.perf_counter()
        result = function(*arguments)
        wait()
        return result, time.perf_counter() - start


def parse() -> argparse.Namespace:
    """The settings of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or id of a base model")
    parser.add_argument("examples", type=Path, help="JSON lines, as rcc_hf.evaluation.examples.write_examples makes")
    parser.add_argument("output", type=Path, help="folder to write; a run that was killed goes on there")
    parser.add_argument("--press", choices=["full", *PRESSES], default="snapkv", help="(default: snapkv)")
    parser.add_argument("--ratio", type=int, default=32, help="tokens per slot of rcc (default: 32)")
    parser.add_argument("--segment-length", type=int, default=1024, help="tokens per segment of rcc (default: 1024)")
    parser.add_argument("--head-length", type=int, default=0, help="raw tokens in front of its slots (default: 0)")
    parser.add_argument("--fill-segments", action="store_true", help="as of rcc evaluate, for the budget")
    parser.add_argument("--max-context-length", type=int, help="tokens of a context; a longer one loses its end")
    parser.add_argument("--chat", action="store_true", help="put the question into the tokenizer's chat template")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: a GPU)")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights (default: bfloat16)")
    return parser.parse_args()


def main() -> None:
    """Answer what the folder has no prediction of yet."""
    settings = parse()
    examples = read_examples(settings.examples)
    names = ("model", "press", "ratio", "segment_length", "head_length", "fill_segments", "max_context_length", "chat",
             "dtype")  # fmt: skip
    config = {name: getattr(settings, name) for name in names} | {
        "method": settings.press,
        "examples": settings.examples.name,
        "kvpress": version("kvpress"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    runner = Runner(settings)
    with RunFolder(settings.output, config) as folder, without_template(runner.model, runner.tokenizer):
        units: dict[str, list[int]] = {}
        for index in folder.remaining(examples):
            units.setdefault(examples[index].context, []).append(index)
        for done, unit in enumerate(units.values(), 1):
            for index, answer, columns in runner.rows(examples, unit):
                folder.add(index, examples[index], answer, **columns)
            sys.stderr.write(f"\r{done} of {len(units)} contexts")
        folder.merge()
    sys.stdout.write(json.dumps({"folder": str(settings.output), "predictions": len(examples)}) + "\n")


if __name__ == "__main__":
    main()
