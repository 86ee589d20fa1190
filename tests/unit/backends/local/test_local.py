"""PolicyWorker: verl's engine against a float64 model of this file; and what a trainer is built from."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from support import train_ranks
from support.samples import random_samples
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config

from atropos_verl import verl_plugin
from atropos_verl.assets import demo_model_path
from atropos_verl.backends.local import trainer as trainer_module
from atropos_verl.backends.local import worker as worker_module
from atropos_verl.backends.local.run import paused_collection
from atropos_verl.backends.local.trainer import AtroposTrainer, share_cores
from atropos_verl.backends.local.worker import (
    PolicyWorker,
    _meet,
    _verl_prints_to_log,
    held_interrupts,
    split_for_ranks,
)
from atropos_verl.config.schema import RunConfig
from atropos_verl.engine.runner import WORTH_SEVERAL_THREADS, engine_threads, multiply_adds_per_layer
from atropos_verl.errors import CheckpointError, ConfigError
from atropos_verl.storage import locked
from atropos_verl.training.losses import advantage_weighted_sft_loss, clipped_ratio_loss, summarise_importance
from atropos_verl.types import TrainingSample

LR = 1e-2


def _worker(model_path: Path, **values: Any) -> PolicyWorker:
    merged = {"optim": {"lr": LR}, "trainer": {"device": "cpu", "max_token_len_per_gpu": 64}, **values}
    return PolicyWorker(RunConfig.from_mapping(merged), model_path)


def _logprobs(model: Any, sample: TrainingSample) -> torch.Tensor:
    """[T], 0 where nothing is trained; an independent float64 forward of one unpadded sequence."""
    ids = torch.as_tensor(sample.token_ids)[None]
    scores = torch.log_softmax(model(ids).logits[0, :-1] / sample.temperature, dim=-1)
    picked = scores.gather(1, ids[0, 1:, None])[:, 0]
    return torch.nn.functional.pad(picked, (1, 0)) * torch.as_tensor(sample.loss_mask)


def test_logprobs_loss_gradient_norm_and_update_of_one_step(model_path: Path) -> None:
    """Logprobs are of trained tokens, at each sample's temperature."""
    samples = random_samples(9, vocab_size=200, seed=1)
    worker = _worker(model_path)
    computed = worker.compute_logprobs(samples)
    output = worker.train(samples)
    reference = AutoModelForCausalLM.from_pretrained(str(model_path), dtype=torch.float64)
    expected = [_logprobs(reference, sample) for sample in samples]
    for own, before, while_trained in zip(expected, computed, worker.logprobs, strict=True):
        assert before == pytest.approx(own.detach().numpy(), abs=2e-5)
        assert while_trained[own.detach() != 0] == pytest.approx(own[own != 0].detach().numpy(), abs=2e-5)
    losses = [-(own * torch.as_tensor(s.advantages)).sum() for own, s in zip(expected, samples, strict=True)]
    loss = torch.stack(losses).sum() / sum(int(s.loss_mask.sum()) for s in samples)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.sqrt(sum((p.grad**2).sum() for p in reference.parameters()))
    assert output["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert output["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert all(parameter.grad is None for parameter in worker._worker.engine.module.parameters())
    # The update itself, by torch's own AdamW in float64 on the same gradient (clipped to norm 1).
    optimiser = torch.optim.AdamW(reference.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.0)
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    optimiser.step()
    wanted = reference.state_dict()
    for name, tensor in worker.named_tensors():
        # AdamW's first step is lr * sign(gradient) where the gradient is not tiny; compare the bulk.
        assert (tensor.double() - wanted[name]).abs().median() < 1e-5, name


@pytest.mark.parametrize("shares", [False, True])
def test_grpo_with_several_updates_against_float64(model_path: Path, shares: bool) -> None:
    """Two passes of two mini-batches: their ratios are to the logprobs before the first of the four updates, which have
    the rate of the step."""
    samples, names = random_samples(8, vocab_size=200, seed=4), ("loss", "grad_norm", "ratio_mean", "lr")
    trainer = {"device": "cpu", "max_token_len_per_gpu": 64, "share_prefixes": shares}
    loss, optim = {"type": "grpo", "ppo_epochs": 2, "ppo_mini_batches": 2}, {"lr": 4e-3, "lr_warmup_steps": 4}
    worker = _worker(model_path, trainer=trainer, loss=loss, off_policy={"importance": None}, optim=optim)
    output = worker.train(samples)
    reference = AutoModelForCausalLM.from_pretrained(str(model_path), dtype=torch.float64)
    old = [_logprobs(reference, sample).detach() for sample in samples]
    optimiser = torch.optim.AdamW(reference.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    updates = []
    for chunk in worker_module._mini_batches(samples, 2, 2, RunConfig().seed):
        optimiser.zero_grad()
        columns = [[s.advantages for s in samples], [s.loss_mask for s in samples]]
        known = (torch.from_numpy(np.concatenate([rows[i] for i in chunk])) for rows in columns)
        own = torch.cat([_logprobs(reference, samples[i]) for i in chunk])
        found = clipped_ratio_loss(own, torch.cat([old[i] for i in chunk]), *known)
        found.loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimiser.step()
        updates.append([found.loss.item(), norm.item(), found.metrics["ratio_mean"], 1e-3])
    assert [output[name] for name in names] == pytest.approx(np.mean(updates, 0), rel=1e-3)
    assert abs(output["ratio_mean"] - 1.0) > 1e-3
    wanted = reference.state_dict()
    assert all((tensor.double() - wanted[name]).abs().median() < 1e-5 for name, tensor in worker.named_tensors())


@pytest.mark.parametrize("loss", ["advantage_weighted_sft", "grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_through_verls_engine(model_path: Path, loss: str, level: str) -> None:
    """A step in several micro-batches has the loss and the figures of the loss function over the whole batch."""
    rng = np.random.default_rng(8)
    importance = {"importance": level, "importance_cap": 1.1}
    trainer = {"device": "cpu", "max_token_len_per_gpu": 48}
    worker = _worker(model_path, loss={"type": loss}, off_policy=importance, trainer=trainer)
    samples = random_samples(8, vocab_size=200, seed=8)
    current = worker.compute_logprobs(samples)
    # Rollouts of a policy near by; some values missing, one sequence without any.
    shifts = [np.where(rng.random(len(s)) < 0.2, np.nan, rng.normal(0, 0.1, len(s))) for s in samples]
    shifts[3][:] = np.nan
    rollouts = [c - d for c, d in zip(current, shifts, strict=True)]
    samples = [replace(s, rollout_logprobs=None if i == 3 else rollouts[i]) for i, s in enumerate(samples)]

    columns = current, rollouts, [s.advantages for s in samples], [s.loss_mask for s in samples]
    logprobs, sampled, advantages, mask = (torch.from_numpy(np.concatenate(rows)) for rows in columns)
    ids = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(s) for s in samples]))
    weights = {"rollout_logprobs": sampled, "tis_cap": 1.1, "importance": level, "sequence_ids": ids}
    own = (logprobs, logprobs) if loss == "grpo" else (logprobs,)
    expected = {"grpo": clipped_ratio_loss, "advantage_weighted_sft": advantage_weighted_sft_loss}[loss](
        *own, advantages, mask, **weights
    )
    output = worker.train(samples)
    assert output["loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    wanted = {k: v for k, v in summarise_importance(expected.metrics).items() if k.startswith("off_policy/")}
    assert wanted["off_policy/clipped_share"] > 0
    assert {key: output[key] for key in wanted} == pytest.approx(wanted, rel=1e-2, abs=1e-5)


@pytest.mark.parametrize(
    ("optim", "rates"),
    [
        ({"lr_scheduler_type": "constant", "weight_decay": 0.1, "betas": (0.5, 0.6)}, [0.5, 1, 1, 1, 1, 1]),
        # Warm-up of two of six steps, then cos² from 0 to a quarter of π at a time: no step of the six has rate 0.
        ({"lr_scheduler_type": "cosine"}, [0.5, 1, 1, 0.853553, 0.5, 0.146447]),
        ({"lr_scheduler_type": "cosine", "min_lr_ratio": 0.1}, [0.5, 1, 1, 0.868198, 0.55, 0.231802]),
    ],
)
def test_a_resumed_run_goes_on_as_if_it_had_had_its_own_settings_all_along(
    optim: dict[str, Any], rates: list[float], model_path: Path, tmp_path: Path
) -> None:
    """Weights and state of the optimiser are the checkpoint's; each step has the rate that it reports."""
    samples = random_samples(3, vocab_size=200)
    ways = []
    for interruptions in ((), (1, 4)):
        worker = _worker(model_path, optim={"lr": LR, "lr_warmup_steps": 2, **optim}, steps=6)
        steps = []
        for step in range(6):
            if step in interruptions:
                before = worker._worker.engine
                before.lr_scheduler.base_lrs = [9.0]  # as if a run with other settings had saved it
                for group in before.optimizer.param_groups:
                    group |= {"lr": 9.0, "initial_lr": 9.0, "weight_decay": 0.9, "betas": (0.1, 0.2)}
                worker.save_checkpoint(tmp_path / str(step), step)
                worker = _worker(model_path, optim={"lr": LR, "lr_warmup_steps": 2, **optim}, steps=6)
                worker.load_checkpoint(tmp_path / str(step))
            used = worker._worker.engine.optimizer.param_groups[0]["lr"]
            output = worker.train(samples)
            assert output["lr"] == used == pytest.approx(LR * rates[step], rel=1e-5)
            steps.append(output)
        ways.append(steps)
    assert ways[0] == ways[1]


def test_what_cannot_be_loaded_is_an_error_with_its_directory_and_no_lock_file_stays(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    worker = _worker(model_path)
    with pytest.raises(CheckpointError, match="another number of ranks"):
        worker.load_checkpoint(tmp_path)
    for name in ("model", "optim", "extra_state"):
        worker.save_checkpoint(tmp_path / "actor", 1)
        path = tmp_path / "actor" / f"{name}_world_size_1_rank_0.pt"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(CheckpointError, match=f"cannot load {tmp_path}/actor: "):
            worker.load_checkpoint(tmp_path / "actor")
    assert list((tmp_path / "temp").iterdir()) == []


def test_two_ranks_give_what_one_gives(model_path: Path, tmp_path: Path) -> None:
    """And on them every gradient of random forests is the same with shared prefixes and without."""
    out, forests = tmp_path / "two.json", os.environ.get("ATROPOS_VERL_FORESTS", "24")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [train_ranks.__file__, str(model_path), str(out), forests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, timeout=900, env=environment)
    one, two = train_ranks.results(model_path, tmp_path), json.loads(out.read_text())
    for kind in ("advantage_weighted_sft", "grpo"):
        a, b = one[kind], two[kind]
        assert (a["world_size"], b["world_size"]) == (1, 2)
        torch.testing.assert_close(b["figures"], a["figures"], rtol=1e-3, atol=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        torch.testing.assert_close(b["logprobs"], a["logprobs"], rtol=0, atol=2e-3)
        assert b["after_load"] == b["logprobs"]
        assert b["weights"] == pytest.approx(a["weights"], rel=1e-4)


def test_what_verl_prints_is_in_the_log_also_when_it_fails_or_stdout_changes(caplog: pytest.LogCaptureFixture) -> None:
    """print() borrows sys.stdout: when a log handler changed it meanwhile, the interpreter crashed."""
    caplog.set_level("INFO")
    before = sys.stdout
    with pytest.raises(ZeroDivisionError), _verl_prints_to_log():
        print("loading shard 3")  # noqa: T201
        writer = weakref.ref(sys.stdout)
        sys.stdout = before  # as pytest's live log does while it writes
        assert writer() is not None
        raise ZeroDivisionError
    assert caplog.messages == ["verl: loading shard 3"]


def _of(*tokens: int) -> TrainingSample:
    mask = np.arange(len(tokens)) > 0
    return TrainingSample(token_ids=np.array(tokens), loss_mask=mask, advantages=np.zeros(len(tokens)))


def test_shares_of_ranks_by_hand() -> None:
    samples = [_of(1, 1, 1, 4), _of(2, 2), _of(1, 1, 1, 5), _of(2, 2, 2)]
    assert split_for_ranks(samples, 2) == [[0, 2], [1, 3]]
    assert split_for_ranks(samples[:1], 3) == [[0], [], []]


def test_a_sequence_longer_than_a_micro_batch_is_refused_by_key(model_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_token_len_per_gpu: a sequence of 65 tokens .* micro-batch of 64"):
        _worker(model_path).train([_of(*range(65))])


_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 259} | dict.fromkeys(
    ("num_attention_heads", "num_key_value_heads"), 2
)
STOCHASTIC = {
    "attention": transformers.Qwen2Config(**_TINY, attention_dropout=0.3, intermediate_size=64),
    "embedding": transformers.GPTNeoXConfig(**_TINY, intermediate_size=64, hidden_dropout=0.3, attention_dropout=0.1),
    "layerdrop": transformers.OPTConfig(
        **_TINY, ffn_dim=64, word_embed_proj_dim=32, dropout=0.3, layerdrop=0.5, max_position_embeddings=128
    ),
    "router": transformers.MixtralConfig(**_TINY, intermediate_size=64, num_local_experts=2, router_jitter_noise=0.5),
}


@pytest.mark.parametrize(("kind", "checkpointing"), [*((kind, False) for kind in STOCHASTIC), ("layerdrop", True)])
def test_the_update_computes_what_the_engine_computed(
    kind: str, checkpointing: bool, model_path: Path, tmp_path: Path
) -> None:
    """Log ratio 0 at staleness 0, in the first batch and the second; with ``model.dropout`` it is not."""
    shutil.copytree(model_path, tmp_path / "model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(STOCHASTIC[kind]).save_pretrained(tmp_path / "model")
    samples = random_samples(6, vocab_size=200, seed=2)
    largest = []
    for dropout in (False, True):
        settings = {"dropout": dropout, "enable_gradient_checkpointing": checkpointing}
        worker = _worker(tmp_path / "model", model=settings)
        for _ in range(2):
            rollouts = worker.compute_logprobs(samples)
            own = [replace(s, rollout_logprobs=row) for s, row in zip(samples, rollouts, strict=True)]
            largest.append(worker.train(own)["off_policy/log_ratio_max_abs"])
    assert max(largest[:2]) < 1e-4
    assert min(largest[2:]) > 1e-3


def test_activations_are_recomputed_although_dropout_is_off(model_path: Path) -> None:
    calls, figures = [], []
    samples = random_samples(4, vocab_size=200)
    for checkpointing in (False, True):
        worker = _worker(model_path, model={"enable_gradient_checkpointing": checkpointing})
        worker.compute_logprobs(samples[:1])  # the probe is done
        attention = worker._worker.engine.module.model.layers[0].self_attn
        with attention.register_forward_hook(lambda *_: calls.append(checkpointing)):  # noqa: B023
            output = worker.train(samples)
        figures.append([output["loss"], output["grad_norm"]])
    assert calls.count(True) == 2 * calls.count(False) > 0
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)


def test_nothing_to_train_on_is_no_optimiser_step(model_path: Path) -> None:
    """Three mini-batches of one trained sequence and one that is not: one update, with its own loss, in each pass."""
    optim = {"lr": LR, "weight_decay": 0.5, "lr_warmup_steps": 4}
    [sample] = random_samples(1, vocab_size=200, seed=3)
    untrained = replace(sample, loss_mask=np.zeros_like(sample.loss_mask), rollout_id=1)
    alone, split = (
        _worker(model_path, optim=optim, loss={"type": "grpo"} | more, off_policy={"importance": None})
        for more in ({}, {"ppo_mini_batches": 3})
    )
    for number in (1, 2):
        expected, found = alone.train([sample]), split.train([sample, untrained])
        assert expected["lr"] == pytest.approx(LR * number / 4)
        for name in ("loss", "grad_norm", "lr"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5)
    for (name, one), (_, other) in zip(alone.named_tensors(), split.named_tensors(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    # Below, in verl's engine, where a batch of padding alone can come on Ray.
    before = {name: tensor.clone() for name, tensor in split.named_tensors()}
    assert split._update([untrained], None, last=False)["grad_norm"] == 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in split.named_tensors())


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "8", "RANK": "0"}, "WORLD_SIZE=8 comes without MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1"}, "RANK=1 is none of the 1 ranks that WORLD_SIZE means"),
        ({"LOCAL_RANK": "3", "WORLD_SIZE": "1"}, "LOCAL_RANK=3 is none of the 1 ranks"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number"),
        ({"RANK": "--1"}, "RANK='--1' is not a number"),
        ({"WORLD_SIZE": "0"}, "RANK=0 is none of the 0 ranks"),
    ],
)
def test_rank_variables_of_another_launcher_are_named(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in verl_plugin.RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert verl_plugin.own_rank() == (0, 1)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        verl_plugin.own_rank()
    assert str(caught.value).endswith(f"unset {' '.join(n for n in verl_plugin.RANK_VARIABLES if n in variables)}")


def test_waiting_for_other_ranks_hears_signals_and_ends_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    others, heard = threading.Event(), signal.getsignal(signal.SIGALRM)
    try:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            _meet(others.wait, 0, 8)  # as torch's, which no signal ends
        monkeypatch.setattr(worker_module, "_MEETING_SECONDS", 0.0)
        monkeypatch.setattr(worker_module, "_MEETING_LOOK_SECONDS", 0.5)
        with pytest.raises(ConfigError, match=r"rank 0 has waited 0.5 s for the other 7; .*unset .*WORLD_SIZE"):
            _meet(others.wait, 0, 8)
    finally:
        signal.signal(signal.SIGALRM, heard)
        others.set()
    _meet(others.wait, 0, 8)
    with pytest.raises(ZeroDivisionError):
        _meet(lambda: 1 // 0, 0, 8)


def test_a_gpu_that_a_variable_hides_is_missed_by_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"trainer.device: CUDA_VISIBLE_DEVICES='' leaves torch no GPU"):
        worker_module.import_verl(RunConfig.from_mapping({"trainer": {"device": "cuda"}}))
    assert worker_module.import_verl(RunConfig()) == "cpu"
    assert caplog.messages == ["trainer.device=auto is the CPU: CUDA_VISIBLE_DEVICES='' leaves torch no GPU"]


class _Alone(PolicyWorker):
    """Rank 0 of two with these weights; an exception among them is raised. ``asked``: what the other was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *items: Any) -> None:
        self.rank, self.world_size, self._closed = 0, 2, False
        self.items, self.gathered, self.asked = items, list[str](), list[str]()
        self._worker = SimpleNamespace(engine=SimpleNamespace(get_per_tensor_param=lambda: (self.gather(), None)))
        note = lambda told, **_: self.asked.append(told[0][0])  # noqa: E731
        monkeypatch.setattr(torch.distributed, "broadcast_object_list", note)

    def gather(self) -> Iterator[tuple[str, torch.Tensor]]:
        for item in self.items:
            if isinstance(item, BaseException):
                raise item
            self.gathered.append(item)
            yield item, torch.zeros(1)


@pytest.mark.parametrize("began", [True, False])
def test_tensors_that_nobody_takes_are_gathered_before_the_next_call_and_none_follows_one_that_did_not_end(
    began: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks wait inside it, and a second call would wait for them."""
    worker = _Alone(monkeypatch, *"abc")
    taken = worker.named_tensors()
    if began:
        next(taken)
    assert [name for name, _ in worker.named_tensors()] == [*"abc"]
    assert worker.gathered == [*"abcabc"]
    with pytest.raises(AttributeError):
        worker.train([])
    with pytest.raises(RuntimeError, match="save_checkpoint: an earlier call was not finished"):
        worker.save_checkpoint(Path("there"), 1)
    worker.close()
    assert worker.asked == ["named_tensors", "named_tensors", "train"]


@pytest.mark.parametrize("gives_up_first", [False, True])
def test_other_ranks_are_asked_nothing_after_a_gather_that_ctrl_c_ended(
    gives_up_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where what is left of it is gathered for nobody, before the next call."""
    worker = _Alone(monkeypatch, "a", KeyboardInterrupt())
    tensors = worker.named_tensors()
    next(tensors)
    with pytest.raises(KeyboardInterrupt):
        worker.save_checkpoint(Path("there"), 1) if gives_up_first else next(tensors)
    worker.close()
    assert worker.asked == ["named_tensors"]


SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 259}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
SMALL, LARGE = Qwen2Config(**SIZES), Qwen2Config(**SIZES | {"hidden_size": 1024, "intermediate_size": 3072})


@pytest.mark.parametrize(
    ("model", "settings", "device", "omp", "cores", "expected"),
    [
        # Both sides compute at once: they share the cores.
        (LARGE, {}, "cpu", None, 8, (None, None)),
        (LARGE, {"mode": "overlap"}, "cpu", None, 8, (4, 4)),
        (LARGE, {"mode": "overlap"}, "cpu", None, 1, (1, 1)),
        (LARGE, {"mode": "overlap"}, "cpu", None, 3, (1, 2)),
        (LARGE, {"mode": "overlap"}, "cuda", None, 8, (None, None)),
        (LARGE, {"mode": "overlap"}, "cpu", "1", 8, (None, None)),
        (LARGE, {"mode": "overlap", "inference": {"num_threads": 6}}, "cpu", None, 8, (6, 2)),
        (LARGE, {"mode": "overlap", "trainer": {"num_threads": 7}}, "cpu", None, 8, (4, 7)),
        # The engine of a small model gets one thread.
        (SMALL, {}, "cpu", None, 8, (1, None)),
        (SMALL, {"mode": "overlap"}, "cpu", None, 8, (1, 7)),
        (SMALL, {"inference": {"num_threads": 3}}, "cpu", None, 8, (3, None)),
        (SMALL, {"inference": {"max_running": 1024}}, "cpu", None, 8, (None, None)),  # enough sequences, enough work
        (SMALL, {}, "cuda", None, 8, (None, None)),
    ],
)
def test_threads_of_engine_and_trainer(
    monkeypatch: pytest.MonkeyPatch, model: Any, settings: Any, device: str, omp: str | None, cores: int, expected: Any
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    assert share_cores(RunConfig.from_mapping(settings), device, model, cores) == expected


def test_work_is_counted_from_the_matrices_of_a_real_model_also_under_other_names_of_its_sizes() -> None:
    larger = Qwen2Config(**SIZES | {"num_hidden_layers": 3, "vocab_size": 1000})
    for config in (SMALL, larger, LlamaConfig(**SIZES, head_dim=16)):
        model = AutoModelForCausalLM.from_config(config)
        linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        assert multiply_adds_per_layer(config, 8) == 8 * linear // config.num_hidden_layers
    gpt2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100)
    assert multiply_adds_per_layer(gpt2, 1) == (2 * (2 * 64 * 16 * 8 + 3 * 64 * 256) + 64 * 100) // 2
    experts = MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2)
    assert multiply_adds_per_layer(experts, 1) == multiply_adds_per_layer(SMALL, 1) + 3 * 128 * 384
    # The threshold divides one thread from the default.
    rows = -(-WORTH_SEVERAL_THREADS // multiply_adds_per_layer(SMALL, 1))
    assert [engine_threads(SMALL, *of) for of in ((rows, 8), (rows - 1, 8), (rows, None))] == [8, 1, None]


def test_nothing_is_collected_during_imports_and_nothing_of_them_later() -> None:
    before = gc.get_freeze_count()
    try:
        with paused_collection():
            with paused_collection():
                kept = [[] for _ in range(1000)]
            assert not gc.isenabled()  # the inner block is not the one that ends it
        assert gc.isenabled() and gc.get_freeze_count() >= before + len(kept)
        with pytest.raises(ImportError), paused_collection():
            raise ImportError("no such library")
        assert gc.isenabled(), "also after an import that failed"
        gc.unfreeze()
        gc.disable()  # by the user: it stays off
        with paused_collection():
            pass
        assert (gc.isenabled(), gc.get_freeze_count()) == (False, 0)
    finally:
        gc.enable()
        gc.unfreeze()


def test_the_engine_takes_the_tokenizer_of_the_settings_and_code_of_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_model_path(), model, ignore=shutil.ignore_patterns("token*", "*.jinja", "special*"))
    bases = "from transformers import Qwen2Config, Qwen2ForCausalLM\n\n\n"
    own = 'class OwnConfig(Qwen2Config):\n    model_type = "own"\n\n\n'
    code = f"{bases}{own}class OwnForCausalLM(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
    (model / "own_model.py").write_text(code)
    settings = json.loads((model / "config.json").read_text()) | {"model_type": "own"}
    settings["auto_map"] = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"}
    (model / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(trainer_module, "import_verl", lambda config: "cpu")
    monkeypatch.setattr(trainer_module, "PolicyWorker", Mock())
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    own_settings = {"path": str(model), "tokenizer_path": str(demo_model_path()), "trust_remote_code": True}
    settings = {"model": own_settings, "sync": {"canary": False}, "atropos": {"api_url": "http://127.0.0.1:9"}}
    with AtroposTrainer(RunConfig.from_mapping(settings | {"run_dir": str(tmp_path / "run")})) as trainer:
        assert trainer.engine.tokenizer is trainer.tokenizer
        assert type(trainer.engine.model).__name__ == "OwnForCausalLM"


def test_a_trainer_whose_sample_settings_fail_closes_its_parts_and_frees_the_run_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed: list[str] = []

    def build(self: Any, held: ExitStack, _: Any) -> None:
        self.engine = SimpleNamespace(vocab_size=9)
        held.callback(closed.append, "parts")

    monkeypatch.setattr(AtroposTrainer, "_build", build)
    monkeypatch.setattr(trainer_module, "sample_settings", Mock(side_effect=ValueError("no such function")))
    settings = {"run_dir": str(tmp_path), "atropos": {"api_url": "http://127.0.0.1:9"}}
    with pytest.raises(ValueError, match="no such function") as caught:
        AtroposTrainer(RunConfig.from_mapping(settings))
    with locked(tmp_path / "lock", "another run"):  # while the traceback still holds the trainer
        assert caught.tb is not None
    assert closed == ["parts"]


def test_an_interrupt_that_is_held_is_answered_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Symptom: Ctrl-C in a step of a large model had no visible effect for half a minute."""
    with held_interrupts(deliver=False):
        signal.raise_signal(signal.SIGINT)
        assert capsys.readouterr().err.startswith("stopping: the trainer ends its step and writes its checkpoint")
