# SPDX-License-Identifier: Apache-2.0
"""LongBench (https://arxiv.org/abs/2308.14508): prompts, lengths of answers and metrics of its 21 subsets.

The texts are data of https://github.com/THUDM/LongBench (MIT), spelling included, without which scores could not be
compared. LongBench-E has the same under names that end in `_e`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.prompts import Subset, fill

__all__ = ["SUBSETS", "examples"]

_STORY = (
    "Answer the question asconcisely as you can, using a single phrase if possible. Do not provide any explanation."
)
_STORY_AGAIN = (
    "Now, answer the question based on the story asconcisely as you can, using a single phrase if possible. "
    "Do not provide any explanation."
)
_ARTICLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.'
)
_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words."
)
_MULTIHOP = Subset(
    template=(
        f"{_PASSAGES}\n\nThe following are given passages.\n{{context}}\n\n{_PASSAGES}\n\nQuestion: {{input}}\nAnswer:"
    ),
    answer_prefix="Answer:",
    max_new_tokens=32,
    metric="squad",
)
_CODE = "Please complete the code given below. \n{context}"

SUBSETS = {
    "narrativeqa": Subset(
        template=(
            "You are given a story, which can be either a novel or a movie script, and a question. "
            f"{_STORY}\n\nStory: {{context}}\n\n{_STORY_AGAIN}\n\nQuestion: {{input}}\n\nAnswer:"
        ),
        answer_prefix="Answer:",
        max_new_tokens=128,
        metric="squad",
    ),
    "qasper": Subset(
        template=(
            f"You are given a scientific article and a question. Answer the question {_ARTICLE}\n\nArticle: {{context}}"
            f"\n\n Answer the question based on the above article {_ARTICLE}\n\nQuestion: {{input}}\n\nAnswer:"
        ),
        answer_prefix="Answer:",
        max_new_tokens=128,
        metric="squad",
    ),
    "multifieldqa_en": Subset(
        template=(
            "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on "
            "the above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"
        ),
        answer_prefix="Answer:",
        max_new_tokens=64,
        metric="squad",
    ),
    "multifieldqa_zh": Subset(
        template=(
            "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，"  # noqa: RUF001
            "不要输出任何其他字词。\n\n问题：{input}\n回答："  # noqa: RUF001
        ),
        answer_prefix="回答：",  # noqa: RUF001
        max_new_tokens=64,
        metric="longbench_f1_zh",
    ),
    "hotpotqa": _MULTIHOP,
    "2wikimqa": _MULTIHOP,
    "musique": _MULTIHOP,
    "dureader": Subset(
        template=(
            "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n"  # noqa: RUF001
            "问题：{input}\n回答："  # noqa: RUF001
        ),
        answer_prefix="回答：",  # noqa: RUF001
        max_new_tokens=128,
        metric="longbench_rouge_zh",
    ),
    "gov_report": Subset(
        template=(
            "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
            "Report:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:"
        ),
        answer_prefix="Summary:",
        max_new_tokens=512,
        metric="longbench_rouge",
    ),
    "qmsum": Subset(
        template=(
            "You are given a meeting transcript and a query containing a question or instruction. Answer the query in "
            "one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting "
            "transcript in one or more sentences.\n\nQuery: {input}\nAnswer:"
        ),
        answer_prefix="Answer:",
        max_new_tokens=512,
        metric="longbench_rouge",
    ),
    "multi_news": Subset(
        template=(
            "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\n"
            "Now, write a one-page summary of all the news.\n\nSummary:"
        ),
        answer_prefix="Summary:",
        max_new_tokens=512,
        metric="longbench_rouge",
    ),
    "vcsum": Subset(
        template="下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",  # noqa: RUF001
        answer_prefix="会议总结：",  # noqa: RUF001
        max_new_tokens=512,
        metric="longbench_rouge_zh",
    ),
    "trec": Subset(
        template=(
            "Please determine the type of the question below. Here are some examples of questions.\n\n"
            "{context}\n{input}"
        ),
        answer_prefix="Type:",
        max_new_tokens=64,
        metric="longbench_class",
    ),
    "triviaqa": Subset(
        template=(
            "Answer the question based on the given passage. Only give me the answer and do not output any other "
            "words. The following are some examples.\n\n{context}\n\n{input}"
        ),
        answer_prefix="Answer:",
        max_new_tokens=32,
        metric="longbench_f1_first_line",
    ),
    "samsum": Subset(
        template=(
            "Summarize the dialogue into a few short sentences. The following are some examples.\n\n"
            "{context}\n\n{input}"
        ),
        answer_prefix="Summary:",
        max_new_tokens=128,
        metric="longbench_rouge_first_line",
    ),
    "lsht": Subset(
        template="请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",  # noqa: RUF001
        answer_prefix="类别：",  # noqa: RUF001
        max_new_tokens=64,
        metric="longbench_class",
    ),
    "passage_count": Subset(
        template=(
            "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully "
            "read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In "
            "other words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final "
            "count of unique paragraphs after removing duplicates. The output format should only contain the number, "
            "such as 1, 2, 3, and so on.\n\nThe final answer is: "
        ),
        answer_prefix="The final answer is: ",
        max_new_tokens=32,
        metric="longbench_number",
    ),
    "passage_retrieval_en": Subset(
        template=(
            "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the "
            "abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of "
            'the paragraph that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.'
            "\n\nThe answer is: "
        ),
        answer_prefix="The answer is: ",
        max_new_tokens=32,
        metric="longbench_number",
    ),
    "passage_retrieval_zh": Subset(
        template=(
            "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n"  # noqa: RUF001
            '下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n'  # noqa: RUF001
            "答案是："  # noqa: RUF001
        ),
        answer_prefix="答案是：",  # noqa: RUF001
        max_new_tokens=32,
        metric="longbench_number",
    ),
    "lcc": Subset(
        template=f"{_CODE}Next line of code:\n",
        answer_prefix="Next line of code:\n",
        max_new_tokens=64,
        metric="longbench_code",
    ),
    "repobench-p": Subset(
        template=f"{_CODE}{{input}}Next line of code:\n",
        answer_prefix="Next line of code:\n",
        max_new_tokens=64,
        metric="longbench_code",
    ),
}


def examples(row: Mapping[str, Any], subset: str) -> Iterator[Example]:
    """The example of one record `{"context", "input", "answers", "all_classes", "length", "_id"}`.

    Raises:
        KeyError: a field is missing.
    """
    metadata = {name: row[name] for name in ("_id", "length", "language", "all_classes") if row.get(name) is not None}
    values = {"context": row["context"], "input": row["input"]}
    yield fill(SUBSETS[subset.removesuffix("_e")], subset, list(row["answers"]), values, metadata)
