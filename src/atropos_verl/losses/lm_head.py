"""Logprobs of given tokens straight from hidden states, without an autograd graph over [N, V] logits.

Shapes: ``N`` rows (positions that predict a trained token), ``H`` hidden size, ``V`` vocabulary.

With z the logits before the temperature, ``d logprob / d z = -D / temperature``, ``D = softmax - onehot(label)``.
Nothing in ``D`` depends on what the loss does with the logprobs, so forward leaves it where the logits were, in the
dtype of the product; backward is two matrix products of it, with the loss's factor of each row applied to their [N, H]
sides. That is as many products as the plain formula makes, and one [N, V] buffer where autograd holds several. Only
``KEEP_BYTES`` of ``D`` are kept; rows beyond them are computed again in the backward, one bufferful after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

__all__ = ["linear_token_logprobs"]

DIRECT_BYTES = 32 * 2**20
"""Up to this size of [N, V] the plain formula is used: it is faster, and its memory does not matter."""
KEEP_BYTES = {torch.float64: 2**31, torch.float32: 2**31, torch.bfloat16: 2**29, torch.float16: 2**29}
"""Of ``D``, by the dtype of the input. Measured with ``benchmarks/bench_loss.py --sweep``: what is kept saves a product
(a quarter of the work); half precision is chosen where memory is short, so it stays below an eighth of the plain
formula's at the size of the benchmark. A constant rather than a share of the free memory: two runs stay bit for bit
equal."""
SCRATCH_BYTES = 128 * 2**20
"""Of rows whose ``D`` is not kept, in the forward."""
SLICE_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
"""Of the float32 rows that are exponentiated at a time: what two cores' caches hold, or enough to fill a GPU."""
CONVERTED_BLOCK = 8192
"""Vocabulary entries converted at a time where the product is made in another dtype than the weight's."""


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    keep_bytes: int | None = None,
) -> torch.Tensor:
    """``log_softmax((hidden @ weight.T + bias) / temperature)[n, labels[n]]`` for each row n.

    Sums, softmax and log are in float32 (float64 for float64 input). On a CPU without bf16 instructions low-precision
    input is converted block by block and multiplied in float32, which is both faster there and more exact.

    Args:
        hidden: [N, H]; pass only rows that are trained, so that masked tokens cost nothing.
        weight: [V, H]. bias: [V].
        labels: [N] int64.
        temperature: above 0, a constant (no gradient); one number or [N].
        keep_bytes: bound on what is kept for the backward; at least one row is. None: the plain formula when [N, V] is
            small (32 MiB), else ``KEEP_BYTES`` of the dtype.

    Returns:
        [N] float32 (float64 for float64 input). Gradients for hidden, weight and bias, in their own dtypes, as far as
        they require any. A half-precision weight's gradient is rounded once per ``keep_bytes`` of rows.

    Raises:
        ValueError: shapes that do not fit, a label outside [0, V), or ``keep_bytes`` below 1.
    """
    _check(hidden, weight, labels, bias, keep_bytes)
    hidden, weight = _one_dtype(hidden, weight)
    scale = _row_temperature(temperature, hidden)
    accumulate = _accumulate_dtype(hidden)
    rows, vocabulary = labels.shape[0], weight.shape[0]
    with torch.autocast(hidden.device.type, enabled=False):  # it would undo the choice of dtype made here
        if keep_bytes is None and rows * vocabulary * accumulate.itemsize <= DIRECT_BYTES:
            return _direct(hidden, weight, labels, scale, bias, accumulate)
        logprobs: torch.Tensor = _KeptLogprobs.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            hidden, weight, labels, scale, bias, keep_bytes or KEEP_BYTES[hidden.dtype]
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


