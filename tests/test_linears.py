# SPDX-License-Identifier: Apache-2.0
"""Adapters on the base's linear maps: however they are added, the numbers are the same, and without memory none are."""

import copy

import pytest
import torch
from tiny import SEGMENT, WRITTEN_VARIANTS, ratio_of_norms, rcc_model, text_config, tokens
from torch import nn
from torch.nn import functional as F

from rcc_hf import RCCForCausalLM
from rcc_hf.modeling import decoding_rcc, linears_rcc
from rcc_hf.modeling.adapters_rcc import LowRankAdapter
from rcc_hf.modeling.linears_rcc import AdaptedLinear
from rcc_hf.modeling.passes_rcc import ADAPTERS

CONTEXT, PROMPT = tokens(2, 3 * SEGMENT, seed=1), tokens(2, 5, seed=2)


@pytest.fixture(params=WRITTEN_VARIANTS.values(), ids=WRITTEN_VARIANTS)
def variant(request):
    return request.param


@torch.no_grad()
def answer(model, mask: torch.Tensor | None = None) -> torch.Tensor:
    return model(PROMPT, memory=model.compress(CONTEXT, mask)).logits


def with_graph(model) -> torch.Tensor:
    return model(PROMPT, context_ids=CONTEXT).logits


def count(monkeypatch, where, name: str) -> list:
    """One entry for each call of `where.name` from now on."""
    calls, plain = [], getattr(where, name)
    monkeypatch.setattr(where, name, lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs))
    return calls


@pytest.fixture
def merges_any_number(monkeypatch):
    """Merge for any number of tokens; one entry for each time."""
    monkeypatch.setattr(linears_rcc, "merges", lambda linear, x: not torch.is_grad_enabled())
    return count(monkeypatch, LowRankAdapter, "merge")


def test_merged_for_one_product(variant, merges_any_number):
    model = rcc_model(**variant)
    expected = with_graph(model)
    assert not merges_any_number
    assert ratio_of_norms(answer(model), expected) <= 1e-12
    assert merges_any_number


