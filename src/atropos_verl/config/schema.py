"""Every setting of a run: typed, frozen, validated at construction, explained under each field. Imports neither torch
nor verl, so that a typo is reported before anything slow starts."""

import difflib
import json
import os
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from atropos_verl.assets import SMOLLM2, demo_model_path, smollm2_path
from atropos_verl.errors import ConfigError
from atropos_verl.http_thread import check_url, is_loopback, without_password

_VARIABLES = {
    "ATROPOS_API_URL": ("atropos", "api_url"),
    "ATROPOS_TIMEOUT": ("atropos", "timeout"),
    "ATROPOS_API_TOKEN": ("atropos", "token"),
    "ATROPOS_GATEWAY_KEY": ("gateway", "api_key"),
}

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Port = Annotated[int, Field(ge=0, le=65535)]
Place = Annotated[str, Field(min_length=1)]
"""A path. Empty, as of a variable that is not set, it would be the current directory."""


def _strings(value: Any) -> Any:
    """Variables and arguments are text, YAML's 1 and true are not."""
    if isinstance(value, Mapping):
        return {str(key): _strings(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strings(item) for item in value]
    return str(value).lower() if isinstance(value, bool) else str(value)


Variables = Annotated[dict[str, str], BeforeValidator(_strings)]
Words = Annotated[tuple[str, ...], BeforeValidator(_strings)]


class Section(BaseModel):
    """Base of the settings classes: unknown keys are refused, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], prefix: str = "") -> Self:
        """Validate a nested mapping. Raises ``ConfigError`` naming every key that is wrong, below ``prefix``."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise _as_config_error(error, cls, prefix) from None


def _check_header(name: str, secret: str | None) -> None:
    if secret and not (secret.isascii() and secret.isprintable() and secret.strip() == secret):
        raise ValueError(f"{name}: HTTP headers carry it; take printable ASCII without spaces around it")


class AtroposConfig(Section):
    """The trajectory API."""

    api_url: str | None = Field(None, description="URL of a running trajectory API; null: start one for this run")
    server: Literal["embedded", "upstream"] = Field("embedded", description="API to start: ours, or atroposlib's")
    timeout: PositiveFloat = Field(30.0, description="seconds; bound on one call to the API, its retries included")
    token: str | None = Field(None, description="bearer token for a protected API; this run's own has one")
    headers: dict[str, str] = Field(default_factory=dict, description="extra HTTP headers for the API")
    ca_file: str | None = Field(None, description="certificate authority file for https; null: the system's")
    lease_seconds: PositiveFloat | None = Field(120.0, description="until a gone trainer's batch returns; null: never")
    rollout_timeout: PositiveFloat = Field(600.0, description="seconds without a batch after which the run ends")
    reset: bool = Field(False, description="GET /reset_data before registering (forgets what an earlier run left)")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.api_url is not None:
            check_url(self.api_url, "api_url")
        _check_header("token", self.token)
        return self


class OwnModelConfig(Section):
    """What verl has no key for."""

    dropout: bool = Field(False, description="dropout, layerdrop and router jitter, as the model's config asks")


class ModelConfig(OwnModelConfig):
    """The policy."""

    path: str | None = Field(None, description=f"Hugging Face model directory, or {SMOLLM2}; null: the demo model")
    tokenizer_path: str | None = Field(None, description="tokenizer directory; null: the model's")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="dtype of the trained (master) weights")
    compute_dtype: Literal["fp32", "bf16"] = Field("fp32", description="dtype of forward and backward")
    attn_implementation: str = Field("sdpa", description="attention of transformers")
    enable_gradient_checkpointing: bool = Field(False, description="recompute activations in the backward")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    override_config: dict[str, Any] = Field(default_factory=dict, description="passed to the Hugging Face config")


class OptimConfig(Section):
    """AdamW, with verl's names."""

    lr: NonNegative = Field(5e-4, description="learning rate; of a model larger than the demo's by its size")
    weight_decay: NonNegative = Field(0.0, description="AdamW weight decay")
    betas: tuple[Below1, Below1] = Field((0.9, 0.99), description="AdamW betas")
    clip_grad: PositiveFloat = Field(1.0, description="bound on the gradient norm")
    lr_warmup_steps: int = Field(0, ge=0, description="linear warm-up, in steps")
    lr_scheduler_type: Literal["constant", "cosine"] = Field("constant", description="after the warm-up")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="cosine: last learning rate over the first")


