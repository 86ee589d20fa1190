"""Settings → plan, for both backends: refused words, shipped files, commands, keys; what is checked before a start."""

import json
import logging
import os
import shutil
import signal
import sys
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from atropos_verl.assets import demo_model_path
from atropos_verl.config.composition import SHIPPED, load_config, load_launch
from atropos_verl.config.launch_schema import EnvironmentConfig, LaunchConfig, note_of_unused_keys
from atropos_verl.config.schema import RunConfig
from atropos_verl.config.verl_keys import backend_of, compose_run, read_run
from atropos_verl.errors import ConfigError, ServiceError
from atropos_verl.http_thread import environment_token
from atropos_verl.launch.launch import build_plan, load_settings, main
from atropos_verl.launch.plan import LaunchPlan, check_trackers, prepare_run_dir, take_run_dir
from atropos_verl.launch.process import ServiceSpec
from atropos_verl.launch.train import TrainingServices, _interrupt_again, _train_locally
from atropos_verl.report.console import ProgressReporter
from atropos_verl.training.checkpoint_state import RunState, new_checkpoint

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
PLANNED = {
    "local_demo": ["trajectory_api", "demo", "trainer"],
    "multi_gpu": ["trajectory_api", "words", "trainer"],
    "one_gpu": ["trajectory_api", "words", "trainer"],
    "production": ["trainer"],
    "remote_api": ["demo", "trainer"],
    "two_environments": ["trajectory_api", "words", "short_words", "trainer"],
}
"""The shipped files of a local launch, and the processes of each."""
RAY_FILES = sorted(path.stem for path in SHIPPED.glob("*.yaml") if backend_of([], SHIPPED, path.stem) == "ray")


@pytest.fixture(autouse=True)
def _no_launch(monkeypatch: Patch) -> None:
    monkeypatch.setenv("ATROPOS_VERL_LAUNCH_OF", "")
    monkeypatch.setattr("atropos_verl.launch.environments._TMPDIR_BYTES", 1000)  # however long pytest's path is


def plan_of(*words: str, name: str = "local_demo") -> LaunchPlan:
    return build_plan(*load_launch(words, config_name=name))


def ray_plan(tmp_path: Path, *words: str, config_dir: Path = SHIPPED, name: str | None = None) -> LaunchPlan:
    return build_plan(*load_settings(["backend=ray", *words, f"run_dir={tmp_path}/a run"], config_dir, name, None))


def of_kind(plan: LaunchPlan, kind: str) -> ServiceSpec:
    (found,) = (service for service in plan.services if service.kind == kind)
    return found


def test_every_shipped_file_is_known_and_becomes_a_plan(tmp_path: Path) -> None:
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == {"atropos", "smollm2", *PLANNED, *RAY_FILES}
    attached = ["gateway.port=0", "atropos.api_url=http://api.example:8000"]
    for name, planned in PLANNED.items():
        words = [f"run_dir={tmp_path}", *(attached if name == "production" else [])]
        assert [service.name for service in plan_of(*words, name=name).services] == planned


def test_production_reads_its_addresses_from_the_environment(monkeypatch: Patch) -> None:
    given = {"API_URL": "http://a:8000", "TIMEOUT": "7.5", "API_TOKEN": "t", "GATEWAY_URL": "http://g:1"}
    for name, value in given.items():
        monkeypatch.setenv(f"ATROPOS_{name}", value)
    config, _ = load_launch([], config_name="production")
    assert (config.atropos.api_url, config.atropos.timeout, config.atropos.token) == ("http://a:8000", 7.5, "t")
    assert config.gateway.advertise_url == "http://g:1"
    assert len(config.gateway.api_key or "") >= 24, "a gateway for the network gets a key"


