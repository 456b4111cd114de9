# SPDX-License-Identifier: Apache-2.0
"""The UIO scheme equals its naive reference, in values and in gradients; what its options decide."""

import json
from dataclasses import asdict

import pytest
import torch
from reference.uio_reference import NaiveUIO
from tiny import (
    SEGMENT,
    base_model,
    move_from_identity,
    pad,
    ratio_of_norms,
    rcc_model,
    text_config,
    tokenizer,
    tokens,
)
from torch import Tensor
from training_runs import settings

from rcc_hf import RCCForCausalLM
from rcc_hf.cli import main
from rcc_hf.lora import from_peft_lora, to_peft_lora
from rcc_hf.modeling import memory_uio
from rcc_hf.modeling.memory_uio import UIOOptions
from rcc_hf.training.parts import choose_parts, parameter_groups

TOLERANCE = 1e-10
OPTIONS = {
    "default": {},
    "a vector for each slot": {"slot_vectors": 4},
    "no adapters": {"write_rank": 0, "read_rank": 0},
    "other targets, ranks and scale": {
        "write_targets": ("k_proj", "o_proj", "up_proj"),
        "read_targets": ("v_proj",),
        "write_rank": 3,
        "read_rank": 5,
        "adapter_scale": 0.5,
    },
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make_model(num_key_value_heads: int = 2, **scheme_options):
    config = text_config(num_key_value_heads=num_key_value_heads)
    return rcc_model(text_config=config, scheme="uio", scheme_options=scheme_options)


def reference_of(model, weights: dict[str, Tensor] | None = None) -> NaiveUIO:
    config = model.config.text_config
    return NaiveUIO(
        weights={name: p.detach() for name, p in model.named_parameters()} if weights is None else weights,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"],
        segment_length=model.config.segment_length,
        end_of_text=config.eos_token_id,
        adapter_scale=model.config.scheme_options["adapter_scale"],
    )


def expected_logits(model, context: Tensor, local: Tensor, ratio: int) -> Tensor:
    reference = reference_of(model)
    rows = zip(context.tolist(), local.tolist(), strict=True)
    return torch.stack([reference.logits(c, x, ratio) for c, x in rows])


def written(model, ratio: int) -> tuple[Tensor, ...]:
    scheme, decoder = model.model.scheme, model.model.language_model
    return scheme.write(decoder, scheme.empty(decoder, 2), tokens(2, SEGMENT), ratio)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [1, 4, 16])
@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_equals_reference_over_segments_and_a_remainder(ratio, num_key_value_heads):
    model = make_model(num_key_value_heads)
    context, local = tokens(2, 2 * SEGMENT + 5), tokens(2, 6, seed=1)
    expected = expected_logits(model, context, local, ratio)
    assert ratio_of_norms(model(local, context_ids=context, ratio=ratio).logits, expected) <= TOLERANCE
    memory = model.compress(context, ratio=ratio)
    assert ratio_of_norms(model(local, memory=memory).logits, expected) <= TOLERANCE
    outputs, logits = model(local[:, :1], memory=memory), []
    for t in range(1, local.shape[1]):
        logits.append(outputs.logits)
        outputs = model(local[:, t : t + 1], past_key_values=outputs.past_key_values)
    assert ratio_of_norms(torch.cat([*logits, outputs.logits], 1), expected) <= TOLERANCE


@torch.no_grad()
def test_padded_rows_equal_reference_of_each_row_alone():
    model = make_model()
    contexts = [tokens(1, n, seed=n)[0] for n in (SEGMENT + 2, 3 * SEGMENT + 1, 2 * SEGMENT)]
    locals_ = [tokens(1, n, seed=n)[0] for n in (5, 2, 4)]
    (context, context_mask), (local, mask) = pad(contexts), pad(locals_)
    memory = model.compress(context, context_mask)
    ways = ({"memory": memory}, {"context_ids": context, "context_mask": context_mask})
    for way in ways:
        actual = model(local, attention_mask=mask, **way).logits
        for row, (c, x) in enumerate(zip(contexts, locals_, strict=True)):
            expected = reference_of(model).logits(c.tolist(), x.tolist(), model.config.ratio)
            assert ratio_of_norms(actual[row, -len(x) :], expected) <= TOLERANCE


