"""The inference gateway in front of verl's replicas, in the task runner's process.

A replica returns a request early when it is aborted for a weight update. The answer is then continued from the tokens
it has, with their logprobs and versions, at whichever replica is free: the environment sees one answer."""

import asyncio
import logging
import threading
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from verl.utils.model import get_generation_config
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from atropos_verl.engine.protocol import PinnedEngine, RequestGate
from atropos_verl.engine.requests import EngineLimits, StopStrings, eos_token_ids, validate
from atropos_verl.errors import AtroposVerlError, EngineError, EngineStoppedError, GenerationRequestError
from atropos_verl.gateway.app import GatewayServer, create_app
from atropos_verl.types import UNKNOWN_VERSION, Constraint, FinishReason, Generation, GenerationDelta, GenerationRequest

logger = logging.getLogger(__name__)

_ABORTED = ("aborted", "abort")
_TURNED_AWAY_WAIT = (0.02, 1.0)
"""Seconds before asking again after a replica returned nothing: the first wait, and the longest."""
_REQUEST_TIMEOUT = 1200.0  # in all, the time it is held included
_MOST_FAILURES = 8  # a request at which replicas fail or die is given up after so many
_DEAD_ENGINE = "EngineDeadError"  # vLLM's word for an engine whose server lives on
_NO_SERVER = "No available servers in load balancer"
_NO_SERVER_RETRY = 0.25
"""Seconds between two looks at a load balancer without servers (replicas lent to the trainer, or starting)."""


class ClusterGateway(GatewayServer):
    """Serves the environments over the replicas of verl's ``LLMServerClient``; ``gate`` is for the trainer."""

    def __init__(
        self, llm_client: Any, tokenizer: Any, *, host: str = "127.0.0.1", port: int = 0, **for_app: Any
    ) -> None:
        """``for_app``: for ``create_app``: who may call, ledger, throttle."""
        rollout, model = (llm_client.config.actor_rollout_ref[name] for name in ("rollout", "model"))
        limits = EngineLimits(
            max_context_len=int(rollout.max_model_len or rollout.prompt_length + rollout.response_length),
            vocab_size=max(len(tokenizer), embedding_rows(model)),
            eos_token_ids=frozenset(eos_token_ids(get_generation_config(model.path), tokenizer)),
        )
        # Another client of the same replicas.
        client = AttemptClient(config=llm_client.config, load_balancer_handle=llm_client._load_balancer)
        self.lost = client.lost
        self.engine = ReplicaEngine(client, tokenizer, limits, rollout.name)
        self.gate, self.evaluated = RequestGate(), PinnedEngine(self.engine)
        for_app |= {"gate": self.gate, "evaluated": self.evaluated, "model_name": model.path}
        for_app |= {"request_timeout": _REQUEST_TIMEOUT, "max_new_tokens": rollout.response_length}
        super().__init__(create_app(self.engine, tokenizer, **for_app), host=host, port=port)

    def release(self, policy_version: int) -> None:
        """Let requests through: the replicas hold the weights of step ``policy_version`` and generate again."""
        self.engine.policy_version = policy_version
        self.gate.resume()


def embedding_rows(model: Any) -> int:
    """Rows of the embedding of verl's ``actor_rollout_ref.model``, padding included: a replica may sample those."""
    from transformers import AutoConfig

    path, trusts = model.get("hf_config_path") or model.path, model.get("trust_remote_code", False)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trusts)
    return int(config.get_text_config(decoder=True).vocab_size)


