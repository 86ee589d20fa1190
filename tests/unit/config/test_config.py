"""Schema, YAML and command line → RunConfig: values accepted and refused, and the key that an error names."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from atropos_verl.config.composition import SHIPPED, fitted_to_model, load_config, load_launch
from atropos_verl.config.schema import RunConfig, describe
from atropos_verl.config.verl_keys import compose_run, notes_for_model, read_run
from atropos_verl.errors import ConfigError
from atropos_verl.launch.launch import main as launch_main
from atropos_verl.launch.train import main

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


def test_the_dictionary_of_the_recipe_is_accepted_as_it_is_and_frozen() -> None:
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
        ({"optim": {"lr": "fast"}}, r"^optim\.lr: .*'fast'"),
        ({"steps": 0}, "^steps: .*greater than 0"),
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
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_mapping(values)


def test_a_batch_may_be_used_several_times_where_the_teacher_is_the_whole_loss() -> None:
    taught = {"distill": {"alone": True, "teacher": "/models/t"}}
    assert RunConfig.from_mapping({"loss": {"ppo_epochs": 2}, **taught}).loss.ppo_epochs == 2


def test_several_errors_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_mapping({"steps": 0, "optim": {"lr": "x"}})
    assert caught.value.key == "steps"
    assert "steps: " in str(caught.value) and "optim.lr: " in str(caught.value)


SECRET_WORDS = {
    "gateway.api_key": "secret-1",
    "atropos.token": "secret-2",
    "atropos.headers": "{X-Key: secret-3}",
    "atropos.api_url": "http://user:secret-4@a:8000/api",
}


@pytest.mark.parametrize("command", [main, launch_main])
@pytest.mark.parametrize("backend", ["local", "ray"])
def test_the_printed_configuration_has_no_secrets(
    command: Callable[[list[str]], int], backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = "atropos." if backend == "ray" else ""
    words = [f"{key if key.startswith('atropos.') else prefix + key}={value}" for key, value in SECRET_WORDS.items()]
    words.append(f"{prefix}env.env={{HF_TOKEN: secret-5}}")
    if command is launch_main:
        words += ["environments.demo.env={HF_TOKEN: secret-6}", "trainer_process.env={HF_TOKEN: secret-7}"]
    assert command([f"backend={backend}", "--cfg", *words]) == 0
    text = capsys.readouterr().out
    assert "secret" not in text
    assert "X-Key" in text and "HF_TOKEN" in text and "http://a:8000/api" in text


@pytest.mark.parametrize(
    ("values", "loss", "level"),
    [
        ({}, "advantage_weighted_sft", None),
        ({"use_advantage_weighting": False}, "grpo", "token"),
        ({"loss": {"type": "grpo"}}, "grpo", "token"),
        ({"use_advantage_weighting": True, "loss": {"type": "advantage_weighted_sft"}}, "advantage_weighted_sft", None),
        ({"mode": "overlap"}, "advantage_weighted_sft", "token"),
        ({"mode": "overlap", "off_policy": {"importance": None}}, "advantage_weighted_sft", None),
        ({"off_policy": {"importance": "sequence"}}, "advantage_weighted_sft", "sequence"),
    ],
)
def test_loss_and_importance_weights_which_are_on_where_rollouts_may_be_old(
    values: dict[str, object], loss: str, level: str | None
) -> None:
    config = RunConfig.from_mapping(values)
    assert (config.loss_type, config.importance) == (loss, level)


def test_overrides_reach_nested_keys_lists_and_open_sections() -> None:
    words = ["optim.lr=0.1", "advantage_clipping=[-2,2]", "atropos.headers.X-Key=abc", "model.override_config.eps=1e-3"]
    words.append("supervise.stall_after=9")
    config = load_config(words, None, "atropos")
    assert (config.optim.lr, config.supervise.stall_after) == (0.1, 9.0)
    assert config.advantage_clipping == (-2.0, 2.0)
    assert config.atropos.headers == {"X-Key": "abc"}
    assert config.model.override_config == {"eps": 1e-3}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("steps", "'steps' is not of the form key=value"),
        ("steps=many", "steps: Input should be a valid integer"),
        ("steps=[", "'steps=[' cannot be read"),
    ],
)
def test_a_bad_word_is_named(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([word], None, "atropos")
    assert message in str(caught.value)
    with pytest.raises(ConfigError, match="no_such_file"):
        load_config([], None, "no_such_file")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["trainer.max_token_len_per_gpu=16"],
            "data.max_token_len (64) is above trainer.max_token_len_per_gpu (16): no micro-batch has room",
        ),
        (["inference.max_context_len=8"], "data.max_prompt_length (48) is above inference.max_context_len (8)"),
        (
            ["use_advantage_weighting=false", "loss.ppo_mini_batches=65"],
            "loss.ppo_mini_batches (65) is above batch_size (64)",
        ),
        (["supervise.backoff=40"], "supervise.backoff (40) is above supervise.max_backoff (30)"),
        (["optim.betas=[0.9,1]"], "optim.betas.1: Input should be less than 1"),
    ],
)
def test_bounds_that_contradict_each_other_are_named_with_their_values(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words, "atropos") == 2
    assert f"CONFIGURATION ERROR: {message}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=message.split(" ")[0]):
        load_launch(words, None, "local_demo")


def test_ranks_of_a_launch_have_something_to_train() -> None:
    with pytest.raises(ConfigError, match=r"trainer_process.nproc \(128\) is above batch_size \(64\)"):
        load_launch(["trainer_process.nproc=128"], None, "local_demo")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: ${oc.env:NOT_SET_ANYWHERE}", "seed: environment variable NOT_SET_ANYWHERE is not set; set it"),
        (b"model: {path: '${oc.env:NOT_SET_ANYWHERE}/x'}", "model.path: environment variable NOT_SET_ANYWHERE is"),
        (
            b"actor_rollout_ref: {model: {path: '${oc.env:NOT_SET_ANYWHERE}/x'}}",
            "actor_rollout_ref.model.path: environment variable NOT_SET_ANYWHERE is",
        ),
        (b"seed: ${nothing}", "seed: Interpolation key 'nothing' not found"),
        (b"seed: ${unknown:x}", "seed: Unsupported interpolation type unknown"),
        (b"seed: ${steps}\nsteps: ${seed}", ": Recursive interpolation"),
        (b"seed: [", "cannot be read: "),
        (b"seed: \xff", "cannot be read: "),
        (b"seed: '${'", "seed: "),
    ],
)
def test_files_that_cannot_be_composed_name_the_key(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, backend = b"atropos_schema", "local"
    if b"actor_rollout_ref" in content:
        base, backend = b"ray_cpu_demo", "ray"
        for name in ("atropos_ray", "ray_cpu_demo"):
            shutil.copy(SHIPPED / f"{name}.yaml", tmp_path)
    (tmp_path / "mine.yaml").write_bytes(b"defaults: [" + base + b", _self_]\n" + content)
    words = [f"backend={backend}", "--config-dir", str(tmp_path), "--config-name", "mine", "--cfg"]
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("CONFIGURATION ERROR: ") and message in shown


def test_a_gateway_for_the_network_gets_a_key_which_environments_elsewhere_keep(tmp_path: Path) -> None:
    words = ["gateway.host=0.0.0.0", f"run_dir={tmp_path}"]
    first = load_config(words, None, "atropos").gateway.api_key
    assert first is not None and len(first) == 48
    (tmp_path / "gateway.key").write_text(f"{first}\n")
    assert load_config(words, None, "atropos").gateway.api_key != first
    assert load_config([*words, "atropos.api_url=http://a:1"], None, "atropos").gateway.api_key == first
    ray = compose_run([f"atropos.{words[0]}", words[1], "atropos.api_url=http://a:1"])
    assert read_run(ray).run.gateway.api_key == first


def test_command_line_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [atropos_schema, _self_]\natropos: {api_url: http://file:1, timeout: 9}\n"
    )
    monkeypatch.delenv("ATROPOS_TIMEOUT", raising=False)
    monkeypatch.setenv("ATROPOS_API_URL", "http://environment:1")
    assert load_config([], tmp_path, "mine").atropos.api_url == "http://environment:1"
    assert load_config(["atropos.api_url=http://line:1"], tmp_path, "mine").atropos.api_url == "http://line:1"
    assert load_config([], tmp_path, "mine").atropos.timeout == 9
    monkeypatch.delenv("ATROPOS_API_URL")
    assert load_config([], tmp_path, "mine").atropos.api_url == "http://file:1"


def test_every_key_is_explained() -> None:
    assert [name for name, _, text in describe() if not text] == []


def _model(path: Path, parameters: int, context: int) -> str:
    """A directory that claims so many parameters; its weights are a hole in the disk."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"dtype": "bfloat16", "max_position_embeddings": context}))
    with (path / "model.safetensors").open("wb") as file:
        file.truncate(2 * parameters)
    return str(path)


