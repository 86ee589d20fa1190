"""Joined sequences give the loss, gradients and logprobs of separate ones; the head computes only trained rows."""

import functools
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.engines import TINY
from support.samples import branching_samples
from support.tiny_model import build_tiny_model, build_tiny_tokenizer
from verl.utils import tensordict_utils as tu
from verl.workers import config as verls

from atropos_verl.backends.local.worker import PolicyWorker
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.types import TrainingSample
from atropos_verl.verl_plugin import engines, prefix_forest
from atropos_verl.verl_plugin.prefix_forest import build_forest, joined


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"), num_attention_heads=4, num_key_value_heads=2)


@functools.cache
def _model(path: Path, dtype: torch.dtype = torch.float64, packed: bool = True, attention: str = "sdpa") -> Any:
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(str(path), dtype=torch.float64, attn_implementation=attention)
    if packed:
        assert engines.install_packed_attention(model)
        assert model.config._attn_implementation == engines.ATTENTION[attention]
    return model.to(dtype)


def _worker(path: Path, budget: int = 100, *, share: bool = True, **values: Any) -> PolicyWorker:
    trainer = {"device": "cpu", "max_token_len_per_gpu": budget, "share_prefixes": share}
    return PolicyWorker(RunConfig.from_mapping({"trainer": trainer, **values}), path)


def _count_tokens(worker: PolicyWorker) -> list[int]:
    """Gets the number of tokens of each forward from now on."""
    counts: list[int] = []
    embedding = worker._worker.engine.module.get_input_embeddings()
    embedding.register_forward_hook(lambda _module, inputs, _output: counts.append(inputs[0].numel()))
    return counts


def _log_softmax(model: Any, sample: TrainingSample, temperature: float | None = None) -> torch.Tensor:
    """[T - 1, V] by a plain forward of one sequence."""
    logits = model(torch.from_numpy(sample.token_ids)[None], use_cache=False).logits[0, :-1]
    return (logits / (temperature or sample.temperature)).log_softmax(-1)


def _set_blocks(patch: pytest.MonkeyPatch, dense: int, branch: int, mask: int) -> None:
    patch.setattr(prefix_forest, "DENSE_TOKENS", dense)
    patch.setattr(engines, "BRANCH_BLOCK", branch)
    patch.setattr(engines, "MASK_ELEMENTS", mask)


def _logits(model: Any, rows: list[torch.Tensor], shares: bool | None) -> torch.Tensor:
    """[N, V] of each token of ``rows``, joined in one row with shared prefixes or without; None: each by itself."""
    if shares is None:
        return torch.cat([model(ids[None], use_cache=False).logits[0] for ids in rows])
    row = build_forest([ids.numpy() for ids in rows]) if shares else joined([len(ids) for ids in rows])
    flat, positions = torch.cat(rows), torch.cat([torch.arange(len(ids)) for ids in rows])
    inputs = {"input_ids": flat[row.first][None], "position_ids": positions[row.first][None]}
    return model(**inputs, packed_row=row, use_cache=False).logits[0][row.place]


def _figures(model: Any, rows: list[torch.Tensor], seed: int, shares: bool | None) -> tuple[torch.Tensor, ...]:
    """Loss [], logprobs [N - rows] and the gradient of each parameter, of ``rows``, each with weights and a temperature
    of its own."""
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    logits = _logits(model, rows, shares)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    found = []
    for part, ids in zip(logits.split([len(ids) for ids in rows]), rows, strict=True):
        temperature = 0.5 + torch.rand(1, generator=generator)
        found.append((part[:-1] / temperature).log_softmax(-1).gather(1, ids[1:, None]).squeeze(1))
    logprobs = torch.cat(found)
    weights = torch.randn(len(logprobs), generator=generator) * (torch.rand(len(logprobs), generator=generator) > 0.3)
    loss = -(logprobs * weights).sum() / len(logprobs)
    loss.backward()
    return loss.detach(), logprobs.detach(), *(parameter.grad.clone() for parameter in model.parameters())


