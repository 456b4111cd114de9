# SPDX-License-Identifier: Apache-2.0
"""`generate`, and what it must equal: loops over whole forward calls without a cache."""

import torch
from tiny import SEGMENT, WINDOW, ratio_of_norms, tokens
from torch import Tensor

NEW = 8
EXACT = 1e-10  # float64, reordered mathematics
ROUNDED = 1e-7  # the same, where `generate` has rounded logits to float32
MODES = ("memory", "long prompt", "memory and long prompt")


def never_ending(model):
    """The model without an end-of-text token, so that every row gets all its tokens."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def decode(model, ids=None, *, count=NEW, **arguments) -> tuple[Tensor, Tensor]:
    """New tokens `[B, count]` of `generate` and the logits `[B, count, V]` that they were taken from."""
    arguments = {"do_sample": False, "max_new_tokens": count} | arguments
    output = model.generate(ids, return_dict_in_generate=True, output_logits=True, **arguments)
    return output.sequences[:, -count:], torch.stack(output.logits, 1)


@torch.no_grad()
def loop(model, prompt: Tensor, memory, count: int = NEW) -> tuple[Tensor, Tensor]:
    """As `decode`, greedily, with one whole forward call for every token and no cache."""
    ids, logits = prompt, []
    for _ in range(count):
        logits.append(model(ids, memory=memory, use_cache=False, compress=False).logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
    return ids[:, prompt.shape[1] :], torch.stack(logits, 1)


@torch.no_grad()
def teacher_forced(model, prompt: Tensor, new: Tensor, memory) -> Tensor:
    """Logits `[B, T, V]` from which the tokens `new` `[B, T]` would have been taken, in one forward call."""
    logits = model(torch.cat([prompt, new], 1), memory=memory, use_cache=False, compress=False).logits
    return logits[:, prompt.shape[1] - 1 : -1]


def split(ids: Tensor) -> tuple[Tensor, Tensor]:
    """A prompt cut into what is compressed (whole segments from its start) and the window's rest, at most `WINDOW`."""
    excess = max(0, ids.shape[1] - WINDOW)
    cut = -(-excess // SEGMENT) * SEGMENT
    return ids[:, :cut], ids[:, cut:]


def case(model, mode: str, batch_size: int = 1):
    """Arguments of `generate` and what they come to: the local prompt and its memory."""
    context, short, long = tokens(batch_size, 54), tokens(batch_size, 7, seed=1), tokens(batch_size, 61, seed=2)
    if mode == "memory":
        memory = model.compress(context)
        assert memory.num_local == 54 % SEGMENT
        return {"input_ids": short, "memory": memory}, (short, memory)
    if mode == "long prompt":
        head, local = split(long)
        return {"input_ids": long}, (local, model.compress(head))
    whole = model.compress(context[:, :48])
    head, local = split(long)
    return {"input_ids": long, "memory": whole}, (local, model.compress(head, memory=whole))


def assert_decoded(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(actual[0], expected[0])
    assert ratio_of_norms(actual[1], expected[1]) <= ROUNDED


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows `[1, T]` of several lengths as one batch, and its mask."""
    longest = max(row.shape[1] for row in rows)
    edge = (lambda n: (n, 0)) if side == "left" else (lambda n: (0, n))
    pad = [torch.nn.functional.pad(row, edge(longest - row.shape[1])) for row in rows]
    mask = [torch.nn.functional.pad(torch.ones_like(row), edge(longest - row.shape[1])) for row in rows]
    return torch.cat(pad), torch.cat(mask)
