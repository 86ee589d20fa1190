"""Whole runs in processes of their own: attached, with a teacher, evaluated while they train, under torchrun."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from support.malformed import malformed_groups
from support.runs import REPOSITORY, SMALL, TrainingRun, checkpointed_step, metrics_of, summary_of
from support.trajectory_server import UpstreamApi
from transformers import AutoModelForCausalLM, AutoTokenizer

from atropos_verl.assets import demo_model_path
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.provenance.ledger import IDS, Ledger

pytestmark = pytest.mark.slow

BATCH_SIZE, GROUP_SIZE = 64, 4
GROUPS = BATCH_SIZE // GROUP_SIZE
MALFORMED = 6 * GROUPS
STEPS = 2 + -(-MALFORMED // GROUPS) + 4
"""Two before the malformed groups, as many as they fill, and a few after."""


def environment_command(api_url: str, gateway: str, key: str) -> list[str]:
    """As docs/bring-your-own-environment.md has it."""
    script = REPOSITORY / "examples" / "environments" / "spell_backward.py"
    options = {
        "--slurm": "false",
        "--env.group_size": str(GROUP_SIZE),
        "--env.rollout_server_url": api_url,
        "--env.tokenizer_name": str(demo_model_path()),
        "--env.total_steps": "100000",
        "--env.max_batches_offpolicy": "1",
        "--openai.base_url": f"{gateway}/v1",
        "--openai.server_type": "vllm",
        "--openai.api_key": key,
        "--openai.model_name": str(demo_model_path()),
        "--openai.tokenizer_name": str(demo_model_path()),
    }
    return [sys.executable, str(script), "serve", *(word for option in options.items() for word in option)]


def test_attached_to_the_users_api_it_trains_ends_only_itself_and_quarantines_malformed_groups(tmp_path: Path) -> None:
    run_dir, malformed = tmp_path / "run", malformed_groups(11, MALFORMED, same_size=True)
    sizes = [f"steps={STEPS}", *SMALL, f"batch_size={BATCH_SIZE}", f"group_size={GROUP_SIZE}"]
    with (
        UpstreamApi(tmp_path) as api,
        TrainingRun([f"atropos.api_url={api.url}", *sizes], run_dir=run_dir) as run,
        (tmp_path / "environment.log").open("wb") as log,
    ):
        run.wait_for_output("environments are to use the gateway at http://127.0.0.1:")
        gateway = run.stdout.split("environments are to use the gateway at ")[1].split("/v1")[0]
        key_file = run_dir / "gateway.key"
        assert f"the gateway's key, in {key_file}" in run.stdout and key_file.stat().st_mode & 0o777 == 0o600
        assert httpx.get(f"{gateway}/v1/models", timeout=10.0, trust_env=False).status_code == 401, "it needs the key"
        command = environment_command(api.url, gateway, key_file.read_text().strip())
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        env = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=tmp_path)
        try:
            run.wait_for_step(2)
            with AtroposClient(api.url, timeout=60.0) as poster:
                poster.post_scored_data_list([json.dumps(group).encode() for group in malformed])
            run.must_end(0)
            assert env.poll() is None and api.process.poll() is None, "API and environment are the user's"
        finally:
            env.kill()
            env.wait(timeout=20.0)
        assert run.stderr == ""
        assert "starting the" not in run.stdout
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == ["trainer.log"]

    assert summary_of(run_dir)["groups_quarantined"] == MALFORMED
    files = [json.loads(path.read_text()) for path in (run_dir / "quarantine").iterdir()]
    refused = Counter(json.dumps(file["group"]["tokens"]) for file in files)
    assert refused == Counter(json.dumps(group["tokens"]) for group in malformed)
    assert all(len(file["reason"]) > 10 for file in files)

    lines = metrics_of(run_dir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert sum(line["data/quarantined"] for line in lines) == MALFORMED
    # No batch lost a group on the way: what was not refused was used.
    assert sum(line["data/groups"] for line in lines) == STEPS * GROUPS - MALFORMED
    assert all(math.isfinite(line["loss"]) for line in lines)
    trained = [line for line in lines if line["data/trained_tokens"]]
    assert {line["step"] for line in trained} >= {1, 2, STEPS - 1, STEPS}
    assert lines[-1]["policy_version"] == len(trained), "a batch without a good group makes no optimiser step"
    assert all(line["sync/canary_max_abs_logprob_diff"] < 1e-3 for line in lines)


def test_two_ranks_are_stopped_by_ctrl_c_and_then_train_to_the_end(tmp_path: Path) -> None:
    """Overlapped, from the checkpoint of a run that was not: rank 0 prefetches, the other one notices nothing."""
    run_dir, launcher = tmp_path / "run", ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    with TrainingRun(["steps=1000", *SMALL], run_dir=run_dir, launcher=launcher) as run:
        run.wait_for_step(2)
        run.ctrl_c()
        run.must_end(1)  # torchrun's
        step = run.trained()
        assert "\ninterrupted\n" in run.stderr
        assert f"(steps up to {step} are saved in {run_dir}/checkpoints/global_step_{step}" in run.stderr
        assert "[rank1]" not in run.stderr, "the other rank ends in order, and says nothing"
    assert checkpointed_step(run_dir) == step
    last = step + 3
    with TrainingRun([f"steps={last}", "mode=overlap", *SMALL], run_dir=run_dir, launcher=launcher) as run:
        run.must_end(0)
        assert run.stderr == ""
    lines = metrics_of(run_dir)
    assert [line["policy_version"] for line in lines] == list(range(1, last + 1))
    assert all(math.isfinite(line["loss"]) and line["data/sequences"] == 16 for line in lines)
    actor = run_dir / "checkpoints" / f"global_step_{last}" / "actor"
    ranks = sorted(path.name for path in actor.glob("model_world_size_*"))
    assert ranks == ["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"]


WORDS, SAMPLES = 24, 2
PINNED, LAST = 4, 8
EVALUATED = (*SMALL, f'env.args=["--env.eval_words","{WORDS}","--env.eval_samples","{SAMPLES}"]', "eval.keep_best=true")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an overlapped run with a teacher of its own, evaluated while it trains."""
    directory = tmp_path_factory.mktemp("distilled")
    model = AutoModelForCausalLM.from_pretrained(demo_model_path())
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += (parameter.std() * torch.randn(parameter.shape, generator=generator)).nan_to_num()
    model.save_pretrained(directory / "teacher")
    AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(directory / "teacher")
    words = [*EVALUATED, "mode=overlap", f"steps={LAST}", f"eval.every={PINNED}", "eval.after=true"]
    words += [f"distill.teacher={directory / 'teacher'}", "distill.alone=true", "loss.ppo_epochs=2"]
    words += ["save_freq=1", "trainer.max_ckpt_to_keep=1"]
    with TrainingRun(words, run_dir=directory / "run") as run:
        run.must_end(0)
    return directory / "run"