class ReplicaEngine:
    """``GenerationEngine`` over an ``AttemptClient`` of verl's replicas of ``rollout.name`` ``kind``. Thread-safe."""

    def __init__(self, client: Any, tokenizer: Any, limits: EngineLimits, kind: str = "transformers") -> None:
        self._client, self._kind, self._tokenizer, self._limits = client, kind, tokenizer, limits
        self.max_context_len, self.eos_token_ids = limits.max_context_len, limits.eos_token_ids
        self._pieces: dict[int, str] = {}
        self.policy_version = -1  # newest trainer step seen in an answer or set after a weight update; -1 before

    async def agenerate(self, request: GenerationRequest) -> list[Generation]:
        """See ``GenerationEngine``. Aborts are invisible: no ``Generation`` ends with "abort"."""
        self._validate(request)
        try:
            async with asyncio.TaskGroup() as group:  # the first failure cancels the others and frees their slots
                own = group.create_task(self._own_prompt_logprobs(request))
                tasks = [group.create_task(self._complete(request, index)) for index in range(request.n)]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        return [task.result().result(own.result()) for task in tasks]

    def _validate(self, request: GenerationRequest) -> None:
        validate(request, self._limits)
        if request.top_logprobs:
            text = "verl's replicas report the sampled token's logprob only; leave top_logprobs out or send 0"
            raise GenerationRequestError(text, "top_logprobs")

    async def _own_prompt_logprobs(self, request: GenerationRequest) -> tuple[float, ...]:
        """[P-1] logprobs of the prompt's own tokens 1.. where verl returns the k best only; else nothing."""
        if not request.prompt_logprobs:
            return ()
        name = f"{request.request_id or uuid.uuid4().hex}-prompt"
        alone = replace(request, max_tokens=1, prompt_logprobs=0, constraint=None, stop=(), request_id=name)
        rows = (await self._complete(alone, 0)).result().prompt_logprobs
        assert rows is not None
        return tuple(next(iter(row.values())) for row in rows if row is not None)

    def astream(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """See ``GenerationEngine``. verl's replicas answer whole: a completion comes in one piece for each policy."""
        self._validate(request)
        return self._stream(request)

    async def _stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        tasks = [asyncio.ensure_future(self._complete(request, index)) for index in range(request.n)]
        try:
            for answer in asyncio.as_completed(tasks):
                for delta in (await answer).deltas():
                    yield delta
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _complete(self, request: GenerationRequest, index: int) -> "_Answer":
        """Generate one completion, over as many attempts as it takes."""
        stops = StopStrings(self._tokenizer, request.stop, self._pieces) if request.stop else None
        answer = _Answer(index, request, self._limits, stops)
        constrained = {} if request.constraint is None else to_structured(request.constraint, self._kind)
        # A name of its own for each: the load balancer spreads names, and keeps a name at its replica.
        name = f"{request.request_id or uuid.uuid4().hex}-{index}"
        (wait, longest), failures = _TURNED_AWAY_WAIT, 0
        while answer.finish_reason is None:
            done = len(answer.tokens)
            params = to_sampling_params(request, answer.budget - done, index=index, generated=done) | constrained
            prompt = [*request.prompt_token_ids, *answer.tokens]
            try:
                output = await self._client.generate(name, prompt_ids=prompt, sampling_params=params)
            except GenerationRequestError:
                raise
            except EngineError as error:  # another replica, or this one, may do it
                failures += 1
                if failures == _MOST_FAILURES:
                    text = f"rollout replicas failed {failures} times at this request, the last time: {error}"
                    raise EngineStoppedError(text) from error
                await asyncio.sleep(_NO_SERVER_RETRY)
                continue
            answer.take(output)
            self.policy_version = max([self.policy_version, *(v for v in answer.versions[-1:] if v is not None)])
            if answer.finish_reason is None:
                if constrained:  # a replica would begin the grammar again after what was sampled
                    answer = _Answer(index, request, self._limits, stops)
                if len(answer.tokens) == done:
                    await asyncio.sleep(wait)
                    wait = min(2 * wait, longest)
        return answer


@dataclass(slots=True)
class _Answer:
    """A completion that grows attempt by attempt."""

    index: int
    request: GenerationRequest
    limits: EngineLimits
    stops: StopStrings | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int | None] = field(default_factory=list)
    """The policy that sampled each token; None where the replica only knows the first and the last."""
    finish_reason: FinishReason | None = None
    prompt_logprobs: tuple[dict[int, float] | None, ...] | None = None

    @property
    def budget(self) -> int:
        """New tokens at most, over all attempts."""
        return self.limits.new_tokens(self.request)

    def take(self, output: Any) -> None:
        """Add what one attempt returned. Raises ``EngineError`` when tokens came without their logprobs."""
        logprobs = [] if output.log_probs is None else list(output.log_probs)
        if len(logprobs) != len(output.token_ids):
            raise EngineError(f"the replica sent {len(output.token_ids)} tokens with {len(logprobs)} logprobs")
        joint = len(self.tokens)
        self.tokens += [int(token) for token in output.token_ids]
        self.logprobs += [float(value) for value in logprobs]
        extra = output.extra_fields
        self.versions += _versions(len(output.token_ids), extra)
        if self.prompt_logprobs is None and self.request.prompt_logprobs is not None and "prompt_ids" in extra:
            # verl's layout: row t is about prompt token t+1, and the last row is padding.
            rows = zip(extra["prompt_ids"][:-1], extra["prompt_logprobs"][:-1], strict=True)
            self.prompt_logprobs = (None, *(dict(zip(ids, values, strict=True)) for ids, values in rows))
        if joint and self._stop_across(joint):
            self.finish_reason = "stop"
        elif output.stop_reason not in _ABORTED:
            self.finish_reason = self._reason(extra.get("finish_reason"))
        elif len(self.tokens) >= self.budget:
            self.finish_reason = "length"

    def _stop_across(self, joint: int) -> bool:
        """True when a stop string began before the abort and ends after it (a replica sees one attempt)."""
        if self.stops is None:
            return False
        longest = max(len(stop.encode()) for stop in self.request.stop)
        for end in range(joint + 1, min(len(self.tokens), joint + longest) + 1):
            if self.stops.completed_by(self.tokens[:end]):
                del self.tokens[end:], self.logprobs[end:], self.versions[end:]
                return True
        return False

    def _reason(self, said: str | None) -> FinishReason:
        """The replica's reason, or one found from its tokens: verl's vLLM server says "completed" for both."""
        if said == "length":
            return "length"
        stopped = said == "stop" or len(self.tokens) < self.budget or not self.tokens
        stopped = stopped or self.tokens[-1] in self.limits.stop_token_ids(self.request)
        return "stop" if stopped or (self.stops and self.stops.completed_by(self.tokens)) else "length"

    def deltas(self) -> Iterator[GenerationDelta]:
        """One for each policy, the last with the finish reason."""
        start = 0
        for version, run in groupby(self.versions or [None]):
            end = min(start + len(list(run)), len(self.tokens))
            yield GenerationDelta(
                index=self.index,
                token_ids=tuple(self.tokens[start:end]),
                logprobs=tuple(self.logprobs[start:end]),
                finish_reason=self.finish_reason if end == len(self.tokens) else None,
                policy_version=version,
            )
            start = end

    def result(self, own: Sequence[float] = ()) -> Generation:
        """The whole completion. ``own`` [P-1]: logprobs of the prompt's own tokens, put beside their alternatives."""
        assert self.finish_reason is not None
        if self.request.prompt_logprobs is not None and self.prompt_logprobs is None:
            raise EngineError("the replica returned no prompt_logprobs; this kind of replica does not have them")
        if own and self.prompt_logprobs is not None:
            rows = zip(self.request.prompt_token_ids[1:], own, self.prompt_logprobs[1:], strict=True)
            self.prompt_logprobs = (None, *({token: value} | (row or {}) for token, value, row in rows))
        named = (UNKNOWN_VERSION if version is None else version for version in self.versions)
        return Generation(
            token_ids=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            policy_version_runs=tuple((version, len(list(run))) for version, run in groupby(named)),
            prompt_logprobs=self.prompt_logprobs,
        )


