"""The simulated run: durations, and the rules of one configuration."""

from collections.abc import Callable
from dataclasses import dataclass

StepTimes = Callable[[int, float], tuple[float, float, float]]
"""(number of the step, from 0; its trained tokens) → seconds of training, of weight sync, and of everything else."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Everything that does not depend on who waits for whom. Times in seconds, lengths in tokens.

    Lengths and latencies are log-normal: ``spread`` is the standard deviation of the logarithm (0: all alike; 0.6: the
    longest tenth is about five times the shortest tenth).
    """

    environments: int = 1
    workers: int = 8
    """Groups that one environment makes at a time (``max_num_workers_per_node``)."""
    group_size: int = 8
    """Sequences of a group."""
    batch_size: int = 64
    """Sequences of a step."""
    steps: int = 100
    mean_tokens: float = 1000.0
    """Of one sequence's answer."""
    token_spread: float = 0.6
    max_tokens: int = 16384
    latency: float = 0.0
    """Mean seconds from the end of a group's generation to its arrival: tools, verifiers, reward models."""
    latency_spread: float = 0.0
    step_overhead: float = 0.0
    """Of a step, beside training and sync: decoding, logging, checkpoints."""
    sync_seconds: float = 0.0
    swap_pause: float = 0.0
    """Seconds that generation stands still while weights are swapped (``mode=overlap``)."""
    environment_period: float = 0.105
    """From one look of an environment at the queue to the next: atroposlib sleeps 0.1 seconds, and asks."""
    post_seconds: float = 0.0
    answer_seconds: float = 0.0
    """Of environments: see ``environment.Environment``. An environment posts one group at a time."""
    take_seconds: float = 0.0
    """Of the trainer, from a batch's hand-out until it is ready: journal, decoding, samples."""
    poll_delay: float = 0.3
    poll_attempts: int = 8
    poll_seconds: float = 12.0
    """``batch_retry_delay``, ``batch_retry_attempts``, ``batch_max_wait_time``: the trainer's polls of GET /batch."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Machines and rules of one configuration."""

    overlap: bool
    gen_capacity: float
    """Tokens per second of all generation together, at full load."""
    sequence_rate: float
    """Tokens per second of one sequence when it has the machine to itself."""
    slots: int
    """Sequences that are generated at a time; more wait in line."""
    train_rate: float
    """Tokens per second of all training together."""
    max_staleness: int | None = None
    max_batches_offpolicy: int = 1
    """Batches that may wait in the queue before environments stop (``env.max_batches_offpolicy``)."""
