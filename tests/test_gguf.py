# SPDX-License-Identifier: Apache-2.0
"""Tests of the GGUF reader and of the conversion of a GGUF Llama to a Hugging Face folder."""

import json
import logging
import stat
import struct

import numpy as np
import pytest
import torch
from gguf_writer import F32, Q4_1, Q8_0, gguf_bytes, tiny_llama_metadata, tiny_llama_tensors, write_tiny_llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rcc_hf.gguf import GGUFFile
from rcc_hf.gguf_llama import HF_FILES, write_llama_folder


@pytest.fixture
def open_bytes(tmp_path):
    """A function that writes bytes to a file and opens it as GGUF."""

    def open_(content: bytes) -> GGUFFile:
        path = tmp_path / "file.gguf"
        path.write_bytes(content)
        return GGUFFile(path)

    return open_


@pytest.fixture
def converted(tmp_path):
    """A function that converts the tiny Llama, with changes, and returns the folder."""

    def convert(**changes):
        folder = tmp_path / "folder"
        folder.mkdir()
        write_llama_folder(GGUFFile(write_tiny_llama(tmp_path / "tiny.gguf", **changes)), folder, progress=False)
        return folder

    return convert


def test_q8_0_is_scale_times_code(open_bytes):
    block = struct.pack("<e32b", 0.5, *range(-16, 16))
    other = struct.pack("<e32b", -2.0, *[3] * 32)
    loaded = open_bytes(gguf_bytes({}, {"w": (Q8_0, (2, 32), block + other)})).load("w")
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, [np.arange(-8, 8, 0.5), [-6.0] * 32])


def test_q4_1_is_scale_times_nibble_plus_minimum_low_nibbles_first(open_bytes):
    # Byte i holds i in its low nibble (value i) and 15 - i in its high nibble (value 16 + i).
    codes = bytes(i | (15 - i) << 4 for i in range(16))
    block = struct.pack("<ee", 2.0, -1.0) + codes
    loaded = open_bytes(gguf_bytes({}, {"w": (Q4_1, (1, 32), block)})).load("w")
    np.testing.assert_array_equal(loaded, [[*range(-1, 31, 2), *range(29, -3, -2)]])


def test_tensors_keep_their_order_of_dimensions_and_their_places(open_bytes):
    first, second = np.arange(6).reshape(3, 2), np.arange(10, 22).reshape(2, 2, 3)
    opened = open_bytes(gguf_bytes({"general.alignment": 64}, {"a": first, "b": second}))
    assert list(opened.tensors) == ["a", "b"]
    assert opened.tensors["b"].offset % 64 == 0
    np.testing.assert_array_equal(opened.load("a"), first)
    np.testing.assert_array_equal(opened.load("b"), second)


def test_a_loaded_tensor_is_a_writable_copy(open_bytes):
    opened = open_bytes(gguf_bytes({}, {"w": np.ones(4)}))
    opened.load("w")[:] = 7
    np.testing.assert_array_equal(opened.load("w"), np.ones(4))


def test_metadata_of_each_kind(open_bytes):
    metadata = {"u": 7, "f": 0.25, "b": True, "s": "Ġé", "strings": ["a", "", "ç"], "ints": [-1, 2, 3]}
    assert open_bytes(gguf_bytes(metadata, {})).metadata == metadata


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file", b"GG"])
def test_other_files_are_refused(open_bytes, content):
    with pytest.raises(ValueError, match="not a GGUF file"):
        open_bytes(content)


def test_a_file_cut_anywhere_is_called_truncated(open_bytes):
    content = gguf_bytes({"key": "value", "list": [1, 2]}, {"w": (Q8_0, (2, 32), bytes(68)), "v": np.ones(3)})
    open_bytes(content)
    for size in range(4, len(content)):
        with pytest.raises(ValueError, match="truncated"):
            open_bytes(content[:size])


@pytest.mark.parametrize("version", [2, 4, 3 << 24])
def test_other_versions_are_refused(open_bytes, version):
    with pytest.raises(ValueError, match=f"version {version}; only 3"):
        open_bytes(gguf_bytes({}, {}, version=version))


def test_an_unsupported_type_is_refused_with_the_tensor_and_the_allowed_types(open_bytes):
    with pytest.raises(ValueError, match=r"tensor 'blk.w' .* type 12; supported are F32 \(0\), Q4_1 \(3\), Q8_0 \(8\)"):
        open_bytes(gguf_bytes({}, {"blk.w": (12, (1, 256), bytes(144))}))