def test_a_student_comes_near_the_teacher_of_its_run(distilled: Path) -> None:
    lines = metrics_of(distilled)
    assert [line["distill/known"] for line in lines] == [1.0] * LAST
    assert lines[0]["distill/kl"] > max(0.1, 2 * lines[-1]["distill/kl"])


def test_every_evaluated_token_is_of_one_version_while_training_goes_on(distilled: Path) -> None:
    """The ledger says which weights wrote what."""
    samples = (distilled / "eval" / f"step_{PINNED}" / "samples.jsonl").read_text().splitlines()
    questions = {json.loads(line)["question"] for line in samples}
    assert len(questions) == WORDS
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    ledger = Ledger()
    ledger.persist(distilled / "ledger", LAST)
    versions: Counter[int] = Counter()
    pinned, trained = [], []
    for record in ledger.newest(len(ledger)):
        prompt = tokenizer.decode(np.frombuffer(record.prompt.ids, dtype=IDS).tolist())
        if any(question in prompt for question in questions):
            [(version, _)] = record.runs
            versions[version] += 1
            pinned += [record.order] * (version == PINNED)
        else:
            trained.append((record.order, max(version for version, _ in record.runs)))
    ledger.close()
    assert versions == {PINNED: WORDS * SAMPLES, LAST: WORDS * SAMPLES}
    assert any(order < max(pinned) for order, version in trained if version > PINNED), "newer weights wrote meanwhile"
    summary = summary_of(distilled)
    [score] = summary["held_out_steps"].values()
    lines = [line for line in metrics_of(distilled) if "held_out/step" in line]
    told = [(line["held_out/step"], line["held_out/score"]) for line in lines]
    assert told in ([], [(PINNED, score)])  # none: it ended after the last step
    best = LAST if summary["held_out_after"] >= score else PINNED
    assert (distilled / "checkpoints" / f"global_step_{best}").is_dir()
    assert (distilled / "checkpoints" / "best").resolve().name == f"global_step_{best}"


@pytest.mark.skipif(not os.environ.get("ATROPOS_VERL_EVALUATION_RESUME"), reason="two more runs: half a minute")
def test_a_run_that_is_interrupted_in_an_evaluation_makes_it_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [*EVALUATED, "steps=6", "eval.every=2", "save_freq=100"]
    with TrainingRun(words, run_dir=run_dir) as run:
        run.wait_for_output("evaluating on held-out tasks at step 4")
        run.ctrl_c()
        run.must_end(130)
    with TrainingRun(words, run_dir=run_dir) as run:
        run.must_end(0)
        assert "at step 4, policy version 4" in run.stdout
        assert "held-out mean reward at step 2" not in run.stdout
        assert "held-out mean reward at step 4" in run.stdout
    scores = summary_of(run_dir)["held_out_steps"]
    lines = [line for line in metrics_of(run_dir) if "held_out/step" in line]
    told = [(line["step"], line["held_out/step"], line["held_out/score"]) for line in lines]
    assert list(scores) == ["2", "4"] and told == [(3, 2, scores["2"]), (5, 4, scores["4"])]
    best = 4 if scores["4"] >= scores["2"] else 2
    assert (run_dir / "checkpoints" / "best").resolve().name == f"global_step_{best}"
