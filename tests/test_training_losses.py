# SPDX-License-Identifier: Apache-2.0
"""Losses from hidden states in pieces: what they and their gradients are, and how the Trainer scales them."""

import pytest
import torch
from tiny import SEGMENT, base_with_weights_of, pad, ratio_of_norms, rcc_model, text_config, tokens
from torch.nn import functional as F
from training_runs import Mixed, gradients, settings, trainer_of

from rcc_hf.objectives import IGNORED
from rcc_hf.training import HeadLoss, Teacher
from rcc_hf.training.batches import Batches, collate_equal
from rcc_hf.training.losses import predicting_places
from rcc_hf.training.meters import Meter
from rcc_hf.training.trainer import _logits


def batch():
    labels = tokens(3, 11, seed=1)
    labels[0, :4] = IGNORED
    labels[1, 5:7] = IGNORED
    labels[2] = IGNORED
    return {"input_ids": tokens(3, 11, seed=2), "context_ids": tokens(3, 2 * SEGMENT), "labels": labels}


def naive(model, inputs):
    """That of all logits at once, in float64 (the library's would be in float32)."""
    kept = inputs["labels"][:, 1:] != IGNORED
    return F.cross_entropy(model(**inputs).logits[:, :-1][kept], inputs["labels"][:, 1:][kept])


def loss_of(model, labels, **options):
    return HeadLoss(
        lambda hidden: _logits(model, hidden),
        list(model.lm_head.parameters()),
        labels,
        **{"num_items": None, **options},
    )


@pytest.mark.parametrize("taught", [False, True])
def test_places_that_predict_nothing_count_for_nothing(taught):
    model, inputs = rcc_model(), batch()
    hidden = model.model(inputs["input_ids"], context_ids=inputs["context_ids"]).last_hidden_state
    losses = []
    for multiple in (1, 8):
        places = predicting_places(inputs["labels"], multiple)
        teacher = Teacher(hidden=hidden.detach().flip(-1).flatten(0, 1)[places], weight=0.5) if taught else None
        losses.append(loss_of(model, inputs["labels"], places=places, teacher=teacher))
    plain, filled = losses
    assert ratio_of_norms(filled(hidden), plain(hidden)) <= 1e-12
    assert ratio_of_norms(filled.sums, plain.sums) <= 1e-12
    assert plain.sums[3] == 15


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_it_equals_the_loss_of_the_model_with_all_gradients(family, chunk):
    """Those of the head too, which is tied to the embeddings, and with logits that the base scales."""
    extra = {"final_logit_softcapping": 3.0} if family == "gemma2" else {}
    extra |= {"logits_scaling": 4.0} if family == "granite" else {}
    model = rcc_model(family, attn="eager", text_config=text_config(family, tie_word_embeddings=True, **extra))
    inputs = batch()
    expected = naive(model, inputs)
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    actual = loss_of(model, inputs["labels"], chunk=chunk)
    loss = model(**inputs, hidden_loss=actual).loss
    loss.backward()
    assert ratio_of_norms(loss, expected) <= 1e-10
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert ratio_of_norms(gradient, wanted[name]) <= 1e-10, name


def test_sums_and_division():
    model, inputs = rcc_model(), batch()
    logits = model(**inputs).logits[:, :-1]
    expected = inputs["labels"][:, 1:]
    asked = expected != IGNORED
    measured = loss_of(model, inputs["labels"], num_items=torch.tensor(40), chunk=3)
    loss = model(**inputs, hidden_loss=measured).loss
    entropy = F.cross_entropy(logits[asked], expected[asked], reduction="sum")
    correct = (logits.argmax(-1) == expected)[asked].sum()
    torch.testing.assert_close(loss, entropy / 40)
    torch.testing.assert_close(
        measured.sums, torch.stack([entropy, correct.double(), 0 * entropy, asked.sum().double()])
    )


def test_places_are_found_once_in_the_collator():
    inputs = batch()
    examples = [dict(zip(inputs, row, strict=True)) for row in zip(*inputs.values(), strict=True)]
    assert torch.equal(Batches()(examples)["label_places"], predicting_places(inputs["labels"]))
    flat = inputs["labels"].flatten()
    places = predicting_places(inputs["labels"])
    assert (flat[places + 1] != IGNORED).all()
    assert len(places) == (inputs["labels"][:, 1:] != IGNORED).sum()


@pytest.mark.parametrize("side", ["left", "right"])
def test_only_padding_that_some_token_could_see_needs_a_mask(side):
    model, contexts = rcc_model(), tokens(3, 2 * SEGMENT)
    ids, mask = pad([tokens(1, n, seed=n)[0] for n in (9, 4, 7)], side)
    labels = ids.masked_fill(mask == 0, IGNORED)
    batch = Batches(lambda examples: dict(examples[0]))(
        [{"input_ids": ids, "attention_mask": mask, "labels": labels, "context_ids": contexts}]
    )
    assert ("attention_mask" in batch) is (side == "left")
    places = batch.pop("label_places")
    expected = naive(model, {"input_ids": ids, "labels": labels, "context_ids": contexts, "attention_mask": mask})
    actual = model(**batch, hidden_loss=loss_of(model, labels, places=places)).loss
    assert ratio_of_norms(actual, expected) <= 1e-7


