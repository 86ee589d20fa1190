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
from atropos_verl.launch import environments as module
from atropos_verl.launch.plan import make_plan, one_environment
from atropos_verl.launch.process import ServiceSpec

Patch = pytest.MonkeyPatch
MODEL = demo_model_path()


def config_of(**settings: Any) -> RunConfig:
    base = {
        "run_dir": "/run",
        "batch_size": 64,
        "group_size": 8,
        "gateway": {"api_key": "k", "advertise_url": "http://g:9004"},
        "atropos": {"server": "embedded", "api_url": "http://a:8000"},
    }
    return RunConfig.from_mapping({**base, **settings})


def plan(
    environments: dict[str, Any], *, own_api: bool = True, agents: Any = None, **settings: Any
) -> tuple[list[ServiceSpec], list[str]]:
    launch = LaunchConfig.from_mapping({"environments": environments, "agents": agents or {}})
    return module.plan_environments(config_of(**settings), launch, own_api=own_api)


def options(spec: ServiceSpec) -> dict[str, str]:
    """``--key value`` pairs after ``serve``; a key that stands twice fails."""
    words = " ".join(spec.command[spec.command.index("serve") + 1 :]).replace("=", " ").split()
    pairs = list(zip(words[::2], words[1::2], strict=True))
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


