"""Logprobs of given tokens straight from hidden states, without an autograd graph over [N, V] logits.

Shapes: ``N`` rows (positions that predict a trained token), ``H`` hidden size, ``V`` vocabulary.

With z the logits before the temperature, ``d logprob / d z = -D / temperature``, ``D = softmax - onehot(label)``.
Nothing in ``D`` depends on what the loss does with the logprobs, so forward leaves it where the logits were, in the
dtype of the product; backward is two matrix products of it, with the loss's factor of each row applied to their [N, H]
sides. That is as many products as the plain formula makes, and one [N, V] buffer where autograd holds several. Only
``KEEP_BYTES`` of ``D`` are kept; rows beyond them are computed again in the backward, one bufferful after the other.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

KEEP_BYTES = {torch.float64: 2**31, torch.float32: 2**31, torch.bfloat16: 2**30, torch.float16: 2**30}
"""Of ``D``, by the dtype of the input. Rows beyond it cost a fourth product and another pass over the weight: at 2,048
rows of 151,936 in bf16, keeping all took 4.7 s and seven eighths 5.8 s (``benchmarks/bench_loss.py --full --sweep``).
A constant rather than a share of the free memory: two runs stay bit for bit equal."""
SCRATCH_BYTES = 128 * 2**20
"""Of rows whose ``D`` is not kept, in the forward."""
SLICE_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
"""Of the rows that are exponentiated at a time: what a core's cache holds (256 KiB to 16 MiB made no difference above
4 %), or enough to fill a GPU (not measured)."""
BLOCK = 16384
"""Vocabulary entries of one block of ``D``. Backward gives each block back as soon as it is used, while the gradient of
the weight grows by as much: the two are never whole at the same time."""


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    keep_bytes: int | None = None,
) -> torch.Tensor:
    """``log_softmax((hidden @ weight.T + bias) / temperature)[n, labels[n]]`` for each row n.

    Sums, softmax and log, and the result [N], are in float32 (float64 for float64 input). A half-precision weight's
    gradient is rounded once per ``keep_bytes`` of rows.

    Args:
        hidden: [N, H]; pass only rows that are trained, so that masked tokens cost nothing.
        weight: [V, H]. bias: [V]. labels: [N] int64.
        temperature: above 0, a constant (no gradient); one number or [N].
        keep_bytes: bound on what is kept for the backward; at least one row is. None: ``KEEP_BYTES`` of the dtype."""
    hidden, weight = _one_dtype(hidden, weight)
    scale = torch.as_tensor(temperature, dtype=_accumulate_dtype(hidden), device=hidden.device).detach()
    with torch.autocast(hidden.device.type, enabled=False):  # it would undo the choice of dtype made here
        given = hidden, weight, labels, scale.expand(len(labels)), bias, keep_bytes or KEEP_BYTES[hidden.dtype]
        return _KeptLogprobs.apply(*given)  # type: ignore[no-untyped-call,no-any-return]  # torch leaves it untyped


def linear_token_figures(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """[N, 2] float32, without a gradient: what ``linear_token_logprobs`` gives, and the entropy (nats) of each row's
    distribution."""
    hidden, weight = _one_dtype(hidden, weight)
    found = torch.empty(labels.shape[0], 2, device=hidden.device)
    step = max(SCRATCH_BYTES // (weight.shape[0] * found.itemsize), 1)
    with torch.autocast(hidden.device.type, enabled=False):
        weight = weight.to(_product_dtype(hidden))
        for at in range(0, labels.shape[0], step):
            rows = slice(at, at + step)
            logprobs = (_logits(hidden[rows], weight, bias) / temperature[rows, None]).log_softmax(1)
            found[rows, 0] = logprobs.gather(1, labels[rows, None]).squeeze(1)
            found[rows, 1] = -(logprobs.exp() * logprobs).nan_to_num_(0.0).sum(1)  # 0 · -inf is 0
    return found


def linear_teacher_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    bias: torch.Tensor | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> torch.Tensor:
    """KL(teacher ‖ student) in nats of each row n, over the ids that the teacher names and one more entry, the rest.

    With p the teacher's probabilities and ``q = softmax(hidden @ weight.T + bias)``, both at temperature 1::

        KL[n] = Σ_k p_k (log p_k - log q_k) + r log(r / (1 - Σ_k q_k)),   r = 1 - Σ_k p_k

    It is never negative, 0 only where the student agrees on every named id, at most the KL over the whole vocabulary,
    and that where every id is named. (verl's ``forward_kl_topk`` leaves the rest out; its least value is a student that
    puts the teacher's rest on the named ids.)

    ``ids`` [N, K] int64, none twice in a row; -1 from some k > 0 on: no more. ``logprobs`` [N, K] are the teacher's,
    -inf where there is no id. ``scratch_bytes`` bounds the logits that are held at a time; the backward makes them
    again. [N] float32 (float64 for float64 input), with gradients for hidden, weight and bias."""
    hidden, weight = _one_dtype(hidden, weight)
    step = max(scratch_bytes // (weight.shape[0] * _accumulate_dtype(hidden).itemsize), 1)
    parts = [slice(at, at + step) for at in range(0, max(len(ids), 1), step)]
    with torch.autocast(hidden.device.type, enabled=False):
        rows = [(hidden[part], weight, ids[part], logprobs[part], bias) for part in parts]
        return torch.cat([checkpoint(_teacher_kl, *row, use_reentrant=False) for row in rows])


def _teacher_kl(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    logits, dtype = _logits(hidden, weight, bias), _accumulate_dtype(hidden)
    is_named = ids >= 0
    named = torch.where(is_named, ids, ids[:, :1])
    total = logits.logsumexp(1)
    # From the logits themselves: 1 - Σ q loses all digits where the rest is small. Finite, or its gradient were NaN.
    log_rest = logits.scatter(1, named, -1e30).logsumexp(1) - total
    chosen = logits.gather(1, named) - total[:, None]
    teacher = torch.where(is_named, logprobs.double().exp(), 0.0)
    rest = (1 - teacher.sum(1)).clamp(min=0) * (is_named.sum(1) < weight.shape[0])
    constant = torch.xlogy(teacher, teacher).sum(1) + torch.xlogy(rest, rest)
    return constant.to(dtype) - (teacher.to(dtype) * chosen).sum(1) - rest.to(dtype) * log_rest


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[N, V] before the temperature, in the dtype in which sums are taken."""
    product, dtype = _product_dtype(hidden), _accumulate_dtype(hidden)
    logits = (hidden.to(product) @ weight.to(product).t()).to(dtype)
    return logits if bias is None else logits + bias.to(dtype)


class _KeptLogprobs(torch.autograd.Function):
    """The first ``keep_bytes`` of rows leave their ``D`` for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        keep_bytes: int,
    ) -> torch.Tensor:
        rows, inputs = labels.shape[0], (hidden, weight, labels, scale, bias)
        row_bytes = weight.shape[0] * _product_dtype(hidden).itemsize
        logprobs = torch.empty(rows, dtype=_accumulate_dtype(hidden), device=hidden.device)
        ctx.kept, ctx.pass_rows = [], 0
        if any(ctx.needs_input_grad):
            ctx.pass_rows = min(rows, max(keep_bytes // row_bytes, 1))
            ctx.kept = _difference(slice(0, ctx.pass_rows), *inputs, logprobs)
        step = max(min(SCRATCH_BYTES, keep_bytes) // row_bytes, 1)
        for at in range(ctx.pass_rows, rows, step):
            _difference(slice(at, at + step), *inputs, logprobs)
        ctx.save_for_backward(*inputs)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels, scale, bias = ctx.saved_tensors
        want_hidden, want_weight, _, _, want_bias, _ = ctx.needs_input_grad
        # Given back as it is used, so a second backward through a retained graph computes it again.
        kept, ctx.kept = ctx.kept, []
        factor = -grad_logprobs / scale
        grad_hidden = torch.zeros(hidden.shape, dtype=factor.dtype, device=hidden.device) if want_hidden else None
        # Not zeros: its pages are taken block by block, as those of ``kept`` go.
        grad_weight = torch.empty_like(weight) if want_weight else None
        if grad_weight is not None and not labels.numel():
            grad_weight.zero_()
        grad_bias = torch.zeros(bias.shape, dtype=factor.dtype, device=bias.device) if want_bias else None
        unused = torch.empty_like(factor)
        for at in range(0, labels.shape[0], max(ctx.pass_rows, 1)):
            rows = slice(at, at + ctx.pass_rows)
            factors = factor[rows]
            kept = kept or _difference(rows, hidden, weight, labels, scale, bias, unused)
            weighted = (hidden[rows].to(factor.dtype) * factors[:, None]).to(kept[0].dtype)
            for start in range(0, weight.shape[0], BLOCK):
                block = slice(start, start + BLOCK)
                part = kept.pop(0)
                if grad_hidden is not None:
                    _add_product(grad_hidden[rows], part, weight[block].to(part.dtype))
                if grad_weight is not None:
                    _add_product(grad_weight[block], part.t(), weighted, fresh=at == 0)
                if grad_bias is not None:
                    grad_bias[block] += torch.mv(part.t(), factors.to(part.dtype))
            if grad_hidden is not None:
                grad_hidden[rows] *= factors[:, None]
        of_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return of_hidden, grad_weight, None, None, None if grad_bias is None else grad_bias.to(bias.dtype), None


def _difference(
    rows: slice,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    logprobs: torch.Tensor,
) -> list[torch.Tensor]:
    """``D`` of n ``rows`` as blocks [n, ≤ BLOCK] in the dtype of the product; writes their ``logprobs``. The product is
    made for all rows at once; what follows goes over it in slices that stay in the processor's cache."""
    hidden, labels, scale, logprobs = hidden[rows], labels[rows], scale[rows], logprobs[rows]
    count, vocabulary = labels.shape[0], weight.shape[0]
    source = hidden.to(_product_dtype(hidden))
    blocks = [source @ weight[v : v + BLOCK].to(source.dtype).t() for v in range(0, vocabulary, BLOCK)]
    wide = None if bias is None else bias.to(logprobs.dtype)
    on_cpu = hidden.device.type == "cpu"
    step = max(SLICE_BYTES["cpu" if on_cpu else "cuda"] // (vocabulary * logprobs.dtype.itemsize), 1)
    scratch = torch.empty(min(step, count), vocabulary, dtype=logprobs.dtype, device=hidden.device)
    for at in range(0, count, step):
        end = min(at + step, count)
        values = scratch[: end - at]
        for number, block in enumerate(blocks):
            values[:, number * BLOCK : number * BLOCK + block.shape[1]].copy_(block[at:end])
        if wide is not None:
            values += wide
        values /= scale[at:end, None]
        largest = values.amax(1)
        label = labels[at:end, None]
        chosen = values.gather(1, label).squeeze(1) - largest
        # In place on a CPU, whose softmax reads a row to its end before it writes; the largest entry is 1 / sum(exp).
        softmax = torch.softmax(values, 1, out=values if on_cpu else None)
        logprobs[at:end] = chosen + softmax.amax(1).log()
        softmax.scatter_add_(1, label, torch.full_like(chosen, -1.0)[:, None])
        for number, block in enumerate(blocks):
            block[at:end].copy_(softmax[:, number * BLOCK : number * BLOCK + block.shape[1]])
    return blocks


def _add_product(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, fresh: bool = False) -> None:
    """``into += left @ right``, in whatever dtype ``into`` has. ``fresh``: ``into`` holds nothing yet."""
    if into.dtype == left.dtype:
        into.addmm_(left, right, beta=0 if fresh else 1)
    elif fresh:
        into.copy_(left @ right)
    else:
        into.add_(left @ right)


def _accumulate_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _one_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as ``nn.Linear`` would multiply them: autocast's dtype where it is on, else the wider of the two."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(dtype), weight.to(dtype)


def _product_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The input's, but float32 for half precision on a CPU that only emulates it, where a bf16 product takes four
    times as long (measured on two cores)."""
    if hidden.dtype in (torch.float32, torch.float64) or hidden.device.type != "cpu":
        return hidden.dtype
    # Private names of torch 2.13, so looked up with a default: without them the float32 path is taken.
    probes = [getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    if hidden.dtype == torch.bfloat16 and any(probe() for probe in probes if probe is not None):
        return hidden.dtype
    return torch.float32
