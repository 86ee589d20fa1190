"""The embedded engine of a local run: in a thread of the trainer's process, or in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from atropos_verl.config.schema import RunConfig
from atropos_verl.engine.gate import RequestGate
from atropos_verl.engine.process_engine.process import EngineProcess
from atropos_verl.errors import ConfigError

if TYPE_CHECKING:
    from atropos_verl.engine.embedded import TransformersEngine
    from atropos_verl.engine.process_engine.engine import ProcessEngine

    EmbeddedEngine = TransformersEngine | ProcessEngine

__all__ = ["make_engine", "placement_of", "start_early"]


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


def start_early(config: RunConfig, run_dir: Path) -> EngineProcess | None:
    """The engine's process, where the run will use one as far as can be said without torch: its imports then go on
    beside the trainer's. Ended by ``LocalStack`` where it is not needed after all, and with this process in any case.
    """
    device = config.trainer.device
    if device == "auto":
        device = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    return _new_process(run_dir) if placement_of(config, device) == "process" else None


def _new_process(run_dir: Path) -> EngineProcess:
    return EngineProcess(run_dir / "logs" / "engine.log")


def make_engine(
    config: RunConfig,
    model_path: Path,
    run_dir: Path,
    *,
    gate: RequestGate,
    device: str,
    num_threads: int | None,
    process: EngineProcess | None = None,
) -> EmbeddedEngine:
    """An engine that obeys ``gate``. One in a process is being started when this returns (``wait_ready``).

    Args:
        run_dir: of an engine's process the output goes to ``logs/engine.log`` in it.
        num_threads: of torch in the engine; None: torch's default.
        process: started early; used, or ended.
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
        from atropos_verl.engine.process_engine.engine import ProcessEngine

        process = process or _new_process(run_dir)
        return ProcessEngine(model_path, gate=gate, dtype=dtype, process=process, **settings)
    if process is not None:
        process.end(0.0)
    import torch

    from atropos_verl.engine.embedded import TransformersEngine

    return TransformersEngine.from_pretrained(
        model_path, gate=gate, dtype=getattr(torch, dtype), device=device, **settings
    )
