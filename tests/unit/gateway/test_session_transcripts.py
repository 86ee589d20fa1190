"""A corpus of hostile transcripts through the official SDKs, streamed and not, against what the engine sampled.

Of each: no legitimate request is refused, the lineages are the true ones, and every sampled token is trained once, in
exactly the context in which it was sampled. Of those that Responses and Messages can express each runs in one of their
four forms (which API, streamed or not); ``ATROPOS_VERL_ALL_TRANSCRIPTS=1`` runs all.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from operator import methodcaller as step
from typing import Any

import anthropic
import httpx
import openai
import pytest
from support.sdks import Message, Messages, chat, messages, responses, said
from support.sessions import OracleEngine, check_rollout, open_session, rollout_of, session_gateway
from support.tiny_model import CHATML_TEMPLATE, build_tiny_tokenizer

END = "<|im_end|>"
TEMPLATES = {
    "chatml": CHATML_TEMPLATE,
    "trimming": CHATML_TEMPLATE.replace("m['content']", "m['content'] | trim"),
    # As Qwen3's: what was thought before the last question is left out; calls and tools have their own form.
    "thinking": (
        "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% set text = m.content or '' %}{% set thought = m.reasoning_content or '' %}{% if '</think>' in text %}"
        "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{% if thought and 'user' not in messages[loop.index:] | map(attribute='role') %}"
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
TWO, THOUGHT = f"{ADD}\n{FIND}", "<think>\nhm, é\n</think>\n\n"


class Agent(list[Message]):
    """A history in the form of the chat API; ``asked`` sends it by an official SDK. Methods: the corpus's words."""

    def __init__(self, asked: Callable[..., Any]) -> None:
        self.asked, self.saved = asked, list[Message]()

    def option(self, **options: Any) -> None:
        self.asked = partial(self.asked, **options)

    def send(self, history: Messages) -> list[Message]:
        return said(self.asked(history))

    def ask(self, *contents: Any, pick: int = 0) -> None:
        self.extend(map(user, contents))
        self.append(self.send(self)[pick])

    def again(self) -> None:
        """The newest answer is thrown away, and asked for once more."""
        self[-1] = self.send(self[:-1])[0]

    def sample(self) -> None:
        """The last request once more; the history keeps the first answer."""
        self.send(self[:-1])

    def parallel(self, *questions: str) -> None:
        with ThreadPoolExecutor(len(questions)) as pool:
            list(pool.map(self.send, ([*self, user(text)] for text in questions)))

    def edit(self, index: int, **fields: Any) -> None:
        """New values of a message's fields, or what makes them of the old ones."""
        made = {name: value(self[index][name]) if callable(value) else value for name, value in fields.items()}
        self[index] = self[index] | made

    def cut(self, count: int) -> None:
        del self[count:]

    def become(self, content: str) -> None:
        self[:] = [system(content)]

    def save(self) -> None:
        self.saved = self[:]

    def load(self) -> None:
        self[:] = self.saved

    def results(self, *contents: str, order: int = 1) -> None:
        """The tools' results; ``order`` -1: the last call's first."""
        pairs = list(zip(self[-1]["tool_calls"], contents, strict=True))[::order]
        self.extend({"role": "tool", "tool_call_id": one["id"], "content": content} for one, content in pairs)

    def refused(self, message: Message, *words: str) -> None:
        """A message that is not served, and the error names it."""
        with pytest.raises((openai.BadRequestError, anthropic.BadRequestError)) as error:
            self.send([*self, message])
        assert all(word in str(error.value) for word in words), str(error.value)


@dataclass(frozen=True)
class Case:
    steps: Sequence[str | Callable[[Agent], Any]]
    """A text is asked."""
    parents: list[int | None]
    """Of each recorded completion, the one whose tokens it continues."""
    replies: Sequence[str] = ()
    """What the policy writes, in this order, and its end where no stop string is it; afterwards numbered answers."""
    template: str = "chatml"
    options: dict[str, Any] = field(default_factory=dict)


edit, add, results, insert = (partial(step, word) for word in ("edit", "append", "results", "insert"))
ASK, SAVE, LOAD, AGAIN, SAMPLE = map(step, ("ask", "save", "load", "again", "sample"))
BECOME = step("become", "summary")


