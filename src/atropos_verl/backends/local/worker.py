"""verl's ``TrainingWorker`` in this process, or one per rank under torchrun.

Rank 0 runs the trainer and calls the methods here; each call is broadcast, and the other ranks, which sit in
``serve()``, run the same method on their share of the samples."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any, TypeVar, cast

import numpy as np
import torch

from atropos_verl import verl_plugin
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import CheckpointError, ConfigError, TrainingDivergedError
from atropos_verl.training.extensions import load_loss
from atropos_verl.training.losses import LARGEST, advantage_weighted_sft_loss, clipped_ratio_loss, summarise_importance
from atropos_verl.training.samples import posted_columns
from atropos_verl.types import FloatArray, LossOutput, TrainingSample
from atropos_verl.verl_plugin.prefix_forest import partition, sort_by_prefix

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

_COLLECTIVE_TIMEOUT = timedelta(hours=24)  # other ranks wait in a broadcast while rank 0 waits for rollouts
_ONE_INTERRUPT_SECONDS = 1.0
"""Signals this close together are one: torchrun passes on to its workers the Ctrl-C that they got from the terminal."""

_STOPPING = "stopping: the trainer ends its step and writes its checkpoint (interrupt again to end at once)\n"
_MEETING_SECONDS, _MEETING_LOOK_SECONDS = 1800.0, 60.0  # for all ranks to start, and between two warnings meanwhile


@contextlib.contextmanager
def held_interrupts(*, deliver: bool = True) -> Iterator[None]:
    """Delivers SIGINT, SIGTERM and SIGHUP when the block ends, after a whole step; a second, over 1 s later, at once.
    An exception of the block drops the signal: its cause is the better explanation. ``deliver=False`` drops the first
    signal altogether. Blocks may be nested. Only the main thread gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first: list[tuple[int, float]] = []

    def note(number: int, frame: FrameType | None) -> None:
        if not first:
            first.append((number, time.monotonic()))
            logger.info("%s: finishing the current step", signal.Signals(number).name)
            # Standard error may be in the middle of a write, which refuses another one, or be gone.
            with contextlib.suppress(RuntimeError, OSError):
                sys.stderr.write(_STOPPING if verl_plugin.own_rank()[0] == 0 else "")
                sys.stderr.flush()
        elif time.monotonic() - first[0][1] > _ONE_INTERRUPT_SECONDS:
            restored.close()
            signal.raise_signal(number)

    with contextlib.ExitStack() as restored:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # None: not set by Python, so it could not be put back. Ignored: nohup's SIGHUP.
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                restored.callback(signal.signal, number, signal.signal(number, note))
        yield
    if first and deliver:
        signal.raise_signal(first[0][0])


def import_verl(config: RunConfig) -> str:
    """Imports what the worker needs of verl; returns ``"cpu"`` or ``"cuda"``. Takes seconds, once. Raises
    ``ConfigError`` without the GPU that is asked for, and ``RuntimeError`` when verl has picked another device."""
    device, visible = config.trainer.device, os.environ.get("CUDA_VISIBLE_DEVICES")
    if device != "cpu" and not torch.cuda.is_available():
        reason = "torch finds no GPU" if visible is None else f"CUDA_VISIBLE_DEVICES={visible!r} leaves torch no GPU"
        if device == "cuda":
            raise ConfigError(f"{reason}; set the variable, or trainer.device=cpu", "trainer.device")
        if visible is not None:
            logger.warning("trainer.device=auto is the CPU: %s", reason)
        device = "cpu"
    elif device == "auto":
        device = "cuda"
    verl_plugin.activate(device)
    with warnings.catch_warnings():
        # One for each engine whose package is not installed, none of which is asked for; deprecations in what they use.
        warnings.simplefilter("ignore")
        import verl.workers.engine_workers  # noqa: F401

        import atropos_verl.verl_plugin.engines  # noqa: F401  registers the engines

    return device


def _on_every_rank(method: F) -> F:
    """Marks a method that rank 0 calls: the other ranks, which sit in ``serve()``, make the same call."""

    @functools.wraps(method)
    def call(self: PolicyWorker, *arguments: Any) -> Any:
        self._broadcast(method.__name__, *arguments)
        self._is_inside = True
        result = method(self, *arguments)
        self._is_inside = False
        return result

    return cast(F, call)