def test_rows_that_do_not_fill_blocks_are_refused(open_bytes):
    with pytest.raises(ValueError, match="rows of 33 values, but Q8_0 stores blocks of 32"):
        open_bytes(gguf_bytes({}, {"w": (Q8_0, (32, 33), bytes(34 * 33))}))


def test_damaged_metadata_is_refused(open_bytes):
    content = bytearray(gguf_bytes({"k": 5}, {}))
    content[24 + 9] = 77  # after the header and the key: the type of the value
    with pytest.raises(ValueError, match="metadata value of type 77"):
        open_bytes(bytes(content))


def test_alignment_zero_is_refused(open_bytes):
    content = gguf_bytes({"general.alignment": 32}, {})
    with pytest.raises(ValueError, match=r"general\.alignment 0"):
        open_bytes(content.replace(struct.pack("<II", 4, 32), struct.pack("<II", 4, 0)))


def test_query_and_key_rows_are_reordered_and_no_others(converted):
    weights = load_file(converted() / "model.safetensors")
    original = {name: torch.tensor(value, dtype=torch.bfloat16) for name, value in tiny_llama_tensors().items()}
    attention = "model.layers.0.self_attn"
    # Head of width 4: GGUF rotates rows (0, 1) and (2, 3) together, transformers (0, 2) and (1, 3).
    assert torch.equal(weights[f"{attention}.q_proj.weight"], original["blk.0.attn_q.weight"][[0, 2, 1, 3, 4, 6, 5, 7]])
    assert torch.equal(weights[f"{attention}.k_proj.weight"], original["blk.0.attn_k.weight"][[0, 2, 1, 3]])
    assert torch.equal(weights[f"{attention}.v_proj.weight"], original["blk.0.attn_v.weight"])
    assert torch.equal(weights["model.embed_tokens.weight"], original["token_embd.weight"])


def test_the_folder_loads_in_transformers_without_a_warning(converted, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")
    folder = converted()
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not any(report.values()), report
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert model.dtype == torch.bfloat16
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    assert model.config.tie_word_embeddings
    assert (model.config.num_key_value_heads, model.config.head_dim) == (1, 4)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("hehe 12")["input_ids"]) == ["he", "he", "Ġ", "1", "2"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False) == "he<|im_end|>"


def test_an_output_matrix_is_not_tied(converted):
    output = -tiny_llama_tensors()["token_embd.weight"]
    folder = converted(tensors={"output.weight": output})
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight.float(), torch.tensor(output, dtype=torch.float32))
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_the_files_are_as_readable_as_any_other(converted, tmp_path):
    folder = converted()
    (tmp_path / "other").touch()
    expected = stat.S_IMODE((tmp_path / "other").stat().st_mode)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == dict.fromkeys(
        HF_FILES, expected
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"general.architecture": "gemma"}}, "architecture 'gemma'; only 'llama'"),
        ({"metadata": {"tokenizer.ggml.pre": "llama-bpe"}}, r"tokenizer \('gpt2', 'llama-bpe'\)"),
        ({"tensors": {"rope_freqs.weight": np.ones(2)}}, "tensor 'rope_freqs.weight'"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(8)}}, "tensor 'blk.0.attn_q.bias'"),
    ],
)
def test_other_models_are_refused(converted, changes, message):
    with pytest.raises(ValueError, match=message):
        converted(**changes)


def test_missing_metadata_is_named(tmp_path):
    metadata = tiny_llama_metadata()
    del metadata["llama.block_count"]
    path = tmp_path / "file.gguf"
    path.write_bytes(gguf_bytes(metadata, {"w": (F32, (1,), bytes(4))}))
    with pytest.raises(ValueError, match=r"lacks the metadata key 'llama.block_count'"):
        write_llama_folder(GGUFFile(path), tmp_path, progress=False)


def test_the_tokenizer_file_has_the_vocabulary_in_order(converted):
    tokenizer = json.loads((converted() / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = tiny_llama_metadata()["tokenizer.ggml.tokens"]
    assert tokenizer["model"]["vocab"] == {token: index for index, token in enumerate(tokens)}
    assert tokenizer["model"]["merges"] == [["h", "e"], ["1", "2"]]
    assert [token["content"] for token in tokenizer["added_tokens"]] == tokens[:3]
