"""Configuration → the commands of a run's processes. Pure: starts nothing, so a plan can be shown and tested."""

from __future__ import annotations

import sys
from pathlib import Path

from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.launch.keys import private_arguments, user_arguments
from atropos_verl.launch.process import ServiceSpec

__all__ = ["api_data_dir", "api_spec", "demo_env_script", "env_script", "env_spec", "evaluate_spec"]

_CHILD_ENV = {
    "PYTHONUNBUFFERED": "1",  # logs are read while the process runs, and after it was killed
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # environments do not compute; their thread pools would take the trainer's cores
}


def api_spec(run_dir: Path, host: str, port: int, server: str = "upstream") -> ServiceSpec:
    """The trajectory API: ``upstream`` is atroposlib's, ``embedded`` ours, which keeps its state in ``run_dir/api``."""
    env = _CHILD_ENV
    module: tuple[str, ...] = ("atroposlib.cli.run_api",)
    if server == "embedded":
        module = ("atropos_verl.cli", "serve-api", "--data-dir", str(api_data_dir(run_dir)))
        # For this run alone, on this machine: a token meant for another API would only lock the environment out.
        env = {**_CHILD_ENV, "ATROPOS_API_TOKEN": ""}
    command = (sys.executable, "-m", *module, "--host", host, "--port", str(port))
    return ServiceSpec(
        name="trajectory_api", command=command, env=env, cwd=run_dir, log_path=_log(run_dir, "trajectory_api")
    )


def api_data_dir(run_dir: Path) -> Path:
    """Where the embedded API of a run keeps its state."""
    return run_dir / "api"


def demo_env_script() -> Path:
    """The demo environment in a source checkout. Raises ``ConfigError`` where there is none."""
    script = Path(__file__).resolve().parents[3] / "examples" / "environments" / "spell_backward.py"
    if not script.is_file():
        raise ConfigError(f"the demo environment is not at {script} (no source checkout?); give your own", "env.script")
    return script


def env_script(config: RunConfig) -> Path:
    """The environment to run. Raises ``ConfigError`` when it does not exist."""
    if config.env.script is None:
        return demo_env_script()
    script = Path(config.env.script).expanduser().absolute()
    if not script.is_file():
        raise ConfigError(f"{script} does not exist", "env.script")
    return script


def env_spec(config: RunConfig, run_dir: Path, model_path: Path, *, api_url: str, gateway_url: str) -> ServiceSpec:
    """``ENV serve``, pointed at this run's API and gateway."""
    arguments = (
        "serve",
        *_common_arguments(config, model_path, gateway_url),
        *("--env.rollout_server_url", api_url),
        *("--env.total_steps", str(10 * config.steps + 1000)),  # the trainer ends the run, not the environment
        *("--env.max_batches_offpolicy", str(config.max_batches_offpolicy)),
    )
    return _environment(config, run_dir, "environment", arguments)


def evaluate_spec(
    config: RunConfig, run_dir: Path, model_path: Path, *, gateway_url: str, label: str
) -> tuple[ServiceSpec, Path]:
    """``ENV evaluate`` on held-out tasks, and the file it writes its metrics to."""
    directory = run_dir / "eval" / label
    arguments = (
        "evaluate",
        *_common_arguments(config, model_path, gateway_url),
        *("--env.data_dir_to_save_evals", str(directory)),
    )
    return _environment(config, run_dir, f"evaluate_{label}", arguments), directory / "metrics.json"


def _common_arguments(config: RunConfig, model_path: Path, gateway_url: str) -> tuple[str, ...]:
    tokenizer = config.model.tokenizer_path or str(model_path)
    return (
        *("--env.group_size", str(config.group_size)),
        *("--env.max_token_length", str(config.max_token_len)),
        *("--env.tokenizer_name", tokenizer),
        *("--env.use_wandb", "false"),
        # Without a name /register-env is refused with 422: atroposlib sends null where the API wants a string.
        *("--env.wandb_name", env_script(config).stem),
        *("--openai.base_url", f"{gateway_url}/v1"),
        *("--openai.model_name", str(model_path)),
        *("--openai.tokenizer_name", tokenizer),
        *("--openai.server_type", "vllm"),
    )


def _environment(config: RunConfig, run_dir: Path, name: str, arguments: tuple[str, ...]) -> ServiceSpec:
    script = env_script(config)
    slurm = ("--slurm", "false") if arguments[0] == "serve" else ()
    extra = ("--env.seed", str(config.seed)) if config.env.script is None else ()
    private = private_arguments(
        api_key=config.gateway.api_key,
        args=config.env.args,
        file=run_dir / "launch" / f"{name}.yaml",
        cwd=run_dir,
        key="env.args",
    )
    words = (*arguments, *slurm, *extra, *private.words, *user_arguments(config.env.args, private))
    return ServiceSpec(
        name=name,
        command=(config.env.python or sys.executable, str(script), *words),
        env=_CHILD_ENV,
        cwd=run_dir,
        log_path=_log(run_dir, name),
        files=private.files,
    )


def _log(run_dir: Path, name: str) -> Path:
    return run_dir / "logs" / f"{name}.log"
