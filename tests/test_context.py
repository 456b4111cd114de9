# SPDX-License-Identifier: Apache-2.0
"""The training pass over contexts of several lengths: loss and gradients are those of single rows."""

import pytest
import torch
from generating import EXACT
from tiny import SEGMENT, VARIANTS, pad, ratio_of_norms, rcc_model, tokens
from torch import Tensor

LENGTHS = (54, 9, 32, 17)  # 3 segments and 6 tokens; none; 2; 1 and 1
LOCALS = (6, 4, 7, 3)


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request):
    return rcc_model(**request.param)


@pytest.fixture(params=[0, 5], ids=["no head", "head"])
def head_length(model, request):
    model.config.head_length = request.param
    yield request.param
    model.config.head_length = 0


def rows(lengths, seed: int) -> list[Tensor]:
    return [tokens(1, n, seed=seed + n)[0] for n in lengths]


def gradients(model, loss) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def batch(side: str):
    contexts, locals_ = rows(LENGTHS, 0), rows(LOCALS, 50)
    (context, context_mask), (ids, mask) = pad(contexts, side), pad(locals_, side)
    arguments = {"context_ids": context, "context_mask": context_mask, "attention_mask": mask}
    return contexts, locals_, ids, arguments


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_equal_single_runs(model, side, head_length):
    contexts, locals_, ids, arguments = batch(side)
    logits = model(ids, **arguments).logits
    for i, (context, local) in enumerate(zip(contexts, locals_, strict=True)):
        alone = model(local[None], context_ids=context[None]).logits[0]
        assert ratio_of_norms(logits[i, arguments["attention_mask"][i].bool()], alone) <= EXACT


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_it_equals_the_memory_path(model, side, head_length):
    _, _, ids, arguments = batch(side)
    mask = arguments["attention_mask"]
    memory = model.compress(arguments["context_ids"], arguments["context_mask"])
    expected = model(ids, attention_mask=mask, memory=memory).logits
    assert ratio_of_norms(model(ids, **arguments).logits[mask.bool()], expected[mask.bool()]) <= EXACT


def test_loss_and_gradients_are_those_of_single_rows(model, head_length):
    contexts, locals_, ids, arguments = batch("right")
    labels = ids.masked_fill(arguments["attention_mask"] == 0, -100)
    loss = model(ids, labels=labels, **arguments).loss
    together = gradients(model, loss)
    count = sum(len(local) - 1 for local in locals_)
    alone = sum(
        model(local[None], context_ids=context[None], labels=local[None]).loss * (len(local) - 1) / count
        for context, local in zip(contexts, locals_, strict=True)
    )
    assert ratio_of_norms(loss, alone) <= 1e-6  # losses are float32
    for name, gradient in gradients(model, alone).items():
        assert ratio_of_norms(together[name], gradient) <= 1e-6, name


def test_a_row_without_a_segment_is_decoded_by_the_base(model):
    context, ids = tokens(1, SEGMENT - 1), tokens(1, 5, seed=1)
    expected = model.model.language_model(torch.cat([context, ids], 1)).last_hidden_state[:, -5:]
    assert ratio_of_norms(model.model(ids, context_ids=context).last_hidden_state, expected) <= EXACT


def test_a_mask_of_nothing_is_refused(model):
    with pytest.raises(ValueError, match="context_mask has no effect without context_ids"):
        model(tokens(1, 5), context_mask=torch.ones(1, 54))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 53\); the inputs need \(1, 54\)"):
        model(tokens(1, 5), context_ids=tokens(1, 54), context_mask=torch.ones(1, 53))


@pytest.mark.parametrize(("trained", "passes"), [("write", 1), ("read", 3), (None, 3)])
def test_segments_are_written_together_where_a_graph_is_kept(monkeypatch, trained, passes):
    """Their activations are kept anyway; without a graph, memory is bounded by `encode_batch_tokens`."""
    model = rcc_model(encode_batch_tokens=2 * SEGMENT)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained is not None and f".rcc.{trained}." in name)
    written, write = [], model.model.scheme.write
    monkeypatch.setattr(model.model.scheme, "write", lambda *args: written.append(len(args[2])) or write(*args))
    context = tokens(3, 2 * SEGMENT)
    with torch.set_grad_enabled(trained is not None):
        loss = model(tokens(3, 5), context_ids=context, labels=tokens(3, 5)).loss
    assert (len(written), sum(written)) == (passes, 6)
    model.config.encode_batch_tokens = 100 * SEGMENT
    assert loss.item() == pytest.approx(model(tokens(3, 5), context_ids=context, labels=tokens(3, 5)).loss.item())
