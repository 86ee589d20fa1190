"""Live runs on Ray with the demo environment: a sync that is skipped shows, two raylets, the asynchronous modes."""

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.plugged_into_verl import LAST_SYNC
from support.runs import REPOSITORY, TrainingRun, metrics_of, summary_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("ATROPOS_VERL_LIVE_RAY"), reason="minutes of live Ray runs: make test-ray"),
]

WORDS = (
    "backend=ray",
    "data.train_batch_size=4",
    "actor_rollout_ref.rollout.n=4",
    "atropos.eval.before=false",
    "atropos.eval.after=false",
    "trainer.save_freq=-1",
)


# Ray's processes import what a test plugs into verl from this directory.
PATH = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY / "tests")])}


def finished(
    run_dir: Path, *words: str, meanwhile: Callable[[TrainingRun], None] = lambda run: None, code: int = 0
) -> list[dict[str, Any]]:
    """Metrics of a run that must end so and leave nothing behind; no request of its environment may fail."""
    with TrainingRun([*WORDS, *words], run_dir=run_dir, env=PATH) as run:
        meanwhile(run)
        run.must_end(code)
    assert "failed" not in (run_dir / "logs" / "environment.log").read_text().lower()
    return metrics_of(run_dir)


@pytest.mark.parametrize(("mode", "deaths"), [("sync", 10), ("colocate_async", 3), ("separate_async", 4)])
def test_replicas_die_and_the_run_does_not(tmp_path: Path, mode: str, deaths: int) -> None:
    """At any moment of a step: the environment notices nothing, and every step's canary is exact."""

    def kill_replicas(run: TrainingRun) -> None:
        rng = random.Random(0)
        for number in range(deaths):
            run.wait_for_more(1)
            time.sleep(rng.uniform(0.0, 0.8))
            run.kill_actor("TransformersServer", number)
        run.wait_until(lambda: run.metrics()[-1]["sync/replicas_replaced"] == deaths, "the last one's successor")
        run.ctrl_c()  # after the deaths, however many steps they took

    words = [f"trainer.v1.trainer_mode={mode}", "trainer.total_training_steps=1000"]
    if mode != "sync":
        words += ["atropos.off_policy.max_staleness=null", "trainer.v1.separate_async.parameter_sync_step=2"]
    metrics = finished(tmp_path / "run", *words, meanwhile=kill_replicas, code=130)
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
    assert metrics[-1]["sync/replicas_replaced"] == deaths
    assert all(line["sync/canary_max_abs_logprob_diff"] < 1e-3 for line in metrics)
    # Where the logprobs of the rollouts are the trainer's own, the colocated modes leave verl's forward for them out.
    computed = [line for line in metrics if "training/rollout_probs_diff_mean" in line]
    assert mode == "separate_async" or all(line["off_policy/staleness_max"] for line in computed)
    assert all(line["data/unmatched_span_rate"] == 0.0 for line in metrics)


SKIPPED_SYNCS = (
    "trainer.total_training_steps=6",
    "actor_rollout_ref.actor.optim.lr=1e-3",
    "actor_rollout_ref.rollout.free_cache_engine=false",
    # With a bound of 0 the ledger leaves every group out: the engine itself says that its weights are old.
    "atropos.off_policy.max_staleness=null",
    "trainer.checkpoint_callback_class=support.plugged_into_verl.SkipSyncs",
)


def test_a_skipped_weight_sync_ends_the_run_by_its_canary(tmp_path: Path) -> None:
    with TrainingRun([*WORDS, *SKIPPED_SYNCS], run_dir=tmp_path / "run", env=PATH) as run:
        run.must_end(1)
        assert "rollout replica 0: after the weight sync the engine's logprobs differ" in run.stderr
        assert "atropos.sync.canary_threshold=0.001" in run.stderr and "Traceback" not in run.stderr
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(1, LAST_SYNC + 1))


