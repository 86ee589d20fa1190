"""verl's FSDP engine without padding on any device, and with an LM head for trained tokens only (docs/internals.md).

The update computes what the engine of rollouts computed: dropout and its like are off, unless ``DROPOUT_VARIABLE`` says
otherwise. No optimiser step has a learning rate of 0 in its warm-up, or nothing to train on. Import this module after
``verl_plugin.activate``; importing it registers the engines in this process.
"""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.activations import SiLUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from atropos_verl.errors import ConfigError
from atropos_verl.training.lm_head import linear_teacher_kl, linear_token_figures, linear_token_logprobs
from atropos_verl.training.losses import kl_loss, reference_kl
from atropos_verl.types import LossOutput
from atropos_verl.verl_plugin import DROPOUT_VARIABLE
from atropos_verl.verl_plugin.prefix_forest import (
    IntArray,
    PrefixForest,
    build_forest,
    fill,
    joined,
    partition,
    sort_by_prefix,
)
from atropos_verl.verl_plugin.shims import keep_optimiser_settings, leave_no_lock_files, without_pinned_offload

logger = logging.getLogger(__name__)
leave_no_lock_files()
keep_optimiser_settings()

ATTENTION = {"sdpa": "atropos_packed_sdpa", "flex_attention": "atropos_packed_flex"}
"""``model.attn_implementation``: what a model that takes packed rows has in its place."""
_PROBE = (list(range(1, 9)), [*range(1, 6), 9, 10], [11, 12, 13])  # sequences, two of which share a prefix
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Of the largest logit. A model that looks across a border is off by the size of its logits."""
BRANCH_BLOCK = 512  # tokens of a long branch that attend to what is above them in one call
MASK_ELEMENTS = 2**18
"""The backward keeps the mask of each call in each layer; larger ones are made again instead, with their attention."""
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_soft_cap")
"""Config keys of architectures that change the logits after the head; those take verl's own path."""
_NEED_LOGITS = ("calculate_sum_pi_squared", "distillation_use_topk")


class _HeadRequest(NamedTuple):
    """The tokens whose logprobs the head computes in the next forward."""

    rows: torch.Tensor
    """[N] flat indices into [B * L] (of a packed row: into [1 * tokens]) of positions that predict a trained token."""
    labels: torch.Tensor  # [N] the tokens they predict
    temperature: torch.Tensor  # [N]
    targets: torch.Tensor  # [M] where verl wants them: flat indices into [B * T_b]; token t + 1's logprob is at t
    repeats: torch.Tensor | None
    """[M] which of the N each one is: a token of a shared prefix has several places. None: N = M, in order."""
    entropy: bool  # the entropy of their distributions is wanted too; without a gradient only
    teacher: tuple[torch.Tensor, ...] | None = None  # ``_teacher_request``; with a gradient only


