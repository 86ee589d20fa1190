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
    AtroposAPIError,
    AtroposConnectionError,
    AtroposHTTPStatusError,
    AtroposProtocolError,
    AtroposTimeoutError,
)
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.types import StepReport
from support import http_faults
from support.http_faults import Behaviour, FaultServer, refused_url
from support.trajectory_server import UpstreamApi

STEPS = 5
GROUP_SIZE = 4
PROMPT = "<|im_start|>user\nSpell this word backward (example: sun -> nus): {word}<|im_end|>\n<|im_start|>assistant\n"
WORDS = ("stone", "river", "cloud", "bread")


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
            self.run_dir = Path(tempfile.mkdtemp(prefix="atropos-verl-e2e-"))
            stack.callback(shutil.rmtree, self.run_dir, ignore_errors=True)
            self.api = stack.enter_context(UpstreamApi(self.run_dir))
            config = {
                "atropos": {"api_url": self.api.url, "timeout": 30},
                "use_advantage_weighting": True,
                "advantage_normalization": "batch",
                "advantage_clipping": [-3.0, 3.0],
                "max_response_length": 16,
                "batch_retry_attempts": 8,
                "batch_retry_delay": 0.05,
                "batch_max_wait_time": 12.0,
                "group_size": GROUP_SIZE,
                "run_dir": str(self.run_dir),
                "optim": {"lr": 1e-3},
            }
            self.trainer = stack.enter_context(AtroposTrainer.from_config(config, reward_fn=backward_reward))
            self._train()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _train(self) -> None:
        trainer = self.trainer
        prompts = [PROMPT.format(word=word) for word in WORDS]
        probe = trainer.tokenizer.encode(prompts[0] + "enots", add_special_tokens=False)
        for _ in range(STEPS):
            figure: dict[str, Any] = {}
            trainer.open_rollouts()
            figure["engine_before"] = np.array(trainer.engine.compute_logprobs(probe))
            figure["serving"] = trainer.engine.stats()
            figure["data"] = trainer.rollout_phase(prompts)
            trainer.close_rollouts()
            figure["released"] = trainer.engine.stats()
            figure["advantages"] = trainer.compute_advantages_from_atropos(figure["data"])
            self.reports.append(trainer.train_on(figure["data"]))
            figure["engine_after"] = np.array(trainer.engine.compute_logprobs(probe))
            figure["trainer_after"] = self._trainer_logprobs(probe)
            self.figures.append(figure)

    def _trainer_logprobs(self, probe: list[int]) -> np.ndarray[Any, Any]:
        from atropos_verl.types import TrainingSample

        mask = np.arange(len(probe)) > 0
        sample = TrainingSample(token_ids=np.array(probe), loss_mask=mask, advantages=np.zeros(len(probe)))
        return self.trainer.worker.compute_logprobs([sample])[0][1:]

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
        for figure in self.figures:
            groups = figure["data"].groups
            assert len(groups) == len(WORDS)
            for group in groups:
                assert len(group) == GROUP_SIZE
                for ids, mask, logprobs in zip(group.token_ids, group.masks, group.inference_logprobs, strict=True):
                    trained = mask != -100
                    assert np.array_equal(ids[trained], mask[trained]) and not trained[0]
                    assert (logprobs[trained] <= 0).all() and (logprobs[~trained] == 1.0).all()
        return f"{STEPS * len(WORDS)} groups submitted and fetched back, token-exact"

    def check_advantages_and_normalisation(self) -> str:
        for figure in self.figures:
            report, tensor = figure["data"].report, figure["advantages"].double().numpy()
            raw = []  # GRPO by hand in float64: (score - mean) / (std with n - 1, + 1e-6)
            for group in figure["data"].groups:
                scores = group.scores
                raw += list((scores - scores.mean()) / (scores.std(ddof=1) + 1e-6) if scores.std() > 0 else scores * 0)
            weights = np.array([s.loss_mask.sum() for s in report.samples])
            values = np.repeat(raw, weights)
            expected = np.clip((np.array(raw) - values.mean()) / values.std(ddof=1), -3, 3)
            for row, sample, want in zip(tensor, report.samples, expected, strict=True):
                assert np.abs(row[: len(sample)][sample.loss_mask] - want).max() < 1e-5
                assert (row[: len(sample)][~sample.loss_mask] == 0).all()
        return "GRPO, whitened over the batch's trained tokens, clipped: as worked out in float64"

    def check_weight_sync(self) -> str:
        worst = 0.0
        for step, figure in enumerate(self.figures, start=1):
            change = float(np.abs(figure["engine_after"] - figure["engine_before"]).max())
            assert change > 1e-4, f"step {step} left the engine's outputs as they were"
            worst = max(worst, float(np.abs(figure["engine_after"] - figure["trainer_after"]).max()))
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
        megabytes = self.figures[0]["serving"].weight_bytes / 1e6
        return f"{megabytes:.1f} MB of engine weights and all KV freed while training"

    def check_error_handling_and_retry(self) -> str:
        for name, path, behaviour, expected in _FAULTS:
            with FaultServer() as server:
                server.script(path, behaviour)
                with AtroposClient(server.url, timeout=2.0) as client, pytest.raises(expected) as caught:
                    (client.check if path == "/status" else client.poll_batch)()
                assert str(caught.value).startswith("ATROPOS API ERROR: "), name
                assert f"1. Atropos server is running on {server.url}" in str(caught.value), name
                assert path == "/status" or server.count(path) == 1, "GET /batch is destructive and not repeated"
        with refused_url() as url, AtroposClient(url, timeout=2.0) as client:
            message = f"Cannot connect to Atropos API at {url} - ensure server is running"
            with pytest.raises(AtroposConnectionError, match=message):
                client.check()
        with FaultServer() as server, AtroposClient(server.url, timeout=30.0) as client:
            busy = http_faults.error(503)
            server.script("/status", busy, busy, http_faults.answer({"current_step": 7, "queue_size": 0}))
            assert client.status().current_step == 7
            assert server.count("/status") == 3
        return f"server down, {', '.join(name for name, *_ in _FAULTS)}: each named; 503 twice, then 200: retried"

    def check_performance(self) -> str:
        keys = ("timing/step", "perf/trained_tokens_per_second", "sync/seconds")
        step, rate, sync = (float(np.median([r.metrics[key] or 0.0 for r in self.reports])) for key in keys)
        assert step > 0 and rate > 0 and sync > 0
        return f"median step {step:.2f} s, {rate:.0f} trained tokens/s, weight sync {sync * 1e3:.1f} ms"


_FAULTS: list[tuple[str, str, Behaviour, type[AtroposAPIError]]] = [
    ("silent", "/status", http_faults.silent(), AtroposTimeoutError),
    ("404", "/status", http_faults.error(404), AtroposHTTPStatusError),
    ("500", "/status", http_faults.error(500), AtroposHTTPStatusError),
    ("garbage", "/status", http_faults.garbage(), AtroposProtocolError),
    ("a web page", "/status", http_faults.html_page(), AtroposProtocolError),
    ("reset mid-body", "/batch", http_faults.reset_mid_body(b'{"batch": [' + b" " * 5000, 100), AtroposConnectionError),
]
