# SPDX-License-Identifier: Apache-2.0
"""The settings of tasks: what is asked about which data."""

from dataclasses import dataclass, field

from rcc_hf.evaluation.fillers import FILLERS
from rcc_hf.evaluation.passages import Tail
from rcc_hf.evaluation.readers import BENCHMARKS
from rcc_hf.evaluation.ruler import RULER_TASKS

__all__ = ["TaskSettings"]


@dataclass(kw_only=True)
class TaskSettings:
    """What is asked."""

    data: str | None = field(
        default=None,
        metadata={"help": "JSON lines: texts for reconstruction or perplexity (also .txt, .md, a folder, prose; "
                  "default: prose-held-out), examples for qa; a benchmark's file, folder, or name on the Hub."},
    )  # fmt: skip
    benchmark: str | None = field(
        default=None, metadata={"help": f"Format of the data of benchmark (and qa): {', '.join(BENCHMARKS)}."}
    )
    subsets: list[str] | None = field(default=None, metadata={"help": "Parts of the benchmark."})
    split: str = field(default="test", metadata={"help": "Split of a benchmark on the Hub."})
    lengths: list[int] | None = field(
        default=None,
        metadata={"help": "Tokens of contexts that are made or cut out. Default: passkey and needles 2048 8192 32768, "
                  "ruler 4096, reconstruction 1 and 2 segments (with data: each text whole), perplexity 0 512 2048 "
                  "8192, cost 2048 8192 32768."},
    )  # fmt: skip
    depths: list[float] = field(
        default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0],
        metadata={"help": "Where a needle is hidden: 0 is the beginning, 1 the end."},
    )
    num_examples: int | None = field(
        default=None,
        metadata={"help": "Examples of each length (and depth, ruler task): 1 for needles, else 8; of data: at most so "
                  "many, default all. Runs of each length for cost: 5."},
    )  # fmt: skip
    fillers: list[str] = field(
        default_factory=lambda: ["repetitive"],
        metadata={"help": "Text around needles, of repetitive, words, books."},
    )
    key_types: list[str] = field(
        default_factory=lambda: ["number"], metadata={"help": "What needles hold, of number, uuid."}
    )
    num_digits: int = field(default=5, metadata={"help": "Digits of a number that is hidden."})
    num_needles: int = field(default=4, metadata={"help": "Needles of the task needles."})
    num_queries: int = field(default=4, metadata={"help": "How many of these are asked for at once."})
    ruler_tasks: list[str] | None = field(
        default=None,
        metadata={"help": f"Of {', '.join(RULER_TASKS)}. Default: all; without data (SQuAD's or HotpotQA's file) all "
                  "but the last two."},
    )  # fmt: skip
    tail: Tail = field(
        default="cut",
        metadata={"help": "Tokens behind the last whole segment of a text to reconstruct: cut, raw (kept as they are), "
                  "pad (the segment is filled up)."},
    )  # fmt: skip
    num_tokens: int | None = field(
        default=None, metadata={"help": "Tokens behind a history for perplexity (256), or generated for cost (64)."}
    )
    context_tokens: int | None = field(
        default=None,
        metadata={"help": "Fill each context of qa up to so many tokens with contexts of other questions, which do not "
                  "hold the answer; its own stands at a random place among them."},
    )  # fmt: skip
    metric: str | None = field(default=None, metadata={"help": "Metric of qa or benchmark, instead of the example's."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest answer, instead of the example's."})
    fraction: float = field(default=1.0, metadata={"help": "Share of lengths and depths, or of examples, to use."})
    seed: int = field(default=42, metadata={"help": "Seed of all that is made or chosen."})

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}; it must be above 0 and at most 1")
        for name in ("num_examples", "num_tokens", "max_new_tokens", "context_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if any(length < 0 for length in self.lengths or ()):
            raise ValueError(f"lengths are {self.lengths}; they are numbers of tokens")
        for name, known in (("fillers", FILLERS), ("key_types", ("number", "uuid")), ("ruler_tasks", RULER_TASKS)):
            unknown = [value for value in getattr(self, name) or () if value not in known]
            if unknown:
                raise ValueError(f"{name} has {', '.join(unknown)}; choose of {', '.join(known)}")
        if self.benchmark is not None and self.benchmark not in BENCHMARKS:
            raise ValueError(f"benchmark is {self.benchmark!r}; it must be one of {', '.join(BENCHMARKS)}")