ELSEWHERE = "only=[environments] atropos.api_url=http://a:8000"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("environments.demo.scrpt=3", "environments.demo.scrpt: unknown key; did you mean environments.demo.script?"),
        ("environments.demo.restart=maybe", "environments.demo.restart: Input should be 'always' or 'never'"),
        ("envs=[other]", "envs: no environment named other; there are: demo"),
        ("only=[gateway]", "only.0: Input should be 'api', 'trainer' or 'environments'"),
        ("environments.trainer.copies=1", "environments.trainer: the name belongs to another process"),
        ("environments.demo.module=a.b", "script (examples/environments/spell_backward.py) and module (a.b) exclude"),
        ("only=[trainer]", "atropos.api_url: give the URL of the API that runs elsewhere"),
        (ELSEWHERE, "gateway.advertise_url: give the URL of the gateway that runs elsewhere"),
        ("gateway.advertise_url=http://b:9004/v1", "leave the /v1 out"),
        ("environments.demo.script=nowhere.py", "environments.demo.script: there is no "),
        ("api.port=1 api.host=192.0.2.1", "api.port: cannot listen on 192.0.2.1:1: "),
        ("environments.demo.python=/nowhere/python", "environments.demo.python: /nowhere/python does not exist"),
        ("trainer.logger=[wandbb]", "trainer.logger: 'wandbb' is no tracker of verl"),
        ("env.script=mine.py", "env.script: main_atropos.py reads this key; a launch has it in environments.NAME"),
        ("atropos.server=upstream api.data_dir=/d", "api.data_dir: the embedded API has it, atropos.server="),
        ("environments.demo.cwd=/nowhere", "environments.demo.cwd: /nowhere is not a directory"),
        ("environments.demo.group_size=128", "environments.demo.group_size: 128 is above batch_size 64"),
        ("atropos.server=upstream environments.demo.group_size=24", "groups of 24 do not fill a batch of 64"),
        ("trainer_process.nproc=128", "trainer_process.nproc (128) is above batch_size (64)"),
        ("backend=slurm", "backend: 'slurm' is neither local nor ray"),
        ("backend=ray steps=3", "steps: a key of the local backend; with backend=ray it is trainer.total_training_s"),
        ("backend=ray trainer_process.nproc=2", "trainer_process.nproc: Ray places the workers"),
        ("backend=ray environments.demo.weigth=2", "environments.demo.weigth: unknown key"),
        ("backend=ray trainer.total_trainig_steps=2", "trainer.total_trainig_steps: unknown key (--cfg shows all keys"),
    ],
)
def test_what_cannot_work_is_refused_by_name(words: str, message: str, tmp_path: Path, capsys: Capture) -> None:
    assert main([*words.split(), f"run_dir={tmp_path / 'run'}"], config_name="local_demo") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_keys_that_are_not_used_are_named(tmp_path: Path) -> None:
    plan = plan_of("atropos.api_url=http://a:8000", "api.port=8001", f"run_dir={tmp_path}")
    assert "api.port: not used, since atropos.api_url names an API that runs already" in plan.warnings
    config = RunConfig.from_mapping({"env": {"script": "x.py"}, "eval": {"before": False, "timeout": 9}})
    assert note_of_unused_keys(config).startswith("env.script, eval.timeout: not used")
    words = ["env.max_batches_offpolicy=2", "eval.before=false", "eval.after=false", f"run_dir={tmp_path}"]
    (text,) = of_kind(plan_of(*words), "trainer").files.values()
    of_trainer = RunConfig.from_mapping(json.loads(text))
    assert note_of_unused_keys(of_trainer) == "", "what the launcher has used is no news to its trainer"


def test_environments_of_the_command_line_replace_all_others() -> None:
    mine, words = {"mine": EnvironmentConfig(weight=2)}, ["environments={mine: {weight: 2}}"]
    for name in ("local_demo", "two_environments"):
        assert load_launch(words, config_name=name)[1].environments == mine
    assert load_settings(["backend=ray", *words], SHIPPED, None, None)[1].environments == mine
    assert load_launch(["env.env={A: 1}"], config_name="local_demo")[0].env.env == {"A": "1"}
    assert LaunchConfig.from_mapping({"environments": {}}).environments == {"demo": EnvironmentConfig()}
    assert LaunchConfig.from_mapping({"environments": {"mine": {"weight": 2}, "b": None}}).environments == mine


@pytest.mark.parametrize("key", ["3000", 'quo"te', "back\\slash", "apo'strophe"])
def test_a_plan_stays_a_plan_whatever_the_keys_are(tmp_path: Path, key: str) -> None:
    config, launch = load_launch(["steps=3000", f"run_dir={tmp_path}"], config_name="local_demo")
    plan = build_plan(config.with_values(gateway={"api_key": key}, atropos={"token": "a/token&more"}), launch)
    content = json.loads(json.dumps(plan.describe()))
    assert content["steps"] == 3000
    assert content["services"]["trainer"]["env"]["ATROPOS_GATEWAY_KEY"] == "***"
    trainer, environment = of_kind(plan, "trainer"), of_kind(plan, "environment")
    assert {key, "a/token&more", "a%2Ftoken%26more"} <= {*trainer.secrets}
    assert (trainer.env["ATROPOS_GATEWAY_KEY"], trainer.env["ATROPOS_API_TOKEN"]) == (key, "a/token&more")
    assert not {"ATROPOS_GATEWAY_KEY", "ATROPOS_API_TOKEN"} & {*environment.env}


