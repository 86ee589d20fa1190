"""An agent on the ``openai`` SDK that does sums with a calculator tool. Nothing in it knows that it is trained.

It calls the tool, is told the result, and says it. Reward: 0.5 for the right operation, 0.1 for each right number, and
0.3 for the right answer.

    python examples/agents/calculator.py > tasks.jsonl          # tasks; with --held-out those that are never trained
    PYTHONPATH=examples/agents atropos-verl agents run calculator:solve --tasks tasks.jsonl
"""

import hashlib
import itertools
import json
import sys
from typing import Any

from openai import AsyncOpenAI

OPERATIONS = {"add": lambda a, b: a + b, "times": lambda a, b: a * b, "minus": lambda a, b: a - b}
DIGIT = {"type": "integer", "enum": list(range(10))}
PARAMETERS = {
    "type": "object",
    "properties": {"op": {"enum": list(OPERATIONS)}, "a": DIGIT, "b": DIGIT},
    "required": ["op", "a", "b"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "calc", "parameters": PARAMETERS}}


async def solve(task: dict[str, Any], session: Any) -> float:
    """The task is ``{"op": "add", "a": 6, "b": 2}``."""
    model = AsyncOpenAI(base_url=session.base_url, api_key=session.api_key)
    messages: list[Any] = [{"role": "user", "content": f"{task['op']} {task['a']} {task['b']}"}]
    asked = {"model": "policy", "tools": [TOOL], "temperature": 1.0}
    first = await model.chat.completions.create(
        messages=messages, tool_choice={"type": "function", "function": {"name": "calc"}}, max_tokens=128, **asked
    )
    (call,) = first.choices[0].message.tool_calls or [None]
    if call is None:
        return 0.0
    arguments = json.loads(call.function.arguments)
    result = str(OPERATIONS[arguments["op"]](arguments["a"], arguments["b"]))
    messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": result}]
    second = await model.chat.completions.create(messages=messages, max_tokens=8, **asked)
    said = (second.choices[0].message.content or "").strip()
    shares = {"op": 0.5, "a": 0.1, "b": 0.1}
    right = sum(share for name, share in shares.items() if arguments[name] == task[name])
    return right + 0.3 * (said == str(OPERATIONS[task["op"]](task["a"], task["b"])))


def is_held_out(task: dict[str, Any]) -> bool:
    """One task in five."""
    return hashlib.sha256(json.dumps(task).encode()).digest()[0] % 5 == 0


if __name__ == "__main__":
    for op, a, b in itertools.product(OPERATIONS, range(10), range(10)):
        if is_held_out(task := {"op": op, "a": a, "b": b}) == ("--held-out" in sys.argv):
            print(json.dumps(task))
