"""PolicyWorker: verl's engine against a float64 model that this file runs by itself."""

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
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support import train_ranks
from support.samples import random_samples
from transformers import AutoModelForCausalLM

from atropos_verl import verl_plugin
from atropos_verl.backends.local import worker as worker_module
from atropos_verl.backends.local.worker import PolicyWorker, _meet, _verl_prints_to_log, split_for_ranks
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import CheckpointError, ConfigError
from atropos_verl.training.losses import advantage_weighted_sft_loss, clipped_ratio_loss, summarise_importance
from atropos_verl.types import TrainingSample

LR = 1e-2


def _worker(model_path: Path, **values: Any) -> PolicyWorker:
    merged = {"optim": {"lr": LR}, "trainer": {"device": "cpu", "max_token_len_per_gpu": 64}, **values}
    return PolicyWorker(RunConfig.from_mapping(merged), model_path)


def _reference(model_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(model_path), dtype=torch.float64)


def _logprobs(model: Any, sample: TrainingSample) -> torch.Tensor:
    """[T], entry 0 is 0; an independent float64 forward of one unpadded sequence."""
    ids = torch.as_tensor(sample.token_ids)[None]
    scores = torch.log_softmax(model(ids).logits[0, :-1] / sample.temperature, dim=-1)
    picked = scores.gather(1, ids[0, 1:, None])[:, 0]
    return torch.cat([torch.zeros(1, dtype=picked.dtype), picked])


def test_logprobs_of_trained_tokens_at_each_samples_temperature(model_path: Path) -> None:
    samples = random_samples(9, vocab_size=200)
    reference = _reference(model_path)
    found = _worker(model_path).compute_logprobs(samples)
    for sample, row in zip(samples, found, strict=True):
        expected = _logprobs(reference, sample).detach().numpy()
        assert row == pytest.approx(np.where(sample.loss_mask, expected, 0.0), abs=2e-5)


def test_loss_gradient_norm_and_update_of_one_step(model_path: Path) -> None:
    samples = random_samples(9, vocab_size=200, seed=1)
    worker = _worker(model_path)
    output = worker.train(samples)
    reference = _reference(model_path)
    losses = [-(_logprobs(reference, s) * torch.as_tensor(s.advantages * s.loss_mask)).sum() for s in samples]
    loss = torch.stack(losses).sum() / sum(int(s.loss_mask.sum()) for s in samples)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.sqrt(sum((p.grad**2).sum() for p in reference.parameters()))
    for sample, row in zip(samples, worker.logprobs, strict=True):
        own = _logprobs(reference, sample).detach().numpy()
        assert row[sample.loss_mask] == pytest.approx(own[sample.loss_mask], abs=2e-5)
    assert output["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert output["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert all(parameter.grad is None for parameter in worker._worker.engine.module.parameters())
    # The update itself, by torch's own AdamW in float64 on the same gradient (clipped to norm 1).
    optimiser = torch.optim.AdamW(reference.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.0)
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    optimiser.step()
    weights = {name: tensor.double() for name, tensor in worker.named_tensors()}
    for name, expected in reference.state_dict().items():
        # AdamW's first step is lr * sign(gradient) where the gradient is not tiny; compare the bulk.
        difference = (weights[name] - expected).abs()
        assert difference.median() < 1e-5, name


def test_grpo_with_several_updates_uses_old_logprobs(model_path: Path) -> None:
    samples = random_samples(8, vocab_size=200, seed=4)
    settings = {"loss": {"type": "grpo", "ppo_epochs": 2, "ppo_mini_batches": 2}, "off_policy": {"importance": None}}
    worker = _worker(model_path, **settings)
    output = worker.train(samples)
    # The first of the four updates is on-policy (ratio 1); later ones are not, so the mean is near but not 1.
    ratio = output["ratio_mean"]
    assert 0.5 < ratio < 2.0
    assert ratio != pytest.approx(1.0, abs=1e-9)


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

    def packed(rows: list[Any]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(rows))

    logprobs, mask = packed(current), packed([s.loss_mask for s in samples])
    advantages = packed([s.advantages for s in samples])
    ids = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(s) for s in samples]))
    weights = {"rollout_logprobs": packed(rollouts), "tis_cap": 1.1, "importance": level, "sequence_ids": ids}
    if loss == "grpo":
        expected = clipped_ratio_loss(logprobs, logprobs, advantages, mask, **weights)
    else:
        expected = advantage_weighted_sft_loss(logprobs, advantages, mask, **weights)
    output = worker.train(samples)
    assert output["loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    wanted = {k: v for k, v in summarise_importance(expected.metrics).items() if k.startswith("off_policy/")}
    assert wanted["off_policy/clipped_share"] > 0
    assert {key: output[key] for key in wanted} == pytest.approx(wanted, rel=1e-2, abs=1e-5)


def test_a_checkpoint_restores_weights_and_optimiser_and_one_of_another_world_size_is_refused(
    model_path: Path, tmp_path: Path
) -> None:
    samples = random_samples(6, vocab_size=200, seed=5)
    worker = _worker(model_path)
    worker.train(samples)
    worker.save_checkpoint(tmp_path / "actor", 1)
    straight = [worker.train(samples)["loss"] for _ in range(2)]
    other = _worker(model_path)
    other.load_checkpoint(tmp_path / "actor")
    assert [other.train(samples)["loss"] for _ in range(2)] == straight
    files = {path.name for path in (tmp_path / "actor").iterdir()}
    assert {f"{part}_world_size_1_rank_0.pt" for part in ("model", "optim", "extra_state")} <= files
    with pytest.raises(CheckpointError, match="another number of ranks"):
        other.load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "optim",
    [
        {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.5, 0.6), "lr_warmup_steps": 4},
        {"lr": 3e-3, "lr_scheduler_type": "cosine", "min_lr_ratio": 0.1},
    ],
    ids=lambda optim: ",".join(optim),
)
def test_the_optimisers_settings_are_the_resumed_runs(model_path: Path, tmp_path: Path, optim: dict[str, Any]) -> None:
    """After loading, its groups are those of a run that had these settings all along; its state is the checkpoint's."""

    def groups(worker: PolicyWorker) -> list[dict[str, Any]]:
        found = worker._worker.engine.optimizer.param_groups
        return [{name: value for name, value in group.items() if name != "params"} for group in found]

    samples = random_samples(3, vocab_size=200, seed=5)
    before = _worker(model_path)
    all_along, resumed = (_worker(model_path, optim={"lr": LR, **optim}, steps=10) for _ in range(2))
    for worker in (before, all_along):
        for _ in range(2):
            worker.train(samples)
    before.save_checkpoint(tmp_path / "actor", 2)
    resumed.load_checkpoint(tmp_path / "actor")
    assert groups(resumed) == groups(all_along) != groups(before)
    state = resumed._worker.engine.optimizer.state_dict()["state"]
    assert {int(entry["step"]) for entry in state.values()} == {2}
    assert resumed.train(samples)["lr"] == pytest.approx(all_along.train(samples)["lr"])


