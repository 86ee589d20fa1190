"""The Ray configurations: every shipped file composes and validates; what is wrong is named by its key."""

import functools
import importlib.util
import subprocess
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from atropos_verl.backends.ray.run import validate_with_verl
from atropos_verl.config.composition import SHIPPED
from atropos_verl.config.verl_keys import complete_config, compose_config, compose_run, read_run
from atropos_verl.errors import ConfigError
from atropos_verl.launch.train import main

FILES = ["atropos_ray", *sorted(path.stem for path in SHIPPED.glob("ray_*.yaml"))]


@functools.cache
def base(name: str) -> DictConfig:
    """Composing takes seconds."""
    return compose_config(["run_dir=/tmp/never"], SHIPPED, name)


def composed(*words: str, name: str = "ray_cpu_demo") -> DictConfig:
    return OmegaConf.merge(base(name), OmegaConf.from_dotlist(list(words)))


@pytest.mark.parametrize("name", FILES)
def test_every_shipped_file_composes_and_verl_accepts_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATROPOS_GATEWAY_KEY", "k")
    config = composed("actor_rollout_ref.model.path=/models/some", name=name)
    run = read_run(config)
    assert run.run.batch_size == config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    if importlib.util.find_spec("vllm") is None:
        config.actor_rollout_ref.rollout.name = "transformers"  # verl asks vLLM itself for the ranks of LoRA it takes
    validate_with_verl(config)


@pytest.mark.parametrize(
    ("word", "key", "text"),
    [
        ("atropos.gatway.port=3", "atropos.gatway", "unknown key"),
        ("atropos.lease_secs=3", "atropos.lease_secs", "unknown key"),
        ("atropos.api_url=ftp://x", "atropos", "not an http"),
        ("atropos.off_policy.max_staleness=-1", "atropos.off_policy.max_staleness", "greater than or equal to 0"),
        ("trainer.v1.trainer_mode=fast", "trainer.v1.trainer_mode", "colocate_async"),
        ("trainer.total_training_steps=null", "trainer.total_training_steps", "set the number of steps"),
        ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.enable", "ensure_scores_are_not_same"),
        ("algorithm.adv_estimator=gae", "critic.enable", "critic"),
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


@pytest.mark.parametrize(
    ("word", "key", "text"),
    [
        ("trainer.savefreq=3", "trainer.savefreq", "unknown key"),
        ("optim.lr=1", "optim.lr", "actor_rollout_ref.actor.optim.lr"),
    ],
)
def test_a_word_with_another_key_is_named(word: str, key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        compose_config([word], SHIPPED, "ray_cpu_demo")
    assert caught.value.key == key


def test_the_block_may_have_keys_that_no_file_spells_out_and_variables_are_between_file_and_command_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ATROPOS_API_URL", "http://from.environment:1")
    monkeypatch.setenv("ATROPOS_TIMEOUT", "9")
    words = ["atropos.timeout=7", "atropos.lease_seconds=17", "atropos.env.max_batches_offpolicy=3"]
    run = read_run(compose_run([*words, "run_dir=/tmp/never"]))
    assert (run.settings.api_url, run.settings.timeout, run.run.is_attached) == ("http://from.environment:1", 7, True)
    assert run.settings.lease_seconds == run.run.atropos.lease_seconds == 17
    assert run.run.env.max_batches_offpolicy == 3


def test_separate_async_on_the_embedded_engine_needs_no_further_word() -> None:
    words = ["trainer.v1.trainer_mode=separate_async", "trainer.v1.separate_async.parameter_sync_step=4"]
    config = composed(*words)
    assert read_run(config).run.batch_size == 8 // 4 * 8, "one batch of the API for each local update"
    complete_config(config)
    rollout = config.actor_rollout_ref.rollout
    assert rollout.checkpoint_engine.backend == "ray_object_store"
    assert (rollout.nnodes, rollout.n_gpus_per_node) == (1, 1)
    assert config.actor_rollout_ref.actor.ppo_mini_batch_size * 4 == config.data.train_batch_size
    kept = composed(*words, "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl")
    complete_config(kept)
    assert kept.actor_rollout_ref.rollout.checkpoint_engine.backend == "nccl"


@pytest.mark.parametrize(
    ("word", "code", "texts"),
    [
        ("steps=3", 2, ["CONFIGURATION ERROR: steps"]),
        ("--cfg", 0, ["loss_mode: advantage_weighted_sft", "max_staleness: 0"]),
        ("--help", 0, ["atropos.off_policy.max_staleness"]),
    ],
)
def test_the_command(word: str, code: int, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backend=ray", word]) == code
    out, err = capsys.readouterr()
    assert all(text in (err if code else out) for text in texts)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16",
            r"max_token_len \(64\) is above actor_rollout_ref.actor.ppo_max_token_len_per_gpu \(16\)",
        ),
        (
            "actor_rollout_ref.rollout.max_model_len=8",
            r"data.max_prompt_length \(48\) is above actor_rollout_ref.rollout.max_model_len \(8\)",
        ),
    ],
)
def test_bounds_that_contradict_each_other_are_named_with_their_values(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_run(composed(word))


def test_verl_gets_the_directory_of_a_model_that_has_a_name_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atropos_verl.config.schema.smollm2_path", lambda: tmp_path)
    config = compose_run(["run_dir=/tmp/never", "actor_rollout_ref.model.path=smollm2-135m"])
    assert config.actor_rollout_ref.model.path == str(tmp_path)


RECIPE = Path(__file__).resolve().parents[3] / "recipe" / "atropos"
SCRIPTS = [RECIPE / f"run_ray_{kind}.sh" for kind in ("cpu", "grpo_lora_1gpu", "fsdp_vllm", "sglang", "two_nodes")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem.removeprefix("run_ray_"))
def test_every_shell_script_runs_a_configuration_that_validates(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script itself, with a ``python`` that writes its words down; those are then composed."""
    recorder = tmp_path / "python"
    recorder.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {tmp_path / "words"}\n')
    recorder.chmod(0o755)
    monkeypatch.setenv("ATROPOS_GATEWAY_KEY", "k")
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(recorder), "MODEL": "/models/some"}
    environment["ATROPOS_GATEWAY_KEY"] = "k"
    subprocess.run([str(script), "trainer.save_freq=7"], check=True, env=environment, timeout=30)
    program, backend, option, name, *words = (tmp_path / "words").read_text().splitlines()
    assert (program, backend, option) == ("recipe/atropos/main_atropos.py", "backend=ray", "--config-name")
    config = compose_config([*words, "run_dir=/tmp/never"], SHIPPED, name)
    complete_config(config)
    run = read_run(config)
    assert config.trainer.save_freq == 7, "the script passes further words on"
    assert run.run.steps >= 30


def test_what_verl_refuses_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="ppo_micro_batch_size"):
        validate_with_verl(composed("actor_rollout_ref.actor.use_dynamic_bsz=false"))