@EngineRegistry.register(model_type="language_model", backend=["fsdp"], device="cuda", vendor="nvidia")
class UpdateEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """verl's engine with the update that this module promises."""

    optimizer_config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keeps_dropout = os.environ.get(DROPOUT_VARIABLE) == "1"
        self._checkpointed: list[torch.nn.Module] | None = None
        self._has_trained_tokens = True

    @contextlib.contextmanager
    def train_mode(self, **kwargs: Any) -> Iterator[None]:
        """verl's, with every layer as in evaluation: dropout, layerdrop and router jitter are off."""
        with super().train_mode(**kwargs):
            if not self.keeps_dropout:
                if self._checkpointed is None:
                    self._checkpointed = _let_checkpoint(self.module)
                self.module.eval()
                for layer in self._checkpointed:
                    layer.training = True
            yield

    def initialize(self) -> None:
        super().initialize()
        keep_less(self.module)
        if get_device_name() == "cpu" and torch.distributed.get_world_size() == 1:
            without_copies(self.module)

    def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
        output = super().forward_backward_batch(data, loss_function, forward_only=forward_only)
        self._has_trained_tokens = tu.get_non_tensor_data(data, "batch_num_tokens", 1) > 0
        return output

    def optimizer_step(self) -> float:
        """The gradient norm. A batch without a trained token changes neither weights nor AdamW's moments."""
        norm = float(super().optimizer_step()) if self._has_trained_tokens else 0.0
        self.optimizer_zero_grad()  # verl keeps the gradients until the next step begins: a copy of the model's size
        return norm

    def _build_optimizer(self, module: Any) -> Any:
        """verl's, in one kernel on a CPU: torch's own choice there is a loop over the parameters in Python."""
        settings = self.optimizer_config
        is_plain = (settings.optimizer_impl, settings.optimizer) == ("torch.optim", "AdamW")
        if is_plain and get_device_name() == "cpu" and not settings.override_optimizer_config:
            self.optimizer_config = dataclasses.replace(settings, override_optimizer_config={"fused": True})
        return super()._build_optimizer(module)

    def _build_lr_scheduler(self, optimizer: Any) -> Any:
        """verl's schedule, but step n of a warm-up of W trains at n / W of the rate (verl: (n - 1) / W, from 0 on)."""
        scheduler, settings = super()._build_lr_scheduler(optimizer), self.optimizer_config
        warmup = settings.lr_warmup_steps
        if warmup <= 0:
            warmup = int(settings.lr_warmup_steps_ratio * settings.total_training_steps)
        after_warmup = scheduler.lr_lambdas[0]

        def factor(done: int) -> float:
            return (done + 1) / warmup if done < warmup else float(after_warmup(done))

        scheduler.lr_lambdas = [factor] * len(scheduler.base_lrs)
        for group, base in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = base * factor(0)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
        return scheduler

    def lr_scheduler_step(self) -> float:
        """Goes on to the next rate; returns the one that the step before it used (verl: the next one)."""
        used = float(self.lr_scheduler.get_last_lr()[0])
        super().lr_scheduler_step()
        return used