def _versions(tokens: int, extra: dict[str, Any]) -> list[int | None]:
    """The policy that sampled each of an attempt's ``tokens``, as far as the replica says (-1: before any update)."""
    if runs := extra.get("policy_version_runs"):
        return [version for version, count in runs for _ in range(count)]
    steps = (extra["min_global_steps"], extra["max_global_steps"])
    first, last = (-1 if step is None else int(step) for step in steps)
    if tokens < 2:
        return [last] * tokens
    return [first, *([first if first == last else None] * (tokens - 2)), last]


class AttemptClient(LLMServerClient):  # type: ignore[misc]
    """Calls one replica once per ``generate``; verl's load balancer chooses it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lost = threading.Event()
        """A replica was found dead. It gets no more requests, and somebody has to replace it."""

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
    ) -> TokenOutput:
        """Return the tokens that the replica made before it was done or aborted. Cancelling frees its slot. Raises
        ``GenerationRequestError`` (it refuses), ``EngineStoppedError`` (it is dead), ``EngineError`` (it failed)."""
        server_id, server = await self._acquire(request_id, prompt_ids, sampling_params)
        own_id, about = (
            self._vllm_request_id(request_id),
            {"prompt_ids": prompt_ids, "sampling_params": sampling_params},
        )
        reference = server.generate.remote(request_id=own_id, **about, **kwargs)
        try:
            output: TokenOutput = await reference
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, EngineStoppedError) or type(cause).__name__ == _DEAD_ENGINE:
                ray.kill(server)  # without its engine it is of no use
                raise self._lost(server_id, cause) from error
            if isinstance(cause, AtroposVerlError):
                raise cause from error
            if isinstance(cause, ValueError):  # what vLLM and verl's servers raise for a request they cannot serve
                raise GenerationRequestError(str(cause)) from error
            raise EngineError(f"the rollout replica failed: {type(cause).__name__}: {cause}") from error
        except (RayActorError, TaskCancelledError) as error:
            raise self._lost(server_id, error) from error
        finally:
            self._release_server(server_id, request_id=request_id)
        steps = output.extra_fields.get("global_steps")
        output.extra_fields.setdefault("min_global_steps", steps)
        output.extra_fields.setdefault("max_global_steps", steps)
        return output

    def _lost(self, server_id: str, cause: Exception) -> EngineStoppedError:
        self._load_balancer.remove_servers.remote([server_id])
        self.lost.set()
        reason = str(cause).partition("\n")[0]  # Ray's error goes on for ten lines
        return EngineStoppedError(f"the rollout replica {server_id} is gone: {reason}")

    async def _acquire(self, request_id: str, prompt_ids: list[int], params: dict[str, Any]) -> tuple[str, Any]:
        while True:
            try:
                acquired = await self._acquire_server(request_id, prompt_ids=prompt_ids, sampling_params=params)
                return tuple(acquired)
            except RayActorError as error:  # the trainer, which looks for it then, ends with it
                self.lost.set()
                raise EngineStoppedError(f"verl's load balancer is gone: {error}") from error
            except RuntimeError as error:  # RayTaskError is one too
                if _NO_SERVER not in str(error):
                    raise
            await asyncio.sleep(_NO_SERVER_RETRY)


def to_sampling_params(request: GenerationRequest, max_tokens: int, *, index: int, generated: int) -> dict[str, Any]:
    """verl's parameters for completion ``index`` of ``request`` after ``generated`` tokens of it. They name what is
    not vLLM's default: SGLang does not know every word. Logprobs are always asked for."""
    params: dict[str, Any] = {"top_k": max(request.top_k, 0), "min_p": request.min_p, "ignore_eos": request.ignore_eos}
    params |= {"stop": list(request.stop), "stop_token_ids": list(request.stop_token_ids)}
    params = {name: value for name, value in params.items() if value}
    params |= {"max_tokens": max_tokens, "temperature": request.temperature, "top_p": request.top_p, "logprobs": True}
    if request.seed is not None:
        # Another stream per completion, and after an abort: the same numbers again would repeat the same draws.
        params["seed"] = (request.seed + 0x9E3779B1 * index + 0x85EBCA6B * generated) % (1 << 31)
    if request.prompt_logprobs is not None and generated == 0:
        params["prompt_logprobs"] = request.prompt_logprobs
    return params


def to_structured(constraint: Constraint, kind: str) -> dict[str, Any]:
    """verl's parameters for constrained decoding. Raises ``GenerationRequestError`` naming the client's field for what
    replicas of ``rollout.name`` ``kind`` cannot enforce."""
    if kind == "transformers":
        return {"constraint": constraint}
    if kind.startswith("vllm"):
        from vllm.sampling_params import StructuredOutputsParams

        # Lark: vLLM hands it to llguidance.
        form, text = ("json", constraint.json_schema) if constraint.json_schema else ("grammar", constraint.grammar)
        return {"structured_outputs": StructuredOutputsParams(**{form: text})}
    if kind == "sglang" and constraint.json_schema is not None:
        return {"json_schema": constraint.json_schema}
    text = f"{constraint.param}: replicas of rollout.name={kind} cannot enforce this; leave it out"
    raise GenerationRequestError(text, constraint.param)
