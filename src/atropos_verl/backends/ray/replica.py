"""The embedded engine as a verl rollout replica: ``actor_rollout_ref.rollout.name=transformers`` (docs/cluster.md)."""

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import get_device_name, get_resource_name
from verl.workers.config import HFModelConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutMode, RolloutReplica, TokenOutput

from atropos_verl.backends.ray.weight_transfer import WeightBucket, WeightReceiver, send_weights, standalone_worker
from atropos_verl.engine.embedded import TransformersEngine
from atropos_verl.engine.runner import engine_threads
from atropos_verl.errors import ConfigError, EngineError, GenerationRequestError, WeightSyncError
from atropos_verl.gateway.app import GatewayServer, create_app
from atropos_verl.types import Generation, GenerationRequest

logger = logging.getLogger(__name__)

_PAUSE_TIMEOUT = 120.0  # seconds until the running engine step must have ended
_ABORT_INTERVAL = 0.05

_SAME_NAME = ("temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", "prompt_logprobs", "constraint")
_NEUTRAL = {"n": 1, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "min_tokens": 0}
"""Parameters the embedded engine does not have, and the values at which, like None, they change nothing."""
_TEXT_ONLY = {"logprobs", "skip_special_tokens", "include_stop_str_in_output", "detokenize", "response_length"}
"""Parameters about the form of the answer, which is tokens here."""
_PATTERNS = ("alpha_pattern", "rank_pattern", "target_parameters", "modules_to_save")
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "bias", *_PATTERNS)
"""peft settings that, where they are set, change the merged weights in ways not implemented here."""
_ADAPTER_SETTINGS = (*_UNSUPPORTED, "lora_alpha", "use_rslora")
"""What ``LoraMerger`` reads of an adapter's config. The rest may hold objects of peft's own classes."""


