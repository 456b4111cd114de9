# SPDX-License-Identifier: Apache-2.0
"""What `generate` gives and takes beside tokens: scores, streamers, limits, pipelines; what it leaves to the base, or
refuses."""

import copy

import pytest
import torch
from generating import EXACT, MODES, NEW, case, decode, loop, never_ending, teacher_forced
from tiny import RATIO, SEGMENT, WINDOW, base_with_weights_of, ratio_of_norms, rcc_model, tokenizer, tokens, words
from transformers import DynamicCache, LogitsProcessor, StaticCache, pipeline

from rcc_hf.modeling.cache_rcc import RCCCache


@pytest.fixture(scope="module")
def model():
    return never_ending(rcc_model())


def test_scores_hidden_states_and_attentions():
    eager = never_ending(rcc_model(attn="eager"))
    arguments, (local, memory) = case(eager, "memory")
    settings = {"output_scores": True, "output_hidden_states": True, "output_attentions": True}
    output = eager.generate(**arguments, **settings, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    new = output.sequences[:, -3:]
    with torch.no_grad():
        whole = eager(torch.cat([local, new], 1), memory=memory, use_cache=False, output_hidden_states=True)
    assert [len(output.scores), len(output.hidden_states), len(output.attentions)] == [3, 3, 3]
    for step, hidden in enumerate(output.hidden_states):
        first, last = (0, local.shape[1]) if step == 0 else (local.shape[1] + step - 1, local.shape[1] + step)
        for layer, expected in zip(hidden, whole.hidden_states, strict=True):
            assert ratio_of_norms(layer, expected[:, first:last]) <= EXACT
        keys = memory.num_slots + memory.num_local + local.shape[1] + step
        assert [a.shape[-1] for a in output.attentions[step]] == [keys] * 3
    scores = eager.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    expected = teacher_forced(eager, local, new, memory).log_softmax(-1).gather(2, new[..., None])[..., 0]
    assert ratio_of_norms(scores.double(), expected) <= 1e-5


class Collector:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("mode", MODES)
def test_streamer(model, mode):
    arguments, _ = case(model, mode)
    streamer = Collector()
    whole = model.generate(**arguments, streamer=streamer, do_sample=False, max_new_tokens=NEW)
    assert (streamer.ids, streamer.ended) == (whole[0].tolist(), True)


def test_stop_strings(model):
    arguments, _ = case(model, "memory")
    expected, _ = decode(model, **arguments)
    stop, words_of = f"w{expected[0, 3]}", tokenizer()
    words_of.add_tokens(["abcdef"])  # by which the library finds out how the tokenizer joins words
    new = model.generate(**arguments, stop_strings=[stop], tokenizer=words_of, do_sample=False, max_new_tokens=NEW)
    first = expected[0].tolist().index(int(expected[0, 3]))
    assert new[0, arguments["input_ids"].shape[1] :].tolist() == expected[0, : first + 1].tolist()


class Recorder(LogitsProcessor):
    """Sees how many tokens `generate` believes to have."""

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        return scores


def test_processors_and_length_limits_count_tokens_of_the_prompt(model):
    arguments, _ = case(model, "long prompt")
    length, recorder = arguments["input_ids"].shape[1], Recorder()
    output = model.generate(**arguments, max_length=length + 4, do_sample=False, logits_processor=[recorder])
    assert output.shape[1] == length + 4
    assert recorder.lengths == list(range(length, length + 4))


@pytest.fixture(scope="module")
def base(model):
    """The plain model of transformers with the same weights."""
    return never_ending(base_with_weights_of(model))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"num_beams": 3},
        {"do_sample": True},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_short_prompt_without_memory_takes_the_path_of_the_base(model, base, settings):
    prompt = tokens(2, WINDOW - 3)
    if "prompt_lookup_num_tokens" in settings:
        prompt = tokens(1, 3).repeat(1, 6)
    if settings.get("cache_implementation") == "static":
        settings = {**settings, "disable_compile": True}
    results = []
    for one in (model, base):
        torch.manual_seed(5)
        output = one.generate(
            prompt, **{"do_sample": False, "max_new_tokens": 20} | settings, return_dict_in_generate=True
        )
        results.append(output)
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert type(results[0].past_key_values) is type(results[1].past_key_values)
    assert not isinstance(results[0].past_key_values, RCCCache)


def test_a_prompt_that_just_fits_the_window_is_short(model):
    settings = {"do_sample": False, "max_new_tokens": 2, "return_dict_in_generate": True}
    assert not isinstance(model.generate(tokens(1, WINDOW), **settings).past_key_values, RCCCache)
    assert model.generate(tokens(1, WINDOW + 1), **settings).past_key_values.num_slots == SEGMENT // RATIO


def test_short_prompt_has_the_logits_of_the_base_bit_for_bit(model, base):
    prompt = tokens(2, WINDOW)
    (new, logits), expected = decode(model, prompt), decode(base, prompt)
    assert torch.equal(new, expected[0])
    assert torch.equal(logits, expected[1])