def _let_checkpoint(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that recompute activations, which transformers lets them only in training: from now on they compute
    as in evaluation whatever their ``training`` says."""

    @contextlib.contextmanager
    def evaluating(layer: torch.nn.Module) -> Iterator[None]:
        before, layer.training = layer.training, False
        try:
            yield
        finally:
            layer.training = before

    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    layers = [layer for layer in layers if layer.gradient_checkpointing]
    for layer in layers:
        layer.forward = evaluating(layer)(layer.forward)
    return layers


@EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device="cpu")
@EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device="cuda", vendor="nvidia")
class SelectiveHeadEngine(UpdateEngine):
    """``model_output["log_probs"]`` as verl lays it out: entry t is the logprob of token t+1; 0 where not asked for.

    In the update of a batch with the column ``teacher`` there is ``"teacher_kl"``, too: entry t is the KL to the
    teacher's distribution of token t, at temperature 1."""

    _head_request: _HeadRequest | None = None
    _packs, _shares, _probed = False, True, False
    """Micro-batches are joined in one row; shared prefixes stand in it once; it was tried that both are exact."""

    def initialize(self) -> None:
        super().initialize()
        self._selective = self._install_head()

    def _build_fsdp_module(self, module: Any) -> Any:
        # Ulysses shares one row out over ranks; our attention has to see all of it.
        if self.ulysses_sequence_parallel_size == 1:
            self._packs = install_packed_attention(module)
            if not self._packs:
                _warn_unshared(module, what_hinders_packing(module.config) or "its class takes no attention of others")
        with without_pinned_offload(self.engine_config):
            return super()._build_fsdp_module(module)

    def _install_head(self) -> bool:
        head = self.module.get_output_embeddings()
        changed = [name for name in _LOGIT_TRANSFORMS if getattr(self.module.config, name, None) not in (None, 1, 1.0)]
        if not isinstance(head, torch.nn.Linear) or changed:
            return False
        full_forward = head.forward

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            request = self._head_request
            if request is None:
                return full_forward(hidden)
            rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, request.rows)
            compute = linear_token_figures if request.entropy else linear_token_logprobs
            found = compute(rows, head.weight, request.labels, request.temperature, bias=head.bias)
            found = found.reshape(len(request.rows), 1 + request.entropy)  # there may be no row
            if request.teacher is not None:
                at, ids, logprobs, _ = request.teacher
                rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, at)
                kl = linear_teacher_kl(rows, head.weight, ids, logprobs, head.bias)
                found = torch.cat([found, kl[:, None]])
            # A copy: FSDP2 warns of a root output that is a view.
            return found[None].clone()

        # An instance attribute, not a class patch: only this engine's model is concerned.
        head.forward = forward  # type: ignore[method-assign,assignment]
        # The rows of its tokens are then added to the head's gradient, which comes first; others would round each time.
        for layer in self.module.modules():
            if isinstance(layer, torch.nn.Embedding) and layer.weight is head.weight:
                layer.sparse = self._autocast_dtype == torch.float32 and get_device_name() == "cpu"
        return True

    def _joins(self, data: Any) -> bool:
        """True when ``data`` is joined here (and not padded, and not left to flash attention)."""
        if not self._packs or tu.get_non_tensor_data(data, "use_remove_padding", False):
            return False
        if not self._probed:
            self._probed, device = True, next(self.module.parameters()).device
            # A row with shared prefixes has sequences side by side as well: one that is exact needs no second probe.
            self._shares = packs_exactly(self.module, device, share=True)
            self._packs = self._shares or packs_exactly(self.module, device, share=False)
            if not self._shares:
                mixed = "their branches" if self._packs else "joined sequences, and is trained with padding"
                _warn_unshared(self.module, f"it mixes {mixed}")
        return self._packs

    def _shares_prefixes(self, data: Any) -> bool:
        """True when prefixes that sequences of ``data`` share are computed once."""
        # Branches would have the same dropout up to where they part.
        wanted = tu.get_non_tensor_data(data, "share_prefixes", True) and not self.keeps_dropout
        fits = self._selective and data["position_ids"].dim() == 2 and not _needs_logits(data)
        return wanted and fits and self._joins(data) and self._shares

    def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
        # verl fills micro-batches by the lengths of sequences and scatters a group over them. Remove when it asks a
        # method that can be overridden.
        original = transformer_impl.prepare_micro_batches

        def prepare(data: Any, dp_group: Any = None, **options: Any) -> Any:
            return self._micro_batches(data, dp_group) or original(data=data, dp_group=dp_group, **options)

        transformer_impl.prepare_micro_batches = prepare
        try:
            return super().forward_backward_batch(data, loss_function, forward_only)
        finally:
            transformer_impl.prepare_micro_batches = original

    def _micro_batches(self, data: Any, dp_group: Any = None) -> tuple[list[Any], list[list[int]]] | None:
        """Micro-batches of up to ``max_token_len_per_gpu`` distinct tokens, and their indices; None: as verl does."""
        if not tu.get_non_tensor_data(data, "use_dynamic_bsz", True) or not self._shares_prefixes(data):
            return None
        rows = _rows(data["input_ids"])
        order, shared = sort_by_prefix(rows)
        lengths = [len(rows[index]) for index in order]
        # Every rank makes the same number of them, and none is empty.
        own = [len(fill(lengths, shared, data["max_token_len_per_gpu"])), -len(rows)]
        count = torch.tensor(own, device=get_device_name())  # a group of NCCL takes nothing else
        torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX, group=dp_group)
        if count[0] > -count[1]:
            return None
        indices = [[order[at] for at in part] for part in partition(lengths, shared, int(count[0]))]
        return [tu.index_select_tensor_dict(data, part) for part in indices], indices

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        joins, place, ids = self._joins(micro_batch), None, micro_batch["input_ids"]
        shares = self._shares_prefixes(micro_batch)
        if joins:
            tu.assign_non_tensor(micro_batch, use_remove_padding=True)
        model_inputs, output_args = super().prepare_model_inputs(micro_batch)
        if shares:
            forest = build_forest(_rows(ids)).to(ids.device)
            place, first = (torch.from_numpy(array).to(ids.device) for array in (forest.place, forest.first))
            for name in ("input_ids", "position_ids"):
                model_inputs[name] = micro_batch[name].values()[first][None]
            model_inputs["packed_row"] = forest
        elif joins:
            model_inputs["packed_row"] = joined(ids.offsets().diff().tolist())
        self._head_request = None
        whole = not output_args.get("pad_size") and not self.use_ulysses_sp
        if self._selective and whole and not _needs_logits(micro_batch):
            temperature = torch.as_tensor(micro_batch["temperature"]).expand(len(micro_batch))
            is_packed = bool(tu.get_non_tensor_data(micro_batch, "use_remove_padding", False))
            row_length = None if is_packed else model_inputs["input_ids"].shape[1]
            entropy = tu.get_non_tensor_data(micro_batch, "calculate_entropy", False)
            request = _head_request(ids, micro_batch["loss_mask"], temperature, row_length, place, entropy=entropy)
            if "teacher" in set(micro_batch.keys()) and torch.is_grad_enabled():
                request = request._replace(teacher=_teacher_request(micro_batch, row_length, place))
            self._head_request = request
        return model_inputs, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, Any]:
        request, self._head_request = self._head_request, None
        if request is None:
            arguments = (output, output_args, micro_batch, logits_processor_func)
            return super().prepare_model_outputs(*arguments)  # type: ignore[no-any-return]
        ids, outputs = micro_batch["input_ids"], {}
        found = output.logits[0]
        if request.teacher is not None:
            found, kl = found[: len(request.rows)], found[len(request.rows) :, 0]
            packed = kl.new_zeros(ids.values().shape[0]).index_copy(0, request.teacher[-1], kl)
            outputs["teacher_kl"] = torch.nested.nested_tensor_from_jagged(packed, ids.offsets())
        for name, values in zip(("log_probs", "entropy"), found.unbind(1), strict=False):
            repeated = values if request.repeats is None else values[request.repeats]
            packed = values.new_zeros(ids.values().shape[0]).index_copy(0, request.targets, repeated)
            outputs[name] = torch.nested.nested_tensor_from_jagged(packed, ids.offsets())
        return outputs


