"""The inference gateway in front of verl's replicas, in the task runner's process."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any, Self

from atropos_verl.backends.ray.llm_client import AttemptClient
from atropos_verl.backends.ray.llm_engine import LLMServerEngine
from atropos_verl.engine.gate import RequestGate
from atropos_verl.gateway import GatewayServer, create_app
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.provenance.throttle import StalenessThrottle

__all__ = ["ClusterGateway", "start_gateway"]

logger = logging.getLogger(__name__)


class ClusterGateway:
    """A running gateway: ``url`` for environments, ``gate`` for the trainer, ``engine`` for whoever generates here."""

    def __init__(self, engine: LLMServerEngine, gate: RequestGate, server: GatewayServer) -> None:
        self.engine = engine
        self.gate = gate
        self._server = server

    @property
    def url(self) -> str:
        """``http://host:port`` without a path, reachable from this machine."""
        return self._server.url

    def hold(self, *, drain: bool, timeout: float = 600.0) -> None:
        """Let no new request through.

        Args:
            drain: also wait, at most ``timeout`` seconds, until those in flight have their answers. Needed before
                replicas sleep that cannot hold a request (vLLM and SGLang; ``transformers`` can).

        Raises ``TimeoutError`` naming how many are still in flight; the gate stays shut.
        """
        if drain:
            self.gate.drain(timeout)
        else:
            self.gate.pause(timeout)

    def release(self, policy_version: int) -> None:
        """The replicas hold the weights of step ``policy_version`` and generate again: let requests through."""
        self.engine.set_policy_version(policy_version)
        self.gate.resume()

    def stop(self, timeout: float = 10.0) -> None:
        """Stop listening; requests in flight get ``timeout / 2`` seconds. Idempotent."""
        self._server.stop(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_gateway(
    llm_client: Any,
    tokenizer: Any,
    *,
    model_name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    api_key: str | None = None,
    ledger: Ledger | None = None,
    throttle: StalenessThrottle | None = None,
    request_timeout: float | None = 1200.0,
    start_timeout: float = 30.0,
) -> ClusterGateway:
    """Serve the environments' dialects over verl's replicas, from a thread of its own.

    Args:
        llm_client: verl's ``LLMServerClient`` (any kind); its ``config`` names model and lengths.
        tokenizer: the model's, with its chat template.
        model_name: what ``/v1/models`` says; None: ``actor_rollout_ref.model.path``.
        host, port: where to listen; port 0 takes a free one.
        api_key: bearer key; None: no key.
        ledger: is told which policy wrote which token of every answer.
        throttle: holds new prompts back (``off_policy.on_stale=wait``).
        request_timeout: seconds a request may take in all, a held one included.
        start_timeout: seconds until ``/health`` must answer.

    Raises ``ServiceError`` when the port is taken or the server does not start.
    """
    settings = llm_client.config.actor_rollout_ref
    engine = LLMServerEngine(
        AttemptClient.of(llm_client),
        tokenizer,
        max_context_len=_max_context_len(settings.rollout),
        vocab_size=max(len(tokenizer), _vocab_size(settings.model)),
        eos_token_ids=_eos_token_ids(settings.model.path, tokenizer),
    )
    gate = RequestGate()
    app = create_app(
        engine,
        tokenizer,
        gate=gate,
        ledger=ledger,
        throttle=throttle,
        model_name=model_name or settings.model.path,
        api_key=api_key,
        request_timeout=request_timeout,
    )
    server = GatewayServer(app, host=host, port=port)
    server.start(start_timeout)
    return ClusterGateway(engine, gate, server)


def _max_context_len(rollout: Any) -> int:
    return int(rollout.max_model_len or rollout.prompt_length + rollout.response_length)


def _vocab_size(model: Any) -> int:
    """Rows of the model's embedding, padding included: a replica may sample those as well."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        model.get("hf_config_path") or model.path, trust_remote_code=model.trust_remote_code
    )
    return int(config.get_text_config(decoder=True).vocab_size)


def _eos_token_ids(path: str, tokenizer: Any) -> set[int]:
    """End-of-sequence ids of the model's generation config and of the tokenizer."""
    from verl.utils.model import get_generation_config

    found: set[int] = set()
    for holder in (get_generation_config(path), tokenizer):
        value = getattr(holder, "eos_token_id", None)
        if value is not None:
            found.update(value if isinstance(value, (list, tuple)) else [value])
    return found