@pytest.mark.parametrize(
    ("parameters", "context", "lr", "length"),
    [
        (900_000, 1024, 5e-4, None),
        (135_000_000, 8192, 2e-5, 1024),
        (1_500_000_000, 512, 5e-6, 256),
        (8_000_000_000, 40960, 1e-6, 1024),
    ],
)
def test_settings_that_suit_the_demo_only_are_chosen_by_the_model(
    tmp_path: Path, parameters: int, context: int, lr: float, length: int | None
) -> None:
    path = _model(tmp_path / "model", parameters, context)
    for config in (load_config([f"model.path={path}"]), fitted_to_model({"model": {"path": path}})):
        assert (config.optim.lr, config.data.max_prompt_length) == (lr, length or 64)
        assert config.max_response_length == (length or 32)
        assert len(config.notes) == (0 if length is None else 3)
        assert all(path in note for note in config.with_values(optim={"betas": (0.8, 0.9)}).notes)
    if length is not None:
        assert config.notes[0] == f"optim.lr={lr:g}, chosen by the size of {path}; set it otherwise"
    own = load_config([f"model.path={path}", "optim.lr=5e-4", "max_response_length=32"])
    assert (own.optim.lr, own.max_response_length) == (5e-4, 32)
    assert len(own.notes) == (0 if length is None else 1)


