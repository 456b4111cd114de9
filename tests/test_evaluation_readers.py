# SPDX-License-Identifier: Apache-2.0
"""Benchmarks from files: every subset, divided losslessly, answerable, and errors that say where."""

import json

import datasets
import pytest

from rcc_hf.evaluation import benchmark_infinitebench, benchmark_leval, benchmark_longbench
from rcc_hf.evaluation.readers import BENCHMARKS, read_benchmark, read_qa_records
from rcc_hf.evaluation.scoring import SCORERS, score_examples

LONGBENCH = {
    "context": "Long {text} here.",
    "input": "Who {is} it?",
    "answers": ["me", "myself"],
    "all_classes": None,
    "length": 3,
    "_id": "x1",
}
OF_LONGBENCH = {
    "trec": {"input": "Question: Who?\nType:", "answers": ["Sport"], "all_classes": ["Sport", "Food"]},
    "lsht": {"answers": ["Sport"], "all_classes": ["Sport", "Food"]},
    "triviaqa": {"input": "Who is it?\nAnswer:"},
    "samsum": {"input": "Dialogue: A\nSummary:"},
    "passage_count": {"answers": ["7"]},
    "passage_retrieval_en": {"answers": ["Paragraph 7"]},
    "passage_retrieval_zh": {"answers": ["段落7"]},
}
OPTIONS = ["red", "green", "blue", "grey"]
INFINITEBENCH = {"id": 1, "context": "Long {text} here.", "input": "Who is it?", "answer": ["12"], "options": []}
OF_INFINITEBENCH = {
    "longbook_choice_eng": {"answer": ["blue"], "options": OPTIONS},
    "code_debug": {"answer": ["blue"], "options": OPTIONS},
    "math_find": {"input": "The largest number of the list is:", "answer": [12]},
    "math_calc": {"answer": [[1, 3, 2]]},
    "code_run": {"input": "Please give me the value of func_7(-3).", "answer": [-12]},
    "longdialogue_qa_eng": {"answer": ["ACE", "ACE ROTHSTEIN"]},
}
OF_LEVAL = {
    "coursera": "BD",
    "quality": "(B) They",
    "tpo": "B",
    "gsm100": "18",
    "codeU": "[1, 2]",
    "sci_fi": "True [fact: False]",
    "topic_retrieval_longchat": "The sea",
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def template_of(example, subset, **values):
    assert example.context + example.question + example.answer_prefix == subset.template.format(**values)


def check_scores(examples):
    """What is asked for gets 1, and nothing 0; the prompt behind the context does not give it away."""
    (perfect,) = score_examples(examples, [example.answers[0] for example in examples]).values()
    (broken,) = score_examples(examples, [""] * len(examples)).values()
    for name, value in perfect.values.items():
        assert value == pytest.approx(1), name
    assert set(broken.values.values()) == {0}


@pytest.mark.parametrize("subset", [*benchmark_longbench.SUBSETS, "hotpotqa_e"])
def test_every_subset_of_longbench(subset, tmp_path):
    row = LONGBENCH | OF_LONGBENCH.get(subset, {})
    write(tmp_path / f"{subset}.jsonl", row, row)
    examples = read_benchmark("longbench", tmp_path, subset)
    assert len(examples) == 2
    asked = benchmark_longbench.SUBSETS[subset.removesuffix("_e")]
    template_of(examples[0], asked, context=row["context"], input=row["input"])
    assert examples[0].context.endswith(row["context"])
    assert (examples[0].task, list(examples[0].answers)) == (subset, row["answers"])
    assert (examples[0].metadata["length"], examples[0].metadata["_id"]) == (3, "x1")
    expected = {"lsht": ""}.get(subset, asked.answer_prefix)
    assert examples[0].answer_prefix == expected
    check_scores(examples)


@pytest.mark.parametrize("subset", benchmark_infinitebench.SUBSETS)
def test_every_subset_of_infinitebench(subset, tmp_path):
    row = INFINITEBENCH | OF_INFINITEBENCH.get(subset, {})
    (example,) = read_benchmark("infinitebench", write(tmp_path / "x.jsonl", row), subset)
    values = {
        "prefix": "What is the largest number in the following list?", "func": "func_7", "func_call": "func_7(-3)",
        **{f"OPTION_{letter}": option for letter, option in zip("ABCD", OPTIONS, strict=True)},
    }  # fmt: skip
    asked = benchmark_infinitebench.SUBSETS[subset]
    template_of(example, asked, context=row["context"], input=row["input"], **values)
    assert example.answer_prefix == asked.answer_prefix
    if row["options"]:
        assert example.answers == ("blue", "C")
    check_scores([example])


@pytest.mark.parametrize("subset", [*benchmark_leval.CLOSED, *benchmark_leval.OPEN])
def test_every_subset_of_leval(subset, tmp_path):
    kinds = ["exam"] if subset in OF_LEVAL else ["f1", "rouge", "LLM", "human"]
    output = OF_LEVAL.get(subset, "a summary in five words")
    base = {"input": "Long {text}.", "instructions": ["One?", "Two?"], "outputs": [output] * 2, "source": "s"}
    for kind in kinds:
        file = write(tmp_path / "x.jsonl", base | {"evaluation": kind})
        if kind in ("LLM", "human"):
            with pytest.raises(ValueError, match="holds no examples"):
                read_benchmark("leval", file, subset)
            continue
        examples = read_benchmark("leval", file, subset)
        assert ["One?" in example.question for example in examples] == [True, False]
        assert all(example.context.endswith("\n\nLong {text}.") for example in examples)
        assert all(("Write 5 words." in example.question) == (kind != "exam") for example in examples)
        check_scores(examples)


SQUAD = {
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "Normandy is in France.",
                    "qas": [
                        {"id": "1", "question": "Where?", "answers": [{"text": "France"}, {"text": "in France"}] * 2},
                        {"id": "2", "question": "When?", "answers": [{"text": "now"}], "is_impossible": True},
                    ],
                },
                {"context": "It rains.", "qas": [{"question": "What?", "answers": [{"text": "It rains"}]}]},
            ],
        }
    ]
}


