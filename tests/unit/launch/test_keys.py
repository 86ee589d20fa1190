"""Keys reach an environment by a private file, whatever the user gives beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from atropos_verl.config.launch_schema import EnvironmentConfig
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.launch.environments import PrivateArguments, option_value, private_arguments, user_arguments


def private(tmp_path: Path, *args: str, api_url: str | None = "http://a:8000/x", **changes: Any) -> PrivateArguments:
    config = RunConfig.from_mapping(
        {"gateway": {"api_key": changes.get("api_key", "k3y")}, "atropos": {"token": changes.get("token")}}
    )
    settings = EnvironmentConfig(args=args, omit=changes.get("omit", ()))
    file = tmp_path / "f.yaml"
    return private_arguments(config, settings, api_url=api_url, file=file, cwd=tmp_path, key="environments.e.args")


def content(made: PrivateArguments) -> Any:
    (text,) = made.files.values()
    return yaml.safe_load(text)


def test_the_key_is_in_the_file_and_the_open_address_on_the_command_line(tmp_path: Path) -> None:
    made = private(tmp_path)
    assert made.words == ("--env.rollout_server_url", "http://a:8000/x", "--config", str(tmp_path / "f.yaml"))
    assert content(made) == {"openai": {"api_key": "k3y"}}


def test_a_token_makes_the_address_private(tmp_path: Path) -> None:
    made = private(tmp_path, token="a b/c")
    assert made.words == ("--config", str(tmp_path / "f.yaml"))
    assert content(made)["env"] == {"rollout_server_url": "http://atropos:a%20b%2Fc@a:8000/x"}


@pytest.mark.parametrize("form", [["--config", "mine.yaml"], ["--config=mine.yaml"]])
def test_the_users_file_is_taken_in(tmp_path: Path, form: list[str]) -> None:
    settings = {"env": {"lr": 1e-5, "name": "x"}, "openai": [{"timeout": 3, "api_key": "old"}], "slurm": True}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    made = private(tmp_path, *form, "--env.x", "1")
    assert content(made) == {
        "env": {"lr": 1e-5, "name": "x"},
        "openai": {"timeout": 3, "api_key": "k3y"},
        "slurm": True,
    }
    assert user_arguments((*form, "--env.x", "1"), made) == ("--env.x", "1")


def test_several_servers_of_the_users_own_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("openai: [{base_url: a}, {base_url: b}]")
    args = ("--config", "mine.yaml")
    made = private(tmp_path, *args)
    assert made.words == ("--env.rollout_server_url", "http://a:8000/x")
    assert user_arguments(args, made) == args


def test_what_the_user_gives_wins_and_what_he_omits_goes(tmp_path: Path) -> None:
    assert private(tmp_path, "--openai.api_key=mine", "--env.rollout_server_url", "u") == PrivateArguments()
    omitted = private(tmp_path, omit=("--openai.api_key",))
    assert omitted == PrivateArguments(("--env.rollout_server_url", "http://a:8000/x"))


def test_an_atropos_without_the_file_option_gets_arguments(tmp_path: Path) -> None:
    made = private(tmp_path, api_url=None, omit=("--config",))
    assert made == PrivateArguments(("--openai.api_key", "k3y"))


def test_a_gateway_without_a_key_needs_no_file(tmp_path: Path) -> None:
    assert private(tmp_path, api_key=None, api_url=None) == PrivateArguments(("--openai.api_key", "none"))


@pytest.mark.parametrize(("text", "message"), [(None, "No such file"), ("a: [", "cannot read"), ("7", "not a mapping")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        private(tmp_path, "--config", "mine.yaml")
    assert str(caught.value).startswith("environments.e.args")


def test_both_forms_of_an_option_are_found() -> None:
    assert option_value(["--a", "1", "--b=2"], "--a") == "1"
    assert option_value(["--a", "1", "--b=2"], "--b") == "2"
    assert option_value(["--ab", "1"], "--a") is None
