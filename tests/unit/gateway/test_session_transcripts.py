"""A corpus of hostile transcripts through the official SDKs, streamed and not, against what the engine sampled.

Of each: no legitimate request is refused, the lineages are the true ones, and every sampled token is trained once, in
exactly the context in which it was sampled. Of those that Responses and Messages can express each runs in one of their
four forms (which API, streamed or not); ``ATROPOS_VERL_ALL_TRANSCRIPTS=1`` runs all.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import anthropic
import httpx
import openai
import pytest
from support.sessions import OracleEngine, check_rollout, open_session, rollout_of, session_gateway
from support.tiny_model import CHATML_TEMPLATE, build_tiny_tokenizer

from atropos_verl.types import GenerationRequest

END = "<|im_end|>"
TEMPLATES = {
    "chatml": CHATML_TEMPLATE,
    "trimming": CHATML_TEMPLATE.replace("m['content']", "m['content'] | trim"),
    # As Qwen3's: what was thought before the last question is left out; calls and tools have their own form.
    "thinking": (
        "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% set ns = namespace(last=-1) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% set text = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
        "{% if m.role == 'assistant' and '</think>' in text %}"
        "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{% if m.role == 'assistant' and thought and loop.index0 > ns.last %}"
        "<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ text }}"
        "{% for call in m.tool_calls or [] %}{% if text or not loop.first %}\n{% endif %}<tool_call>\n"
        '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
        "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": {"type": "object"}}}
    for name in ("add", "find")
]


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


ADD, FIND = call("add", '{"a": 1, "b": 2}'), call("find", '{"what": "é"}')
TWO = f"{ADD}\n{FIND}"


Messages = Sequence[dict[str, Any]]
OPENAI = openai.OpenAI(base_url="http://unused", api_key="unused", max_retries=0)
ANTHROPIC = anthropic.Anthropic(base_url="http://unused", api_key="unused", max_retries=0)
"""Made once: certificates take 20 ms."""


def chat(session: dict[str, Any], messages: Messages, *, stream: bool, **options: Any) -> list[dict[str, Any]]:
    """The answers to ``messages``, as an agent would put them in its history."""
    client = OPENAI.with_options(base_url=session["base_url"], api_key=session["api_key"])
    body: Any = {"model": "m", "messages": list(messages), **options}
    if not stream:
        return [c.message.model_dump() for c in client.chat.completions.create(**body).choices]
    answers: dict[int, dict[str, Any]] = {}
    for chunk in client.chat.completions.create(**body, stream=True):
        for choice in chunk.choices:
            answer = answers.setdefault(choice.index, {"role": "assistant", "content": "", "tool_calls": []})
            delta = choice.delta.model_dump()
            answer["content"] += delta.get("content") or ""
            if thought := delta.get("reasoning_content"):
                answer["reasoning_content"] = answer.get("reasoning_content", "") + thought
            for piece in delta.get("tool_calls") or []:
                calls = answer["tool_calls"]
                if piece["index"] == len(calls):
                    calls.append({"id": piece["id"], "type": "function", "function": {"name": "", "arguments": ""}})
                calls[-1]["function"]["name"] += piece["function"].get("name") or ""
                calls[-1]["function"]["arguments"] += piece["function"].get("arguments") or ""
    return [_said(**answers[index]) for index in sorted(answers)]


def _said(content: str, tool_calls: list[Any], reasoning_content: str = "", role: str = "assistant") -> dict[str, Any]:
    more = {"reasoning_content": reasoning_content} if reasoning_content else {}
    return {"role": role, "content": content, **more, **({"tool_calls": tool_calls} if tool_calls else {})}


def _call(id_: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def _items(messages: Messages) -> Iterator[dict[str, Any]]:
    for number, message in enumerate(messages):
        if message["role"] == "tool":
            yield {"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]}
        elif message["role"] != "assistant":
            yield {"role": message["role"], "content": message["content"]}
        else:
            if thought := message.get("reasoning_content"):
                content = [{"type": "reasoning_text", "text": thought}]
                yield {"type": "reasoning", "id": f"rs_{number}", "summary": [], "content": content}
            if text := message["content"]:
                content = [{"type": "output_text", "text": text, "annotations": []}]
                about = {"type": "message", "id": f"msg_{number}", "status": "completed"}
                yield {**about, "role": "assistant", "content": content}
            for one in message.get("tool_calls") or ():
                yield {"type": "function_call", "call_id": one["id"], **one["function"]}


def responses(session: dict[str, Any], messages: Messages, *, stream: bool, **options: Any) -> list[dict[str, Any]]:
    client = OPENAI.with_options(base_url=session["base_url"], api_key=session["api_key"])
    tools = [{"type": "function", **tool["function"]} for tool in options.pop("tools", [])]
    body: Any = {"model": "m", "input": [*_items(messages)], "tools": tools}
    if "max_tokens" in options:
        body["max_output_tokens"] = options["max_tokens"]
    if stream:
        *_, last = client.responses.create(**body, stream=True)  # the SDK's helper knows no answers that are cut
        answer = last.response
    else:
        answer = client.responses.create(**body)
    parts: dict[str, list[Any]] = {kind: [] for kind in ("reasoning", "message", "function_call")}
    for item in answer.output:
        parts[item.type].append(item)
    texts = ("".join(item.content[0].text for item in parts[kind]) for kind in ("message", "reasoning"))
    content, thought = texts
    return [_said(content, [_call(c.call_id, c.name, c.arguments) for c in parts["function_call"]], thought)]


def _blocks(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if message["role"] == "tool":
        yield {"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": message["content"]}
    elif isinstance(message["content"], list):
        yield from message["content"]
    else:
        if thought := message.get("reasoning_content"):
            yield {"type": "thinking", "thinking": thought, "signature": "x"}
        if message["content"] or message["role"] != "assistant":
            yield {"type": "text", "text": message["content"]}
        for one in message.get("tool_calls") or ():
            name, arguments = one["function"]["name"], json.loads(one["function"]["arguments"])
            yield {"type": "tool_use", "id": one["id"], "name": name, "input": arguments}


def messages(session: dict[str, Any], history: Messages, *, stream: bool, **options: Any) -> list[dict[str, Any]]:
    base = session["base_url"].removesuffix("/v1")
    client = ANTHROPIC.with_options(base_url=base, api_key=session["api_key"])
    functions = [tool["function"] for tool in options.pop("tools", [])]
    tools = [{"name": function["name"], "input_schema": function["parameters"]} for function in functions]
    roles = {"tool": "user", "developer": "system"}
    sent = [{"role": roles.get(m["role"], m["role"]), "content": [*_blocks(m)]} for m in history]
    body: Any = {"model": "m", "max_tokens": options.get("max_tokens", 400), "messages": sent, "tools": tools}
    if stream:
        with client.messages.stream(**body) as events:
            answer = events.get_final_message()
    else:
        answer = client.messages.create(**body)
    of: dict[str, list[Any]] = {kind: [b for b in answer.content if b.type == kind] for kind in ("text", "thinking")}
    calls = [_call(b.id, b.name, json.dumps(b.input)) for b in answer.content if b.type == "tool_use"]
    return [_said("".join(b.text for b in of["text"]), calls, "".join(b.thinking for b in of["thinking"]))]


class Agent:
    """An agent with a history, in the form of the chat API, on an official SDK."""

    def __init__(self, api: Callable[..., Any], session: dict[str, Any], options: dict[str, Any], *, stream: bool):
        self._api, self._session, self.options, self._stream = api, session, options, stream
        self.history: list[dict[str, Any]] = []
        self.saved: dict[str, list[dict[str, Any]]] = {}

    def send(self, messages: Messages) -> list[dict[str, Any]]:
        return list(self._api(self._session, messages, stream=self._stream, **self.options))

    # -- the words of the corpus -------------------------------------------------------------------------------------

    def ask(self, *contents: Any, pick: int = 0) -> None:
        """Say something, and take the answer."""
        self.history += [{"role": "user", "content": content} for content in contents]
        self.history.append(self.send(self.history)[pick])

    def again(self) -> None:
        """The newest answer is thrown away, and asked for once more."""
        self.history[-1] = self.send(self.history[:-1])[0]

    def sample(self) -> None:
        """The last request once more; the history keeps the first answer."""
        self.send(self.history[:-1])

    def side(self, *messages: dict[str, Any], after: int = 0) -> None:
        """A subagent: another conversation that begins with the first messages of this one."""
        self.send([*self.history[:after], *messages])

    def parallel(self, *questions: str) -> None:
        """Several questions at once after this history."""
        with ThreadPoolExecutor(len(questions)) as pool:
            histories = [[*self.history, {"role": "user", "content": text}] for text in questions]
            list(pool.map(self.send, histories))

    def add(self, *messages: dict[str, Any]) -> None:
        self.history += deepcopy(messages)

    def edit(self, index: int, **fields: Any) -> None:
        self.history[index] = {**self.history[index], **fields}

    def change(self, index: int, how: Callable[[str], str]) -> None:
        self.edit(index, content=how(self.history[index]["content"]))

    def cut(self, count: int) -> None:
        self.history = self.history[:count]

    def drop(self, index: int) -> None:
        del self.history[index]

    def insert(self, index: int, role: str, content: str) -> None:
        self.history.insert(index, {"role": role, "content": content})

    def become(self, *contents: str) -> None:
        """The history is compacted."""
        self.history = [{"role": "system", "content": text} for text in contents]

    def save(self, name: str) -> None:
        self.saved[name] = deepcopy(self.history)

    def load(self, name: str) -> None:
        self.history = deepcopy(self.saved[name])

    def calls(self, index: int, how: Callable[[list[dict[str, Any]]], Any]) -> None:
        """Change the calls of a message."""
        self.history[index]["tool_calls"] = how(deepcopy(self.history[index]["tool_calls"]))

    def results(self, *contents: Any, order: int = 1) -> None:
        """The tools' results; ``order`` -1: the last call's first."""
        calls = self.history[-1]["tool_calls"]
        assert len(calls) == len(contents), self.history[-1]
        pairs = list(zip(calls, contents, strict=True))[::order]
        self.add(*({"role": "tool", "tool_call_id": c["id"], "content": content} for c, content in pairs))

    def option(self, **options: Any) -> None:
        self.options = {**self.options, **options}

    def refused(self, message: dict[str, Any], *words: str) -> None:
        """A message that is not served, and the error names it."""
        with pytest.raises((openai.BadRequestError, anthropic.BadRequestError)) as error:
            self.send([*self.history, message])
        assert all(word in str(error.value) for word in words), str(error.value)


Step = Callable[[Agent], None]


def step(name: str, *arguments: Any, **named: Any) -> Step:
    return lambda agent: getattr(agent, name)(*arguments, **named)


@dataclass(frozen=True)
class Case:
    steps: Sequence[Step]
    parents: list[int | None]
    """Of each recorded completion, the one whose tokens it continues."""
    replies: Sequence[str] = ()
    """What the policy writes, in this order; afterwards numbered answers."""
    template: str = "chatml"
    options: dict[str, Any] = field(default_factory=dict)


def ask(*contents: Any, **named: Any) -> Step:
    return step("ask", *contents, **named)


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def rewritten(**style: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Calls whose arguments were read and written again."""

    def rewrite(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for one in calls:
            one["function"]["arguments"] = json.dumps(json.loads(one["function"]["arguments"]), **style)
        return calls

    return rewrite


def with_ids(*ids: str) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda calls: [{**one, "id": name} for one, name in zip(calls, ids, strict=True)]


def tools(
    *edits: Step,
    reply: str = ADD,
    results: Sequence[Any] = ("3",),
    order: int = 1,
    parent: int | None = 0,
    template: str = "chatml",
) -> Case:
    """A call, which is edited before its results are sent."""
    steps = [ask("a"), *edits, step("results", *results, order=order), step("ask")]
    return Case(steps, [None, parent], [reply + END], template)


def two(
    *between: Step, replies: Sequence[str] = (), parent: int | None = 0, template: str = "chatml", **options: Any
) -> Case:
    """Two questions, and what happens to the history between them."""
    return Case([ask("a"), *between, ask("b")], [None, parent], replies, template, options)


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
THOUGHT = "<think>\nhm, é\n</think>\n\n"
CASES: dict[str, Case] = {
    # plain conversations
    "four turns": Case([ask("a"), ask("b"), ask("c"), ask("d")], [None, 0, 1, 2]),
    "a system prompt": Case([step("insert", 0, "system", "be good"), ask("a"), ask("b")], [None, 0]),
    "a developer's prompt": Case([step("insert", 0, "developer", "be good"), ask("a"), ask("b")], [None, 0]),
    "the same words again and again": Case([ask("a"), ask("a"), ask("a")], [None, 0, 1], ["x" + END] * 3),
    "a named user": Case([step("add", user("a", name="ann")), step("ask"), ask("b")], [None, 0]),
    "20,000 characters": Case([ask("x" * 20_000), ask("y")], [None, 0]),
    "an answer of the agent's own": Case(
        [ask("a"), step("add", user("b"), {"role": "assistant", "content": "own"}), ask("c"), ask("d")], [None, 0, 1]
    ),
    "an answer that is to be continued": Case([ask("a"), step("ask"), ask("b")], [None, 0, 1]),
    "a tool's message that answers no call": Case(
        [ask("a"), step("add", {"role": "tool", "tool_call_id": "x", "content": "r"}), step("ask")], [None, 0]
    ),
    # contents
    "an empty question": Case([ask(""), ask("")], [None, 0]),
    "an empty answer": two(replies=[END, END]),
    "an answer of white space": two(replies=[" \n\t" + END]),
    "parts of text": Case([ask([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), ask("c")], [None, 0]),
    "an answer sent back as parts": two(step("edit", 1, content=[{"type": "text", "text": "x"}]), replies=["x" + END]),
    "an answer with all fields of the SDK": two(step("edit", 1, refusal=None, audio=None, function_call=None)),
    "joined emoji": two(replies=["👩‍👩‍👧 🏳️‍🌈" + END]),
    "control characters": Case([ask("a\x00\x1b[2J\x7f"), ask("b")], [None, 0], ["\x01\x02\u2028" + END]),
    "words of the template in a question": Case([ask(f"a{END}\n<|im_start|>assistant\nno"), ask("b")], [None, 0]),
    "a special token in an answer": two(replies=["x<|im_start|>y" + END]),
    "an image": two(step("refused", user([IMAGE]), "item 2", "text")),
    # answers that were cut
    "cut by its length": two(max_tokens=4),
    "cut inside a letter": two(replies=["aé世" + END], max_tokens=4),
    "cut at a stop string": two(replies=["say\nObservation:"], stop=["\nObs"]),
    "a stop string that is kept": two(
        replies=["say STOP"], stop=["STOP"], extra_body={"include_stop_str_in_output": True}
    ),
    # white space
    "the agent strips answers": two(step("change", 1, str.strip), replies=[" \n x \n" + END]),
    "the agent ends answers with a line": two(step("change", 1, lambda t: t + "\n")),
    "white space inside an answer is changed": two(
        step("change", 1, lambda t: t.replace(" ", "  ")), replies=["x y" + END], parent=None
    ),
    "an answer in another normal form": two(
        step("change", 1, lambda t: t.replace("é", "e\u0301")), replies=["é" + END], parent=None
    ),
    "a question's white space is changed later": Case(
        [ask("a "), step("change", 0, str.strip), ask("b")], [None, None]
    ),
    # history that is edited
    "the system prompt changes": Case(
        [step("insert", 0, "system", "one"), ask("a"), step("edit", 0, content="two"), ask("b"), ask("c")],
        [None, None, 1],
    ),
    "a system message in the middle": two(step("insert", 2, "system", "now")),
    "the first question is edited": Case([ask("a"), ask("b"), step("edit", 0, content="A"), ask("c")], [None, 0, None]),
    "the last question is edited": Case([ask("a"), ask("b"), step("cut", 2), ask("B"), ask("c")], [None, 0, 0, 2]),
    "an answer is edited": two(step("edit", 1, content="mine"), parent=None),
    "the second answer is edited": Case([ask("a"), ask("b"), step("edit", 3, content="mine"), ask("c")], [None, 0, 0]),
    "an answer is dropped": two(step("drop", 1), parent=None),
    "a question is dropped": Case([ask("a"), ask("b"), step("drop", 2), ask("c")], [None, 0, 0]),
    "answers change places": Case(
        [ask("a"), ask("b"), lambda agent: agent.history.insert(1, agent.history.pop(3)), ask("c")], [None, 0, None]
    ),
    # compaction, branches, subagents
    "compaction": Case([ask("a"), ask("b"), step("become", "summary"), ask("c"), ask("d")], [None, 0, None, 2]),
    "compaction and back": Case(
        [ask("a"), ask("b"), step("save", "old"), step("become", "s"), ask("c"), step("load", "old"), ask("d")],
        [None, 0, None, 1],
    ),
    "branch and join": Case(
        [
            ask("a"),
            step("save", "x"),
            ask("b"),
            step("load", "x"),
            ask("c"),
            step("add", user("the other branch said: answer")),
            step("ask"),
        ],
        [None, 0, 0, 2],
    ),
    "a branch of a branch": Case(
        [ask("a"), ask("b"), step("save", "x"), ask("c"), step("load", "x"), ask("d"), step("cut", 2), ask("e")],
        [None, 0, 1, 1, 0],
    ),
    "parallel subagents after one history": Case([ask("a"), step("parallel", "b", "c", "d")], [None, 0, 0, 0]),
    "parallel agents from the start": Case([step("parallel", "a", "b", "c")], [None, None, None]),
    "a subagent with its own prompt": Case(
        [ask("a"), step("side", {"role": "system", "content": "sub"}, user("x")), ask("b")], [None, None, 0]
    ),
    # samples
    "asked again": Case([ask("a"), step("again"), ask("b")], [None, None, 1]),
    "sampled twice, the first is used": Case([ask("a"), step("sample"), ask("b")], [None, None, 0]),
    "equal samples": Case([ask("a"), step("sample"), ask("b")], [None, None, 1], ["x" + END] * 2),
    "equal samples, both continued": Case(
        [ask("a"), step("sample"), step("save", "x"), ask("b"), step("load", "x"), ask("c")],
        [None, None, 1, 0],
        ["x" + END] * 2,
    ),
    "two choices": Case([ask("a", pick=1), ask("b", pick=0)], [None, None, 1, 1], options={"n": 2}),
    # tools
    "a call": Case([ask("a"), step("results", "3"), step("ask"), ask("b")], [None, 0, 1], [ADD + END]),
    "two calls": tools(reply=TWO, results=["3", "x"]),
    "results out of order": tools(reply=TWO, results=["3", "x"], order=-1),
    "an empty result": tools(results=[""]),
    "a result with an image": tools(
        step("refused", {"role": "tool", "tool_call_id": "x", "content": [IMAGE]}, "item 2", "text")
    ),
    "arguments written without blanks": tools(step("calls", 1, rewritten(separators=(",", ":")))),
    "arguments in another order": tools(
        step("calls", 1, rewritten(sort_keys=True)), reply=call("add", '{"b": 2,  "a" : 1}')
    ),
    "arguments with escaped letters": tools(step("calls", 1, rewritten(ensure_ascii=True)), reply=FIND),
    "an argument is changed": tools(
        step("calls", 1, lambda calls: json.loads(json.dumps(calls).replace("1", "7"))), parent=None
    ),
    "other ids": tools(step("calls", 1, with_ids("mine"))),
    "equal ids": tools(step("calls", 1, with_ids("i", "i")), reply=TWO, results=["3", "x"]),
    "calls change places": tools(
        step("calls", 1, lambda calls: calls[::-1]), reply=TWO, results=["x", "3"], parent=None
    ),
    "a call is dropped": tools(step("calls", 1, lambda calls: calls[:1]), reply=TWO, parent=None),
    "no content beside a call": tools(step("edit", 1, content="")),
    "a result is edited later": Case(
        [ask("a"), step("results", "3"), step("ask"), step("edit", 2, content="4"), ask("b")], [None, 0, 0], [ADD + END]
    ),
    "a call that cannot be read": two(replies=['<tool_call>\n{"name": add}\n' + END]),
    "a call that is cut": two(replies=[ADD + END], max_tokens=20),
    "other tools": Case([ask("a"), step("option", tools=TOOLS[:1]), ask("b"), ask("c")], [None, None, 1]),
    "many steps with tools": Case(
        [ask("a"), *[step("results", "3"), step("ask")] * 3, ask("b")], [None, 0, 1, 2, 3], [ADD + END] * 3
    ),
    # reasoning, with a template that leaves out what was thought before the last question
    "thoughts in the content": two(replies=[THOUGHT + "x" + END], parent=None, template="thinking"),
    "thoughts are kept between calls": tools(reply=THOUGHT + ADD, template="thinking"),
    "thoughts are dropped between calls": tools(
        step("edit", 1, reasoning_content=None), reply=THOUGHT + ADD, template="thinking", parent=None
    ),
    "thoughts are edited": tools(
        step("edit", 1, reasoning_content="hm"), reply=THOUGHT + ADD, template="thinking", parent=None
    ),
    "thoughts of an earlier question": Case(
        [ask("a"), step("results", "3"), step("ask"), ask("b"), ask("c")],
        [None, 0, None, 2],
        [THOUGHT + ADD + END],
        template="thinking",
    ),
    "thoughts that the template writes in another form": tools(
        reply=f"<think>hm</think>{ADD}", template="thinking", parent=None
    ),
    # a template that trims
    "trimmed by the template": two(replies=["  x " + END], parent=None, template="trimming"),
    "nothing to trim": Case([ask(" a "), ask("b ")], [None, 0], ["x" + END], template="trimming"),
}


@pytest.fixture(scope="module")
def gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[httpx.Client, OracleEngine]]]:
    with ExitStack() as stack:
        made: dict[str, tuple[httpx.Client, OracleEngine]] = {}

        def gateway(template: str) -> tuple[httpx.Client, OracleEngine]:
            if template not in made:
                tokenizer, engine = merging_tokenizer(), OracleEngine()
                tokenizer.chat_template = TEMPLATES[template]
                directory = tmp_path_factory.mktemp(template)
                made[template] = stack.enter_context(session_gateway(directory, engine, tokenizer)), engine
            return made[template]

        yield gateway


