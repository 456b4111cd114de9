# SPDX-License-Identifier: Apache-2.0
"""`RCCMemory` as a value: saving and loading it, moving it, its size, and how it grows."""

import copy
import json
import os
import stat
from dataclasses import FrozenInstanceError

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import RATIO, SEGMENT, ratio_of_norms, rcc_model, tokens

from rcc_hf import RCCMemory
from rcc_hf.modeling import compressed_rcc
from rcc_hf.modeling.memory_rcc import WIRINGS
from rcc_hf.modeling.positions_rcc import slot_positions

LENGTHS = (70, 9, 37)  # 4 segments and 6 tokens; no segment; 2 segments and 5 tokens


@pytest.fixture(scope="module", params=WIRINGS)
def model(request):
    return rcc_model(scheme_options={"wiring": request.param})


@pytest.fixture(scope="module")
def memory(model):
    return model.compress(tokens(2, 54))


@pytest.fixture(scope="module")
def ragged(model):
    ids = torch.stack([torch.nn.functional.pad(tokens(1, n, seed=n)[0], (70 - n, 0)) for n in LENGTHS])
    return model.compress(ids, attention_mask=(ids != 0).long())


def assert_same(actual: RCCMemory, expected: RCCMemory) -> None:
    """Equal to the last bit, in everything."""
    assert actual._tensors().keys() == expected._tensors().keys()
    for name, tensor in expected._tensors().items():
        assert actual._tensors()[name].dtype == tensor.dtype
        assert torch.equal(actual._tensors()[name], tensor)
    for name in ("slot_counts", "row_tokens", "origin"):
        assert getattr(actual, name) == getattr(expected, name)


def logits(model, memory, batch_size=None) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(batch_size or memory.batch_size, 5, seed=50), memory=memory).logits


def test_what_a_memory_says_of_itself(memory, ragged):
    assert (memory.batch_size, memory.num_tokens, memory.num_local) == (2, 54, 6)
    assert memory.num_slots == 3 * SEGMENT // RATIO
    assert (memory.slot_counts, memory.row_tokens) == ((4, 4, 4), (54, 54))
    assert (memory.mask, memory.local_mask) == (None, None)
    assert torch.equal(memory.local_ids, tokens(2, 54)[:, 48:])
    assert (memory.dtype, memory.device) == (torch.float64, torch.device("cpu"))
    assert (ragged.batch_size, ragged.num_tokens, ragged.num_slots, ragged.num_local) == (3, 70, 16, 9)
    assert ragged.row_tokens == LENGTHS
    assert ragged.mask.sum(1).tolist() == [16, 0, 8]
    assert ragged.local_mask.sum(1).tolist() == [6, 9, 5]
    assert "num_slots=16" in repr(ragged)
    assert "RCCMemory" in repr(ragged)


def test_size_in_bytes_follows_the_formula(model, memory, ragged):
    """Every layer keeps a key and a value of all heads for each slot, or with wiring "add" one state."""
    text, wiring = model.config.text_config, model.config.scheme_options["wiring"]
    head = text.hidden_size // text.num_attention_heads
    width = text.hidden_size if wiring == "add" else 2 * text.num_key_value_heads * head
    per_slot = text.num_hidden_layers * width * torch.float64.itemsize
    assert memory.nbytes == 2 * 12 * per_slot + 2 * 6 * 8
    assert ragged.nbytes == 3 * 16 * per_slot + 3 * (16 + 9 + 9) * 8
    assert memory.to(dtype=torch.bfloat16).nbytes == 2 * 12 * per_slot // 4 + 2 * 6 * 8


def test_a_memory_does_not_change(memory):
    with pytest.raises(FrozenInstanceError):
        memory.local_ids = None


@pytest.mark.parametrize("kind", ["memory", "ragged"])
def test_saved_and_loaded_it_is_the_same(model, kind, request, tmp_path):
    memory = request.getfixturevalue(kind)
    memory.save_pretrained(tmp_path / "deep" / "folder")
    loaded = RCCMemory.from_pretrained(tmp_path / "deep" / "folder")
    assert_same(loaded, memory)
    assert torch.equal(logits(model, loaded), logits(model, memory))
    assert sorted(p.name for p in (tmp_path / "deep" / "folder").iterdir()) == ["memory.json", "memory.safetensors"]
    loaded.save_pretrained(str(tmp_path / "again"))
    assert_same(RCCMemory.from_pretrained(str(tmp_path / "again")), memory)


def test_a_bfloat16_memory_stays_one(memory, tmp_path):
    memory.to(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert_same(RCCMemory.from_pretrained(tmp_path), memory.to(dtype=torch.bfloat16))


def test_the_description_beside_the_weights_is_theirs(memory, tmp_path):
    memory.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "memory.json").read_text())
    assert described["row_tokens"] == [54, 54]
    assert described["origin"]["scheme"] == "rcc"
    with safe_open(tmp_path / "memory.safetensors", "pt") as file:
        assert json.loads(file.metadata()["memory"]) == described


