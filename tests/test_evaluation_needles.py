# SPDX-License-Identifier: Apache-2.0
"""Needles in fillers: lengths, depths, and that the context has the answer and the prompt has not."""

import random
import re
import subprocess
import sys

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rcc_hf.evaluation import vocabulary
from rcc_hf.evaluation.fillers import NOISE, RepetitiveFiller, TextFiller, WordFiller
from rcc_hf.evaluation.lengths import TokenCounter, fit_units, take_units
from rcc_hf.evaluation.needles import NeedleTask, hide, needle_grid
from rcc_hf.evaluation.scoring import score_examples
from rcc_hf.evaluation.vocabulary import ADJECTIVES, NOUNS, distinct_words, random_uuid
from rcc_hf.smollm import smollm2_path

PARAGRAPHS = [
    f'It was number {i} of many. "Was it?" he said. They {verb} on through the rain, and nobody spoke! Then it ended.'
    for i, verb in enumerate(("walked", "rode", "sailed", "marched"))
]
FILLERS = [RepetitiveFiller(), WordFiller(), TextFiller(PARAGRAPHS, "books")]


def trained(splitter):
    """A tokenizer of 400 pieces; Metaspace's joins, as in Llama 2, what a text alone begins with."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = splitter
    alphabet = ByteLevel.alphabet() if isinstance(splitter, ByteLevel) else sorted({chr(i) for i in range(32, 127)})
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*NOISE, *PARAGRAPHS, " ".join(NOUNS[:50])], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module", params=["bytes", "metaspace"])
def tokenizer(request):
    splitters = {"bytes": ByteLevel(add_prefix_space=False), "metaspace": Metaspace()}
    return trained(splitters[request.param])


def count(tokenizer, text):
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def longest_unit(filler, tokenizer):
    units = filler.units(random.Random(0))
    return max(count(tokenizer, "." + next(units)) for _ in range(2000))


@pytest.mark.parametrize("filler", FILLERS, ids=lambda filler: filler.name)
def test_lengths_are_exact_to_a_unit_and_never_exceeded(filler, tokenizer):
    slack = longest_unit(filler, tokenizer)
    task = NeedleTask(filler=filler)
    for example in needle_grid(task, tokenizer, lengths=[200, 333, 2048], depths=[0, 0.37, 1], num_repeats=2):
        tokens = count(tokenizer, example.context)
        assert tokens == example.metadata["context_tokens"]
        assert example.metadata["length"] - slack < tokens <= example.metadata["length"]


@pytest.mark.parametrize("filler", FILLERS, ids=lambda filler: filler.name)
def test_a_needle_stands_at_its_depth(filler, tokenizer):
    slack = longest_unit(filler, tokenizer)
    depths = [0, 0.25, 0.5, 0.9, 1]
    for example in needle_grid(NeedleTask(filler=filler), tokenizer, lengths=[1500], depths=depths):
        before, needle, after = re.split(
            r"( The pass key is \d+\. Remember it\. \d+ is the pass key\.)", example.context
        )
        intro = before.index("important information there.") + len("important information there.")
        first, second = count(tokenizer, before[intro:]), count(tokenizer, after)
        assert first == pytest.approx(example.metadata["depth"] * (first + second), abs=slack / 2 + 3)
        if example.metadata["depth"] in (0, 1):
            assert (first, second)[int(example.metadata["depth"])] == 0
        assert needle.count(example.answers[0]) == 2


@pytest.mark.parametrize("key_type", ["number", "uuid"])
@pytest.mark.parametrize(("num_needles", "num_queries"), [(1, 1), (4, 1), (4, 3)])
def test_the_context_has_the_answer_and_the_prompt_has_not(tokenizer, key_type, num_needles, num_queries):
    task = NeedleTask(filler=WordFiller(), key_type=key_type, num_needles=num_needles, num_queries=num_queries)
    examples = list(needle_grid(task, tokenizer, lengths=[1000], depths=[0, 0.5, 1], num_repeats=3))
    for example in examples:
        prompt = example.question + example.answer_prefix
        assert len(example.answers) == len(set(example.answers)) == num_queries
        assert not any(answer in prompt for answer in example.answers)
        if num_needles == 1:
            assert re.findall(r"The pass key is (\S+)\.", example.context) == list(example.answers)
        else:
            hidden = dict(re.findall(r"The magic \w+ of (\S+) is (\S+)\.", example.context))
            assert len(hidden) == num_needles
            asked = re.findall(r"[a-z]+-[a-z]+", example.question)
            assert [hidden[name] for name in asked] == list(example.answers)
    right = [", ".join(example.answers) for example in examples]
    (perfect,) = score_examples(examples, right).values()
    (broken,) = score_examples(examples, right[1:] + right[:1]).values()
    assert set(perfect.values.values()) == {1}
    assert set(broken.values.values()) == {0}


def test_values_are_distinct(tokenizer):
    task = NeedleTask(filler=WordFiller(), num_needles=9, num_queries=9, num_digits=1)
    (example,) = needle_grid(task, tokenizer, lengths=[1000], depths=[0.5])
    assert sorted(example.answers) == list("123456789")


def test_an_example_depends_on_seed_and_place_alone(tokenizer):
    task = NeedleTask(filler=WordFiller(), num_needles=3)
    whole = list(needle_grid(task, tokenizer, lengths=[300, 400], depths=[0.2, 0.8], num_repeats=2))
    part = list(needle_grid(task, tokenizer, lengths=[400], depths=[0.8, 0.2], num_repeats=2))
    assert part == [whole[6], whole[7], whole[4], whole[5]]
    assert len({example.context for example in whole}) == 8
    other = list(needle_grid(task, tokenizer, lengths=[400], depths=[0.8, 0.2], num_repeats=2, seed=1))
    assert not {example.answers for example in other} & {example.answers for example in whole}


@pytest.mark.parametrize("number", [500, 1000])
def test_words_do_not_depend_on_the_process(number):
    code = (
        "import random, runpy, sys; words = runpy.run_path(sys.argv[1])['distinct_words'];"
        "print(words(random.Random('a|b'), int(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, vocabulary.__file__, str(number)]
    environments = [{"PYTHONHASHSEED": seed} for seed in ("1", "2")]
    outputs = {subprocess.run(command, env=env, capture_output=True, text=True).stdout for env in environments}
    assert outputs == {f"{distinct_words(random.Random('a|b'), number)}\n"}


def test_text_starts_anywhere_and_repeats():
    filler = TextFiller(["One. Two?", " ", "Three\n four!"])
    texts = set()
    for seed in range(9):
        units = filler.units(random.Random(seed))
        texts.add("".join(next(units) for _ in range(4)))
    assert texts == {"\n\nOne. Two?\n\nThree four!\n\nOne.", "\n\nThree four!\n\nOne. Two?\n\nThree four!"}
    with pytest.raises(ValueError, match="filler 'essay' has no text"):
        TextFiller(["", "\n"])


def test_needles_of_equal_depth_keep_their_order():
    render = hide("I:", [" a", " b", " c", " d"], [1, 1, 1, 1], [" X", " Y", " Z"], [0.5, 0, 0.5])
    assert render(4) == "I: Y a b X Z c d"
    assert render(2) == "I: Y a X Z b"
    assert render(0) == "I: Y X Z"


def test_sizes_that_mislead_cost_time_but_no_exactness():
    class Characters:
        def __call__(self, text, **kwargs):
            rows = [list(map(ord, row)) for row in text] if isinstance(text, list) else list(map(ord, text))
            return {"input_ids": rows}

    counter = TokenCounter(Characters())
    units = ["abc"] * 400
    for factor in (0.2, 1, 5):
        for budget in (10, 11, 12, 999):
            number, text, tokens = fit_units(lambda n: "".join(units[:n]), [3 * factor] * 400, counter, budget)
            assert (len(text), number * 3) == (tokens, tokens)
            # sizes that are too large end the search where a unit more seems too much
            assert budget - max(3, 3 * factor) < tokens <= budget
    with pytest.raises(ValueError, match="9 tokens are too few: what must be in the text has 10 already"):
        fit_units(lambda n: "x" * (10 + n), [1] * 5, counter, 9)


def test_units_are_tokenized_once(tokenizer):
    calls = []

    class Counting:
        def __call__(self, text, **kwargs):
            calls.append(text)
            return tokenizer(text, **kwargs)

    counter = TokenCounter(Counting())
    units, sizes = take_units(RepetitiveFiller().units(random.Random(0)), counter, 20_000)
    assert sum(sizes) > 20_000
    assert len(units) == len(sizes)
    assert sum(len(call) for call in calls if isinstance(call, list)) == len(NOISE)
    calls.clear()
    examples = list(needle_grid(NeedleTask(filler=WordFiller()), Counting(), lengths=[50_000], depths=[0.5]))
    assert sum(isinstance(call, str) and len(call) > 1000 for call in calls) <= 2
    assert count(tokenizer, examples[0].context) > 49_900


def test_random_uuids_are_of_version_4():
    form = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
    generator = random.Random(0)
    assert all(form.fullmatch(random_uuid(generator)) for _ in range(100))


def test_words_are_distinct():
    assert len({*ADJECTIVES, *NOUNS}) == len(ADJECTIVES) + len(NOUNS)
    many = distinct_words(random.Random(0), 100_000)
    assert len(set(many)) == 100_000
    assert set(distinct_words(random.Random(0), 50)) < {*ADJECTIVES, *NOUNS}
    with pytest.raises(ValueError, match="10000000 different words were asked for"):
        distinct_words(random.Random(0), 10**7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_type": "word"}, "key_type is 'word'"),
        ({"num_needles": 2, "num_queries": 3}, "num_queries is 3 and num_needles 2"),
        ({"num_digits": 0}, "num_digits is 0"),
    ],
)
def test_a_task_without_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NeedleTask(filler=WordFiller(), **options)


def test_a_cell_without_sense_is_refused(tokenizer):
    task = NeedleTask(filler=WordFiller())
    with pytest.raises(ValueError, match="depth is 50; it must lie between 0"):
        next(needle_grid(task, tokenizer, lengths=[500], depths=[50]))
    with pytest.raises(ValueError, match="20 tokens are too few"):
        next(needle_grid(task, tokenizer, lengths=[20], depths=[0.5]))


@pytest.mark.real
def test_real_tokenizer_gets_exact_lengths(tmp_path_factory):
    real = AutoTokenizer.from_pretrained(smollm2_path(tmp_path_factory.mktemp("smollm2"), progress=False))
    for filler in FILLERS:
        slack = longest_unit(filler, real)
        for example in needle_grid(NeedleTask(filler=filler, key_type="uuid"), real, lengths=[30_000], depths=[0.5]):
            assert 30_000 - slack < count(real, example.context) <= 30_000