@pytest.mark.parametrize("benchmark", ["squad", "policyqa"])
def test_squad_as_one_file(benchmark, tmp_path):
    (tmp_path / "dev.json").write_text(json.dumps(SQUAD))
    examples = read_benchmark(benchmark, tmp_path / "dev.json")
    assert [(example.context, example.answers) for example in examples] == [
        ("Normandy is in France.", ("France", "in France")),
        ("It rains.", ("It rains",)),
    ]
    assert "Question: Where?\n" in examples[0].question
    assert examples[0].answer_prefix == "Answer:"
    check_scores(examples)


@pytest.mark.parametrize(
    "row",
    [
        {"context": "It rains.", "question": "What?", "answers": {"text": ["rain"], "answer_start": [3]}},
        {"document": "It rains.", "question": "What?", "answer": "rain"},
        {"passage": "It rains.", "question": "What?", "answers": ["rain", "rain", ""]},
        {"ctx": 1, "question": "What?", "answers": ["rain"]},
    ],
)
def test_flat_questions(row, tmp_path):
    write(tmp_path / "nq_contexts.jsonl", "It shines.", "It rains.")
    for benchmark in ("nq", "squad"):
        (example,) = read_benchmark(benchmark, write(tmp_path / "nq.jsonl", row), "mine")
        assert (example.context, example.answers, example.task) == ("It rains.", ("rain",), "mine")


SUMMARIES = ["Nothing happens.", "No plot."]


def test_flat_rows_of_several_sources(tmp_path):
    contexts = ["One line.\u2028And another.", "It rains."]
    (tmp_path / "qa_contexts.jsonl").write_text("".join(json.dumps(c, ensure_ascii=False) + "\n" for c in contexts))
    rows = [
        {"source": "nq-oracle", "ctx": 1, "question": "What?", "answers": ["rain", "rains"]},
        {"source": "pubmedqa", "ctx": 1, "question": "Dry?", "answers": ["no"], "long_answer": "It rains."},
        {"source": "squality", "ctx": 0, "question": "Plot?", "answers": SUMMARIES, "long": True},
    ]
    file = write(tmp_path / "qa.jsonl", *rows)
    short, closed, summary = examples = read_benchmark("flat", file)
    assert [example.task for example in examples] == ["nq-oracle", "pubmedqa", "squality"]
    assert [example.context for example in examples] == [contexts[1], contexts[1], contexts[0]]
    assert [example.metric for example in examples] == ["squad", "squad", "rouge_stemmed"]
    assert short.answers == ("rain", "rains")
    assert "with yes, no or maybe" in closed.question
    assert summary.answers == tuple(SUMMARIES)
    assert (summary.max_new_tokens, "in a paragraph" in summary.question) == (512, True)
    for example in examples:
        check_scores([example])
    (chosen,) = read_benchmark("flat", file, "nq")
    assert (chosen.task, chosen.question) == ("nq", short.question)
    with pytest.raises(ValueError, match="holds no examples of flat hotpot"):
        read_benchmark("flat", file, "hotpot")


def test_a_context_that_is_not_there_is_reported(tmp_path):
    write(tmp_path / "nq_contexts.jsonl", "It shines.")
    file = write(tmp_path / "nq.jsonl", {"ctx": 1, "question": "What?", "answers": ["rain"]})
    with pytest.raises(ValueError, match=r"line 1: ctx is 1; nq_contexts\.jsonl has 1 contexts"):
        read_benchmark("nq", file)


def test_squality_has_several_references(tmp_path):
    responses = [{"response_text": "He left home."}, {"response_text": "He went away."}]
    row = {"document": "Story.", "questions": [{"question_text": "What is the plot?", "responses": responses}]}
    examples = read_benchmark("squality", write(tmp_path / "x.jsonl", row))
    assert examples[0].answers == ("He left home.", "He went away.")
    assert "What is the plot?" in examples[0].question
    check_scores(examples)