def test_keys_are_made_and_handed_over_and_not_shown(tmp_path: Path, capsys: Capture) -> None:
    plan = plan_of(f"run_dir={tmp_path}")
    token, key = str(plan.config.atropos.token), str(plan.config.gateway.api_key)
    assert len(token) == len(key) == 48 and key != plan_of(f"run_dir={tmp_path}").config.gateway.api_key
    commands = {service.name: service for service in plan.services}
    tokens = {name: spec.env.get("ATROPOS_API_TOKEN") for name, spec in commands.items()}
    assert tokens == {"trajectory_api": token, "trainer": token, "demo": None}
    (text,) = commands["demo"].files.values()
    private = yaml.safe_load(text)
    assert [server["api_key"] for server in private["openai"]] == [key]
    url = f"http://run:{environment_token(token)}@127.0.0.1:{plan.api_url.rsplit(':', 1)[1]}"
    assert private["env"] == {"rollout_server_url": url}
    assert commands["trainer"].env["ATROPOS_GATEWAY_KEY"] == key
    shown = [plan.text(), json.dumps(plan.describe()), *(word for spec in commands.values() for word in spec.command)]
    assert not [text for text in shown if token in text or key in text]
    words = ["--dry-run", f"run_dir={tmp_path / 'run'}", "gateway.api_key=very-secret-key"]
    assert main(words, config_name="local_demo") == 0
    text = capsys.readouterr().out
    assert "very-secret-key" not in text
    for part in ("api_key: ***", "rollout_server_url: http://run:***@127.0.0.1:", "spell_backward.py serve --env.gr"):
        assert part in text
    assert not (tmp_path / "run").exists()


def test_the_key_of_environments_elsewhere_stays_in_a_private_file(tmp_path: Path) -> None:
    words = ["only=[trainer]", "atropos.api_url=http://a:8000", f"run_dir={tmp_path}"]
    plan = plan_of(*words)
    prepare_run_dir(plan)
    file, key = tmp_path / "gateway.key", plan.config.gateway.api_key
    assert file.read_text().strip() == key and file.stat().st_mode & 0o777 == 0o600
    of_train = [*words[1:], "gateway.host=0.0.0.0"]
    assert plan_of(*words).config.gateway.api_key == load_config(of_train).gateway.api_key == key
    assert read_run(compose_run([*words[1:], "atropos.gateway.host=0.0.0.0"])).run.gateway.api_key == key
    others = load_config(of_train[1:]).gateway.api_key, plan_of(words[2]).config.gateway.api_key
    file.write_text("\n")  # an empty file is no key
    assert {len(other or "") for other in (*others, plan_of(*words).config.gateway.api_key)} == {48}
    assert key not in others


@pytest.mark.parametrize("words", ["only=[api]", "api.host=0.0.0.0 api.args=[--insecure]", "atropos.server=upstream"])
def test_an_api_without_a_token_where_none_is_wanted(words: str) -> None:
    plan = plan_of(*words.split())
    assert plan.config.atropos.token is None
    module = "atroposlib.cli.run_api" if "upstream" in words else "atropos_verl.cli"
    assert plan.services[0].command[2] == module