class _GatedSilu(torch.autograd.Function):
    """``silu(gate) * up``, and where there is a ``weight`` [H, D] the linear layer that follows; the backward computes
    what is between again."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(gate, up, weight)
        product = functional.silu(gate).mul_(up)
        return product if weight is None else functional.linear(product, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        silu, of_weight = functional.silu(gate), None
        if ctx.needs_input_grad[2]:
            of_weight = gradient.flatten(0, -2).t() @ (silu * up).flatten(0, -2)
        gradient = gradient if weight is None else gradient @ weight
        return torch.ops.aten.silu_backward(gradient * up, gate), silu.mul_(gradient), of_weight


class _Normalised(torch.autograd.Function):
    """``weight * x / sqrt(mean(x**2) + eps)`` of x ``[..., D]``, which alone is kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        normal = x * scale
        product = gradient * normal
        of_weight = product.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        mean = (product @ weight).div_(x.shape[-1]).unsqueeze(-1)
        return (gradient * weight).sub_(normal.mul_(mean)).mul_(scale), of_weight, None


def keep_less(model: torch.nn.Module) -> None:
    """Layers whose class has the code of Llama's compute the same, and keep less of it for the backward."""

    def code_of(kind: type[torch.nn.Module]) -> object:
        code = getattr(kind.forward, "__code__", None)
        return code and (code.co_code, code.co_names, code.co_consts)

    def gated(layer: Any, x: torch.Tensor) -> Any:
        gate, up, down = layer.gate_proj(x), layer.up_proj(x), layer.down_proj
        # LoRA's layer is another class; autocast would choose the dtype of a product in the backward, too.
        is_own = type(down) is not torch.nn.Linear or "forward" in vars(down) or down.bias is not None
        is_plain = not is_own and gate.dtype == down.weight.dtype
        product = _GatedSilu.apply(gate, up, down.weight if is_plain else None)  # type: ignore[no-untyped-call]
        return product if is_plain else down(product)

    def normalised(layer: Any, original: Callable[[torch.Tensor], Any], hidden_states: torch.Tensor) -> Any:
        if not hidden_states.dtype == layer.weight.dtype == torch.float32:
            return original(hidden_states)  # which rounds between its steps
        return _Normalised.apply(hidden_states, layer.weight, layer.variance_epsilon)  # type: ignore[no-untyped-call]

    code_of_mlp, code_of_norm = code_of(LlamaMLP), code_of(LlamaRMSNorm)
    for layer in model.modules():
        code = None if "forward" in vars(layer) else code_of(type(layer))  # it is somebody's own
        if code == code_of_mlp and isinstance(layer.act_fn, torch.nn.SiLU | SiLUActivation):
            layer.forward = functools.partial(gated, layer)
        elif code == code_of_norm:
            layer.forward = functools.partial(normalised, layer, layer.forward)