def test_a_chat_that_outgrows_the_window_goes_on_in_its_cache(model, base):
    """A plain cache that has been used is continued as the base would; its tokens were never compressed."""
    prompt, more = tokens(1, 20), tokens(1, 20, seed=1)
    texts = []
    for one in (model, base):
        first = one.generate(prompt, do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True)
        asked = torch.cat([first.sequences, more], 1)
        assert asked.shape[1] > WINDOW
        texts.append(decode(one, asked, past_key_values=first.past_key_values))
    assert torch.equal(texts[0][0], texts[1][0])
    assert torch.equal(texts[0][1], texts[1][1])


def fresh_static_cache(model):
    return StaticCache(config=model.config.text_config, max_cache_len=128)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
        ({"use_cache": False}, "use_cache=False"),
        ({"prefill_chunk_size": 16}, "prefill_chunk_size=16"),
        ({"past_key_values": lambda model: DynamicCache()}, "DynamicCache"),
        ({"past_key_values": lambda model: DynamicCache(config=model.config)}, "DynamicCache"),
        ({"past_key_values": fresh_static_cache}, "StaticCache"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_modes_that_cannot_hold_memory_are_refused(model, mode, settings, named):
    arguments, _ = case(model, mode)
    settings = {name: value(model) if callable(value) else value for name, value in settings.items()}
    with pytest.raises(ValueError, match="leave that out") as error:
        model.generate(**arguments, **settings, do_sample=False, max_new_tokens=2)
    assert named in str(error.value)
    what = "a prompt of 61 tokens, longer than the window of 32" if mode == "long prompt" else "a memory"
    assert what in str(error.value)


def test_a_used_cache_and_a_memory_are_refused(model):
    """The cache of an earlier call holds its memory already; a second one would have to go in front of it."""
    arguments, _ = case(model, "memory")
    first = model.generate(**arguments, do_sample=False, max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="RCCCache"):
        decode(model, first.sequences, past_key_values=first.past_key_values, memory=arguments["memory"])


def test_continuous_batching_is_refused(model):
    """Without the refusal, `generate` gives the prompt back and says nothing."""
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model.generate(tokens(1, 61), cache_implementation="paged", max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="padded batch"):
        model.init_continuous_batching()


def test_prompts_that_are_no_multiple_of_the_memory_are_refused(model):
    with pytest.raises(ValueError, match="a memory of 2 rows cannot serve a batch of 3 prompts"):
        model.generate(tokens(3, 5), memory=model.compress(tokens(2, 54)), max_new_tokens=2)


def test_pipeline(model):
    """Texts of 80, 12 and 61 words in batches of two, which are padded on the left, equal the texts one by one."""
    texts = [words(tokens(1, n, seed=n)[0]) for n in (80, 12, 61)]
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer())
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False}
    single = [generator(text, **settings)[0]["generated_text"] for text in texts]
    assert [out[0]["generated_text"] for out in generator(texts, batch_size=2, **settings)] == single
    ids = tokenizer()(texts[0], return_tensors="pt").input_ids
    assert single[0] == words(decode(model, ids)[0][0])
    with_memory = generator(texts[1], memory=model.compress(tokens(1, 54)), **settings)[0]["generated_text"]
    assert with_memory == words(decode(model, tokens(1, 12, seed=12), memory=model.compress(tokens(1, 54)))[0][0])


def test_generate_leaves_the_memory_as_it_was(model):
    memory = model.compress(tokens(2, 54))
    before = copy.deepcopy(memory)
    decode(model, tokens(2, 61, seed=1), memory=memory)
    decode(model, tokens(2, 5, seed=1), memory=memory, num_beams=2, do_sample=True)
    for name, tensor in before._tensors().items():
        assert torch.equal(memory._tensors()[name], tensor)
    assert (memory.row_tokens, memory.slot_counts) == (before.row_tokens, before.slot_counts)


def test_conversations_on_one_model_do_not_mix(model):
    """Steps of two conversations and of the plain model in turn, each as if it were alone."""
    memories = [model.compress(tokens(1, 54)), model.compress(tokens(1, 37, seed=5)), None]
    prompts = [tokens(1, n, seed=n) for n in (4, 6, 5)]
    expected = [loop(model, prompt, memory)[0] for prompt, memory in zip(prompts, memories, strict=True)]
    caches, given, taken = [None] * 3, list(prompts), [[] for _ in range(3)]
    with torch.no_grad():
        for step in range(NEW):
            for i in range(3):
                memory = memories[i] if step == 0 else None
                output = model(given[i], memory=memory, past_key_values=caches[i], use_cache=True)
                caches[i], given[i] = output.past_key_values, output.logits[:, -1:].argmax(-1)
                taken[i].append(given[i])
    assert all(torch.equal(torch.cat(t, 1), e) for t, e in zip(taken, expected, strict=True))
