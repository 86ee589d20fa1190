"""The parts of a local run that live in this process: engine, gate, gateway, policy worker, weight sync."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atropos_verl.backends.local.worker import PolicyWorker, import_verl
from atropos_verl.config.schema import RunConfig
from atropos_verl.engine.protocol import PinnedEngine, RequestGate
from atropos_verl.engine.runner import engine_threads
from atropos_verl.errors import ConfigError, EngineError, WeightSyncError
from atropos_verl.gateway.app import GatewayServer, create_app
from atropos_verl.gateway.sessions import SessionStore
from atropos_verl.http_thread import Listener
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.training.staleness import make_throttle
from atropos_verl.training.trace import TraceWriter
from atropos_verl.training.weight_sync import AtroposShardingManager, Canary, WeightSource
from atropos_verl.types import TrainingSample

if TYPE_CHECKING:
    from atropos_verl.engine.embedded import TransformersEngine

logger = logging.getLogger(__name__)


class LocalStack:
    """Loads model and tokenizer, builds engine and worker, starts the gateway (gate closed, no weights yet)."""

    def __init__(
        self,
        config: RunConfig,
        model_path: Path,
        source: WeightSource,
        gateway_listener: Listener | None,
        run_dir: Path,
        trace: TraceWriter,
    ) -> None:
        import torch
        from transformers import AutoConfig, AutoTokenizer

        from atropos_verl.engine.embedded import TransformersEngine

        with ExitStack() as built:  # what was made before something failed is ended
            self.gate = RequestGate()
            device = import_verl(config)
            model = AutoConfig.from_pretrained(str(model_path), trust_remote_code=config.model.trust_remote_code)
            threads, trainer_threads = share_cores(config, device, model)
            self.worker = PolicyWorker(config, model_path)
            built.callback(self.worker.close)
            self.tokenizer = AutoTokenizer.from_pretrained(config.model.tokenizer_path or str(model_path))
            self.engine = TransformersEngine.from_pretrained(
                model_path,
                tokenizer=self.tokenizer,
                trust_remote_code=config.model.trust_remote_code,
                gate=self.gate,
                # The trainer computes in this dtype whatever the checkpoint holds; logprobs must be of the same policy.
                dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[config.model.compute_dtype],
                device=device,
                max_running=config.inference.max_running,
                max_context_len=config.inference.max_context_len or config.max_token_len,
                release_weights=config.inference.release_weights,
                keep_kv=config.overlap.kv_after_swap == "keep",
                seed=config.seed,
                num_threads=threads,
            )
            built.callback(self.engine.close)
            if trainer_threads is not None:
                torch.set_num_threads(trainer_threads)  # of this thread, the trainer's
            self.gate.pause(timeout=60.0)
            self.engine.release_memory_occupation()
            self.ledger = Ledger(config.off_policy.ledger_bytes)
            built.callback(self.ledger.close)
            self.throttle = make_throttle(config.off_policy, self.ledger, config.batch_size)
            sessions = SessionStore(run_dir / "gateway", trace.session)
            built.callback(sessions.close)
            self.evaluated = PinnedEngine(self.engine)
            app = create_app(
                self.engine,
                self.tokenizer,
                gate=self.gate,
                ledger=self.ledger,
                throttle=self.throttle,
                evaluated=self.evaluated,
                max_new_tokens=config.max_response_length,
                model_name=str(model_path),
                sessions=sessions,
                on_request=trace.request,
                **config.gateway.for_app(),
            )
            settings = config.gateway
            self.gateway = GatewayServer(app, host=settings.host, port=settings.port, listener=gateway_listener)
            self.gateway.start(timeout=30.0)
            built.callback(self.gateway.stop, timeout=10.0)
            built.callback(self.evaluated.close)
            canary = _build_canary(config, self.worker, self.engine, self.tokenizer) if config.sync.canary else None
            self.sharding_manager = AtroposShardingManager(self.engine, source, gate=self.gate, canary=canary)
            # First: who waits at a shut gate is told at once, and the gateway has nobody left to wait for.
            built.callback(self.engine.close)
            # A part that fails to stop, or a second Ctrl-C, does not spare the others. A second time it does nothing.
            self.close = built.pop_all().close


def _build_canary(config: RunConfig, worker: PolicyWorker, engine: TransformersEngine, tokenizer: Any) -> Canary:
    ids = list(tokenizer.encode(config.sync.canary_text, add_special_tokens=False))[: config.max_token_len]
    if len(ids) < 2:
        raise ConfigError(f"{config.sync.canary_text!r} has fewer than two tokens", "sync.canary_text")
    mask = np.ones(len(ids), dtype=np.bool_)
    mask[0] = False
    sample = TrainingSample(token_ids=np.asarray(ids, dtype=np.int64), loss_mask=mask, advantages=np.zeros(len(ids)))

    def engine_logprobs() -> list[float]:
        try:
            return list(engine.compute_logprobs(ids))
        except EngineError as error:
            raise WeightSyncError(f"after the weight sync the engine gives no logprobs: {error}") from error

    return Canary(
        trainer_logprobs=lambda: worker.compute_logprobs([sample])[0][1:].tolist(),
        engine_logprobs=engine_logprobs,
        staged_logprobs=lambda: engine.compute_staged_logprobs(ids),
        threshold=config.canary_threshold,
    )


def share_cores(config: RunConfig, device: str, model: Any, cores: int | None = None) -> tuple[int | None, int | None]:
    """Torch threads of engine and trainer; None: torch's default.

    On a CPU, unless the settings or ``OMP_NUM_THREADS`` say otherwise, ``mode=overlap`` gives each half the cores:
    two pools that each expect every core wait for each other at every barrier; the engine of a small ``model`` (its
    Hugging Face configuration) gets one. ``cores`` None: those that this process may run on.
    """
    engine, trainer = config.inference.num_threads, config.trainer.num_threads
    if device == "cpu" and not os.environ.get("OMP_NUM_THREADS"):
        cores = cores or len(os.sched_getaffinity(0))
        half = max(1, cores // 2) if config.is_overlapped else None
        engine = engine or engine_threads(model, config.inference.max_running, half)
        if config.is_overlapped:
            trainer = trainer or max(1, cores - (engine or 1))
    return engine, trainer