@options
def test_values_and_gradients_of_all_parameters_equal_those_of_the_reference(options):
    model = make_model(**options).train()
    context, local = tokens(2, 2 * SEGMENT + 3), tokens(2, 5, seed=1)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    reference = reference_of(model, weights)
    expected = torch.stack([reference.logits(c, x, 4) for c, x in zip(context.tolist(), local.tolist(), strict=True)])
    actual = model(input_ids=local, context_ids=context, ratio=4).logits
    assert ratio_of_norms(actual, expected) <= TOLERANCE
    direction = torch.randn(expected.shape, dtype=torch.float64)
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()
    errors = {name: ratio_of_norms(p.grad, weights[name].grad) for name, p in model.named_parameters()}
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


@torch.no_grad()
def test_states_are_the_inputs_of_layers_and_see_their_prefix_alone():
    model = make_model()
    state = written(model, 4)
    reference = reference_of(model)
    for row, ids in enumerate(tokens(2, SEGMENT).tolist()):
        for actual, expected in zip(state, reference.encode(ids, 4), strict=True):
            assert ratio_of_norms(actual[row], expected) <= TOLERANCE
    scheme, decoder, changed = model.model.scheme, model.model.language_model, tokens(2, SEGMENT)
    changed[:, 8:] = tokens(2, 8, seed=5)
    others = scheme.write(decoder, scheme.empty(decoder, 2), changed, 4)
    for index, (before, after) in enumerate(zip(state, others, strict=True)):
        assert torch.equal(before[:, :2], after[:, :2])
        assert torch.equal(before[:, 2:], after[:, 2:]) == (index == 0)  # which is before any attention


@torch.no_grad()
@pytest.mark.parametrize("each", [False, True])
def test_slots_at_a_higher_ratio_are_every_second_one_if_they_share_a_vector(each):
    model = make_model(slot_vectors=4 if each else None)
    assert model.model.scheme.nested_ratios is not each
    pairs = zip(written(model, 4), written(model, 8), strict=True)
    same = [ratio_of_norms(fine[:, 1::2], coarse) <= 1e-12 for fine, coarse in pairs]
    assert same == [not each] * 3


def as_flash_attention(monkeypatch):
    """Let slots be laid out as for flash attention, in rows that need no mask but that of padding."""
    monkeypatch.setattr(memory_uio, "_in_one_row", memory_uio._each_a_row)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_neox", "phi3"])