def test_the_trainer_is_told_what_the_launch_decided(tmp_path: Path, monkeypatch: Patch) -> None:
    """Its file, composed as the trainer composes it, means the same run."""
    words = ["trainer.total_training_steps=7", "environments.demo.args=[--env.seed,3]", "supervise.stall_after=9"]
    plan = ray_plan(tmp_path, *words, "actor_rollout_ref.rollout.n=4", "trainer.v1.trainer_mode=separate_async")
    of_environment = of_kind(plan, "environment").command
    for option, value in (("--env.group_size", "4"), ("--env.max_token_length", "64"), ("--env.seed", "3")):
        assert of_environment[of_environment.index(option) + 1] == value
    trainer = of_kind(plan, "trainer")
    directory, name = tmp_path / "a run" / "launch", "trainer"
    assert trainer.command[3:] == ("train", "--config-dir", str(directory), "--config-name", name)
    ((path, text),) = trainer.files.items()
    directory.mkdir(parents=True)
    path.write_text(text)
    for variable, value in trainer.env.items():
        monkeypatch.setenv(variable, value)
    assert backend_of([], directory, name) == "ray"
    run = read_run(compose_run(trainer.restart_words, directory, name))
    assert run.run == plan.config
    assert (run.run.steps, run.run.group_size, run.run.supervise.stall_after) == (7, 4, 9)
    assert run.run_dir == plan.run_dir == tmp_path / "a run"
    assert (run.settings.api_url, run.settings.gateway) == (plan.api_url, plan.config.gateway)
    assert run.settings.eval.commands_file == str(directory / "evaluations.json")
    assert run.verl.trainer.resume_mode == "auto"
    assert run.verl.actor_rollout_ref.rollout.checkpoint_engine.backend == "ray_object_store"
    assert note_of_unused_keys(run.run) == ""


def test_a_file_may_hold_both(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [ray_cpu_demo, _self_]\n"
        "trainer: {total_training_steps: 3}\n"
        "environments: {words: {script: examples/environments/spell_backward.py, weight: 3}}\n"
    )
    for name in ("ray_cpu_demo", "atropos_ray"):
        shutil.copy(SHIPPED / f"{name}.yaml", tmp_path)
    assert [backend_of(words, tmp_path, "mine") for words in ([], ["backend=local"])] == ["ray", "local"]
    plan = ray_plan(tmp_path, config_dir=tmp_path, name="mine")
    assert plan.config.steps == 3
    assert [service.name for service in plan.services] == ["trajectory_api", "words", "trainer"]


