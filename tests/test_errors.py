# SPDX-License-Identifier: Apache-2.0
"""Bad inputs: each is refused before work is done, and told what was given, what is allowed and what to do."""

import copy
from contextlib import contextmanager

import pytest
import torch
from tiny import RATIO, SEGMENT, WINDOW, base_model, rcc_model, text_config, tokens
from transformers import GPT2Config, GPT2LMHeadModel

from rcc_hf import RCCConfig, RCCForCausalLM, RCCModel
from rcc_hf.modeling.configuration_rcc import check_transformers
from rcc_hf.modeling.passes_rcc import running_pass


@pytest.fixture(scope="module")
def model():
    return rcc_model()


@pytest.fixture(scope="module")
def memory(model):
    return model.compress(tokens(2, 54))


@contextmanager
def refused(error: type[Exception], *parts: str):
    """A context in which `error` must be raised with all `parts` in its message."""
    with pytest.raises(error) as raised:
        yield
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "error", "parts"),
    [
        ({"scheme": "rmt"}, ValueError, ["scheme='rmt'", "the schemes are", "rcc"]),
        ({"scheme_options": {"rank": 8}}, TypeError, ["no option rank", "its options are", "write_rank, read_rank"]),
        ({"scheme_options": {"wiring": "sum"}}, ValueError, ["wiring='sum'", "choose one of replace, add"]),
        ({"scheme_options": {"write_rank": -1}}, ValueError, ["write_rank=-1", "give 0 for no adapter, or a rank"]),
        ({"scheme_options": {"read_rank": -2}}, ValueError, ["read_rank=-2", "give 0 for no adapter, or a rank"]),
        ({"scheme_options": {"map_rank": 0}}, ValueError, ["map_rank=0", "give a rank, or None for a full matrix"]),
        ({"ratio": 3}, ValueError, ["ratio=3", "segment_length=16", "choose one of 1, 2, 4, 8, 16"]),
        ({"ratio": 0}, ValueError, ["ratio=0", "choose one of 1, 2, 4, 8, 16"]),
        ({"ratio": -4}, ValueError, ["ratio=-4", "choose one of 1, 2, 4, 8, 16"]),
        ({"ratio": 4.0}, ValueError, ["ratio=4.0", "choose one of 1, 2, 4, 8, 16"]),
        ({"segment_length": 0}, ValueError, ["segment_length=0", "at least 1"]),
        ({"segment_length": 16.0}, ValueError, ["segment_length=16.0", "whole number"]),
        ({"segment_length": 1024}, ValueError, ["segment_length=1024", "range of 512", "choose a shorter segment"]),
        ({"encode_batch_tokens": 0}, ValueError, ["encode_batch_tokens=0", "at least 1"]),
        ({"encode_batch_tokens": 99.0}, ValueError, ["encode_batch_tokens=99.0", "whole number"]),
        ({"window": 15}, ValueError, ["window=15", "segment_length=16", "Choose a larger window or a shorter segment"]),
    ],
    ids=str,
)
def test_configuration(fields, error, parts):
    with refused(error, *parts):
        RCCConfig(text_config=text_config(), **{"segment_length": SEGMENT, "ratio": RATIO} | fields)


def test_targets_that_the_base_does_not_have():
    with refused(ValueError, "['query']", "it has", "q_proj"):
        rcc_model(scheme_options={"targets": ["query", "v_proj"]})


@pytest.mark.parametrize("version", ["5.15.2", "5.10.0", "4.57.1", "5.9.0.dev0"])
def test_transformers_that_is_too_old(version):
    with refused(ImportError, version, "needs transformers 5.16 or newer", "pip install -U 'transformers>=5.16'"):
        check_transformers(version)


@pytest.mark.parametrize("version", ["5.16.0", "5.16.0rc1", "5.23.0.dev0", "5.100.1", "6.0.0"])
def test_transformers_that_is_new_enough(version):
    check_transformers(version)


@pytest.mark.parametrize("ratio", [3, 0, -4, 32, 4.0, "4"])
def test_ratio_of_a_call(model, ratio):
    parts = [f"ratio={ratio!r} does not divide segment_length=16", "choose one of 1, 2, 4, 8, 16"]
    with refused(ValueError, *parts):
        model.compress(tokens(1, 54), ratio=ratio)
    with refused(ValueError, *parts):
        model.generate(tokens(1, 54), ratio=ratio, max_new_tokens=2)
    with refused(ValueError, *parts):
        model(tokens(1, 5), context_ids=tokens(1, 54), ratio=ratio)


