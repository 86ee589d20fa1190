"""The parts of a local run that live in this process: engine, gate, gateway, policy worker, weight sync."""

from __future__ import annotations

import logging
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atropos_verl.backends.local.cores import share_cores
from atropos_verl.backends.local.worker import PolicyWorker, resolve_device
from atropos_verl.config.schema import RunConfig
from atropos_verl.engine.gate import RequestGate
from atropos_verl.errors import ConfigError, EngineError, WeightSyncError
from atropos_verl.gateway.app import GatewayServer, create_app
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.provenance.throttle import StalenessThrottle
from atropos_verl.training.rollout_flow import make_throttle
from atropos_verl.training.weight_sync import AtroposShardingManager, Canary
from atropos_verl.types import TrainingSample

if TYPE_CHECKING:
    import torch

    from atropos_verl.engine.embedded import TransformersEngine

__all__ = ["LocalStack"]

logger = logging.getLogger(__name__)


class _VersionedPolicy:
    """``WeightSource`` over the worker; the version is the number of optimiser steps taken in this run."""

    def __init__(self, worker: PolicyWorker) -> None:
        self._worker = worker
        self.policy_version = 0

    def named_tensors(self) -> Any:
        return self._worker.named_tensors()


@dataclass
class LocalStack:
    """Built by ``LocalStack.build``; ``close`` ends threads and sockets, in the order in which they depend."""

    worker: PolicyWorker
    engine: TransformersEngine
    gate: RequestGate
    gateway: GatewayServer
    ledger: Ledger
    throttle: StalenessThrottle | None
    tokenizer: Any
    policy: _VersionedPolicy
    sharding_manager: AtroposShardingManager
    vocab_size: int

    @classmethod
    def build(
        cls,
        config: RunConfig,
        model_path: Path,
        *,
        gateway_listener: socket.socket | None = None,
    ) -> LocalStack:
        """Load model and tokenizer, build engine and worker, start the gateway (gate closed, no weights yet)."""
        with ExitStack() as built:  # what was made before something failed is ended
            made = cls._build(config, model_path, gateway_listener, built)
            built.pop_all()
            return made

    @classmethod
    def _build(
        cls, config: RunConfig, model_path: Path, gateway_listener: socket.socket | None, built: ExitStack
    ) -> LocalStack:
        import torch
        from transformers import AutoConfig, AutoTokenizer

        gate = RequestGate()
        device = resolve_device(config.trainer.device)
        model = AutoConfig.from_pretrained(str(model_path), trust_remote_code=config.model.trust_remote_code)
        threads = share_cores(config, device, model)
        worker = PolicyWorker(config, model_path)
        built.callback(worker.close)
        tokenizer = AutoTokenizer.from_pretrained(config.model.tokenizer_path or str(model_path))
        engine = _make_engine(config, model_path, gate, device, threads.engine)
        built.callback(engine.close)
        if threads.trainer is not None:
            torch.set_num_threads(threads.trainer)  # of this thread, the trainer's
        gate.pause(timeout=60.0)
        engine.release_memory_occupation()
        ledger = Ledger(config.off_policy.ledger_bytes)
        throttle = make_throttle(config.off_policy, ledger, config.batch_size)
        app = create_app(
            engine,
            tokenizer,
            gate=gate,
            ledger=ledger,
            throttle=throttle,
            model_name=str(model_path),
            api_key=config.gateway.api_key,
        )
        gateway = GatewayServer(app, host=config.gateway.host, port=config.gateway.port, listener=gateway_listener)
        gateway.start(timeout=30.0)
        built.callback(gateway.stop, timeout=10.0)
        policy = _VersionedPolicy(worker)
        canary = _build_canary(config, worker, engine, tokenizer) if config.sync.canary else None
        manager = AtroposShardingManager(engine, policy, gate=gate, canary=canary)
        return cls(worker, engine, gate, gateway, ledger, throttle, tokenizer, policy, manager, engine.vocab_size)

    def close(self) -> None:
        """Stop gateway, engine and worker. Safe to call twice."""
        with ExitStack() as stack:  # a part that fails to stop, or a second Ctrl-C, does not spare the others
            stack.callback(self.ledger.close)
            stack.callback(self.worker.close)
            stack.callback(self.gateway.stop, timeout=10.0)
            # First: who waits at a shut gate is told at once, and the gateway has nobody left to wait for.
            stack.callback(self.engine.close)


def _make_engine(
    config: RunConfig, model_path: Path, gate: RequestGate, device: str, num_threads: int | None
) -> TransformersEngine:
    import torch

    from atropos_verl.engine.embedded import TransformersEngine

    return TransformersEngine.from_pretrained(
        model_path,
        gate=gate,
        # The trainer computes in this dtype whatever the checkpoint holds; logprobs must be of the same policy.
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[config.model.compute_dtype],
        device=device,
        max_running=config.inference.max_running,
        max_context_len=config.inference.max_context_len or config.max_token_len,
        release_weights=config.inference.release_weights,
        keep_kv=config.overlap.kv_after_swap == "keep",
        seed=config.seed,
        num_threads=num_threads,
    )


def _build_canary(config: RunConfig, worker: PolicyWorker, engine: TransformersEngine, tokenizer: Any) -> Canary:
    ids = list(tokenizer.encode(config.sync.canary_text, add_special_tokens=False))[: config.max_token_len]
    if len(ids) < 2:
        raise ConfigError(f"{config.sync.canary_text!r} has fewer than two tokens", "sync.canary_text")
    mask = np.ones(len(ids), dtype=np.bool_)
    mask[0] = False
    sample = TrainingSample(token_ids=np.asarray(ids, dtype=np.int64), loss_mask=mask, advantages=np.zeros(len(ids)))

    def trainer_logprobs() -> list[float]:
        return [float(value) for value in worker.compute_logprobs([sample])[0][1:]]

    def engine_logprobs() -> list[float]:
        try:
            return list(engine.compute_logprobs(ids))
        except EngineError as error:
            raise WeightSyncError(f"after the weight sync the engine cannot be asked for logprobs: {error}") from error

    return Canary(
        trainer_logprobs=trainer_logprobs,
        engine_logprobs=engine_logprobs,
        staged_logprobs=lambda: engine.compute_staged_logprobs(ids),
        threshold=config.canary_threshold,
    )


def padded_rows(samples: list[TrainingSample]) -> torch.Tensor:
    """Advantages of ``samples`` as one right-padded float32 tensor [B, L]."""
    import torch

    width = max((len(sample) for sample in samples), default=0)
    rows = torch.zeros(len(samples), width)
    for row, sample in zip(rows, samples, strict=True):
        row[: len(sample)] = torch.from_numpy(sample.advantages)
    return rows
