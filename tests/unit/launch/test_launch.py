"""Settings of a launch → plan, for both backends: refused words, shipped files, commands, keys."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from atropos_verl.assets import demo_model_path
from atropos_verl.config.composition import SHIPPED, load_launch
from atropos_verl.config.launch_schema import EnvironmentConfig, LaunchConfig, describe_launch, note_of_unused_keys
from atropos_verl.config.schema import RunConfig
from atropos_verl.config.verl_keys import compose_run, read_run
from atropos_verl.errors import ConfigError
from atropos_verl.http_thread import environment_token
from atropos_verl.launch.launch import backend_of, build_plan, load_settings, main
from atropos_verl.launch.plan import LaunchPlan, prepare_run_dir
from atropos_verl.launch.process import ServiceSpec
from atropos_verl.launch.train import main as train_main

PLANNED = {
    "local_demo": ["trajectory_api", "demo", "trainer"],
    "multi_gpu": ["trajectory_api", "words", "trainer"],
    "one_gpu": ["trajectory_api", "words", "trainer"],
    "production": ["trainer"],
    "remote_api": ["demo", "trainer"],
    "two_environments": ["trajectory_api", "words", "short_words", "trainer"],
}
"""The shipped files of a local launch, and the processes of each."""


@pytest.fixture(autouse=True)
def _no_api_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ATROPOS_")]:
        monkeypatch.delenv(name)


def plan_of(*words: str, name: str = "local_demo") -> LaunchPlan:
    return build_plan(*load_launch(words, config_name=name))


def test_every_shipped_file_is_known() -> None:
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == {"atropos", "smollm2", *PLANNED, *RAY_FILES}


@pytest.mark.parametrize("name", PLANNED)
def test_every_shipped_file_becomes_a_plan(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "production":
        monkeypatch.setenv("ATROPOS_API_URL", "http://api.example:8000")
    words = [f"run_dir={tmp_path}", *(["gateway.port=0"] if name == "production" else [])]
    assert [service.name for service in plan_of(*words, name=name).services] == PLANNED[name]


def test_production_reads_its_addresses_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("API_URL", "http://a:8000"),
        ("TIMEOUT", "7.5"),
        ("API_TOKEN", "t"),
        ("GATEWAY_URL", "http://g:1"),
    ):
        monkeypatch.setenv(f"ATROPOS_{name}", value)
    config, _ = load_launch([], config_name="production")
    assert (config.atropos.api_url, config.atropos.timeout, config.atropos.token) == ("http://a:8000", 7.5, "t")
    assert config.gateway.advertise_url == "http://g:1"
    assert len(config.gateway.api_key or "") >= 24, "a gateway for the network gets a key"


@pytest.mark.parametrize("words", [["--dry-run"], ["backend=ray", "--dry-run"]])
def test_a_launch_imports_neither_torch_nor_verl_nor_ray(words: list[str]) -> None:
    code = (
        f"import sys; from atropos_verl.launch.launch import main; code = main({words}); "
        "print(sorted({'torch', 'verl', 'transformers', 'ray'} & set(sys.modules)), code)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.splitlines()[-1] == "[] 0"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("supervise.stal_after=3", "supervise.stal_after: unknown key; did you mean supervise.stall_after?"),
        ("optim.lrr=3", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("environments.demo.scrpt=3", "environments.demo.scrpt: unknown key; did you mean environments.demo.script?"),
        ("environments.demo.restart=maybe", "environments.demo.restart: Input should be 'always' or 'never'"),
        ("envs=[other]", "envs: no environment named other; there are: demo"),
        ("only=[gateway]", "only.0: Input should be 'api', 'trainer' or 'environments'"),
        ("environments.trainer.copies=1", "environments.trainer: the name belongs to another process"),
        ("environments.demo.module=a.b", "script (examples/environments/spell_backward.py) and module (a.b) exclude"),
    ],
)
def test_a_wrong_word_is_refused_by_name(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_launch([word], config_name="local_demo")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["only=[trainer]"], "atropos.api_url: give the URL of the API that runs elsewhere"),
        (
            ["only=[environments]", "atropos.api_url=http://a:8000"],
            "gateway.advertise_url: give the URL of the gateway that runs elsewhere",
        ),
        (["gateway.advertise_url=http://b:9004/v1"], "leave the /v1 out"),
        (["environments.demo.script=nowhere.py"], "environments.demo.script: there is no "),
        (["api.port=1", "api.host=192.0.2.1"], "api.port: cannot listen on 192.0.2.1:1: "),
        (["environments.demo.python=/nowhere/python"], "environments.demo.python: /nowhere/python does not exist"),
        (
            ["env.script=mine.py"],
            "env.script: main_atropos.py reads this key; a launch has it in environments.NAME",
        ),
        (["atropos.server=upstream", "api.data_dir=/d"], "api.data_dir: the embedded API has it, atropos.server="),
        (["environments.demo.cwd=/nowhere"], "environments.demo.cwd: /nowhere is not a directory"),
        (["environments.demo.group_size=128"], "environments.demo.group_size: 128 is above batch_size 64"),
        (
            ["environments.demo.group_size=24", "atropos.server=upstream"],
            "groups of 24 do not fill a batch of 64 exactly beside groups of 24",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, f"run_dir={tmp_path / 'run'}"], config_name="local_demo") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_dry_run_shows_commands_and_no_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dry-run", f"run_dir={tmp_path / 'run'}", "gateway.api_key=very-secret-key"]
    assert main(words, config_name="local_demo") == 0
    text = capsys.readouterr().out
    assert "very-secret-key" not in text
    assert "api_key: ***" in text
    assert "rollout_server_url: http://run:***@127.0.0.1:" in text
    assert "spell_backward.py serve --env.group_size 8 " in text
    assert not (tmp_path / "run").exists()


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


def test_help_names_every_key_and_every_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"], config_name="local_demo") == 0
    text = capsys.readouterr().out
    for name, *_ in describe_launch():
        assert f"  {name} " in text
    for name in PLANNED:
        assert name in text


def test_keys_are_made_and_handed_over(tmp_path: Path) -> None:
    plan = plan_of(f"run_dir={tmp_path}")
    token, key = str(plan.config.atropos.token), str(plan.config.gateway.api_key)
    assert len(token) == len(key) == 48 and key != plan_of(f"run_dir={tmp_path}").config.gateway.api_key
    commands = {service.name: service for service in plan.services}
    tokens = {name: spec.env.get("ATROPOS_API_TOKEN") for name, spec in commands.items()}
    assert tokens == {**dict.fromkeys(("trajectory_api", "trainer"), token), "demo": None}
    (text,) = commands["demo"].files.values()
    private = yaml.safe_load(text)
    assert [server["api_key"] for server in private["openai"]] == [key]
    url = f"http://run:{environment_token(token)}@127.0.0.1:{plan.api_url.rsplit(':', 1)[1]}"
    assert private["env"] == {"rollout_server_url": url}
    assert commands["trainer"].env["ATROPOS_GATEWAY_KEY"] == key
    shown = [plan.text(), json.dumps(plan.describe()), *(word for spec in commands.values() for word in spec.command)]
    assert not [text for text in shown if token in text or key in text]


@pytest.mark.parametrize(
    ("server", "module"), [("embedded", "atropos_verl.cli"), ("upstream", "atroposlib.cli.run_api")]
)
def test_the_api_is_chosen_by_the_key_that_main_atropos_reads(tmp_path: Path, server: str, module: str) -> None:
    assert plan_of(f"atropos.server={server}", f"run_dir={tmp_path}").services[0].command[2] == module


def test_keys_that_are_not_used_are_named(tmp_path: Path) -> None:
    plan = plan_of("atropos.api_url=http://a:8000", "api.port=8001", f"run_dir={tmp_path}")
    assert "api.port: not used, since atropos.api_url names an API that runs already" in plan.warnings
    config = RunConfig.from_mapping({"env": {"script": "x.py"}, "eval": {"before": False, "timeout": 9}})
    assert note_of_unused_keys(config).startswith("env.script, eval.timeout: not used")
    words = ["env.max_batches_offpolicy=2", "eval.before=false", "eval.after=false", f"run_dir={tmp_path}"]
    (text,) = of_kind(plan_of(*words), "trainer").files.values()
    of_trainer = RunConfig.from_mapping(json.loads(text))
    assert note_of_unused_keys(of_trainer) == "", "what the launcher has used is no news to its trainer"


def test_the_gateway_key_comes_from_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATROPOS_GATEWAY_KEY", "from-the-environment")
    assert load_launch([], config_name="local_demo")[0].gateway.api_key == "from-the-environment"
    assert load_launch(["gateway.api_key=word"], config_name="local_demo")[0].gateway.api_key == "word"


def test_the_gateway_key_of_environments_elsewhere_is_in_a_private_file_and_stays(tmp_path: Path) -> None:
    words = ["only=[trainer]", "atropos.api_url=http://a:8000", f"run_dir={tmp_path}"]
    plan = plan_of(*words)
    prepare_run_dir(plan)
    file = tmp_path / "gateway.key"
    assert file.read_text().strip() == plan.config.gateway.api_key and file.stat().st_mode & 0o777 == 0o600
    assert plan_of(*words).config.gateway.api_key == plan.config.gateway.api_key
    file.write_text("\n")
    assert len(plan_of(*words).config.gateway.api_key or "") >= 24, "an empty file is no key"
    assert plan_of(f"run_dir={tmp_path}").config.gateway.api_key != plan.config.gateway.api_key


@pytest.mark.parametrize("word", ["only=[api]", "api.host=0.0.0.0 api.args=[--insecure]", "atropos.server=upstream"])
def test_an_api_without_a_token_where_others_use_it_or_none_is_wanted(word: str) -> None:
    assert plan_of(*word.split()).config.atropos.token is None


def test_environments_of_the_command_line_replace_those_of_the_file() -> None:
    for name in ("local_demo", "two_environments"):
        launch = load_launch(["environments={mine: {weight: 2}}"], config_name=name)[1]
        assert launch.environments == {"mine": EnvironmentConfig(weight=2)}
    _, ray, _ = load_settings(["backend=ray", "environments={mine: {weight: 2}}"], SHIPPED, None, None)
    assert ray.environments == {"mine": EnvironmentConfig(weight=2)}
    assert load_launch(["env.env={A: 1}"], config_name="local_demo")[0].env.env == {"A": "1"}


def test_without_environments_there_is_the_demo() -> None:
    assert LaunchConfig.from_mapping({"environments": {}}).environments == {"demo": EnvironmentConfig()}
    values = {"environments": {"a": {"weight": 2}, "b": None}}
    assert LaunchConfig.from_mapping(values).environments == {"a": EnvironmentConfig(weight=2)}


RAY_FILES = sorted(path.stem for path in SHIPPED.glob("*.yaml") if backend_of([], SHIPPED, path.stem) == "ray")


def ray_plan(tmp_path: Path, *words: str, config_dir: Path = SHIPPED, name: str | None = None) -> LaunchPlan:
    return build_plan(*load_settings(["backend=ray", *words, f"run_dir={tmp_path}/a run"], config_dir, name, None))


def of_kind(plan: LaunchPlan, kind: str) -> ServiceSpec:
    (found,) = (service for service in plan.services if service.kind == kind)
    return found


def test_the_trainer_is_told_what_the_launch_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file, composed as the trainer composes it, means the same run."""
    words = ["trainer.total_training_steps=7", "environments.demo.args=[--env.seed,3]", "supervise.stall_after=9"]
    plan = ray_plan(tmp_path, *words, "actor_rollout_ref.rollout.n=4", "trainer.v1.trainer_mode=separate_async")
    network = ray_plan(tmp_path, "atropos.gateway.host=0.0.0.0", "api.host=0.0.0.0")
    assert network.config.gateway.api_key
    assert network.config.atropos.token
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
    assert run.run.steps == plan.config.steps == 7
    assert (run.run.batch_size, run.run.group_size) == (plan.config.batch_size, 4)
    assert run.run_dir == plan.run_dir == tmp_path / "a run"
    assert run.settings.api_url == plan.api_url
    assert run.settings.gateway.port == plan.config.gateway.port
    assert run.settings.gateway.api_key == plan.config.gateway.api_key
    assert len(str(plan.config.gateway.api_key)) == 48
    assert run.settings.eval.commands_file == str(directory / "evaluations.json")
    assert run.verl.trainer.resume_mode == "auto"
    assert run.run.supervise.stall_after == plan.config.supervise.stall_after == 9
    assert run.verl.actor_rollout_ref.rollout.checkpoint_engine.backend == "ray_object_store"
    assert note_of_unused_keys(run.run) == ""