def test_loading_needs_the_weights_alone(memory, tmp_path):
    """Should the pair be mixed by hand, the description inside the weights counts."""
    memory.save_pretrained(tmp_path)
    (tmp_path / "memory.json").write_text("{}")
    assert_same(RCCMemory.from_pretrained(tmp_path), memory)


def test_saved_files_have_the_permissions_that_the_user_wants(memory, tmp_path):
    memory.save_pretrained(tmp_path)
    (tmp_path / "other").write_text("")
    expected = stat.S_IMODE((tmp_path / "other").stat().st_mode)
    for name in ("memory.json", "memory.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == expected


def test_saving_over_an_older_memory(model, memory, ragged, tmp_path):
    ragged.save_pretrained(tmp_path)
    memory.save_pretrained(tmp_path)
    assert_same(RCCMemory.from_pretrained(tmp_path), memory)


@pytest.mark.parametrize("step", ["save_file", "os.replace"])
def test_a_write_that_fails_leaves_the_older_memory(memory, ragged, step, tmp_path, monkeypatch):
    ragged.save_pretrained(tmp_path)

    def fail(*arguments, **keywords):
        if step == "save_file":
            with open(arguments[1], "wb") as file:
                file.write(b"half a file")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(compressed_rcc, "save_file", fail) if step == "save_file" else patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            memory.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory.json", "memory.safetensors"]
    assert_same(RCCMemory.from_pretrained(tmp_path), ragged)


def truncate(folder):
    os.truncate(folder / "memory.safetensors", 300)


def empty_file(folder):
    os.truncate(folder / "memory.safetensors", 0)


def scramble_header(folder):
    file = folder / "memory.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"x" * 32
    file.write_bytes(data)


def foreign_file(folder):
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, folder / "memory.safetensors", {"format": "pt"})


def no_metadata(folder):
    save_file({"layers.0.0": torch.zeros(2, 2)}, folder / "memory.safetensors")


def rewrite(folder, remove_tensors=(), remove=(), **changed):
    """Leaves a valid safetensors file whose tensors or description are not what was saved."""
    with safe_open(folder / "memory.safetensors", "pt") as file:
        described = json.loads(file.metadata()["memory"])
        tensors = {name: file.get_tensor(name) for name in file.keys() if name not in remove_tensors}
    described = {name: value for name, value in (described | changed).items() if name not in remove}
    save_file(tensors, folder / "memory.safetensors", {"memory": json.dumps(described)})


def other_json(folder, value):
    save_file({"local_ids": torch.zeros(1, 0)}, folder / "memory.safetensors", {"memory": json.dumps(value)})


DAMAGES = {
    "truncated": truncate,
    "empty": empty_file,
    "scrambled header": scramble_header,
    "foreign": foreign_file,
    "no metadata": no_metadata,
    "a list as description": lambda folder: other_json(folder, [1, 2]),
    "a number as description": lambda folder: other_json(folder, 5),
    "no origin": lambda folder: rewrite(folder, remove=["origin"]),
    "half an origin": lambda folder: rewrite(folder, origin={"scheme": "rcc"}),
    "no local ids": lambda folder: rewrite(folder, ["local_ids"]),
    "a layer less": lambda folder: rewrite(folder, ["layers.2.0", "layers.2.1"]),
    "slot counts of another memory": lambda folder: rewrite(folder, slot_counts=[4]),
    "row tokens of another memory": lambda folder: rewrite(folder, row_tokens=[54]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_or_foreign_file_is_refused(memory, damage, tmp_path):
    memory.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match="damaged or no memory") as error:
        RCCMemory.from_pretrained(tmp_path)
    assert str(tmp_path / "memory.safetensors") in str(error.value)
    assert "Compress the context again" in str(error.value)


@pytest.mark.parametrize("place", ["empty", "absent", "a checkpoint"])
def test_a_folder_without_memory_is_refused(model, place, tmp_path):
    if place == "a checkpoint":
        model.save_pretrained(tmp_path / place)
    elif place == "empty":
        (tmp_path / place).mkdir()
    with pytest.raises(ValueError, match=r"holds no memory: there is no memory\.safetensors") as error:
        RCCMemory.from_pretrained(tmp_path / place)
    assert str(tmp_path / place) in str(error.value)
    assert "save_pretrained" in str(error.value)


def test_a_later_format_is_refused(memory, tmp_path):
    memory.save_pretrained(tmp_path)
    rewrite(tmp_path, format_version=3)
    with pytest.raises(ValueError, match="has format 3, this version reads 2"):
        RCCMemory.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["memory", "ragged"])