def test_context_shorter_than_a_segment(model, memory):
    parts = ["15 tokens", "less than one segment of 16", "shorter segment_length"]
    with refused(ValueError, *parts, "Put it into the prompt"):
        model.compress(tokens(1, 15))
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    with refused(ValueError, *parts):
        model.compress(ids, attention_mask=mask)


@pytest.mark.parametrize("ids", [torch.zeros(1, 54), torch.zeros(1, 54, dtype=torch.bool)], ids=["float", "bool"])
def test_ids_of_another_dtype(model, ids):
    parts = ["input_ids must be integers", str(ids.dtype), "inputs_embeds"]
    with refused(TypeError, *parts):
        model.compress(ids)
    with refused(TypeError, *parts):
        model(tokens(1, 5), context_ids=ids)


@pytest.mark.parametrize("shape", [(54,), (1, 2, 3, 54)])
def test_ids_of_another_shape(model, shape):
    with refused(ValueError, str(shape), "ids are [batch, tokens]"):
        model.compress(torch.ones(shape, dtype=torch.long))


def test_ids_on_another_device(model):
    with refused(ValueError, "the inputs are on meta and the model on cpu", "move them with .to(model.device)"):
        model.compress(tokens(1, 54).to("meta"))
    with refused(ValueError, "the inputs are on meta and the model on cpu"):
        model(tokens(1, 5), context_ids=tokens(1, 54).to("meta"))


def test_masks_of_another_shape(model, memory):
    with refused(ValueError, "attention_mask has shape (2, 53)", "the inputs need (2, 54)"):
        model.compress(tokens(2, 54), attention_mask=torch.ones(2, 53))
    with refused(ValueError, "attention_mask has shape (2, 1, 5, 22)", "[batch, tokens]"):
        model(tokens(2, 5), memory=memory, attention_mask=torch.ones(2, 1, 5, 22))
    with refused(ValueError, "attention_mask has shape (2, 4)", "at least 5 columns"):
        model(tokens(2, 5), memory=memory, attention_mask=torch.ones(2, 4))
    with refused(ValueError, "attention_mask has shape (2, 1, 5, 22)", "[batch, tokens]"):
        model(tokens(2, 5), context_ids=tokens(2, 54), attention_mask=torch.ones(2, 1, 5, 22))


