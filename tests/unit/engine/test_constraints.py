"""Constrained decoding and alternatives: what is sampled, and the logprobs that are reported for it, in float64."""

import json
from typing import Any

import pytest
import torch
from support.engines import engine_of, prompts, request, tiny_causal_lm
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.engine.constraints import Grammars
from atropos_verl.errors import GenerationRequestError
from atropos_verl.types import Constraint

TOKENIZER = build_tiny_tokenizer()
[PROMPT] = prompts(5)
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}, "b": {"type": "boolean"}}}
SCHEMA |= {"required": ["n", "b"], "additionalProperties": False}
DIGITS = Constraint(grammar="start: /[0-9]+/")


def schema_of(schema: dict[str, Any]) -> Constraint:
    return Constraint(grammar="start: %json " + json.dumps(schema))


def test_completions_are_of_the_schema_and_end_by_themselves() -> None:
    with engine_of(tiny_causal_lm(), max_running=3) as engine:
        asked = [request(PROMPT, n=4, constraint=schema_of(SCHEMA), temperature=t) for t in (1.0, 1.5)]
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
    constraint = Constraint(grammar=grammar, param="tools")
    with engine_of(tiny_causal_lm()) as engine:
        asked = request(PROMPT, constraint=constraint)
        with pytest.raises(GenerationRequestError, match=reason) as caught:
            await engine.agenerate(asked)
        assert caught.value.param == "tools"
        with pytest.raises(GenerationRequestError, match=reason):
            [delta async for delta in engine.astream(asked)]
        assert len(engine.generate([request(PROMPT, max_tokens=2)])) == 1


def test_tokens_that_are_added_to_a_vocabulary_are_named_by_the_grammar() -> None:
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_tokens(["<tool_call>"])
    grammars = Grammars(tokenizer, 300, frozenset({258}))
    matcher = grammars.matcher(request(PROMPT, constraint=Constraint(grammar='start: <tool_call> "x"')))
    [call] = tokenizer.encode("<tool_call>")
    assert [i for i, bias in enumerate(matcher.compute_logit_bias()) if bias] == [call]
    assert matcher.consume_token(call) and matcher.consume_token(tokenizer.encode("x")[0]) and matcher.is_stopped()
