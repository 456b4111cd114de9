# SPDX-License-Identifier: Apache-2.0
"""`rcc evaluate`: a model, or a baseline of it, on a task; metrics, predictions and settings go into a folder."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rcc_hf.checkpoints import loading_options
from rcc_hf.cli.evaluate_settings import ASKING, EvaluateSettings
from rcc_hf.cli.loading import load
from rcc_hf.cli.settings import ModelSettings, parse
from rcc_hf.evaluation.answers import AnswerReader
from rcc_hf.evaluation.cost import cost_examples, evaluate_cost
from rcc_hf.evaluation.encoding import Encoder, TextEncoder, encode_text, prefix_ids
from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.instructions import InstructionEncoder, WrittenInstructions
from rcc_hf.evaluation.methods import METHODS, make_method
from rcc_hf.evaluation.outputs import RunFolder
from rcc_hf.evaluation.passages import ReconstructionEncoder
from rcc_hf.evaluation.perplexity import Continuation, continuations, evaluate_perplexity
from rcc_hf.evaluation.processes import Processes, close_processes, join_processes
from rcc_hf.evaluation.runner import evaluate
from rcc_hf.evaluation.tasks import GROUP_BY, TaskSettings, build_examples, check_data
from rcc_hf.modeling.fingerprint_rcc import fingerprint
from rcc_hf.objectives import RECONSTRUCTION_PROMPT
from rcc_hf.smollm import resolve_base
from rcc_hf.surroundings import surroundings

# What kvpress calls compression ratio is the share that is left out.
_WITHOUT_RATIO = {"full": 0.0, "wrong": 0.0, "none": 1.0}


@dataclass(frozen=True)
class _Run:
    """All that the ratios of a command share."""

    settings: EvaluateSettings
    task: TaskSettings
    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processes: Processes
    config: dict[str, Any]
    work: "_Work"


@dataclass(frozen=True)
class _Work:
    """What is done: examples, how they become ids and ids answers, or continuations."""

    examples: Sequence[Example] = ()
    encode: Encoder | None = None
    answers: AnswerReader | None = None
    continuations: Sequence[Continuation] = ()

    def contexts(self) -> list[torch.Tensor]:
        """Ids of two different contexts, to be read in the place of others; less if there are no two."""
        if self.encode is None:
            found = {item.example.context: item.history for item in self.continuations}
            return list(found.values())[:2]
        chosen = list({example.context: example for example in self.examples}.values())[:2]
        return [self.encode(example)[0] for example in chosen]


def run(argv: list[str]) -> int:
    """Evaluate, and print the means."""
    positionals = {"model": "RCC checkpoint, or a base: id on the Hub, folder, or smollm2 (bundled)"}
    settings, task, how, names = parse(
        argv, "evaluate", "Measure a model on a task.", positionals, EvaluateSettings, TaskSettings, ModelSettings
    )
    if settings.method not in METHODS:
        raise ValueError(f"there is no method {settings.method!r}; choose one of {', '.join(METHODS)}")
    if settings.task == "cost" and _is_control(settings.method):
        raise ValueError(f"{settings.method} costs what the method does whose reading it takes; measure that one")
    if settings.fill_segments and settings.task not in ASKING:
        raise ValueError(
            f"fill_segments is for {', '.join(ASKING)}, and the task is {settings.task}; texts to reconstruct have "
            "--tail pad"
        )
    check_data(settings.task, task)
    processes = join_processes()
    try:
        return _run(settings, task, how, names.model, processes)
    finally:
        close_processes(processes)


def _run(settings: EvaluateSettings, task: TaskSettings, how: ModelSettings, name: str, processes: Processes) -> int:
    if settings.task == "cost" and processes.count > 1:
        raise ValueError("cost is measured by one process; start it without a launcher")
    if how.device == "auto" and processes.device is not None:
        how = replace(how, device=processes.device)
    model, tokenizer = _load(name, how)
    config = {
        "task": settings.task,
        "model": name,
        "base": how.base,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": fingerprint(model.parameters()),
        "method": settings.method,
        "chat": settings.chat,
        "max_context_length": settings.max_context_length,
        "segment_length": _segment_length(model, settings),
        # folders that were written before there were these settings can be gone on with
        **({"fill_segments": True} if settings.fill_segments else {}),
        **_instruction(settings),
        **asdict(task),
    }
    ratios = _ratios(model, settings)
    work = _make_work(settings, task, model, tokenizer)
    shared = _Run(settings, task, name, model, tokenizer, processes, config, work)
    folder = Path(settings.output)
    if len(ratios) == 1:
        found = [_evaluate(shared, ratios[0], folder)]
    else:
        found = [_evaluate(shared, ratio, folder / f"ratio-{ratio}") for ratio in ratios]
    if processes.index == 0:
        if len(ratios) > 1:
            about = {"task": settings.task, "method": settings.method, "model": name, "ratios": ratios}
            _write_json(folder / "metrics.json", {**about, "runs": found})
        _print(found)
        print(f"wrote {folder}")
    return 0


def _load(name: str, how: ModelSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An RCC checkpoint, or a base as it is."""
    path = resolve_base(name)
    found = PreTrainedConfig.get_config_dict(path)[0]
    if found.get("model_type") == "rcc":
        return load(name, how)
    device = how.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options = loading_options(found, how.dtype, how.attn_implementation, device)
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    torch.nn.Module.to(model, device)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def _is_rcc(model: PreTrainedModel) -> bool:
    return bool(model.config.model_type == "rcc")


