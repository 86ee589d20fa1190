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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.samples import branching_samples
from support.tiny_model import build_tiny_model, build_tiny_tokenizer

from atropos_verl import verl_plugin
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.types import TrainingSample

verl_plugin.activate("cpu")

from atropos_verl.backends.local.worker import PolicyWorker  # noqa: E402
from atropos_verl.verl_plugin import engines, prefix_forest  # noqa: E402
from atropos_verl.verl_plugin.engines import (  # noqa: E402 - verl picks its platform at import
    ATTENTION,
    _head_request,
    install_packed_attention,
    packs_exactly,
    what_hinders_packing,
)
from atropos_verl.verl_plugin.prefix_forest import build_forest, joined  # noqa: E402

LENGTHS = [3, 17, 1, 30, 6]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"), heads=4, kv_heads=2)


def _model(path: Path, *, packed: bool, attention: str = "sdpa") -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float64, attn_implementation=attention)
    if packed:
        assert install_packed_attention(model)
        assert model.config._attn_implementation == ATTENTION[attention]
    return model


def _worker(path: Path, budget: int = 100, *, share: bool = True, **values: Any) -> PolicyWorker:
    trainer = {"device": "cpu", "max_token_len_per_gpu": budget, "share_prefixes": share}
    return PolicyWorker(RunConfig.from_mapping({"trainer": trainer, **values}), path)


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Weighted so that no two positions have the same gradient; logits [T, V]."""
    logprobs = logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
    return -(logprobs * torch.linspace(-1, 2, len(logprobs), dtype=logits.dtype)).sum()


def _set_blocks(patch: pytest.MonkeyPatch, dense: int, branch: int, mask: int) -> None:
    patch.setattr(prefix_forest, "DENSE_TOKENS", dense)
    patch.setattr(engines, "BRANCH_BLOCK", branch)
    patch.setattr(engines, "MASK_ELEMENTS", mask)


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("block", [4, 256])
def test_loss_and_every_gradient_of_a_packed_row_equal_those_of_separate_sequences(
    model_path: Path, shares: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``block`` 4 the branches are long ones, whose masks are made part by part, and again in the backward."""
    _set_blocks(monkeypatch, block, block, 8 * block)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 250, (length,), generator=generator) for length in LENGTHS]
    # Branches of one sequence, a beginning of it, and it again.
    rows += [torch.cat([rows[3][:at], rows[1]]) for at in (9, 9, 20)] + [rows[3][:12], rows[3]]
    alone = _model(model_path, packed=False)
    expected = sum(_loss(alone(ids[None]).logits[0], ids) for ids in rows if len(ids) > 1)
    expected.backward()
    model = _model(model_path, packed=True)
    row = build_forest([ids.numpy() for ids in rows]) if shares else joined([len(ids) for ids in rows])
    assert len(row.first) == (3 + 17 + 1 + 30 + 6 + 2 * 17 if shares else len(row.place))
    logits = model(
        input_ids=torch.cat(rows)[row.first][None],
        position_ids=torch.cat([torch.arange(len(ids)) for ids in rows])[row.first][None],
        packed_row=row,
        use_cache=False,
    ).logits[0][row.place]
    parts = zip(logits.split([len(ids) for ids in rows]), rows, strict=True)
    found = sum(_loss(part, ids) for part, ids in parts if len(ids) > 1)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = {name: parameter.grad for name, parameter in alone.named_parameters()}
    for name, parameter in model.named_parameters():
        # RMSNorm rounds to float32; sums over branches are rounded once where single ones are rounded one by one.
        limit = (1e-6 if shares else 1e-12) * gradients[name].norm()
        assert (parameter.grad - gradients[name]).norm() <= limit, name


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
    rows = [ids.numpy() for ids in _grown([(0, 0, 30), (0, 20, 17), (0, 20, 9), (1, 30, 5), (0, 0, 21)], 1)]
    row = build_forest(rows) if shares else joined([len(ids) for ids in rows])
    inputs = {
        "input_ids": torch.from_numpy(np.concatenate(rows)[row.first])[None],
        "position_ids": torch.from_numpy(np.concatenate([np.arange(len(ids)) for ids in rows])[row.first])[None],
    }
    with torch.no_grad():
        found, expected = (
            _model(model_path, packed=True, attention=attention)(**inputs, packed_row=row, use_cache=False).logits
            for attention in ("flex_attention", "sdpa")
        )
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def test_no_mask_of_a_long_branch_is_kept_for_the_backward(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two branches of 90 tokens below 60: their masks are 4 · 90 · 150 numbers a layer; none is larger than a block."""
    _set_blocks(monkeypatch, 16, 32, 32)
    rows = _grown([(0, 0, 150), (0, 60, 90)], 1)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        _figures(_models(model_path)[torch.float32], rows, 0, shares=True)
    assert not {(32, 92), (32, 124), (26, 150), (90, 150), (150, 150)} & set(kept)


FORESTS = int(os.environ.get("ATROPOS_VERL_FORESTS", "24"))
"""Random forests of the tests below; 200 take 10 s."""
ROWS = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 60), st.integers(2, 40)), min_size=2, max_size=12
)  # which row it branches off, where, and its own tokens


def _grown(plan: list[tuple[int, int, int]], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows: list[torch.Tensor] = []
    for parent, at, own in plan:
        before = rows[parent % len(rows)][:at] if rows else torch.zeros(0, dtype=torch.int64)
        rows.append(torch.cat([before, torch.randint(0, 250, (own,), generator=generator)]))
    return rows


def _figures(model: Any, rows: list[torch.Tensor], seed: int, *, shares: bool) -> tuple[torch.Tensor, ...]:
    """Loss [], logprobs [N - rows], all gradients [P] of ``rows``, each with weights and a temperature of its own."""
    generator = torch.Generator().manual_seed(seed)
    flat, positions = torch.cat(rows), torch.cat([torch.arange(len(ids)) for ids in rows])
    row = build_forest([ids.numpy() for ids in rows]) if shares else joined([len(ids) for ids in rows])
    model.zero_grad()
    inputs = {"input_ids": flat[row.first][None], "position_ids": positions[row.first][None]}
    logits = model(**inputs, packed_row=row, use_cache=False).logits[0][row.place].float()
    found = []
    for part, ids in zip(logits.split([len(ids) for ids in rows]), rows, strict=True):
        temperature = 0.5 + torch.rand(1, generator=generator)
        found.append((part[:-1] / temperature).log_softmax(-1).gather(1, ids[1:, None]).squeeze(1))
    logprobs = torch.cat(found)
    weights = torch.randn(len(logprobs), generator=generator) * (torch.rand(len(logprobs), generator=generator) > 0.3)
    loss = -(logprobs * weights).sum() / len(logprobs)
    loss.backward()
    gradients = torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()])
    return loss.detach(), logprobs.detach(), gradients


@settings(max_examples=FORESTS, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=ROWS, block=st.sampled_from([4, 32, 256]), seed=st.integers(0, 1000))
def test_random_forests_give_loss_gradients_and_logprobs_of_sequences_end_to_end(
    model_path: Path, plan: list[tuple[int, int, int]], block: int, seed: int
) -> None:
    """float32, 1e-5 relative."""
    rows, model = _grown(plan, seed), _models(model_path)[torch.float32]
    with pytest.MonkeyPatch.context() as patch:
        _set_blocks(patch, block, block, 8 * block)
        flat, shared = (_figures(model, rows, seed, shares=shares) for shares in (False, True))
    for expected, found in zip(flat, shared, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-7


def test_in_bfloat16_the_error_against_float32_is_that_of_sequences_end_to_end(model_path: Path) -> None:
    """Logprobs and gradients; root mean square over random forests, since that of a few tokens is a matter of luck."""
    errors = np.zeros((2, 2))
    for seed in range(FORESTS // 4):
        rng = np.random.default_rng(seed)
        plan = [(int(rng.integers(12)), int(rng.integers(60)), int(rng.integers(2, 40))) for _ in range(10)]
        rows = _grown(plan, seed)
        exact = _figures(_models(model_path)[torch.float32], rows, seed, shares=False)
        for number, shares in enumerate((False, True)):
            found = _figures(_models(model_path)[torch.bfloat16], rows, seed, shares=shares)
            errors[number] += [float((found[i] - exact[i]).norm() ** 2) for i in (1, 2)]
    assert (np.sqrt(errors[1] / errors[0]) <= 1.5).all(), errors


@functools.cache
def _models(path: Path) -> dict[torch.dtype, Any]:
    return {dtype: _model(path, packed=True).to(dtype) for dtype in (torch.float32, torch.bfloat16)}


def test_entropy_and_old_logprobs_are_computed_with_shared_prefixes_and_for_trained_tokens_only(
    model_path: Path,
) -> None:
    from verl.utils import tensordict_utils as tu

    samples = branching_samples(9)
    worker = _worker(model_path, 4096)
    engine, plain = worker._worker.engine, _model(model_path, packed=False)
    worker.compute_logprobs(samples[:1])  # the probe is done
    seen: list[int] = []
    hook = engine.module.get_input_embeddings().register_forward_hook(lambda _m, a, _o: seen.append(a[0].numel()))
    data, _ = worker._to_tensordict(samples, None)
    tu.assign_non_tensor(data, compute_loss=False, calculate_entropy=True)
    output = worker._worker.infer_batch(data)
    hook.remove()
    assert sum(seen) == len(build_forest([sample.token_ids for sample in samples]).first)
    for sample, logprobs, entropy in zip(
        samples, output["log_probs"].unbind(), output["entropy"].unbind(), strict=True
    ):
        ids, mask = torch.from_numpy(sample.token_ids), torch.from_numpy(sample.loss_mask[1:])
        with torch.no_grad():
            expected = (plain(ids[None]).logits[0, :-1] / sample.temperature).log_softmax(-1)
        chosen = expected.gather(1, ids[1:, None]).squeeze(1) * mask
        spread = -(expected.exp() * expected).sum(-1) * mask
        assert logprobs[:-1].tolist() == pytest.approx(chosen.tolist(), abs=1e-5)
        assert entropy[:-1].tolist() == pytest.approx(spread.tolist(), abs=1e-5)


def test_the_probe_finds_a_model_that_looks_across_the_borders(model_path: Path) -> None:
    class Running(torch.nn.Module):
        """Its logits hold the sum of everything before in the row."""

        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=20))

        def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
            onehot = torch.nn.functional.one_hot(input_ids, 20).float()
            return SimpleNamespace(logits=onehot.cumsum(1))

    cpu = torch.device("cpu")
    for share in (False, True):
        assert packs_exactly(_model(model_path, packed=True), cpu, share=share)
        model = Running().train()
        assert not packs_exactly(model, cpu, share=share)
        assert model.training


def test_other_attention_is_not_packed() -> None:
    fields = {"layer_types": ["full_attention"], "sliding_window": 4096, "use_sliding_window": False}
    assert not what_hinders_packing(SimpleNamespace(**fields, _attn_implementation="sdpa"))
    why = what_hinders_packing(SimpleNamespace(**fields, _attn_implementation="flash_attention_2"))
    assert why == "its attention is flash_attention_2, not sdpa or flex_attention"


SMALL = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
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
    import transformers

    build_tiny_tokenizer(tmp_path)
    config = getattr(transformers, f"{name}Config")(**SMALL, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    samples = branching_samples(3)[:6]
    terms = []
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1] / sample.temperature
        logprobs = logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1).double().numpy()
        terms.append(-(logprobs * sample.advantages[1:] * sample.loss_mask[1:]).sum())
    expected = sum(terms) / sum(sample.loss_mask.sum() for sample in samples)
    worker = _worker(tmp_path, 4096, optim={"lr": 0.0})
    for _ in range(2):
        assert worker.train(samples)["loss"] == pytest.approx(expected, rel=1e-4)
    said = [record.message for record in caplog.records if "prefixes that sequences share" in record.message]
    assert said == [f"{name}ForCausalLM computes prefixes that sequences share for each of them: {why}"]


@pytest.mark.parametrize("least", [0, 2**28])
def test_the_backward_of_a_large_model_hands_memory_back(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    calls: list[None] = []
    monkeypatch.setattr(engines, "TRIM_BYTES", least)
    monkeypatch.setattr(engines, "trim_memory", lambda: calls.append(None))
    worker = _worker(model_path)
    worker.train(branching_samples(3)[:2])
    layers = worker._worker.engine.module.config.num_hidden_layers
    assert len(calls) == (0 if least else min(layers, 4) + 1)  # and when the step is over


@pytest.mark.parametrize("budget", [64, 4096])
def test_every_distinct_prefix_is_computed_once_and_logprobs_are_those_of_padded_rows(
    model_path: Path, budget: int
) -> None:
    samples = branching_samples(5)
    worker = _worker(model_path, budget)
    engine = worker._worker.engine
    worker.compute_logprobs(samples[:1])  # the probe is done
    seen: list[torch.Size] = []
    hook = engine.module.get_input_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape))

    def compute() -> tuple[list[Any], int]:
        seen.clear()
        logprobs = worker.compute_logprobs(samples)
        return logprobs, sum(shape.numel() for shape in seen)

    total = sum(len(sample) for sample in samples)
    shared, tokens = compute()
    assert all(shape[0] == 1 and shape.numel() <= budget for shape in seen)
    assert tokens < 0.8 * total
    if budget == 4096:
        assert tokens == len(build_forest([sample.token_ids for sample in samples]).first)
    engine._shares = False
    unshared, tokens = compute()
    assert tokens == total
    engine._packs = False
    padded, tokens = compute()
    assert tokens > total
    hook.remove()
    for rows in zip(shared, unshared, padded, strict=True):
        assert rows[0] == pytest.approx(rows[2], abs=1e-5)
        assert rows[1] == pytest.approx(rows[2], abs=1e-5)


@pytest.mark.parametrize(
    ("loss", "checkpointing"), [({}, True), ({"type": "grpo", "ppo_epochs": 2, "ppo_mini_batches": 2}, False)]
)
def test_shared_prefixes_give_the_loss_and_weights_of_unshared_ones(
    model_path: Path, loss: dict[str, Any], checkpointing: bool
) -> None:
    results = []
    for shares in (False, True):
        values = {"model": {"enable_gradient_checkpointing": checkpointing}, "loss": loss, "optim": {"lr": 1e-4}}
        worker = _worker(model_path, share=shares, **values)
        output = worker.train(branching_samples(7))
        weights = {name: tensor.clone() for name, tensor in worker.named_tensors()}
        results.append((output, weights))
    (one, before), (other, after) = results
    for key in ("loss", "grad_norm"):
        assert other[key] == pytest.approx(one[key], rel=1e-5)
    for name, tensor in before.items():
        if not name.endswith("k_proj.bias"):  # softmax does not see it: its gradient is noise, which Adam scales up
            assert (after[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


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
    worker = _worker(model_path, share=strategy == "shared", optim={"lr": 0.0})
    if strategy == "padded":
        worker._worker.engine._packs = False
    output = worker.train(samples)
    model = _model(model_path, packed=False)
    count = sum(sample.loss_mask.sum() for sample in samples)
    total, kls = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    tokens = 0
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids)
        logits = model(ids[None]).logits[0, :-1]
        logprobs = (logits / sample.temperature).log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        total = total - (logprobs * torch.from_numpy(sample.advantages[1:] * sample.loss_mask[1:])).sum()
        for t, logprob, weight in [] if sample.reference is None else sample.reference:
            log_ratio = logprob - logprobs[int(t) - 1]
            total = total + weight * (log_ratio.exp() - 1 - log_ratio)
        # The teacher is at temperature 1, whatever the rollout's was.
        own = logits.log_softmax(-1)
        entries = np.zeros((0, 4)) if sample.teacher is None else sample.teacher
        for t in np.unique(entries[:, 0]).astype(int):
            rows = entries[entries[:, 0] == t]
            named, p = rows[:, 1].astype(int), torch.from_numpy(np.exp(rows[:, 2]))
            kl = (p * (p.log() - own[t - 1, named])).sum()
            rest = 1 - p.sum()
            kl = kl + rest * (rest.log() - (1 - own[t - 1, named].exp().sum()).log())
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
    from verl.utils import tensordict_utils as tu
    from verl.workers import config as verls

    lora = {"lora_rank": 4, "lora_alpha": 16, "target_modules": "all-linear"}
    monkeypatch.setattr(verls, "HFModelConfig", functools.partial(verls.HFModelConfig, **lora))
    samples, results = branching_samples(11), []
    for shares in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of the adapters
            worker = _worker(model_path, share=shares, optim={"lr": 1e-2})
        seen: list[int] = []
        embedding = worker._worker.engine.module.get_input_embeddings()
        embedding.register_forward_hook(lambda _m, args, _o, seen=seen: seen.append(args[0].numel()))
        outputs = [worker.train(samples) for _ in range(2)]
        trained = {
            name: p.full_tensor() for name, p in worker._worker.engine.module.named_parameters() if "lora" in name
        }
        logprobs = []
        for reference in (False, True):
            data, _ = worker._to_tensordict(samples, None)
            tu.assign_non_tensor(data, compute_loss=False, no_lora_adapter=reference)
            logprobs.append(worker._worker.infer_batch(data)["log_probs"].values().clone())
        results.append((outputs, trained, logprobs, sum(seen)))
    (outputs, adapters, logprobs, tokens), (shared_outputs, shared_adapters, shared_logprobs, fewer) = results
    assert fewer < 0.8 * tokens
    for one, other in zip(outputs, shared_outputs, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert len(adapters) == 2 * 7 * 2
    for name, tensor in adapters.items():
        assert (shared_adapters[name] - tensor).norm() <= 1e-4 * tensor.norm() + 1e-6, name
    assert (logprobs[0] - logprobs[1]).abs().max() > 1e-3, "the adapter changes the policy"
    for one, other in zip(logprobs, shared_logprobs, strict=True):
        torch.testing.assert_close(other, one, atol=2e-5, rtol=1e-5)


def nested(*rows: list[int]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def test_a_mask_of_the_response_is_the_end_of_the_sequence() -> None:
    ids = nested([5, 6, 7, 8], [1, 2, 3], [4, 4, 4, 4, 4])
    whole = _head_request(ids, nested([0, 0, 1, 1], [0, 1, 0], [0, 0, 0, 0, 0]), torch.ones(3), row_length=None)
    response = _head_request(ids, nested([1, 1], [1, 0], [0]), torch.ones(3), row_length=None)
    assert whole.labels.tolist() == response.labels.tolist() == [7, 8, 2]
    assert whole.rows.tolist() == response.rows.tolist() == [1, 2, 4]
