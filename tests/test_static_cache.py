# SPDX-License-Identifier: Apache-2.0
"""`generate` in a static cache behind memory against `generate` in the dynamic one."""

import copy

import pytest
import torch
from generating import EXACT, MODES, NEW, assert_decoded, case, decode, never_ending, padded
from tiny import VARIANTS, ratio_of_norms, rcc_model, text_config, tokenizer, tokens

from rcc_hf.modeling import generation_rcc
from rcc_hf.modeling.cache_rcc import RCCCache
from rcc_hf.modeling.cache_static_rcc import RCCStaticCache
from rcc_hf.modeling.generation_rcc import STATIC_STEP

STATIC = {"cache_implementation": "static"}
GREEDY = {"do_sample": False, "max_new_tokens": NEW}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return never_ending(rcc_model(**VARIANTS[request.param]))


def ragged(model, mode):
    """Three rows of different lengths, in memory, prompt or both."""
    contexts, short = [tokens(1, n, seed=n) for n in (70, 9, 37)], [tokens(1, n, seed=n) for n in (5, 11, 2)]
    prompts = short if mode == "memory" else [tokens(1, n, seed=n) for n in (90, 20, 55)]
    ids, mask = padded(prompts, "left")
    arguments = {"input_ids": ids, "attention_mask": mask}
    if mode != "long prompt":
        context, context_mask = padded(contexts, "right")
        arguments["memory"] = model.compress(context, attention_mask=context_mask)
    return arguments