def _ratios(model: PreTrainedModel, settings: EvaluateSettings) -> list[int]:
    """Those asked for, each of which the model can do."""
    if not _is_rcc(model):
        return list(dict.fromkeys(settings.ratio or [32]))
    return list(dict.fromkeys(model.config.check_ratio(ratio) for ratio in settings.ratio or [model.config.ratio]))


def _segment_length(model: PreTrainedModel, settings: EvaluateSettings) -> int:
    if not _is_rcc(model):
        return settings.segment_length or 1024
    if settings.segment_length not in (None, model.config.segment_length):
        raise ValueError(
            f"segment_length is {settings.segment_length}, and the checkpoint has {model.config.segment_length}; it "
            "can be set for a plain base only"
        )
    return int(model.config.segment_length)


def _evaluate(shared: _Run, ratio: int, path: Path) -> dict[str, Any]:
    """One run in its folder."""
    settings, task, work, model = shared.settings, shared.task, shared.work, shared.model
    options = _others(settings.method, work) | {"prefix_length": len(prefix_ids(shared.tokenizer))}
    if settings.segment_length is not None and not _is_rcc(model):
        options["segment_length"] = settings.segment_length
    if _is_filled(settings, task):
        options["fill_id"] = _fill_id(shared.tokenizer)
    method = make_method(settings.method, model, ratio, **options)
    common: dict[str, Any] = {"about": _about(shared, ratio), "progress": settings.progress}
    config = {**shared.config, "ratio": ratio, **_names_of_kvpress(shared, ratio)}
    if settings.task == "cost":  # nothing else depends on it
        config["batch_size"] = settings.batch_size or 1
    with RunFolder(path, config, process_index=shared.processes.index) as folder:
        if shared.processes.index == 0:
            run = {"batch_size": settings.batch_size, "environment": surroundings(model.device)}
            _write_json(path / "config.json", run | config)
        if settings.task == "cost":
            common |= {"num_runs": task.num_examples or 5, "batch_size": settings.batch_size or 1}
            return evaluate_cost(model, shared.tokenizer, work.examples, method, folder, **common)
        common |= {"batch_size": settings.batch_size or 8, "batch_tokens": settings.batch_tokens}
        common |= {"processes": shared.processes}
        if settings.task == "perplexity":
            return evaluate_perplexity(model, work.continuations, method, folder, **common)
        common |= {"encode": work.encode, "answers": work.answers, "group_by": GROUP_BY[settings.task]}
        return evaluate(model, shared.tokenizer, work.examples, method, folder, **common)