def without_copies(model: torch.nn.Module) -> None:
    """FSDP2 on one rank computes with the weights themselves (torch: a copy for each forward and each backward), and a
    gradient is that of the weight (torch: two copies)."""
    for module in model.modules():
        groups = module._get_fsdp_state()._fsdp_param_groups if isinstance(module, FSDPModule) else []
        for group in groups:
            for parameter in group.fsdp_params:
                weight = parameter.sharded_param
                if parameter.mp_policy.param_dtype in (None, weight.dtype):
                    # The copy is then of a tensor to itself, which is none; and it must not be freed.
                    parameter.all_gather_outputs = [weight.to_local().detach().view(-1)]
                    parameter.free_unsharded_param = lambda: None
            group.post_backward = functools.partial(_take_gradients, group.fsdp_params, group.post_backward)


def _take_gradients(parameters: list[Any], post_backward: Callable[[], None], *_: Any) -> None:
    for parameter in parameters:
        used, weight = getattr(parameter, "_unsharded_param", None), parameter.sharded_param
        if used is not None and used.grad is not None:
            if weight.grad is None:
                weight.grad = parameter.to_sharded_dtensor(used.grad.to(weight.dtype))
            else:
                weight.grad.to_local().add_(used.grad)
            used.grad = None
    post_backward()  # which finds none to sum


_warn_once = functools.cache(logger.warning)


def _warn_unshared(model: Any, why: str) -> None:
    name = type(model).__name__.removeprefix("FSDP")
    _warn_once(f"{name} computes prefixes that sequences share for each of them: {why}")


def _rows(nested: Any) -> list[IntArray]:
    """Of a nested tensor; two copies from the device, not one for each row."""
    values, offsets = (tensor.cpu().numpy() for tensor in (nested.values(), nested.offsets()))
    return np.split(values, offsets[1:-1])


def _needs_logits(data: Any) -> bool:
    keys = ("calculate_entropy", *_NEED_LOGITS) if torch.is_grad_enabled() else _NEED_LOGITS
    return any(tu.get_non_tensor_data(data, key, False) for key in keys)


def _head_request(
    input_ids: Any,
    loss_mask: Any,
    temperature: torch.Tensor,
    row_length: int | None,
    place: torch.Tensor | None = None,
    *,
    entropy: bool = False,
) -> _HeadRequest:
    """Finds the rows that predict a token whose ``loss_mask`` is set; both nested [B, T_b]; ``temperature`` [B].

    ``row_length``: L of the padded [B, L] that the model is given; None: it is given one packed row, in which each
    token is at ``place`` [B * T_b] (None: in order)."""
    ids, offsets = input_ids.values(), input_ids.offsets()
    # Nothing predicts the first token of a sequence.
    trained = _over_sequences(loss_mask, offsets, ids.shape[0]).index_fill(0, offsets[:-1], False)
    tokens = torch.nonzero(trained).squeeze(1)
    rows, batch = _predicting(tokens, offsets, row_length, place)
    labels, temperatures, repeats = ids[tokens], temperature.to(ids.device, torch.float32)[batch], None
    if place is not None:
        # A trained token of a shared prefix is computed once for each temperature.
        what = torch.stack([rows, labels, temperatures.view(torch.int32).long()])
        (rows, labels, bits), repeats = torch.unique(what, dim=1, return_inverse=True)
        temperatures = bits.int().view(torch.float32)
    return _HeadRequest(rows, labels, temperatures, tokens - 1, repeats, entropy)


