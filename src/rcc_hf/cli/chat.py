# SPDX-License-Identifier: Apache-2.0
"""`rcc chat`: a conversation of any length in bounded memory, kept and gone on with another day."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from rcc_hf.cli.loading import load, plain_kv_bytes
from rcc_hf.cli.settings import ModelSettings, parse
from rcc_hf.conversations import Conversation
from rcc_hf.modeling.compressed_rcc import RCCMemory
from rcc_hf.modeling.modeling_rcc import RCCForCausalLM
from rcc_hf.streams import RCCStream

COMMANDS = "/save DIR keeps the conversation, /status shows its size, /quit (or the end of the input) ends it"


@dataclass(kw_only=True)
class ChatSettings:
    """What the conversation begins with, and how long it is remembered."""

    memory: str | None = field(default=None, metadata={"help": "Folder to go on from: --save's, or rcc compress's."})
    save: str | None = field(default=None, metadata={"help": "Folder that the conversation is saved to at its end."})
    system: str | None = field(default=None, metadata={"help": "System prompt; it is never compressed."})
    ratio: int | None = field(default=None, metadata={"help": "Source tokens per slot; default: the checkpoint's."})
    max_slots: int | None = field(default=None, metadata={"help": "Most slots to remember; default: any number."})
    when_full: str = field(
        default="error", metadata={"help": "Then: error, drop (the oldest), recompress (older ones at higher ratios)."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of a reply."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0: greedy."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})


class Chat:
    """A conversation between standard input and a model."""

    def __init__(self, model: RCCForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: ChatSettings):
        self.conversation = Conversation(tokenizer, settings.system)
        memory = None if settings.memory is None else RCCMemory.from_pretrained(settings.memory, model.device)
        self.stream = RCCStream(
            model,
            ratio=settings.ratio,
            head_length=None if settings.system is None else self.conversation.head_length,
            max_slots=settings.max_slots,
            when_full=settings.when_full,
            memory=memory,
        )
        ends = model.generation_config.eos_token_id
        self.end_ids = [*(ends if isinstance(ends, list) else [ends] if ends is not None else [])]
        self.end_ids += [i for i in self.conversation.end_ids if i not in self.end_ids]
        self.generation: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "do_sample": False}
        if settings.temperature > 0:
            self.generation |= {"do_sample": True, "temperature": settings.temperature}
        if self.end_ids:
            self.generation |= {"eos_token_id": self.end_ids, "pad_token_id": self.end_ids[0]}
        self.tokenizer = tokenizer

    def say(self, text: str) -> None:
        """Take a turn of the user and print the reply as it is written."""
        turn = self.conversation.next_turn if self.stream.num_tokens else self.conversation.first_turn
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        new = self.stream.generate(self._batch(turn(text)), streamer=streamer, **self.generation)
        self.stream.append(self._batch(self.conversation.close_turn(new[0].tolist(), self.end_ids)))

    def status(self) -> str:
        """Tokens seen, what is kept of them, and bytes, in one line."""
        stream, memory = self.stream, self.stream.memory
        raw = stream.num_local + (0 if memory is None else memory.num_head)
        while_decoding = plain_kv_bytes(stream.model, stream.num_slots + raw)
        plain = plain_kv_bytes(stream.model, stream.num_tokens)
        return (
            f"[{stream.num_tokens:,} tokens seen: {stream.num_slots:,} slots and {raw:,} raw tokens, {stream.nbytes:,} "
            f"bytes; KV cache {while_decoding:,} bytes, plain {plain:,}]"
        )

    def save(self, folder: str) -> None:
        """Write the conversation's memory."""
        if self.stream.memory is None:
            raise ValueError(f"nothing has been said yet, so there is nothing to save to {folder}")
        self.stream.memory.save_pretrained(folder)
        print(f"wrote {folder}")

    def obey(self, line: str) -> None:
        """A line that begins with a slash."""
        name, _, argument = line.partition(" ")
        if name == "/status":
            print(self.status())
        elif name == "/save" and argument.strip():
            self.save(argument.strip())
        else:
            raise ValueError(f"{line!r} is no command: {COMMANDS}")

    def _batch(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], dtype=torch.long, device=self.stream.model.device)


def run(argv: list[str]) -> int:
    """Talk until the input ends."""
    description = f"Chat, in bounded memory, line by line from standard input. {COMMANDS}."
    how, settings, names = parse(argv, "chat", description, {"model": "RCC checkpoint"}, ModelSettings, ChatSettings)
    if settings.memory and settings.system is not None:
        raise ValueError("--system begins a conversation and --memory goes on with one: leave one of them out")
    chat = Chat(*load(names.model, how), settings)
    if settings.temperature > 0:
        set_seed(settings.seed)
    try:
        return 0 if _talk(chat) else 2
    finally:
        if settings.save and chat.stream.memory is not None:
            chat.save(settings.save)


def _talk(chat: Chat) -> bool:
    """Whether every line could be answered."""
    failures = 0
    for line in _lines():
        if line.strip() == "/quit":
            break
        try:
            if line.startswith("/"):
                chat.obey(line.strip())
            else:
                chat.say(line)
                print(chat.status(), flush=True)
        except (ValueError, OSError) as error:  # a long conversation is worth more than one turn of it
            print(f"rcc chat: {error}", file=sys.stderr)
            failures += 1
        except KeyboardInterrupt:
            print("\n(interrupted: this turn is forgotten)")
    return failures == 0


def _lines() -> Iterator[str]:
    """What the user types, without empty lines."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line