def test_a_skipped_weight_sync_shows_in_the_probabilities_without_a_canary(tmp_path: Path) -> None:
    metrics = finished(tmp_path / "run", *SKIPPED_SYNCS, "atropos.sync.canary=false")
    diffs = {line["step"]: line["training/rollout_probs_diff_mean"] for line in metrics}
    # Step N + 1 is sampled from the weights of N, but for groups that were already under way.
    fresh = [diffs[line["step"]] for line in metrics if line["off_policy/staleness_max"] == 0]
    after = [diffs[step] for step in diffs if step > LAST_SYNC + 1]
    assert fresh
    assert max(fresh) <= 1e-3
    assert min(after) > 1e-3
    assert all(line["off_policy/staleness_max"] >= 1 for line in metrics if line["step"] > LAST_SYNC + 1)


@pytest.fixture
def two_raylets() -> Iterator[str]:
    """Address of a Ray cluster of two nodes on this machine, one logical GPU each."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 8, "num_gpus": 1, "object_store_memory": 150 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        del node["include_dashboard"]
        cluster.add_node(**node)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


def test_two_raylets(tmp_path: Path, two_raylets: str) -> None:
    """Two FSDP ranks and two replicas, one of each per node; the cluster that was there is left as it was."""
    import ray

    metrics = finished(
        tmp_path / "run",
        f"ray_kwargs.ray_init.address={two_raylets}",
        "trainer.nnodes=2",
        "trainer.n_gpus_per_node=1",
        "trainer.total_training_steps=3",
        "atropos.sync.canary=false",  # without its proof the forward for old logprobs is computed
    )
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert all(line["training/rollout_probs_diff_mean"] <= 1e-3 for line in metrics)
    ray.init(address=two_raylets, log_to_driver=False)
    try:
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
        assert ray.available_resources()["GPU"] == 2
    finally:
        ray.shutdown()


def test_colocate_async_with_kl_rollout_correction_and_verls_validation(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    prompts = [
        {
            "data_source": "words",
            "prompt": [{"role": "user", "content": f"Spell this word backward (example: sun -> nus): {word}"}],
            "ability": "spelling",
            "reward_model": {"style": "rule", "ground_truth": word[::-1]},
            "extra_info": {"index": index},
        }
        for index, word in enumerate(("cat", "dog"))
    ]
    pandas.DataFrame(prompts).to_parquet(tmp_path / "prompts.parquet")
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):\n"
        "    return float(ground_truth in solution_str)\n"
    )
    metrics = finished(
        tmp_path / "run",
        "trainer.v1.trainer_mode=colocate_async",
        "atropos.off_policy.max_staleness=null",
        "trainer.total_training_steps=4",
        "actor_rollout_ref.actor.policy_loss.loss_mode=vanilla",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "algorithm.use_kl_in_reward=true",
        "algorithm.rollout_correction.rollout_is=token",
        f"data.val_files={tmp_path / 'prompts.parquet'}",
        "trainer.test_freq=2",
        "reward.num_workers=1",
        f"reward.custom_reward_function.path={reward}",
    )
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert all("actor/kl_loss" in line and "actor/reward_kl_penalty" in line for line in metrics)
    assert all(line["rollout_corr/rollout_is_mean"] == pytest.approx(1.0, abs=0.2) for line in metrics)
    # verl's forward is left out where the rollouts' logprobs are exact: then there is no such figure.
    assert all(line.get("training/rollout_probs_diff_mean", 0.0) < 0.05 for line in metrics)
    validated = [line["step"] for line in metrics if any(key.startswith("val-core/words") for key in line)]
    assert validated == [2, 4]


def test_separate_async_with_a_users_functions(tmp_path: Path) -> None:
    """They reach the processes that use them: the task runner, and every training worker."""
    metrics = finished(
        tmp_path / "run",
        "trainer.v1.trainer_mode=separate_async",
        "trainer.v1.separate_async.parameter_sync_step=2",
        "atropos.off_policy.max_staleness=null",
        "trainer.total_training_steps=3",
        "atropos.loss.path=support.plugged_into_verl:constant_loss",
        "atropos.algorithm.advantage_path=support.plugged_into_verl:two_or_minus_two",
        "atropos.reward.path=support.plugged_into_verl:numbered",
    )
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert all(line["data/sequences"] == 16 for line in metrics), "two batches of 8, one per local update"
    assert summary_of(tmp_path / "run")["weights_synced"] == 4
    for line in metrics:
        assert (line["actor/grad_norm"], line["actor/of_the_user"]) == (0.0, 7.0)
        assert (line["reward/mean"], line["advantage/mean_abs"]) == (1.5, 2.0)