USES = {
    "forward": lambda model, memory: model(tokens(2, 5), memory=memory),
    "backbone": lambda model, memory: model.model(tokens(2, 5), memory=memory),
    "generate": lambda model, memory: model.generate(tokens(2, 5), memory=memory, max_new_tokens=2),
    "compress": lambda model, memory: model.compress(tokens(2, 54), memory=memory),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_what_is_no_memory(model, use):
    with refused(TypeError, "memory must be an RCCMemory", "compress()", "not a dict"):
        use(model, {"layers": []})


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_memory_of_another_dtype(model, memory, use):
    with refused(ValueError, "torch.float32", "torch.float64", "memory.to(dtype=model.dtype)"):
        use(model, memory.to(dtype=torch.float32))


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_memory_on_another_device(model, memory, use):
    with refused(ValueError, "the memory is on meta and the model on cpu", "memory.to(model.device)"):
        use(model, memory.to("meta"))


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("part", ["base", "compressor"])
def test_memory_of_another_model(model, memory, use, part):
    """One weight of the last layer is enough. The message has the fingerprints of both."""
    other = copy.deepcopy(model)
    layer = other.model.language_model.layers[-1]
    weight = layer.mlp.down_proj.weight if part == "base" else layer.rcc.slot_map.up
    weight.data *= 1.5
    marks = [getattr(one.compress(tokens(1, 16)).origin, part) for one in (model, other)]
    assert marks[0] != marks[1]
    same = "compressor" if part == "base" else "base"
    assert getattr(other.compress(tokens(1, 16)).origin, same) == getattr(memory.origin, same)
    with refused(ValueError, *marks, "written by another model", "Use the model (base and compressor) that wrote it"):
        use(other, memory)


@pytest.mark.parametrize("use", ["forward", "generate"])
def test_memory_of_another_batch(model, memory, use):
    prompts = tokens(3, 5)
    with refused(ValueError, "a memory of 2 rows", "3 prompts", "must be a multiple"):
        if use == "forward":
            model(prompts, memory=memory)
        else:
            model.generate(prompts, memory=memory, max_new_tokens=2)


def test_appending_to_a_memory_of_another_batch(model, memory):
    with refused(ValueError, "the memory has 2 rows and input_ids 3", "append row by row"):
        model.compress(tokens(3, 54), memory=memory)


def test_contexts_of_another_batch(model):
    with refused(ValueError, "context_ids has 2 rows and the local tokens 3", "must agree"):
        model(tokens(3, 5), context_ids=tokens(2, 54))


def test_labels_of_another_shape(model, memory):
    expected = ["labels have shape (2, 59)", "the local tokens need (2, 5)", "a context has no labels"]
    with refused(ValueError, *expected):
        model(tokens(2, 5), context_ids=tokens(2, 54), labels=tokens(2, 59))
    with refused(ValueError, *expected):
        model(tokens(2, 5), memory=memory, labels=tokens(2, 59))
    with refused(ValueError, *expected):
        model(inputs_embeds=torch.zeros(2, 5, 32, dtype=torch.float64), labels=tokens(2, 59))


def test_arguments_that_exclude_each_other(model, memory):
    context = tokens(2, 54)
    cache = model(tokens(2, 5), memory=memory).past_key_values
    embeds = model.get_input_embeddings()(tokens(2, 5))
    for extra in ({"memory": memory}, {"past_key_values": cache}, {"use_cache": True}):
        with refused(ValueError, "context_ids is the training path", "call compress() and pass its result as memory"):
            model(tokens(2, 5), context_ids=context, **extra)
    with refused(ValueError, "memory or past_key_values, not both", "the cache holds the memory"):
        model(tokens(2, 5), memory=memory, past_key_values=cache)
    for given in ({}, {"input_ids": tokens(2, 5), "inputs_embeds": embeds}):
        with refused(ValueError, "exactly one of input_ids and inputs_embeds"):
            model(**given)


# 512 positions: 470 tokens leave 116 slots and 6 raw tokens at ratio 4, and 464 and 6 at ratio 1
TOO_LONG = {
    "memory in forward": lambda model: model(tokens(1, 43), memory=model.compress(tokens(1, 470), ratio=1)),
    "context_ids": lambda model: model(tokens(1, 43), context_ids=tokens(1, 470), ratio=1),
}


@pytest.mark.parametrize("use", TOO_LONG.values(), ids=TOO_LONG.keys())
def test_more_positions_than_the_base_has(model, use):
    with refused(ValueError, "need 513 positions", "the base was trained for 512", "Use a higher ratio"):
        use(model)


def test_as_many_positions_as_the_base_has(model):
    memory = model.compress(tokens(1, 470), ratio=1)
    assert model(tokens(1, 42), memory=memory).logits.shape[1] == 42
    assert model(tokens(1, 42), context_ids=tokens(1, 470), ratio=1).logits.shape[1] == 42
    assert model.generate(tokens(1, 40), memory=memory, max_new_tokens=2, min_new_tokens=2).shape[1] == 42


def longest(ratio: int) -> str:
    return f"{(512 - WINDOW) * ratio} tokens"


@pytest.mark.parametrize(
    ("arguments", "needed", "ratio"),
    [
        # 464 slots, 6 raw tokens, a prompt of 5 and 38 new tokens
        (lambda model: {"input_ids": tokens(1, 5), "memory": model.compress(tokens(1, 470), ratio=1)}, 513, RATIO),
        # 1904 tokens are 468 slots and 32 raw ones
        (lambda model: {"input_ids": tokens(1, 1904)}, 538, RATIO),
        (lambda model: {"inputs_embeds": model.get_input_embeddings()(tokens(1, 1904)).detach()}, 538, RATIO),
        # 912 tokens are 440 slots of 2 and 32 raw ones
        (lambda model: {"input_ids": tokens(1, 944), "ratio": 2}, 526, 2),
        # 464 slots; the 6 raw tokens and the prompt's 38 are one segment, 4 slots, and 28 tokens
        (lambda model: {"input_ids": tokens(1, 38), "memory": model.compress(tokens(1, 470), ratio=1)}, 534, RATIO),
    ],
    ids=["memory", "long prompt", "long embeddings", "ratio of the call", "memory and long prompt"],
)
def test_generation_that_would_run_out_of_positions_does_not_begin(model, arguments, needed, ratio):
    """No forward call is made: hours of generation are not to end in an error."""
    arguments, calls = arguments(model), []
    watch = model.model.language_model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with refused(ValueError, f"need {needed} positions", "trained for 512", f"At ratio {ratio}", longest(ratio)):
            model.generate(**arguments, max_new_tokens=38)
    finally:
        watch.remove()
    assert calls == []


def test_padding_needs_no_positions(model):
    """A short row in a long batch, and a batch whose longest row fits."""
    ids = torch.cat([torch.zeros(1, 20, dtype=torch.long), tokens(1, 42)], 1)
    memory = model.compress(tokens(1, 470), ratio=1)
    assert model(ids, attention_mask=(ids != 0).long(), memory=memory).logits.shape[1] == 62


def test_base_of_unknown_type(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    parts = ["'gpt2'", "Known types", "gpt_neox, granite, llama, mistral", "Choose a base of one of these"]
    for cls in (RCCForCausalLM, RCCModel):
        with refused(ValueError, *parts):
            cls.from_base(tmp_path)
        with refused(ValueError, *parts):
            cls(RCCConfig(text_config=config))


@pytest.mark.parametrize("method", ["from_pretrained", "from_base"])
@pytest.mark.parametrize("cls", [RCCForCausalLM, RCCModel])
def test_a_folder_that_is_no_checkpoint(cls, method, tmp_path):
    load = getattr(cls, method)
    with refused(ValueError, str(tmp_path), "it has no config.json", "Give a folder that save_pretrained wrote"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "rcc", ')
    with refused(ValueError, str(tmp_path / "config.json"), "is damaged", "Save or download the checkpoint again"):
        load(tmp_path)


def test_a_folder_without_weights(model, tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    for adapter_only, arguments in ((False, {}), (True, {"base_model": tmp_path / "base"})):
        model.save_pretrained(tmp_path / "model", adapter_only=adapter_only)
        (tmp_path / "model" / "model.safetensors").unlink()
        with pytest.raises(OSError, match=r"model\.safetensors") as error:
            RCCForCausalLM.from_pretrained(tmp_path / "model", **arguments)
        assert str(tmp_path / "model") in str(error.value)


def test_a_place_where_nothing_is(tmp_path):
    for load in (RCCForCausalLM.from_pretrained, RCCForCausalLM.from_base):
        with pytest.raises(OSError, match="absent"):
            load(tmp_path / "absent")


def test_a_base_checkpoint_instead_of_ours(tmp_path):
    base_model().save_pretrained(tmp_path)
    for cls in (RCCForCausalLM, RCCModel):
        with refused(ValueError, str(tmp_path), "is a 'llama' checkpoint", f"{cls.__name__}.from_base("):
            cls.from_pretrained(tmp_path)


def test_our_checkpoint_instead_of_a_base(model, tmp_path):
    model.save_pretrained(tmp_path)
    with refused(ValueError, "from_pretrained", str(tmp_path)):
        RCCForCausalLM.from_base(tmp_path)


def test_after_an_error_the_model_is_the_base_again(model):
    """The adapters that were on when it happened are off."""
    ids = tokens(1, 9)
    expected = model(ids).logits

    def fail(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.compress(tokens(1, 54), on_progress=fail)
    hook = model.model.language_model.layers[1].register_forward_pre_hook(lambda *_: fail(0))
    for broken in (
        lambda: model.compress(tokens(1, 54)),
        lambda: model(ids, context_ids=tokens(1, 54)),
        lambda: model.generate(tokens(1, 54), max_new_tokens=2),
    ):
        with pytest.raises(KeyboardInterrupt):
            broken()
    hook.remove()
    assert running_pass() is None
    assert torch.equal(model(ids).logits, expected)
