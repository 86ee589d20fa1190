"""Logprobs of given tokens straight from hidden states, without holding [N, V] logits.

Shapes: ``N`` rows (positions that predict a trained token), ``H`` hidden size, ``V`` vocabulary.

Work is done in tiles of rows × vocabulary entries. The vocabulary is the outer loop: a slice of the weight is converted
once for all rows, and its gradient is complete after one pass, so there is no [V, H] float32 accumulator beside a bf16
weight. Forward keeps only the log-sum-exp of each row; backward computes each tile's logits again: four matrix
products where the plain formula has three, against a memory use that does not grow with N × V.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

__all__ = ["linear_token_logprobs"]

DIRECT_BYTES = 32 * 2**20
"""Up to this size of [N, V] the plain formula is used: it is faster, and its memory does not matter."""
CPU_TILE_BYTES = 16 * 2**20
"""Of a tile of logits, and of the slice of the weight that belongs to it. Larger is not faster on a CPU."""
CUDA_TILE_BYTES = 512 * 2**20
MAX_CHUNK_ROWS = 4096
MIN_VOCAB_BLOCK = 512


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """``log_softmax((hidden @ weight.T + bias) / temperature)[n, labels[n]]`` for each row n.

    Sums, softmax and log are in float32 (float64 for float64 input). On a CPU without bf16 instructions low-precision
    input is converted tile by tile and multiplied in float32, which is both faster there and more exact.

    Args:
        hidden: [N, H]; pass only rows that are trained, so that masked tokens cost nothing.
        weight: [V, H]. bias: [V].
        labels: [N] int64.
        temperature: above 0, a constant (no gradient); one number or [N].
        chunk_rows: rows of a tile. None: the plain formula when [N, V] is small (32 MiB), else tiles of a fixed budget
            (16 MiB on CPU, 512 MiB on CUDA).

    Returns:
        [N] float32 (float64 for float64 input). Gradients for hidden, weight and bias, in their own dtypes, as far as
        they require any.

    Raises:
        ValueError: shapes that do not fit, a label outside [0, V), or ``chunk_rows`` below 1.
    """
    _check(hidden, weight, labels, bias, chunk_rows)
    hidden, weight = _one_dtype(hidden, weight)
    scale = _row_temperature(temperature, hidden)
    accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows, vocabulary = labels.shape[0], weight.shape[0]
    with torch.autocast(hidden.device.type, enabled=False):  # it would undo the choice of dtype made here
        if chunk_rows is None and rows * vocabulary * accumulate.itemsize <= DIRECT_BYTES:
            return _direct(hidden, weight, labels, scale, bias, accumulate)
        budget = CUDA_TILE_BYTES if hidden.device.type == "cuda" else CPU_TILE_BYTES
        chunk = min(chunk_rows or MAX_CHUNK_ROWS, max(rows, 1))
        widest = max(chunk, hidden.shape[1])  # a block's weight slice counts too: [block, H] beside [chunk, block]
        block = min(max(budget // (widest * accumulate.itemsize), MIN_VOCAB_BLOCK), vocabulary)
        logprobs: torch.Tensor = _TiledLogprobs.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            hidden, weight, labels, scale, bias, chunk, block
        )
        return logprobs


def _direct(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    accumulate: torch.dtype,
) -> torch.Tensor:
    product = _product_dtype(hidden)
    logits = (hidden.to(product) @ weight.to(product).t()).to(accumulate)
    if bias is not None:
        logits = logits + bias.to(accumulate)
    if scale is not None:
        logits = logits / scale[:, None]
    return logits.gather(1, labels[:, None]).squeeze(1) - logits.logsumexp(1)


class _TiledLogprobs(torch.autograd.Function):
    """The tiled form. ``chunk`` rows × ``block`` vocabulary entries at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        chunk: int,
        block: int,
    ) -> torch.Tensor:
        product = _product_dtype(hidden)
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = labels.shape[0]
        # Log-sum-exp over vocabulary blocks as they come: the largest logit so far, and the sum relative to it.
        largest = torch.full((rows,), -torch.inf, dtype=accumulate, device=hidden.device)
        total = torch.zeros_like(largest)
        chosen = torch.full_like(largest, torch.nan)
        converted = hidden.to(product)
        for v in range(0, weight.shape[0], block):
            part = weight[v : v + block].to(product)
            for n in range(0, rows, chunk):
                at = slice(n, n + chunk)
                logits = _tile(converted[at], part, _slice(bias, v, block), _slice(scale, n, chunk), accumulate)
                inside, local = _in_block(labels[at], v, part.shape[0])
                chosen[at] = torch.where(inside, logits.gather(1, local).squeeze(1), chosen[at])
                new = torch.maximum(largest[at], logits.amax(1))
                total[at] = total[at] * (largest[at] - new).exp() + logits.sub_(new[:, None]).exp_().sum(1)
                largest[at] = new
        lse = largest + total.log()
        ctx.save_for_backward(hidden, weight, labels, scale, bias, lse)
        ctx.chunk, ctx.block = chunk, block
        return chosen - lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels, scale, bias, lse = ctx.saved_tensors
        want_hidden, want_weight, _, _, want_bias, _, _ = ctx.needs_input_grad
        chunk, block, rows = ctx.chunk, ctx.block, labels.shape[0]
        product = _product_dtype(hidden)
        # With z the logits before the temperature: d logprob / d z = (onehot - softmax) / temperature.
        outer = grad_logprobs.to(lse) if scale is None else grad_logprobs.to(lse) / scale
        grad_hidden = torch.zeros(hidden.shape, dtype=lse.dtype, device=hidden.device) if want_hidden else None
        grad_weight = torch.empty_like(weight) if want_weight else None
        grad_bias = torch.empty_like(bias) if want_bias else None
        converted = hidden.to(product)
        for v in range(0, weight.shape[0], block):
            part = weight[v : v + block].to(product)
            weight_sum = _sum_for(grad_weight, slice(v, v + block), lse.dtype)
            bias_sum = _sum_for(grad_bias, slice(v, v + block), lse.dtype)
            for n in range(0, rows, chunk):
                at = slice(n, n + chunk)
                tile = _tile(converted[at], part, _slice(bias, v, block), _slice(scale, n, chunk), lse.dtype)
                tile.sub_(lse[at, None]).exp_().mul_(-outer[at, None])
                inside, local = _in_block(labels[at], v, part.shape[0])
                tile.scatter_add_(1, local, torch.where(inside, outer[at], torch.zeros_like(outer[at]))[:, None])
                if bias_sum is not None:
                    bias_sum += tile.sum(0)
                factor = tile.to(product)
                if grad_hidden is not None:
                    _add_product(grad_hidden[at], factor, part)
                if weight_sum is not None:
                    _add_product(weight_sum, factor.t(), converted[at])
            for into, summed in ((grad_weight, weight_sum), (grad_bias, bias_sum)):
                if into is not None and summed is not None and into.dtype != summed.dtype:
                    into[v : v + block] = summed
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            grad_weight,
            None,
            None,
            grad_bias,
            None,
            None,
        )