def _is_filled(settings: EvaluateSettings, task: TaskSettings) -> bool:
    """Whether the last segment of each context is filled up."""
    return settings.fill_segments or (settings.task == "reconstruction" and task.tail == "pad")


def _fill_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token to fill segments up with; leave out fill_segments, and use another "
            "tail than pad"
        )
    return int(tokenizer.eos_token_id)


def _others(method: str, work: _Work) -> dict[str, Any]:
    """Contexts that a control reads where its batch has no second one."""
    if not _is_control(method):
        return {}
    contexts = work.contexts()
    if len(contexts) < 2:
        raise ValueError(f"{method} reads the context of another example, and there is only one; give more examples")
    return {"others": contexts}


def _is_control(method: str) -> bool:
    return method.startswith("wrong")


def _about(shared: _Run, ratio: int) -> dict[str, Any]:
    """What metrics.json begins with."""
    task = shared.task
    about = {"task": shared.settings.task, "method": shared.settings.method, "model": shared.name, "ratio": ratio}
    source = task.data and (Path(task.data).name if Path(task.data).exists() else task.data)
    data = "/".join(filter(None, [task.benchmark, source, "+".join(task.subsets or [])]))
    if task.context_tokens is not None:
        data += f", {task.context_tokens} tokens"
    segments = {"segment_length": shared.config["segment_length"], "filled": _is_filled(shared.settings, task)}
    asked = {"segments": segments, "chat": shared.settings.chat, **_instruction(shared.settings)}
    return about | ({"data": data} if data else {}) | asked


def _instruction(settings: EvaluateSettings) -> dict[str, str]:
    """Where the question stands, if not behind the memory."""
    return {} if settings.instruction == "typed" else {"instruction": settings.instruction}


def _names_of_kvpress(shared: _Run, ratio: int) -> dict[str, Any]:
    """The settings that its config.yaml has under other names."""
    return {
        "dataset": shared.task.benchmark or shared.settings.task,
        "data_dir": ",".join(shared.task.subsets or []) or None,
        "press_name": shared.settings.method,
        "compression_ratio": _WITHOUT_RATIO.get(shared.settings.method, 1 - 1 / ratio),
        "query_aware": False,
    }


def _make_work(
    settings: EvaluateSettings, task: TaskSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> _Work:
    if settings.task == "cost":
        return _Work(cost_examples(task))
    if settings.task == "perplexity":
        return _Work(continuations=continuations(tokenizer, task))
    prompt_ids = getattr(model.config, "reconstruction_prompt_ids", None)
    if prompt_ids is None:
        prompt_ids = encode_text(tokenizer, RECONSTRUCTION_PROMPT).tolist()
    segment_length, prompt = _segment_length(model, settings), str(tokenizer.decode(prompt_ids))
    examples = build_examples(settings.task, tokenizer, task, segment_length=segment_length, prompt=prompt)
    if settings.task == "reconstruction":
        return _Work(examples, ReconstructionEncoder(tokenizer, prompt_ids))
    options: dict[str, Any] = {"chat": settings.chat, "max_context_length": settings.max_context_length}
    if settings.instruction == "typed":
        return _Work(examples, TextEncoder(tokenizer, **options))
    encode = InstructionEncoder(tokenizer, settings.instruction, **options)
    answers = WrittenInstructions(tokenizer, chat=settings.chat) if settings.instruction == "reconstructed" else None
    return _Work([encode.with_question(example) for example in examples], encode, answers)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def _print(found: Sequence[dict[str, Any]]) -> None:
    for metrics in found:
        print(f"{metrics['task']}, {metrics['method']}, ratio {metrics['ratio']}: {metrics['num_examples']} rows")
        for name, value in metrics["overall"].items():
            error = f" +- {value['stderr']:.4f}" if "stderr" in value else ""
            print(f"  {name:24} {value['mean']:.4f}{error}")
        if not metrics["overall"]:
            for group in metrics["groups"]:
                shown = (f"{name} {value:.4g}" for name, value in group.items() if isinstance(value, (int, float)))
                print(f"  {', '.join(shown)}")
