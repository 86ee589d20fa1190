"""The Ray configurations: every shipped file composes and validates; what is wrong is named by its key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from atropos_verl.cluster.main import main
from atropos_verl.cluster.settings import compose_config, read_run, with_environment
from atropos_verl.errors import ConfigError

CONFIG_DIR = Path(__file__).resolve().parents[3] / "recipe" / "atropos" / "config"
SHIPPED = sorted(
    path.stem for path in CONFIG_DIR.glob("*.yaml") if "atropos_ray" in path.read_text() or path.stem == "atropos_ray"
)


def composed(*words: str, name: str = "ray_cpu_demo") -> object:
    return compose_config(["run_dir=/tmp/never", *words], CONFIG_DIR, name)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file_composes_and_verl_accepts_it(name: str) -> None:
    config = composed("actor_rollout_ref.model.path=/models/some", name=name)
    run = read_run(config)
    assert run.run.batch_size == config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    validate_config(config, need_reference_policy(config), need_critic(config))


def test_the_demo_and_the_base_file_are_among_them() -> None:
    assert {"atropos_ray", "ray_cpu_demo"} <= set(SHIPPED)


@pytest.mark.parametrize(
    ("word", "key", "text"),
    [
        ("trainer.savefreq=3", "trainer.savefreq", "did you mean trainer.save_freq"),
        ("atropos.gatway.port=3", "atropos.gatway", "unknown key"),
        ("atropos.lease_secs=3", "atropos.lease_secs", "unknown key"),
        ("steps=3", "steps", "trainer.total_training_steps"),
        ("optim.lr=1", "optim.lr", "actor_rollout_ref.actor.optim.lr"),
        ("atropos.api_url=ftp://x", "atropos", "not an http"),
        ("atropos.off_policy.max_staleness=-1", "atropos.off_policy.max_staleness", "greater than or equal to 0"),
        ("trainer.v1.trainer_mode=fast", "trainer.v1.trainer_mode", "colocate_async"),
        ("trainer.total_training_steps=null", "trainer.total_training_steps", "how many steps"),
        ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.enable", "ensure_scores_are_not_same"),
        ("trainer.test_freq=2", "data.val_files", "prompt file"),
        ("trainer.val_before_train=true", "data.val_files", "prompt file"),
        ("atropos.gateway.host=0.0.0.0", "", "set gateway.api_key"),
    ],
)
def test_what_is_wrong_is_named(word: str, key: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_run(composed(word))
    assert text in str(caught.value)
    assert caught.value.key == key or key in str(caught.value)


def test_keys_of_the_block_that_no_file_spells_out_can_be_set() -> None:
    run = read_run(composed("atropos.lease_seconds=17", "atropos.env.max_batches_offpolicy=3"))
    assert run.settings.lease_seconds == 17
    assert run.run.atropos.lease_seconds == 17
    assert run.run.env.max_batches_offpolicy == 3


def test_environment_variables_are_over_the_file_and_under_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATROPOS_API_URL", "http://from.environment:1")
    words = ["atropos.timeout=7"]
    monkeypatch.setenv("ATROPOS_TIMEOUT", "9")
    config = composed(*words)
    with_environment(config, words)
    run = read_run(config)
    assert run.settings.api_url == "http://from.environment:1"
    assert run.settings.timeout == 7
    assert run.is_attached


def test_separate_async_counts_one_api_batch_per_local_update() -> None:
    run = read_run(
        composed("trainer.v1.trainer_mode=separate_async", "trainer.v1.separate_async.parameter_sync_step=4")
    )
    assert run.run.batch_size == 8 // 4 * 8


def test_configuration_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["steps=3"], CONFIG_DIR, "ray_cpu_demo") == 2
    assert "CONFIGURATION ERROR: steps" in capsys.readouterr().err


def test_cfg_prints_everything_and_help_names_the_block(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg"], CONFIG_DIR, "ray_cpu_demo") == 0
    printed = capsys.readouterr().out
    assert "loss_mode: advantage_weighted_sft" in printed
    assert "max_staleness: 0" in printed
    assert main(["--help"], CONFIG_DIR, "ray_cpu_demo") == 0
    assert "atropos.off_policy.max_staleness" in capsys.readouterr().out


def test_composing_imports_neither_torch_nor_verl() -> None:
    code = (
        "import sys; from pathlib import Path; from atropos_verl.cluster.settings import compose_config, read_run; "
        f"read_run(compose_config(['run_dir=/x'], Path({str(CONFIG_DIR)!r}), 'ray_cpu_demo')); "
        "assert not {'torch', 'verl', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