# ---------------------------------------------------------------------- parts


def _tile(
    hidden: torch.Tensor,
    part: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    accumulate: torch.dtype,
) -> torch.Tensor:
    """Logits [chunk, block] over the temperature, in a fresh tensor that may be changed in place."""
    logits = (hidden @ part.t()).to(accumulate)
    if bias is not None:
        logits.add_(bias.to(accumulate))
    if scale is not None:
        logits.div_(scale[:, None])
    return logits


def _sum_for(gradient: torch.Tensor | None, block: slice, dtype: torch.dtype) -> torch.Tensor | None:
    """Zeros to sum a block of ``gradient`` in: the block itself where its dtype is that of the sums."""
    if gradient is None:
        return None
    return gradient[block].zero_() if gradient.dtype == dtype else torch.zeros_like(gradient[block], dtype=dtype)


def _add_product(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``into += left @ right``; ``into`` may be of higher precision."""
    if into.dtype == left.dtype:
        into.addmm_(left, right)
    else:
        into.add_(left @ right)


def _in_block(labels: torch.Tensor, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[n] which labels lie in the block, and [n, 1] an index within it that is valid for every row."""
    local = labels - start
    return (local >= 0) & (local < size), local.clamp(0, size - 1)[:, None]


def _slice(values: torch.Tensor | None, start: int, size: int) -> torch.Tensor | None:
    return None if values is None else values[start : start + size]


def _row_temperature(temperature: float | torch.Tensor, hidden: torch.Tensor) -> torch.Tensor | None:
    """[N], or None for 1."""
    if not isinstance(temperature, torch.Tensor):
        if temperature == 1.0:
            return None
        temperature = torch.tensor(temperature, dtype=torch.float64)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return temperature.detach().to(device=hidden.device, dtype=dtype).expand(hidden.shape[0])


def _one_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as ``nn.Linear`` would multiply them: autocast's dtype where it is on, else the wider of the two."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(dtype), weight.to(dtype)


def _product_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What to multiply in: the input's dtype, but float32 for half precision on a CPU that only emulates it.

    Measured on two cores without such instructions: a bf16 product takes four times as long as a float32 one.
    """
    if hidden.dtype in (torch.float32, torch.float64) or hidden.device.type != "cpu":
        return hidden.dtype
    # Private names of torch 2.13, so looked up with a default: without them the float32 path is taken.
    probes = [getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    if hidden.dtype == torch.bfloat16 and any(probe() for probe in probes if probe is not None):
        return hidden.dtype
    return torch.float32


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    chunk_rows: int | None,
) -> None:
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"{shapes}: expected [N, H], [V, H] and [N]")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"{shapes}: one label per row is needed")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows = {chunk_rows}: must be at least 1")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < weight.shape[0]:
        raise ValueError(f"labels [{labels.min()}, {labels.max()}] reach outside the vocabulary [0, {weight.shape[0]})")