def test_nothing_labelled_is_no_loss():
    model, inputs = rcc_model(), batch()
    inputs["labels"][:] = IGNORED
    loss = model(**inputs, hidden_loss=loss_of(model, inputs["labels"])).loss
    loss.backward()
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_from_the_plain_base(tmp_path, temperature):
    model = rcc_model()
    base = base_with_weights_of(model)
    how = settings(tmp_path, distillation_weight=0.7, distillation_temperature=temperature, loss_chunk=5)
    trainer = trainer_of(model, how)
    inputs = trainer.data_collator([Mixed()[i] for i in range(3)])
    loss = trainer.compute_loss(model, inputs)
    student = {n: v for n, v in inputs.items() if n in ("context_ids", "input_ids", "labels", "ratio")}
    logits = model(**student).logits
    kept = inputs["labels"][:, 1:] != IGNORED
    there = inputs["teacher_labels"][:, 1:] != IGNORED
    ours = F.log_softmax(logits[:, :-1][kept] / temperature, -1)
    theirs = F.log_softmax(base(inputs["teacher_ids"]).logits[:, :-1][there] / temperature, -1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean() * temperature**2
    expected, trained = naive(model, student) + 0.7 * divergence, [p for p in model.parameters() if p.requires_grad]
    assert ratio_of_norms(loss, expected) <= 1e-10
    found, wanted = torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained)
    for actual, right in zip(found, wanted, strict=True):
        assert ratio_of_norms(actual, right) <= 1e-6  # norms of the base are computed in float32


def test_a_teacher_of_a_longer_text_than_a_window_sees_all_of_it(tmp_path):
    model = rcc_model(window=SEGMENT)
    base = base_with_weights_of(model)
    trainer = trainer_of(model, settings(tmp_path, distillation_weight=1.0))
    inputs = trainer.data_collator([Mixed(segments=(3, 3))[i] for i in range(2)])
    teacher = trainer._teacher({n: v for n, v in inputs.items() if n.startswith("teacher")})
    hidden = base.model(inputs["teacher_ids"]).last_hidden_state
    assert torch.equal(teacher.hidden, hidden.flatten(0, 1)[inputs["teacher_places"]])
    assert not teacher.hidden.requires_grad


def test_teacher_and_student_must_predict_as_many_tokens():
    model, inputs = rcc_model(), batch()
    with pytest.raises(ValueError, match=r"15 tokens.*3 of teacher_labels"):
        loss_of(model, inputs["labels"], teacher=Teacher(hidden=torch.zeros(3, 32), weight=1.0))


def test_examples_of_several_ratios_are_no_batch():
    with pytest.raises(ValueError, match=r"ratio \[4, 8\]"):
        collate_equal([Mixed()[0], Mixed()[4]])


def test_accumulating_is_one_large_batch(tmp_path):
    """Batches have different numbers of labels: an average of averages would be another loss."""
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = rcc_model()
        how = settings(tmp_path, batch_size=size, accumulation_steps=accumulation, distillation_weight=0.5)
        trainer = trainer_of(model, how)
        dataset = Mixed(group=8)
        batches = [trainer.data_collator([dataset[i] for i in range(s, s + size)]) for s in range(0, 8, size)]
        items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
        losses = []
        for part in batches:
            loss = trainer.compute_loss(model, part, num_items_in_batch=items)
            loss.backward()
            losses.append(loss.detach())
        found.append((sum(losses), gradients(model)))
    assert ratio_of_norms(found[0][0], found[1][0]) <= 1e-10
    for name, gradient in found[0][1].items():
        assert ratio_of_norms(found[1][1][name], gradient) <= 1e-9, name


def test_a_meter_averages_over_tokens_of_each_objective():
    meter = Meter()
    meter.add("a", torch.tensor([2.0, 1.0, 0.0, 2.0]))
    meter.add("a", torch.tensor([4.0, 0.0, 0.0, 4.0]))
    meter.add("b", torch.tensor([6.0, 2.0, 1.0, 2.0]))
    expected = {"cross_entropy": 1.5, "token_accuracy": 3 / 8, "distillation": 1 / 8}
    expected |= {"cross_entropy_a": 1.0, "token_accuracy_a": 1 / 6}
    expected |= {"cross_entropy_b": 3.0, "token_accuracy_b": 1.0, "distillation_b": 0.5}
    assert meter.take() == expected
    assert meter.take() == {}
