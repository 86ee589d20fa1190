"""Environments → commands: arguments, shares of the batch, keys by a private file, the bare server configuration."""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from atropos_verl.agents.runner import add_arguments
from atropos_verl.assets import demo_model_path
from atropos_verl.config.launch_schema import EnvironmentConfig, LaunchConfig
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.launch.environments import (
    allocate,
    environment_spec,
    interpreter,
    last_words,
    plan_environments,
    readable_tokenizer,
    write_tokenizer,
)
from atropos_verl.launch.plan import make_plan, one_environment
from atropos_verl.launch.process import ServiceSpec

MODEL = demo_model_path()


def plan(environments: dict[str, Any], *, own_api: bool = True, **settings: Any) -> tuple[list[ServiceSpec], list[str]]:
    """The services and the warnings."""
    base = {
        "run_dir": "/run",
        "batch_size": 64,
        "group_size": 8,
        "gateway": {"api_key": "k", "advertise_url": "http://g:9004"},
        "atropos": {"server": "embedded", "api_url": "http://a:8000"},
    }
    config = RunConfig.from_mapping({**base, **settings})
    return plan_environments(config, LaunchConfig.from_mapping({"environments": environments}), own_api=own_api)


def options(command: tuple[str, ...]) -> dict[str, str]:
    """``--key value`` pairs after ``serve``; a key that stands twice fails."""
    words = command[command.index("serve") + 1 :]
    pairs = list(zip(words[::2], words[1::2], strict=True))
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


def shares(environments: dict[str, Any], *, embedded: bool = True, **settings: Any) -> dict[str, float | None]:
    config = RunConfig.from_mapping({"batch_size": 64, "group_size": 8, **settings})
    return allocate(config, LaunchConfig.from_mapping({"environments": environments}), embedded=embedded)[0]


def test_the_command_is_adapted_to_the_run() -> None:
    (planned,) = plan({"demo": {}}, max_response_length=16, data={"max_prompt_length": 48}, steps=10)[0]
    assert options(planned.command) == {
        "--env.group_size": "8",
        "--env.max_token_length": "64",
        "--env.tokenizer_name": str(MODEL),
        "--env.use_wandb": "false",
        "--env.wandb_name": "demo",
        "--env.total_steps": "1100",
        "--env.max_batches_offpolicy": "1",
        "--env.inference_weight": "1",
        "--slurm": "false",
        "--config": "/run/launch/demo.yaml",
    }
    server = {
        "base_url": "http://g:9004/v1",
        "model_name": str(MODEL),
        "tokenizer_name": str(MODEL),
        "server_type": "vllm",
        "api_key": "k",
    }
    assert {str(path): yaml.safe_load(text) for path, text in planned.files.items()} == {
        "/run/launch/demo.yaml": {"openai": [server], "env": {"rollout_server_url": "http://a:8000"}}
    }


def test_the_one_environment_of_training_keeps_its_file_names_and_registers_by_its_script(tmp_path: Path) -> None:
    """``main_atropos.py``: the demo is given the run's seed."""
    config = RunConfig.from_mapping({"run_dir": str(tmp_path), "seed": 7, "atropos": {"api_url": "http://a:8000"}})
    made = make_plan(config, one_environment(config), own_api=True, probe_url=None, trains_here=True)
    _, environment = made.services
    assert [spec.log_path.name for spec in made.services] == ["trajectory_api.log", "environment.log"]
    assert environment.registers_as == options(environment.command)["--env.wandb_name"] == "spell_backward"
    assert options(environment.command)["--env.seed"] == "7"
    assert (environment.startup_timeout, environment.restarts) == (180.0, 5)
    assert made.evaluations["before"][0].result == tmp_path / "eval" / "before" / "metrics.json"
    upstream = RunConfig.from_mapping({"atropos": {"server": "upstream"}})
    assert one_environment(upstream).api.on_death == "stop", "its trainer, in this process, cannot start anew"


