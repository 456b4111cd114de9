# SPDX-License-Identifier: Apache-2.0
"""What every memory scheme must satisfy. A scheme is covered by being in `SCHEMES`; traits decide what is skipped."""

import pytest
import torch
from tiny import (
    SEGMENT,
    WINDOW,
    WRITTEN_VARIANTS,
    base_with_weights_of,
    pad,
    ratio_of_norms,
    rcc_model,
    text_config,
    tokens,
)
from torch.utils._pytree import tree_leaves, tree_map
from transformers import DynamicCache

from rcc_hf import RCCConfig
from rcc_hf.modeling.fingerprint_rcc import is_trained_part
from rcc_hf.modeling.schemes_rcc import option_names
from rcc_hf.modeling.segments_rcc import count_segments

REORDERED = 1e-10  # float64 sums in another order
IN_FULL = {"max_new_tokens": 6, "min_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
pytestmark = pytest.mark.parametrize("variant", WRITTEN_VARIANTS.values(), ids=WRITTEN_VARIANTS)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def skip_if_memory_follows_the_query(model):
    if model.model.scheme.query_dependent:
        pytest.skip("the scheme's memory follows the query")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_context_it_is_the_base_bit_for_bit(variant, dtype):
    model = rcc_model(dtype=dtype, **variant)
    base = base_with_weights_of(model)
    ids, mask = pad([tokens(1, 9)[0], tokens(1, 4, seed=1)[0]])
    model.compress(tokens(1, SEGMENT))  # what compressing leaves behind must not show
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    actual, expected = (m.generate(ids, attention_mask=mask, **IN_FULL) for m in (model, base))
    assert torch.equal(actual.sequences, expected.sequences)
    assert all(map(torch.equal, actual.logits, expected.logits))


@torch.no_grad()
def test_every_segment_of_the_context_matters(variant):
    model = rcc_model(**variant)
    context, local = tokens(1, 3 * SEGMENT), tokens(1, 5, seed=1)
    logits = model(local, memory=model.compress(context)).logits
    assert ratio_of_norms(logits, model(local).logits) > 1e-3
    for segment in range(3):
        changed = context.clone()
        changed[:, segment * SEGMENT : (segment + 1) * SEGMENT] = tokens(1, SEGMENT, seed=7)
        assert ratio_of_norms(model(local, memory=model.compress(changed)).logits, logits) > 1e-6


@torch.no_grad()
def test_write_leaves_the_old_state_alone(variant):
    model = rcc_model(**variant)
    scheme, decoder = model.model.scheme, model.model.language_model
    old = scheme.write(decoder, scheme.empty(decoder, 2), tokens(2, SEGMENT), 4)
    before = tree_map(torch.clone, old)
    new = scheme.write(decoder, old, tokens(2, SEGMENT, seed=1), 4)
    assert all(map(torch.equal, tree_leaves(old), tree_leaves(before)))
    assert not all(map(torch.equal, tree_leaves(old), tree_leaves(new)))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_training_pass_equals_memory_path(variant, side):
    model = rcc_model(**variant)
    context, locals_ = tokens(2, 2 * SEGMENT + 3), [tokens(1, n, seed=n)[0] for n in (6, 4)]
    local, mask = pad(locals_, side)
    in_training = model(local, attention_mask=mask, context_ids=context).logits
    behind_memory = model(local, attention_mask=mask, memory=model.compress(context)).logits
    for row, ids in enumerate(locals_):
        alone = model(ids[None], context_ids=context[row : row + 1]).logits[0]
        for logits in (in_training, behind_memory):
            assert ratio_of_norms(logits[row, mask[row].bool()], alone) <= REORDERED


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * 7, [3, 1, 2, 1]])
def test_step_by_step_equals_one_pass(variant, sizes):
    model = rcc_model(**variant)
    skip_if_memory_follows_the_query(model)
    contexts, locals_ = [tokens(1, n)[0] for n in (SEGMENT + 2, 3 * SEGMENT)], [tokens(1, n, seed=1)[0] for n in (7, 5)]
    memory, (local, mask) = model.compress(*pad(contexts)), pad(locals_)
    expected = model(local, attention_mask=mask, memory=memory).logits
    cache, logits, done = None, [], 0
    for size in sizes:
        start = {"memory": memory} if cache is None else {"past_key_values": cache}
        piece = slice(done, done + size)
        outputs = model(local[:, piece], attention_mask=mask[:, : piece.stop], **start)
        logits.append(outputs.logits)
        cache, done = outputs.past_key_values, piece.stop
    actual = torch.cat(logits, 1)
    for row in range(2):
        real = mask[row].bool()
        assert ratio_of_norms(actual[row, real], expected[row, real]) <= REORDERED


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(2 * SEGMENT + 3,), (SEGMENT + 2, 3 * SEGMENT)], ids=["one row", "ragged"])
def test_reset_forgets_the_tokens_and_keeps_the_memory(variant, lengths):
    model = rcc_model(**variant)
    skip_if_memory_follows_the_query(model)
    memory = model.compress(*pad([tokens(1, n)[0] for n in lengths]))
    local = tokens(len(lengths), 5, seed=1)
    expected = model(local, memory=memory).logits
    # the memory's own raw tokens stay too, hence nothing of them is given again
    cache = model(tokens(len(lengths), 4, seed=2), memory=memory).past_key_values
    for _ in range(2):
        cache.reset()
        assert cache.get_seq_length() == 0
        assert ratio_of_norms(model(local, past_key_values=cache).logits, expected) <= REORDERED


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_do_not_mix(variant, side):
    model = rcc_model(**variant)
    contexts = [tokens(1, n, seed=n)[0] for n in (SEGMENT + 2, 3 * SEGMENT, 5)]  # the last has nothing to compress
    locals_ = [tokens(1, n, seed=n)[0] for n in (4, 7, 6)]
    context, local = pad(contexts, side), pad(locals_)
    logits = model(local[0], attention_mask=local[1], memory=model.compress(*context)).logits
    for row, (c, x) in enumerate(zip(contexts, locals_, strict=True)):
        if len(c) < SEGMENT:
            expected = model(torch.cat([c, x])[None]).logits[0, len(c) :]
        else:
            expected = model(x[None], memory=model.compress(c[None])).logits[0]
        assert ratio_of_norms(logits[row, -len(x) :], expected) <= REORDERED
    context[0][1] = tokens(1, len(context[0][1]), seed=9)
    changed = model(local[0], attention_mask=local[1], memory=model.compress(*context)).logits
    others = torch.tensor([True, False, True])
    assert torch.equal(changed[others], logits[others])
    assert not torch.equal(changed[1], logits[1])