TOKENIZER = build_tiny_tokenizer()
"""What the policy writes is one token a byte: not as the gateway's tokenizer encodes it."""


def merging_tokenizer() -> Any:
    """The same ids, and tokens of several bytes after them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [("a", "n"), ("s", "w"), ("e", "r"), ("an", "sw"), ("answ", "er"), ("u", "m"), ("Ġ", "x"), ("Ã", "©")]
    words = [*TOKENIZER.get_vocab(), *(first + second for first, second in merges)]
    vocab = {**TOKENIZER.get_vocab(), **{first + second: 259 + k for k, (first, second) in enumerate(merges)}}
    assert len(vocab) == len(words)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = [AddedToken(word, special=True) for word in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    backend.add_special_tokens(specials)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    assert made.encode("answer é") != TOKENIZER.encode("answer é") == made.convert_tokens_to_ids([*"answerĠÃ©"])
    return made


def writing(replies: Sequence[str]) -> Callable[[GenerationRequest, int], list[int]]:
    texts = itertools.chain(replies, (f"answer {number}{END}" for number in itertools.count()))

    def reply(request: GenerationRequest, index: int) -> list[int]:
        return list(TOKENIZER.encode(next(texts), add_special_tokens=False))

    return reply


def check(gateways: Any, name: str, api: Callable[..., Any], *, stream: bool) -> None:
    case = CASES[name]
    client, engine = gateways(case.template)
    engine.reset(writing(case.replies))
    session = open_session(client)
    has_calls = any("<tool_call>" in reply for reply in case.replies) or name == "other tools"
    agent = Agent(api, session, {**({"tools": TOOLS} if has_calls else {}), **case.options}, stream=stream)
    for one in case.steps:
        one(agent)
    tree = client.get(f"/sessions/{session['id']}").json()
    assert [turn["parent"] for turn in tree["tree"]] == case.parents, [turn["reason"] for turn in tree["tree"]]
    check_rollout(rollout_of(client, session), engine.samples)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", CASES)
def test_transcript(gateways: Any, name: str, stream: bool) -> None:
    check(gateways, name, chat, stream=stream)


# Responses joins answers that follow one another, and has no empty ones.
CHAT_ONLY = {"an answer that is to be continued", "an empty answer", "a question is dropped", "a named user"}
CHAT_ONLY |= {"an answer sent back as parts"}
FORMS = [(api, stream) for api in (messages, responses) for stream in (False, True)]
NAMES = [name for name, case in CASES.items() if name not in CHAT_ONLY and case.options.keys() <= {"max_tokens"}]
ALL = [(name, *form) for number, name in enumerate(NAMES) for form in (FORMS[number % 4 :] + FORMS)[:4]]


@pytest.mark.parametrize(("name", "api", "stream"), ALL if os.environ.get("ATROPOS_VERL_ALL_TRANSCRIPTS") else ALL[::4])
def test_transcript_of_another_api(gateways: Any, name: str, api: Callable[..., Any], stream: bool) -> None:
    check(gateways, name, api, stream=stream)
