# SPDX-License-Identifier: Apache-2.0
"""A forward call over more than a window: every token has the logits that `generate` would take its successor from."""

import pytest
import torch
from generating import EXACT, never_ending
from tiny import RATIO, SEGMENT, VARIANTS, WINDOW, pad, ratio_of_norms, rcc_model, tokens
from transformers.modeling_outputs import CausalLMOutputWithPast

from rcc_hf.modeling.fingerprint_rcc import is_trained_part
from rcc_hf.modeling.passes_rcc import running_pass

LENGTHS = (75, 9, 48, WINDOW + 1)


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request):
    return never_ending(rcc_model(**request.param))


def first_logits(model, prompt, **arguments):
    """What `generate` takes its first token from, `[B, V]`."""
    settings = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(prompt, **settings, **arguments).logits[0].double()


def forward(model, graph: bool, ids, **arguments) -> CausalLMOutputWithPast:
    with torch.set_grad_enabled(graph):
        return model(ids, **arguments)


def backward_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("head_length", [0, 5])
@pytest.mark.parametrize("graph", [False, True], ids=["from memory", "with graph"])
def test_every_token_has_the_logits_of_generate(model, graph, head_length):
    model.config.head_length = head_length
    try:
        ids = tokens(1, LENGTHS[0])
        logits = forward(model, graph, ids).logits
        for n in (1, 4, 6, WINDOW, WINDOW + 1, WINDOW + 6, WINDOW + SEGMENT, WINDOW + SEGMENT + 1, 74, 75):
            expected = first_logits(model, ids[:, :n])
            assert ratio_of_norms(logits[:, n - 1], expected) <= 1e-6, n  # generate rounds to float32
    finally:
        model.config.head_length = 0


@torch.no_grad()
def test_tokens_see_slots_of_what_is_compressed_and_no_future(model):
    ids = tokens(1, 75)
    logits = model(ids).logits
    changed = ids.clone()
    changed[:, 50:] = tokens(1, 25, seed=3)
    assert torch.equal(model(changed).logits[:, :50], logits[:, :50])
    changed = ids.clone()
    changed[:, :SEGMENT] = tokens(1, SEGMENT, seed=3)
    assert ratio_of_norms(model(changed).logits[:, -1], logits[:, -1]) > 1e-6


@pytest.mark.parametrize("graph", [False, True], ids=["from memory", "with graph"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("head_length", [0, 5])
def test_padded_rows_equal_single_runs(model, graph, side, head_length):
    model.config.head_length = head_length
    try:
        rows = [tokens(1, n, seed=n)[0] for n in LENGTHS]
        ids, mask = pad(rows, side)
        logits = forward(model, graph, ids, attention_mask=mask).logits
        embeds = model.get_input_embeddings()(ids)
        from_embeds = forward(model, graph, None, inputs_embeds=embeds, attention_mask=mask).logits
        for i, row in enumerate(rows):
            alone = forward(model, graph, row[None]).logits[0]
            assert ratio_of_norms(logits[i, mask[i].bool()], alone) <= EXACT
            assert ratio_of_norms(from_embeds[i, mask[i].bool()], alone) <= EXACT
    finally:
        model.config.head_length = 0


@torch.no_grad()
def test_right_padding_without_a_mask_does_not_show(model):
    """As evaluation tools pass batches: causality alone keeps padding out."""
    rows = [tokens(1, n, seed=n)[0] for n in LENGTHS]
    logits = model(pad(rows, "right")[0]).logits
    for i, row in enumerate(rows):
        assert ratio_of_norms(logits[i, : len(row)], model(row[None]).logits[0]) <= EXACT


def test_loss_and_gradients_do_not_depend_on_padding(model):
    rows = [tokens(1, n, seed=n)[0] for n in LENGTHS[:2]]
    (ids, mask), (labels, _) = pad(rows, "right"), pad(rows, "right")
    labels = labels.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    together = backward_gradients(model, loss)
    count = sum(len(row) - 1 for row in rows)
    alone = [model(row[None], labels=row[None]).loss * (len(row) - 1) / count for row in rows]
    assert ratio_of_norms(loss, sum(alone)) <= 1e-6  # losses are float32
    single = backward_gradients(model, sum(alone))
    trained = {name for name, _ in model.named_parameters() if is_trained_part(name)}
    assert trained <= together.keys()
    for name, gradient in single.items():
        assert ratio_of_norms(together[name], gradient) <= 1e-6, name


@torch.no_grad()
@pytest.mark.parametrize("stride", [SEGMENT, WINDOW])
def test_stride(model, stride):
    """With a stride of a window, the window's first token sees nothing raw but itself."""
    model.config.stride = stride
    try:
        ids = tokens(1, 75)
        logits = model(ids).logits
    finally:
        model.config.stride = None
    for n in (40, 64, 65, 75):
        segments = -(-(n - WINDOW) // stride) * (stride // SEGMENT)
        start = segments * SEGMENT
        expected = model(ids[:, start:n], memory=model.compress(ids[:, :start])).logits[:, -1]
        assert ratio_of_norms(logits[:, n - 1], expected) <= EXACT


@torch.no_grad()
def test_ratio_and_no_compression(model):
    ids = tokens(1, 75)
    expected = model(ids[:, 48:], memory=model.compress(ids[:, :48], ratio=8)).logits[:, -1]
    assert ratio_of_norms(model(ids, ratio=8).logits[:, -1], expected) <= EXACT
    raw = model.model.language_model(ids).last_hidden_state
    assert torch.equal(model.model(ids, compress=False).last_hidden_state, raw)
    assert torch.equal(model(ids[:, :WINDOW]).logits, model(ids[:, :WINDOW], compress=False).logits)


@torch.no_grad()
@pytest.mark.parametrize("head_length", [0, 3])
@pytest.mark.parametrize("context", [40, 32, 22])
def test_behind_a_memory(model, context, head_length):
    """The memory's raw tokens come first, and what follows is cut as if it had been compressed with it."""
    whole = tokens(2, context + 60)
    memory = model.compress(whole[:, :context], head_length=head_length)
    logits = model(whole[:, context:], memory=memory, compress=True).logits
    rest = whole[:, context:]
    for n in (1, 20, 45, 60):
        expected = first_logits(model, rest[:, :n], memory=memory)
        assert ratio_of_norms(logits[:, n - 1], expected) <= 1e-6, n


@torch.no_grad()
def test_behind_a_ragged_memory(model):
    memory = model.compress(*pad([tokens(1, n, seed=n)[0] for n in (7, 70)]))
    rows = [tokens(1, n, seed=n)[0] for n in (61, 40)]
    ids, mask = pad(rows)
    logits = model(ids, attention_mask=mask, memory=memory, compress=True).logits
    for i, (row, single) in enumerate(zip(rows, memory.unstack(), strict=True)):
        alone = model(row[None], memory=single, compress=True).logits[0]
        assert ratio_of_norms(logits[i, mask[i].bool()], alone) <= EXACT


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(75,), (75, 40), (75, 9)], ids=str)
@pytest.mark.parametrize("with_memory", [False, True])
def test_the_cache_goes_on_where_the_text_ends(model, lengths, with_memory):
    rows = [tokens(1, n, seed=n)[0] for n in lengths]
    ids, mask = pad(rows)
    encoded = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: encoded.append(running_pass().adapter if running_pass() else None), with_kwargs=True
    )
    memory = model.compress(tokens(len(rows), 38, seed=9)) if with_memory else None
    encoded.clear()
    cache = model(ids, attention_mask=mask, memory=memory, compress=True).past_key_values
    hook.remove()
    assert encoded.count("write") == len(lengths)  # equally long rows are not compressed twice
    assert cache.get_seq_length() == 75
    new = tokens(len(rows), 3, seed=4)
    more = torch.cat([mask, torch.ones_like(new)], 1)
    logits = model(new, attention_mask=more, past_key_values=cache).logits
    arguments = {"attention_mask": mask, "memory": memory, "max_new_tokens": 3, "do_sample": False}
    forced = model.generate(
        ids,
        **arguments,
        return_dict_in_generate=True,
        output_logits=True,
        prefix_allowed_tokens_fn=lambda row, sequence: [int(new[row, max(0, len(sequence) - 75)])],
    )
    assert torch.equal(forced.sequences[:, 75:], new)
    for step in range(2):
        assert ratio_of_norms(logits[:, step], forced.logits[step + 1].double()) <= 1e-6


