# SPDX-License-Identifier: Apache-2.0
"""The control of a compressor: its base with a LoRA of as many parameters, which read the same examples uncompressed.

    python benchmarks/control.py RECIPE.yaml --output DIR [--texts ...] [--questions ...] [--processes 4] [--help]
    rcc evaluate DIR/merged --task qa --data QA.jsonl --method full --chat --output runs/control

Examples are those that `rcc train RECIPE.yaml` draws, in its order and in steps of the same size, but those of
objectives that mean nothing uncompressed (reconstruction, passage) are left out. Say by --processes on how many devices
the compressor was trained: the examples of a step are theirs together. Contexts stand raw in front of the local tokens,
without what fills a last segment up. DIR/adapter is the LoRA, DIR/merged the base with it, DIR/control.json the record.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments, set_seed

from rcc_hf.checkpoints import DTYPES, ensure_reconstruction_prompt, load_model, load_tokenizer, parse_dtype
from rcc_hf.modeling.fingerprint_rcc import is_trained_part
from rcc_hf.objectives import Mixture, collate
from rcc_hf.recipes import OBJECTIVES, Recipe, build_objectives, read_recipe, read_sources
from rcc_hf.recipes.running import mixture_of
from rcc_hf.smollm import resolve_base
from rcc_hf.surroundings import surroundings
from rcc_hf.training import TrainSettings
from rcc_hf.training.settings import training_arguments

SHARED = (
    "max_steps", "batch_size", "accumulation_steps", "learning_rate", "warmup_steps", "schedule", "weight_decay",
    "max_grad_norm", "gradient_checkpointing", "num_workers", "seed", "logging_steps",
)  # fmt: skip
"""Settings of a recipe's training that a LoRA has too; the first three say which examples there are."""
SCALE = 2
"""LoRA's alpha over rank, as that of the compressor's adapters."""


class Uncompressed(Dataset):
    """What a teacher of a mixture's examples would read, of those examples whose objective is wanted, in their order.

    Args:
        mixture: Of the compressor's training; objectives that are wanted give a teacher's text.
        names: The objectives.
        group_size: Examples of the mixture that have an objective in common.
        step_size: Examples of an optimizer step; what is left over behind the last whole one is left out.

    Raises:
        ValueError: there is not a step of them.
    """

    def __init__(self, mixture: Mixture, names: Sequence[str], group_size: int, step_size: int):
        self.mixture = mixture
        starts = [start for start in range(0, len(mixture), group_size) if mixture.plan(start)[0] in names]
        indices = [start + place for start in starts for place in range(group_size)]
        self.num_steps = len(indices) // step_size
        self.indices = indices[: self.num_steps * step_size]
        if not self.num_steps:
            raise ValueError(
                f"the recipe draws {len(indices)} examples of {', '.join(names)}, and a step has {step_size}; give "
                "more --max_steps or other --objectives"
            )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        example = self.mixture[self.indices[index]]
        return {"input_ids": example["teacher_ids"], "labels": example["teacher_labels"]}

    def counts(self) -> dict[str, int]:
        """Of each objective how many examples there are."""
        return dict(Counter(self.mixture.plan(index)[0] for index in self.indices))


@dataclass(frozen=True)
class Plan:
    """What the recipe's compressor tells about its control, which does not need the compressor itself."""

    examples: Uncompressed
    tokenizer: Any
    num_parameters: int


def choose_objectives(recipe: Recipe, wanted: Sequence[str] | None) -> dict[str, Mapping[str, Any]]:
    """Options of the objectives that have a meaning uncompressed, by name; of those that are wanted if any are named.

    Raises:
        ValueError: one that is wanted is not drawn or has none, or there is none at all.
    """
    kinds = {name: OBJECTIVES[options.get("type", name)] for name, options in recipe.drawn().items()}
    possible = [name for name, kind in kinds.items() if "distill" in kind.options()]
    chosen = possible if wanted is None else list(wanted)
    if not chosen or set(chosen) - set(possible):
        raise ValueError(
            f"objectives are {', '.join(chosen) or 'none'}; of those that the recipe draws these mean something "
            f"uncompressed: {', '.join(possible) or 'none'}"
        )
    return {name: {**recipe.objectives[name], "distill": True} for name in chosen}