def test_one_pass_or_two_and_slots_in_rows_of_their_own_are_the_same(family, monkeypatch):
    window = {"sliding_window": 6} if family in ("mistral", "gemma3_text") else {}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2} if family == "gemma3_text" else {}
    model = rcc_model(text_config=text_config(family, num_hidden_layers=4, **window, **kinds), scheme="uio")
    shapes = []
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: shapes.append(tuple(args[0].shape[:2])), with_kwargs=True
    )
    expected = written(model, 4)
    with torch.enable_grad():
        found = [written(model, 4)]
    as_flash_attention(monkeypatch)
    found.append(written(model, 4))
    assert shapes == [(2, SEGMENT), (2, 4), (2, SEGMENT + 4), (2, SEGMENT), (8, 1)]
    for state in found:
        assert max(ratio_of_norms(a, e) for a, e in zip(state, expected, strict=True)) <= TOLERANCE


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kernel", ["flash_attention_2", "kernels-community/flash-attn3", "flex_attention"])
def test_kernels_without_masks_are_given_slots_in_rows_of_their_own(kernel, graph, monkeypatch):
    model = make_model()
    model.model.language_model.config._attn_implementation = kernel
    monkeypatch.setattr(memory_uio, "_tokens_alone", lambda decoder, segment: "past")
    given = []

    def lay_out(decoder, past, ratio):
        given.append((past, ratio))
        raise InterruptedError

    monkeypatch.setattr(memory_uio, "_each_a_row", lay_out)
    with torch.set_grad_enabled(graph), pytest.raises(InterruptedError):
        written(model, 4)
    assert given == [("past", 4)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", ["_in_one_row", "_each_a_row"])
def test_gradients_of_two_passes_are_those_of_one(layout, checkpointing, monkeypatch):
    model = make_model(slot_vectors=4).train()
    inputs = {"input_ids": tokens(2, 5, seed=1), "context_ids": tokens(2, 2 * SEGMENT + 3)}

    def gradients():
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    if checkpointing:
        model.gradient_checkpointing_enable()
    how = getattr(memory_uio, layout)

    def in_two(decoder, segment, ratio):
        return how(decoder, memory_uio._tokens_alone(decoder, segment), ratio)

    monkeypatch.setattr(memory_uio, "_behind_tokens", in_two)
    actual = gradients()
    assert actual.keys() == expected.keys()
    assert [n for n in expected if not ratio_of_norms(actual[n], expected[n]) <= TOLERANCE] == []


@torch.no_grad()
def test_embeddings_are_written_as_their_ids_are():
    model = rcc_model("gemma2", attn="eager", dtype=torch.float32, scheme="uio")
    scheme, decoder = model.model.scheme, model.model.language_model
    expected = written(model, 4)
    for graph in (False, True):
        with torch.set_grad_enabled(graph):
            embedded = model.get_input_embeddings()(tokens(2, SEGMENT))
            state = scheme.write(decoder, scheme.empty(decoder, 2), embedded, 4)
        assert max(ratio_of_norms(a, e) for a, e in zip(state, expected, strict=True)) <= 1e-6


@torch.no_grad()
def test_a_base_with_sliding_layers_gives_slots_no_more_than_its_windows():
    config = text_config("mistral", sliding_window=6)
    model = rcc_model(text_config=config, scheme="uio")
    scheme, decoder, changed = model.model.scheme, model.model.language_model, tokens(2, SEGMENT)
    state = written(model, 16)
    changed[:, :8] = tokens(2, 8, seed=5)  # at 16, layer 0 sees 11 to 15, and layer 1 what these saw: 6 to 15
    others = scheme.write(decoder, scheme.empty(decoder, 2), changed, 16)
    assert [torch.equal(a, b) for a, b in zip(state, others, strict=True)] == [True, True, False]


def test_options_decide_what_is_trained():
    def shapes(**scheme_options) -> dict[str, tuple[int, ...]]:
        model = make_model(**scheme_options)
        return {name.split(".layers.")[1]: tuple(p.shape) for name, p in model.named_parameters() if ".rcc." in name}

    found = shapes(write_rank=3, read_rank=5)
    adapters = {tuple(name.split(".")[2:4]) for name in found if "mark" not in name}
    expected = {"write": ("q", "v"), "read": ("k", "v")}
    assert adapters == {(kind, f"self_attn_{x}_proj_adapter") for kind, names in expected.items() for x in names}
    assert {name[0] for name in found if ".write." in name} == {"0", "1"}  # the last layer's output is no state
    assert {name[0] for name in found if ".read." in name} == {"0", "1", "2"}
    assert found["0.rcc.mark.vector"] == (32,)
    assert [name for name in found if "mark" in name] == ["0.rcc.mark.vector"]
    assert found["2.rcc.read.self_attn_k_proj_adapter.up"] == (16, 5)
    assert shapes(slot_vectors=4)["0.rcc.mark.vector"] == (4, 32)
    assert shapes(write_rank=0, read_rank=0).keys() == {"0.rcc.mark.vector"}
    fused = rcc_model("gpt_neox", scheme="uio").model.language_model.layers[0].rcc
    assert list(fused.write) == list(fused.read) == ["attention_query_key_value_adapter"]


@torch.no_grad()
def test_slots_begin_as_the_end_of_text():
    model = make_model(slot_vectors=4)
    mark = model.model.language_model.layers[0].rcc.mark
    mark.initialize()
    ends = model.get_input_embeddings()(torch.full((2, 4), 2))
    assert torch.equal(written(model, 4)[0], ends)
    mark.vector[3] = 1.0
    assert torch.equal(written(model, 4)[0][:, 3], ends[:, 3] + 1)
    model.config.text_config.eos_token_id = [5, 2]
    assert torch.equal(written(model, 4)[0][:, 0], model.get_input_embeddings().weight[[5, 5]])


@torch.no_grad()
def test_tokens_are_the_plain_base_but_for_the_slots_they_see():
    """The transfer head has no effect on keys and values of tokens, before or behind the slots."""
    model = rcc_model(scheme="uio", head_length=3)
    context, local = tokens(2, 2 * SEGMENT + 4), tokens(2, 5, seed=1)

    def first_layer():
        cache = model(local, memory=model.compress(context)).past_key_values
        return cache.layers[0].keys, cache.layers[0].values

    before = first_layer()
    for name, parameter in model.named_parameters():
        if ".rcc.read." in name and name.endswith(".up"):
            parameter.neg_()
    for old, new in zip(before, first_layer(), strict=True):
        changed = (old != new).any(-1).any(1)
        assert changed.tolist() == [[False] * 3 + [True] * 8 + [False] * (old.shape[2] - 11)] * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"write_rank": -1}, "write_rank=-1 is negative; give 0"),
        ({"slot_vectors": 0}, "slot_vectors=0 is below 1; give the most slots"),
        ({"read_targets": ["q_proj", "v_proj"]}, r"read_targets \['q_proj'\] would have no effect.*k_proj, v_proj"),
        ({"write_targets": ["query"]}, r"\['query'\] name no linear map of this base; it has .*'q_proj'"),
    ],
)
def test_impossible_options_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        make_model(**given)