class OwnAlgorithmConfig(Section):
    """The user's advantages."""

    advantage_path: str | None = Field(None, description="your package.module:function instead: docs/extensions.md")


class AlgorithmConfig(OwnAlgorithmConfig):
    """From scores to advantages."""

    adv_estimator: Literal["grpo", "rloo", "plain"] = Field("grpo", description="baseline of a group; plain: none")
    norm_adv_by_std_in_grpo: bool = Field(True, description="divide by the group's standard deviation")


class OwnLossConfig(Section):
    """The user's loss, and what is added to any."""

    path: str | None = Field(None, description="your package.module:function instead: docs/extensions.md")
    ref_weight: NonNegative = Field(0.001, description="factor of the KL to the ref_logprobs of an environment")


class LossConfig(OwnLossConfig):
    """The loss, and the settings of the clipped-ratio one (verl's names and defaults)."""

    type: Literal["advantage_weighted_sft", "grpo"] | None = Field(None, description="null: by use_advantage_weighting")
    clip_ratio_low: NonNegative = Field(0.2, description="grpo: lower clip of the ratio")
    clip_ratio_high: NonNegative = Field(0.2, description="grpo: upper clip of the ratio")
    clip_ratio_c: float = Field(3.0, gt=1, description="grpo: dual clip for negative advantages")
    ppo_epochs: PositiveInt = Field(1, description="grpo, distill.alone: passes over one batch")
    ppo_mini_batches: PositiveInt = Field(1, description="grpo, distill.alone: optimiser steps per pass")


class DistillConfig(Section):
    """A teacher of the same vocabulary: the KL to it is added to the loss (docs/distillation.md)."""

    teacher: str | None = Field(None, description="model directory of a teacher that the run itself asks; null: none")
    top_k: PositiveInt = Field(16, description="tokens that it names for each trained one, beside that itself")
    weight: NonNegative = Field(1.0, description="factor of the KL per trained token; an override distill_weight wins")
    alone: bool = Field(False, description="advantages are 0 where a teacher's values are: the KL is the whole loss")


class GroupsConfig(Section):
    """The treatment of groups before they are trained on."""

    max_token_len: PositiveInt | None = Field(None, description="tokens of a sequence; null: prompt + response length")
    overlong: Literal["drop", "truncate", "error"] = Field("drop", description="what to do with longer sequences")
    on_bad_group: Literal["quarantine", "error"] = Field("quarantine", description="what to do with invalid groups")
    ignore_fields: tuple[str, ...] = Field((), description="ScoredData fields to ignore that this trainer cannot use")
    filter_path: str | None = Field(None, description="your package.module:function that leaves groups out")


class DataConfig(GroupsConfig):
    """The same, and what a group need not say itself."""

    max_prompt_length: PositiveInt = Field(64, description="tokens at most; of larger models 1024, or half the context")
    default_temperature: PositiveFloat = Field(1.0, description="temperature of groups that name none")


class RewardConfig(Section):
    """The score of a rollout, where the environment's is not the one to train on."""

    path: str | None = Field(None, description="your package.module:function that scores: docs/extensions.md")


class OffPolicyConfig(Section):
    """Rollouts of an older policy than the one that is trained: what is known about them, and what is done."""

    ledger_bytes: PositiveInt = Field(256 << 20, description="of the ledger, which knows the version of every token")
    unmatched: Literal["repair", "use", "drop"] = Field(
        "repair",
        description="trained tokens that the gateway did not generate; repair: text that it did gets its own ids back, "
        "without logprobs of the environment's, the rest is trained; use: all are trained; drop: none is",
    )
    max_staleness: int | None = Field(None, ge=0, description="largest, of a group, in policy versions; null: no bound")
    on_stale: Literal["drop", "wait"] = Field("drop", description="wait: hold prompts back that would be too stale")
    importance: Literal["auto", "token", "sequence"] | None = Field(
        "auto", description="truncated importance weights; null: off; auto: token with mode=overlap or loss.type=grpo"
    )
    importance_cap: PositiveFloat = Field(2.0, description="their upper bound")