def make_plan(recipe: Recipe, settings: argparse.Namespace, how: TrainSettings) -> Plan:
    """The examples, and the number of the compressor's parameters; the compressor is loaded and let go."""
    model = load_model(recipe.model, base=settings.base, **recipe.compressor)
    tokenizer = load_tokenizer(model, recipe.model, settings.base)
    chosen = choose_objectives(recipe, settings.objectives)
    sources = read_sources(tokenizer, texts=recipe.texts, questions=recipe.questions, chats=recipe.chats)
    built = build_objectives(chosen, sources, tokenizer, ensure_reconstruction_prompt(model, tokenizer))
    objectives = dict.fromkeys(recipe.drawn()) | built  # the others only take their turns
    mixture = mixture_of(recipe, how, objectives, model.config.segment_length, settings.processes)
    num_parameters = sum(p.numel() for name, p in model.named_parameters() if is_trained_part(name))
    examples = Uncompressed(mixture, list(built), how.batch_size, len(mixture) // how.max_steps)
    return Plan(examples, tokenizer, num_parameters)


def base_of(recipe: Recipe, settings: argparse.Namespace) -> str:
    """Where the plain base is.

    Raises:
        ValueError: the recipe goes on with a checkpoint that names none.
    """
    found = PreTrainedConfig.get_config_dict(resolve_base(recipe.model))[0]
    named = found.get("base_model_name_or_path") if found.get("model_type") == "rcc" else recipe.model
    if settings.base is None and named is None:
        raise ValueError(f"{recipe.model} does not name its base; give it by --base")
    return resolve_base(settings.base or named)


def add_lora(base: PreTrainedModel, num_parameters: int, rank: int | None = None) -> peft.PeftModel:
    """The base with a LoRA of every linear map but the output layer, of about so many parameters.

    Args:
        base: Is frozen.
        num_parameters: That the LoRA should have.
        rank: Instead of the one that this gives.
    """
    head = base.get_output_embeddings()
    linears = [module for module in base.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    per_rank = sum(module.in_features + module.out_features for module in linears)
    rank = max(1, round(num_parameters / per_rank)) if rank is None else rank
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=SCALE * rank, target_modules="all-linear")
    return peft.get_peft_model(base, config)


def arguments_of(how: TrainSettings, num_steps: int, step_size: int, micro_batch: int | None) -> TrainingArguments:
    """The Trainer's arguments; a step has as many examples as one of the compressor's, whatever the devices are.

    Raises:
        ValueError: micro-batches of all processes do not make a step.
    """
    made = training_arguments(replace(how, max_steps=num_steps), has_eval=False)
    on_all = (micro_batch or how.batch_size) * made.world_size
    if step_size % on_all:
        raise ValueError(f"a step has {step_size} examples, and micro-batches of all processes {on_all}: no divisor")
    made.per_device_train_batch_size = on_all // made.world_size
    made.gradient_accumulation_steps = step_size // on_all
    made.train_sampling_strategy, made.save_strategy = "sequential", "no"
    made.bf16, made.logging_first_step = torch.cuda.is_available(), True
    return made


def train(plan: Plan, model: peft.PeftModel, how: TrainSettings, micro_batch: int | None) -> Trainer:
    """Train the LoRA; the Trainer that did."""
    examples, tokenizer = plan.examples, plan.tokenizer
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    step_size = len(examples) // examples.num_steps
    trainer = Trainer(
        model=model,
        args=arguments_of(how, examples.num_steps, step_size, micro_batch),
        train_dataset=examples,
        data_collator=partial(collate, pad_id=pad_id),
    )
    trainer.train()
    return trainer


def merge(base: str, folder: Path, dtype: torch.dtype) -> None:
    """Write `folder/merged`: the base with `folder/adapter`, added up in float32."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(plain, folder / "adapter").merge_and_unload()
    merged.to(dtype).save_pretrained(folder / "merged")


def record(plan: Plan, trainer: Trainer, settings: argparse.Namespace, how: TrainSettings) -> dict[str, Any]:
    """What control.json holds."""
    model, log = trainer.model, trainer.state.log_history
    about = surroundings(trainer.args.device)
    about["versions"]["peft"] = peft.__version__
    return about | {
        "recipe": settings.recipe.name,
        "examples": plan.examples.counts(),
        "steps": plan.examples.num_steps,
        "examples_per_step": len(plan.examples) // plan.examples.num_steps,
        "training": {name: getattr(how, name) for name in SHARED} | {"processes": settings.processes},
        "compressor_parameters": plan.num_parameters,
        "lora_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "rank": model.peft_config["default"].r,
        "losses": [[row["step"], row["loss"]] for row in log if "loss" in row],
        "train_loss": log[-1]["train_loss"],
        "seconds": log[-1]["train_runtime"],
    }


def run(settings: argparse.Namespace) -> dict[str, Any]:
    """Train, save and merge; the record."""
    recipe = read_recipe(settings.recipe, tiny=settings.tiny)
    given = {name: getattr(settings, name) for name in ("texts", "questions", "chats")}
    recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    values = {name: value for name, value in recipe.training.items() if name in SHARED}
    values |= {name: getattr(settings, name) for name in SHARED if getattr(settings, name, None) is not None}
    how = TrainSettings(output=str(settings.output / "trainer"), **values)
    base = base_of(recipe, settings)
    plan = make_plan(recipe, settings, how)
    set_seed(how.seed)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=parse_dtype(settings.dtype))
    dtype = plain.dtype
    trainer = train(plan, add_lora(plain, plan.num_parameters, settings.rank), how, settings.micro_batch)
    made = record(plan, trainer, settings, how)
    if trainer.is_world_process_zero():
        # its vocabulary is the base's, and to compare both would ask for the base's configuration
        trainer.model.save_pretrained(settings.output / "adapter", save_embedding_layers=False)
        plan.tokenizer.save_pretrained(settings.output / "merged")
        merge(base, settings.output, dtype)
        (settings.output / "control.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return made


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="recipe of the compressor")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--tiny", action="store_true", help="take the recipe's smaller values")
    parser.add_argument("--base", help="plain base (default: the recipe's model, or what that checkpoint names)")
    for name in ("texts", "questions", "chats"):
        parser.add_argument(f"--{name}", nargs="+", help="instead of the recipe's")
    parser.add_argument("--objectives", nargs="+", help="only these (default: all that mean something uncompressed)")
    parser.add_argument("--processes", type=int, default=1, help="that trained the compressor (default: 1)")
    for name in ("max_steps", "batch_size", "accumulation_steps"):
        parser.add_argument(f"--{name}", type=int, help="of the compressor's training, instead of the recipe's")
    for name, kind in (("seed", int), ("learning_rate", float), ("warmup_steps", int), ("num_workers", int)):
        parser.add_argument(f"--{name}", type=kind, help="instead of the recipe's")
    parser.add_argument("--logging_steps", type=int, help="instead of the recipe's")
    parser.add_argument(
        "--micro_batch", type=int, help="examples that a device takes at a time (default: batch_size); no other results"
    )
    parser.add_argument("--rank", type=int, help="of the LoRA (default: by the compressor's number of parameters)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the base (default: auto)")
    return parser.parse_args(argv)


def main() -> None:
    """Train, save and merge, and say what was done."""
    settings = parse()
    made = run(settings)
    examples = ", ".join(f"{name} {count}" for name, count in made["examples"].items())
    sys.stdout.write(
        f"examples: {examples}, in {made['steps']} steps\n"
        f"compressor: {made['compressor_parameters']:,} parameters; LoRA of rank {made['rank']}: "
        f"{made['lora_parameters']:,}\nloss: {made['losses'][0][1]:.4f} to {made['losses'][-1][1]:.4f}\n"
        f"wrote {settings.output}\n"
    )


if __name__ == "__main__":
    main()