def whole(model, **arguments):
    return model.generate(**{**GREEDY, **arguments}, return_dict_in_generate=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy(model, mode, batch_size):
    arguments, _ = case(model, mode, batch_size)
    assert_decoded(decode(model, **arguments, **STATIC), decode(model, **arguments))


@pytest.mark.parametrize("mode", MODES)
def test_ragged_batch(model, mode):
    arguments = ragged(model, mode)
    assert_decoded(decode(model, **arguments, **STATIC), decode(model, **arguments))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_memory(model, side):
    context, mask = padded([tokens(1, n, seed=n) for n in (70, 9, 37)], side)
    arguments = {"input_ids": tokens(3, 7, seed=1), "memory": model.compress(context, attention_mask=mask)}
    assert_decoded(decode(model, **arguments, **STATIC), decode(model, **arguments))


@pytest.mark.parametrize("mode", MODES)
def test_logits_of_single_steps(model, mode):
    """Without `generate`, which rounds them."""
    ids = case(model, mode)[0]["input_ids"]
    memory = case(model, mode)[0].get("memory")
    caches = RCCCache(3, memory, compress_prompt=True), RCCStaticCache(3, 120, memory, compress_prompt=True)
    fed = [ids, tokens(1, 1, seed=3), tokens(1, 4, seed=4), tokens(1, 1, seed=5)]
    with torch.no_grad():
        for new in fed:
            dynamic, static = (model(new, past_key_values=cache, use_cache=True).logits for cache in caches)
            assert ratio_of_norms(static, dynamic) <= EXACT
            assert caches[0].get_seq_length() == caches[1].get_seq_length()
            assert caches[0].physical_length == caches[1].physical_length == caches[1].get_query_offset()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", ["equal", "ragged"])
def test_beams(model, mode, rows):
    arguments = ragged(model, mode) if rows == "ragged" else case(model, mode, 2)[0]
    settings = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    static, dynamic = whole(model, **arguments, **settings, **STATIC), whole(model, **arguments, **settings)
    assert torch.equal(static.sequences, dynamic.sequences)
    assert torch.equal(static.beam_indices, dynamic.beam_indices)
    assert ratio_of_norms(static.sequences_scores, dynamic.sequences_scores) <= 1e-5  # the library sums in float32
    assert len({tuple(row) for row in static.sequences.tolist()}) == len(static.sequences)


@pytest.mark.parametrize("mode", MODES)
def test_sampling_and_scores(model, mode):
    arguments, outputs = ragged(model, mode), []
    for settings in (STATIC, {}):
        torch.manual_seed(3)
        settings = {**settings, "do_sample": True, "num_return_sequences": 3, "top_k": 0, "output_scores": True}
        outputs.append(whole(model, **arguments, **settings))
    static, dynamic = outputs
    assert torch.equal(static.sequences, dynamic.sequences)
    assert ratio_of_norms(torch.stack(static.scores), torch.stack(dynamic.scores)) <= 1e-5
    assert len({tuple(row) for row in static.sequences.tolist()}) > 3


def test_inputs_embeds(model):
    arguments, _ = case(model, "memory and long prompt")
    expected = decode(model, **arguments)
    embeds = model.get_input_embeddings()(arguments.pop("input_ids")).detach()
    assert_decoded(decode(model, inputs_embeds=embeds, **arguments, **STATIC), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", ["equal", "ragged"])
def test_keys_stay_where_they_are(mode, rows):
    model = never_ending(rcc_model())
    arguments = ragged(model, mode) if rows == "ragged" else case(model, mode)[0]
    seen = []

    def look(module, args, kwargs, output):
        cache = kwargs["past_key_values"]
        seen.append([t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values, cache.mask)])

    handle = model.register_forward_hook(look, with_kwargs=True)
    static = whole(model, **arguments, **STATIC, num_beams=2).past_key_values
    handle.remove()
    assert isinstance(static, RCCStaticCache)
    assert len(seen) == NEW
    assert all(places == seen[0] for places in seen)
    dynamic = whole(model, **arguments, num_beams=2).past_key_values
    assert static.layers[0].keys.shape[2] == static.mask.shape[1] == static.max_length == STATIC_STEP
    assert static.physical_length == dynamic.physical_length
    assert static.get_max_length() == static.max_length


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("compress", [True, False], ids=["compressed", "raw"])
@pytest.mark.parametrize("head", ["none", "one", "rows", "memory"])
def test_heads_and_raw_prompts(monkeypatch, head, compress, side):
    """However the entries come about, what is needed is known before: not rounded, the cache is filled to its end."""
    monkeypatch.setattr(generation_rcc, "STATIC_STEP", 1)
    model = never_ending(rcc_model())
    ids, mask = padded([tokens(1, n, seed=n) for n in (20, 61, 3)], side)
    arguments = {"input_ids": ids, "attention_mask": mask, "compress": compress}
    if head == "memory":
        context, context_mask = padded([tokens(1, n, seed=n) for n in (9, 54, 37)], side)
        arguments["memory"] = model.compress(context, attention_mask=context_mask, head_length=5)
    elif head != "none":
        arguments["head_length"] = 5 if head == "one" else [0, 7, 2]
    static, dynamic = whole(model, **arguments, **STATIC), whole(model, **arguments)
    assert torch.equal(static.sequences, dynamic.sequences)
    cache = static.past_key_values
    assert cache.get_seq_length() == dynamic.past_key_values.get_seq_length()
    if isinstance(dynamic.past_key_values, RCCCache):  # and not the base's own, for what is left to the base
        assert cache.max_length == cache.physical_length == dynamic.past_key_values.physical_length


@pytest.mark.parametrize(
    ("positions", "new_tokens", "given", "length"),
    [
        (512, 232, None, 256),  # 25 entries are slots and tokens of the prompt, and the last token is not decoded
        (512, 233, None, 512),
        (512, 233, 256, 512),
        (512, 5, 100, 100),
        (512, 5, 29, 29),
        (512, 5, 28, 256),
        (300, 240, None, 300),
        (64, 5, None, 64),
    ],
)
def test_lengths_are_rounded_up(positions, new_tokens, given, length):
    """As far as the base's range reaches, and not where the caller has chosen a length that will do."""
    model = never_ending(rcc_model(text_config=text_config(max_position_embeddings=positions)))
    arguments = {**case(model, "memory")[0], "max_new_tokens": new_tokens}
    cache = whole(model, **arguments, **STATIC, max_cache_len=given).past_key_values
    assert (cache.max_length, cache.physical_length) == (length, 25 + new_tokens - 1)


def test_more_entries_than_positions_are_rounded_up_too():
    """Slots at fractions of positions, and padding at none."""
    assert generation_rcc._static_length(300, 299) == 512
    assert generation_rcc._static_length(300, None) == 512


def test_a_longer_cache_once_made_stays(model):
    model = never_ending(rcc_model())
    arguments, _ = case(model, "memory")
    for given, length in ((None, 256), (300, 300), (None, 300), (280, 300)):
        assert whole(model, **arguments, **STATIC, max_cache_len=given).past_key_values.max_length == length


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("gemma3_text", {}), ("mistral", {}), ("qwen2", {"use_sliding_window": True, "max_window_layers": 1})],
)
def test_sliding_windows_that_cut(family, overrides):
    model = never_ending(rcc_model(text_config=text_config(family, sliding_window=24, **overrides)))
    wide = never_ending(rcc_model(text_config=text_config(family, sliding_window=400, **overrides)))
    arguments = ragged(model, "memory and long prompt")
    dynamic = decode(model, **arguments)
    assert ratio_of_norms(dynamic[1], decode(wide, **ragged(wide, "memory and long prompt"))[1]) > 1e-3
    assert_decoded(decode(model, **arguments, **STATIC), dynamic)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", ["equal", "ragged"])
