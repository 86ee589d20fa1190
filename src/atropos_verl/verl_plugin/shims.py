"""Workarounds for faults of verl 0.9.1, TransferQueue 0.1.11 and Ray 2.60.

Each says what the fault is and when it can be removed. Some have to be elsewhere: the platform (``plugin.py``), the cut
of micro-batches (``engines.py``), variables (``__init__.py``), and vLLM's CPU build (``tests/support/vllm_cpu.py``).
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def let_trackers_fail() -> None:
    """A tracker that cannot write (its disk is full, its host is gone) ends no run: ``metrics.jsonl`` has the step.

    verl calls them one after the other, and lets the first error out. Remove when it does not."""
    from verl.utils.tracking import Tracking

    def log(self: Any, data: Any, step: int, backend: Any = None) -> None:
        for name, tracker in self.logger.items():
            if backend is None or name in backend:
                try:
                    tracker.log(data=data, step=step)
                except OSError as error:
                    logger.warning("step %d did not reach %s (trainer.logger): %s", step, name, error)

    Tracking.log = log


def start_ray(**options: Any) -> None:
    """``ray.init``, also on a busy machine.

    Ray gives its own node 30 s to be known, a constant, and leaves its processes when they are over. Remove when it can
    be set (ray/_private/node.py)."""
    import ray
    from ray._private import services

    known, end = services.get_node, time.monotonic() + 300.0

    def get_node(*args: Any) -> Any:
        while True:
            try:
                return known(*args)
            except RuntimeError:
                if time.monotonic() > end:
                    raise
            time.sleep(0.5)

    services.get_node = get_node
    try:
        ray.init(**options)
    finally:
        services.get_node = known


def init_cpu_process_group() -> None:
    """Make verl's process group before verl does, which asks for one only where none exists. On CPU only.

    verl asks for the backends "cpu:gloo,cpu:gloo" there, which torch refuses. Remove when it names each device once
    (utils/distributed.py)."""
    import torch
    from verl.utils.device import get_device_name

    if get_device_name() == "cpu" and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            backend="cpu:gloo",
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            init_method=os.environ.get("DIST_INIT_METHOD"),
        )


def own_copies(save: Any) -> Any:
    """``save`` (module → ``({name: (tensor, spec)}, spec)``) with tensors of its own.

    verl's ``fsdp2_sharded_save_to_cpu`` keeps ``tensor.cpu()``, which on CPU is the live weight: the old policy of
    separate_async would be the new one. Remove when verl clones (utils/fsdp_utils.py:1180)."""

    def save_copies(module: Any) -> Any:
        state, spec = save(module)
        return {name: (tensor.clone(), own) for name, (tensor, own) in state.items()}, spec

    return save_copies


@contextlib.contextmanager
def without_pinned_offload(engine_config: Any) -> Iterator[None]:
    """On CPU, verl builds a forward-only engine as it builds one that trains: without an offload policy.

    ``CPUOffloadPolicy(pin_memory=True)`` needs an accelerator. Remove when verl picks the offload policy by platform
    (transformer_impl.py:462)."""
    from verl.utils.device import get_device_name

    forward_only = engine_config.forward_only
    if get_device_name() == "cpu":
        engine_config.forward_only = False
    try:
        yield
    finally:
        engine_config.forward_only = forward_only


def leave_no_lock_files() -> None:
    """Makes directories without verl's lock files in the temporary directory, where nothing ever removes them.

    Their names hold ``hash(path)``, which differs from process to process: they lock nothing. Remove when verl removes
    them, or makes directories without a lock (utils/fs.py:277, ``local_mkdir_safe``)."""
    from verl.utils import fs
    from verl.utils.checkpoint import fsdp_checkpoint_manager

    def make_directory(path: str) -> str:
        Path(path).mkdir(parents=True, exist_ok=True)
        return str(Path(path).absolute())

    fs.local_mkdir_safe = fsdp_checkpoint_manager.local_mkdir_safe = make_directory


def keep_optimiser_settings() -> None:
    """What an engine's optimiser was built with, learning rate, weight decay and betas, outlives a loaded checkpoint.

    verl restores the optimiser's groups and the base of its schedule with the settings of the run that saved them, and
    looks at its own never again. Remove when it applies them (utils/checkpoint/fsdp_checkpoint_manager.py:242)."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    load = FSDPEngine.load_checkpoint

    def load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> None:
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        own = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        load(self, *args, **kwargs)
        schedule = self.lr_scheduler
        if schedule is not None:
            schedule.base_lrs = [settings["initial_lr"] for settings in own]
            factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
            schedule._last_lr = [rate * factor for rate, factor in zip(schedule.base_lrs, factors, strict=True)]
            own = [{**settings, "lr": rate} for settings, rate in zip(own, schedule._last_lr, strict=True)]
        for group, settings in zip(groups and self.optimizer.param_groups, own, strict=True):
            group.update(settings)

    FSDPEngine.load_checkpoint = load_checkpoint
