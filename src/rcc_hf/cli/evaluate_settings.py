# SPDX-License-Identifier: Apache-2.0
"""What `rcc evaluate` is told about a run, beside its task and its model."""

from dataclasses import dataclass, field
from typing import Literal

from rcc_hf.evaluation.instructions import InstructionMode
from rcc_hf.evaluation.methods import METHODS

__all__ = ["ASKING", "EvaluateSettings", "Task"]

ASKING = ("passkey", "needles", "ruler", "qa", "benchmark")
"""Tasks that ask questions about contexts."""

INSTRUCTED = ("qa", "benchmark")
"""Tasks whose questions can be compressed with the context."""
COMPRESSING = ("rcc", "wrong-rcc")
"""Methods that can compress them."""

Task = Literal["reconstruction", "passkey", "needles", "ruler", "qa", "benchmark", "perplexity", "cost"]


@dataclass(kw_only=True)
class EvaluateSettings:
    """What is measured of which method, and where it is written."""

    task: Task = field(metadata={"help": "What is measured."})
    output: str = field(
        metadata={"help": "Folder to write; a run that was killed goes on there. Of several ratios each has its own "
                  "inside, ratio-<r>."},
    )  # fmt: skip
    method: str = field(default="rcc", metadata={"help": f"What is kept of a context: {', '.join(METHODS)}."})
    ratio: list[int] | None = field(
        default=None, metadata={"help": "Source tokens per slot, one or several. Default: the checkpoint's, or 32."}
    )
    chat: bool = field(default=False, metadata={"help": "Put the question into the tokenizer's chat template."})
    max_context_length: int | None = field(
        default=None, metadata={"help": "Tokens of a context; a longer one loses its end."}
    )
    segment_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of the segments to which texts to reconstruct are cut, for a plain base (1024)."},
    )
    fill_segments: bool = field(
        default=False,
        metadata={"help": "Fill the last segment of each context up with end-of-text tokens and compress it too, where "
                  "questions are asked; without, it stays raw."},
    )  # fmt: skip
    instruction: InstructionMode = field(
        default="typed",
        metadata={"help": "Where the question of qa and benchmark stands: typed behind the memory; compressed at the "
                  "end of the context; reconstructed: compressed, and written down again in front of the answer."},
    )  # fmt: skip
    batch_size: int | None = field(
        default=None, metadata={"help": "Contexts, and questions, that go together. Default: 8, for cost 1."}
    )
    batch_tokens: int = field(default=1 << 18, metadata={"help": "Tokens of contexts that go together, about."})
    progress: bool = field(default=True, metadata={"help": "Show a progress bar."})

    def __post_init__(self) -> None:
        if self.instruction == "typed":
            return
        told = f"instruction={self.instruction}"
        if self.task not in INSTRUCTED:
            raise ValueError(f"{told} is for {', '.join(INSTRUCTED)}, and the task is {self.task}; leave it out")
        if self.method not in COMPRESSING:
            raise ValueError(
                f"{told} is for the methods that compress, {', '.join(COMPRESSING)}, and the method is {self.method}; "
                "have its questions typed"
            )
        if not self.fill_segments:
            raise ValueError(
                f"{told} needs fill_segments: without, the end of each context, where the question stands, stays raw"
            )