class TransformersServer:
    """The actor, with verl's methods (``vLLMHttpServer``). docs/cluster.md has its own settings, ``engine_kwargs``."""

    def __init__(
        self, config: Any, model_config: Any, rollout_mode: RolloutMode, replica_rank: int, visible_devices: str
    ) -> None:
        if visible_devices:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices
        logging.basicConfig(level=os.environ.get("VERL_LOGGING_LEVEL", "WARN"))
        self.config = omega_conf_to_dataclass(config)
        self.model_config = omega_conf_to_dataclass(model_config, dataclass_type=HFModelConfig)
        self.rollout_mode, self.replica_rank = rollout_mode, replica_rank
        self.global_steps: int | None = None
        self._asleep = self._aborted = self._rejecting = False
        self._gate_lock = asyncio.Lock()
        self._running: dict[str, asyncio.Task[list[Generation]]] = {}
        self._settings: dict[str, Any] = {}
        self._receiver = WeightReceiver(self._apply_weights)
        self._engine: TransformersEngine
        self._lora: LoraMerger | None = None

    async def launch_server(self) -> str:
        """Load the model, start engine and HTTP server; returns ``host:port``, which names this server to verl."""
        settings = dict((self.config.engine_kwargs or {}).get("transformers", None) or {})
        api_key = settings.pop("api_key", None)
        self._engine = await asyncio.to_thread(self._build_engine, settings)
        # With load_format=dummy nothing may be generated before the first update.
        self._has_weights = self.config.load_format != "dummy"
        await self._apply_gate()
        address = ray.util.get_node_ip_address()
        if api_key is None:
            return f"{address}:{os.getpid()}"
        names = {"model_name": self.model_config.path, "api_key": api_key}
        app = create_app(self._engine, self.model_config.tokenizer, **names)
        self._http = GatewayServer(app, host=address.strip("[]"))
        return (await asyncio.to_thread(self._http.start, 30.0)).removeprefix("http://")

    def _build_engine(self, settings: dict[str, Any]) -> TransformersEngine:
        model_config, device = self.model_config, get_device_name()
        lora = model_config.lora_rank > 0 or model_config.lora_adapter_path is not None
        lora = lora and not model_config.lora.get("merge", False)
        seed, max_running = self.replica_rank + self.config.seed, min(self.config.max_num_seqs, 256)
        own = {"num_threads": None, "max_running": max_running, "seed": seed} | settings
        if len(own) > 3:
            text = f"unknown setting(s) among {', '.join(own)}; known: api_key, max_running, num_threads, seed"
            raise ConfigError(text, "actor_rollout_ref.rollout.engine_kwargs.transformers")
        if own["num_threads"] is None and device == "cpu":
            # Ray starts actors with one OpenMP thread; engine and trainer take turns, so each may use all cores.
            cores = min(os.cpu_count() or 1, 16)
            own["num_threads"] = engine_threads(model_config.hf_config, own["max_running"], cores)
        engine = TransformersEngine.from_pretrained(
            model_config.local_path,
            tokenizer=model_config.tokenizer,
            trust_remote_code=model_config.trust_remote_code,
            dtype=getattr(torch, self.config.dtype),
            max_context_len=self.config.max_model_len or self.config.prompt_length + self.config.response_length,
            device=device,
            # With an adapter the base weights stay here: the trainer never sends them again.
            release_weights=self.rollout_mode is RolloutMode.HYBRID and not lora,
            **own,
        )
        if lora:
            self._lora = LoraMerger(dict(engine.model.named_parameters(remove_duplicate=False)))
        return engine

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **media: Any
    ) -> TokenOutput:
        """Generate one completion. Raises ``GenerationRequestError`` naming the parameter, or ``EngineError``."""
        if any(media.get(f"{kind}_data") is not None for kind in ("image", "video", "audio")):
            raise EngineError("rollout.name=transformers generates from text only; this request has images or sound")
        key = f"{request_id}-{uuid.uuid4().hex}"
        request = to_request(prompt_ids, sampling_params, self.config, self._engine.max_context_len, key)
        generation: Generation | None = None
        if not self._rejecting:
            task = self._running[key] = asyncio.ensure_future(self._engine.agenerate(request))
            try:
                [generation] = await task
            finally:
                del self._running[key]
        if generation is None or not generation.token_ids:
            nothing = {"global_steps": self.global_steps, "finish_reason": "abort"}
            return TokenOutput(token_ids=[], log_probs=None, stop_reason="aborted", extra_fields=nothing)
        oldest, newest = generation.policy_versions
        extra: dict[str, Any] = {
            "global_steps": newest,
            "min_global_steps": oldest,
            "max_global_steps": newest,
            "policy_version_runs": generation.policy_version_runs,
            "finish_reason": generation.finish_reason,
        }
        if generation.prompt_logprobs is not None:
            # As verl's vLLM server lays them out, [P][k]: entry t is about prompt token t + 1, and the last is padding.
            k = max(sampling_params["prompt_logprobs"], 1)  # 0: the token itself
            entries = (entry or {} for entry in generation.prompt_logprobs[1:])
            best = [sorted(entry.items(), key=lambda item: -item[1])[:k] for entry in entries] + [[(0, 0.0)] * k]
            extra["prompt_ids"] = [[token for token, _ in row] for row in best]
            extra["prompt_logprobs"] = [[value for _, value in row] for row in best]
        return TokenOutput(
            token_ids=list(generation.token_ids),
            log_probs=list(generation.logprobs) if sampling_params.get("logprobs") else None,
            stop_reason="aborted" if generation.finish_reason == "abort" else "completed",
            extra_fields=extra,
        )

    async def abort_all_requests(self, reset_prefix_cache: bool = True, reject_request: bool = False) -> dict[str, Any]:
        """Stop generating; requests of ``generate`` return what they have. Until ``resume_generation``."""
        del reset_prefix_cache  # there is none between requests, and new weights drop the running ones' cache
        self._aborted, self._rejecting = True, reject_request
        await self._apply_gate()
        running = dict(self._running)
        waiting = set(running.values())
        deadline = time.monotonic() + _PAUSE_TIMEOUT
        while waiting and time.monotonic() < deadline:
            # Again and again: a request that had not reached the engine yet is not found the first time.
            for key in running:
                self._engine.abort(key)
            _, waiting = await asyncio.wait(waiting, timeout=_ABORT_INTERVAL)
        return {"aborted_count": len(running), "request_ids": list(running)}

    async def resume_generation(self) -> None:
        """Go on after ``abort_all_requests``."""
        self._aborted = self._rejecting = False
        await self._apply_gate()

    async def sleep(self) -> None:
        """Stop at a token boundary and release memory. Nothing to do for a standalone replica."""
        if self.rollout_mode is RolloutMode.STANDALONE or not self.config.free_cache_engine:
            return
        self._asleep = True
        await self._apply_gate()
        await asyncio.to_thread(self._engine.release_memory_occupation)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Take memory again (``weights``), and go on (``kv_cache``); None does both."""
        if self.rollout_mode is RolloutMode.STANDALONE:
            return
        if tags is None or "weights" in tags:
            await asyncio.to_thread(self._engine.resume_memory_occupation)
        if tags is None or "kv_cache" in tags:
            self._asleep = False
            await self._apply_gate()

    async def _apply_gate(self) -> None:
        # One at a time: two calls at once must leave the gate as the later state says.
        async with self._gate_lock:
            if self._asleep or self._aborted or not self._has_weights:
                await asyncio.to_thread(self._engine.gate.pause, _PAUSE_TIMEOUT)
            else:
                self._engine.gate.resume()

    async def _nothing(self, **_: Any) -> None:
        """No cache is kept between requests, new weights drop that of the running ones, and there is no profiler."""

    clear_kv_cache = release_kv_cache = resume_kv_cache = start_profile = stop_profile = _nothing

    async def receive_weights(
        self, update_id: str, bucket: WeightBucket, last: bool, settings: dict[str, Any]
    ) -> int | None:
        """Take one bucket of an update (``weight_transfer``); the last one returns the bytes copied.

        ``settings``: ``global_steps`` (None: the version stays), ``peft_config`` (the tensors are an adapter's),
        ``base_sync`` (they are the base weights of a model with adapters)."""
        self._settings = settings
        copied: int | None = await self._receiver.receive(update_id, bucket, last)
        if last:
            self.global_steps = self._engine.policy_version
        if last and not settings["base_sync"]:  # base weights alone are not the policy
            self._has_weights = True
            await self._apply_gate()
        return copied

    def _apply_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
        steps, peft_config = self._settings["global_steps"], self._settings["peft_config"]
        if (peft_config is None) is not (self._lora is None):
            text = "verl 0.9.1 sends its adapter to colocated replicas only; set it to True"
            raise ConfigError(text, "actor_rollout_ref.model.lora.merge")
        if self._lora is not None and self._settings["base_sync"]:
            tensors = self._lora.set_base(tensors)
        elif self._lora is not None:  # merged before the engine stops for the copy
            tensors = iter(list(self._lora.merge(tensors, peft_config)))
        version = self._engine.policy_version if steps is None else steps
        return self._engine.update_weights_from_tensor(tensors, policy_version=version)


class TransformersReplica(RolloutReplica):  # type: ignore[misc]
    """Starts one server per training worker: the embedded engine does not split a model over devices."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.world_size != 1:
            text = f"rollout.name=transformers runs on one device, not {self.world_size}: set all parallel sizes to 1"
            raise ConfigError(text, "actor_rollout_ref.rollout.tensor_model_parallel_size")

    async def launch_servers(self) -> None:
        node_id, devices = await self.workers[0].__ray_call__.remote(_node_and_devices)
        role = "reward_" if self.is_reward_model else "teacher_" if self.is_teacher_model else ""
        actor = ray.remote(TransformersServer).options(
            name=f"{self.config.name}_server_{role}{self.replica_rank}_0{self.name_suffix}",
            num_cpus=0,
            max_concurrency=self.max_concurrency,
            scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id, soft=False),
            runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},
        )
        server = actor.remote(self.config, self.model_config, self.rollout_mode, self.replica_rank, devices)
        self.servers, self._server_handle = [server], server
        self._server_address = await server.launch_server.remote()

    def get_ray_class_with_init_args(self) -> Any:
        return standalone_worker(self)


