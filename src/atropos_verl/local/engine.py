"""The embedded engine of a local run: in a thread of the trainer's process, or in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from atropos_verl.config import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.inference.gate import RequestGate

if TYPE_CHECKING:
    from atropos_verl.inference.process_engine.engine import ProcessEngine
    from atropos_verl.inference.transformers_engine import TransformersEngine

    EmbeddedEngine = TransformersEngine | ProcessEngine

__all__ = ["make_engine", "placement_of"]

_LOG = "engine.log"


def placement_of(config: RunConfig, device: str) -> Literal["thread", "process"]:
    """Where the engine runs: ``inference.placement``, or by default a process where it computes while the trainer does.

    In a thread both take turns at the interpreter's lock (``benchmarks/bench_engine_placement.py``); where they never
    compute at the same time a process only costs its start.

    Raises:
        ConfigError: a process was asked for on another device than the CPU: weights are shared in the CPU's memory.
    """
    asked = config.inference.placement
    if device != "cpu":
        if asked == "process":
            raise ConfigError(f"process is for engines on a CPU, and this one runs on {device}", "inference.placement")
        return "thread"
    return asked or ("process" if config.is_overlapped else "thread")


def make_engine(
    config: RunConfig, model_path: Path, *, gate: RequestGate, device: str, num_threads: int | None, log_dir: Path
) -> EmbeddedEngine:
    """An engine that obeys ``gate``. One in a process is being started when this returns (``wait_ready``).

    Args:
        num_threads: of torch in the engine; None: torch's default.
        log_dir: where the output of an engine's process goes, ``engine.log``.
    """
    inference = config.inference
    # The trainer computes in this dtype whatever the checkpoint holds; logprobs must be of the same policy.
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[config.model.compute_dtype]
    settings: dict[str, Any] = {
        "max_running": inference.max_running,
        "max_context_len": inference.max_context_len or config.max_token_len,
        "release_weights": inference.release_weights,
        "keep_kv": config.overlap.kv_after_swap == "keep",
        "seed": config.seed,
        "num_threads": num_threads,
    }
    if placement_of(config, device) == "process":
        from atropos_verl.inference.process_engine.engine import ProcessEngine

        log_dir.mkdir(parents=True, exist_ok=True)
        return ProcessEngine(model_path, gate=gate, dtype=dtype, log_path=log_dir / _LOG, **settings)
    import torch

    from atropos_verl.inference.transformers_engine import TransformersEngine

    return TransformersEngine.from_pretrained(
        model_path, gate=gate, dtype=getattr(torch, dtype), device=device, **settings
    )
