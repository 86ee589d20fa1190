"""The checks of ``recipe/atropos/test_full_e2e_training.py``: five real steps against real servers.

One ``EndToEnd`` starts the real atroposlib API and an ``AtroposTrainer`` on the shipped model, takes five steps on
rollouts that the trainer samples itself, and keeps what it saw; each ``check_*`` method asserts one thing about it and
returns a line for the table.
"""

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from atropos_verl.errors import (
    AtroposConnectionError,
    AtroposHTTPStatusError,
    AtroposProtocolError,
    AtroposTimeoutError,
)
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.types import StepReport, TrainingSample
from support import http_faults
from support.http_faults import FaultServer, refused_url
from support.trajectory_server import UpstreamApi

STEPS = 5
GROUP_SIZE = 4
PROMPT = "<|im_start|>user\nSpell this word backward (example: sun -> nus): {word}<|im_end|>\n<|im_start|>assistant\n"
WORDS = ("stone", "river", "cloud", "bread")
FAULTS = {
    "silent": (http_faults.silent(), AtroposTimeoutError),
    "500": (http_faults.error(500), AtroposHTTPStatusError),
    "garbage": (http_faults.garbage(), AtroposProtocolError),
    "a web page": (http_faults.html_page(), AtroposProtocolError),
}


def backward_reward(prompts: list[str], completions: list[str]) -> list[float]:
    """The share of letters that stand where they should, plus a length penalty, so that scores of a group differ."""
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        wanted = prompt.split("-> nus): ")[1].split("<|im_end|>")[0][::-1]
        right = sum(a == b for a, b in zip(wanted, completion.strip(), strict=False))
        scores.append(right / len(wanted) - 0.01 * len(completion))
    return scores


