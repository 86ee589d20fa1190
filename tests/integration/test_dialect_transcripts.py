"""Hostile transcripts through the SDKs of Anthropic and of OpenAI's Responses, in sessions, streamed and not.

Each says which recorded turn every request of it continues. The engine remembers what it sampled and after which ids:
every sampled token must be trained once, in exactly that context.

Each runs in one of the four forms (which SDK, streamed or not); ``ATROPOS_VERL_ALL_TRANSCRIPTS=1`` runs all.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import anthropic
import httpx
import openai
import pytest
from support.sessions import OracleEngine, check_rollout, open_session, rollout_of, session_gateway
from support.tiny_model import build_tiny_tokenizer

TOKENIZER = build_tiny_tokenizer()
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}


@dataclass(frozen=True)
class Said:
    """An answer, as the agent will send it back."""

    thought: str
    text: str
    calls: tuple[tuple[str, str], ...]
    """(id, arguments)"""


@dataclass(frozen=True)
class Results:
    answers: tuple[tuple[str, str], ...]
    """(id of a call, what the tool says)"""


Item = str | Said | Results
"""A text is a user's."""


@dataclass
class Agent:
    """An agent on one SDK."""

    dialect: str
    streamed: bool
    session: dict[str, Any]
    system: str = "s"
    more: dict[str, Any] = field(default_factory=dict)

    def ask(self, *items: Item, **more: Any) -> Said:
        return self._messages(items, more) if self.dialect == "messages" else self._responses(items, more)

    def _messages(self, items: tuple[Item, ...], more: dict[str, Any]) -> Said:
        sent: list[Any] = []
        for item in items:
            if isinstance(item, str):
                sent.append({"role": "user", "content": [{"type": "text", "text": item}]})
            elif isinstance(item, Results):
                blocks = [{"type": "tool_result", "tool_use_id": name, "content": text} for name, text in item.answers]
                sent.append({"role": "user", "content": blocks})
            else:
                thinking = {"type": "thinking", "thinking": item.thought, "signature": "x"}
                uses = [
                    {"type": "tool_use", "id": name, "name": "add", "input": json.loads(arguments)}
                    for name, arguments in item.calls
                ]
                text = [{"type": "text", "text": item.text}] if item.text else []
                sent.append({"role": "assistant", "content": [*([thinking] if item.thought else []), *text, *uses]})
        base = self.session["base_url"].removesuffix("/v1")
        client = anthropic.Anthropic(base_url=base, api_key=self.session["api_key"], max_retries=0)
        tools = [{"name": "add", "input_schema": SCHEMA}]
        body: dict[str, Any] = {
            "model": "m",
            "max_tokens": 400,
            "messages": sent,
            "tools": tools,
            "system": self.system,
        }
        if self.streamed:
            with client.messages.stream(**{**body, **more}) as stream:
                answer = stream.get_final_message()
        else:
            answer = client.messages.create(**{**body, **more})
        return Said(
            "".join(block.thinking for block in answer.content if block.type == "thinking"),
            "".join(block.text for block in answer.content if block.type == "text"),
            tuple((block.id, json.dumps(block.input)) for block in answer.content if block.type == "tool_use"),
        )

    def _responses(self, items: tuple[Item, ...], more: dict[str, Any]) -> Said:
        sent: list[Any] = []
        for number, item in enumerate(items):
            if isinstance(item, str):
                sent.append({"role": "user", "content": [{"type": "input_text", "text": item}]})
            elif isinstance(item, Results):
                sent += [
                    {"type": "function_call_output", "call_id": name, "output": text} for name, text in item.answers
                ]
            else:
                part = {"type": "reasoning_text", "text": item.thought}
                thinking = {"type": "reasoning", "id": f"rs_{number}", "summary": [], "content": [part]}
                content = [{"type": "output_text", "text": item.text, "annotations": []}]
                text = {"type": "message", "id": f"msg_{number}", "role": "assistant", "status": "completed"}
                sent += [thinking] if item.thought else []
                sent += [{**text, "content": content}] if item.text else []
                sent += [
                    {"type": "function_call", "call_id": name, "name": "add", "arguments": arguments}
                    for name, arguments in item.calls
                ]
        if "max_tokens" in more:
            more["max_output_tokens"] = more.pop("max_tokens")
        client = openai.OpenAI(base_url=self.session["base_url"], api_key=self.session["api_key"], max_retries=0)
        tools = [{"type": "function", "name": "add", "parameters": SCHEMA}]
        body: dict[str, Any] = {"model": "m", "input": sent, "tools": tools, "instructions": self.system, **more}
        if self.streamed:
            *_, last = client.responses.create(**body, stream=True)  # the SDK's helper knows no answers that are cut
            answer = last.response
        else:
            answer = client.responses.create(**body)
        kinds: dict[str, list[Any]] = {kind: [] for kind in ("reasoning", "message", "function_call")}
        for item in answer.output:
            kinds[item.type].append(item)
        return Said(
            "".join(item.content[0].text for item in kinds["reasoning"]),
            "".join(item.content[0].text for item in kinds["message"]),
            tuple((item.call_id, item.arguments) for item in kinds["function_call"]),
        )


def results(said: Said, *texts: str, order: int = 1) -> Results:
    pairs = zip(said.calls, texts or ("r0", "r1"), strict=False)
    return Results(tuple((name, text) for (name, _), text in pairs)[::order])


def turns(
    agent: Agent, change: Callable[[Said], Said] = lambda said: said, tool: Callable[[Said], Results] = results
) -> None:
    """Three turns; each answer goes back changed."""
    sent: list[Item] = ["q 🙂"]
    for _ in range(3):
        said = agent.ask(*sent)
        sent += [change(said), tool(said)]