def test_what_cannot_be_loaded_is_an_error_with_its_directory_and_no_lock_file_stays(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    worker = _worker(model_path)
    for name in ("model", "optim", "extra_state"):
        worker.save_checkpoint(tmp_path / "actor", 1)
        path = tmp_path / "actor" / f"{name}_world_size_1_rank_0.pt"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(CheckpointError, match=f"cannot load {tmp_path}/actor: "):
            worker.load_checkpoint(tmp_path / "actor")
    assert list((tmp_path / "temp").iterdir()) == []


def test_two_ranks_give_what_one_gives(model_path: Path, tmp_path: Path) -> None:
    """Loss, logprobs, weights; and on random forests with shared prefixes and without, where every gradient is compared
    (see the scripts)."""
    tests, out, forests = Path(__file__).parents[3], tmp_path / "two.json", os.environ.get("ATROPOS_VERL_FORESTS", "24")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [str(tests / "support" / "train_ranks.py"), str(model_path), str(out), forests]
    path = f"{tests}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run([*command, *script], check=True, timeout=900, env=environment)
    one, two = train_ranks.results(model_path, tmp_path), json.loads(out.read_text())
    assert np.allclose(two["forests"], train_ranks.compare(model_path, int(forests) // 8), rtol=1e-4, atol=1e-6)
    for kind in ("advantage_weighted_sft", "grpo"):
        a, b = one[kind], two[kind]
        assert (a["world_size"], b["world_size"]) == (1, 2)
        for figures_a, figures_b in zip(a["figures"], b["figures"], strict=True):
            assert figures_b == pytest.approx(figures_a, rel=1e-3, abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        for row_a, row_b in zip(a["logprobs"], b["logprobs"], strict=True):
            assert row_b == pytest.approx(row_a, abs=2e-3)
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


def _of_length(length: int) -> TrainingSample:
    zeros = np.zeros(length)
    return TrainingSample(token_ids=zeros.astype(np.int64), loss_mask=zeros.astype(bool), advantages=zeros)


def test_shares_of_ranks_by_hand() -> None:
    rows = [[1, 1, 1, 4], [2, 2], [1, 1, 1, 5], [2, 2, 2]]
    samples = [_of_length(len(row)) for row in rows]
    for sample, row in zip(samples, rows, strict=True):
        sample.token_ids[:] = row
    assert split_for_ranks(samples, 2) == [[0, 2], [1, 3]]
    assert split_for_ranks(samples[:1], 3) == [[0], [], []]


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
    calls = []
    samples = random_samples(4, vocab_size=200)
    for checkpointing in (False, True):
        worker = _worker(model_path, model={"enable_gradient_checkpointing": checkpointing})
        worker.compute_logprobs(samples[:1])  # the probe is done
        seen: list[int] = []
        hook = worker._worker.engine.module.model.layers[0].self_attn.register_forward_hook(
            lambda *_, seen=seen: seen.append(1)
        )
        outputs = worker.train(samples)
        hook.remove()
        calls.append((len(seen), outputs["loss"], outputs["grad_norm"]))
    (once, *figures), (twice, *others) = calls
    assert twice == 2 * once and others == pytest.approx(figures, rel=1e-5)


def test_nothing_to_train_on_is_no_optimiser_step(model_path: Path) -> None:
    """Three mini-batches of one trained sequence and one that is not: one update, with its own loss, in each pass."""
    decay = {"lr": LR, "weight_decay": 0.5, "lr_warmup_steps": 4}
    loss = {"type": "grpo", "ppo_mini_batches": 3}
    [sample] = random_samples(1, vocab_size=200, seed=3)
    untrained = replace(sample, loss_mask=np.zeros_like(sample.loss_mask))
    alone = _worker(model_path, optim=decay, loss={"type": "grpo"}, off_policy={"importance": None})
    split = _worker(model_path, optim=decay, loss=loss, off_policy={"importance": None})
    for number in (1, 2):
        expected, found = alone.train([sample]), split.train([sample, untrained])
        assert [found[k] for k in ("loss", "grad_norm")] == pytest.approx(
            [expected[k] for k in ("loss", "grad_norm")], rel=1e-5
        )
        assert found["lr"] == expected["lr"] == pytest.approx(LR * number / 4)
    for (name, one), (_, other) in zip(alone.named_tensors(), split.named_tensors(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    # Below, in verl's engine, where a batch of padding alone can come on Ray.
    before = {name: tensor.clone() for name, tensor in split.named_tensors()}
    assert split._update([untrained], None, last=False)["grad_norm"] == 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in split.named_tensors())


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("constant", [0.5, 1, 1, 1, 1, 1]), ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447])],
)
def test_every_step_has_the_rate_that_it_reports_also_after_a_resume(
    schedule: str, rates: list[float], model_path: Path, tmp_path: Path
) -> None:
    """Warm-up of two of six steps, then cos² from 0 to a quarter of π at a time: no step of the six has rate 0."""
    samples = random_samples(3, vocab_size=200)
    optim = {"lr": LR, "lr_warmup_steps": 2, "lr_scheduler_type": schedule}
    worker = _worker(model_path, optim=optim, steps=6)
    used, told = [], []
    for step in range(6):
        if step in (1, 4):
            worker.save_checkpoint(tmp_path / str(step), step)
            worker = _worker(model_path, optim=optim, steps=6)
            worker.load_checkpoint(tmp_path / str(step))
        used.append(worker._worker.engine.optimizer.param_groups[0]["lr"])
        told.append(worker.train(samples)["lr"])
    assert told == used == pytest.approx([LR * rate for rate in rates], rel=1e-5)


def test_a_sequence_longer_than_a_micro_batch_is_refused_by_key(model_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_token_len_per_gpu: a sequence of 65 tokens .* micro-batch of 64"):
        _worker(model_path).train([replace(_of_length(65), loss_mask=np.ones(65, dtype=bool))])


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


def test_other_ranks_are_asked_nothing_after_a_call_that_did_not_come_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They wait inside it, and a second call would wait for them. Tensors that nobody takes are taken first."""
    worker = _Alone(monkeypatch, *"abc")
    taken = worker.named_tensors()
    next(taken)
    assert [name for name, _ in worker.named_tensors()] == worker.gathered[3:] == [*"abc"] == worker.gathered[:3]
    with pytest.raises(AttributeError):
        worker.train([])
    with pytest.raises(RuntimeError, match="save_checkpoint: an earlier call was not finished"):
        worker.save_checkpoint(Path("there"), 1)
    worker.close()
    assert worker.asked == ["named_tensors", "named_tensors", "train"]


def test_tensors_that_nobody_began_to_take_are_gathered_before_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = _Alone(monkeypatch, *"ab")
    worker.named_tensors()
    assert [name for name, _ in worker.named_tensors()] == [*"ab"]
    assert worker.gathered == [*"abab"]


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
