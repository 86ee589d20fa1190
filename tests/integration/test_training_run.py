"""Whole runs in processes of their own: attached to an API that the user runs, and under torchrun."""

import contextlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.malformed import malformed_cases
from support.runs import REPOSITORY, SMALL, TrainingRun, checkpointed_step, metrics_of, summary_of
from support.trajectory_server import UpstreamApi

from atropos_verl.protocol.client import AtroposClient

pytestmark = pytest.mark.slow

BATCH_SIZE, GROUP_SIZE = 64, 4
GROUPS = BATCH_SIZE // GROUP_SIZE
MALFORMED = 6 * GROUPS
STEPS = 2 + -(-MALFORMED // GROUPS) + 4
"""Two before the malformed groups, as many as they fill, and a few after."""
DEMO_MODEL = REPOSITORY / "src" / "atropos_verl" / "assets" / "demo_model"


@contextlib.contextmanager
def process(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the user's, killed by its pid at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        running = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=log.parent)
    try:
        yield running
    finally:
        running.kill()
        running.wait(timeout=20.0)


def environment_command(api_url: str, gateway: str, key: str) -> list[str]:
    """As docs/bring-your-own-environment.md has it."""
    script = REPOSITORY / "examples" / "environments" / "spell_backward.py"
    options = {
        "--slurm": "false",
        "--env.group_size": str(GROUP_SIZE),
        "--env.rollout_server_url": api_url,
        "--env.tokenizer_name": str(DEMO_MODEL),
        "--env.total_steps": "100000",
        "--env.max_batches_offpolicy": "1",
        "--openai.base_url": f"{gateway}/v1",
        "--openai.server_type": "vllm",
        "--openai.api_key": key,
        "--openai.model_name": str(DEMO_MODEL),
        "--openai.tokenizer_name": str(DEMO_MODEL),
    }
    return [sys.executable, str(script), "serve", *(word for option in options.items() for word in option)]


class Attached:
    """One attached run, to which malformed groups are posted."""

    def __init__(self, directory: Path) -> None:
        self.run_dir = directory / "run"
        vocab_size = json.loads((DEMO_MODEL / "config.json").read_text())["vocab_size"]
        self.cases = malformed_cases(11, MALFORMED, group_size=GROUP_SIZE, vocab_size=vocab_size, same_size=True)
        with contextlib.ExitStack() as stack:
            api = stack.enter_context(UpstreamApi(directory))
            words = [f"atropos.api_url={api.url}", f"steps={STEPS}", *SMALL]
            words += [f"batch_size={BATCH_SIZE}", f"group_size={GROUP_SIZE}"]
            run = stack.enter_context(TrainingRun(words, run_dir=self.run_dir))
            run.wait_for_output("environments are to use the gateway at http://127.0.0.1:")
            gateway = run.stdout.split("environments are to use the gateway at ")[1].split("/v1")[0]
            key_file = self.run_dir / "gateway.key"
            assert f"the gateway's key, in {key_file}" in run.stdout and key_file.stat().st_mode & 0o777 == 0o600
            key = key_file.read_text().strip()
            self.without_key = httpx.get(f"{gateway}/v1/models", timeout=10.0, trust_env=False).status_code
            command = environment_command(api.url, gateway, key)
            env = stack.enter_context(process(command, directory / "environment.log"))
            run.wait_for_step(2)
            with AtroposClient(api.url, timeout=60.0) as poster:
                poster.post_scored_data_list([case.encode() for case in self.cases])
            run.must_end(0)
            self.others_alive = env.poll() is None and api.process.poll() is None
            self.stdout, self.stderr = run.stdout, run.stderr
        self.metrics = metrics_of(self.run_dir)


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory) -> Attached:
    return Attached(tmp_path_factory.mktemp("attached"))


def test_attached_to_the_users_api_it_trains_and_ends_only_itself(attached: Attached) -> None:
    assert attached.stderr == ""
    assert [line["step"] for line in attached.metrics] == list(range(1, STEPS + 1))
    assert "starting the" not in attached.stdout
    assert sorted(path.name for path in (attached.run_dir / "logs").iterdir()) == ["trainer.log"]
    assert attached.others_alive, "API and environment are the user's"
    assert attached.without_key == 401


def test_malformed_groups_are_quarantined_each_with_its_reason(attached: Attached) -> None:
    lines = attached.metrics
    assert sum(line["data/quarantined"] for line in lines) == MALFORMED
    # No batch lost a group on the way: what was not refused was used.
    assert sum(line["data/groups"] for line in lines) == STEPS * GROUPS - MALFORMED
    assert summary_of(attached.run_dir)["groups_quarantined"] == MALFORMED
    files = [json.loads(path.read_text()) for path in (attached.run_dir / "quarantine").iterdir()]
    refused = Counter(json.dumps(file["group"]["tokens"]) for file in files)
    assert refused == Counter(json.dumps(case.group["tokens"]) for case in attached.cases)
    assert all(len(file["reason"]) > 10 for file in files)


def test_malformed_groups_leave_training_unharmed(attached: Attached) -> None:
    lines = attached.metrics
    assert all(math.isfinite(line["loss"]) for line in lines)
    trained = [line for line in lines if line["data/trained_tokens"]]
    assert {line["step"] for line in trained} >= {1, 2, STEPS - 1, STEPS}
    assert lines[-1]["policy_version"] == len(trained), "a batch without a good group makes no optimiser step"
    assert all(line["sync/canary_max_abs_logprob_diff"] < 1e-3 for line in lines)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torchrun") / "run"


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def test_two_ranks_are_stopped_by_ctrl_c(two_ranks: Path) -> None:
    with TrainingRun(["steps=1000", *SMALL], run_dir=two_ranks, launcher=TORCHRUN) as run:
        run.wait_for_step(2)
        run.ctrl_c()
        run.must_end(1)  # torchrun's
        assert "\ninterrupted\n" in run.stderr
        step = metrics_of(two_ranks)[-1]["step"]
        assert f"(steps up to {step} are saved in {two_ranks}/checkpoints/global_step_{step}" in run.stderr
        assert "[rank1]" not in run.stderr, "the other rank ends in order, and says nothing"
    assert checkpointed_step(two_ranks) == step


def test_two_ranks_train_to_the_end(two_ranks: Path) -> None:
    """Overlapped, from the checkpoint of a run that was not: rank 0 prefetches, the other one notices nothing."""
    before = checkpointed_step(two_ranks)
    words = [f"steps={before + 3}", "mode=overlap", *SMALL]
    with TrainingRun(words, run_dir=two_ranks, launcher=TORCHRUN) as run:
        run.must_end(0)
        assert run.stderr == ""
    lines = metrics_of(two_ranks)
    assert [line["policy_version"] for line in lines] == list(range(1, before + 4))
    assert all(math.isfinite(line["loss"]) and line["data/sequences"] == 16 for line in lines)
    actor = two_ranks / "checkpoints" / f"global_step_{before + 3}" / "actor"
    assert {path.name for path in actor.glob("model_world_size_*")} == {
        "model_world_size_2_rank_0.pt",
        "model_world_size_2_rank_1.pt",
    }
