# SPDX-License-Identifier: Apache-2.0
"""The RCC scheme equals its naive reference, in values and in gradients.

The error is a ratio of norms in float64. Float32 steps of the base (see the reference) are done alike on both sides,
which leaves nothing larger than the reordering of float64 sums.
"""

import pytest
import torch
from reference.rcc_reference import NaiveRCC
from tiny import SEGMENT, pad, ratio_of_norms, rcc_model, text_config, tokens
from torch import Tensor

TOLERANCE = 1e-10
WIRINGS = ("replace", "add")
OPTIONS = {
    "full maps": {"map_rank": None},
    "no write adapters": {"write_rank": 0},
    "no read adapters": {"read_rank": 0},
    "adapters on q and v": {"targets": ("q_proj", "v_proj")},
    "other scale and ranks": {"adapter_scale": 0.5, "write_rank": 3, "read_rank": 5, "map_rank": 2},
}


def make_model(wiring: str, num_key_value_heads: int = 2, **scheme_options):
    config = text_config(num_key_value_heads=num_key_value_heads)
    return rcc_model(text_config=config, scheme_options={"wiring": wiring, **scheme_options})


def reference_of(model, weights: dict[str, Tensor] | None = None) -> NaiveRCC:
    config, options = model.config.text_config, model.config.scheme_options
    return NaiveRCC(
        weights={name: p.detach() for name, p in model.named_parameters()} if weights is None else weights,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"],
        segment_length=model.config.segment_length,
        wiring=options["wiring"],
        adapter_scale=options["adapter_scale"],
    )


def expected_logits(model, context: Tensor, local: Tensor, ratio: int) -> Tensor:
    reference = reference_of(model)
    rows = zip(context.tolist(), local.tolist(), strict=True)
    return torch.stack([reference.logits(c, x, ratio) for c, x in rows])


@torch.no_grad()
def in_one_training_pass(model, context: Tensor, local: Tensor, ratio: int) -> Tensor:
    return model(input_ids=local, context_ids=context, ratio=ratio).logits


@torch.no_grad()
def behind_a_memory(model, context: Tensor, local: Tensor, ratio: int) -> Tensor:
    return model(input_ids=local, memory=model.compress(context, ratio=ratio)).logits


@torch.no_grad()
def step_by_step(model, context: Tensor, local: Tensor, ratio: int) -> Tensor:
    outputs = model(input_ids=local[:, :1], memory=model.compress(context, ratio=ratio))
    logits = [outputs.logits]
    for t in range(1, local.shape[1]):
        outputs = model(input_ids=local[:, t : t + 1], past_key_values=outputs.past_key_values)
        logits.append(outputs.logits)
    return torch.cat(logits, 1)


PATHS = (in_one_training_pass, behind_a_memory, step_by_step)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ratio", [1, 4, 16])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_equals_reference_over_segments_and_a_remainder(wiring, ratio, path):
    model = make_model(wiring)
    context, local = tokens(2, 2 * SEGMENT + 5), tokens(2, 6, seed=1)
    actual = path(model, context, local, ratio)
    assert ratio_of_norms(actual, expected_logits(model, context, local, ratio)) <= TOLERANCE


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("num_key_value_heads", [1, 4])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_equals_reference_however_heads_are_shared(wiring, num_key_value_heads, path):
    model = make_model(wiring, num_key_value_heads)
    context, local = tokens(1, 3 * SEGMENT), tokens(1, 4, seed=1)
    actual = path(model, context, local, 4)
    assert ratio_of_norms(actual, expected_logits(model, context, local, 4)) <= TOLERANCE


