# SPDX-License-Identifier: Apache-2.0
"""The tokens of a conversation turn by turn, by the tokenizer's chat template, for what never sees all of it again."""

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

USER, REPLY = "RCC-USER-{}", "RCC-REPLY-{}"
"""Messages that stand for any: what the template puts around them is what a turn adds."""


class Conversation:
    """What each turn adds to a conversation: all of it in a row is the chat template of the whole.

    It keeps nothing of the conversation. A stream cannot take back what it has compressed, so a template that renders
    earlier turns differently once later ones follow is refused. What the model wrote stays as it wrote it, also where
    a template would leave parts of it out later on (such as what it thought).

    Args:
        tokenizer: one with a chat template.
        system: the system prompt; None for what the template does without one.

    Attributes:
        head_length: tokens at the start that are the system prompt's; 0 without one.
        end_ids: tokens that end a reply, by the template.

    Raises:
        ValueError: if there is no template, it rewrites earlier turns, or it takes no system prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None):
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template, so there are no turns: use a model that was trained for chats, "
                "set tokenizer.chat_template, or continue plain text with rcc generate"
            )
        self._tokenizer = tokenizer
        self._system = [] if system is None else [{"role": "system", "content": system}]
        opened = self._render([_message(USER, 1), _message(REPLY, 1)])
        self._closing = opened[opened.index(REPLY.format(1)) + len(REPLY.format(1)) :]
        self._check_turns()
        special = set(tokenizer.all_special_ids)
        self.end_ids = [i for i in self._encode(self._closing) if i in special][:1]
        self.head_length = 0 if system is None else self._count_head(system)

    def first_turn(self, text: str) -> list[int]:
        """Ids of the conversation up to its first reply: system prompt, the user's message, and what opens a reply."""
        return self._encode(self._first(text))

    def next_turn(self, text: str) -> list[int]:
        """Ids between the end of one reply and the beginning of the next: the user's message, and what opens a reply.

        Raises:
            ValueError: if the template does not close the turn before as it closes others.
        """
        return self._encode(self._next(text))

    def close_turn(self, reply_ids: list[int], end_ids: list[int]) -> list[int]:
        """Ids behind a reply that end its turn and that the model did not write.

        Args:
            reply_ids: what the model wrote, with or without an end token.
            end_ids: tokens that end a reply.
        """
        closing = self._encode(self._closing)
        if reply_ids and reply_ids[-1] in end_ids:
            written = next((i for i, token in enumerate(closing) if token in end_ids), -1)
            return closing[written + 1 :]
        return closing

    def _first(self, text: str) -> str:
        return self._render([{"role": "user", "content": text}], opened=True)

    def _next(self, text: str) -> str:
        messages = [_message(USER, 1), _message(REPLY, 1), {"role": "user", "content": text}]
        whole = self._render(messages, opened=True)
        rest = whole[whole.index(REPLY.format(1)) + len(REPLY.format(1)) :]
        if not rest.startswith(self._closing):
            raise _rewriting(f"what closes a reply is {self._closing!r} at the end and {rest[:40]!r}... further on")
        return rest[len(self._closing) :]

    def _check_turns(self) -> None:
        """Put a conversation together turn by turn and compare; blanks next to a reply are the model's own."""
        messages = [_message(kind, i) for i in (1, 2) for kind in (USER, REPLY)] + [_message(USER, 3)]
        whole = self._render(messages, opened=True)
        turns = [self._first(USER.format(1)), *(self._closing + self._next(USER.format(i)) for i in (2, 3))]
        for i, turn in enumerate(turns, start=1):
            rendered, _, whole = whole.partition(REPLY.format(i))
            if rendered.strip() != turn.strip():
                raise _rewriting(f"turn {i} alone is {turn!r}, in the whole it is {rendered!r}")

    def _count_head(self, system: str) -> int:
        first = self._first(USER.format(1))
        try:
            head = self._render([])
        except ValueError:  # no template has to render a system prompt alone
            head = ""
        if not head or not first.startswith(head):
            head = first[: first.index(USER.format(1))]
        if system.strip() not in head:
            raise ValueError(
                "the chat template does not put the system prompt in front of the first message, where it could stay; "
                "leave it out, or write it into the first message"
            )
        pairs = zip(self._encode(head), self._encode(first), strict=False)
        equal = [one == other for one, other in pairs]
        return equal.index(False) if False in equal else len(equal)

    def _render(self, messages: list[dict[str, str]], opened: bool = False) -> str:
        messages = self._system + messages
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened))
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"the chat template refuses messages of {roles}: {error}") from error

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _message(kind: str, number: int) -> dict[str, str]:
    return {"role": "user" if kind == USER else "assistant", "content": kind.format(number)}


def _rewriting(what: str) -> ValueError:
    return ValueError(
        "the chat template renders a turn differently when others follow, but a stream cannot take back what it has "
        f"seen ({what}). Set tokenizer.chat_template to one that only appends, or leave the system prompt out if "
        "that is what moves"
    )