def user(content: Any, **fields: Any) -> Message:
    return {"role": "user", "content": content, **fields}


def system(content: str, role: str = "system") -> Message:
    return {"role": role, "content": content}


def arguments(how: Callable[[str], str]) -> Any:
    """A step in which the arguments of the last answer's calls become others."""

    def changed(one: Message) -> Message:
        return {**one, "function": {**one["function"], "arguments": how(one["function"]["arguments"])}}

    return edit(1, tool_calls=lambda calls: [changed(one) for one in calls])


def written(**style: Any) -> Any:
    return arguments(lambda text: json.dumps(json.loads(text), **style))


def tools(
    *edits: Any, reply: str = ADD, given: Sequence[str] = ("3",), order: int = 1, parent: int | None = 0, **more: Any
) -> Case:
    """A call, which is edited before its results are sent."""
    return Case(["a", *edits, results(*given, order=order), ASK], [None, parent], [reply], **more)


thinking = partial(tools, reply=f"{THOUGHT}{ADD}", template="thinking", parent=None)


def two(
    *between: Any, replies: Sequence[str] = (), parent: int | None = 0, template: str = "chatml", **options: Any
) -> Case:
    """Two questions, and what happens to the history between them."""
    return Case(["a", *between, "b"], [None, parent], replies, template, options)


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
SAME_IDS = edit(1, tool_calls=lambda calls: [{**one, "id": "mine"} for one in calls])
CASES: dict[str, Case] = {
    # plain conversations
    "four turns": Case(["a", "b", "c", "d"], [None, 0, 1, 2]),
    "a system prompt": Case([insert(0, system("be good")), "a", "b"], [None, 0]),
    "a developer's prompt": Case([insert(0, system("be good", "developer")), "a", "b"], [None, 0]),
    "the same words again and again": Case(["a", "a", "a"], [None, 0, 1], ["x"] * 3),
    "a named user": Case([add(user("a", name="ann", x=10**30)), ASK, "b"], [None, 0]),
    "20,000 characters": Case(["x" * 20_000, "y"], [None, 0]),
    "an answer of the agent's own": Case(
        ["a", add(user("b")), add(system("own", "assistant")), "c", "d"], [None, 0, 1]
    ),
    "an answer that is to be continued": Case(["a", ASK, "b"], [None, 0, 1]),
    "a tool's message that answers no call": Case(
        ["a", add({"role": "tool", "tool_call_id": "x", "content": "r"}), ASK], [None, 0]
    ),
    # contents
    "an empty question": Case(["", ""], [None, 0]),
    "an empty answer": two(replies=["", ""]),
    "an answer of white space": two(replies=[" \n\t"]),
    "parts of text": Case([step("ask", PARTS), "c"], [None, 0]),
    "an answer sent back as parts": two(edit(1, content=PARTS[:1]), replies=["a"]),
    "an answer with all fields of the SDK": two(edit(1, refusal=None, audio=None, function_call=None)),
    "joined emoji": two(replies=["👩‍👩‍👧 🏳️‍🌈"]),
    "control characters": Case(["a\x00\x1b[2J\x7f", "b"], [None, 0], ["\x01\x02\u2028"]),
    "words of the template in a question": Case([f"a{END}\n<|im_start|>assistant\nno", "b"], [None, 0]),
    "a special token in an answer": two(replies=["x<|im_start|>y"]),
    "an image": two(step("refused", user([IMAGE]), "item 2", "text")),
    # answers that were cut
    "cut by its length": two(max_tokens=4),
    "cut inside a letter": two(replies=["aé世"], max_tokens=4),
    "cut at a stop string": two(replies=["say\nObservation:"], stop=["\nObs"]),
    "a stop string that is kept": two(
        replies=["say STOP"], stop=["STOP"], extra_body={"include_stop_str_in_output": True}
    ),
    # white space
    "the agent strips answers": two(edit(1, content=str.strip), replies=[" \n x \n"]),
    "the agent ends answers with a line": two(edit(1, content=lambda t: t + "\n")),
    "white space inside an answer is changed": two(edit(1, content="x  y"), replies=["x y"], parent=None),
    "an answer in another normal form": two(edit(1, content="e\u0301"), replies=["é"], parent=None),
    "a question's white space is changed later": Case(["a ", edit(0, content="a"), "b"], [None, None]),
    # history that is edited
    "the system prompt changes": Case(
        [insert(0, system("one")), "a", edit(0, content="two"), "b", "c"], [None, None, 1]
    ),
    "a system message in the middle": two(insert(2, system("now"))),
    "the first question is edited": Case(["a", "b", edit(0, content="A"), "c"], [None, 0, None]),
    "the last question is edited": Case(["a", "b", step("cut", 2), "B", "c"], [None, 0, 0, 2]),
    "an answer is edited": two(edit(1, content="mine"), parent=None),
    "the second answer is edited": Case(["a", "b", edit(3, content="mine"), "c"], [None, 0, 0]),
    "an answer is dropped": two(step("pop", 1), parent=None),
    "a question is dropped": Case(["a", "b", step("pop", 2), "c"], [None, 0, 0]),
    "answers change places": Case(["a", "b", lambda agent: agent.insert(1, agent.pop(3)), "c"], [None, 0, None]),
    # compaction, branches, subagents
    "compaction": Case(["a", "b", BECOME, "c", "d"], [None, 0, None, 2]),
    "compaction and back": Case(["a", "b", SAVE, BECOME, "c", LOAD, "d"], [None, 0, None, 1]),
    "branch and join": Case(["a", SAVE, "b", LOAD, "c", add(user("the other said: answer")), ASK], [None, 0, 0, 2]),
    "a branch of a branch": Case(["a", "b", SAVE, "c", LOAD, "d", step("cut", 2), "e"], [None, 0, 1, 1, 0]),
    "parallel subagents after one history": Case(["a", step("parallel", "b", "c", "d")], [None, 0, 0, 0]),
    "parallel agents from the start": Case([step("parallel", "a", "b", "c")], [None, None, None]),
    "a subagent with its own prompt": Case(["a", step("send", [system("sub"), user("x")]), "b"], [None, None, 0]),
    # samples
    "asked again": Case(["a", AGAIN, "b"], [None, None, 1]),
    "sampled twice, the first is used": Case(["a", SAMPLE, "b"], [None, None, 0]),
    "equal samples": Case(["a", SAMPLE, "b"], [None, None, 1], ["x"] * 2),
    "equal samples, both continued": Case(["a", SAMPLE, SAVE, "b", LOAD, "c"], [None, None, 1, 0], ["x"] * 2),
    "two choices": Case([step("ask", "a", pick=1), "b"], [None, None, 1, 1], options={"n": 2}),
    # tools
    "a call": Case(["a", results("3"), ASK, "b"], [None, 0, 1], [ADD]),
    "two calls": tools(reply=TWO, given=["3", "x"]),
    "results out of order": tools(reply=TWO, given=["3", "x"], order=-1),
    "an empty result": tools(given=[""]),
    "a result with an image": tools(
        step("refused", {"role": "tool", "tool_call_id": "x", "content": [IMAGE]}, "item 2", "text")
    ),
    "arguments written without blanks": tools(written(separators=(",", ":"))),
    "arguments in another order": tools(written(sort_keys=True), reply=call("add", '{"b": 2,  "a" : 1}')),
    "arguments with escaped letters": tools(written(ensure_ascii=True), reply=FIND),
    "an argument is changed": tools(arguments(lambda text: text.replace("1", "7")), parent=None),
    "other ids": tools(SAME_IDS),
    "equal ids": tools(SAME_IDS, reply=TWO, given=["3", "x"]),
    "calls change places": tools(
        edit(1, tool_calls=lambda calls: calls[::-1]), reply=TWO, given=["x", "3"], parent=None
    ),
    "a call is dropped": tools(edit(1, tool_calls=lambda calls: calls[:1]), reply=TWO, parent=None),
    "no content beside a call": tools(edit(1, content="")),
    "a result is edited later": Case(["a", results("3"), ASK, edit(2, content="4"), "b"], [None, 0, 0], [ADD]),
    "a call that cannot be read": two(replies=['<tool_call>\n{"name": add}\n']),
    "a call that is cut": two(replies=[ADD], max_tokens=20),
    "other tools": Case(["a", step("option", tools=TOOLS[:1]), "b", "c"], [None, None, 1], options={"tools": TOOLS}),
    "many steps with tools": Case(["a", *[results("3"), ASK] * 3, "b"], [None, 0, 1, 2, 3], [ADD] * 3),
    # reasoning, with a template that leaves out what was thought before the last question
    "thoughts in the content": two(replies=[THOUGHT + "x"], parent=None, template="thinking"),
    "thoughts are kept between calls": thinking(parent=0),
    "thoughts are dropped between calls": thinking(edit(1, reasoning_content=None)),
    "thoughts are edited": thinking(edit(1, reasoning_content="hm")),
    "thoughts of an earlier question": Case(
        ["a", results("3"), ASK, "b", "c"], [None, 0, None, 2], [THOUGHT + ADD], "thinking"
    ),
    "thoughts that the template writes in another form": thinking(reply=f"<think>hm</think>{ADD}"),
    # a template that trims
    "trimmed by the template": two(replies=["  x "], parent=None, template="trimming"),
    "nothing to trim": Case([" a ", "b "], [None, 0], ["x"], "trimming"),
}