def test_another_dtype(model, kind, request):
    memory = request.getfixturevalue(kind)
    half = memory.to(dtype=torch.float16)
    assert half.dtype == torch.float16
    for new, old in zip(half.layers, memory.layers, strict=True):
        assert all(torch.equal(n, o.half()) for n, o in zip(new, old, strict=True))
    assert torch.equal(half.local_ids, memory.local_ids)
    assert memory.dtype == torch.float64
    assert_same(memory.to(), memory)


@pytest.mark.parametrize("kind", ["memory", "ragged"])
def test_another_device_takes_everything_along(model, kind, request):
    memory = request.getfixturevalue(kind)
    moved = memory.to("meta")
    assert {tensor.device.type for tensor in moved._tensors().values()} == {"meta"}
    assert moved._tensors().keys() == memory._tensors().keys()
    assert moved.device.type == "meta"
    assert (moved.slot_counts, memory.device.type) == (memory.slot_counts, "cpu")


def test_a_converted_memory_serves_a_converted_model(model, memory):
    single = copy.deepcopy(model).float()
    expected = logits(model, memory)
    assert ratio_of_norms(logits(single, memory.to(dtype=torch.float32)).double(), expected) <= 1e-5


@pytest.mark.parametrize("kind", ["memory", "ragged"])
def test_rows_are_selected(model, kind, request):
    memory = request.getfixturevalue(kind)
    order = torch.tensor([1, 0, 1])
    chosen = memory.select(order)
    for name, tensor in chosen._tensors().items():
        assert torch.equal(tensor, memory._tensors()[name][order])
    assert chosen.row_tokens == tuple(memory.row_tokens[i] for i in (1, 0, 1))
    assert chosen.slot_counts == memory.slot_counts


def test_rows_are_repeated_in_place(memory):
    assert_same(memory.expand(6), memory.select(torch.tensor([0, 0, 0, 1, 1, 1])))
    assert memory.expand(2) is memory
    for impossible in (1, 3):
        with pytest.raises(ValueError, match=f"2 rows cannot serve a batch of {impossible} prompts"):
            memory.expand(impossible)


def test_appending_equals_compressing_the_whole(model):
    """In pieces of any length: what is behind the last whole segment goes in front of the next piece."""
    ids = tokens(2, 90)
    whole, memory = model.compress(ids), model.compress(ids[:, :21])
    before = copy.deepcopy(memory)
    grown = model.compress(ids[:, 21:25], memory=memory)
    assert (grown.num_slots, grown.num_local, grown.num_tokens) == (4, 9, 25)
    grown = model.compress(ids[:, 25:81], memory=grown)
    grown = model.compress(ids[:, 81:], memory=grown)
    assert (grown.slot_counts, grown.row_tokens) == (whole.slot_counts, whole.row_tokens)
    assert torch.equal(grown.local_ids, whole.local_ids)
    for new, old in zip(grown.layers, whole.layers, strict=True):
        assert all(ratio_of_norms(n, o) <= 1e-10 for n, o in zip(new, old, strict=True))
    assert ratio_of_norms(logits(model, grown), logits(model, whole)) <= 1e-10
    assert_same(memory, before)


@pytest.mark.parametrize("side", ["left", "right"])
def test_appending_ragged_rows_equals_appending_row_by_row(model, side):
    firsts = [tokens(1, n, seed=n) for n in (70, 9, 37)]
    seconds = [tokens(1, n, seed=100 + n) for n in (3, 40, 12)]

    def batch(rows):
        longest = max(row.shape[1] for row in rows)
        edge = (lambda n: (n, 0)) if side == "left" else (lambda n: (0, n))
        ids = torch.cat([torch.nn.functional.pad(row, edge(longest - row.shape[1])) for row in rows])
        return ids, (ids != 0).long()

    ids, mask = batch(firsts)
    more, more_mask = batch(seconds)
    grown = model.compress(more, more_mask, memory=model.compress(ids, mask))
    assert grown.row_tokens == (73, 49, 49)
    prompt = tokens(3, 5, seed=50)
    with torch.no_grad():
        actual = model(prompt, memory=grown).logits
        for i, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
            single = model.compress(torch.cat([first, second], 1))
            assert int(grown.mask[i].sum()) == single.num_slots
            assert ratio_of_norms(actual[i : i + 1], model(prompt[i : i + 1], memory=single).logits) <= 1e-10