def test_relative_paths_are_those_of_the_launcher(tmp_path: Path, monkeypatch: Patch) -> None:
    """The trainer runs in the run directory."""
    shutil.copytree(demo_model_path(), tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    plan = ray_plan(tmp_path, "actor_rollout_ref.model.path=models/mine")
    (text,) = of_kind(plan, "trainer").files.values()
    assert json.loads(text)["actor_rollout_ref"]["model"]["path"] == f"{tmp_path}/models/mine"
    local = plan_of("model.path=models/mine", "model.tokenizer_path=models/mine").config.model
    assert (local.path, local.tokenizer_path) == (f"{tmp_path}/models/mine", f"{tmp_path}/models/mine")


def test_the_trainer_of_a_launch_takes_its_directory(tmp_path: Path, monkeypatch: Patch) -> None:
    temporary = tmp_path / "launch" / "tmp"
    with ExitStack() as launch:
        take_run_dir(launch, tmp_path, is_launch=True)
        (temporary / "left").touch()
        with ExitStack() as trainer:
            take_run_dir(trainer, tmp_path)
        assert (temporary / "left").exists(), "the environments' of the launch"
        monkeypatch.setenv("ATROPOS_VERL_LAUNCH_OF", "")  # what comes next is not of that launch
        with pytest.raises(ConfigError, match=rf"run_dir: .* is in use by a launch, pid {os.getpid()} on "):
            take_run_dir(ExitStack(), tmp_path)
    assert not temporary.exists()


def test_directories_of_the_user_in_a_run_directory_stay(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("atropos_verl.launch.train.Supervisor.start_api", lambda _: None)
    precious = [tmp_path / name / "precious" for name in ("tmp", "api")]
    for path in precious:
        path.parent.mkdir()
        path.touch()
    with ExitStack() as stack:
        take_run_dir(stack, tmp_path)
        config = RunConfig.from_mapping({"run_dir": str(tmp_path), "resume": "disable"})
        TrainingServices(config, 1).start_api(ProgressReporter(1))
    assert all(path.exists() for path in precious)


LOGIN, KEY = "machine {} login user password " + "x" * 40, "there is no API key for wandb: run 'wandb login'"


@pytest.mark.parametrize(
    ("names", "variables", "netrc", "fault"),
    [
        (["console", "wandb"], {}, LOGIN.format("example.com"), KEY),
        (["wandb"], {"WANDB_BASE_URL": "https://example.com"}, LOGIN.format("example.com"), None),
        (["wandb"], {}, LOGIN.format("api.wandb.ai"), None),
        (["wandb"], {}, LOGIN.format("api.forge.coreweave.com"), None),  # where login writes
        (["wandb"], {}, "not a netrc file", KEY),
        (["swanlab"], {}, "", "swanlab is not installed: pip install swanlab"),
        (["wandb"], {"WANDB_MODE": "offline"}, "", None),
        (["wandb"], {"WANDB_API_KEY": "x" * 40}, "", None),
        (["console", "file"], {}, "", None),
        (["wandbb"], {}, "", "'wandbb' is no tracker of verl: wandb, .*; did you mean wandb"),
    ],
)
def test_a_tracker_that_cannot_start_is_named(
    tmp_path: Path, monkeypatch: Patch, names: list[str], variables: dict[str, str], netrc: str, fault: str
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_DIR"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "netrc").write_text(netrc)
    for name, value in {"NETRC": str(tmp_path / "netrc"), **variables}.items():
        monkeypatch.setenv(name, value)
    if fault is None:
        check_trackers(names)
        return
    with pytest.raises(ConfigError, match=rf"trainer.logger: {fault}"):
        check_trackers(names)
    if "wandb" in names:
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n\n")
        check_trackers(names)
        assert os.environ["WANDB_MODE"] == "offline", "what 'wandb offline' has stored holds"


@pytest.mark.parametrize(
    ("error", "saved", "is_told"),
    [(KeyboardInterrupt, 0, False), (KeyboardInterrupt, 6, True), (ServiceError, 6, True), (ConfigError, 6, False)],
)
def test_what_ends_a_run_says_how_to_go_on_from_what_is_saved(
    error: type[BaseException], saved: int, is_told: bool, tmp_path: Path, monkeypatch: Patch, caplog: Any
) -> None:
    """Wherever it happens: before the first step, after a checkpoint, in an evaluation, while processes end."""
    caplog.set_level(logging.WARNING, "atropos_verl")  # is put back at the end
    run_dir = tmp_path / "my runs"
    config = RunConfig.from_mapping({"run_dir": str(run_dir), "steps": 9})
    if saved:
        with new_checkpoint(run_dir / "checkpoints", saved, None) as directory:
            RunState(step=saved).save(directory, config)
    monkeypatch.setattr(TrainingServices, "start_api", lambda self, _: self.config)
    monkeypatch.setattr("atropos_verl.backends.local.run.run", Mock(side_effect=error("x")))
    with pytest.raises(error) as caught:
        _train_locally(config)
    logging.getLogger().handlers.pop().close()
    note = f"(the same command with 'run_dir={run_dir}' resume=auto goes on from step {saved})"
    assert getattr(caught.value, "__notes__", []) == ([note] if is_told else [])


@pytest.mark.parametrize("summarised", [None, 3, 6])
def test_a_run_interrupted_after_its_last_step_gets_its_summary(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture, caplog: Any, summarised: int | None
) -> None:
    caplog.set_level(logging.WARNING, "atropos_verl")  # is put back at the end
    config = RunConfig.from_mapping({"run_dir": str(tmp_path), "steps": 6})
    with new_checkpoint(tmp_path / "checkpoints", 6, None) as directory:
        RunState(step=6).save(directory, config)
    summary = tmp_path / "summary.json"
    if summarised is not None:
        summary.write_text(json.dumps({"steps": summarised}))
    monkeypatch.setattr(TrainingServices, "start_api", lambda self, _: self.config)
    monkeypatch.setattr(TrainingServices, "start_environment", lambda _: pytest.fail("there is nothing to train"))

    def run(_: RunConfig, *, start_environment: Any, **__: Any) -> Any:
        start_environment()
        return {"steps": 6}, {"after": 0.5}

    monkeypatch.setattr("atropos_verl.backends.local.run.run", run)
    assert _train_locally(config) == 0
    logging.getLogger().handlers.pop().close()
    assert json.loads(summary.read_text()).get("held_out_after") == (None if summarised == 6 else 0.5)
    assert ("is complete at step 6" in capsys.readouterr().out) == (summarised == 6)


def test_an_interrupt_in_a_finaliser_is_not_lost(monkeypatch: Patch) -> None:
    """Symptom: a run that was ended went on, with "Exception ignored in ... KeyboardInterrupt"."""

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "unraisablehook", _interrupt_again)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    thing, seen = Mock(), list[Any]()
    seen.append(weakref.ref(thing, interrupted))
    try:
        with pytest.raises(KeyboardInterrupt):
            del thing
            signal.pause()
    finally:
        signal.signal(signal.SIGTERM, before)
