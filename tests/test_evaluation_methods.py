# SPDX-License-Identifier: Apache-2.0
"""What methods keep of contexts, and what they answer: against plain calls of the base, naive loops, and each other."""

import pytest
import torch
from tiny import RATIO, SEGMENT, base_model, ratio_of_norms, rcc_model, tokens
from torch.nn import functional as F

from rcc_hf.evaluation.methods import METHODS, Reading, budget, make_method
from rcc_hf.evaluation.methods_base import backbone, entry_nbytes
from rcc_hf.evaluation.methods_pool import unrotate_keys
from rcc_hf.evaluation.methods_wrong import choose_others
from rcc_hf.modeling.families_rcc import rotate_keys

LENGTHS = (39, 5, 53, 32)  # raw tokens behind segments, no segment at all, and no raw tokens
BOUNDED = ("truncate-head", "truncate-tail", "window-sink", "mean-pool")
EVERY = pytest.mark.parametrize("name", METHODS)
ON_BASE = [name for name in METHODS if not name.endswith("rcc")]
NO_STOP = frozenset()
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def rows(lengths, seed=0):
    return [tokens(1, length, seed=seed + i)[0] for i, length in enumerate(lengths)]


CONTEXTS = rows(LENGTHS)
PROMPTS = rows((7, 4, 9, 1), seed=10)
TARGETS = rows((6, 11, 1, 8), seed=20)


@torch.no_grad()
def sharpen(model):
    """Make attention depend on what is seen, and where: at first it is all but uniform, which would hide mistakes."""
    for layer in backbone(model).layers:
        for name, module in layer.named_modules():
            if name.startswith(("self_attn", "attention")) and isinstance(module, torch.nn.Linear):
                module.weight *= 12 if name.endswith(("q_proj", "k_proj")) else 4
    return model


@pytest.fixture(scope="module")
def rcc():
    return sharpen(rcc_model())


@pytest.fixture(scope="module")
def base():
    return sharpen(base_model().double())


def method_of(name, model, ratio=RATIO, **options):
    if model.config.model_type != "rcc":
        options |= {"segment_length": SEGMENT}
    return make_method(name, model, ratio, **options)


def answers(method, reading, prompts, count=6, stop_ids=NO_STOP):
    found = method.generate(reading, prompts, max_new_tokens=count, stop_ids=stop_ids)
    return [row.tolist() for row in found]


def plain_nll(model, context, target):
    """Nats of `target` behind `context`, both raw, by one call; nan for a token that nothing precedes."""
    with torch.no_grad():
        options = {"compress": False} if model.config.model_type == "rcc" else {}
        logits = model(torch.cat([context, target])[None], use_cache=False, **options).logits[0]
    nats = F.cross_entropy(logits[:-1], torch.cat([context, target])[1:], reduction="none")
    nats = torch.cat([nats.new_full((1,), torch.nan), nats])
    return nats[len(context) :]


def assert_close(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=0, equal_nan=True)


def greedy_by_calls(model, context, prompt, count):
    ids = torch.cat([context, prompt])[None]
    options = {"compress": False} if model.config.model_type == "rcc" else {}
    for _ in range(count):
        with torch.no_grad():
            new = model(ids, use_cache=False, **options).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, new[:, None]], 1)
    return ids[0, len(context) + len(prompt) :].tolist()


# what a batch is made of


@EVERY
@pytest.mark.parametrize("ratio", [RATIO, 1, SEGMENT])
def test_a_ragged_batch_equals_single_rows(rcc, name, ratio):
    method = method_of(name, rcc, ratio)
    wanted = choose_others(CONTEXTS) if name.startswith("wrong") else CONTEXTS
    alone = method_of({"wrong": "full", "wrong-rcc": "rcc"}.get(name, name), rcc, ratio)
    together = method.read(CONTEXTS)
    singles = [alone.read([context]) for context in wanted]
    joined = Reading.join(singles)
    assert (together.nbytes, together.num_entries) == (joined.nbytes, joined.num_entries)
    expected = [answers(alone, one, [prompt])[0] for one, prompt in zip(singles, PROMPTS, strict=True)]
    assert answers(method, together, PROMPTS) == answers(method, joined, PROMPTS) == expected
    nats = [alone.nll(one, [target])[0] for one, target in zip(singles, TARGETS, strict=True)]
    assert_close(method.nll(together, TARGETS), nats)


