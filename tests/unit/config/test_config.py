"""Schema, YAML and command line → the settings of both backends: values taken and refused, the key an error names."""

import functools
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from atropos_verl.backends.ray.run import validate_with_verl
from atropos_verl.config.composition import SHIPPED, fitted_to_model, load_config, load_launch
from atropos_verl.config.launch_schema import describe_launch
from atropos_verl.config.schema import RunConfig, describe
from atropos_verl.config.verl_keys import complete_config, compose_config, compose_run, notes_for_model, read_run
from atropos_verl.errors import ConfigError
from atropos_verl.launch.launch import main as launch_main
from atropos_verl.launch.train import main

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
Command = Callable[[list[str]], int]
RECIPE_DICT = {
    "atropos": {"api_url": "http://localhost:9001", "timeout": 30},
    "use_advantage_weighting": True,
    "advantage_normalization": "batch",
    "advantage_clipping": [-3.0, 3.0],
    "max_response_length": 32,
    "batch_retry_attempts": 8,
    "batch_retry_delay": 0.3,
    "batch_max_wait_time": 12.0,
}


def test_the_dictionary_of_the_recipe_is_accepted_as_it_is() -> None:
    config = RunConfig.from_mapping(RECIPE_DICT)
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3  # type: ignore[misc]
    assert config.loss_type == "advantage_weighted_sft"
    assert config.advantage_clipping == (-3.0, 3.0)
    assert config.atropos.api_url == "http://localhost:9001"
    assert config.is_attached
    assert config.max_token_len == 64 + 32
    directory = config.resolve_run_dir()
    assert directory.parent == Path.cwd() / "runs" and directory.name.startswith("demo-") and not directory.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 1}, "^stepz: unknown key"),
        ({"optim": {"lrr": 1}}, r"^optim\.lrr: unknown key"),
        ({"steps": 0, "optim": {"lr": "fast"}}, r"^steps: .*greater than 0[\s\S]*optim\.lr: .*'fast'"),
        ({"advantage_normalization": "bach"}, "^advantage_normalization: .*'bach'"),
        ({"atropos": {"api_url": "localhost:9001"}}, "^atropos: .*not an http"),
        ({"atropos": {"timeout": float("inf")}}, r"^atropos\.timeout: .*finite"),
        ({"batch_size": 10, "group_size": 4}, r"batch_size \(10\) is no multiple of group_size \(4\)"),
        ({"advantage_clipping": [3.0, -3.0]}, "advantage_clipping"),
        ({"use_advantage_weighting": True, "loss": {"type": "grpo"}}, "contradicts loss.type=grpo"),
        ({"data": {"max_token_len": 32}, "max_response_length": 32}, r"data.max_token_len \(32\)"),
        ({"loss": {"ppo_epochs": 2}}, "loss.ppo_epochs"),
        ({"gateway": {"host": "0.0.0.0"}}, "gateway.api_key"),
        ({"gateway": {"advertise_url": "host:9004"}}, "^gateway: advertise_url: .*not an http"),
        ({"gateway": {"api_key": "a\nb"}}, "^gateway: api_key: .*printable ASCII"),
        ({"atropos": {"token": "schlüssel"}}, "^atropos: token: .*printable ASCII"),
        ({"seed": 1 << 32}, "^seed: .*less than 4294967296"),
        ({"off_policy": {"max_staleness": -1}}, "greater than or equal to 0"),
    ],
)
def test_settings_that_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        RunConfig.from_mapping(values)
    assert "steps" not in values or caught.value.key == "steps"


SECRETS = ("gateway.api_key=secret-1", "atropos.token=secret-2", "atropos.headers={X-Key: secret-3}")
ENV = "env={HF_TOKEN: secret-5}"