def test_a_file_may_hold_both(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [ray_cpu_demo, _self_]\n"
        "trainer: {total_training_steps: 3}\n"
        "environments: {words: {script: examples/environments/spell_backward.py, weight: 3}}\n"
    )
    for name in ("ray_cpu_demo", "atropos_ray"):
        (tmp_path / f"{name}.yaml").write_bytes((SHIPPED / f"{name}.yaml").read_bytes())
    assert backend_of([], tmp_path, "mine") == "ray"
    plan = ray_plan(tmp_path, config_dir=tmp_path, name="mine")
    assert plan.config.steps == 3
    assert [service.name for service in plan.services] == ["trajectory_api", "words", "trainer"]


def test_the_backend_is_the_words_then_the_files() -> None:
    assert [backend_of([], SHIPPED, name) for name in (None, "local_demo", "ray_cpu_demo")] == ["local", "local", "ray"]
    assert backend_of(["backend=local"], SHIPPED, "ray_cpu_demo") == "local"


@pytest.mark.parametrize("command", [main, train_main])
def test_both_commands_take_the_backend_of_the_file(
    command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Symptom: train said that ppo_trainer could not be loaded."""
    assert command(["--config-name", "ray_cpu_demo", "--cfg"]) == 0
    assert "total_training_steps" in capsys.readouterr().out
    assert command(["backend=other"]) == 2
    assert capsys.readouterr().err == "CONFIGURATION ERROR: backend: 'other' is neither local nor ray\n"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("steps=3", "steps: a key of the local backend; with backend=ray it is trainer.total_training_steps"),
        ("trainer_process.nproc=2", "trainer_process.nproc: Ray places the workers"),
        ("environments.demo.weigth=2", "environments.demo.weigth: unknown key"),
        ("trainer.total_trainig_steps=2", "trainer.total_trainig_steps: unknown key (--cfg shows all keys"),
        ("backend=slurm", "backend: 'slurm' is neither local nor ray"),
    ],
)
def test_a_wrong_word_for_ray_is_refused_by_name(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*([] if "backend" in word else ["backend=ray"]), word, "--dry-run"], config_name="local_demo") == 2
    assert message in capsys.readouterr().err


def test_relative_paths_mean_what_they_mean_where_the_launcher_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer runs in the run directory."""
    import shutil

    shutil.copytree(demo_model_path(), tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    plan = ray_plan(tmp_path, "actor_rollout_ref.model.path=models/mine")
    (text,) = of_kind(plan, "trainer").files.values()
    assert json.loads(text)["actor_rollout_ref"]["model"]["path"] == f"{tmp_path}/models/mine"
    config, launch = load_launch(
        ["model.path=models/mine", "model.tokenizer_path=models/mine"], config_name="local_demo"
    )
    local = build_plan(config, launch).config.model
    assert (local.path, local.tokenizer_path) == (f"{tmp_path}/models/mine", f"{tmp_path}/models/mine")
