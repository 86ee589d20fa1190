"""Command line → verl's configuration and the ``atropos`` block beside it, validated before torch is imported."""

import copy
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from atropos_verl.assets import SMOLLM2
from atropos_verl.config.composition import (
    SHIPPED,
    built_on,
    check_form,
    compose_with_hydra,
    composition_errors,
    help_text,
    key_of,
    plain,
    with_key_for_network,
)
from atropos_verl.config.model_checks import defaults_for
from atropos_verl.config.schema import (
    NO_MICRO_BATCH,
    AtroposConfig,
    CommonConfig,
    GroupsConfig,
    OwnAlgorithmConfig,
    OwnLossConfig,
    OwnModelConfig,
    PositiveFloat,
    RunConfig,
    SuperviseConfig,
    apply_environment,
    check_bounds,
    describe,
    hide_secrets,
)
from atropos_verl.errors import ConfigError

_OF_THE_DEMO = {"actor_rollout_ref.actor.optim.lr": 2e-4, "data.max_prompt_length": 48, "data.max_response_length": 16}
"""In the order of ``defaults_for``: what ``ray_cpu_demo.yaml`` has for the demo model."""
RAY_DEFAULT = "ray_cpu_demo"
"""The file that is composed where none is named."""

_LOCAL_NAMES = {
    "steps": "trainer.total_training_steps",
    "batch_size": "data.train_batch_size (groups per step)",
    "group_size": "actor_rollout_ref.rollout.n",
    "optim.lr": "actor_rollout_ref.actor.optim.lr",
    "model.path": "actor_rollout_ref.model.path",
    "max_response_length": "data.max_response_length",
    "save_freq": "trainer.save_freq",
    "resume": "trainer.resume_mode",
    "temperature": "actor_rollout_ref.rollout.temperature",
    "use_advantage_weighting": "actor_rollout_ref.actor.policy_loss.loss_mode=advantage_weighted_sft",
}
"""Keys of the local backend, and verl's for the same."""


class RaySettings(CommonConfig, AtroposConfig):
    """The block ``atropos``: the trajectory API, the environment, the gateway, and what is done to groups."""

    model: OwnModelConfig = Field(default_factory=OwnModelConfig)
    loss: OwnLossConfig = Field(default_factory=OwnLossConfig)
    algorithm: OwnAlgorithmConfig = Field(default_factory=OwnAlgorithmConfig)
    data: GroupsConfig = Field(default_factory=GroupsConfig)
    seed: int = Field(0, ge=0, lt=1 << 32, description="seed of the environment")
    poll_interval: PositiveFloat = Field(0.05, description="seconds between two polls for a finished batch")


@dataclass(frozen=True)
class RayRun:
    """One run: verl's configuration, our block, and the same settings as the local backend's services read them."""

    verl: Any
    """The composed ``DictConfig``, verl's keys and ``atropos``, ``run_dir``, ``backend``."""
    settings: RaySettings
    run: RunConfig

    @property
    def run_dir(self) -> Path:
        return Path(str(self.verl.run_dir))

    @property
    def mode(self) -> str:
        """``sync`` | ``colocate_async`` | ``separate_async``."""
        return str(self.verl.trainer.v1.trainer_mode)


def backend_of(words: Sequence[str], config_dir: Path, config_name: str | None) -> str:
    """As a word says, else the file or one that it builds on, else local. Raises ``ConfigError`` for another."""
    of_words = (word.partition("=")[2] for word in reversed(words) if word.startswith("backend="))
    of_files = (str(file["backend"]) for file in built_on(config_dir, config_name or "") if file.get("backend"))
    found = next(of_words, None) or next(of_files, "local")
    if found not in ("local", "ray"):
        raise ConfigError(f"{found!r} is neither local nor ray", "backend")
    return found


@composition_errors()
def compose_run(overrides: Sequence[str], config_dir: Path | None = None, config_name: str | None = None) -> Any:
    """The whole configuration with environment variables, the run directory and the model's path filled in."""
    config = compose_config(overrides, config_dir or SHIPPED, config_name or RAY_DEFAULT)
    keys, block = set(map(key_of, overrides)), plain(config.atropos)
    of_gateway = {key.removeprefix("atropos.") for key in keys if key.startswith("atropos.gateway.")}
    sections = {"atropos": block, "gateway": block.get("gateway")}
    values = apply_environment(sections, command_line_keys=keys | of_gateway)
    config.atropos = {**values["atropos"], "gateway": values["gateway"] or {}}
    complete_config(config)
    named = {"run_dir": config.run_dir, "trainer": {"experiment_name": config.trainer.experiment_name}}
    config.run_dir = str(RunConfig.from_mapping(named).resolve_run_dir())
    model, block = config.actor_rollout_ref.model, config.atropos
    if model.path in (None, SMOLLM2):  # verl takes no names of ours
        model.path = str(RunConfig.from_mapping({"model": {"path": model.path}}).resolve_model_path())
    if "trainer" in (config.get("only") or ["trainer"]):
        block.gateway = with_key_for_network(block.get("gateway"), config.run_dir, block)
    plain(config)  # here, where an error names the key, and not when it is read
    return config