def test_the_demo_keeps_its_settings_and_a_file_its_own(tmp_path: Path) -> None:
    demo = load_config([])
    assert (demo.optim.lr, demo.data.max_prompt_length, demo.max_response_length, demo.notes) == (5e-4, 64, 32, ())
    shipped = load_config([], config_name="smollm2")
    assert shipped.notes == ()
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


def test_a_file_that_is_not_there_and_a_key_misspelt_in_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], None, "one_gpuu")
    assert str(caught.value).startswith(
        f"--config-name: {SHIPPED} holds no one_gpuu.yaml; did you mean one_gpu? (there"
    )
    with pytest.raises(ConfigError, match=r"nope\.yaml"):
        compose_run([], None, "nope")
    (tmp_path / "mine.yaml").write_text("optim: {lrr: 3}")
    with pytest.raises(ConfigError, match=r"optim.lrr: unknown key; did you mean optim.lr\?"):
        load_config([], tmp_path, "mine")


def test_help_shows_the_values_of_the_chosen_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [atropos_schema, _self_]\noptim: {lr: 0.25}")
    assert main(["--help", "--config-dir", str(tmp_path), "--config-name", "mine", "steps=7"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\n  optim.lr .*\(0.25\)\n", text) and "of the whole run (7)\n" in text
    assert launch_main(["--help", "envs=[demo]", "api.port=8123"], "local_demo") == 0
    assert re.search(r"\n  api.port .*\(8123\)\n", capsys.readouterr().out)
    assert main(["backend=ray", "--help", "atropos.poll_interval=0.5"]) == 0
    assert re.search(r"\n  atropos.poll_interval .*\(0.5\)\n", capsys.readouterr().out)