def test_ratios_may_differ_from_segment_to_segment(model, tmp_path):
    ids = tokens(2, 85)
    memory = model.compress(ids[:, :32], ratio=2)
    memory = model.compress(ids[:, 32:64], memory=memory, ratio=16)
    memory = model.compress(ids[:, 64:], memory=memory)
    assert memory.slot_counts == (8, 8, 1, 1, 4)
    assert (memory.num_slots, memory.num_local, memory.num_tokens) == (22, 5, 85)
    pieces = [model.compress(ids[:, a:b], ratio=r) for a, b, r in ((0, 32, 2), (32, 64, 16), (64, 80, 4))]
    for i, layer in enumerate(memory.layers):
        for j, tensor in enumerate(layer):
            assert ratio_of_norms(tensor, torch.cat([p.layers[i][j] for p in pieces], -2)) <= 1e-10
    memory.save_pretrained(tmp_path)
    assert torch.equal(logits(model, RCCMemory.from_pretrained(tmp_path)), logits(model, memory))


def test_ratio_sets_the_number_of_slots(model):
    for ratio in (1, 2, 4, 8, 16):
        assert model.compress(tokens(1, 54), ratio=ratio).num_slots == 48 // ratio
    assert model.compress(tokens(1, 54)).num_slots == 48 // RATIO


def test_a_higher_ratio_keeps_every_second_slot(model):
    """States are taken at every r-th token of one and the same pass, so those of ratio 8 are among those of ratio 4."""
    fine, coarse = model.compress(tokens(1, 64), ratio=4), model.compress(tokens(1, 64), ratio=8)
    for i, layer in enumerate(coarse.layers):
        for j, tensor in enumerate(layer):
            assert ratio_of_norms(tensor, fine.layers[i][j][..., 1::2, :]) <= 1e-10


@pytest.mark.parametrize(("budget", "slots"), [(1000, 12), (12, 12), (11, 6), (6, 6), (5, 3), (3, 3)])
def test_a_budget_chooses_the_smallest_ratio_that_fits(model, budget, slots):
    """48 tokens in segments of 16; ratios from 4 on."""
    memory = model.compress(tokens(1, 54), max_slots=budget)
    assert memory.num_slots == slots
    assert_same(memory, model.compress(tokens(1, 54), ratio=48 // slots))


def test_a_budget_counts_the_slots_that_are_there(model):
    memory = model.compress(tokens(1, 48))
    assert model.compress(tokens(1, 32), memory=memory, max_slots=20).num_slots == 20
    assert model.compress(tokens(1, 32), memory=memory, max_slots=19).num_slots == 16
    assert model.compress(tokens(1, 32), memory=memory, max_slots=14).num_slots == 14
    with pytest.raises(ValueError, match=r"max_slots=13 is too few.*needs 14 slots"):
        model.compress(tokens(1, 32), memory=memory, max_slots=13)


def test_a_budget_is_for_the_longest_row(model):
    """The row with most old slots need not be the one with most new ones: 12 + 4 and 4 + 12 slots, not 12 + 12."""
    first = [tokens(1, n, seed=n) for n in (48, 16)]
    second = [tokens(1, n, seed=n + 1) for n in (16, 48)]
    pad = torch.nn.functional.pad
    ids, more = torch.cat([first[0], pad(first[1], (32, 0))]), torch.cat([pad(second[0], (32, 0)), second[1]])
    memory = model.compress(ids, (ids != 0).long())
    assert model.compress(more, (more != 0).long(), memory=memory, max_slots=16).num_slots == 16


def test_too_small_a_budget_is_refused(model):
    with pytest.raises(ValueError, match="max_slots=2 is too few") as error:
        model.compress(tokens(1, 54), max_slots=2)
    assert "needs 3 slots" in str(error.value)
    assert "Allow 3" in str(error.value)
    with pytest.raises(ValueError, match="ratio=4 or max_slots=12, not both"):
        model.compress(tokens(1, 54), ratio=4, max_slots=12)


def test_positions_count_the_slots_of_each_row(model, memory, ragged):
    for one, expected in (
        (memory, [list(range(12))] * 2),
        (ragged, [list(range(16)), [0] * 16, [0] * 8 + list(range(8))]),
    ):
        shape = (one.batch_size, sum(one.slot_counts))
        positions, shift = slot_positions(model.config, one.mask, shape, one.device)
        assert (positions.tolist(), shift) == (expected, 0)


def test_progress_counts_source_tokens(model):
    seen = []
    model.compress(tokens(2, 54), on_progress=seen.append)
    assert sum(seen) == 2 * 48
    small = copy.deepcopy(model)
    small.config.encode_batch_tokens = 2 * SEGMENT
    seen.clear()
    memory = small.compress(tokens(2, 54), on_progress=seen.append)
    assert seen == [32, 32, 32]
    for new, old in zip(memory.layers, model.compress(tokens(2, 54)).layers, strict=True):
        assert all(ratio_of_norms(n, o) <= 1e-10 for n, o in zip(new, old, strict=True))
