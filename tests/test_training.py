# SPDX-License-Identifier: Apache-2.0
"""Training the compressor with the Trainer of transformers."""

import pytest
import torch
from training_runs import Examples, Mixed, fresh, parameters, settings
from transformers import TrainerCallback

from rcc_hf import RCCForCausalLM
from rcc_hf.modeling.fingerprint_rcc import is_trained_part
from rcc_hf.training import train


def test_every_trained_parameter_changes_and_no_frozen_one_does(tmp_path):
    model = fresh(tmp_path)
    before = parameters(model)
    train(model, settings(tmp_path / "out"), Examples())
    for name, after in parameters(model).items():
        assert torch.equal(before[name], after) != is_trained_part(name), name


def test_it_learns_and_reports(tmp_path):
    metrics = train(fresh(tmp_path), settings(tmp_path / "out", max_steps=60), Examples(), Examples(8))
    assert metrics["eval_token_accuracy"] > 0.5  # chance is 1 in 125
    assert metrics["eval_loss"] < metrics["train_loss"] < 5


def test_a_checkpoint_holds_the_compressor_alone_and_loads(tmp_path):
    model = fresh(tmp_path)
    train(model, settings(tmp_path / "out"), Examples())
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-3"):
        assert (folder / "model.safetensors").stat().st_size < (tmp_path / "start" / "model.safetensors").stat().st_size
    loaded = RCCForCausalLM.from_pretrained(tmp_path / "out")
    assert all(
        torch.equal(p, q) for p, q in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_resuming_is_the_same_as_never_having_stopped(tmp_path):
    whole = fresh(tmp_path)
    train(whole, settings(tmp_path / "whole"), Examples())
    train(fresh(tmp_path), settings(tmp_path / "parts"), Examples(), callbacks=[StopAt(3)])
    resumed = fresh(tmp_path)
    train(resumed, settings(tmp_path / "parts", resume=True), Examples())
    for name, parameter in parameters(resumed).items():
        assert torch.equal(parameter, parameters(whole)[name]), name


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("changes", [{}, {"num_workers": 1}, {"dtype": torch.bfloat16}], ids=str)
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, changes):
    """Between two checkpoints, and in a mixture, whose examples follow from their index: bit for bit."""
    how = {"accumulation_steps": 2, "batch_size": 2, "save_steps": 2, "distillation_weight": 0.5, "schedule": "cosine"}
    how |= {name: value for name, value in changes.items() if name != "dtype"}
    dtype = changes.get("dtype", torch.float32)
    whole, killed, resumed = (fresh(tmp_path, dtype) for _ in range(3))
    train(whole, settings(tmp_path / "whole", **how), Mixed(size=24))
    with pytest.raises(Killed):
        train(killed, settings(tmp_path / "parts", **how), Mixed(size=24), callbacks=[KillAt(3)])
    seen = []

    class Watched(Mixed):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    train(resumed, settings(tmp_path / "parts", resume=True, **how), Watched(size=24))
    assert seen == ([] if how.get("num_workers") else list(range(8, 24)))
    for name, parameter in parameters(resumed).items():
        assert torch.equal(parameter, parameters(whole)[name]), name


class Look(TrainerCallback):
    """Keeps the losses, and the dtypes of the parameters in training."""

    def __init__(self):
        self.losses, self.dtypes = [], set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [logs["loss"]] if "loss" in logs else []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.dtypes.update(p.dtype for p in model.parameters())


def test_autocast_computes_in_bfloat16_and_keeps_parameters_in_float32(tmp_path):
    looks, inside = {}, {}
    for bf16 in (False, True):
        model, looks[bf16], inside[bf16] = fresh(tmp_path), Look(), set()
        linear = model.model.language_model.layers[1].mlp.up_proj
        linear.register_forward_hook(lambda module, args, output, seen=inside[bf16]: seen.add(output.dtype))
        how = settings(tmp_path / str(bf16), bf16=bf16, logging_steps=1)
        train(model, how, Mixed(), callbacks=[looks[bf16]])
    assert inside == {False: {torch.float32}, True: {torch.bfloat16}}
    assert looks[True].dtypes == {torch.float32}
    assert looks[True].losses != looks[False].losses
    assert looks[True].losses == pytest.approx(looks[False].losses, rel=2e-2)


def test_a_mixture_is_read_in_its_order_and_other_data_are_not(tmp_path):
    read = {}
    for kind in (Examples, Mixed):
        seen = []

        class Watched(kind):
            def __getitem__(self, index, seen=seen):
                seen.append(index)
                return super().__getitem__(index)

        train(fresh(tmp_path), settings(tmp_path / kind.__name__, max_steps=3), Watched(32))
        read[kind] = seen[:12]
    assert read[Mixed] == list(range(12))
    assert read[Examples] != sorted(read[Examples])


def test_accumulating_two_batches_is_one_of_twice_the_size(tmp_path):
    one, two = fresh(tmp_path), fresh(tmp_path)
    train(one, settings(tmp_path / "one", max_steps=1, batch_size=4, warmup_steps=0), Examples())
    train(two, settings(tmp_path / "two", max_steps=1, batch_size=2, accumulation_steps=2, warmup_steps=0), Examples())
    # the first step of Adam follows the sign of the gradient, so compare what it left behind up to rounding
    for name, parameter in parameters(one).items():
        torch.testing.assert_close(parameter, parameters(two)[name], rtol=0, atol=2e-4, msg=name)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, checkpointed = fresh(tmp_path), fresh(tmp_path)
    train(plain, settings(tmp_path / "plain"), Examples())
    train(checkpointed, settings(tmp_path / "saving", gradient_checkpointing=True), Examples())
    for name, parameter in parameters(plain).items():
        assert torch.equal(parameter, parameters(checkpointed)[name]), name


def test_a_bfloat16_model_trains_its_compressor_in_float32(tmp_path):
    model, seen = fresh(tmp_path, torch.bfloat16), set()

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.update((is_trained_part(name), p.dtype) for name, p in model.named_parameters())

    train(model, settings(tmp_path / "out"), Examples(), callbacks=[Look()])
    assert seen == {(True, torch.float32), (False, torch.bfloat16)}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_nothing_to_resume_and_numbers_out_of_range_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        train(fresh(tmp_path), settings(tmp_path / "out", resume=True), Examples())
    with pytest.raises(ValueError, match="max_steps=0"):
        settings(tmp_path, max_steps=0)