class GatewayConfig(Section):
    """The HTTP surface that environments call."""

    host: str = Field("127.0.0.1", description="address to bind")
    port: Port = Field(0, description="0: any free port")
    api_key: str | None = Field(None, description="key that environments must send; null: the run makes one")
    advertise_url: str | None = Field(None, description="URL at which environments reach it, if another")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.advertise_url is not None:
            check_url(self.advertise_url, "advertise_url")
        _check_header("api_key", self.api_key)
        return self

    def for_app(self) -> dict[str, Any]:
        """Who may call the gateway, and with what, as ``gateway.app.create_app`` takes it."""
        host, hosts = self.host.strip("[]").lower(), tuple[str, ...]()
        if is_loopback(host):  # anywhere else other machines call it by names that nobody knows here
            advertised = urlsplit(self.advertise_url or "").hostname or host
            hosts = ("127.0.0.1", "localhost", "::1", host, advertised)
        return {"api_key": self.api_key, "allowed_hosts": hosts, "advertise_url": self.advertise_url}


class InferenceConfig(Section):
    """The embedded engine."""

    max_running: PositiveInt = Field(64, description="sequences generated at the same time")
    max_context_len: PositiveInt | None = Field(None, description="tokens; null: the sequence bound of the data")
    release_weights: bool = Field(True, description="free the engine's weights, too, while the trainer trains")
    num_threads: PositiveInt | None = Field(None, description="torch's, of the engine; null: on CPU 1 for small models")


class ProgramConfig(Section):
    """The program of an environment."""

    script: str | None = Field(None, description="path of an Atropos environment; null and no module: the demo's")
    module: str | None = Field(None, description="started with python -m instead of a script")
    python: str | None = Field(None, description="its interpreter, or a virtual environment; null: this one")
    args: Words = Field((), description='further arguments, e.g. ["--env.some_key","3"]; they come last and win')
    env: Variables = Field(default_factory=dict, description="environment variables")
    cwd: str | None = Field(None, description="its working directory; null: the run directory")

    @model_validator(mode="after")
    def _one_program(self) -> Self:
        named = [name for name in ("script", "module", "ecosystem") if getattr(self, name, None) is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(f'{name} ({getattr(self, name)})' for name in named)} exclude each other")
        return self


class EnvConfig(ProgramConfig):
    """The environment that is started when no atropos.api_url is given."""

    max_batches_offpolicy: PositiveInt | None = Field(None, description="batches queued ahead; null: 1, with overlap 2")
    startup_timeout: PositiveFloat = Field(180.0, description="seconds until its first batch")


class EvalConfig(Section):
    """Held-out score, by the environment's own `evaluate` command."""

    before: bool = Field(True, description="evaluate before the first step")
    after: bool = Field(True, description="evaluate after the last step")
    every: PositiveInt | None = Field(None, description="evaluate every N steps; with mode=overlap beside the training")
    keep_best: bool = Field(False, description="a checkpoint at each evaluation; checkpoints/best links to the best")
    timeout: PositiveFloat = Field(300.0, description="seconds for one evaluation")
    commands_file: str | None = Field(None, description="set by the launcher: JSON with the evaluations to run")


class SyncConfig(Section):
    """Weight sync, trainer → engine."""

    canary: bool = Field(True, description="after every sync compare the engine's logprobs with the trainer's")
    canary_threshold: PositiveFloat | None = Field(None, description="largest difference; null: 1e-3, with bf16 0.25")
    canary_text: str = Field("The quick brown fox jumps over the lazy dog.", description="what is compared")


class OverlapConfig(Section):
    """Rollouts that go on while the trainer trains (``mode=overlap``)."""

    kv_after_swap: Literal["recompute", "keep"] = Field("recompute", description="keep: logprobs of mixed versions")


