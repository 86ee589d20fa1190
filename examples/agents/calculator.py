"""An agent on the ``openai`` SDK that does sums with a calculator tool. Nothing in it knows that it is trained.

It has to call the tool, is told the result, and has to say it. Reward: 0.2 for each of the two numbers and the
operation of the call that is right, 0.2 for an answer that begins with the right result, 0.2 more for nothing after it.
A small model cannot compute the results itself: without a right call there is no right answer.

    python examples/agents/calculator.py > tasks.jsonl          # tasks; with --held-out those that are never trained
    PYTHONPATH=examples/agents atropos-verl agents run calculator:solve --tasks tasks.jsonl
"""

import json
import operator
import random
import sys
from typing import Any

from openai import AsyncOpenAI

OPERATIONS = {"plus": ("+", operator.add), "minus": ("-", operator.sub), "times": ("*", operator.mul)}
PARAMETERS = {
    "type": "object",
    "properties": {"sum": {"type": "string", "pattern": r"^\d{3} [-+*] \d{3}$"}},
    "required": ["sum"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "calc", "parameters": PARAMETERS}}


async def solve(task: str, session: Any) -> float:
    """The task is a text such as ``237 plus 682``."""
    model = AsyncOpenAI(base_url=session.base_url, api_key=session.api_key)
    asked = {"model": "policy", "tools": [TOOL], "parallel_tool_calls": False, "temperature": 1.0}
    messages: list[Any] = [
        {"role": "system", "content": "Use calc, then say the result."},
        {"role": "user", "content": f"What is {task}?"},
    ]
    first = await model.chat.completions.create(
        messages=messages, tool_choice={"type": "function", "function": {"name": "calc"}}, max_tokens=96, **asked
    )
    if not first.choices[0].message.tool_calls:  # cut before the end of the call
        return 0.0
    [call] = first.choices[0].message.tool_calls
    called = json.loads(call.function.arguments)["sum"].split()
    messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": calculated(called)}]
    second = await model.chat.completions.create(messages=messages, max_tokens=10, **asked)
    said = (second.choices[0].message.content or "").strip()
    a, name, b = task.split()
    right = [a, OPERATIONS[name][0], b]
    points = sum(one == other for one, other in zip(called, right, strict=True))
    points += said.startswith(calculated(right)) + (said == calculated(right))
    return points / 5


def calculated(parts: list[str]) -> str:
    """The result of a sum such as ``["237", "+", "682"]``."""
    compute = next(compute for sign, compute in OPERATIONS.values() if sign == parts[1])
    return str(compute(int(parts[0]), int(parts[2])))


def tasks(*, held_out: bool) -> list[str]:
    """64 that are never trained, or 1,000 others."""
    rng = random.Random(0)
    made = (f"{rng.randrange(100, 1000)} {rng.choice([*OPERATIONS])} {rng.randrange(100, 1000)}" for _ in range(1064))
    different = list(dict.fromkeys(made))
    return different[:64] if held_out else different[64:]


if __name__ == "__main__":
    for task in tasks(held_out="--held-out" in sys.argv):
        print(json.dumps(task))
