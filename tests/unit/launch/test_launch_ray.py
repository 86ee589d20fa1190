"""A launch with ``backend=ray``: which keys are whose, and what the trainer is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from atropos_verl.assets import demo_model_path
from atropos_verl.config.composition import SHIPPED, load_launch
from atropos_verl.config.verl_keys import compose_run, read_run
from atropos_verl.errors import ConfigError
from atropos_verl.launch.launch import backend_of, build_plan, is_launch_key, load_ray_launch, main
from atropos_verl.launch.plan import LaunchPlan
from atropos_verl.launch.process import ServiceSpec

CONFIGS = SHIPPED
RAY_FILES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if backend_of([], CONFIGS, path.stem) == "ray")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ATROPOS_API_URL", "ATROPOS_TIMEOUT", "ATROPOS_API_TOKEN", "ATROPOS_GATEWAY_KEY"):
        monkeypatch.delenv(name, raising=False)


def ray_plan(tmp_path: Path, *words: str, config_dir: Path = CONFIGS, name: str | None = None) -> LaunchPlan:
    ray = load_ray_launch([*words, f"run_dir={tmp_path}/a run"], config_dir, name)
    return build_plan(ray.config, ray.launch, ray)


def of_kind(plan: LaunchPlan, kind: str) -> ServiceSpec:
    (found,) = (service for service in plan.services if service.kind == kind)
    return found


def test_the_trainer_is_told_what_the_launch_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command, composed as the trainer composes it, means the same run."""
    words = ["trainer.total_training_steps=7", "environments.demo.weight=2", "supervise.stall_after=9"]
    plan = ray_plan(tmp_path, *words, "actor_rollout_ref.rollout.n=4", "backend=ray")
    trainer = of_kind(plan, "trainer")
    command = list(trainer.command)
    assert command[1:5] == ["-m", "atropos_verl.cli", "train", "backend=ray"]
    at = command.index("--config-name") + 2
    assert command[at - 4 : at] == ["--config-dir", str(CONFIGS), "--config-name", "ray_cpu_demo"]
    assert not any(is_launch_key(word) for word in command[at:])
    for name, value in trainer.env.items():
        monkeypatch.setenv(name, value)
    run = read_run(compose_run(command[at:], CONFIGS, "ray_cpu_demo"))
    assert run.run.steps == plan.config.steps == 7
    assert (run.run.batch_size, run.run.group_size) == (32, 4)
    assert run.run_dir == plan.run_dir == tmp_path / "a run"
    assert run.settings.api_url == plan.api_url
    assert run.settings.gateway.port == plan.config.gateway.port
    assert run.settings.gateway.api_key == plan.config.gateway.api_key
    assert len(str(plan.config.gateway.api_key)) == 48
    assert run.settings.eval.commands_file == str(tmp_path / "a run" / "launch" / "evaluations.json")
    assert trainer.restart_words == ("trainer.resume_mode=auto",)
    assert plan.config.supervise.stall_after == 9


def test_environments_are_given_the_runs_sizes(tmp_path: Path) -> None:
    plan = ray_plan(tmp_path, "environments.demo.args=[--env.seed,3]")
    environment = of_kind(plan, "environment")
    words = environment.command
    for option, value in (("--env.group_size", "8"), ("--env.max_token_length", "64"), ("--env.seed", "3")):
        assert words[words.index(option) + 1] == value


def test_a_file_may_hold_both(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [ray_cpu_demo, _self_]\n"
        "trainer: {total_training_steps: 3}\n"
        "environments: {words: {script: examples/environments/spell_backward.py, weight: 3}}\n"
    )
    for name in ("ray_cpu_demo", "atropos_ray"):
        (tmp_path / f"{name}.yaml").write_bytes((CONFIGS / f"{name}.yaml").read_bytes())
    assert backend_of([], tmp_path, "mine") == "ray"
    plan = ray_plan(tmp_path, config_dir=tmp_path, name="mine")
    assert (plan.config.steps, [service.name for service in plan.services]) == (
        3,
        ["trajectory_api", "words", "trainer"],
    )


@pytest.mark.parametrize("name", RAY_FILES)
def test_every_shipped_file_becomes_a_plan(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "ray_two_nodes":
        with pytest.raises(ConfigError, match="ATROPOS_GATEWAY_KEY"):
            ray_plan(tmp_path, name=name)
        monkeypatch.setenv("ATROPOS_GATEWAY_KEY", 48 * "k")
    plan = ray_plan(tmp_path, f"actor_rollout_ref.model.path={demo_model_path()}", name=name)
    assert [service.name for service in plan.services] == ["trajectory_api", "demo", "trainer"]


def test_the_backend_is_the_words_then_the_files() -> None:
    assert backend_of([], CONFIGS, None) == "local"
    assert backend_of([], CONFIGS, "local_demo") == "local"
    assert backend_of([], CONFIGS, "ray_cpu_demo") == "ray"
    assert backend_of(["backend=local"], CONFIGS, "ray_cpu_demo") == "local"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("steps=3", "steps: a key of the local backend; with backend=ray it is trainer.total_training_steps"),
        ("trainer_process.nproc=2", "trainer_process.nproc: Ray places the workers"),
        ("environments.demo.weigth=2", "environments.demo.weigth: unknown key"),
        ("trainer.total_trainig_steps=2", "did you mean trainer.total_training_steps?"),
        ("backend=slurm", "backend: 'slurm' is neither local nor ray"),
    ],
)
def test_a_wrong_word_is_refused_by_name(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*([] if "backend" in word else ["backend=ray"]), word, "--dry-run"], CONFIGS, "local_demo") == 2
    assert message in capsys.readouterr().err


def test_a_launch_for_the_network_gets_a_key(tmp_path: Path) -> None:
    plan = ray_plan(tmp_path, "atropos.gateway.host=0.0.0.0", "api.host=0.0.0.0")
    assert plan.config.gateway.api_key
    assert plan.config.atropos.token
    assert {service.env.get("ATROPOS_API_TOKEN") for service in plan.services} == {plan.config.atropos.token}


def test_relative_paths_mean_what_they_mean_where_the_launcher_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer runs in the run directory."""
    import shutil

    shutil.copytree(demo_model_path(), tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    plan = ray_plan(tmp_path, "actor_rollout_ref.model.path=models/mine")
    assert f"actor_rollout_ref.model.path={tmp_path}/models/mine" in of_kind(plan, "trainer").command
    config, launch = load_launch(["model.path=models/mine", "model.tokenizer_path=models/mine"], CONFIGS, "local_demo")
    local = build_plan(config, launch).config.model
    assert (local.path, local.tokenizer_path) == (f"{tmp_path}/models/mine", f"{tmp_path}/models/mine")


def test_a_ray_launch_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from atropos_verl.launch.launch import main; code = main(['backend=ray', '--dry-run']); "
        "print(sorted({'torch', 'verl', 'transformers', 'ray'} & set(sys.modules)), code)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.splitlines()[-1] == "[] 0"