@torch.no_grad()
def test_hidden_states(model):
    ids = tokens(1, 75)
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    assert torch.equal(hidden[0], model.get_input_embeddings()(ids))
    assert torch.equal(hidden[-1], model.model(ids).last_hidden_state)


def test_attentions_are_refused(model):
    with pytest.raises(ValueError, match="more than the window of 32, and each window has attentions of another width"):
        model(tokens(1, 75), output_attentions=True)


def test_gradients_behind_a_memory_are_refused(model):
    memory = model.compress(tokens(1, 48))
    with pytest.raises(ValueError, match=r"cannot be decoded with gradients.*torch\.no_grad\(\)"):
        model(tokens(1, 75), memory=memory, compress=True)


# --- packed sequences ------------------------------------------------------------------------------------------------


def packed(lengths):
    rows = [tokens(1, n, seed=n) for n in lengths]
    return rows, torch.cat(rows, 1), torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("graph", [False, True], ids=["from memory", "with graph"])
def test_packed_documents_do_not_see_each_other(model, graph):
    rows, ids, positions = packed((50, 3, 40))
    logits = forward(model, graph, ids, position_ids=positions).logits
    labels = ids.masked_fill(positions == 0, -100)
    assert torch.isfinite(forward(model, graph, ids, position_ids=positions, labels=labels).loss)
    start = 0
    for row in rows:
        alone = forward(model, graph, row).logits
        assert ratio_of_norms(logits[:, start : start + row.shape[1]], alone) <= EXACT
        start += row.shape[1]


@torch.no_grad()
def test_packed_rows_of_a_batch(model):
    first, second = packed((50, 25)), packed((70, 5))
    ids, positions = (torch.cat([first[i], second[i]]) for i in (1, 2))
    outputs = model(ids, position_ids=positions, output_hidden_states=True)
    for i, rows in enumerate((first[0], second[0])):
        alone = torch.cat([model(row).logits for row in rows], 1)
        assert ratio_of_norms(outputs.logits[i : i + 1], alone) <= EXACT
    assert outputs.past_key_values is None


def test_packing_that_cannot_be_told_apart_is_refused(model):
    _, ids, positions = packed((50, 40))
    with pytest.raises(ValueError, match=r"packed sequences.*Leave the mask out"):
        model(ids, position_ids=positions, attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match=r"packed sequences \(cu_seq_lens_q\) need position_ids"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 50, 90]))
    short = positions[:, 40:60]
    for behind in ({"memory": model.compress(tokens(1, 48))}, {"context_ids": tokens(1, 48)}):
        with pytest.raises(ValueError, match="cannot be told apart behind a memory or a context"):
            model(ids[:, 40:60], position_ids=short, **behind)


def test_slots_of_windows_are_as_many_as_said(model):
    with torch.no_grad():
        cache = model(tokens(1, 75)).past_key_values
    assert cache.num_slots == 3 * SEGMENT // RATIO