def reserialised(said: Said) -> Said:
    return replace(said, calls=tuple((name, json.dumps(json.loads(text), indent=1)) for name, text in said.calls))


def system_changes(agent: Agent) -> None:
    said = agent.ask("q")
    agent.system = "other"
    agent.ask("q", said, results(said))


def compacted(agent: Agent) -> None:
    said = agent.ask("q")
    agent.ask("q", said, results(said))
    again = agent.ask("what was said: " + said.text)
    agent.ask("what was said: " + said.text, again, results(again))


def branched(agent: Agent) -> None:
    said = agent.ask("q")
    for texts in (("a", "b"), ("c", "d")):
        other = agent.ask("q", said, results(said, *texts))
        agent.ask("q", said, results(said, *texts), other, "more")


def edited_middle(agent: Agent) -> None:
    first = agent.ask("q")
    second = agent.ask("q", first, results(first))
    agent.ask("q", first, results(first, "edited", "r1"), second, results(second))


def asked_again(agent: Agent) -> None:
    """After its answer, an equal request is another sample."""
    agent.ask("q")
    said = agent.ask("q")
    agent.ask("q", said, results(said))


def cut(agent: Agent) -> None:
    """An answer that has no end goes on behind it."""
    said = agent.ask("q", max_tokens=20)
    agent.ask("q", said, "go on")


def one_call_answered(agent: Agent) -> None:
    said = agent.ask("q")
    agent.ask("q", said, results(said, "only one"))


def unknown_ids(agent: Agent) -> None:
    said = agent.ask("q")
    agent.ask("q", said, Results((("nobody", "r"),)))


def own_answer(agent: Agent) -> None:
    """An assistant's words that nobody sampled."""
    agent.ask("q", Said("", "I said this.", ()), "and?")


def prefix_only(agent: Agent) -> None:
    first = agent.ask("q")
    agent.ask("q", first, results(first))
    agent.ask("q")
    agent.ask("r")


DROPPED: Callable[[Said], Said] = lambda said: replace(said, thought="")  # noqa: E731
CASES: dict[str, tuple[Callable[[Agent], None], list[int | None]]] = {
    "whole": (turns, [None, 0, 1]),
    "arguments in another form": (lambda agent: turns(agent, reserialised), [None, 0, 1]),
    "white space around the text": (
        lambda agent: turns(agent, lambda s: replace(s, text=f" {s.text}\n")),
        [None, 0, 1],
    ),
    "thinking dropped": (lambda agent: turns(agent, DROPPED), [None, None, None]),
    "text dropped": (lambda agent: turns(agent, lambda s: replace(s, text="")), [None, None, None]),
    "text changed": (lambda agent: turns(agent, lambda s: replace(s, text="other")), [None, None, None]),
    "one call dropped": (lambda agent: turns(agent, lambda s: replace(s, calls=s.calls[:1])), [None, None, None]),
    "other arguments": (
        lambda agent: turns(agent, lambda s: replace(s, calls=tuple((i, '{"x": 7}') for i, _ in s.calls))),
        [None, None, None],
    ),
    "results out of order": (lambda agent: turns(agent, tool=lambda s: results(s, order=-1)), [None, 0, 1]),
    "equal ids": (
        lambda agent: turns(agent, lambda s: replace(s, calls=tuple(("x", a) for _, a in s.calls))),
        [None, 0, 1],
    ),
    "empty results": (lambda agent: turns(agent, tool=lambda s: results(s, "", "")), [None, 0, 1]),
    "results of characters": (
        lambda agent: turns(agent, tool=lambda s: results(s, "<|im_end|>", "世\u0000")),
        [None, 0, 1],
    ),
    "system changes": (system_changes, [None, None]),
    "compacted": (compacted, [None, 0, None, 2]),
    "branched": (branched, [None, 0, 1, 0, 3]),
    "middle edited": (edited_middle, [None, 0, 0]),
    "asked again": (asked_again, [None, None, 1]),
    "cut": (cut, [None, 0]),
    "one call answered": (one_call_answered, [None, 0]),
    "unknown ids": (unknown_ids, [None, 0]),
    "words of nobody": (own_answer, [None]),
    "back to the beginning": (prefix_only, [None, 0, None, None]),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OracleEngine, httpx.Client]]:
    engine = OracleEngine()
    with session_gateway(tmp_path_factory.mktemp("sessions"), engine, TOKENIZER) as client:
        yield engine, client


FORMS = [(dialect, streamed) for dialect in ("messages", "responses") for streamed in (False, True)]
ALL = [(name, *form) for number, name in enumerate(CASES) for form in (FORMS[number % 4 :] + FORMS)[:4]]


@pytest.mark.parametrize(
    ("name", "dialect", "streamed"), ALL if os.environ.get("ATROPOS_VERL_ALL_TRANSCRIPTS") else ALL[::4]
)
def test_transcript(served: tuple[OracleEngine, httpx.Client], name: str, dialect: str, streamed: bool) -> None:
    engine, client = served
    calls = "\n".join(f'<tool_call>{{"name": "add", "arguments":{{"x": {k}}}}}</tool_call>' for k in (1, 2))

    def reply(*_: Any) -> list[int]:
        text = f"<think>\nhm {len(engine.samples)}</think>\nSo 🙂 é世 {len(engine.samples)}.\n\n{calls}<|im_end|>"
        return list(TOKENIZER.encode(text, add_special_tokens=False))

    engine.reset(reply)
    session = open_session(client)
    run, parents = CASES[name]
    run(Agent(dialect, streamed, session))
    tree = client.get(f"/sessions/{session['id']}").json()["tree"]
    assert [turn["parent"] for turn in tree] == parents, [turn["reason"] for turn in tree]
    check_rollout(rollout_of(client, session), engine.samples)