class PolicyWorker:
    """Owns the trained policy: forward, backward, optimiser, checkpoints, and the weights for the engine."""

    _is_inside = False
    """A call of every rank is under way, or did not come to its end: then the other ranks have ended, or wait in it."""
    logprobs: Sequence[FloatArray] = ()  # [T] of each sample of the last ``train``, before its first update
    _tensors: Generator[tuple[str, torch.Tensor], None, None] | None = None
    """Of the last weight sync; the next call takes what nobody took."""

    def __init__(self, config: RunConfig, model_path: Path) -> None:
        self.config = config
        self._closed = False
        self.device = import_verl(config)
        self._init_process_group()
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.loss_function = LossFunction(config)
        with _verl_prints_to_log():
            self._worker = _build_worker(config, model_path)
            self._worker.set_loss_fn(self.loss_function)
            self._worker.reset()
        self._worker.engine.keeps_dropout = config.model.dropout

    def close(self) -> None:
        """Releases the other ranks from ``serve()``. Safe to call twice."""
        if not self._closed:
            self._closed = True
            try:
                self._broadcast("close")
            except RuntimeError as error:  # torch's word for a broken connection
                logger.warning("the other ranks end with this process: %s", error)

    def serve(self) -> None:
        """Ranks above 0 run what rank 0 runs, until it closes."""
        while True:
            message: list[Any] = [None]
            torch.distributed.broadcast_object_list(message, src=0, device=torch.device("cpu"))
            name, arguments = message[0]
            if name == "close":
                return
            result = getattr(self, name)(*arguments)
            if isinstance(result, Iterator):
                deque(result, 0)

    def _broadcast(self, name: str, *arguments: Any) -> None:
        """Raises ``RuntimeError`` after a call that did not come to its end: nobody would hear it, for hours."""
        if self.world_size > 1 and self.rank == 0:
            if self._tensors is not None:
                deque(self._tensors, 0)  # closing one that was never advanced would gather nothing
            if self._is_inside:
                raise RuntimeError(f"{name}: an earlier call was not finished, so the other ranks cannot be reached")
            torch.distributed.broadcast_object_list([(name, arguments)], src=0, device=torch.device("cpu"))

    # ------------------------------------------------------------------ calls of rank 0

    @_on_every_rank
    def train(self, samples: list[TrainingSample]) -> dict[str, float]:
        """One pass over ``samples`` (all ranks' together): one optimiser step, or several for the GRPO loss. Returns
        ``loss`` (over the global batch, before the update), ``grad_norm``, the loss's own figures (means over the
        optimiser steps) and the last ``lr``. Raises ``TrainingDivergedError``; that step changed no weights."""
        loss = self.config.loss
        chunks = _mini_batches(samples, loss.ppo_epochs, loss.ppo_mini_batches, self.config.seed)
        # No optimiser step on nothing: AdamW would decay the weights, and its moments.
        chunks = [chunk for chunk in chunks if any(samples[i].loss_mask.any() for i in chunk)]
        old_logprobs = self._logprobs(samples) if loss.ppo_epochs * loss.ppo_mini_batches > 1 else None
        outputs: list[dict[str, float]] = []
        for number, chunk in enumerate(chunks, 1):
            part = [samples[i] for i in chunk]
            old = None if old_logprobs is None else [old_logprobs[i] for i in chunk]
            outputs.append(self._update(part, old, last=number == len(chunks)))
        self.logprobs = old_logprobs or self._of_the_update(len(samples))
        keys = sorted({key for output in outputs for key in output})
        means = {key: float(np.mean([o[key] for o in outputs if key in o])) for key in keys}
        return {**means, "lr": outputs[-1]["lr"]}

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full weights by Hugging Face name. Other ranks take part in each gather: what nobody takes is made too."""
        self._broadcast("named_tensors")
        self._is_inside = True
        self._tensors = self._gathered()
        return self._tensors

    def _gathered(self) -> Generator[tuple[str, torch.Tensor], None, None]:
        tensors, _ = self._worker.engine.get_per_tensor_param()
        try:
            for name, tensor in tensors:
                yield name, tensor.detach()
        except GeneratorExit:
            deque(tensors, 0)
        self._is_inside = False

    @_on_every_rank
    def save_checkpoint(self, directory: Path, step: int) -> None:
        """Writes verl's checkpoint layout (model, optimizer, extra state per rank) into ``directory``."""
        with _verl_prints_to_log():
            self._worker.save_checkpoint(str(directory), global_step=step)

    @_on_every_rank
    def load_checkpoint(self, directory: Path) -> None:
        """Restores what ``save_checkpoint`` wrote, but for the optimiser's settings. Raises ``CheckpointError``."""
        expected = directory / f"model_world_size_{self.world_size}_rank_{self.rank}.pt"
        if not expected.exists():
            raise CheckpointError(
                f"{expected} does not exist; the checkpoint was written by another number of ranks "
                f"(found {sorted(p.name for p in directory.glob('model_world_size_*'))})"
            )
        try:
            with _verl_prints_to_log():
                self._worker.load_checkpoint(str(directory))
        except (RuntimeError, ValueError, KeyError, OSError, EOFError, UnpicklingError) as error:
            raise CheckpointError(f"cannot load {directory}: {error}") from error

    def _update(self, samples: list[TrainingSample], old: list[FloatArray] | None, *, last: bool) -> dict[str, float]:
        from verl.utils import tensordict_utils as tu

        data, _ = self._to_tensordict(samples, old)
        tu.assign_non_tensor(data, update_lr_scheduler=last)
        self.loss_function.start()
        metrics = dict(tu.get(self._worker.train_batch(data), "metrics"))
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not (np.isfinite(loss) and np.isfinite(grad_norm)):
            own = "" if (path := self.config.loss.path) is None else f", or correct {path} (loss.path)"
            raise TrainingDivergedError(
                f"loss {loss} or gradient norm {grad_norm} is not finite; the update was not applied. "
                f"Lower optim.lr, or bound advantages with advantage_clipping{own}"
            )
        lr = float(metrics.get("lr", self.config.optim.lr))
        figures = self.loss_function.finish(self._of_every_rank)
        return {"loss": loss, "grad_norm": grad_norm, "lr": lr, **figures}

    def _logprobs(self, samples: list[TrainingSample]) -> list[FloatArray]:
        """Logprobs [T] of each sample's trained tokens under the current policy at its temperature; 0 elsewhere."""
        from verl.utils import tensordict_utils as tu

        data, share = self._to_tensordict(samples, None)
        tu.assign_non_tensor(data, compute_loss=False)
        mine: dict[int, FloatArray] = {}
        rows = self._worker.infer_batch(data)["log_probs"].unbind()
        for index, row in zip(share, rows, strict=False):  # then fillers
            values = row[:-1].to(torch.float64).cpu().numpy()  # verl: entry t is the logprob of token t + 1
            mine[index] = np.concatenate([[0.0], values])
        return self._by_row(mine, len(samples))

    def _of_the_update(self, count: int) -> list[FloatArray]:
        """Logprobs [T] of ``count`` samples as the only update of a step computed them; 0 where nothing is trained."""
        mine: dict[int, FloatArray] = {}
        for rows, offsets, logprobs in self.loss_function.rows:
            parts = np.split(logprobs.double().cpu().numpy(), offsets[1:-1].cpu().numpy())
            mine |= dict(zip(rows.tolist(), parts, strict=True))
        return self._by_row(mine, count)

    def _by_row(self, mine: dict[int, FloatArray], count: int) -> list[FloatArray]:
        found = {row: values for part in self._of_every_rank(mine) for row, values in part.items()}
        return [found[i] for i in range(count)]

    def _of_every_rank(self, own: Any) -> list[Any]:
        everyone: list[Any] = [own] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(everyone, own)
        return everyone

    compute_logprobs = _on_every_rank(_logprobs)

    def _to_tensordict(self, samples: Sequence[TrainingSample], old: list[FloatArray] | None) -> tuple[Any, list[int]]:
        """This rank's share in the columns that verl's engine and our losses read (jagged [B, T_b], and [B]), and its
        indices. Untrained fillers make it as many rows as any rank has: all make the same number of micro-batches."""
        from verl.utils import tensordict_utils as tu
        from verl.utils.dataset.dataset_utils import DatasetPadMode

        bound, longest = self.config.trainer.max_token_len_per_gpu, max(map(len, samples), default=0)
        if longest > bound:  # verl has an assertion for it
            text = f"a sequence of {longest} tokens is longer than a micro-batch of {bound}; raise this bound to it"
            raise ConfigError(text, "trainer.max_token_len_per_gpu")
        ids, untrained = np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.bool_)
        filler = TrainingSample(token_ids=ids, loss_mask=untrained, advantages=np.zeros(2))
        shares_prefixes = self.config.trainer.share_prefixes and not self.config.model.dropout
        shares = split_for_ranks(samples, self.world_size, shares_prefixes=shares_prefixes)
        share = shares[self.rank]
        lacking = max(1, *map(len, shares)) - len(share)
        old = None if old is None else [*(old[i] for i in share), *[np.zeros(2)] * lacking]
        samples = [*(samples[i] for i in share), *[filler] * lacking]

        def jagged(rows: list[Any], dtype: torch.dtype) -> torch.Tensor:
            return torch.nested.as_nested_tensor([torch.as_tensor(r).to(dtype) for r in rows], layout=torch.jagged)

        columns = {
            "row": torch.tensor([*share, *[-1] * lacking]),
            "input_ids": jagged([s.token_ids for s in samples], torch.int64),
            "position_ids": jagged([np.arange(len(s)) for s in samples], torch.int64),
            "loss_mask": jagged([s.loss_mask for s in samples], torch.int64),
            "advantages": jagged([s.advantages for s in samples], torch.float32),
            "temperature": torch.tensor([s.temperature for s in samples], dtype=torch.float32),
        }
        if old is not None:
            columns["old_logprobs"] = jagged(old, torch.float32)
        if any(s.rollout_logprobs is not None for s in samples):
            rows = [np.full(len(s), np.nan) if s.rollout_logprobs is None else s.rollout_logprobs for s in samples]
            columns["rollout_logprobs"] = jagged(rows, torch.float32)
        posted = posted_columns(samples)
        columns |= {name: jagged(rows, torch.float64) for name, rows in posted.items()}
        settings = {
            "pad_mode": DatasetPadMode.NO_PADDING,
            "use_remove_padding": False,
            "use_dynamic_bsz": True,
            "max_token_len_per_gpu": bound,
            "share_prefixes": self.config.trainer.share_prefixes,
            "use_fused_kernels": False,
        }
        return tu.get_tensordict(columns, settings), share

    def forward_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, L, V] of a padded batch, with a graph, through the trained module (single rank)."""
        logits: torch.Tensor = self._worker.engine.module(input_ids=input_ids.to(self.device), use_cache=False).logits
        return logits

    def _init_process_group(self) -> None:
        if torch.distributed.is_initialized():
            return
        rank, world_size = verl_plugin.own_rank()
        # verl's own call builds "cpu:gloo,cpu:gloo", which torch refuses; verl skips it when a group exists.
        backend = "cpu:gloo" if self.device == "cpu" else "cpu:gloo,cuda:nccl"
        for name, value in zip(verl_plugin.RANK_VARIABLES, ("0", "1", "0", "1", "127.0.0.1", "0"), strict=True):
            os.environ.setdefault(name, value)
        os.environ.setdefault("RAY_LOCAL_WORLD_SIZE", os.environ["LOCAL_WORLD_SIZE"])
        if self.device == "cuda":
            local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local_rank >= gpus:
                raise ConfigError(f"LOCAL_RANK={local_rank}, but {gpus} GPUs are visible; {verl_plugin.rank_remedy()}")
            torch.cuda.set_device(local_rank)
        init = functools.partial(torch.distributed.init_process_group, backend, timeout=_COLLECTIVE_TIMEOUT)
        try:
            if world_size == 1:  # a store in memory: one rank needs no port
                init(store=torch.distributed.HashStore(), rank=0, world_size=1)
            else:
                _meet(init, rank, world_size)
        except RuntimeError as error:
            names = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name in os.environ]
            if not names:
                raise
            given = ", ".join(f"{name}={os.environ[name]}" for name in names)
            raise ConfigError(f"torch: {error}; is that a network interface of this machine: {given}?") from error


def _meet(init: Callable[[], None], rank: int, world_size: int) -> None:
    """Calls ``init``, which waits in torch for the other ranks, in a thread: Ctrl-C is heard meanwhile. Raises
    ``ConfigError`` when they have not come after half an hour."""
    ended: Future[None] = Future()

    def run() -> None:
        try:
            init()
            ended.set_result(None)
        except BaseException as error:  # noqa: BLE001 - the end of a thread: raised below
            ended.set_exception(error)

    threading.Thread(target=run, name="atropos-verl-ranks", daemon=True).start()
    waited = 0.0
    while not wait([ended], _MEETING_LOOK_SECONDS).done:
        waited += _MEETING_LOOK_SECONDS
        text = f"rank {rank} has waited {waited:g} s for the other {world_size - 1}; {verl_plugin.rank_remedy()}"
        if waited > _MEETING_SECONDS:
            raise ConfigError(text)
        logger.warning("%s", text)
    ended.result()


def _build_worker(config: RunConfig, model_path: Path) -> Any:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    model, trainer = config.model, config.trainer
    return TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=str(model_path),
                tokenizer_path=model.tokenizer_path,
                override_config={"attn_implementation": model.attn_implementation, **model.override_config},
                use_remove_padding=False,
                enable_gradient_checkpointing=model.enable_gradient_checkpointing,
                trust_remote_code=model.trust_remote_code,
            ),
            engine_config=FSDPEngineConfig(
                strategy=trainer.strategy,
                dtype={"fp32": "float32", "bf16": "bfloat16"}[model.compute_dtype],
                model_dtype=model.dtype,
                mixed_precision={"param_dtype": model.compute_dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
                max_token_len_per_gpu=trainer.max_token_len_per_gpu,
                infer_max_token_len_per_gpu=trainer.max_token_len_per_gpu,
                use_torch_compile=False,
                seed=config.seed,
            ),
            optimizer_config=FSDPOptimizerConfig(**config.optim.model_dump(), total_training_steps=config.steps),
            checkpoint_config=CheckpointConfig(),
        )
    )


def split_for_ranks(
    samples: Sequence[TrainingSample], world_size: int, *, shares_prefixes: bool = True
) -> list[list[int]]:
    """Shares ``samples`` out over ranks: indices, rank by rank; a share may be empty. Those with a common prefix stay
    together, and each rank gets about the same number of distinct tokens (of tokens, without ``shares_prefixes``), in
    the order of ``samples``. Every rank computes the same shares."""
    if world_size == 1:
        return [list(range(len(samples)))]
    order, shared = sort_by_prefix([sample.token_ids for sample in samples])
    shared = shared if shares_prefixes else [0] * len(shared)
    lengths = [len(samples[index]) for index in order]
    return [sorted(order[at] for at in part) for part in partition(lengths, shared, world_size)]


def _mini_batches(samples: Sequence[TrainingSample], epochs: int, mini_batches: int, seed: int) -> list[list[int]]:
    """Index lists, ``epochs * mini_batches`` of them, the same on every rank; one batch is left in its order. All rows
    of a rollout are in one of them."""
    if epochs == mini_batches == 1:
        return [list(range(len(samples)))]
    rollouts: dict[tuple[str, int], list[int]] = {}
    for index, sample in enumerate(samples):
        rollouts.setdefault((sample.group_id, sample.rollout_id), []).append(index)
    rows, rng = list(rollouts.values()), np.random.default_rng(seed)
    shuffled = [np.array_split(rng.permutation(len(rows)), mini_batches) for _ in range(epochs)]
    return [[index for number in part for index in rows[number]] for parts in shuffled for part in parts]


@contextlib.contextmanager
def _verl_prints_to_log() -> Iterator[None]:
    """verl 0.9.1 prints while it builds and saves; that goes to our log, not into the live table."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # Held here: print() only borrows sys.stdout, and a log handler may change it meanwhile (pytest's live log does).
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            # One warning for each engine whose package is not installed; none of them is asked for.
            warnings.filterwarnings("ignore", message=".* engine is not available")
            yield
    finally:
        if text := printed.getvalue().strip():
            logger.info("verl: %s", text)