@torch.no_grad()
def test_eager_attention_equals_sdpa(variant):
    # in float32, because eager attention of transformers takes its softmax in float32 anyway
    context, (local, mask) = tokens(2, 2 * SEGMENT + 3), pad([tokens(1, n, seed=n)[0] for n in (6, 4)])
    eager, sdpa = (rcc_model(dtype=torch.float32, attn=attn, **variant) for attn in ("eager", "sdpa"))
    ways = (
        lambda model: model(local, attention_mask=mask, memory=model.compress(context)).logits,
        lambda model: model(local, attention_mask=mask, context_ids=context).logits,
    )
    for way in ways:
        assert ratio_of_norms(way(eager)[mask.bool()], way(sdpa)[mask.bool()]) <= 1e-5


def assert_greedy(generated, row: int, local: torch.Tensor, logits_of) -> None:
    """Every token is the likeliest (but for the end) behind those before it, of which `logits_of` does all at once."""
    new_tokens = generated.sequences[row, -len(generated.logits) :]
    for token, actual in zip(new_tokens, generated.logits, strict=True):
        logits = logits_of(local[None])[0, -1]
        assert ratio_of_norms(actual[row], logits.float()) <= 1e-6  # generate hands out float32
        logits[2] = -torch.inf  # the end of the text
        assert token == logits.argmax()
        local = torch.cat([local, token[None]])