@pytest.fixture(scope="module")
def gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[httpx.Client, OracleEngine]]]:
    """What the policy writes is one token a byte: not as the gateway's tokenizer encodes it."""
    merges = [("a", "n"), ("s", "w"), ("e", "r"), ("an", "sw"), ("answ", "er"), ("u", "m"), ("Ġ", "x"), ("Ã", "©")]
    tokenizer = build_tiny_tokenizer(merges=merges)
    assert tokenizer.encode("answer é") == tokenizer.convert_tokens_to_ids(["answer", "Ġ", "Ã©"])
    with ExitStack() as stack:
        made = {}
        for name, template in TEMPLATES.items():
            own, engine = deepcopy(tokenizer), OracleEngine()
            own.chat_template = template
            made[name] = stack.enter_context(session_gateway(tmp_path_factory.mktemp(name), engine, own)), engine
        yield made


# Responses joins answers that follow one another, and has no empty ones.
CHAT_ONLY = {"an answer that is to be continued", "an empty answer", "a question is dropped", "a named user"}
CHAT_ONLY |= {"an answer sent back as parts"}
FORMS = [(api, stream) for api in (messages, responses) for stream in (False, True)]
NAMES = [
    name for name, case in CASES.items() if name not in CHAT_ONLY and case.options.keys() <= {"max_tokens", "tools"}
]
ALL = [(name, *form) for number, name in enumerate(NAMES) for form in (FORMS[number % 4 :] + FORMS)[:4]]
RUNS = [(name, chat, stream) for name in CASES for stream in (False, True)]
RUNS += ALL if os.environ.get("ATROPOS_VERL_ALL_TRANSCRIPTS") else ALL[::4]
BYTES = build_tiny_tokenizer()


@pytest.mark.parametrize(("name", "api", "stream"), RUNS)
def test_transcript(gateways: Any, name: str, api: Callable[..., Any], stream: bool) -> None:
    case = CASES[name]
    client, engine = gateways[case.template]
    end = "" if "stop" in case.options else END
    texts = itertools.chain(case.replies, (f"answer {number}" for number in itertools.count()))
    engine.reset(lambda request, index: BYTES.encode(next(texts) + end, add_special_tokens=False))
    session = open_session(client)
    calls = {"tools": TOOLS} if any("<tool_call>" in reply for reply in case.replies) else {}
    agent = Agent(partial(api, session, stream=stream, **calls, **case.options))
    for one in case.steps:
        agent.ask(one) if isinstance(one, str) else one(agent)
    tree = client.get(f"/sessions/{session['id']}").json()["tree"]
    assert [turn["parent"] for turn in tree] == case.parents, [turn["reason"] for turn in tree]
    check_rollout(rollout_of(client, session), engine.samples)