def test_qmsum_has_general_and_specific_queries(tmp_path):
    row = {
        "meeting_transcripts": [{"speaker": "A", "content": "Hello ."}, {"speaker": "B", "content": "Bye ."}],
        "general_query_list": [{"query": "Summarize.", "answer": "They met today."}],
        "specific_query_list": [{"query": "Who left?", "answer": "It was B.", "relevant_text_span": [["1", "1"]]}],
    }
    examples = read_benchmark("qmsum", write(tmp_path / "x.jsonl", row))
    assert [example.context for example in examples] == ["A: Hello .\nB: Bye ."] * 2
    assert [example.metadata["kind"] for example in examples] == ["general", "specific"]
    check_scores(examples)


def test_rows_of_kvpress_keep_their_schema(tmp_path):
    row = {
        "context": "c", "question": "q", "answer_prefix": "a", "answer": ["x", "y"], "max_new_tokens": 3, "task": "vt",
    }  # fmt: skip
    file = write(tmp_path / "x.jsonl", row, row | {"task": "qa_1"})
    examples = read_benchmark("kvpress", file)
    assert [example.metric for example in examples] == ["string_match_all", "string_match_part"]
    assert examples[0].to_row() == row | {"metric": "string_match_all", "metadata": {}}


def test_a_name_is_loaded_through_datasets(monkeypatch):
    def load_dataset(path, name, split):
        assert (path, name, split) == ("THUDM/LongBench", "hotpotqa", "test")
        return datasets.Dataset.from_list([LONGBENCH])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (example,) = read_benchmark("longbench", "THUDM/LongBench", "hotpotqa")
    assert example.answers == ("me", "myself")


@pytest.mark.parametrize(
    ("benchmark", "subset", "row", "message"),
    [
        ("longbench", "qasper", {"context": "c"}, r"line 2: no field 'input', which longbench has; found context"),
        ("longbench", "qasper", LONGBENCH | {"answers": [""]}, r"line 2: not a record of longbench qasper .*none of"),
        ("infinitebench", "code_debug", INFINITEBENCH, r"line 2: .*expected four options with the answer '12'"),
        ("infinitebench", "code_run", INFINITEBENCH, r"line 2: .*the input 'Who is it\?' has nothing of the form"),
        ("leval", "tpo", {"instructions": ["a"], "outputs": []}, r"line 2: .*1 instructions for 0 outputs"),
        ("squality", None, {"document": "d"}, r"line 2: no field 'questions', which squality has"),
        ("nq", None, {"question": "q", "answer": "a"}, r"line 2: no field 'context'"),
        ("longbench", "tpo", {}, r"subset is 'tpo'; longbench has narrativeqa"),
        ("glue", "tpo", {}, r"benchmark is 'glue'; it must be one of longbench"),
    ],
)
def test_other_records_are_refused(benchmark, subset, row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_benchmark(benchmark, write_after_blank(tmp_path / "x.jsonl", row), subset)


def write_after_blank(path, row):
    path.write_text("\n" + json.dumps(row))
    return path


def test_absent_files_are_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.jsonl"):
        read_benchmark("squad", tmp_path / "absent.jsonl")
    with pytest.raises(FileNotFoundError, match=r"has no qasper\.jsonl"):
        read_benchmark("longbench", tmp_path, "qasper")


def test_every_subset_names_a_metric_that_exists():
    subsets = {**benchmark_longbench.SUBSETS, **benchmark_infinitebench.SUBSETS, **benchmark_leval.CLOSED}
    assert {subset.metric for subset in subsets.values()} <= set(SCORERS)
    assert len(benchmark_longbench.SUBSETS) == 21
    assert len(benchmark_infinitebench.SUBSETS) == 12
    assert len(benchmark_leval.CLOSED) + len(benchmark_leval.OPEN) == 20
    assert set(BENCHMARKS) > {"longbench", "leval", "infinitebench"}


def test_records_with_documents(tmp_path):
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    first, second = read_qa_records(tmp_path / "squad.json")
    assert (first.question, first.answers) == ("Where?", ("France", "in France"))
    assert (first.documents, first.related) == (("Normandy is in France.",), ("It rains.",))
    assert second.related == ("Normandy is in France.",)
    hotpot = [{"question": "Who?", "answer": "me", "context": [["T", ["It ", "is."]], ["U", ["me."]]]}]
    (tmp_path / "hotpot.json").write_text(json.dumps(hotpot))
    (record,) = read_qa_records(tmp_path / "hotpot.json")
    assert record.documents == ("T\nIt is.", "U\nme.")
    (tmp_path / "other.json").write_text('[{"question": "Who?"}]')
    with pytest.raises(ValueError, match=r"entry 0: neither SQuAD nor HotpotQA \(KeyError: 'context'"):
        read_qa_records(tmp_path / "other.json")
