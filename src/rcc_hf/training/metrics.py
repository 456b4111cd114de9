# SPDX-License-Identifier: Apache-2.0
"""What every number in the log of a training run means; `rcc train --help-metrics` prints it."""

import re

__all__ = ["METRICS", "explain"]

METRICS = {
    "loss": "What is minimised, cross_entropy + distillation_weight x distillation: mean since the last line.",
    "grad_norm": "Norm of the gradient of all that is trained, before clipping; last step.",
    "learning_rate": "Rate of the first part that is trained; the others follow the same schedule.",
    "epoch": "Share of the data set that has been seen; of a mixture, share of the steps.",
    "cross_entropy": "Nats per labelled token, from the true tokens before it; all objectives and processes since the "
    "last line.",
    "token_accuracy": "Share of labelled tokens that are the most likely one, from the true tokens before each.",
    "distillation": "KL(teacher || student) in nats per labelled token, times the temperature squared; with a teacher.",
    "cross_entropy_<objective>": "cross_entropy of that objective alone.",
    "token_accuracy_<objective>": "token_accuracy of that objective alone.",
    "distillation_<objective>": "distillation of that objective alone.",
    "source_tokens_per_second": "Context tokens of all processes a second, without the time of evaluating and saving.",
    "tokens_per_second": "The same with the local tokens behind the contexts.",
    "tflops_per_device": "10^12 operations a second, by the formula of rcc_hf.training.flops, per device.",
    "ceiling_share": "tflops_per_device over what the device reaches in products of 8192 x 8192 matrices in bfloat16, "
    "or over ceiling_tflops.",
    "peak_memory_gib": "Most memory that tensors have taken on a CUDA device since the start, GiB; largest of the "
    "processes.",
    "eval_loss": "cross_entropy of the held-out examples.",
    "eval_cross_entropy": "The same.",
    "eval_token_accuracy": "token_accuracy of the held-out examples.",
    "eval_distillation": "distillation of the held-out examples.",
    "eval_cross_entropy_<objective>": "cross_entropy of the held-out examples of that objective.",
    "eval_token_accuracy_<objective>": "token_accuracy of the held-out examples of that objective.",
    "eval_distillation_<objective>": "distillation of the held-out examples of that objective.",
    "eval_bleu4_r<ratio>": "Corpus BLEU-4, 0 to 1, of held-out passages that the model wrote down from memory at that "
    "ratio, greedily and on its own.",
    "eval_reconstruction_exact_match_r<ratio>": "Share of these passages without any mistake.",
    "eval_exact_match_r<ratio>": "SQuAD's exact match of answers to questions about a compressed context.",
    "eval_f1_r<ratio>": "SQuAD's F1 of these answers.",
    "eval_runtime": "Seconds of the evaluation.",
    "eval_samples_per_second": "Held-out examples per second.",
    "eval_steps_per_second": "Held-out batches per second.",
    "train_loss": "loss, mean over all steps of this start of the program.",
    "train_runtime": "Seconds of training, with all that was done between the steps.",
    "train_samples_per_second": "Examples over train_runtime.",
    "train_steps_per_second": "Optimizer steps over train_runtime.",
    "total_flos": "The Trainer's own estimate of operations, which knows nothing of contexts: see tflops_per_device.",
}
"""Meaning by name; `<objective>` and `<ratio>` stand for any."""


def explain(name: str) -> str:
    """What the number of that name means.

    Raises:
        ValueError: nothing of that name is logged.
    """
    if name in METRICS:
        return METRICS[name]
    for pattern, meaning in METRICS.items():
        start, mark, kind = pattern.partition("<")
        ending = r"\d+" if kind == "ratio>" else r".+"
        if mark and re.fullmatch(re.escape(start) + ending, name):
            return meaning
    raise ValueError(f"nothing named {name!r} is logged; there are {', '.join(METRICS)}")