class TrainerConfig(Section):
    """verl's engine and trackers."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    num_threads: PositiveInt | None = Field(None, description="torch's; null: all of them, with mode=overlap half")
    strategy: Literal["fsdp2", "fsdp"] = Field("fsdp2", description="verl engine")
    max_token_len_per_gpu: PositiveInt = Field(16384, description="tokens of a micro-batch; shared prefixes count once")
    share_prefixes: bool = Field(True, description="compute a prefix that sequences of a micro-batch share once")
    logger: tuple[str, ...] = Field((), description="verl trackers, beside metrics.jsonl: tensorboard, wandb, …")
    project_name: str = Field("atropos_verl", description="name for trackers and wandb_project at the API")
    experiment_name: str = Field("demo", description="name for trackers and wandb_group at the API")
    max_ckpt_to_keep: PositiveInt | None = Field(2, description="checkpoints to keep; null: all")


class SuperviseConfig(Section):
    """Watching and restarting the processes of a run."""

    stall_after: PositiveFloat = Field(120.0, description="seconds without a batch before the diagnosis is printed")
    backoff: PositiveFloat = Field(1.0, description="seconds before the first restart; doubles with each")
    max_backoff: PositiveFloat = Field(30.0, description="largest number of seconds before a restart")
    healthy_after: PositiveFloat = Field(300.0, description="seconds of life after which restarts are counted anew")
    log_bytes: PositiveInt = Field(64 << 20, description="of a service's log at most; it then moves to LOG.old")


class JournalConfig(Section):
    """Batches that are kept on disk."""

    keep: int = Field(4, ge=0, description="trained batches to keep, for falling back to the checkpoint before")
    quarantine_bytes: PositiveInt = Field(1 << 30, description="bytes of refused groups to keep; the oldest go first")


class TraceConfig(Section):
    """The index of rollouts, ``run_dir/trace.sqlite``."""

    bytes: PositiveInt = Field(256 << 20, description="of the index; half of its older half is removed when it is full")


class CommonConfig(Section):
    """Keys of both backends; the Ray backend has them in its block ``atropos``."""

    advantage_normalization: Literal["none", "batch", "global"] = Field("none", description="over trained tokens")
    advantage_clipping: tuple[float, float] | None = Field(None, description="[low, high] or null")
    batch_retry_attempts: PositiveInt = Field(8, description="quick tries of one wait for a batch")
    batch_retry_delay: PositiveFloat = Field(0.3, description="seconds before the second try; grows by 1.5")
    batch_max_wait_time: PositiveFloat = Field(12.0, description="seconds; bound on one whole wait for a batch")
    reward: RewardConfig = Field(default_factory=RewardConfig)
    journal: JournalConfig = Field(default_factory=JournalConfig)
    trace: TraceConfig = Field(default_factory=TraceConfig)
    off_policy: OffPolicyConfig = Field(default_factory=OffPolicyConfig)
    distill: DistillConfig = Field(default_factory=DistillConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    env: EnvConfig = Field(default_factory=EnvConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    sync: SyncConfig = Field(default_factory=SyncConfig)


class RunConfig(CommonConfig):
    """One training run."""

    mode: Literal["sync", "overlap"] = Field("sync", description="overlap: rollouts go on while the trainer trains")
    steps: PositiveInt = Field(60, description="optimiser steps (batches) of the whole run")
    seed: int = Field(0, ge=0, lt=1 << 32, description="seed of sampling, of the environment and of the trainer")
    run_dir: Place | None = Field(None, description="directory of the run; null: runs/NAME-DATE-TIME")
    batch_size: PositiveInt = Field(64, description="sequences per step")
    group_size: PositiveInt = Field(8, description="sequences per prompt")
    save_freq: int = Field(20, ge=-1, description="checkpoint every N steps and at the end; -1: never")
    resume: str = Field("auto", description="auto: newest checkpoint in run_dir; disable; or a checkpoint path")
    max_response_length: PositiveInt = Field(32, description="new tokens a turn; larger models: 1024, or half context")
    temperature: PositiveFloat = Field(1.0, description="of rollouts that the trainer itself samples")
    use_advantage_weighting: bool | None = Field(None, description="false: GRPO's ratio; null: by loss.type, else true")
    atropos: AtroposConfig = Field(default_factory=AtroposConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    inference: InferenceConfig = Field(default_factory=InferenceConfig)
    overlap: OverlapConfig = Field(default_factory=OverlapConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    supervise: SuperviseConfig = Field(default_factory=SuperviseConfig)
    _notes: tuple[str, ...] = PrivateAttr(())

    @property
    def notes(self) -> tuple[str, ...]:
        """What was chosen for the model where the user said nothing, a line each."""
        return self._notes

    def public(self) -> dict[str, Any]:
        """Every value as JSON has it, keys and tokens left out: for files, trackers and logs."""
        values = self.model_dump(mode="json")
        hide_secrets(values["atropos"], values["gateway"], values["env"])
        return values

    def with_values(self, **sections: Mapping[str, Any]) -> Self:
        """The same with other values in some sections: section → key → value."""
        update = {name: getattr(self, name).model_copy(update=values) for name, values in sections.items()}
        return self.model_copy(update=update)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        loss, weighted, clipping = self.loss, self.use_advantage_weighting, self.advantage_clipping
        if self.batch_size % self.group_size:
            raise ValueError(f"batch_size ({self.batch_size}) is no multiple of group_size ({self.group_size})")
        if clipping is not None and not clipping[0] < clipping[1]:
            raise ValueError(f"advantage_clipping {list(clipping)}: the lower bound must be below the upper one")
        if self.eval.keep_best and self.save_freq <= 0:
            raise ValueError(f"eval.keep_best needs checkpoints, and save_freq={self.save_freq} writes none")
        if weighted is not None and loss.type is not None and weighted != (loss.type != "grpo"):
            raise ValueError(f"use_advantage_weighting={weighted} contradicts loss.type={loss.type}; set one")
        if self.data.max_token_len is not None and self.data.max_token_len <= self.max_response_length:
            text = f"({self.data.max_token_len}) leaves no room for a prompt beside max_response_length"
            raise ValueError(f"data.max_token_len {text} ({self.max_response_length})")
        if loss.path is not None and (loss.type is not None or weighted is not None):
            raise ValueError("loss.path is the loss; leave loss.type and use_advantage_weighting null beside it")
        taught = self.distill.alone and self.distill.teacher is not None  # the KL is the whole loss
        if loss.ppo_epochs * loss.ppo_mini_batches > 1 and not (loss.path or taught or self.loss_type == "grpo"):
            raise ValueError("loss.ppo_epochs and loss.ppo_mini_batches above 1 need loss.type=grpo (its ratio)")
        if self.gateway.api_key is None and not is_loopback(self.gateway.host):
            text = "serves the policy to the network without a key; set gateway.api_key"
            raise ValueError(f"gateway.host={self.gateway.host} {text}")
        return self

    @property
    def loss_type(self) -> str:
        """``advantage_weighted_sft`` or ``grpo``."""
        return self.loss.type or ("grpo" if self.use_advantage_weighting is False else "advantage_weighted_sft")

    @property
    def max_token_len(self) -> int:
        return self.data.max_token_len or self.data.max_prompt_length + self.max_response_length

    @property
    def is_overlapped(self) -> bool:
        return self.mode == "overlap"

    @property
    def max_batches_offpolicy(self) -> int:
        return self.env.max_batches_offpolicy or (2 if self.is_overlapped else 1)

    @property
    def importance(self) -> Literal["token", "sequence"] | None:
        """Level of the importance weights; None: off."""
        level = self.off_policy.importance
        if level == "auto":
            return "token" if self.is_overlapped or self.loss_type == "grpo" else None
        return level

    @property
    def canary_threshold(self) -> float:
        """Largest absolute logprob difference, in nats, between trainer and engine after a sync."""
        return self.sync.canary_threshold or {"fp32": 1e-3, "bf16": 0.25}[self.model.compute_dtype]

    def evaluates_at(self, step: int) -> bool:
        """True when ``eval.every`` asks for a held-out evaluation between ``step`` and the next."""
        return self.eval.every is not None and 0 < step < self.steps and step % self.eval.every == 0

    @property
    def is_attached(self) -> bool:
        """True when the trajectory API is the user's and nothing but the gateway is started."""
        return self.atropos.api_url is not None

    def resolve_run_dir(self) -> Path:
        """The run directory, absolute; named by date and time where none is given. Creates nothing."""
        if self.run_dir is not None:
            return Path(self.run_dir).expanduser().absolute()
        return Path("runs", time.strftime(f"{self.trainer.experiment_name}-%Y%m%d-%H%M%S")).absolute()

    def resolve_model_path(self) -> Path:
        """The model directory. Raises ``ConfigError`` naming ``model.path`` when it is not one."""
        if self.model.path is None:
            return demo_model_path()
        if self.model.path == SMOLLM2:
            return smollm2_path()
        path = Path(self.model.path).expanduser()
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} is not a Hugging Face model directory (no config.json in it)", "model.path")
        return path.absolute()