def test_where_rows_differ_nothing_is_merged(merges_any_number):
    model = rcc_model()
    mask = torch.ones_like(CONTEXT)
    mask[0, SEGMENT // 2 :] = 0  # a row without a whole segment
    memory = model.compress(CONTEXT, mask)
    merges_any_number.clear()
    with torch.no_grad():
        found = model(PROMPT, memory=memory).logits
    assert not merges_any_number
    alone = model.compress(CONTEXT[1:])
    with torch.no_grad():
        assert ratio_of_norms(found[1:], model(PROMPT[1:], memory=alone).logits) <= 1e-12
        raw = model(torch.cat([CONTEXT[:1, : SEGMENT // 2], PROMPT[:1]], 1)).logits[:, -PROMPT.shape[1] :]
    assert ratio_of_norms(found[:1], raw) <= 1e-12


@pytest.mark.parametrize(("in_features", "tokens_", "merged"), [(8, 4095, False), (8, 4096, True), (9000, 4400, False)])
def test_many_tokens_are_worth_a_sum_of_weights(in_features, tokens_, merged):
    linear = nn.Linear(in_features, 2, device="meta")
    linear.weight = nn.Parameter(torch.empty(2, in_features))
    x = torch.empty(1, 1).expand(tokens_, in_features)
    with torch.no_grad():
        assert linears_rcc.merges(linear, x) is merged
    assert not linears_rcc.merges(linear, x)  # with a graph the sum would be kept


def test_weights_that_are_no_plain_parameters_are_left_alone():
    """Those of quantisers know how to multiply alone."""

    class Quantised(nn.Parameter):
        pass

    linear, x = nn.Linear(1, 2), torch.empty(10_000, 1)
    with torch.no_grad():
        assert linears_rcc.merges(linear, x)
        linear.weight = Quantised(torch.ones(2, 1))
        assert not linears_rcc.merges(linear, x)
        linear.weight = nn.Parameter(torch.ones(2, 1, device="meta"))
        assert not linears_rcc.merges(linear, x)


def test_a_module_of_a_quantiser_in_a_maps_place(variant):
    class Foreign(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight, self.bias = linear.weight, linear.bias

        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    model = rcc_model(**variant)
    expected, expected_graph = answer(model), with_graph(model)
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj = Foreign(layer.self_attn.q_proj)
        layer.mlp.down_proj = Foreign(layer.mlp.down_proj)
    assert ratio_of_norms(answer(model), expected) <= 1e-12
    assert torch.equal(with_graph(model), expected_graph)
    with pytest.raises(ValueError, match="quantised or offloaded"):
        model.fuse_adapters()


def test_until_the_first_pass_maps_are_the_bases_own():
    """Quantisers look for this very class."""
    model = rcc_model()
    maps = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".rcc." not in n]
    model(PROMPT)
    assert {type(m) for m in maps} == {nn.Linear}
    model.compress(CONTEXT)
    assert {type(m) for m in maps if m is not model.lm_head} == {AdaptedLinear}


def test_a_map_whose_forward_was_wrapped(variant):
    """As accelerate does where weights are elsewhere: it calls the method that it has found, whatever the class is."""
    model = rcc_model(**variant)
    expected = answer(rcc_model(**variant))
    for layer in model.model.language_model.layers:
        plain = layer.mlp.down_proj.forward
        layer.mlp.down_proj.forward = lambda x, plain=plain: plain(x)
    assert ratio_of_norms(answer(model), expected) <= 1e-12


def test_without_memory_no_map_has_a_hook(variant):
    """A module that has some is slower to call, though they do nothing."""
    model = rcc_model(**variant)
    answer(model)
    maps = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    assert maps
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in maps)


def test_hooks_are_looked_for_once_in_a_generation(monkeypatch):
    model = rcc_model()
    memory = model.compress(CONTEXT)
    calls = count(monkeypatch, decoding_rcc, "install_hooks")
    model.generate(PROMPT, memory=memory, max_new_tokens=6, min_new_tokens=6)
    assert len(calls) == 1


def test_compressing_runs_no_further_than_slots_need(variant, monkeypatch):
    """The last layer's input is the last state; and of slots alone, a layer's keys and values are all there is."""
    model = rcc_model(**variant)
    with torch.enable_grad():
        expected = with_graph(model)
    first, *_, last = model.model.language_model.layers
    calls, calls_of_last = count(monkeypatch, first.mlp, "forward"), count(monkeypatch, last.mlp, "forward")
    memory = model.compress(CONTEXT)
    if variant["scheme"] == "rcc":
        assert len(calls) == 1
        assert not calls_of_last
    else:  # tokens, and then <mem>
        assert len(calls) == len(calls_of_last) == 2
    with torch.no_grad():
        assert ratio_of_norms(model(PROMPT, memory=memory).logits, expected) <= 1e-12


class TestFused:
    @pytest.mark.parametrize("kinds", [(), ("read",), ("write",)], ids=str)
    def test_numbers_stay(self, variant, kinds, monkeypatch):
        model = rcc_model(**variant)
        expected, plain = answer(model), model(PROMPT).logits
        model.fuse_adapters(*kinds)
        apart = count(monkeypatch, LowRankAdapter, "forward")
        assert ratio_of_norms(answer(model), expected) <= 1e-12
        assert torch.equal(model(PROMPT).logits, plain)
        if not kinds and model.model.scheme.adapts_tokens:
            assert not apart
        model.unfuse_adapters()
        assert torch.equal(answer(model), expected)
        assert apart

    def test_one_copy_for_each_adapter(self):
        model = rcc_model()
        model.fuse_adapters("read")
        adapters = {name: m for name, m in model.named_modules() if isinstance(m, LowRankAdapter)}
        assert {name for name, m in adapters.items() if m.fused is not None} == {n for n in adapters if ".read." in n}
        adapter = adapters["model.language_model.layers.0.rcc.read.mlp_down_proj_adapter"]
        weight = model.model.language_model.layers[0].mlp.down_proj.weight
        assert torch.equal(adapter.fused, weight + adapter.scale * adapter.up @ adapter.down)
        model.to(torch.float32)
        assert adapter.fused.dtype == torch.float32

    def test_nothing_of_it_is_saved(self, tmp_path):
        model = rcc_model()
        names = set(model.state_dict())
        model.fuse_adapters()
        assert set(model.state_dict()) == names
        model.save_pretrained(tmp_path)
        assert torch.equal(
            answer(RCCForCausalLM.from_pretrained(tmp_path)), answer(RCCForCausalLM.from_pretrained(tmp_path))
        )

    def test_training_does_not_see_it(self):
        model = rcc_model()
        with_graph(model).sum().backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model.fuse_adapters()
        with_graph(model).sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)

    def test_changed_weights_are_noticed(self):
        model = rcc_model()
        model.fuse_adapters()
        adapter = next(m for m in model.modules() if isinstance(m, LowRankAdapter))
        with torch.no_grad():
            adapter.up.mul_(2)
        with pytest.raises(ValueError, match="weights have changed since fuse_adapters\\('write'\\)"):
            model.compress(CONTEXT)
        model.fuse_adapters()
        fused = answer(model)
        model.unfuse_adapters()
        assert ratio_of_norms(fused, answer(model)) <= 1e-12

    def test_a_copy_has_its_own(self):
        model = rcc_model()
        model.fuse_adapters()
        expected = answer(model)
        other = copy.deepcopy(model)
        other.unfuse_adapters()
        with torch.no_grad():
            for module in other.modules():
                if isinstance(module, LowRankAdapter):
                    module.up.zero_()
        assert torch.equal(answer(model), expected)
        assert ratio_of_norms(answer(other), expected) > 1e-3

    def test_unknown_kinds(self):
        with pytest.raises(ValueError, match=r"\['reed'\] are not known; choose of write, read"):
            rcc_model().fuse_adapters("reed", "write")

    @pytest.mark.parametrize("kind", ADAPTERS)
    def test_no_adapters_at_all(self, kind):
        model = rcc_model(scheme_options={f"{kind}_rank": 0})
        expected = answer(model)
        model.fuse_adapters(kind)
        assert torch.equal(answer(model), expected)


def test_the_backbone_alone_can_fuse():
    model = rcc_model().model
    with torch.no_grad():
        expected = model(PROMPT, memory=model.compress(CONTEXT)).last_hidden_state
        model.fuse_adapters()
        found = model(PROMPT, memory=model.compress(CONTEXT)).last_hidden_state
    assert ratio_of_norms(found, expected) <= 1e-12


def test_every_family_has_adapted_maps_alone():
    for family in ("llama", "gpt_neox", "gemma3_text", "phi3"):
        model = rcc_model(text_config=text_config(family))
        answer(model)
        layer = model.model.language_model.layers[0]
        own = [m for n, m in layer.named_modules() if isinstance(m, nn.Linear) and not n.startswith("rcc")]
        assert own
        assert all(type(m) is AdaptedLinear and not m._forward_hooks for m in own)