class _KeptLogprobs(torch.autograd.Function):
    """The first ``keep_bytes`` of rows leave their ``D`` for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        keep_bytes: int,
    ) -> torch.Tensor:
        rows = labels.shape[0]
        row_bytes = weight.shape[0] * _product_dtype(hidden).itemsize
        logprobs = torch.empty(rows, dtype=_accumulate_dtype(hidden), device=hidden.device)
        ctx.kept = None
        done = 0
        if any(ctx.needs_input_grad):
            done = min(rows, max(keep_bytes // row_bytes, 1))
            ctx.kept = _buffer(done, hidden, weight)
            _fill(ctx.kept, hidden[:done], weight, labels[:done], _rows(scale, 0, done), bias, logprobs[:done])
        ctx.pass_rows = done
        step = max(min(SCRATCH_BYTES, keep_bytes) // row_bytes, 1)
        scratch = _buffer(min(step, rows - done), hidden, weight)
        for at in range(done, rows, step):
            end = min(at + step, rows)
            where = (hidden[at:end], weight, labels[at:end], _rows(scale, at, end), bias)
            _fill(scratch[: end - at], *where, logprobs[at:end])
        ctx.save_for_backward(hidden, weight, labels, scale, bias)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels, scale, bias = ctx.saved_tensors
        want_hidden, want_weight, _, _, want_bias, _ = ctx.needs_input_grad
        # Overwritten below, so a second backward through a retained graph computes it again.
        kept, ctx.kept = ctx.kept, None
        fresh = kept is not None
        step, rows = ctx.pass_rows, labels.shape[0]
        buffer = kept if kept is not None else _buffer(step, hidden, weight)
        factor = -grad_logprobs if scale is None else -grad_logprobs / scale
        grad_hidden = torch.zeros(hidden.shape, dtype=factor.dtype, device=hidden.device) if want_hidden else None
        grad_weight = torch.zeros_like(weight) if want_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=factor.dtype, device=bias.device) if want_bias else None
        unused = torch.empty_like(factor)
        for at in range(0, rows, max(step, 1)):
            end = min(at + step, rows)
            part, factors = buffer[: end - at], factor[at:end]
            if at > 0 or not fresh:
                where = (hidden[at:end], weight, labels[at:end], _rows(scale, at, end), bias)
                _fill(part, *where, unused[at:end])
            weighted = (hidden[at:end].to(factor.dtype) * factors[:, None]).to(part.dtype)
            for block, converted in _blocks(weight, part.dtype):
                if grad_hidden is not None:
                    _add_product(grad_hidden[at:end], part[:, block], converted)
                if grad_weight is not None:
                    _add_product(grad_weight[block], part[:, block].t(), weighted)
            if grad_hidden is not None:
                grad_hidden[at:end] *= factors[:, None]
            if grad_bias is not None:
                grad_bias += torch.mv(part.t(), factors.to(part.dtype))
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            grad_weight,
            None,
            None,
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
        )


# ---------------------------------------------------------------------- parts


def _buffer(rows: int, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.empty(rows, weight.shape[0], dtype=_product_dtype(hidden), device=hidden.device)


def _fill(
    into: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    logprobs: torch.Tensor,
) -> None:
    """``D`` of n rows into ``into`` [n, V], and their ``logprobs`` [n].

    The product is made for all rows at once; what follows goes over it in slices that stay in the processor's cache.
    """
    source = hidden.to(into.dtype)
    for block, converted in _blocks(weight, into.dtype):
        if block.stop - block.start == weight.shape[0]:
            torch.mm(source, converted.t(), out=into)
        else:
            into[:, block] = source @ converted.t()
    vocabulary = weight.shape[0]
    wide = None if bias is None else bias.to(logprobs.dtype)
    on_cpu = into.device.type == "cpu"
    budget = SLICE_BYTES["cpu" if on_cpu else "cuda"]
    step = max(budget // (vocabulary * logprobs.dtype.itemsize), 1)
    own = into.dtype == logprobs.dtype
    scratch = None if own else torch.empty(step, vocabulary, dtype=logprobs.dtype, device=into.device)
    for at in range(0, into.shape[0], step):
        rows = into[at : at + step]
        values = rows if scratch is None else scratch[: rows.shape[0]].copy_(rows)
        if wide is not None:
            values += wide
        if scale is not None:
            values /= scale[at : at + step, None]
        largest = values.amax(1)
        label = labels[at : at + step, None]
        chosen = values.gather(1, label).squeeze(1) - largest
        # In place on a CPU, whose softmax reads a row to its end before it writes; the largest entry is 1 / sum(exp).
        softmax = torch.softmax(values, 1, out=values if on_cpu else None)
        logprobs[at : at + step] = chosen + softmax.amax(1).log()
        softmax.scatter_add_(1, label, torch.full_like(chosen, -1.0)[:, None])
        if scratch is not None or not on_cpu:
            rows.copy_(softmax)


def _blocks(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """The weight in ``dtype``: whole if it is in it already, else converted block by block."""
    size = weight.shape[0] if weight.dtype == dtype else CONVERTED_BLOCK
    for start in range(0, weight.shape[0], size):
        block = slice(start, min(start + size, weight.shape[0]))
        yield block, weight[block].to(dtype)


def _add_product(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``into += left @ right``, in whatever dtype ``into`` has."""
    if into.dtype == left.dtype:
        into.addmm_(left, right)
    else:
        into.add_(left @ right)


def _rows(values: torch.Tensor | None, start: int, end: int) -> torch.Tensor | None:
    return None if values is None else values[start:end]


def _accumulate_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


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
    keep_bytes: int | None,
) -> None:
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"{shapes}: expected [N, H], [V, H] and [N]")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"{shapes}: one label per row is needed")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
    if keep_bytes is not None and keep_bytes < 1:
        raise ValueError(f"keep_bytes = {keep_bytes}: must be at least 1")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < weight.shape[0]:
        raise ValueError(f"labels [{labels.min()}, {labels.max()}] reach outside the vocabulary [0, {weight.shape[0]})")