def hide_secrets(atropos: dict[str, Any], gateway: dict[str, Any], *with_variables: dict[str, Any]) -> None:
    """Blank keys, tokens, and what headers and variables say (their names stay), in sections as JSON has them."""
    for section, key in ((atropos, "token"), (gateway, "api_key")):
        if key in section:
            section[key] = None
    for section, key in ((atropos, "headers"), *((section, "env") for section in with_variables)):
        if section.get(key):
            section[key] = dict.fromkeys(section[key], "***")
    if url := atropos.get("api_url"):
        atropos["api_url"] = without_password(url).replace("//***@", "//")


Bound = tuple[str, float, str, float | None, str]
"""A setting and its value, the setting that bounds it and its value (None: none), and what happens above it."""
NO_MICRO_BATCH = "no micro-batch has room for such a sequence"


def bounds_of(config: RunConfig) -> list[Bound]:
    """Settings of a run that bound each other."""
    supervise, longest, micro_batch = config.supervise, config.max_token_len, config.trainer.max_token_len_per_gpu
    prompt, context = config.data.max_prompt_length, config.inference.max_context_len
    return [
        ("data.max_token_len", longest, "trainer.max_token_len_per_gpu", micro_batch, NO_MICRO_BATCH),
        ("data.max_prompt_length", prompt, "inference.max_context_len", context, "such a prompt would be refused"),
        ("loss.ppo_mini_batches", config.loss.ppo_mini_batches, "batch_size", config.batch_size, "some would be empty"),
        ("supervise.backoff", supervise.backoff, "supervise.max_backoff", supervise.max_backoff, "it is never reached"),
    ]