@torch.no_grad()
def test_generate_behind_a_memory_equals_a_greedy_loop(variant):
    model = rcc_model(**variant)
    memory, prompts = model.compress(tokens(1, 2 * SEGMENT + 3)), [tokens(1, n, seed=n)[0] for n in (6, 3)]
    ids, mask = pad(prompts)
    generated = model.generate(ids, attention_mask=mask, memory=memory, **IN_FULL)
    assert torch.equal(generated.sequences[:, : ids.shape[1]], ids)
    for row, prompt in enumerate(prompts):
        assert_greedy(generated, row, prompt, lambda local: model(local, memory=memory).logits)


@torch.no_grad()
def test_generate_from_a_long_prompt_equals_a_greedy_loop(variant):
    model = rcc_model(**variant)
    prompt = tokens(1, 3 * WINDOW + 5)
    compressed = SEGMENT * count_segments(prompt.shape[1], SEGMENT, WINDOW)
    memory = model.compress(prompt[:, :compressed])
    generated = model.generate(prompt, **IN_FULL)
    assert torch.equal(generated.sequences[:, : prompt.shape[1]], prompt)
    assert_greedy(generated, 0, prompt[0, compressed:], lambda local: model(local, memory=memory).logits)


def test_every_trained_parameter_gets_a_gradient_and_no_frozen_one_does(variant):
    model = rcc_model(**variant).train()
    model.freeze_base()
    ids = tokens(2, 6, seed=1)
    model(ids, labels=ids, context_ids=tokens(2, 2 * SEGMENT)).loss.backward()
    names = {name for name, _ in model.named_parameters() if is_trained_part(name)}
    assert names
    assert {name for name, gradient in gradients(model).items() if gradient.any()} == names
    assert gradients(model).keys() == names


@pytest.mark.parametrize("reentrant", [None, True])
@pytest.mark.parametrize("way", ["context_ids", "memory", "ragged memory", "nothing"])
def test_gradient_checkpointing_changes_no_gradient(variant, way, reentrant):
    model = rcc_model(**variant).train()
    ids, context, ragged = tokens(2, 6, seed=1), tokens(2, 2 * SEGMENT + 3), tokens(2, 3 * SEGMENT)
    ragged_mask = pad([torch.ones(n) for n in (3 * SEGMENT, SEGMENT + 2)])[1]
    behind = {
        "context_ids": lambda: {"context_ids": context},
        "memory": lambda: {"memory": model.compress(context)},
        "ragged memory": lambda: {"memory": model.compress(ragged, ragged_mask)},
        "nothing": dict,
    }[way]()
    model(ids, labels=ids, **behind).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(None if reentrant is None else {"use_reentrant": reentrant})
    model(ids, labels=ids, **behind).loss.backward()
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def test_a_detached_state_cuts_the_graph_and_nothing_else(variant):
    model = rcc_model(**variant).train()
    scheme, decoder = model.model.scheme, model.model.language_model
    embedded = model.get_input_embeddings()(tokens(2, 5, seed=1)).detach()

    def loss(state):
        positions = torch.arange(tree_leaves(state)[0].shape[-2] + 5).expand(2, -1)
        outputs = scheme.decode(decoder, state, embedded, None, positions)
        return outputs.last_hidden_state[:, -5:].sin().sum()

    def write():
        return scheme.write(decoder, scheme.empty(decoder, 2), tokens(2, SEGMENT), 4)

    loss(write()).backward()
    whole = gradients(model)
    model.zero_grad()
    state = write()
    leaves = tree_map(lambda t: t.detach().requires_grad_(), state)
    loss(leaves).backward()
    assert gradients(model).keys() < whole.keys()
    torch.autograd.backward(tree_leaves(state), [leaf.grad for leaf in tree_leaves(leaves)])
    actual = gradients(model)
    assert actual.keys() == whole.keys()
    assert [name for name in whole if not ratio_of_norms(actual[name], whole[name]) <= REORDERED] == []