class LossFunction:
    """The loss that verl's engine calls for each micro-batch: ``(model_output, data, dp_group) -> (loss, metrics)``.

    verl averages gradients over ranks, so a micro-batch's loss is its sum, over the tokens of the *global* batch, times
    the ranks. Metrics are gathered between ``start()`` and ``finish()``: verl joins them without weights."""

    def __init__(self, config: RunConfig) -> None:
        from atropos_verl.verl_plugin.engines import added_loss  # which imports verl

        self.config, self._importance, self._loss_type = config, config.importance, config.loss_type
        self._added_loss = added_loss
        self._user_loss = None if config.loss.path is None else load_loss(config.loss.path)
        self.start()

    def start(self) -> None:
        """Forgets the metrics of the batch before."""
        self._sums: dict[str, float] = {}
        self.rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        """Of each micro-batch: [B] its samples, [B + 1] where they begin, [sum of T_b] logprobs before the update."""
        self._weight = self._largest = 0.0

    def finish(self, gather: Callable[[Any], list[Any]] = lambda own: [own]) -> dict[str, float]:
        """Mean of each metric over the trained tokens of all shares of the batch; none without any."""
        shares = gather((self._sums, self._weight, self._largest))
        weight = sum(weight for _, weight, _ in shares)
        if not weight:
            return {}
        names = dict.fromkeys(name for sums, _, _ in shares for name in sums)
        means = {name: sum(sums.get(name, 0.0) for sums, _, _ in shares) / weight for name in names}
        return summarise_importance({**means, LARGEST: max(largest for _, _, largest in shares)})

    def __call__(
        self, model_output: dict[str, Any], data: Any, dp_group: Any = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        del dp_group
        offsets = data["input_ids"].offsets()
        # verl's entry t belongs to token t + 1, ours to token t; nothing predicts the first token of a sequence.
        logprobs = torch.roll(model_output["log_probs"].values(), shifts=1, dims=0).index_fill(0, offsets[:-1], 0.0)
        mask = data["loss_mask"].values().bool()
        if (rows := data.get("row", None)) is not None:
            self.rows.append((rows, offsets, logprobs.detach()))
        output = self._loss(logprobs, data, offsets, mask, int(data["batch_num_tokens"]))
        added = self._added_loss(model_output, data)
        tokens = float(mask.sum())
        self._weight += tokens
        self._largest = max(self._largest, output.metrics.pop(LARGEST, 0.0))
        for key, value in (output.metrics | added.metrics).items():
            self._sums[key] = self._sums.get(key, 0.0) + value * tokens
        return (output.loss + added.loss) * int(data["dp_size"]), {}

    def _loss(
        self, logprobs: torch.Tensor, data: Any, offsets: torch.Tensor, mask: torch.Tensor, num_loss_tokens: int
    ) -> LossOutput:
        advantages = data["advantages"].values()
        columns = set(data.keys())
        optional = ("rollout_logprobs", "old_logprobs")
        rollout, old = (data[name].values() if name in columns else None for name in optional)
        # Told the size of the result, torch does not ask the device for it.
        sequence_ids = torch.repeat_interleave(offsets.diff(), output_size=len(mask))
        known = {"rollout_logprobs": rollout, "sequence_ids": sequence_ids}
        if self._user_loss is not None:
            return self._user_loss(logprobs, advantages, mask, num_loss_tokens, old_logprobs=old, **known)
        config, importance = self.config.loss, self._importance
        cap = self.config.off_policy.importance_cap if importance else None
        rollout_keywords: dict[str, Any] = {**known, "tis_cap": cap, "importance": importance or "token"}
        if self._loss_type == "advantage_weighted_sft":
            return advantage_weighted_sft_loss(logprobs, advantages, mask, num_loss_tokens, **rollout_keywords)
        rollout_keywords |= config.model_dump(include={"clip_ratio_low", "clip_ratio_high", "clip_ratio_c"})
        old = logprobs.detach() if old is None else old
        return clipped_ratio_loss(logprobs, old, advantages, mask, num_loss_tokens=num_loss_tokens, **rollout_keywords)
