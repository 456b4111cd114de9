# SPDX-License-Identifier: Apache-2.0
"""What a compressor can do, measured while it is trained: texts written down from memory, questions answered from it.

Nothing is fed in but what the model itself has generated, greedily; so it is stricter than the losses, which see the
true tokens. Predictions and metrics of each time are kept in `<output>/quality/step-<n>/<probe>_r<ratio>/`, in the form
of `rcc evaluate`.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rcc_hf.evaluation.benchmark_qa import template_of
from rcc_hf.evaluation.encoding import Encoder, TextEncoder
from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.methods import make_method
from rcc_hf.evaluation.outputs import RunFolder
from rcc_hf.evaluation.passages import ReconstructionEncoder
from rcc_hf.evaluation.processes import Processes
from rcc_hf.evaluation.reports import check_metrics
from rcc_hf.evaluation.runner import evaluate
from rcc_hf.evaluation.tasks import TaskSettings, build_examples
from rcc_hf.modeling.modeling_rcc import RCCForCausalLM
from rcc_hf.objectives.prompting import phrase
from rcc_hf.texts import QARow, read_qa_rows

__all__ = ["Probe", "Quality", "QualitySettings", "make_probes", "quality_callbacks"]

QUESTION_METRICS = {"exact_match": "exact_match", "f1": "f1"}
RECONSTRUCTION_METRICS = {"bleu4": "bleu4", "exact_match": "reconstruction_exact_match"}


@dataclass(kw_only=True)
class QualitySettings:
    """What is measured while training, by generating freely."""

    quality_data: str | None = field(
        default=None,
        metadata={"help": "Held-out texts to be written down from memory: prose-held-out, a file, a folder."},
    )
    quality_questions: str | None = field(
        default=None, metadata={"help": "JSON lines of questions to be answered from memory, as of rcc evaluate qa."}
    )
    quality_ratios: list[int] | None = field(
        default=None, metadata={"help": "Ratios at which both are done; default: the model's."}
    )
    quality_examples: int = field(default=16, metadata={"help": "Passages, and questions, each time."})
    quality_segments: int = field(default=1, metadata={"help": "Segments of each passage."})
    quality_steps: int = field(default=500, metadata={"help": "Steps between measurements; the last step is one, too."})

    def __post_init__(self) -> None:
        for name in ("quality_examples", "quality_segments", "quality_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Examples that are answered again and again.

    Attributes:
        name: Of its folders.
        examples: The same ones each time.
        encode: Makes ids of an example.
        metrics: Names in the log, by name of the metric.
    """

    name: str
    examples: Sequence[Example]
    encode: Encoder
    metrics: dict[str, str]


def make_probes(
    model: RCCForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: QualitySettings, prompt_ids: Sequence[int]
) -> list[Probe]:
    """The probes that the settings ask for; those without data are none.

    Raises:
        ValueError: texts are too short, or a file is wrong.
        ModuleNotFoundError: a metric needs a package that is not installed, or the bundled prose is.
    """
    probes, count = [], settings.quality_examples
    if settings.quality_data is not None:
        length = model.config.segment_length * settings.quality_segments
        task = TaskSettings(data=settings.quality_data, lengths=[length], num_examples=count)
        prompt = str(tokenizer.decode(list(prompt_ids)))
        segment = model.config.segment_length
        examples = build_examples("reconstruction", tokenizer, task, segment_length=segment, prompt=prompt)
        encode: Encoder = ReconstructionEncoder(tokenizer, prompt_ids)
        probes.append(Probe(name="reconstruction", examples=examples, encode=encode, metrics=RECONSTRUCTION_METRICS))
    if settings.quality_questions is not None:
        asked = [_question(row) for row in read_qa_rows(settings.quality_questions)[:count]]
        probes.append(Probe(name="questions", examples=asked, encode=TextEncoder(tokenizer), metrics=QUESTION_METRICS))
    for probe in probes:
        check_metrics(probe.examples)
    return probes


def _question(row: QARow) -> Example:
    """A row as it is asked in training."""
    template = template_of(row.answers)
    question, prefix = phrase(row, template_of)
    return Example(
        context=row.context,
        question=question,
        answer_prefix=prefix,
        answer=row.answers,
        max_new_tokens=template.max_new_tokens if row.max_new_tokens is None else row.max_new_tokens,
        task="questions",
        metric="squad",
    )


class Quality(TrainerCallback):
    """Measures the probes every so many steps, all processes each their share, and logs the results.

    Logged are `eval_bleu4_r<ratio>`, `eval_reconstruction_exact_match_r<ratio>`, `eval_exact_match_r<ratio>` and
    `eval_f1_r<ratio>`.

    Attributes:
        trainer: Whose log it writes to; `rcc_hf.training.train` sets it.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        tokenizer: PreTrainedTokenizerBase,
        *,
        ratios: Sequence[int],
        steps: int,
        batch_size: int = 16,
    ):
        """Args:
        probes: What is asked.
        tokenizer: Of the model.
        ratios: At each of which it is asked.
        steps: Between two measurements.
        batch_size: Contexts that are decoded together.
        """
        self.probes, self.tokenizer, self.ratios = probes, tokenizer, ratios
        self.steps, self.batch_size = steps, batch_size
        self.trainer: Any = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0 or state.global_step == state.max_steps:
            folder = Path(str(args.output_dir)) / "quality" / f"step-{state.global_step}"
            found = self.measure(folder)
            if found:
                self.trainer.log(found)

    def measure(self, folder: Path) -> dict[str, float]:
        """The results of all probes, which are written to the folder; in all processes but the first none."""
        model, accelerator = self.trainer.core(), self.trainer.accelerator
        processes = Processes(accelerator.process_index, accelerator.num_processes)
        if processes.index == 0:
            # of a run that was killed behind its last checkpoint, and goes on from there
            shutil.rmtree(folder, ignore_errors=True)
        processes.wait()
        was_training = model.training
        found: dict[str, float] = {}
        model.eval()
        try:
            with self.trainer.throughput.paused(), accelerator.autocast():
                for probe in self.probes:
                    for ratio in self.ratios:
                        found |= self._ask(probe, ratio, model, folder / f"{probe.name}_r{ratio}", processes)
        finally:
            model.train(was_training)
        return found

    def _ask(
        self, probe: Probe, ratio: int, model: RCCForCausalLM, path: Path, processes: Processes
    ) -> dict[str, float]:
        about = {"task": probe.name, "method": "rcc", "ratio": ratio}
        with RunFolder(path, about, process_index=processes.index) as folder:
            metrics = evaluate(
                model,
                self.tokenizer,
                probe.examples,
                # questions may have contexts shorter than a segment, of which nothing would be compressed
                make_method("rcc", model, ratio, fill_id=self.tokenizer.eos_token_id),
                folder,
                batch_size=self.batch_size,
                encode=probe.encode,
                about=about,
                processes=processes,
                progress=False,
            )
        if processes.index:
            return {}
        return {f"eval_{shown}_r{ratio}": metrics[name] for name, shown in probe.metrics.items()}


def quality_callbacks(
    model: RCCForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: QualitySettings, prompt_ids: Sequence[int]
) -> list[TrainerCallback]:
    """What measures quality as the settings say: one callback, or none if they name no data.

    Raises:
        ValueError: as `make_probes`.
        ModuleNotFoundError: as `make_probes`.
    """
    probes = make_probes(model, tokenizer, settings, prompt_ids)
    ratios = settings.quality_ratios or [model.config.ratio]
    return [Quality(probes, tokenizer, ratios=ratios, steps=settings.quality_steps)] if probes else []