def test_arguments_of_the_user_win_and_omitted_ones_go() -> None:
    settings = {"args": ["--env.max_token_length=99", "--env.group_size", 4], "omit": ["--openai.tokenizer_name"]}
    (planned,) = plan({"demo": settings})[0]
    words = planned.command
    assert words[-3:] == ("--env.max_token_length=99", "--env.group_size", "4")
    assert words.count("--env.group_size") == 1
    assert "--env.max_token_length" not in words
    (text,) = planned.files.values()
    assert "tokenizer_name" not in text


def test_copies_have_their_own_names_and_divide_the_weight() -> None:
    services = plan({"demo": {"copies": 2, "weight": 3, "env": {"SEED": 1}}})[0]
    assert [item.name for item in services] == ["demo", "demo-2"]
    assert [options(item.command)["--env.inference_weight"] for item in services] == ["1.5", "1.5"]
    assert [options(item.command)["--env.wandb_name"] for item in services] == ["demo", "demo-2"]
    assert [item.log_path for item in services] == [Path("/run/logs/demo.1.log"), Path("/run/logs/demo-2.1.log")]
    assert services[0].env["SEED"] == "1"


@pytest.mark.parametrize(
    ("environments", "message"),
    [
        ({"demo": {"copies": 2}, "demo-2": {}}, "two processes would be called demo-2"),
        ({"a": {"min_batch_allocation": 0.6}, "b": {"min_batch_allocation": 0.6}}, r"adds up to 1\.2, above 1"),
    ],
)
def test_environments_that_do_not_fit_together_are_refused(environments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(environments)


@pytest.mark.parametrize(
    ("environments", "batch_size", "expected"),
    [
        ({"a": {"weight": 3}, "b": {"weight": 1}}, 64, {"a": 48, "b": 16}),
        ({"a": {"weight": 2}, "b": {"weight": 1}}, 24, {"a": 16, "b": 8}),
        # Whole groups: 2/3 and 1/3 of 64 are five and two groups of 8; the rest is filled by age.
        ({"a": {"weight": 2}, "b": {"weight": 1}}, 64, {"a": 40, "b": 16}),
        ({"a": {"weight": 3, "group_size": 16}, "b": {"weight": 1, "group_size": 4}}, 64, {"a": 48, "b": 16}),
        # Explicit shares stand, and the others divide the rest; copies divide the share.
        ({"a": {"weight": 3}, "b": {"weight": 1}, "c": {"min_batch_allocation": 0.5}}, 64, {"a": 24, "b": 8, "c": 32}),
        ({"a": {"weight": 3, "copies": 2}, "b": {"weight": 1}}, 64, {"a": 24, "b": 16}),
        ({"a": {"weight": 9}, "b": {"weight": 1}}, 64, {"a": 56, "b": 0}),
        # Equal weights need no shares, nor does one environment.
        ({"a": {}, "b": {}}, 64, {"a": 0, "b": 0}),
        ({"a": {"weight": 3}}, 64, {"a": 0}),
    ],
)
def test_weights_become_shares_of_every_batch(
    environments: dict[str, Any], batch_size: int, expected: dict[str, int]
) -> None:
    """A trajectory API makes ``int(batch_size * share)`` of a share."""
    found = shares(environments, batch_size=batch_size)
    assert {name: int(batch_size * (share or 0.0)) for name, share in found.items()} == expected


@pytest.mark.parametrize(
    ("weight", "own_api", "has_share", "warning"),
    [
        (9, True, [True, False], "environments.b: its share of a batch of 64 is less than one group of 8"),
        (3, False, [False, False], "shares of the trained sequences will not follow them"),
    ],
)
def test_weights_that_make_no_share_are_warned_of(
    weight: int, own_api: bool, has_share: list[bool], warning: str
) -> None:
    services, warnings = plan({"a": {"weight": weight}, "b": {"weight": 1}}, own_api=own_api)
    assert ["--env.min_batch_allocation" in item.command for item in services] == has_share
    assert warning in warnings[0]


def test_group_sizes_that_upstream_would_stall_on() -> None:
    mixed = {"a": {"group_size": 4}, "b": {"group_size": 6}}
    with pytest.raises(ConfigError, match="an upstream API would never deliver a batch"):
        plan(mixed, batch_size=24, own_api=False)
    assert "some batches will be smaller" in plan(mixed, batch_size=24)[1][0]


def test_a_virtual_environment_is_an_interpreter(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to("/usr/bin/env")
    assert interpreter(str(tmp_path), "key") == str(tmp_path / "bin" / "python"), "the link itself, not its target"
    assert interpreter("python3.11", "key") == "python3.11"


SERVER = {"base_url": "http://g:9004/v1", "api_key": "k3y"}


def private(
    tmp_path: Path,
    *args: str,
    url: str | None = "http://run:t@a:8000",
    omit: tuple[str, ...] = (),
    servers: int | None = 1,
) -> tuple[list[str], Any]:
    """The last words of the command, and the content of the private file (its path is ``FILE``)."""
    file = Path("FILE")
    words, files = last_words(
        EnvironmentConfig(args=args, omit=omit), SERVER, url, servers=servers, file=file, cwd=tmp_path, section="e"
    )
    return list(words), yaml.safe_load(files[file]) if files else None


ENV = {"rollout_server_url": "http://run:t@a:8000"}


@pytest.mark.parametrize(
    ("args", "changes", "words", "content"),
    [
        ([], {}, ["--config", "FILE"], {"openai": [SERVER], "env": ENV}),
        # Atropos takes several as they stand, whatever config_init returns: no list, several, or what is not known.
        ([], {"servers": 0, "url": None}, ["--config", "FILE"], {"openai": [SERVER, SERVER]}),
        ([], {"servers": 3, "url": None}, ["--config", "FILE"], {"openai": [SERVER, SERVER, SERVER]}),
        ([], {"servers": None, "url": None}, ["--config", "FILE"], {"openai": [SERVER, SERVER]}),
        # What the user gives wins, and what he omits goes.
        (
            ["--openai.api_key=mine", "--env.rollout_server_url", "u"],
            {},
            ["--config", "FILE", "--openai.api_key=mine", "--env.rollout_server_url", "u"],
            {"openai": [{"base_url": SERVER["base_url"]}]},
        ),
        (
            [],
            {"omit": ("--openai.api_key",)},
            ["--config", "FILE"],
            {"openai": [{"base_url": SERVER["base_url"]}], "env": ENV},
        ),
        # Beside several servers Atropos takes no --openai.
        (
            ["--openai.timeout", "60", "--x", "1", "--openai.api_key=mine"],
            {"servers": 0, "url": None},
            ["--config", "FILE", "--x", "1"],
            {"openai": 2 * [{"base_url": SERVER["base_url"], "timeout": "60", "api_key": "mine"}]},
        ),
        # An Atropos without --config gets arguments.
        (
            [],
            {"url": None, "omit": ("--config",)},
            ["--openai.base_url", "http://g:9004/v1", "--openai.api_key", "k3y"],
            None,
        ),
    ],
)
def test_the_gateway_is_handed_over_in_a_private_file(
    tmp_path: Path, args: list[str], changes: dict[str, Any], words: list[str], content: Any
) -> None:
    assert private(tmp_path, *args, **changes) == (words, content)


@pytest.mark.parametrize("form", [["--config", "mine.yaml"], ["--config=mine.yaml"]])
def test_the_users_file_is_taken_in(tmp_path: Path, form: list[str]) -> None:
    settings = {"env": {"lr": 1e-5, "name": "x"}, "openai": [{"timeout": 3, "api_key": "old"}], "slurm": True}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    words, content = private(tmp_path, *form, "--env.x", "1")
    assert words == ["--config", "FILE", "--env.x", "1"]
    assert content == {**settings, "openai": [{"timeout": 3, **SERVER}], "env": {**settings["env"], **ENV}}


def test_several_servers_of_the_users_own_keep_their_addresses_and_get_no_key(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("openai: [{base_url: a, api_key: x}, {timeout: 7}]")
    _, content = private(tmp_path, "--config", "mine.yaml", url=None)
    assert content == {"openai": [{"base_url": "a", "api_key": "x"}, {**SERVER, "timeout": 7}]}


@pytest.mark.parametrize(("text", "message"), [(None, "No such file"), ("a: [", "cannot read"), ("7", "not a mapping")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        private(tmp_path, "--config", "mine.yaml")
    assert str(caught.value).startswith("e.args")
    with pytest.raises(ConfigError, match="config_init returns no list of one server, so its --config is needed"):
        private(tmp_path, omit=("--config",), servers=0)


def test_what_will_not_work_is_said_before_it_starts(tmp_path: Path) -> None:
    path = tmp_path / "env.py"
    path.write_text("from atroposlib.utils import tokenize_for_trainer\nfrom .x import y\nclass MyEnv(BaseEnv): pass")
    settings = {"script": str(path), "args": ["--openai.base_url", "http://elsewhere/v1"]}
    no_cli, relative, newer, elsewhere = plan({"mine": settings})[1]
    assert relative.startswith(f"environments.mine: {path} imports from its own package: start it as a module")
    assert (
        no_cli
        == f"environments.mine: {path} calls no .cli(): Atropos environments end with MyEnv.cli(), or start nothing"
    )
    assert newer.startswith("environments.mine: its tokenize_for_trainer needs transformers 4")
    assert len(plan({"mine": {**settings, "python": sys.executable}})[1]) == 3, "its own interpreter may have that"
    assert elsewhere.startswith("environments.mine: its arguments send it to http://elsewhere/v1, not to the gateway")


def test_children_ask_no_proxy_and_import_from_where_the_launch_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "intranet, 127.0.0.1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "lib:/opt/lib")
    (planned,) = plan({"demo": {}})[0]
    assert planned.env["no_proxy"] == planned.env["NO_PROXY"] == "intranet,127.0.0.1,localhost,::1,g,a"
    assert planned.env["PYTHONPATH"] == f"{tmp_path}/lib:/opt/lib"


def of_training(**env: Any) -> ServiceSpec:
    config = RunConfig.from_mapping({"env": env, "atropos": {"api_url": "http://a:8000"}})
    (spec,) = plan_environments(config, one_environment(config), own_api=True, of_training=True)[0]
    return spec


def test_the_one_environment_of_training_has_its_directory_and_variables(tmp_path: Path) -> None:
    spec = of_training(cwd=str(tmp_path), env={"SIZE": 3, "DEBUG": True}, args=["--env.x", False, 3])
    assert (spec.cwd, spec.env["SIZE"], spec.env["DEBUG"]) == (tmp_path, "3", "true")
    assert spec.command[-3:] == ("--env.x", "false", "3")
    with pytest.raises(ConfigError, match=r"env\.cwd: /nowhere is not a directory"):
        of_training(cwd="/nowhere")
    (tmp_path / "words.v2.py").write_text("Env.cli()")
    assert of_training(script=str(tmp_path / "words.v2.py")).registers_as == "words.v2", "its whole name"


def test_the_one_environment_of_training_may_be_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^env\.module: envs\.math\.server imports envs, which "):
        of_training(module="envs.math.server")
    (tmp_path / "envs").mkdir()
    spec = of_training(module="envs.math.server")
    assert spec.command[1:4] == ("-m", "envs.math.server", "serve")
    assert spec.registers_as == "server"
    with pytest.raises(ConfigError, match=r"env: script \(x\.py\) and module \(a\.b\) exclude each other"):
        of_training(module="a.b", script="x.py")


def test_a_tokenizer_of_transformers_5_is_made_one_that_transformers_4_loads(tmp_path: Path) -> None:
    own = shutil.copytree(MODEL, tmp_path / "model")
    config = RunConfig.from_mapping({"model": {"path": str(own)}, "run_dir": str(tmp_path / "run")})
    assert readable_tokenizer(config) == own, "both versions load the demo's"
    settings = own / "tokenizer_config.json"
    newer = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<tool>"], "eos_token": "<|im_end|>"}
    newer["clean_up_tokenization_spaces"] = True
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **newer}))
    write_tokenizer(config)
    write_tokenizer(config)  # again, as a resumed run does
    place = readable_tokenizer(config)
    found = json.loads((place / "tokenizer_config.json").read_text())
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert found["clean_up_tokenization_spaces"] is False, "4 would strip spaces that 5 leaves in"
    assert (found["additional_special_tokens"], "extra_special_tokens" in found) == (["<tool>"], False)
    assert (place / "tokenizer.json").read_bytes() == (own / "tokenizer.json").read_bytes()
    (own / "tokenizer.json").unlink()
    assert readable_tokenizer(config) == own, "nothing can be made of it; the doctor says so"


AGENT = {"agent": "here:solve", "tasks": "tasks.jsonl", "eval_tasks": "/held.jsonl", "concurrency": 4, "group_size": 2}


def test_an_agent_is_an_environment_of_the_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    launch = LaunchConfig.from_mapping({"agents": {"mine": AGENT}})
    assert list(launch.chosen) == ["mine"] and launch.chosen["mine"].evaluate
    config = RunConfig.from_mapping({"run_dir": str(tmp_path), "gateway": {"advertise_url": "http://g:1"}})
    spec = environment_spec(config, "mine", launch.chosen["mine"], of_training=False)
    assert spec.command[1:4] == ("-m", "atropos_verl.agents.runner", "serve")
    assert spec.env["ATROPOS_VERL_LAUNCH_DIRECTORY"] == str(tmp_path)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    found = parser.parse_args(spec.command[3:])
    assert (found.named, found.tasks, found.eval_tasks) == ("here:solve", tmp_path / "tasks.jsonl", Path("/held.jsonl"))
    assert (found.group_size, found.concurrency, found.name) == (2, 4, "mine")
    assert found.batches_ahead == config.max_batches_offpolicy
    for wrong in ({"agents": {"x": {}}}, {"agents": {"x": AGENT}, "environments": {"x": {"script": "a.py"}}}):
        with pytest.raises(ConfigError, match=r"agents\.x"):
            LaunchConfig.from_mapping(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"agent": "spellr:solve"}, "agent: there is no module spellr; it is looked for in .* and on PYTHONPATH"),
        ({"agent": "spellr"}, "agent: 'spellr' is not of the form package.module:function"),
        ({"agent": None, "command": "true", "scorer": "spellr:score"}, "scorer: there is no module spellr"),
        ({"tasks": "nope.jsonl"}, "tasks: there is no .*/nope.jsonl"),
    ],
)
def test_an_agents_module_and_files_are_looked_for_before_it_starts(
    wrong: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for file in ("tasks.jsonl", "here.py", "elsewhere/there.py"):
        (tmp_path / file).write_text("")
    config = RunConfig.from_mapping({"run_dir": f"{tmp_path}/run"})

    def plan(**agent: Any) -> None:
        launch = LaunchConfig.from_mapping({"agents": {"mine": agent}, "environments": {}})
        plan_environments(config, launch, own_api=True)

    plan(agent="there:solve", env={"PYTHONPATH": f"{tmp_path}/elsewhere"})
    plan(agent="unknown:solve", python=sys.executable)  # what it finds is its own
    with pytest.raises(ConfigError, match=rf"^agents\.mine\.{message}"):
        plan(**{"agent": "here:solve", **wrong})


def test_groups_of_one_sequence_are_warned_of_where_the_baseline_is_the_group() -> None:
    alone: dict[str, Any] = {"a": {"group_size": 1}, "b": {"group_size": 1}, "c": {}}
    [warning] = plan(alone)[1]
    assert warning.startswith(
        "groups of a, b have one sequence (group_size=1), whose advantage is 0 with algorithm.adv_e"
    )
    assert plan(alone, algorithm={"adv_estimator": "plain"})[1] == []