@pytest.mark.parametrize("name", ON_BASE)
def test_a_base_model_and_an_rcc_model_around_it_answer_alike(base, name):
    model = rcc_model()
    own, weights = model.state_dict(), base.state_dict()
    prefix = {"model.": "model.language_model.", "lm_head.": "lm_head."}
    for key, value in weights.items():
        start = key.split(".")[0] + "."
        own[prefix[start] + key.removeprefix(start)].copy_(value)
    one, other = method_of(name, base), method_of(name, model)
    plain, wrapped = one.read(CONTEXTS), other.read(CONTEXTS)
    assert (plain.nbytes, plain.num_entries) == (wrapped.nbytes, wrapped.num_entries)
    assert answers(one, plain, PROMPTS) == answers(other, wrapped, PROMPTS)
    assert_close(one.nll(plain, TARGETS), other.nll(wrapped, TARGETS))


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_neox", "phi3", "granite"])
def test_ragged_batches_of_other_families(family):
    options = {"sliding_window": 8} if family in ("mistral", "gemma3_text") else {}
    model = sharpen(base_model(family, **options).double())
    full, pooled = method_of("full", model), method_of("mean-pool", model)
    expected = [greedy_by_calls(model, *pair, 6) for pair in zip(CONTEXTS, PROMPTS, strict=True)]
    assert answers(full, full.read(CONTEXTS), PROMPTS) == expected
    nats = [plain_nll(model, *pair) for pair in zip(CONTEXTS, TARGETS, strict=True)]
    assert_close(full.nll(full.read(CONTEXTS), TARGETS), nats)
    singles = [pooled.nll(pooled.read([c]), [t])[0] for c, t in zip(CONTEXTS, TARGETS, strict=True)]
    assert_close(pooled.nll(pooled.read(CONTEXTS), TARGETS), singles)


@EVERY
def test_several_questions_share_a_reading_which_stays_as_it_was(rcc, name):
    method = method_of(name, rcc, **({"others": CONTEXTS} if name.startswith("wrong") else {}))
    one = method.read(CONTEXTS[2:3])
    first = answers(method, one, PROMPTS)
    assert first == answers(method, one.select([0] * 4), PROMPTS)
    assert first == [answers(method, one, [prompt])[0] for prompt in PROMPTS]
    nats = method.nll(one, TARGETS)
    assert_close(nats, method.nll(one, TARGETS))
    assert answers(method, one, PROMPTS) == first
    both = method.read(CONTEXTS).select([2, 0])
    assert both.num_entries == tuple(method.read(CONTEXTS).num_entries[i] for i in (2, 0))


@EVERY
def test_empty_contexts_hold_nothing(rcc, name):
    empty = torch.zeros(0, dtype=torch.long)
    others = {"others": [empty.clone()]} if name.startswith("wrong") else {}
    method = method_of(name, rcc, **others)
    nothing = method_of("none", rcc)
    if name.startswith("wrong"):
        with pytest.raises(ValueError, match="no other beside it"):
            method.read([empty, CONTEXTS[0]])
    reading, expected = method.read([empty, empty]), nothing.read([empty, empty])
    assert reading.num_entries == reading.nbytes == (0, 0)
    assert answers(method, reading, PROMPTS[:2]) == answers(nothing, expected, PROMPTS[:2])
    assert_close(method.nll(reading, TARGETS[:2]), nothing.nll(expected, TARGETS[:2]))
    mixed = method.read([empty, *CONTEXTS[:2]])
    assert answers(method, mixed, PROMPTS[:3])[0] == answers(method, reading, PROMPTS[:2])[0]


# what each method keeps


@pytest.mark.parametrize("which", ["base", "rcc"])
def test_full_equals_the_base_on_the_whole_text(which, request, monkeypatch):
    model = request.getfixturevalue(which)
    monkeypatch.setattr("rcc_hf.evaluation.methods_entries._CHUNK", 10)  # several chunks, the last one short
    monkeypatch.setattr("rcc_hf.evaluation.methods_decoding._CHUNK", 3)
    method = method_of("full", model)
    reading = method.read(CONTEXTS)
    assert reading.num_entries == LENGTHS
    expected = [greedy_by_calls(model, *pair, 6) for pair in zip(CONTEXTS, PROMPTS, strict=True)]
    assert answers(method, reading, PROMPTS) == expected
    nats = [plain_nll(model, *pair) for pair in zip(CONTEXTS, TARGETS, strict=True)]
    assert_close(method.nll(reading, TARGETS), nats)


def test_reading_makes_logits_of_one_column_at_a_time(base, monkeypatch):
    seen = []
    handle = base.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    monkeypatch.setattr("rcc_hf.evaluation.methods_entries._CHUNK", 20)
    method_of("full", base).read(CONTEXTS)
    handle.remove()
    assert seen == [1, 1, 1]


