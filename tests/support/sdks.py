"""One question in the form of the chat API, asked through the official SDKs by each of the three APIs of agents."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import anthropic
import openai

Message = dict[str, Any]
Messages = Sequence[Message]

# Made once: certificates take 20 ms.
OPENAI = openai.OpenAI(base_url="http://unused", api_key="unused", max_retries=0)
ANTHROPIC = anthropic.Anthropic(base_url="http://unused", api_key="unused", max_retries=0)


def said(answer: Any) -> list[Message]:
    """The messages of an answer of one of the SDKs, as an agent would put them into its history."""
    if hasattr(answer, "choices"):
        return [choice.message.model_dump() for choice in answer.choices]
    if hasattr(answer, "output"):
        texts = {item.type: item.content[0].text for item in answer.output if item.type != "function_call"}
        calls = [(item.call_id, item.name, item.arguments) for item in answer.output if item.type == "function_call"]
    else:
        names = {"text": "message", "thinking": "reasoning"}
        texts = {names[item.type]: getattr(item, item.type) for item in answer.content if item.type != "tool_use"}
        calls = [(item.id, item.name, json.dumps(item.input)) for item in answer.content if item.type == "tool_use"]
    message = {"role": "assistant", "content": texts.get("message", ""), "reasoning_content": texts.get("reasoning")}
    message["tool_calls"] = [
        {"id": known, "type": "function", "function": {"name": name, "arguments": arguments}}
        for known, name, arguments in calls
    ]
    return [message]


def chat(session: Message, history: Messages, *, stream: bool, **options: Any) -> Any:
    client = OPENAI.with_options(base_url=session["base_url"], api_key=session["api_key"])
    body: Any = {"model": "tiny", "messages": list(history), **options}
    if not stream:
        return client.chat.completions.create(**body)
    with client.chat.completions.stream(**body, stream_options={"include_usage": True}) as events:
        events.until_done()
        return events.current_completion_snapshot


def items_of(history: Messages) -> Iterator[Message]:
    """The ``input`` of the Responses API."""
    for number, message in enumerate(history):
        if message["role"] == "tool":
            yield {"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]}
            continue
        if message["role"] != "assistant":
            yield message
            continue
        if thought := message.get("reasoning_content"):
            content = [{"type": "reasoning_text", "text": thought}]
            yield {"type": "reasoning", "id": f"rs_{number}", "summary": [], "content": content}
        if text := message["content"]:
            about = {"type": "message", "id": f"msg_{number}", "status": "completed", "role": "assistant"}
            yield {**about, "content": [{"type": "output_text", "text": text, "annotations": []}]}
        for one in message.get("tool_calls") or ():
            yield {"type": "function_call", "call_id": one["id"], **one["function"]}


def responses(
    session: Message, history: Messages, *, stream: bool, tools: Messages = (), max_tokens: int | None = None
) -> Any:
    client = OPENAI.with_options(base_url=session["base_url"], api_key=session["api_key"])
    own = [{"type": "function", **tool["function"]} for tool in tools]
    body: Any = {"model": "tiny", "input": [*items_of(history)], "tools": own, "max_output_tokens": max_tokens}
    if not stream:
        return client.responses.create(**body)
    with client.responses.stream(**body) as events:
        *before, last = events
    assert [event.sequence_number for event in (*before, last)] == [*range(len(before) + 1)]
    return last.response


def _blocks(message: Message) -> Iterator[Message]:
    content = message["content"]
    if message["role"] == "tool":
        yield {"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": content}
        return
    if thought := message.get("reasoning_content"):
        yield {"type": "thinking", "thinking": thought, "signature": "x"}
    if isinstance(content, list):
        yield from content
    elif content or message["role"] != "assistant":
        yield {"type": "text", "text": content}
    for one in message.get("tool_calls") or ():
        sent = {"name": one["function"]["name"], "input": json.loads(one["function"]["arguments"])}
        yield {"type": "tool_use", "id": one["id"], **sent}


def blocks_of(history: Messages) -> Iterator[Message]:
    """The ``messages`` of Anthropic's API."""
    roles = {"tool": "user", "developer": "system"}
    return ({"role": roles.get(m["role"], m["role"]), "content": [*_blocks(m)]} for m in history)


def messages(
    session: Message, history: Messages, *, stream: bool, tools: Messages = (), max_tokens: int = 400, **options: Any
) -> Any:
    client = ANTHROPIC.with_options(base_url=session["base_url"].removesuffix("/v1"), api_key=session["api_key"])
    functions = [tool["function"] for tool in tools]
    own = [{"name": function["name"], "input_schema": function["parameters"]} for function in functions]
    body: Any = {"model": "tiny", "messages": [*blocks_of(history)], "tools": own, "max_tokens": max_tokens, **options}
    if not stream:
        return client.messages.create(**body)
    with client.messages.stream(**body) as events:
        return events.get_final_message()