@pytest.mark.parametrize("command", [main, launch_main])
@pytest.mark.parametrize("backend", ["local", "ray"])
def test_a_configuration_is_shown_without_secrets(command: Command, backend: str, capsys: Capture) -> None:
    own = [*SECRETS, "atropos.api_url=http://user:secret-4@a:8000/api", f"env.{ENV}"]
    words = [word if backend == "local" or word.startswith("atropos.") else f"atropos.{word}" for word in own]
    if command is launch_main:
        words += [f"environments.demo.{ENV}", f"trainer_process.{ENV}"]
    assert command(["--cfg", *words, *(["--config-name", "ray_cpu_demo"] if backend == "ray" else [])]) == 0
    text = capsys.readouterr().out
    assert "secret" not in text
    assert "X-Key" in text and "HF_TOKEN" in text and "http://a:8000/api" in text
    assert backend == "local" or ("loss_mode: advantage_weighted_sft" in text and "max_staleness: 0" in text)


SFT = "advantage_weighted_sft"


def test_importance_weights_are_on_where_rollouts_may_be_old() -> None:
    expected = [
        ({}, SFT, None),
        ({"use_advantage_weighting": False}, "grpo", "token"),
        ({"loss": {"type": "grpo"}}, "grpo", "token"),
        ({"use_advantage_weighting": True, "loss": {"type": SFT}}, SFT, None),
        ({"mode": "overlap"}, SFT, "token"),
        ({"mode": "overlap", "off_policy": {"importance": None}}, SFT, None),
        ({"off_policy": {"importance": "sequence"}}, SFT, "sequence"),
        # A batch may be used several times where the teacher is the whole loss.
        ({"loss": {"ppo_epochs": 2}, "distill": {"alone": True, "teacher": "/models/t"}}, SFT, None),
    ]
    configs = [(values, RunConfig.from_mapping(values)) for values, _, _ in expected]
    assert [(values, config.loss_type, config.importance) for values, config in configs] == expected


def test_overrides_reach_nested_keys_lists_and_open_sections() -> None:
    words = ["optim.lr=0.1", "advantage_clipping=[-2,2]", "atropos.headers.X-Key=abc", "model.override_config.eps=1e-3"]
    config = load_config([*words, "supervise.stall_after=9"], None, "atropos")
    assert (config.optim.lr, config.supervise.stall_after) == (0.1, 9.0)
    assert config.advantage_clipping == (-2.0, 2.0)
    assert config.atropos.headers == {"X-Key": "abc"}
    assert config.model.override_config == {"eps": 1e-3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("steps", "'steps' is not of the form key=value"),
        ("steps=[", "'steps=[' cannot be read"),
        ("trainer.max_token_len_per_gpu=16", "data.max_token_len (64) is above trainer.max_token_len_per_gpu (16): no"),
        ("inference.max_context_len=8", "data.max_prompt_length (48) is above inference.max_context_len (8)"),
        ("loss.type=grpo loss.ppo_mini_batches=65", "loss.ppo_mini_batches (65) is above batch_size (64)"),
        ("supervise.backoff=40", "supervise.backoff (40) is above supervise.max_backoff (30)"),
        ("run_dir=", "run_dir: String should have at least 1 character"),
        ("optim.betas=[0.9,1]", "optim.betas.1: Input should be less than 1"),
        ("--config-name one_gpuu", "--config-name: {SHIPPED} holds no one_gpuu.yaml; did you mean one_gpu? (there"),
    ],
)
def test_words_that_are_wrong_or_contradict_each_other_are_named(words: str, message: str, capsys: Capture) -> None:
    message = message.format(SHIPPED=SHIPPED)
    for command, file in ((main, "atropos"), (launch_main, "local_demo")):
        assert command(words.split(), file) == 2
        assert capsys.readouterr().err.startswith(f"CONFIGURATION ERROR: {message}")