def _in_all(figures: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """With the gradients as one vector, in float32."""
    return *figures[:2], torch.cat([gradient.flatten().float() for gradient in figures[2:]])


def _grown(plan: list[tuple[int, int, int]], seed: int) -> list[torch.Tensor]:
    """Rows of ids by (which row each branches off, where, its own tokens)."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[torch.Tensor] = []
    for parent, at, own in plan:
        before = rows[parent % len(rows)][:at] if rows else torch.zeros(0, dtype=torch.int64)
        rows.append(torch.cat([before, torch.randint(0, 250, (own,), generator=generator)]))
    return rows


FORESTS = int(os.environ.get("ATROPOS_VERL_FORESTS", "24"))
"""Random forests of the tests below."""
PLANS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 60), st.integers(2, 40)), min_size=2, max_size=12)
# Branches of one sequence, a beginning of it, and it again.
PLAN = [*((0, 0, own) for own in (3, 17, 1, 30, 6)), *((3, at, 17) for at in (9, 9, 20)), (3, 12, 0), (3, 30, 0)]


@settings(max_examples=FORESTS, deadline=None, suppress_health_check=list(HealthCheck))
@example(plan=PLAN, block=4, seed=3)
@example(plan=PLAN, block=256, seed=3)
@given(plan=PLANS, block=st.sampled_from([4, 32, 256]), seed=st.integers(0, 1000))
def test_loss_and_every_gradient_of_packed_forests_equal_those_of_separate_sequences(
    model_path: Path, plan: list[tuple[int, int, int]], block: int, seed: int
) -> None:
    """With a small ``block`` branches are long ones, whose masks are made part by part, and again in the backward."""
    rows, model = _grown(plan, seed), _model(model_path)
    expected = _figures(_model(model_path, packed=False), rows, seed, None)
    names = ["loss", "logprobs", *(name for name, _ in model.named_parameters())]
    for shares in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            _set_blocks(patch, block, block, 8 * block)
            found = _figures(model, rows, seed, shares)
        for name, value, reference in zip(names, found, expected, strict=True):
            # RMSNorm rounds to float32; sums over branches are rounded once where single ones are rounded one by one.
            limit = 1e-6 if shares and name not in ("loss", "logprobs") else 1e-12
            assert (value - reference).norm() <= limit * (reference.norm() + 1e-3), name


@settings(max_examples=FORESTS, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=PLANS, block=st.sampled_from([4, 32, 256]), seed=st.integers(0, 1000))
def test_random_forests_in_float32_give_loss_gradients_and_logprobs_of_sequences_end_to_end(
    model_path: Path, plan: list[tuple[int, int, int]], block: int, seed: int
) -> None:
    rows, model = _grown(plan, seed), _model(model_path, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        _set_blocks(patch, block, block, 8 * block)
        flat, shared = (_in_all(_figures(model, rows, seed, shares)) for shares in (False, True))
    for expected, found in zip(flat, shared, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-7


@pytest.mark.parametrize("shares", [False, True])
def test_flex_attention_gives_the_logits_of_sdpa(
    model_path: Path, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's reference, without a compiler. (On a CPU it has no gradients.)"""
    from torch.nn.attention import flex_attention as flex
    from transformers.integrations import flex_attention as of_transformers

    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    reference = lambda *tensors, training, **rest: flex.flex_attention(*tensors, **rest)  # noqa: E731
    monkeypatch.setattr(of_transformers, "compile_friendly_flex_attention", reference)
    monkeypatch.setattr(prefix_forest, "FLEX_BLOCK", 16)
    rows = _grown([(0, 0, 30), (0, 20, 17), (0, 20, 9), (1, 30, 5), (0, 0, 21)], 1)
    with torch.no_grad():
        found = _logits(_model(model_path, attention="flex_attention"), rows, shares)
        expected = _logits(_model(model_path), rows, shares)
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def test_no_mask_of_a_long_branch_is_kept_for_the_backward(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two branches of 90 tokens below 60: their masks are 4 · 90 · 150 numbers a layer; none is larger than a block."""
    _set_blocks(monkeypatch, 16, 32, 32)
    rows = _grown([(0, 0, 150), (0, 60, 90)], 1)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        _figures(_model(model_path, torch.float32), rows, 0, shares=True)
    assert not {(32, 92), (32, 124), (26, 150), (90, 150), (150, 150)} & set(kept)


def test_in_bfloat16_the_error_against_float32_is_that_of_sequences_end_to_end(model_path: Path) -> None:
    """Logprobs and gradients; root mean square over random forests, since that of a few tokens is a matter of luck."""
    errors = np.zeros((2, 2))
    for seed in range(FORESTS // 4):
        rows = _grown(np.random.default_rng(seed).integers((0, 0, 2), (12, 60, 40), (10, 3)).tolist(), seed)
        exact = _in_all(_figures(_model(model_path, torch.float32), rows, seed, shares=False))
        for number, shares in enumerate((False, True)):
            found = _in_all(_figures(_model(model_path, torch.bfloat16), rows, seed, shares))
            errors[number] += [float((found[i] - exact[i]).norm() ** 2) for i in (1, 2)]
    assert (np.sqrt(errors[1] / errors[0]) <= 1.5).all(), errors


@pytest.mark.parametrize("budget", [64, 4096])
def test_each_kind_of_row_gives_logprobs_and_entropy_of_trained_tokens_and_shared_prefixes_are_computed_once(
    model_path: Path, budget: int
) -> None:
    samples = branching_samples(9)
    worker = _worker(model_path, budget)
    engine, counts = worker._worker.engine, _count_tokens(worker)
    worker.compute_logprobs(samples[:1])  # the probe is done
    seen = {}
    for kind in ("shared", "joined", "padded"):
        engine._shares, engine._packs = kind == "shared", kind != "padded"
        counts.clear()
        data, _ = worker._to_tensordict(samples, None)
        tu.assign_non_tensor(data, compute_loss=False, calculate_entropy=True)
        output = worker._worker.infer_batch(data)
        seen[kind] = list(counts)
        rows = zip(samples, output["log_probs"].unbind(), output["entropy"].unbind(), strict=True)
        for sample, logprobs, entropy in rows:
            mask = torch.from_numpy(sample.loss_mask[1:])
            with torch.no_grad():
                expected = _log_softmax(_model(model_path, packed=False), sample)
            chosen = expected.gather(1, torch.from_numpy(sample.token_ids)[1:, None]).squeeze(1) * mask
            spread = -(expected.exp() * expected).sum(-1) * mask
            assert logprobs[:-1].tolist() == pytest.approx(chosen.tolist(), abs=1e-5)
            assert entropy[:-1].tolist() == pytest.approx(spread.tolist(), abs=1e-5)
    total = sum(map(len, samples))
    assert max(seen["shared"]) <= budget and sum(seen["shared"]) < 0.8 * total
    if budget == 4096:
        assert seen["shared"] == [len(build_forest([sample.token_ids for sample in samples]).first)]
    assert sum(seen["joined"]) == total < sum(seen["padded"])


def test_the_probe_finds_a_model_that_looks_across_the_borders(model_path: Path) -> None:
    class Running(torch.nn.Module):
        """Its logits hold the sum of everything before in the row."""

        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=20))

        def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids, 20).float().cumsum(1))

    for share in (False, True):
        assert engines.packs_exactly(_model(model_path), torch.device("cpu"), share=share)
        model = Running().train()
        assert not engines.packs_exactly(model, torch.device("cpu"), share=share)
        assert model.training


def test_other_attention_is_not_packed() -> None:
    fields = {"layer_types": ["full_attention"], "sliding_window": 4096, "use_sliding_window": False}
    assert not engines.what_hinders_packing(SimpleNamespace(**fields, _attn_implementation="sdpa"))
    why = engines.what_hinders_packing(SimpleNamespace(**fields, _attn_implementation="flash_attention_2"))
    assert why == "its attention is flash_attention_2, not sdpa or flex_attention"


LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("Mistral", {"sliding_window": 4}, "its attention has a window of 4 tokens"),
        ("Gemma2", {"sliding_window": 4}, "it has layers of sliding_attention"),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "it has layers of conv"),
        ("Qwen3Next", LINEAR, "it has layers of linear_attention"),
    ],
)
def test_a_model_that_cannot_share_prefixes_is_trained_whole_and_the_log_says_so_once(
    name: str, fields: dict[str, Any], why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_tiny_tokenizer(tmp_path)
    config = getattr(transformers, f"{name}Config")(**TINY, head_dim=8, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    samples, total = branching_samples(3)[:6], 0.0
    for sample in samples:
        with torch.no_grad():
            logprobs = _log_softmax(model, sample).gather(1, torch.from_numpy(sample.token_ids)[1:, None]).squeeze(1)
        total -= (logprobs.double().numpy() * sample.advantages[1:] * sample.loss_mask[1:]).sum()
    expected = total / sum(sample.loss_mask.sum() for sample in samples)
    worker = _worker(tmp_path, 4096, optim={"lr": 0.0})
    for _ in range(2):
        assert worker.train(samples)["loss"] == pytest.approx(expected, rel=1e-4)
    said = [message for message in caplog.messages if "prefixes that sequences share" in message]
    assert said == [f"{name}ForCausalLM computes prefixes that sequences share for each of them: {why}"]


def _taught(samples: list[TrainingSample]) -> list[TrainingSample]:
    """Some with a teacher's values of their trained tokens (1 to 5 ids each), some with a reference's, some with both;
    the weights are 0.5 and 0.25."""
    rng = np.random.default_rng(0)
    found = []
    for index, sample in enumerate(samples):
        at = np.flatnonzero(sample.loss_mask)
        entries = [
            [t, token, np.log(0.15), 0.5] for t in at for token in rng.choice(200, rng.integers(1, 6), replace=False)
        ]
        teacher = np.array(entries, np.float64) if entries and index % 3 else None
        reference = np.column_stack([at, -3 * rng.random(len(at)), np.full(len(at), 0.25)]) if index % 2 else None
        found.append(replace(sample, teacher=teacher, reference=reference))
    return found


@pytest.mark.parametrize("strategy", ["shared", "joined", "padded"])
def test_the_kl_to_teacher_and_reference_is_added_to_the_loss_of_each_kind_of_row(
    model_path: Path, strategy: str
) -> None:
    """Loss and gradient norm of branches, in micro-batches, against a float64 model that runs each by itself."""
    samples = _taught(branching_samples(7))
    checkpointing = {"enable_gradient_checkpointing": strategy != "padded"}
    worker = _worker(model_path, share=strategy == "shared", optim={"lr": 0.0}, model=checkpointing)
    if strategy == "padded":
        worker._worker.engine._packs = False
    output = worker.train(samples)
    model = _model(model_path, packed=False)
    model.zero_grad()
    count = sum(sample.loss_mask.sum() for sample in samples)
    total = kls = torch.zeros((), dtype=torch.float64)
    tokens = 0
    for sample in samples:
        logprobs = _log_softmax(model, sample).gather(1, torch.from_numpy(sample.token_ids)[1:, None]).squeeze(1)
        total = total - (logprobs * torch.from_numpy(sample.advantages[1:] * sample.loss_mask[1:])).sum()
        for t, logprob, weight in () if sample.reference is None else sample.reference:
            log_ratio = logprob - logprobs[int(t) - 1]
            total = total + weight * (log_ratio.exp() - 1 - log_ratio)
        # The teacher is at temperature 1, whatever the rollout's was.
        own = _log_softmax(model, sample, 1.0)
        entries = np.zeros((0, 4)) if sample.teacher is None else sample.teacher
        for t in np.unique(entries[:, 0]).astype(int):
            _, named, p, _ = entries[entries[:, 0] == t].T
            q, p = own[t - 1, named.astype(int)].exp(), torch.from_numpy(np.exp(p))
            kl = (p * (p / q).log()).sum() + (1 - p.sum()) * ((1 - p.sum()) / (1 - q.sum())).log()
            total, kls, tokens = total + 0.5 * kl, kls + kl, tokens + 1
    (total / count).backward()
    norm = torch.sqrt(sum((parameter.grad**2).sum() for parameter in model.parameters()))
    assert output["loss"] == pytest.approx(float(total / count), rel=1e-5)
    assert output["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert output["distill/kl"] == pytest.approx(float(kls / tokens), rel=1e-5)
    assert output["distill/known"] == pytest.approx(tokens / count, rel=1e-6)
    assert 0 < output["ref/known"] < 1


def test_teachers_are_refused_where_the_head_is_verls_own(model_path: Path) -> None:
    worker = _worker(model_path)
    worker._worker.engine._selective = False
    with pytest.raises(ConfigError, match=r"distill: a teacher's values need trainer.strategy=fsdp2"):
        worker.train(_taught(branching_samples(7)))


def test_shared_prefixes_with_an_adapter_and_with_the_reference_that_is_the_model_without_it(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA as verl builds it on Ray: loss, gradient norm, adapters, and the logprobs that a KL term needs."""
    lora = {"lora_rank": 4, "lora_alpha": 16, "target_modules": "all-linear"}
    monkeypatch.setattr(verls, "HFModelConfig", functools.partial(verls.HFModelConfig, **lora))
    samples = branching_samples(11)

    def trained(shares: bool) -> tuple[Any, ...]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of the adapters
            worker = _worker(model_path, share=shares, optim={"lr": 1e-2})
        counts = _count_tokens(worker)
        outputs = [worker.train(samples) for _ in range(2)]
        parameters = worker._worker.engine.module.named_parameters()
        adapters = {name: parameter.full_tensor() for name, parameter in parameters if "lora" in name}
        logprobs = []
        for reference in (False, True):
            data, _ = worker._to_tensordict(samples, None)
            tu.assign_non_tensor(data, compute_loss=False, no_lora_adapter=reference)
            logprobs.append(worker._worker.infer_batch(data)["log_probs"].values().clone())
        return outputs, adapters, torch.stack(logprobs), sum(counts)

    outputs, adapters, logprobs, tokens = trained(False)
    shared_outputs, shared_adapters, shared_logprobs, fewer = trained(True)
    assert fewer < 0.8 * tokens
    for one, other in zip(outputs, shared_outputs, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert len(adapters) == 2 * 7 * 2
    for name, tensor in adapters.items():
        assert (shared_adapters[name] - tensor).norm() <= 1e-4 * tensor.norm() + 1e-6, name
    assert (logprobs[0] - logprobs[1]).abs().max() > 1e-3, "the adapter changes the policy"
    torch.testing.assert_close(shared_logprobs, logprobs, atol=2e-5, rtol=1e-5)


def test_a_mask_of_the_response_is_the_end_of_the_sequence() -> None:
    def nested(*rows: list[int]) -> torch.Tensor:
        return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)

    ids = nested([5, 6, 7, 8], [1, 2, 3], [4, 4, 4, 4, 4])
    whole, response = nested([0, 0, 1, 1], [0, 1, 0], [0, 0, 0, 0, 0]), nested([1, 1], [1, 0], [0])
    for mask in (whole, response):
        request = engines._head_request(ids, mask, torch.ones(3), row_length=None)
        assert (request.labels.tolist(), request.rows.tolist()) == ([7, 8, 2], [1, 2, 4])