def check_bounds(bounds: Sequence[Bound]) -> None:
    """Raises ``ConfigError`` for the first setting above the one that bounds it, with names and values of both."""
    for name, value, bound_name, bound, reason in bounds:
        if bound is not None and value > bound:
            text = f"{name} ({value:g}) is above {bound_name} ({bound:g}): {reason}; raise {bound_name} or lower {name}"
            raise ConfigError(text)


def did_you_mean(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _as_config_error(error: ValidationError, model: type[BaseModel], prefix: str) -> ConfigError:
    """pydantic's error about a ``model``, with every wrong key by its dotted name below ``prefix``."""
    found = list[tuple[str, str]]()
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("function-", "constrained-")))
        key = f"{prefix}{key}".rstrip(".")
        message = str(item["msg"]).removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            known = [name.replace(".NAME.", f".{item['loc'][:2][-1]}.") for name, *_ in describe(model, prefix)]
            message = f"unknown key{did_you_mean(key, known)} (--help lists all keys)"
        elif item["type"] != "value_error":
            message = f"{message}, got {item['input']!r}"
        found.append((key, message))
    if len(found) == 1:
        return ConfigError(found[0][1], found[0][0])
    result = ConfigError("\n".join(f"{key}: {message}" if key else message for key, message in found))
    result.key = next((key for key, _ in found if key), "")
    return result


def apply_environment(values: dict[str, Any], command_line_keys: Set[str] = frozenset()) -> dict[str, Any]:
    """Put ``_VARIABLES`` over the file's values, but not over keys (dotted) that the command line set."""
    result = {**values, "atropos": dict(values.get("atropos") or {})}
    for variable, (section, key) in _VARIABLES.items():
        value = os.environ.get(variable, "").strip()
        if value and f"{section}.{key}" not in command_line_keys:
            result[section] = {**(result.get(section) or {}), key: value}
    return result


Row = tuple[str, Any, str]
"""A key with its default and its meaning."""


def describe(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[Row]:
    """Every key as ``(prefix + dotted name, default, meaning)``, in the order of the schema, for ``--help``; those of
    each model in a mapping as ``mapping.NAME.key``."""
    rows: list[Row] = []
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            rows += describe(annotation, f"{prefix}{name}.")
        elif get_origin(annotation) is dict and hasattr(of_each := get_args(annotation)[1], "model_fields"):
            rows += describe(of_each, f"{prefix}{name}.NAME.")
        else:
            rows.append((f"{prefix}{name}", info.get_default(call_default_factory=True), info.description or ""))
    return rows


def help_rows(rows: Sequence[Row], values: Mapping[str, Any]) -> str:
    """The rows of ``describe`` as lines of ``--help``, with the values of a configuration, as YAML has them."""
    width, lines = max(len(name) for name, *_ in rows), []
    for name, value, text in rows:
        found: Any = values
        for part in name.split("."):  # of environments.NAME there is none
            found = found.get(part, value) if isinstance(found, Mapping) else value
        lines.append(f"  {name:<{width}}  {text} ({json.dumps(found, default=list)})\n")
    return "".join(lines)