def test_continuing_from_the_cache(model, mode, rows):
    arguments = ragged(model, mode) if rows == "ragged" else case(model, mode)[0]
    mask = arguments.get("attention_mask", torch.ones_like(arguments["input_ids"]))
    first = [whole(model, **arguments, **settings) for settings in ({**STATIC, "max_cache_len": 120}, {})]
    more = tokens(len(mask), 9, seed=8)
    mask = torch.cat([mask, torch.ones(len(mask), NEW + 9, dtype=torch.long)], 1)
    turns, alone = [], []
    for output in first:
        asked = torch.cat([output.sequences, more], 1)
        cache = copy.deepcopy(output.past_key_values)
        turns.append(decode(model, asked, attention_mask=mask, past_key_values=cache))
        unseen = asked[:, output.past_key_values.get_seq_length() :]
        alone.append(decode(model, unseen, attention_mask=mask, past_key_values=output.past_key_values))
    assert_decoded(*turns)
    assert_decoded(*alone)


def test_candidates_that_are_rejected_are_taken_out_of_the_cache(model):
    """In a cache made by hand; by name the library refuses static ones for assisted decoding."""
    arguments, _ = case(model, "memory")
    memory = arguments.pop("memory")
    arguments["input_ids"] = torch.cat([arguments["input_ids"], tokens(1, 3, seed=7).repeat(1, 4)], 1)
    expected, _ = decode(model, **arguments, memory=memory, count=16)
    cache, crops = RCCStaticCache(3, 120, memory), []
    cache.crop = lambda count: (crops.append(count), RCCStaticCache.crop(cache, count))
    settings = {"past_key_values": cache, "prompt_lookup_num_tokens": 3, "max_new_tokens": 16}
    assert torch.equal(model.generate(**arguments, **GREEDY | settings)[:, -16:], expected)
    assert min(crops) < 0


CHANGES = {
    "crop": (-3,),
    "reset": (),
    "batch_select_indices": (torch.tensor([2, 0]),),
    "batch_repeat_interleave": (2,),
    "reorder_cache": (torch.tensor([1, 2, 0]),),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_caches_go_on_as_the_dynamic_one(model, change):
    arguments = ragged(model, "memory")
    logits, masks = [], []
    for settings in ({**STATIC, "max_cache_len": 120}, {}):
        cache = whole(model, **arguments, **settings).past_key_values
        getattr(cache, change)(*CHANGES[change])
        masks.append(torch.nn.functional.pad(cache.mask.long(), (0, 120 - cache.mask.shape[1])))
        rows = {"batch_select_indices": 2, "batch_repeat_interleave": 6}.get(change, 3)
        with torch.no_grad():
            logits.append([model(tokens(rows, n, seed=n), past_key_values=cache).logits for n in (5, 1)])
    assert all(ratio_of_norms(a, b) <= EXACT for a, b in zip(*logits, strict=True))
    assert torch.equal(*masks)


def test_positions_that_are_fitted(model):
    """Slots spread over few positions: what is behind them moves down by another number in each row."""
    config = model.config
    before = config.fit_positions, config.slot_positions
    config.fit_positions, config.slot_positions = True, 10
    try:
        for mode in MODES:
            arguments = ragged(model, mode)
            fitted = decode(model, **arguments)
            assert_decoded(decode(model, **arguments, **STATIC), fitted)
            config.fit_positions = False
            assert ratio_of_norms(decode(model, **arguments)[1], fitted[1]) > 1e-3
            config.fit_positions = True
    finally:
        config.fit_positions, config.slot_positions = before


def test_too_long_is_refused(model):
    arguments, _ = case(model, "memory")
    first = whole(model, **arguments, **STATIC, max_cache_len=120)
    cache = first.past_key_values
    room, used = cache.max_length, cache.physical_length
    count = room - used  # the last new token is not fed
    decode(model, first.sequences, past_key_values=copy.deepcopy(cache), count=count)
    with pytest.raises(ValueError, match=f"room for {room} .*but {room + 1} .*max_cache_len={room + 1}"):
        model.generate(first.sequences, past_key_values=cache, **GREEDY | {"max_new_tokens": count + 1})
    assert (cache.physical_length, cache.max_length) == (used, room)  # and nothing has been written
    small = RCCStaticCache(3, 10, arguments["memory"])
    with pytest.raises(ValueError, match=r"room for 10 entries.*but 25 are needed"):
        model(arguments["input_ids"], past_key_values=small)
    small = RCCStaticCache(3, 26, arguments["memory"])
    with torch.no_grad():
        model(arguments["input_ids"], past_key_values=small)
        model(tokens(1, 1), past_key_values=small)
        with pytest.raises(ValueError, match=r"room for 26 entries.*but 27 are needed"):
            model(tokens(1, 1), past_key_values=small)


def test_a_continuation_beyond_the_range_of_the_base_is_refused():
    model = never_ending(rcc_model(text_config=text_config(max_position_embeddings=64)))
    first = whole(model, **case(model, "memory")[0], **STATIC, max_cache_len=200)
    asked = torch.cat([first.sequences, tokens(1, 9, seed=8)], 1)
    assert first.past_key_values.physical_length == 32  # and 1 + 9 + 22 are the rest of 64
    with pytest.raises(ValueError, match="need 65 positions, but the base was trained for 64"):
        model.generate(asked, past_key_values=first.past_key_values, **GREEDY | {"max_new_tokens": 24})
    model.generate(asked, past_key_values=first.past_key_values, **GREEDY | {"max_new_tokens": 23})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["offloaded_static", "sliding_window", "offloaded_hybrid"])
