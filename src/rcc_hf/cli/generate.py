# SPDX-License-Identifier: Apache-2.0
"""`rcc generate`: text behind a memory, a long context, or neither."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from rcc_hf.cli.loading import compress_with_progress, encode, load, read_text
from rcc_hf.cli.settings import ModelSettings, parse
from rcc_hf.modeling.compressed_rcc import RCCMemory
from rcc_hf.modeling.modeling_rcc import RCCForCausalLM


@dataclass(kw_only=True)
class GenerateSettings:
    """What it reads, and how it writes."""

    memory: str | None = field(default=None, metadata={"help": "Folder of a memory from rcc compress."})
    context: str | None = field(default=None, metadata={"help": "Text file (- for standard input) to compress first."})
    ratio: int | None = field(default=None, metadata={"help": "Source tokens per slot for the context."})
    reconstruct: bool = field(default=False, metadata={"help": "Prompt for a repetition of the memory (no prompt)."})
    chat: bool = field(default=False, metadata={"help": "Put the prompt into the tokenizer's chat template."})
    max_new_tokens: int = field(default=128, metadata={"help": "Most tokens to write."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0: greedy."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})


def run(argv: list[str]) -> int:
    """Generate, printing as it goes."""
    positionals = {"model": "RCC checkpoint", "prompt": 'the prompt ("" with --reconstruct)'}
    how, settings, names = parse(
        argv, "generate", "Generate text behind a memory or a context.", positionals, ModelSettings, GenerateSettings
    )
    if settings.memory and settings.context:
        raise ValueError("give --memory or --context, not both; rcc compress --append_to joins them")
    if bool(names.prompt) == settings.reconstruct:
        raise ValueError('give a prompt, or --reconstruct with the prompt ""')
    model, tokenizer = load(names.model, how)
    memory = None
    if settings.memory:
        memory = RCCMemory.from_pretrained(settings.memory, model.device)
    elif settings.context:
        ids = encode(tokenizer, read_text(settings.context), model.device)
        memory = compress_with_progress(model, ids, ratio=settings.ratio)
    prompt_ids = _prompt_ids(model, tokenizer, names.prompt, settings)
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        set_seed(settings.seed)
        sampling = {"do_sample": True, "temperature": settings.temperature}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    untyped: Any = model  # generate's annotations leave out what it hands to the model
    untyped.generate(prompt_ids, memory=memory, max_new_tokens=settings.max_new_tokens, streamer=streamer, **sampling)
    return 0


def _prompt_ids(
    model: RCCForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, settings: GenerateSettings
) -> torch.Tensor:
    if settings.reconstruct:
        if model.config.reconstruction_prompt_ids is None:
            raise ValueError("this checkpoint was not trained to reconstruct: its configuration has no such prompt")
        return torch.tensor([model.config.reconstruction_prompt_ids], device=model.device)
    if settings.chat:
        prompt = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        )
    return encode(tokenizer, prompt, model.device)