KEEPS = {
    "none": lambda context, size: context[:0],
    "truncate-head": lambda context, size: context[-size:],
    "truncate-tail": lambda context, size: context[:size],
    "window-sink": lambda context, size: torch.cat([context[:4], context[len(context) - size + 4 :]]),
}


@pytest.mark.parametrize("name", KEEPS)
def test_a_cut_context_is_text_like_any_other(base, name):
    method = method_of(name, base)
    sizes = [budget(length, RATIO, SEGMENT) for length in LENGTHS]
    kept = [KEEPS[name](context, size) for context, size in zip(CONTEXTS, sizes, strict=True)]
    reading = method.read(CONTEXTS)
    assert reading.num_entries == tuple(map(len, kept))
    assert answers(method, reading, PROMPTS) == [
        greedy_by_calls(base, *pair, 6) for pair in zip(kept, PROMPTS, strict=True)
    ]
    assert_close(method.nll(reading, TARGETS), [plain_nll(base, *pair) for pair in zip(kept, TARGETS, strict=True)])


def test_none_ignores_the_context(rcc):
    method = method_of("none", rcc)
    one, other = method.read(CONTEXTS), method.read(rows(LENGTHS, seed=50))
    assert answers(method, one, PROMPTS) == answers(method, other, PROMPTS)
    assert one.num_entries == one.nbytes == (0,) * 4


@pytest.mark.parametrize("name", BOUNDED)
def test_ratio_1_is_full(rcc, name):
    method, full = method_of(name, rcc, 1), method_of("full", rcc, 1)
    reading, expected = method.read(CONTEXTS), full.read(CONTEXTS)
    assert reading.num_entries == expected.num_entries
    assert answers(method, reading, PROMPTS) == answers(full, expected, PROMPTS)
    assert_close(method.nll(reading, TARGETS), full.nll(expected, TARGETS))


def test_no_context_stays_none():
    empty, text = torch.zeros(0, dtype=torch.long), torch.arange(3)
    assert [len(found) for found in choose_others([empty, text, text + 1])] == [0, 3, 3]


def test_wrong_reads_another_row(rcc):
    for name, right in (("wrong", "full"), ("wrong-rcc", "rcc")):
        method, expected = method_of(name, rcc), method_of(right, rcc)
        moved = expected.read([*CONTEXTS[1:], CONTEXTS[0]])
        assert answers(method, method.read(CONTEXTS), PROMPTS) == answers(expected, moved, PROMPTS)
        assert answers(method, method.read(CONTEXTS), PROMPTS) != answers(expected, expected.read(CONTEXTS), PROMPTS)
        with pytest.raises(ValueError, match="no other beside it"):
            method.read([CONTEXTS[0], CONTEXTS[0].clone()])
        spare = method_of(name, rcc, others=[CONTEXTS[0].clone(), CONTEXTS[3]])
        alone = expected.read([CONTEXTS[3]])
        assert answers(spare, spare.read([CONTEXTS[0]]), PROMPTS) == answers(expected, alone, PROMPTS)


@pytest.mark.parametrize("head_length", [0, 3])
@pytest.mark.parametrize("wiring", ["replace", "add"])
def test_rcc_equals_compress_and_generate(wiring, head_length):
    model = rcc_model(scheme_options={"wiring": wiring}, head_length=head_length)
    method = method_of("rcc", model, 8)
    for context, prompt, target in zip(CONTEXTS, PROMPTS, TARGETS, strict=True):
        reading = method.read([context])
        if len(context) - head_length < SEGMENT:  # nothing to compress
            expected = model.generate(torch.cat([context, prompt])[None], **GREEDY)
            assert_close(method.nll(reading, [target]), [plain_nll(model, context, target)])
        else:
            memory = model.compress(context[None], ratio=8)
            expected = model.generate(prompt[None], memory=memory, **GREEDY)
            with torch.no_grad():
                logits = model(target[None], memory=memory).logits[0, :-1]
            nats = F.cross_entropy(logits, target[1:], reduction="none")
            assert_close([method.nll(reading, [target])[0][1:]], [nats])
        assert answers(method, reading, [prompt]) == [expected[0, -6:].tolist()]


def test_rcc_predicts_the_first_token_where_the_last_is_raw(rcc):
    method = method_of("rcc", rcc)
    context, target = CONTEXTS[0], TARGETS[0]
    memory = rcc.compress(context[None, :32])
    with torch.no_grad():
        ids = torch.cat([context[32:], target])
        logits = rcc(ids[None], memory=memory).logits[0]
    expected = F.cross_entropy(logits[:-1], ids[1:], reduction="none")[-len(target) :]
    assert_close(method.nll(method.read([context]), [target]), [expected])
    assert method.nll(method.read([context[:32]]), [target])[0].isnan().tolist() == [True] + [False] * 5