UNSET = "environment variable NOT_SET_ANYWHERE is not set; set it"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: ${oc.env:NOT_SET_ANYWHERE}", f"seed: {UNSET}"),
        (b"actor_rollout_ref: {model: {path: '${oc.env:NOT_SET_ANYWHERE}'}}", f"actor_rollout_ref.model.path: {UNSET}"),
        (b"seed: ${nothing}", "seed: Interpolation key 'nothing' not found"),
        (b"seed: ${unknown:x}", "seed: Unsupported interpolation type unknown"),
        (b"seed: ${steps}\nsteps: ${seed}", ": Recursive interpolation"),
        (b"seed: [", "cannot be read: "),
        (b"seed: \xff", "cannot be read: "),
        (b"seed: '${'", "seed: "),
        (b"optim: {lrr: 3}", "optim.lrr: unknown key; did you mean optim.lr?"),
    ],
)
def test_a_file_that_is_wrong_names_the_key(content: bytes, message: str, tmp_path: Path, capsys: Capture) -> None:
    base, backend = b"atropos_schema", "local"
    if b"actor_rollout_ref" in content:
        base, backend = b"ray_cpu_demo", "ray"
        for name in ("atropos_ray", "ray_cpu_demo"):
            shutil.copy(SHIPPED / f"{name}.yaml", tmp_path)
    (tmp_path / "mine.yaml").write_bytes(b"defaults: [" + base + b", _self_]\n" + content)
    assert main([f"backend={backend}", "--config-dir", str(tmp_path), "--config-name", "mine", "--cfg"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("CONFIGURATION ERROR: ") and message in shown


def test_command_line_over_environment_over_file(tmp_path: Path, monkeypatch: Patch) -> None:
    text = "defaults: [atropos_schema, _self_]\natropos: {api_url: http://file:1, timeout: 9}\n"
    (tmp_path / "mine.yaml").write_text(text)

    def atropos(*words: str) -> tuple[str | None, float]:
        settings = load_config(words, tmp_path, "mine").atropos
        return settings.api_url, settings.timeout

    assert atropos() == ("http://file:1", 9)
    monkeypatch.setenv("ATROPOS_API_URL", "http://environment:1")
    assert atropos() == ("http://environment:1", 9)
    assert atropos("atropos.api_url=http://line:1") == ("http://line:1", 9)
    monkeypatch.setenv("ATROPOS_GATEWAY_KEY", "k")
    assert load_launch([], config_name="local_demo")[0].gateway.api_key == "k"
    assert load_launch(["gateway.api_key=word"], config_name="local_demo")[0].gateway.api_key == "word"
    monkeypatch.setenv("ATROPOS_TIMEOUT", "8")
    words = ["atropos.timeout=7", "atropos.lease_seconds=17", "atropos.env.max_batches_offpolicy=3"]
    run = read_run(compose_run([*words, "run_dir=/tmp/never"]))  # keys that no file spells out
    assert (run.settings.api_url, run.settings.timeout, run.run.is_attached) == ("http://environment:1", 7, True)
    assert run.settings.lease_seconds == run.run.atropos.lease_seconds == 17
    assert run.run.env.max_batches_offpolicy == 3


def test_help_explains_every_key_with_its_chosen_value(tmp_path: Path, capsys: Capture) -> None:
    def shown(command: Command, *words: str) -> str:
        assert command(["--help", *words]) == 0
        return capsys.readouterr().out

    assert [name for name, _, text in describe() if not text] == []
    (tmp_path / "mine.yaml").write_text("defaults: [atropos_schema, _self_]\noptim: {lr: 0.25}")
    text = shown(main, "--config-dir", str(tmp_path), "--config-name", "mine", "steps=7")
    assert re.search(r"\n  optim.lr .*\(0.25\)\n", text) and "of the whole run (7)\n" in text
    text = shown(launch_main, "envs=[demo]", "api.port=8123")
    assert re.search(r"\n  api.port .*\(8123\)\n", text)
    assert all(f"  {name} " in text for name, *_ in describe_launch())
    text = shown(main, "backend=ray", "atropos.poll_interval=0.5")
    assert re.search(r"\n  atropos.poll_interval .*\(0.5\)\n", text) and "atropos.off_policy.max_staleness" in text


def _model(path: Path, parameters: int, context: int) -> str:
    """A directory that claims so many parameters; its weights are a hole in the disk."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"dtype": "bfloat16", "max_position_embeddings": context}))
    with (path / "model.safetensors").open("wb") as file:
        file.truncate(2 * parameters)
    return str(path)


def test_settings_that_suit_the_demo_only_are_chosen_by_the_model(tmp_path: Path) -> None:
    for parameters, context, lr, length in (
        (900_000, 1024, 5e-4, None),
        (135_000_000, 8192, 2e-5, 1024),
        (1_500_000_000, 512, 5e-6, 256),
        (8_000_000_000, 40960, 1e-6, 1024),
    ):
        path = _model(tmp_path / str(parameters), parameters, context)
        for config in (load_config([f"model.path={path}"]), fitted_to_model({"model": {"path": path}})):
            assert (config.optim.lr, config.data.max_prompt_length) == (lr, length or 64)
            assert config.max_response_length == (length or 32)
            assert len(config.notes) == (0 if length is None else 3)
            assert all(path in note for note in config.with_values(optim={"betas": (0.8, 0.9)}).notes)
        assert length is None or config.notes[0] == f"optim.lr={lr:g}, chosen by the size of {path}; set it otherwise"
        own = load_config([f"model.path={path}", "optim.lr=5e-4", "max_response_length=32"])
        assert (own.optim.lr, own.max_response_length) == (5e-4, 32)
        assert len(own.notes) == (0 if length is None else 1)


def test_the_demo_keeps_its_settings_and_a_file_its_own() -> None:
    demo = load_config([])
    assert (demo.optim.lr, demo.data.max_prompt_length, demo.max_response_length, demo.notes) == (5e-4, 64, 32, ())
    assert load_config([], config_name="smollm2").notes == ()
    named = load_config(["model.path=smollm2-135m"])
    assert (named.optim.lr, named.data.max_prompt_length) == (2e-5, 1024)


def test_settings_of_the_ray_demo_beside_a_larger_model_are_named(tmp_path: Path) -> None:
    path = _model(tmp_path / "model", 135_000_000, 8192)
    words = [f"actor_rollout_ref.model.path={path}", "data.max_response_length=64"]
    assert notes_for_model(compose_run(words)) == [
        f"actor_rollout_ref.actor.optim.lr=0.0002 is the demo model's; for one of the size of {path} try 2e-05",
        f"data.max_prompt_length=48 is the demo model's; for one of the size of {path} try 1024",
    ]
    assert notes_for_model(compose_run([])) == []


FILES = ["atropos_ray", *sorted(path.stem for path in SHIPPED.glob("ray_*.yaml"))]
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


@functools.cache
def base(name: str) -> DictConfig:
    """Composing takes seconds."""
    return compose_config(["run_dir=/tmp/never"], SHIPPED, name)


def composed(*words: str, name: str = "ray_cpu_demo") -> Any:
    return OmegaConf.merge(base(name), OmegaConf.from_dotlist(list(words)))


@pytest.mark.parametrize("name", FILES)
def test_every_shipped_file_composes_and_verl_accepts_it(name: str, monkeypatch: Patch) -> None:
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
        ("atropos.api_url=ftp://x", "atropos", "not an http"),
        ("atropos.off_policy.max_staleness=-1", "atropos.off_policy.max_staleness", "greater than or equal to 0"),
        ("trainer.v1.trainer_mode=fast", "trainer.v1.trainer_mode", "colocate_async"),
        ("trainer.total_training_steps=null", "trainer.total_training_steps", "set the number of steps"),
        ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.enable", "ensure_scores_are_not_same"),
        ("algorithm.adv_estimator=gae", "critic.enable", "critic"),
        ("trainer.test_freq=2", "data.val_files", "prompt file"),
        ("trainer.val_before_train=true", "data.val_files", "prompt file"),
        ("atropos.gateway.host=0.0.0.0", "", "set gateway.api_key"),
        (f"{ACTOR}.ppo_max_token_len_per_gpu=16", "", f"max_token_len (64) is above {ACTOR}.ppo_max_token_len_per_gpu"),
        (f"{ROLLOUT}.max_model_len=8", "", f"data.max_prompt_length (48) is above {ROLLOUT}.max_model_len (8)"),
    ],
)
def test_what_is_wrong_for_ray_is_named(word: str, key: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_run(composed(word))
    assert text in str(caught.value)
    assert caught.value.key == key or key in str(caught.value)
    with pytest.raises(ConfigError, match="run_dir: String should have at least 1 character"):
        compose_run(["run_dir="])


def test_what_verl_refuses_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="ppo_micro_batch_size"):
        validate_with_verl(composed(f"{ACTOR}.use_dynamic_bsz=false"))


def test_separate_async_on_the_embedded_engine_needs_no_more() -> None:
    words = ["trainer.v1.trainer_mode=separate_async", "trainer.v1.separate_async.parameter_sync_step=4"]
    config = composed(*words)
    assert read_run(config).run.batch_size == 8 // 4 * 8, "one batch of the API for each local update"
    complete_config(config)
    rollout = config.actor_rollout_ref.rollout
    assert rollout.checkpoint_engine.backend == "ray_object_store"
    assert (rollout.nnodes, rollout.n_gpus_per_node) == (1, 1)
    assert config.actor_rollout_ref.actor.ppo_mini_batch_size * 4 == config.data.train_batch_size
    kept = composed(*words, f"{ROLLOUT}.checkpoint_engine.backend=nccl")
    complete_config(kept)
    assert kept.actor_rollout_ref.rollout.checkpoint_engine.backend == "nccl"


def test_verl_gets_the_directory_of_a_model_with_a_name(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("atropos_verl.config.schema.smollm2_path", lambda: tmp_path)
    config = compose_run(["run_dir=/tmp/never", "actor_rollout_ref.model.path=smollm2-135m"])
    assert config.actor_rollout_ref.model.path == str(tmp_path)


def test_help_of_a_command_names_the_files_that_it_takes(capsys: Capture) -> None:
    def named(run: Command) -> set[str]:
        assert run(["--help"]) == 0
        return set(capsys.readouterr().out.split("one of: ")[1].splitlines()[0].split(", "))

    assert named(launch_main) == {path.stem for path in SHIPPED.glob("*.yaml")}
    assert named(main) == {"atropos", "smollm2", *FILES}
    for name in named(launch_main) - named(main) - {"production"}:  # which needs an address first
        with pytest.raises(ConfigError, match=f"a key of a launch; run `atropos-verl launch --config-name {name}`"):
            load_config([], config_name=name)


RECIPE = Path(__file__).resolve().parents[3] / "recipe" / "atropos"


@pytest.mark.parametrize("kind", ["cpu", "grpo_lora_1gpu", "fsdp_vllm", "sglang", "two_nodes"])
def test_every_shell_script_runs_what_validates(kind: str, tmp_path: Path, monkeypatch: Patch) -> None:
    """The script itself, with a ``python`` that writes its words down; those are then composed."""
    recorder = tmp_path / "python"
    recorder.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {tmp_path / "words"}\n')
    recorder.chmod(0o755)
    monkeypatch.setenv("ATROPOS_GATEWAY_KEY", "k")
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(recorder), "MODEL": "/models/some"}
    environment["ATROPOS_GATEWAY_KEY"] = "k"
    command = [str(RECIPE / f"run_ray_{kind}.sh"), "trainer.save_freq=7"]
    subprocess.run(command, check=True, env=environment, timeout=30)
    program, backend, option, name, *words = (tmp_path / "words").read_text().splitlines()
    assert (program, backend, option) == ("recipe/atropos/main_atropos.py", "backend=ray", "--config-name")
    config = compose_config([*words, "run_dir=/tmp/never"], SHIPPED, name)
    complete_config(config)
    assert config.trainer.save_freq == 7, "the script passes further words on"
    assert read_run(config).run.steps >= 30