def test_the_command_is_adapted_to_the_run() -> None:
    (planned,) = plan({"demo": {}}, max_response_length=16, data={"max_prompt_length": 48}, steps=10)[0]
    assert options(planned) == {
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


def test_copies_divide_the_weight_and_arguments_of_the_user_win() -> None:
    changes = {"args": ["--env.max_token_length=99", "--env.group_size", 4], "omit": ["--openai.tokenizer_name"]}
    services = plan({"demo": {"copies": 2, "weight": 3, "env": {"SEED": 1}, **changes}})[0]
    assert [item.name for item in services] == ["demo", "demo-2"]
    assert [item.log_path for item in services] == [Path("/run/logs/demo.1.log"), Path("/run/logs/demo-2.1.log")]
    for item in services:
        given = options(item)
        assert (given["--env.inference_weight"], given["--env.wandb_name"]) == ("1.5", item.name)
        assert (given["--env.max_token_length"], given["--env.group_size"]) == ("99", "4")
        assert item.env["SEED"] == "1"
        assert all("tokenizer_name" not in text for text in item.files.values())


@pytest.mark.parametrize(
    ("environments", "message"),
    [
        ({"demo": {"copies": 2}, "demo-2": {}}, "two processes would be called demo-2"),
        ({"a": {"min_batch_allocation": 0.6}, "b": {"min_batch_allocation": 0.6}}, r"adds up to 1\.2, above 1"),
        ({"a": {"group_size": 4}, "b": {"group_size": 6}}, "an upstream API would never deliver a batch"),
    ],
)
def test_environments_that_do_not_fit_together_are_refused(environments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(environments, own_api="upstream" not in message, batch_size=24)


def test_weights_become_shares_of_every_batch() -> None:
    """A trajectory API makes ``int(batch_size * share)`` of a share."""
    one, two, three = ({"weight": weight} for weight in (1, 2, 3))
    for environments, batch_size, expected in (
        ({"a": three, "b": one}, 64, [48, 16]),
        ({"a": two, "b": one}, 24, [16, 8]),
        # Whole groups: 2/3 and 1/3 of 64 are five and two groups of 8; the rest is filled by age.
        ({"a": two, "b": one}, 64, [40, 16]),
        ({"a": {**three, "group_size": 16}, "b": {**one, "group_size": 4}}, 64, [48, 16]),
        # Explicit shares stand, and the others divide the rest; copies divide the share.
        ({"a": three, "b": one, "c": {"min_batch_allocation": 0.5}}, 64, [24, 8, 32]),
        ({"a": {**three, "copies": 2}, "b": one}, 64, [24, 16]),
        ({"a": {"weight": 9}, "b": one}, 64, [56, 0]),
        # Equal weights need no shares, nor does one environment.
        ({"a": {}, "b": {}}, 64, [0, 0]),
        ({"a": three}, 64, [0]),
    ):
        launch = LaunchConfig.from_mapping({"environments": environments})
        shares, _ = module.allocate(config_of(batch_size=batch_size), launch, embedded=True)
        assert [int(batch_size * (share or 0.0)) for share in shares.values()] == expected, environments


def test_what_will_be_otherwise_than_it_reads_is_warned_of() -> None:
    alone: dict[str, Any] = {"a": {"group_size": 1}, "b": {"group_size": 1}, "c": {}}
    too_few = "environments.b: its share of a batch of 64 is less than one group of 8; it gets what the others leave"
    for environments, own_api, warning, has_share in (
        ({"a": {"weight": 9}, "b": {}}, True, too_few, [True, False]),
        ({"a": {"weight": 3}, "b": {}}, False, "shares of the trained sequences will not follow them", [False] * 2),
        ({"a": {"group_size": 24}, "b": {"group_size": 12}}, True, "some batches will be smaller", [False] * 2),
        (alone, True, "groups of a, b have one sequence (group_size=1), whose advantage is 0 with", [False] * 3),
    ):
        services, [said] = plan(environments, own_api=own_api)
        assert warning in said
        assert ["--env.min_batch_allocation" in item.command for item in services] == has_share
    assert plan(alone, algorithm={"adv_estimator": "plain"})[1] == []


def test_a_virtual_environment_is_an_interpreter(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to("/usr/bin/env")
    assert module.interpreter(str(tmp_path), "key") == str(python), "the link itself, not its target"
    assert module.interpreter("python3.11", "key") == "python3.11"


URL, KEY = {"base_url": "http://g:9004/v1"}, {"api_key": "k3y"}
SERVER = {**URL, **KEY}
FILE = ("--config", "FILE")
MINE = ["--config", "mine.yaml"]
API = "http://run:t@a:8000"
OWN = """\
env: {lr: 0.1, name: x}
openai: [{timeout: 3, api_key: old}]
slurm: true
"""
TAKEN_IN = {
    "env": {"lr": 0.1, "name": "x", "rollout_server_url": API},
    "openai": [{"timeout": 3, **SERVER}],
    "slurm": True,
}


@pytest.mark.parametrize(
    ("args", "changes", "words", "content"),
    [
        ([], {"api_url": API}, FILE, {"openai": [SERVER], "env": {"rollout_server_url": API}}),
        # Atropos takes several as they stand, whatever config_init returns: no list, several, or what is not known.
        ([], {"servers": 0}, FILE, {"openai": [SERVER] * 2}),
        ([], {"servers": 3}, FILE, {"openai": [SERVER] * 3}),
        ([], {"servers": None}, FILE, {"openai": [SERVER] * 2}),
        # What the user gives wins, and what he omits goes.
        (
            ["--openai.api_key=mine", "--env.rollout_server_url", "u"],
            {"api_url": API},
            (*FILE, "--openai.api_key=mine", "--env.rollout_server_url", "u"),
            {"openai": [URL]},
        ),
        ([], {"omit": ("--openai.api_key",)}, FILE, {"openai": [URL]}),
        # Beside several servers Atropos takes no --openai.
        (
            ["--openai.timeout", "60", "--x", "1", "--openai.api_key=mine"],
            {"servers": 0},
            (*FILE, "--x", "1"),
            {"openai": 2 * [{**URL, "timeout": "60", "api_key": "mine"}]},
        ),
        # An Atropos without --config gets arguments.
        ([], {"omit": FILE}, ("--openai.base_url", "http://g:9004/v1", "--openai.api_key", "k3y"), None),
        # The user's file is taken in; several servers of his keep their addresses, and get no key.
        ([*MINE, "--env.x", "1"], {"api_url": API, "file": OWN}, (*FILE, "--env.x", "1"), TAKEN_IN),
        (["--config=mine.yaml"], {"api_url": API, "file": OWN}, FILE, TAKEN_IN),
        (
            MINE,
            {"file": "openai: [{base_url: a, api_key: x}, {timeout: 7}]"},
            FILE,
            {"openai": [{"base_url": "a", "api_key": "x"}, {**SERVER, "timeout": 7}]},
        ),
        (MINE, {}, r"^e\.args: .*No such file", None),
        (MINE, {"file": "a: ["}, r"^e\.args: cannot read", None),
        (MINE, {"file": "7"}, r"^e\.args: .*not a mapping", None),
        ([], {"omit": FILE, "servers": 0}, r"^e\.omit: config_init returns no list of one server, so its --con", None),
    ],
)
def test_the_gateway_is_handed_over_in_a_private_file(
    tmp_path: Path, args: list[str], changes: dict[str, Any], words: Any, content: Any
) -> None:
    """Or the refusal, in place of the last words of the command."""
    changes = {"servers": 1, "api_url": None, "omit": (), **changes}
    if "file" in changes:
        (tmp_path / "mine.yaml").write_text(changes.pop("file"))
    settings = EnvironmentConfig(args=tuple(args), omit=changes.pop("omit"))
    where: dict[str, Any] = {"file": Path("FILE"), "cwd": tmp_path, "section": "e"}
    if isinstance(words, str):
        with pytest.raises(ConfigError, match=words):
            module.last_words(settings, SERVER, **changes, **where)
        return
    found, files = module.last_words(settings, SERVER, **changes, **where)
    assert found == words
    assert [yaml.safe_load(text) for text in files.values()] == ([] if content is None else [content])


def test_what_will_not_work_is_said_before_it_starts(tmp_path: Path) -> None:
    path = tmp_path / "env.py"
    path.write_text("from atroposlib.utils import tokenize_for_trainer\nfrom .x import y\nclass MyEnv(BaseEnv): pass")
    settings = {"script": str(path), "args": ["--openai.base_url", "http://elsewhere/v1"]}
    no_cli = f"{path} calls no .cli(): Atropos environments end with MyEnv.cli(), or start nothing"
    expected = (
        no_cli,
        f"{path} imports from its own package: start it as a module",
        "its tokenize_for_trainer needs transformers 4",
        "its arguments send it to http://elsewhere/v1, not to the gateway",
    )
    for said, words in zip(plan({"mine": settings})[1], expected, strict=True):
        assert said.startswith(f"environments.mine.script: {words}")
    assert len(plan({"mine": {**settings, "python": sys.executable}})[1]) == 3, "its own interpreter may have that"


def test_children_ask_no_proxy_and_import_from_here(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "intranet, 127.0.0.1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "lib:/opt/lib")
    (planned,) = plan({"demo": {}})[0]
    assert planned.env["no_proxy"] == planned.env["NO_PROXY"] == "intranet,127.0.0.1,localhost,::1,g,a"
    assert planned.env["PYTHONPATH"] == f"{tmp_path}/lib:/opt/lib"


def of_training(**env: Any) -> ServiceSpec:
    config = RunConfig.from_mapping({"env": env, "seed": 7, "atropos": {"api_url": "http://a:8000"}})
    api, spec = make_plan(config, one_environment(config), own_api=True, probe_url=None, trains_here=True).services
    assert (api.log_path.name, spec.log_path.name) == ("trajectory_api.log", "environment.log")
    return spec


def test_the_one_environment_of_training(tmp_path: Path, monkeypatch: Patch) -> None:
    demo = of_training()
    assert demo.registers_as == options(demo)["--env.wandb_name"] == "spell_backward"
    assert (options(demo)["--env.seed"], demo.startup_timeout, demo.restarts) == ("7", 180.0, 5)
    spec = of_training(cwd=str(tmp_path), env={"SIZE": 3, "DEBUG": True}, args=["--env.x", False, 3])
    assert (spec.cwd, spec.env["SIZE"], spec.env["DEBUG"]) == (tmp_path, "3", "true")
    assert spec.command[-3:] == ("--env.x", "false", "3")
    (tmp_path / "words.v2.py").write_text("Env.cli()")
    assert of_training(script=str(tmp_path / "words.v2.py")).registers_as == "words.v2", "its whole name"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^env\.module: envs\.math\.server imports envs, which "):
        of_training(module="envs.math.server")
    (tmp_path / "envs").mkdir()
    spec = of_training(module="envs.math.server")
    assert spec.command[1:4] == ("-m", "envs.math.server", "serve")
    assert spec.registers_as == "server"
    upstream = RunConfig.from_mapping({"atropos": {"server": "upstream"}})
    assert one_environment(upstream).api.on_death == "stop", "its trainer, in this process, cannot start anew"


def test_a_tokenizer_of_transformers_5_is_made_one_of_4(tmp_path: Path) -> None:
    own = shutil.copytree(MODEL, tmp_path / "model")
    config = RunConfig.from_mapping({"model": {"path": str(own)}, "run_dir": str(tmp_path / "run")})
    assert module.readable_tokenizer(config) == own, "both versions load the demo's"
    settings = own / "tokenizer_config.json"
    newer = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<tool>"], "eos_token": "<|im_end|>"}
    newer["clean_up_tokenization_spaces"] = True
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **newer}))
    for _ in range(2):  # again, as a resumed run does
        module.write_tokenizer(config)
    place = module.readable_tokenizer(config)
    found = json.loads((place / "tokenizer_config.json").read_text())
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert found["clean_up_tokenization_spaces"] is False, "4 would strip spaces that 5 leaves in"
    assert (found["additional_special_tokens"], "extra_special_tokens" in found) == (["<tool>"], False)
    assert (place / "tokenizer.json").read_bytes() == (own / "tokenizer.json").read_bytes()
    (own / "tokenizer.json").unlink()
    assert module.readable_tokenizer(config) == own, "nothing can be made of it; the doctor says so"


AGENT = {"agent": "here:solve", "tasks": "tasks.jsonl"}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: Patch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for file in ("tasks.jsonl", "here.py", "elsewhere/there.py", "held.jsonl"):
        (tmp_path / file).touch()
    return tmp_path


def test_an_agent_is_an_environment_of_the_runner(directory: Path) -> None:
    agent = {**AGENT, "eval_tasks": f"{directory}/held.jsonl", "concurrency": 4, "group_size": 2}
    assert LaunchConfig.from_mapping({"agents": {"mine": agent}}).chosen["mine"].evaluate
    [spec], _ = plan({}, agents={"mine": agent})
    assert spec.command[1:4] == ("-m", "atropos_verl.agents.runner", "serve")
    assert spec.env["ATROPOS_VERL_LAUNCH_DIRECTORY"] == str(directory)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    found = parser.parse_args(spec.command[3:])
    files = (directory / "tasks.jsonl", directory / "held.jsonl")
    assert (found.named, found.tasks, found.eval_tasks) == ("here:solve", *files)
    assert (found.group_size, found.concurrency, found.name) == (2, 4, "mine")
    assert found.batches_ahead == config_of().max_batches_offpolicy
    for wrong in ({"agents": {"x": {}}}, {"agents": {"x": AGENT}, "environments": {"x": {"script": "a.py"}}}):
        with pytest.raises(ConfigError, match=r"agents\.x"):
            LaunchConfig.from_mapping(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agent": "there:solve", "env": {"PYTHONPATH": "elsewhere"}}, None),
        ({"agent": "unknown:solve", "python": sys.executable}, None),  # what it finds is its own
        ({"agent": "spellr:solve"}, "agent: there is no module spellr; it is looked for in .* and on PYTHONPATH"),
        ({"agent": "spellr"}, "agent: 'spellr' is not of the form package.module:function"),
        ({"agent": None, "command": "true", "scorer": "spellr:score"}, "scorer: there is no module spellr"),
        ({"tasks": "nope.jsonl"}, "tasks: there is no .*/nope.jsonl"),
    ],
)
def test_an_agents_files_are_looked_for_first(changes: dict[str, Any], message: str | None, directory: Path) -> None:
    agents, run_dir = {"mine": {**AGENT, **changes}}, str(directory)
    if message is None:
        plan({}, agents=agents, run_dir=run_dir)
        return
    with pytest.raises(ConfigError, match=rf"^agents\.mine\.{message}"):
        plan({}, agents=agents, run_dir=run_dir)