def test_a_memory_has_no_graph(variant):
    model = rcc_model(**variant).train()
    model.gradient_checkpointing_enable()  # which lets gradients enter at the embeddings
    memory = model.compress(tokens(2, SEGMENT + 3))
    assert not any(tensor.requires_grad for tensor in tree_leaves(memory.layers))


def test_unknown_option_is_refused_with_the_known_ones_named(variant):
    known = option_names(variant["scheme"])
    with pytest.raises(TypeError, match=f"no_such_option.*{', '.join(known)}"):
        RCCConfig(text_config(), scheme=variant["scheme"], scheme_options={"no_such_option": 1})


@torch.no_grad()
@pytest.mark.parametrize(
    "splits", [[SEGMENT], [SEGMENT, 2 * SEGMENT], [SEGMENT + 5], [2 * SEGMENT + 1, 3 * SEGMENT - 1]]
)
@pytest.mark.parametrize("lengths", [(3 * SEGMENT + 7,), (3 * SEGMENT + 7, 3 * SEGMENT)], ids=["one row", "two rows"])
def test_compressing_piece_by_piece_equals_in_one_go(variant, lengths, splits):
    model = rcc_model(encode_batch_tokens=SEGMENT, **variant)
    context, mask = pad([tokens(1, n, seed=n)[0] for n in lengths], "right")
    expected = model.compress(context, mask)
    memory = None
    for piece, piece_mask in zip(context.tensor_split(splits, 1), mask.tensor_split(splits, 1), strict=True):
        memory = model.compress(piece, piece_mask, memory=memory)
    assert_equal_memories(memory, expected)


@torch.no_grad()
def test_segments_encoded_together_equal_those_encoded_one_by_one(variant):
    context = pad([tokens(1, n, seed=n)[0] for n in (5 * SEGMENT, 2 * SEGMENT + 3, 3 * SEGMENT + 1)])
    single = rcc_model(encode_batch_tokens=1, **variant).compress(*context)
    for segments in (2, 3, 100):
        memory = rcc_model(encode_batch_tokens=segments * SEGMENT, **variant).compress(*context)
        assert (memory.slot_counts, memory.row_tokens) == (single.slot_counts, single.row_tokens)
        assert torch.equal(memory.mask, single.mask)
        for actual, expected in zip(tree_leaves(memory.layers), tree_leaves(single.layers), strict=True):
            assert ratio_of_norms(actual, expected) <= REORDERED


def assert_equal_memories(actual, expected):
    assert (actual.slot_counts, actual.row_tokens) == (expected.slot_counts, expected.row_tokens)
    assert torch.equal(actual.local_ids, expected.local_ids)
    for name in ("mask", "local_mask"):
        a, b = getattr(actual, name), getattr(expected, name)
        assert (a is None and b is None) or torch.equal(a, b), name
    assert all(map(torch.equal, tree_leaves(actual.layers), tree_leaves(expected.layers)))


def test_a_growing_cache_and_checkpointing_exclude_each_other(variant):
    model = rcc_model(**variant).train()
    ids, memory = tokens(1, 6, seed=1), model.compress(tokens(1, 2 * SEGMENT))
    model(ids, memory=memory, labels=ids).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    outputs = model(ids, memory=memory, labels=ids, use_cache=True)
    assert outputs.past_key_values is None
    outputs.loss.backward()
    assert [name for name in expected if not torch.equal(gradients(model)[name], expected[name])] == []
    with pytest.raises(ValueError, match="past_key_values cannot be used while training with activation checkpointing"):
        model(ids, past_key_values=DynamicCache())