def _predicting(
    tokens: torch.Tensor, offsets: torch.Tensor, row_length: int | None, place: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which row of the hidden states predicts each of ``tokens``, and which sequence that is of."""
    batch = torch.searchsorted(offsets, tokens, right=True) - 1
    rows = tokens - 1 if row_length is None else batch * row_length + (tokens - offsets[batch]) - 1
    return rows if place is None else place[rows], batch


def _teacher_request(data: Any, row_length: int | None, place: torch.Tensor | None) -> tuple[torch.Tensor, ...] | None:
    """``linear_teacher_kl``'s rows [K], ids and logprobs [K, top], and which of the tokens [B * T_b] each row is.

    Arguments as ``_head_request``. A token of a shared prefix is computed for each of its sequences."""
    entries, values = _entries(data, "teacher")
    if not entries.numel():
        return None
    tokens, which, counts = torch.unique_consecutive(entries, return_inverse=True, return_counts=True)
    column = torch.arange(len(entries), device=entries.device) - (counts.cumsum(0) - counts)[which]
    logprobs = values.new_full((len(tokens), int(counts.max())), -torch.inf)
    ids = torch.full_like(logprobs, -1, dtype=torch.int64)
    ids[which, column], logprobs[which, column] = values[:, 0].long(), values[:, 1]
    rows, _ = _predicting(tokens, data["input_ids"].offsets(), row_length, place)
    return rows, ids, logprobs, tokens


def _entries(data: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The entries of a column ([B, E_b, n], see ``TrainingSample``) about trained tokens: [E] which of the tokens
    [B * T_b], and [E, n - 1] the values. (verl's rows of padding hold entries of another row, and train nothing.)"""
    offsets = data["input_ids"].offsets()
    counts = torch.tensor([len(row) for row in data[name].unbind()], device=offsets.device)
    values, batch = torch.cat(data[name].unbind()), torch.repeat_interleave(counts)
    at = values[:, 0].long()
    trained = _over_sequences(data["loss_mask"], offsets, data["input_ids"].values().shape[0])
    fits = (at > 0) & (at < offsets.diff()[batch])
    tokens, values = (offsets[batch] + at)[fits], values[fits, 1:]
    return tokens[trained[tokens]], values[trained[tokens]]


def added_loss(model_output: dict[str, Any], data: Any) -> LossOutput:
    """The KL to a teacher and to a reference policy over the tokens of the global batch; 0 where it has no values of
    theirs. Raises ``ConfigError`` where verl's own head was used, which computes no KL."""
    offsets, columns = data["input_ids"].offsets(), set(data.keys())
    logprobs = model_output["log_probs"].values()
    total, metrics = logprobs.new_zeros(()), dict[str, float]()
    for column, name in (("teacher", "distill"), ("reference", "ref")):
        if column not in columns:
            continue
        mask = _over_sequences(data["loss_mask"], offsets, len(logprobs)).index_fill(0, offsets[:-1], False)
        tokens, values = _entries(data, column)
        unknown = torch.full_like(logprobs.detach(), torch.nan)
        first, *_, weights = (unknown.index_copy(0, tokens, each) for each in values.to(unknown).unbind(1))
        if column == "reference":
            kl = reference_kl(torch.roll(logprobs, shifts=1, dims=0), first)  # verl's entry t is of token t + 1
        elif "teacher_kl" in model_output:
            kl = model_output["teacher_kl"].values()
        elif not tokens.numel():
            kl = torch.zeros_like(logprobs)
        else:
            text = "a teacher's values need trainer.strategy=fsdp2, no Ulysses, and a model with a plain linear head"
            raise ConfigError(text, "distill")
        output = kl_loss(name, kl, weights, mask, data["batch_num_tokens"])
        total, metrics = total + output.loss, metrics | output.metrics
    return LossOutput(loss=total, metrics=metrics)


def _over_sequences(loss_mask: Any, offsets: torch.Tensor, tokens: int) -> torch.Tensor:
    """[tokens] bool. verl's V1 trainer (and every row that it pads a batch with) has masks of the response only, which
    is the end of the sequence."""
    if loss_mask.values().shape[0] == tokens:  # no mask is longer than its sequence; offsets are on the device
        return loss_mask.values().bool()  # type: ignore[no-any-return]
    rows = zip(loss_mask.unbind(), offsets.diff().tolist(), strict=True)
    return torch.cat([torch.nn.functional.pad(row.bool(), (length - row.numel(), 0)) for row, length in rows])


def what_hinders_packing(config: Any) -> str:
    """Why a model of this transformers config takes no packed rows; empty where it can."""
    others = sorted({*(getattr(config, "layer_types", None) or ())} - {"full_attention"})
    window = getattr(config, "sliding_window", None)
    if others:
        return f"it has layers of {', '.join(others)}"
    if window is not None and getattr(config, "use_sliding_window", True):
        return f"its attention has a window of {window} tokens"
    ours, own = " or ".join(ATTENTION), config._attn_implementation
    return "" if own in ATTENTION else f"its attention is {own}, not {ours}"


def install_packed_attention(model: Any) -> bool:
    """Lets ``model`` (before it is sharded) take packed rows beside padded ones. False: it cannot, and is unchanged."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if not hasattr(model, "set_attn_implementation") or what_hinders_packing(model.config):
        return False
    for name, function in zip(ATTENTION.values(), (_attention, functools.partial(_attention, flex=True)), strict=True):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _mask)
    name = ATTENTION[model.config._attn_implementation]
    model.set_attn_implementation(name)
    return bool(model.config._attn_implementation == name)


def packs_exactly(model: Any, device: torch.device, *, share: bool) -> bool:
    """True when ``model`` gives the same logits for sequences in one row (``share``: prefixes stand in it once) as for
    each alone. Recurrent layers carry a state along the row; some models do not pass its layout on."""
    modes = [(module, module.training) for module in model.modules()]  # not all alike: see ``train_mode``
    model.eval()
    sequences = [np.array(ids) % model.config.get_text_config().vocab_size for ids in _PROBE]
    row = build_forest(sequences) if share else joined([len(ids) for ids in sequences])
    flat = np.concatenate(sequences), np.concatenate([np.arange(len(ids)) for ids in sequences])
    ids, positions = (torch.from_numpy(array[row.first])[None].to(device) for array in flat)
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=positions, packed_row=row.to(device), use_cache=False).logits[0]
            together = logits[torch.from_numpy(row.place).to(device)]
            each = [torch.from_numpy(part)[None].to(device) for part in sequences]
            alone = torch.cat([model(input_ids=part, use_cache=False).logits[0] for part in each])
    finally:
        for module, training in modes:
            module.training = training
    largest, difference = (float(values.float().abs().max()) for values in (alone, together - alone))
    return difference <= _PROBE_TOLERANCE.get(alone.dtype, 1e-3) * max(largest, 1e-3)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    packed_row: PrefixForest | None = None,
    flex: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function; query [B, heads, T, D], key and value [B, kv heads, T, D] → [B, T, heads, D].

    Without the layout of a packed row (B = 1): transformers' ``sdpa``. ``flex``: one call for the whole row."""
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if packed_row is None:
        rest = (attention_mask, dropout, scaling, is_causal)
        return sdpa_attention_forward(module, query, key, value, *rest, **kwargs)  # type: ignore[no-any-return]
    if flex:
        mask = packed_row.block_mask(query.device)
        return flex_attention_forward(module, query, key, value, mask, scaling, dropout=dropout)[0], None
    groups = query.shape[1] // key.shape[1]
    # Repeated once for the whole row: sdpa's own way to share heads has no fast kernel on a CPU.
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    lengths = [call.end - call.start for call in packed_row.calls]
    queries, keys, values = (torch.split(tensor, lengths, dim=2) for tensor in (query, key, value))
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    outputs = []
    for number, call in enumerate(packed_row.calls):
        own = queries[number]
        if not call.above and call.mask is None:
            outputs.append(attend(own, keys[number], values[number], is_causal=lengths[number] > 1))
            continue
        seen = [*call.above, number]
        whole = [torch.cat([part[at] for at in seen], dim=2) if call.above else part[number] for part in (keys, values)]
        before = whole[0].shape[2] - lengths[number]
        for start in range(0, lengths[number], BRANCH_BLOCK if call.mask is None else lengths[number]):
            part = own[:, :, start : start + BRANCH_BLOCK] if call.mask is None else own
            end = before + start + part.shape[2]
            above = functools.partial(_attend_above, attend, mask=call.mask)
            if part.shape[2] * end > MASK_ELEMENTS and torch.is_grad_enabled():
                above = functools.partial(checkpoint, above, use_reentrant=False)
            outputs.append(above(part, *(tensor[:, :, :end] for tensor in whole)))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend_above(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """query [1, heads, n, D], the last n of the tokens of key and value [1, heads, keys, D]; mask [n, n] bool, which of
    each other they see; None: causal."""
    length, keys = query.shape[2], key.shape[2]
    inside = torch.ones(length, length, dtype=torch.bool, device=query.device).tril() if mask is None else mask
    # Not bool: torch would make this of it.
    scores = query.new_zeros(length, keys)
    scores[:, keys - length :].masked_fill_(~inside, -torch.inf)
    return attend(query, key, value, attn_mask=scores)


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """None for rows that are packed or hold one sequence each; they need no [T, T] mask. Else that of ``sdpa``."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)  # type: ignore[no-any-return]