def _node_and_devices(_: Any) -> tuple[str, str]:
    """Runs in the worker: returns its node and its devices ("" on CPU)."""
    context = ray.get_runtime_context()
    devices = [] if get_device_name() == "cpu" else context.get_accelerator_ids()[get_resource_name()]
    return context.get_node_id(), ",".join(devices)


def to_request(
    prompt_ids: Sequence[int], params: dict[str, Any], config: Any, max_context_len: int, request_id: str
) -> GenerationRequest:
    """Turns the arguments of verl's server into a request. ``config`` is verl's ``RolloutConfig``.

    Without ``max_tokens``: ``response_length`` at most and ``prompt_length + response_length`` in all, as verl. Raises
    ``GenerationRequestError`` naming a parameter that the embedded engine would have to ignore."""
    prompt = tuple(int(token) for token in prompt_ids)
    default = min(config.response_length, config.prompt_length + config.response_length - len(prompt))
    params = {name: value for name, value in params.items() if value is not None and name not in _TEXT_ONLY}
    wanted = int(params.pop("max_tokens", params.pop("max_new_tokens", default)))
    stop, stop_ids = params.pop("stop", ()), params.pop("stop_token_ids", ())
    settings: dict[str, Any] = {"ignore_eos": bool(config.ignore_eos)}
    settings |= {name: params.pop(name) for name in _SAME_NAME if name in params}
    for name, value in params.items():
        if value != _NEUTRAL.get(name):
            raise GenerationRequestError(f"{name}={value!r} is not supported by rollout.name=transformers", name)
    return GenerationRequest(
        prompt_token_ids=prompt,
        max_tokens=max(1, min(wanted, max_context_len - len(prompt))),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(stop_ids),
        request_id=request_id,
        **settings,
    )