def public(config: Any) -> dict[str, Any]:
    """Every value of a composed configuration, keys and tokens left out, as ``RunConfig.public``."""
    values = copy.deepcopy(config) if isinstance(config, dict) else plain(config)
    block = values["atropos"]
    hide_secrets(block, block.get("gateway") or {}, block.get("env") or {})
    return values


@composition_errors()
def compose_config(overrides: Sequence[str], config_dir: Path, config_name: str) -> Any:
    """Compose a file over verl's ``ppo_trainer``, without torch. Raises ``ConfigError`` that names key or word."""
    from omegaconf import OmegaConf

    words = [word for word in overrides if not word.startswith("backend=")]
    ray_names = {**{name: f"atropos.{name}" for name, *_ in describe(RaySettings)}, **_LOCAL_NAMES}
    for word in words:
        if (key := key_of(word)) in ray_names:
            raise ConfigError(f"a key of the local backend; with backend=ray it is {ray_names[key]}", key)
        check_form(word, "--cfg shows all keys")
    spec = importlib.util.find_spec("verl")  # without importing verl, which imports torch
    assert spec is not None and spec.origin is not None
    search_path = f"hydra.searchpath=[file://{Path(spec.origin).parent / 'trainer' / 'config'}]"
    # The files need not spell out every key of these blocks; the schema refuses what it does not know.
    own = [f"++{word}" if word.startswith(("atropos.", "supervise.")) else word for word in words]
    config = compose_with_hydra(config_dir, config_name, [search_path, *own])
    OmegaConf.set_struct(config, False)  # what is chosen from here on is added
    return config


def complete_config(config: Any) -> None:
    """Fill in the keys that ``trainer.v1.trainer_mode=separate_async`` needs where the embedded engine generates."""
    from omegaconf import OmegaConf

    if (path := OmegaConf.select(config, "atropos.loss.path")) is not None:
        # Every training worker registers the function under this name: see backends.ray.workers.
        config.actor_rollout_ref.actor.policy_loss.loss_mode = path
    if config.trainer.v1.trainer_mode != "separate_async":
        return
    actor_rollout, batch = config.actor_rollout_ref, config.data.train_batch_size
    if actor_rollout.actor.ppo_mini_batch_size == batch:
        actor_rollout.actor.ppo_mini_batch_size = batch // parameter_sync_step(config)
    if actor_rollout.rollout.name == "transformers":
        engine = actor_rollout.rollout.checkpoint_engine
        if engine.backend == "naive":
            engine.backend = "ray_object_store"
            engine.custom_backend_module = "atropos_verl.backends.ray.weight_transfer"
        if not actor_rollout.rollout.nnodes:
            actor_rollout.rollout.nnodes = 1
            actor_rollout.hybrid_engine = False


@composition_errors()
def read_run(config: Any) -> RayRun:
    """Validate the ``atropos`` block and what it needs of verl's keys. Raises ``ConfigError`` naming what is wrong."""
    settings = RaySettings.from_mapping(plain(config.atropos), "atropos.")
    _check_verl_keys(config)
    algorithm = config.algorithm
    if settings.algorithm.advantage_path and (
        str(algorithm.adv_estimator) not in ("grpo", "rloo", "plain") or algorithm.use_kl_in_reward
    ):
        text = "verl would compute them; set algorithm.adv_estimator=grpo and algorithm.use_kl_in_reward=false"
        raise ConfigError(text, "atropos.algorithm.advantage_path")
    run = _as_run_config(config, settings)
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    name, budget = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu", None
    if actor.use_dynamic_bsz:
        budget = actor.ppo_max_token_len_per_gpu * (actor.get("ulysses_sequence_parallel_size") or 1)
    context, prompt = "actor_rollout_ref.rollout.max_model_len", config.data.max_prompt_length
    longest = ("atropos.data.max_token_len", run.max_token_len, name, budget, NO_MICRO_BATCH)
    refused = ("data.max_prompt_length", prompt, context, rollout.max_model_len, "such a prompt would be refused")
    check_bounds([longest, refused])
    return RayRun(config, settings, run)


