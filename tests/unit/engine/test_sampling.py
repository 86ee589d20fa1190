"""Sampling against exact probabilities and transformers' own warpers; constrained decoding, its logprobs in float64."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.engines import engine_of, prompts, request, tiny_causal_lm
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.engine.sampling import Grammars, SamplingRows, sample, stream_key, uniforms
from atropos_verl.errors import GenerationRequestError
from atropos_verl.types import Constraint

PROBABILITIES = [0.4, 0.3, 0.15, 0.1, 0.05]
DRAWS = 20_000


def draw(logits: torch.Tensor, rows: int = DRAWS, **settings: Any) -> tuple[Any, Any]:
    """Tokens and logprobs of independent draws: row ``b`` uses stream ``b`` of seed 0."""
    keys = [stream_key(0, row) for row in range(rows)]
    built = SamplingRows.build([request((1,), **settings)] * rows, keys, logits.shape[-1], "cpu")
    return sample(logits.expand(rows, -1), built, np.zeros(rows, dtype=np.uint64))[:2]


def powered(temperature: float) -> list[float]:
    weights = [p ** (1 / temperature) for p in PROBABILITIES]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 2.0}, powered(2.0)),
        ({"temperature": 0.5}, powered(0.5)),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_k": 99}, PROBABILITIES),
        # 0.4 + 0.3 < 0.75 <= 0.4 + 0.3 + 0.15: three tokens
        ({"top_p": 0.75}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        # at least 0.3 * 0.4 = 0.12
        ({"min_p": 0.3}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
        # top-k 4 leaves 0.95; top-p 0.7 of that is 0.665, reached by two tokens
        ({"top_k": 4, "top_p": 0.7}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.3}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
        # greedy, whose logprobs are those at temperature 1
        ({"temperature": 0.0, "top_k": 2, "min_p": 0.5}, [1, 0, 0, 0, 0]),
        ({"temperature": 1e-6}, [1, 0, 0, 0, 0]),
    ],
)
def test_frequencies_match_exact_probabilities(settings: dict[str, Any], expected: list[float]) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])  # not sorted by probability in the vocabulary
    logits = torch.empty(5)
    logits[order] = torch.tensor(PROBABILITIES).log() + 7.0
    tokens, logprobs = draw(logits, **settings)
    ranks = torch.argsort(order)[tokens]
    # Pearson's statistic; the 99.99 % quantile of chi-square with 4 degrees of freedom is 23.5
    counts, wanted = torch.bincount(ranks, minlength=5).double(), DRAWS * torch.tensor(expected, dtype=torch.float64)
    drawn = wanted > 0
    assert not counts[~drawn].any()
    assert float(((counts - wanted) ** 2 / wanted)[drawn].sum()) < 23.5
    # The logprob is of the temperature's distribution over all tokens, whatever the filters left.
    temperature = settings.get("temperature", 1.0)
    full = torch.tensor(powered(temperature if temperature > 1e-5 else 1.0))
    assert torch.allclose(logprobs, full.log()[ranks], atol=1e-6)


@pytest.mark.parametrize("vocab_size", [257, 6000])
def test_candidate_sets_equal_those_of_transformers_warpers(vocab_size: int) -> None:
    """6000 ids take the path that sorts only the best 1024 where those are enough."""
    kinds = {
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    logits = torch.randn((1, vocab_size), generator=torch.Generator().manual_seed(1), dtype=torch.float32) * 1.5
    cases: list[dict[str, Any]] = [
        {"temperature": 1.3, "top_k": 7, "top_p": 0.9},
        {"top_k": 1500, "top_p": 0.99},
        {"min_p": 0.2},
        {"min_p": 1e-4},
        {"top_p": 0.999},
        {"top_k": 40, "min_p": 0.1},
    ]
    for case in cases:
        if case.get("top_k", 0) >= vocab_size:
            continue  # off: such rows are drawn in the order of the vocabulary, not of probability
        warpers = transformers.LogitsProcessorList([kind(case[name]) for name, kind in kinds.items() if name in case])
        expected = torch.softmax(warpers(torch.zeros((1, 1), dtype=torch.int64), logits.clone())[0].double(), -1)
        tokens, _ = draw(logits[0], rows=300, **case)
        assert bool((expected[tokens] > 0).all()), case
        # Equal draws must pick the same quantile of the sorted distribution: check against its exact CDF.
        order = torch.argsort(expected, descending=True, stable=True)
        cdf = expected[order].cumsum(-1)
        u = uniforms(np.array([stream_key(0, r) for r in range(300)], np.uint64), np.zeros(300, np.uint64))
        quantile = order[torch.searchsorted(cdf, torch.from_numpy(u), right=True).clamp(max=vocab_size - 1)]
        assert float((quantile == tokens).double().mean()) > 0.995, case


def test_uniforms_follow_splitmix64_and_streams_differ() -> None:
    # Reference outputs of SplitMix64 seeded with 1234567 (the generator's published test vector).
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    got = uniforms(np.full(4, 1234567, np.uint64), np.arange(4, dtype=np.uint64))
    assert got.tolist() == [(value >> 11) * 2.0**-53 for value in published]

    keys = {stream_key(seed, index) for seed in (-1, 0, 1, 2**63, 2**64 + 5) for index in range(100)}
    assert len(keys) == 500 and all(0 <= key < 2**64 for key in keys)


# -- constrained decoding ----------------------------------------------------------------------------------------------

TOKENIZER = build_tiny_tokenizer()
[PROMPT] = prompts(5)
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}, "b": {"type": "boolean"}}}
SCHEMA |= {"required": ["n", "b"], "additionalProperties": False}
DIGITS = Constraint(grammar="start: /[0-9]+/")


def test_completions_are_of_the_schema_and_end_by_themselves() -> None:
    with engine_of(tiny_causal_lm(), max_running=3) as engine:
        schema = Constraint(grammar="start: %json " + json.dumps(SCHEMA))
        asked = [request(PROMPT, n=4, constraint=schema, temperature=t) for t in (1.0, 1.5)]
        free = request(PROMPT, max_tokens=20, seed=1, ignore_eos=True)
        *constrained, unconstrained = engine.generate([*asked, free])
        alone = engine.generate([free])
    for generation in (g for generations in constrained for g in generations):
        value = json.loads(TOKENIZER.decode(generation.token_ids, skip_special_tokens=True))
        assert sorted(value) == ["b", "n"] and value["n"] <= 99
        assert generation.finish_reason == "stop" and generation.token_ids[-1] == TOKENIZER.eos_token_id
    assert unconstrained[0].token_ids == alone[0][0].token_ids  # its neighbours' masks are not its own


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_of_the_masked_distribution_at_the_temperature(temperature: float) -> None:
    model = tiny_causal_lm()
    with engine_of(model) as engine:
        asked = request(PROMPT, max_tokens=6, constraint=DIGITS, temperature=temperature, seed=3, top_logprobs=3)
        [[got]] = engine.generate([asked])
        logits = model(torch.tensor([[*PROMPT, *got.token_ids]])).logits[0].detach().double() / (temperature or 1.0)
    digits = TOKENIZER.encode("0123456789")
    for position, (token, logprob) in enumerate(zip(got.token_ids, got.logprobs, strict=True)):
        allowed = digits + [TOKENIZER.eos_token_id] * (position > 0)
        row = torch.full((logits.shape[-1],), float("-inf"), dtype=torch.float64)
        row[allowed] = logits[len(PROMPT) - 1 + position][allowed]
        expected = row.log_softmax(-1)
        assert token in allowed
        assert logprob == pytest.approx(float(expected[token]), abs=1e-4)
        best = expected.topk(3)
        assert list(got.top_logprobs[position]) == best.indices.tolist()
        assert list(got.top_logprobs[position].values()) == pytest.approx(best.values.tolist(), abs=1e-4)


async def test_a_stream_and_an_eviction_leave_the_constraint_where_it_was() -> None:
    with engine_of(tiny_causal_lm(), max_running=2) as engine:
        asked = request(PROMPT, n=2, max_tokens=12, constraint=DIGITS, seed=5, ignore_eos=True, top_logprobs=1)
        [whole] = engine.generate([asked])
        texts, alternatives = ["", ""], 0
        async for delta in engine.astream(asked):
            texts[delta.index] += TOKENIZER.decode(delta.token_ids, skip_special_tokens=True)
            alternatives += len(delta.top_logprobs)
            if len(texts[0]) == 3:
                engine.update_weights_from_tensor(tiny_causal_lm().state_dict().items(), policy_version=1)
    assert texts == [TOKENIZER.decode(g.token_ids, skip_special_tokens=True) for g in whole]
    assert all(set(text) <= set("0123456789") for text in texts)
    assert alternatives == sum(len(g.token_ids) for g in whole)


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("start: %json " + json.dumps({"type": "object", "not": {"type": "string"}}), "not"),
        ("start: missing_rule", "missing_rule"),
        ("\x00", "cannot be enforced"),
    ],
)
async def test_a_grammar_that_cannot_be_enforced_is_refused(grammar: str, reason: str) -> None:
    asked = request(PROMPT, constraint=Constraint(grammar=grammar, param="tools"))
    with engine_of(tiny_causal_lm()) as engine:
        with pytest.raises(GenerationRequestError, match=reason) as caught:
            await engine.agenerate(asked)
        assert caught.value.param == "tools"
        with pytest.raises(GenerationRequestError, match=reason):
            await anext(engine.astream(asked))
        with pytest.raises(GenerationRequestError, match=reason):
            engine.generate([request(PROMPT), asked])
        assert engine.stats().requests == 0


def test_tokens_that_are_added_to_a_vocabulary_are_named_by_the_grammar() -> None:
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_tokens(["<tool_call>"])
    grammars = Grammars(tokenizer, 300, frozenset({258}))
    matcher = grammars.matcher(request(PROMPT, constraint=Constraint(grammar='start: <tool_call> "x"')))
    [call] = tokenizer.encode("<tool_call>")
    assert [i for i, bias in enumerate(matcher.compute_logit_bias()) if bias] == [call]
    assert matcher.consume_token(call) and matcher.consume_token(tokenizer.encode("x")[0]) and matcher.is_stopped()