class EndToEnd:
    """The system under test, and what it did."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.figures: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        from atropos_verl import AtroposTrainer

        with ExitStack() as stack:
            run_dir = tempfile.mkdtemp(prefix="atropos-verl-e2e-")
            stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
            api = stack.enter_context(UpstreamApi(Path(run_dir)))
            config = {
                "atropos": {"api_url": api.url},
                "use_advantage_weighting": True,
                "advantage_normalization": "batch",
                "advantage_clipping": [-3.0, 3.0],
                "max_response_length": 16,
                "batch_retry_delay": 0.05,
                "group_size": GROUP_SIZE,
                "run_dir": run_dir,
                "optim": {"lr": 1e-3},
            }
            self.trainer = stack.enter_context(AtroposTrainer.from_config(config, reward_fn=backward_reward))
            for _ in range(STEPS):
                self.figures.append(self._step([PROMPT.format(word=word) for word in WORDS]))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _step(self, prompts: list[str]) -> dict[str, Any]:
        trainer, figure = self.trainer, dict[str, Any]()
        probe = trainer.tokenizer.encode(prompts[0] + "enots", add_special_tokens=False)
        trainer.open_rollouts()
        figure["engine_before"] = np.array(trainer.engine.compute_logprobs(probe))
        figure["serving"] = trainer.engine.stats()
        figure["data"] = trainer.rollout_phase(prompts)
        trainer.close_rollouts()
        figure["released"] = trainer.engine.stats()
        figure["advantages"] = trainer.compute_advantages_from_atropos(figure["data"])
        self.reports.append(trainer.train_on(figure["data"]))
        figure["engine_after"] = np.array(trainer.engine.compute_logprobs(probe))
        columns = {"loss_mask": np.arange(len(probe)) > 0, "advantages": np.zeros(len(probe))}
        sample = TrainingSample(token_ids=np.array(probe), **columns)
        figure["trainer_after"] = trainer.worker.compute_logprobs([sample])[0][1:]
        return figure

    # ------------------------------------------------------------------ checks

    def check_connectivity_and_registration(self) -> str:
        client = self.trainer.client
        client.check()
        info, status = client.info(), client.status()
        assert info.batch_size == GROUP_SIZE * len(WORDS)
        assert info.max_token_len == self.trainer.config.max_token_len + 1, "Atropos's bound is exclusive"
        assert status.current_step == STEPS
        return f"registered with batch size {info.batch_size}, API at step {status.current_step}"

    def check_data_submission_and_retrieval(self) -> str:
        groups = [group for figure in self.figures for group in figure["data"].groups]
        assert [len(group) for group in groups] == [GROUP_SIZE] * len(WORDS) * STEPS
        for group in groups:
            for ids, mask, logprobs in zip(group.token_ids, group.masks, group.inference_logprobs, strict=True):
                trained = mask != -100
                assert np.array_equal(ids[trained], mask[trained]) and not trained[0]
                assert (logprobs[trained] <= 0).all() and (logprobs[~trained] == 1.0).all()
        return f"{len(groups)} groups submitted and fetched back, token-exact"

    def check_advantages_and_normalisation(self) -> str:
        for figure in self.figures:
            report, tensor = figure["data"].report, figure["advantages"].double().numpy()
            raw = []  # GRPO by hand in float64: (score - mean) / (std with n - 1, + 1e-6)
            for group in figure["data"].groups:
                scores = group.scores
                raw += list((scores - scores.mean()) / (scores.std(ddof=1) + 1e-6) if scores.std() > 0 else scores * 0)
            values = np.repeat(raw, [s.loss_mask.sum() for s in report.samples])
            expected = np.clip((np.array(raw) - values.mean()) / values.std(ddof=1), -3, 3)
            for row, sample, want in zip(tensor, report.samples, expected, strict=True):
                assert np.abs(row[: len(sample)] - want * sample.loss_mask).max() < 1e-5
        return "GRPO, whitened over the batch's trained tokens, clipped: as worked out in float64"

    def check_weight_sync(self) -> str:
        before, after, trained = (
            [figure[name] for figure in self.figures] for name in ("engine_before", "engine_after", "trainer_after")
        )
        assert min(np.abs(a - b).max() for a, b in zip(after, before, strict=True)) > 1e-4, "a step changed no output"
        worst = max(np.abs(a - b).max() for a, b in zip(after, trained, strict=True))
        assert worst < 1e-4
        assert self.trainer.engine.policy_version == STEPS
        return f"outputs changed in every step and match the trainer's within {worst:.1e}"

    def check_complete_loop(self) -> str:
        assert [(r.step, r.policy_version) for r in self.reports] == [(n, n) for n in range(1, STEPS + 1)]
        assert all(np.isfinite(report.loss) for report in self.reports)
        rewards = [report.metrics["reward/mean"] for report in self.reports]
        assert self.trainer.totals.groups_used == STEPS * len(WORDS)
        return f"{STEPS} steps, reward {rewards[0]:.3f} → {rewards[-1]:.3f}"

    def check_memory_released_in_training(self) -> str:
        for figure in self.figures:
            assert figure["released"].kv_bytes == figure["released"].weight_bytes == 0
            assert figure["serving"].weight_bytes > 1_000_000
        return f"{figure['serving'].weight_bytes / 1e6:.1f} MB of engine weights and all KV freed while training"

    def check_error_handling_and_retry(self) -> str:
        with refused_url() as url, AtroposClient(url, timeout=2.0) as client:
            message = f"Cannot connect to Atropos API at {url} - ensure server is running"
            with pytest.raises(AtroposConnectionError, match=message):
                client.check()
        with FaultServer() as server, AtroposClient(server.url, timeout=2.0) as client:
            for name, (behaviour, expected) in FAULTS.items():
                server.script("/status", behaviour)
                with pytest.raises(expected) as caught:
                    client.check()
                assert str(caught.value).startswith("ATROPOS API ERROR: "), name
                assert f"1. Atropos server is running on {server.url}" in str(caught.value), name
            server.script("/batch", http_faults.reset_mid_body(b'{"batch": [' + b" " * 5000, 100))
            with pytest.raises(AtroposConnectionError):
                client.poll_batch()
            assert server.count("/batch") == 1, "GET /batch is destructive and not repeated"
            busy = http_faults.error(503)
            server.script("/status", busy, busy, http_faults.answer({"current_step": 7, "queue_size": 0}))
            with AtroposClient(server.url, timeout=30.0) as patient:
                assert patient.status().current_step == 7
        return f"server down, {', '.join(FAULTS)}, reset mid-body: each named; 503 twice, then 200: retried"

    def check_performance(self) -> str:
        keys = ("timing/step", "perf/trained_tokens_per_second", "sync/seconds")
        step, rate, sync = (float(np.median([r.metrics[key] or 0.0 for r in self.reports])) for key in keys)
        assert step > 0 and rate > 0 and sync > 0
        return f"median step {step:.2f} s, {rate:.0f} trained tokens/s, weight sync {sync * 1e3:.1f} ms"