def _as_run_config(config: Any, settings: RaySettings) -> RunConfig:
    """The same run in the local backend's words, for the services and the data pipeline that both share."""
    rollout, data, model = config.actor_rollout_ref.rollout, config.data, config.actor_rollout_ref.model
    block = settings.model_dump()
    estimator = str(config.algorithm.adv_estimator)
    values = {
        # The keys that both backends share, and then verl's.
        **{name: value for name, value in block.items() if name in RunConfig.model_fields},
        "steps": config.trainer.total_training_steps,
        "run_dir": str(config.run_dir),
        "batch_size": data.train_batch_size // parameter_sync_step(config) * rollout.n,
        "group_size": rollout.n,
        "save_freq": max(config.trainer.save_freq, -1),
        "resume": "disable" if config.trainer.resume_mode == "disable" else "auto",
        "max_response_length": data.max_response_length,
        "temperature": rollout.temperature,
        "atropos": {name: value for name, value in block.items() if name in AtroposConfig.model_fields},
        "model": {"path": model.path, "tokenizer_path": model.tokenizer_path, **block["model"]},
        "data": {
            "max_prompt_length": data.max_prompt_length,
            "default_temperature": rollout.temperature,
            **block["data"],
        },
        "algorithm": {
            # A placeholder for verl's other estimators, which verl computes.
            "adv_estimator": estimator if estimator in ("grpo", "rloo", "plain") else "plain",
            "norm_adv_by_std_in_grpo": config.algorithm.norm_adv_by_std_in_grpo,
            **block["algorithm"],
        },
        "supervise": plain(config.supervise) if "supervise" in config else {},
        "trainer": {
            "device": config.trainer.device if config.trainer.device in ("cpu", "cuda") else "auto",
            **{name: config.trainer[name] for name in ("project_name", "experiment_name")},
        },
    }
    return RunConfig.from_mapping(values)


def notes_for_model(config: Any) -> list[str]:
    """A line for each key that has the demo's value (``ray_cpu_demo.yaml``) beside a larger model."""
    from omegaconf import OmegaConf

    path = config.actor_rollout_ref.model.path
    return [
        f"{key}={value:g} is the demo model's; for one of the size of {path} try {better:g}"
        for (key, value), better in zip(_OF_THE_DEMO.items(), defaults_for(path).values(), strict=False)
        if OmegaConf.select(config, key) == value
    ]


def parameter_sync_step(config: Any) -> int:
    """Local updates between two weight syncs (verl's ``parameter_sync_step``; 1 but for separate_async)."""
    v1 = config.trainer.v1
    mode = v1.get(v1.trainer_mode)
    return int(mode.get("parameter_sync_step", 1)) if mode else 1


def _check_verl_keys(config: Any) -> None:
    trainer, algorithm = config.trainer, config.algorithm
    if (mode := trainer.v1.trainer_mode) not in ("sync", "colocate_async", "separate_async"):
        raise ConfigError(f"{mode!r} is none of sync, colocate_async, separate_async", "trainer.v1.trainer_mode")
    if not trainer.use_v1:
        raise ConfigError("the integration is built on verl's V1 trainer; leave it true", "trainer.use_v1")
    if not trainer.total_training_steps:
        raise ConfigError("set the number of steps; there is no dataset to count", "trainer.total_training_steps")
    if algorithm.filter_groups.enable:
        text = "verl filters prompts that it dispatched; let environments leave groups out (ensure_scores_are_not_same)"
        raise ConfigError(text, "algorithm.filter_groups.enable")
    if algorithm.adv_estimator == "gae" and not config.critic.enable:
        raise ConfigError("algorithm.adv_estimator=gae needs a critic; set it to true", "critic.enable")
    if config.reward.reward_model.enable:
        raise ConfigError("environments score their own rollouts; use an environment", "reward.reward_model.enable")
    if config.distillation.get("enabled"):
        raise ConfigError("verl's teachers see no Atropos rollouts yet; set it to false", "distillation.enabled")
    if not (trainer.val_before_train or trainer.val_only or trainer.test_freq > 0):
        return
    if not config.data.val_files:
        text = "verl's validation needs a prompt file (parquet); or val_before_train=False"
        raise ConfigError(text, "data.val_files")
    if config.reward.num_workers < 1:
        raise ConfigError("validation by verl needs at least one reward worker", "reward.num_workers")


def ray_help(values: Mapping[str, Any]) -> str:
    """The text of ``--help`` with ``backend=ray``. ``values``: the composed configuration."""
    about = """\
Train on Atropos environments with verl's V1 trainer on Ray. Every key of verl's ppo_trainer is there under its own
name (--cfg shows them), and the block atropos beside it. The default file is ray_cpu_demo, for two CPU cores."""
    examples = (
        "backend=ray trainer.total_training_steps=100 run_dir=runs/mine",
        "--config-name atropos_ray actor_rollout_ref.model.path=/models/mine trainer.n_gpus_per_node=8",
    )
    rows = [*describe(RaySettings, "atropos."), *describe(SuperviseConfig, "supervise.")]
    return help_text("train", about, examples, rows, values, " of the block atropos, and supervise")