def test_impossible_segments_and_bases_are_refused():
    with pytest.raises(ValueError, match=r"ratio=2 makes 8 slots of a segment of 16 tokens.*slot_vectors=4"):
        make_model(slot_vectors=4).compress(tokens(1, SEGMENT), ratio=2)
    whole = text_config(max_position_embeddings=SEGMENT)
    with pytest.raises(ValueError, match=rf"trained for {SEGMENT}\. Use a shorter segment_length"):
        rcc_model(text_config=whole, scheme="uio", window=SEGMENT).compress(tokens(1, SEGMENT))
    with pytest.raises(ValueError, match="needs a base of two layers"):
        rcc_model(text_config=text_config(num_hidden_layers=1), scheme="uio")
    assert UIOOptions(write_targets=["q_proj"]).write_targets == ("q_proj",)


def test_what_is_trained_belongs_to_the_compressor_or_to_the_transfer_head():
    model = make_model()
    choose_parts(model, ["write", "read", "maps"])
    groups = {group["name"]: group["params"] for group in parameter_groups(model, settings("out"))}
    mark = model.model.language_model.layers[0].rcc.mark.vector
    assert groups.keys() == {"write", "write without decay", "read"}
    assert len(groups["write without decay"]) == 1
    assert groups["write without decay"][0] is mark
    choose_parts(model, ["read"])
    assert not any(layer.requires_grad for layer in written(model, 4))  # the compressor, frozen, keeps no graph
    assert not mark.requires_grad


def test_the_command_line_makes_it_and_trades_adapters_with_peft(tmp_path, capsys):
    base_model().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    made = ["--scheme", "uio", "--segment_length", "16", "--ratio", "4", "--write_rank", "2", "--slot_vectors", "4"]
    assert main(["convert", str(tmp_path / "base"), str(tmp_path / "uio"), *made]) == 0
    assert "scheme uio" in capsys.readouterr().out
    assert (tmp_path / "uio" / "memory_uio.py").exists()
    model = RCCForCausalLM.from_pretrained(tmp_path / "uio").double()
    assert model.config.scheme_options == asdict(UIOOptions(slot_vectors=4, write_rank=2))
    move_from_identity(model)
    for part in ("read", "write"):
        to_peft_lora(model, tmp_path / part, part=part)
        config = json.loads((tmp_path / part / "adapter_config.json").read_text())
        kinds = {"read": "kv", "write": "qv"}[part]
        assert config["target_modules"] == [f"self_attn.{x}_proj" for x in kinds]
    again = RCCForCausalLM.from_pretrained(tmp_path / "uio").double()
    for part in ("read", "write"):
        from_peft_lora(again, tmp_path / part, part=part)
    again.model.language_model.layers[0].rcc.mark.load_state_dict(
        model.model.language_model.layers[0].rcc.mark.state_dict()
    )
    context, local = tokens(1, 2 * SEGMENT + 3), tokens(1, 5, seed=1)
    with torch.no_grad():
        expected, actual = (m(local, memory=m.compress(context)).logits for m in (model, again))
    assert ratio_of_norms(actual, expected) <= 1e-6
    assert main(["convert", str(tmp_path / "base"), str(tmp_path / "none"), *made, "--wiring", "add"]) == 2
    assert "does not know wiring. Options of scheme 'uio': slot_vectors" in capsys.readouterr().err
