"""Joined sequences give the loss, gradients and logprobs of separate ones; the head computes only trained rows."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.samples import random_samples
from support.tiny_model import build_tiny_model

from atropos_verl import verl_plugin
from atropos_verl.config.schema import RunConfig

verl_plugin.activate("cpu")

from atropos_verl.verl_plugin.engines import (  # noqa: E402 - verl picks its platform at import
    ATTENTION,
    _head_request,
    can_pack,
    install_packed_attention,
    packs_exactly,
)

LENGTHS = [3, 17, 1, 30, 6]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"), heads=4, kv_heads=2)


def _model(path: Path, *, packed: bool) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float64, attn_implementation="sdpa")
    if packed:
        assert install_packed_attention(model)
        assert model.config._attn_implementation == ATTENTION
    return model


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Weighted so that no two positions have the same gradient; logits [T, V]."""
    logprobs = logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
    return -(logprobs * torch.linspace(-1, 2, len(logprobs), dtype=logits.dtype)).sum()


def test_loss_and_every_gradient_of_a_packed_row_equal_those_of_separate_sequences(model_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 250, (length,), generator=generator) for length in LENGTHS]
    alone = _model(model_path, packed=False)
    expected = sum(_loss(alone(ids[None]).logits[0], ids) for ids in rows if len(ids) > 1)
    expected.backward()
    joined = _model(model_path, packed=True)
    logits = joined(
        input_ids=torch.cat(rows)[None],
        position_ids=torch.cat([torch.arange(n) for n in LENGTHS])[None],
        cu_seq_lens_q=torch.tensor([0, *LENGTHS]).cumsum(0),
        use_cache=False,
    ).logits[0]
    found = sum(_loss(part, ids) for part, ids in zip(logits.split(LENGTHS), rows, strict=True) if len(ids) > 1)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = {name: parameter.grad for name, parameter in alone.named_parameters()}
    for name, parameter in joined.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-11)


def test_a_model_with_the_packed_attention_still_takes_padded_rows(model_path: Path) -> None:
    ids = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    expected = _model(model_path, packed=False)(input_ids=ids, attention_mask=mask).logits
    found = _model(model_path, packed=True)(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1, :5], expected[1, :5])


def test_the_probe_finds_a_model_that_looks_across_the_borders(model_path: Path) -> None:
    class Running(torch.nn.Module):
        """Its logits hold the sum of everything before in the row."""

        def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
            onehot = torch.nn.functional.one_hot(input_ids, 20).float()
            return SimpleNamespace(logits=onehot.cumsum(1))

    cpu = torch.device("cpu")
    assert packs_exactly(_model(model_path, packed=True), cpu, 250)
    model = Running().train()
    assert not packs_exactly(model, cpu, 20)
    assert model.training


@pytest.mark.parametrize(
    "changed",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"layer_types": ["full_attention", "linear_attention"]},
        {"sliding_window": 4096, "use_sliding_window": True},
    ],
)
def test_what_is_not_packed(changed: dict[str, Any]) -> None:
    fields = {
        "_attn_implementation": "sdpa",
        "layer_types": ["full_attention"],
        "sliding_window": 4096,
        "use_sliding_window": False,
    }
    assert can_pack(SimpleNamespace(**fields))
    assert not can_pack(SimpleNamespace(**{**fields, **changed}))


@pytest.mark.parametrize("budget", [64, 4096])
def test_the_worker_computes_no_token_of_padding_and_the_same_logprobs(model_path: Path, budget: int) -> None:
    from atropos_verl.backends.local.worker import PolicyWorker

    samples = random_samples(12, vocab_size=200, seed=5, longest=40)
    worker = PolicyWorker(
        RunConfig.from_mapping({"trainer": {"device": "cpu", "max_token_len_per_gpu": budget}}), model_path
    )
    engine = worker._worker.engine
    worker.compute_logprobs(samples[:1])  # the probe is done
    seen: list[torch.Size] = []
    hook = engine.module.get_input_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape))
    joined = worker.compute_logprobs(samples)
    real = sum(len(sample) for sample in samples)
    assert sum(shape.numel() for shape in seen) == real
    assert all(shape[0] == 1 for shape in seen)
    assert all(shape.numel() <= budget for shape in seen)
    assert len(seen) >= real / budget
    seen.clear()
    engine._packs = False
    padded = worker.compute_logprobs(samples)
    assert sum(shape.numel() for shape in seen) > real
    hook.remove()
    for one, other in zip(joined, padded, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def nested(*rows: list[int]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def test_a_mask_of_the_response_is_the_end_of_the_sequence() -> None:
    ids = nested([5, 6, 7, 8], [1, 2, 3], [4, 4, 4, 4, 4])
    whole = _head_request(ids, nested([0, 0, 1, 1], [0, 1, 0], [0, 0, 0, 0, 0]), torch.ones(3), row_length=None)
    response = _head_request(ids, nested([1, 1], [1, 0], [0]), torch.ones(3), row_length=None)
    assert whole.labels.tolist() == response.labels.tolist() == [7, 8, 2]
    assert whole.rows.tolist() == response.rows.tolist() == [1, 2, 4]