class TransformersServerAdapter(BaseRollout):  # type: ignore[misc]
    """Connects a training worker (or a ``CheckpointEngineWorker``) with its replica, which runs on one device."""

    is_leader_rank = True  # verl asks for it: the one rank of a replica talks to its server

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1, **_: Any) -> None:
        super().__init__(config, model_config, device_mesh)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank
        self.server_handle: Any = None

    @property
    def server(self) -> Any:
        """The replica's actor, which is started after this adapter, and again when it has died. Raises
        ``RayActorError``, as its methods do, while there is none."""
        if self.server_handle is None:
            try:
                self.server_handle = ray.get_actor(f"{self.config.name}_server_{self.replica_rank}_0")
            except ValueError as error:
                raise RayActorError(error_msg=str(error)) from error
        return self.server_handle

    async def resume(self, tags: list[str]) -> None:
        with contextlib.suppress(RayActorError):  # see update_weights
            await self.server.wake_up.remote(tags=tags)

    async def release(self) -> None:
        await self.server.sleep.remote()

    @torch.no_grad()
    async def update_weights(
        self,
        weights: Any,
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        peft_config: dict[str, Any] | None = None,
        base_sync_done: bool = True,
        **_: Any,
    ) -> None:
        """Send ``weights`` (or, with ``peft_config``, an adapter's) into the replica as policy ``global_steps``.

        Raises ``WeightSyncError`` naming what does not fit. A dead replica is no error here: this rank takes part in
        the collectives of the others, and the trainer asks afterwards who lives."""
        if wire_format != "named_tensors":
            raise NotImplementedError(f"rollout.name={self.config.name} takes named tensors, not {wire_format!r}")
        settings = {
            "global_steps": global_steps,
            "peft_config": None if peft_config is None else {key: peft_config.get(key) for key in _ADAPTER_SETTINGS},
            "base_sync": peft_config is not None and not base_sync_done,
        }
        try:
            await send_weights(
                lambda *part: self.server.receive_weights.remote(*part, settings),
                weights,
                self.config.checkpoint_engine.update_weights_bucket_megabytes << 20,
            )
        except RayActorError as error:
            logger.warning("weights of step %s did not reach replica %d: %s", global_steps, self.replica_rank, error)