def test_options_decide_what_is_trained():
    def shapes(**options) -> dict[str, tuple[int, ...]]:
        model = make_model("replace", **options)
        return {name.split(".layers.")[1]: tuple(p.shape) for name, p in model.named_parameters() if ".rcc." in name}

    linears = {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}
    adapters = {f"{part}_{name}_proj_adapter" for part, names in linears.items() for name in names}
    found = shapes(write_rank=3, read_rank=5, map_rank=2)
    assert {name.split(".")[3] for name in found if ".write." in name or ".read." in name} == adapters
    assert {name[0] for name in found if ".write." in name} == {"0", "1"}  # the last layer's output is no state
    assert {name[0] for name in found if ".read." in name} == {"0", "1", "2"}
    assert found["0.rcc.write.mlp_up_proj_adapter.down"] == (3, 32)
    assert found["2.rcc.read.mlp_up_proj_adapter.up"] == (64, 5)
    assert found["2.rcc.slot_map.up"] == (32, 2)
    assert {name.split(".")[2] for name in shapes(write_rank=0)} == {"read", "slot_map"}
    assert {name.split(".")[2] for name in shapes(read_rank=0)} == {"write", "slot_map"}
    assert shapes(map_rank=None)["0.rcc.slot_map.weight"] == (32, 32)
    targeted = {name.split(".")[3] for name in shapes(targets=("q_proj", "v_proj")) if "slot_map" not in name}
    assert targeted == {"self_attn_q_proj_adapter", "self_attn_v_proj_adapter"}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_equals_reference_with_other_options(wiring, options, path):
    model = make_model(wiring, **options)
    context, local = tokens(1, SEGMENT + 3), tokens(1, 4, seed=1)
    actual = path(model, context, local, 4)
    assert ratio_of_norms(actual, expected_logits(model, context, local, 4)) <= TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_padded_rows_equal_reference_of_each_row_alone(wiring, side):
    model = make_model(wiring)
    contexts = [tokens(1, n, seed=n)[0] for n in (SEGMENT + 2, 3 * SEGMENT + 1, 2 * SEGMENT)]
    locals_ = [tokens(1, n, seed=n)[0] for n in (5, 2, 4)]
    context, context_mask = pad(contexts, side)
    local, local_mask = pad(locals_, "left")
    with torch.no_grad():
        memory = model.compress(context, context_mask)
        actual = model(input_ids=local, attention_mask=local_mask, memory=memory).logits
    for row, (c, x) in enumerate(zip(contexts, locals_, strict=True)):
        expected = reference_of(model).logits(c.tolist(), x.tolist(), model.config.ratio)
        assert ratio_of_norms(actual[row, -len(x) :], expected) <= TOLERANCE


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["default", *OPTIONS])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_gradients_of_all_parameters_equal_those_of_the_reference(wiring, options):
    model = make_model(wiring, **options).train()
    context, local = tokens(2, 2 * SEGMENT + 3), tokens(2, 5, seed=1)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    reference = reference_of(model, weights)
    expected = torch.stack([reference.logits(c, x, 4) for c, x in zip(context.tolist(), local.tolist(), strict=True)])
    actual = model(input_ids=local, context_ids=context, ratio=4).logits
    direction = torch.randn(expected.shape, dtype=torch.float64)
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()
    errors = {name: ratio_of_norms(p.grad, weights[name].grad) for name, p in model.named_parameters()}
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_gradients_behind_a_memory_equal_those_of_the_reference_with_states_cut(wiring):
    model = make_model(wiring).train()
    context, local = tokens(1, 2 * SEGMENT), tokens(1, 5, seed=1)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    reference = reference_of(model, weights)
    states, _ = reference.compress(context[0].tolist(), 4)
    embedded = weights["model.language_model.embed_tokens.weight"][local[0]]
    expected = reference.decode([state.detach() for state in states], embedded)
    actual = model(input_ids=local, memory=model.compress(context, ratio=4)).logits[0]
    direction = torch.randn(expected.shape, dtype=torch.float64)
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()
    for name, parameter in model.named_parameters():
        if ".rcc.write." in name or (wiring == "replace" and "slot_map" in name):
            assert parameter.grad is None, name
        elif wiring == "add" or not makes_keys_and_values(name):
            assert ratio_of_norms(parameter.grad, weights[name].grad) <= TOLERANCE, name


def makes_keys_and_values(name: str) -> bool:
    """Whether a slot's key and value depend on this parameter when slots are replaced in every layer: with "replace" a
    memory holds keys and values, not states, so that its part in their making is out of reach."""
    return any(part in name for part in ("k_proj", "v_proj", "input_layernorm", "slot_map"))


@torch.no_grad()
def test_a_marked_compressor_knows_the_ratio():
    """What a token that is a slot at both ratios becomes depends on the ratio, if slots are marked."""
    for marked in (False, True):
        model = rcc_model(scheme_options={"mark_slots": marked})
        scheme, decoder = model.model.scheme, model.model.language_model
        assert scheme.nested_ratios is not marked
        fine, coarse = (scheme.write(decoder, scheme.empty(decoder, 2), tokens(2, SEGMENT), ratio) for ratio in (4, 8))
        same = [ratio_of_norms(a[:, 1::2], b) <= 1e-12 for a, b in zip(fine, coarse, strict=True)]
        assert same == ([True, False, False] if marked else [True] * 3)


@torch.no_grad()
def test_marks_are_added_to_slots_alone_and_are_nothing_at_start():
    model = rcc_model(scheme_options={"mark_slots": True})
    mark = model.model.language_model.layers[0].rcc.mark
    hidden = torch.zeros(2, 8, 32, dtype=torch.float64)
    marked = mark(hidden, 4)
    assert torch.equal(marked[:, 3::4], mark.vector.expand(2, 2, 32))
    assert not marked[:, [0, 1, 2, 4, 5, 6]].any()
    mark.initialize()
    assert not mark.vector.any()
    assert all(layer.rcc.mark is None for layer in model.model.language_model.layers[1:])


@torch.no_grad()
def test_the_first_state_of_a_slot_has_the_mark():
    model = rcc_model(scheme_options={"mark_slots": True})
    scheme, decoder = model.model.scheme, model.model.language_model
    state = scheme.write(decoder, scheme.empty(decoder, 2), tokens(2, SEGMENT), 4)
    expected = model.get_input_embeddings()(tokens(2, SEGMENT)[:, 3::4]) + decoder.layers[0].rcc.mark.vector
    assert torch.equal(state[0], expected)


def test_marks_are_trained_with_the_compressor():
    model = rcc_model(scheme_options={"mark_slots": True})
    model.freeze_base()
    ids = tokens(2, SEGMENT)
    model(ids, context_ids=ids, labels=ids).loss.backward()
    assert model.model.language_model.layers[0].rcc.mark.vector.grad.abs().sum() > 0