def test_other_static_caches_are_refused(model, mode, name):
    with pytest.raises(ValueError, match=f"does not work with cache_implementation='{name}'; leave that out"):
        model.generate(**case(model, mode)[0], cache_implementation=name, **GREEDY)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_takes_other_masks_is_refused(model, attention):
    arguments, _ = case(model, "memory")
    text = model.config.text_config
    text._attn_implementation = attention  # set, not loaded: the refusal comes first
    try:
        with pytest.raises(ValueError, match=rf"attn_implementation='{attention}' \('sdpa' and 'eager' work\)"):
            model.generate(**arguments, **STATIC, **GREEDY)
    finally:
        text._attn_implementation = "sdpa"


def test_a_model_that_is_set_to_a_static_cache(model):
    config, arguments = model.generation_config, case(model, "long prompt")[0]
    kinds = {}
    try:
        for name in ("static", "hybrid"):  # the second as Gemma 2 has it in its generation_config.json
            config.cache_implementation = name
            kinds[name] = type(whole(model, **arguments).past_key_values)
    finally:
        config.cache_implementation = None
    assert kinds == {"static": RCCStaticCache, "hybrid": RCCCache}


def test_stop_strings(model):
    arguments, _ = case(model, "memory")
    expected, _ = decode(model, **arguments)
    words = tokenizer()
    words.add_tokens(["abcdef"])  # by which the library finds out how the tokenizer joins words
    settings = {**GREEDY, **STATIC, "tokenizer": words, "stop_strings": [f"w{expected[0, 3]}"]}
    new = model.generate(**arguments, **settings)[0, arguments["input_ids"].shape[1] :]
    assert new.tolist() == expected[0, : expected[0].tolist().index(int(expected[0, 3])) + 1].tolist()


@pytest.mark.parametrize("settings", [{}, STATIC], ids=["dynamic", "static"])
def test_custom_generate(model, settings):
    """A decoding loop of the caller's gets a cache with the memory, and everything else that `generate` prepares."""

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        outputs = model._prefill(input_ids, generation_config, kwargs)
        assert isinstance(kwargs["past_key_values"], RCCStaticCache if settings else RCCCache)
        for _ in range(NEW):
            kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
            input_ids = torch.cat([input_ids, outputs.logits[:, -1:].argmax(-1)], 1)
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **kwargs)
            outputs = model(**inputs)
        return input_ids

    arguments, _ = case(model, "memory", 2)
    expected = model.generate(**arguments, **GREEDY)
    custom = {**GREEDY, **settings, "max_cache_len": 120 if settings else None}
    assert torch.equal(model.generate(**arguments, **custom, custom_generate=loop), expected)