# mean pooling


def keys_and_values(model, context):
    """Unrotated keys, and values `[H, T, D]`, of every layer of a Llama, taken from its linear maps."""
    taken = []

    def take(module, args, output):
        taken.append(output[0].unflatten(-1, (-1, 8)).transpose(0, 1))

    maps = [m for layer in backbone(model).layers for m in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
    hooks = [m.register_forward_hook(take) for m in maps]
    with torch.no_grad():
        model(context[None])
    for hook in hooks:
        hook.remove()
    return list(zip(taken[::2], taken[1::2], strict=True))


def test_mean_pool_equals_a_loop(base):
    context = CONTEXTS[0]  # two segments and 7 tokens
    (row,) = method_of("mean-pool", base).read([context]).kept
    decoder = backbone(base)
    for index, (keys, values) in enumerate(keys_and_values(base, context)):
        pools = [range(i, i + RATIO) for i in range(0, 32, RATIO)] + [range(i, i + 1) for i in range(32, 39)]
        for number, pool in enumerate(pools):
            key = sum(keys[:, i] for i in pool) / len(pool)
            place = torch.tensor([[number]])
            key = rotate_keys(decoder, index, key[None, :, None], place)[0, :, 0]
            value = sum(values[:, i] for i in pool) / len(pool)
            # the base makes its rotary tables in float32
            assert ratio_of_norms(row.layers[index][0][0, :, number], key) <= 1e-6
            assert ratio_of_norms(row.layers[index][1][0, :, number], value) <= 1e-10
    assert row.num_entries == len(pools)
    assert row.next_position == len(pools)


def test_what_follows_pooled_entries_alone_has_no_first_prediction(base):
    method, target = method_of("mean-pool", base), TARGETS[0]
    for length in (39, 32):
        reading = method.read([CONTEXTS[0][:length]])
        first = method.nll(reading, [target])[0][0]
        assert first.isnan() == (length == 32)


def test_mean_pool_leaves_the_head_raw():
    model = rcc_model(head_length=3)
    context = CONTEXTS[2]  # the head, three segments, and 2 tokens
    (pooled,), (full,) = (method_of(name, model).read([context]).kept for name in ("mean-pool", "full"))
    for (keys, values), (raw_keys, raw_values) in zip(pooled.layers, full.layers, strict=True):
        assert torch.equal(keys[..., :3, :], raw_keys[..., :3, :])
        assert torch.equal(values[..., [0, 1, 2, -2, -1], :], raw_values[..., [0, 1, 2, -2, -1], :])
        assert torch.equal(values[..., 3, :], raw_values[..., 3 : 3 + RATIO, :].mean(-2))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("scaled", [False, True])
def test_unrotating_is_the_inverse_of_rotating(family, scaled):
    scaling = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
    if family == "gpt_neox":  # which rotates a quarter of each head
        scaling["partial_rotary_factor"] = 0.25
    model = base_model(family, **({"rope_parameters": scaling} if scaled else {})).double()
    decoder, positions = backbone(model), torch.arange(100, 109)[None]
    keys = torch.randn(1, 2, 9, 8, dtype=torch.float64)
    moved = rotate_keys(decoder, 1, keys, positions)
    assert ratio_of_norms(moved, keys) > 0.1
    assert ratio_of_norms(unrotate_keys(decoder, 1, moved, positions), keys) <= 1e-6


# budgets


@pytest.mark.parametrize("ratio", [1, 2, RATIO, SEGMENT])
@pytest.mark.parametrize("head_length", [0, 3])
def test_bounded_methods_keep_what_rcc_keeps(ratio, head_length):
    model = rcc_model(head_length=head_length)
    contexts = rows((1, 15, 16, 17, 19, 31, 32, 64, 79))
    expected = method_of("rcc", model, ratio).read(contexts)
    lengths = tuple(budget(len(context), ratio, SEGMENT, head_length) for context in contexts)
    assert expected.num_entries == lengths
    for name in BOUNDED:
        reading = method_of(name, model, ratio).read(contexts)
        assert (reading.nbytes, reading.num_entries) == (expected.nbytes, expected.num_entries), name


@pytest.mark.parametrize("head_length", [0, 3])
def test_filled_segments_are_compressed_whole(head_length):
    """As if the text had been filled up by hand; baselines read the text alone, at the same budget."""
    model = rcc_model(head_length=head_length)
    contexts = rows((1, 3, 15, 16, 17, 39, 0))
    method = make_method("rcc", model, RATIO, fill_id=5)
    reading = method.read(contexts)
    assert reading.num_entries == tuple(budget(len(c), RATIO, SEGMENT, head_length, filled=True) for c in contexts)
    assert all(memory.num_local == 0 for memory in reading.kept if memory.num_tokens > head_length)
    by_hand = [
        torch.cat([c, c.new_full((-max(0, len(c) - head_length) % SEGMENT if len(c) > head_length else 0,), 5)])
        for c in contexts
    ]
    other = make_method("rcc", model, RATIO)
    prompts = rows((3,) * len(contexts), seed=9)
    assert answers(method, reading, prompts) == answers(other, other.read(by_hand), prompts)
    allowed = tuple(min(len(c), size) for c, size in zip(contexts, reading.num_entries, strict=True))
    for name in BOUNDED:
        baseline = make_method(name, model, RATIO, fill_id=5)
        kept = baseline.read(contexts)
        if name == "mean-pool":  # means of what there is
            pools = tuple(min(len(c), head_length) - (-max(0, len(c) - head_length) // RATIO) for c in contexts)
            assert kept.num_entries == pools
            assert all(size <= most for size, most in zip(pools, allowed, strict=True))
        else:
            assert kept.num_entries == allowed, name
        assert len(answers(baseline, kept, prompts)) == len(contexts)


def test_the_budget_of_a_text_is_slots_and_raw_tokens():
    assert budget(39, 4, 16, filled=True) == 3 * 4
    assert budget(32, 4, 16, filled=True) == 2 * 4
    assert budget(10, 4, 16, head_length=8, filled=True) == 8 + 4
    assert budget(8, 4, 16, head_length=8, filled=True) == 8
    assert budget(39, 4, 16) == 2 * 4 + 7
    assert budget(39, 4, 16, head_length=8) == 8 + 4 + 15
    assert budget(15, 4, 16) == 15
    assert budget(2, 4, 16, head_length=8) == 2
    with pytest.raises(ValueError, match=r"ratio=3 does not divide segment_length=16"):
        budget(39, 3, 16)


def test_bytes_are_those_of_the_tensors(base):
    for name in ("full", *BOUNDED):
        reading = method_of(name, base).read(CONTEXTS)
        for row, nbytes, size in zip(reading.kept, reading.nbytes, reading.num_entries, strict=True):
            assert sum(k.nbytes + v.nbytes for k, v in row.layers) == nbytes
            assert row.layers[0][0].shape[-2] == size
    assert entry_nbytes(base) == 2 * 3 * 2 * 8 * 8


def test_bytes_of_rcc_are_those_of_the_cache(rcc):
    method = method_of("rcc", rcc)
    reading = method.read(CONTEXTS[:1])
    with torch.no_grad():
        cache = rcc(PROMPTS[0][None], memory=reading.kept[0], use_cache=True).past_key_values
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found == reading.nbytes[0] + len(PROMPTS[0]) * entry_nbytes(rcc)


# answers


def test_answers_end_before_a_stop_id(base):
    method = method_of("full", base)
    reading = method.read(CONTEXTS)
    free = answers(method, reading, PROMPTS, 8)
    stops = frozenset({free[0][3], free[2][0]})
    expected = [row[: next((i for i, token in enumerate(row) if token in stops), 8)] for row in free]
    assert answers(method, reading, PROMPTS, 8, stops) == expected
    assert expected[2] == []
    assert len(expected[0]) < 4


def test_refusals(rcc, base):
    method = method_of("full", base)
    reading = method.read(CONTEXTS)
    with pytest.raises(ValueError, match="no method 'fool'"):
        make_method("fool", base, 4)
    with pytest.raises(ValueError, match="needs a model that compresses"):
        make_method("rcc", base, 4)
    with pytest.raises(ValueError, match="segment_length=8 is not that of the model, 16"):
        make_method("rcc", rcc, 4, segment_length=8)
    with pytest.raises(ValueError, match="4 rows, and there are 3"):
        method.generate(reading, PROMPTS[:3], max_new_tokens=1, stop_ids=NO_STOP)
    with pytest.raises(ValueError, match=r"prompts\[1\] has shape \(0,\)"):
        answers(method, reading, [PROMPTS[0], PROMPTS[0][:0], *PROMPTS[2:]])
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        answers(method, reading, PROMPTS, 0)
    with pytest.raises(TypeError, match=r"contexts\[0\] is torch.float32"):
        method.read([torch.zeros(3)])
    with pytest.raises(TypeError, match=r"contexts\[0\] is list"):
        method.read([[1, 2]])
    with pytest.raises(ValueError, match="contexts are none"):
        method.read([])