class LoraMerger:
    """The engine holds ``W0 + scaling * B @ A``, only the adapter travels: the base of every weight that it changed is
    kept. ``parameters``: the engine's, by name: the base weights, until the first adapter arrives.

    verl sends adapters under peft's names, such as ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``.
    Formula: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; scaling alpha / r, or, with rsLoRA,
    alpha / sqrt(r) (Kalajdzievski, 2023)."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._parameters = dict(parameters)
        self.base: dict[str, torch.Tensor] = {}  # the weights that an adapter has changed so far, without it

    def set_base(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Take base weights from the trainer (``load_format=dummy``); ``.base_layer`` is removed from the names."""
        for name, tensor in tensors:
            plain = name.replace(".base_layer.", ".")
            if plain in self.base:
                self.base[plain] = tensor.detach().clone()
            yield plain, tensor

    def merge(
        self, adapter: Iterable[tuple[str, torch.Tensor]], peft_config: Mapping[str, Any]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every parameter of the engine: merged where the adapter changes it, itself where not.

        Computed in float32 and rounded once to the engine's dtype. Raises ``WeightSyncError``, which names the setting
        or the weight."""
        for key in _UNSUPPORTED:
            if (value := peft_config.get(key)) and value != "none":
                text = (
                    f"{key}={value!r} of the adapter is not supported by rollout.name=transformers; send merged weights"
                )
                raise WeightSyncError(f"{text}: actor_rollout_ref.model.lora.merge=True")
        # An earlier adapter may have changed a weight that this one leaves alone.
        merged = dict(self.base)
        for module, factors in _pairs(adapter).items():
            name = f"{module}.weight"
            weight = tuple(self._parameters[name].shape) if name in self._parameters else ()
            shapes = {half: tuple(factor.shape) for half, factor in factors.items()}
            rank = shapes.get("A", (0,))[0]
            if len(weight) != 2 or shapes != {"A": (rank, weight[1]), "B": (weight[0], rank)}:
                text = f"the adapter's factors {shapes} do not fit {name!r} of the engine: {weight or None}"
                raise WeightSyncError(text)
            if name not in self.base:
                self.base[name] = self._parameters[name].detach().clone()
            base = self.base[name]
            scaling = float(peft_config.get("lora_alpha") or rank)
            scaling /= rank**0.5 if peft_config.get("use_rslora") else rank
            down, up = (factors[half].float().to(base.device) for half in "AB")
            merged[name] = (up @ down).mul_(scaling).add_(base.float()).to(base.dtype)
        for name, parameter in self._parameters.items():
            yield name, merged.get(name, parameter)


def _pairs(adapter: Iterable[tuple[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """``{module: {"A": [r, in], "B": [out, r]}}``."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in adapter:
        plain = name.removeprefix("base_model.model.").replace(".default.", ".")
        module, _, tail = plain.rpartition(".lora_")
        if not module or tail not in ("A.weight", "B.weight"):
            raise WeightSyncError(f"{name!r} is not a LoRA factor of a linear layer; others are not supported here")
        pairs.setdefault(module, {})[tail[0]] = tensor
    if not pairs:
        raise WeightSyncError("the trainer sent an adapter without any tensor")
    return pairs
