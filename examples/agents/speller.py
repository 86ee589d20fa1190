"""An agent on the ``anthropic`` SDK that spells a word backward and is told once when it is wrong.

It works against the Messages API of a session as it would against Anthropic's. Reward: 1 for the right word at the
first try, 0.5 at the second.

    python examples/agents/speller.py > words.jsonl             # tasks; with --held-out those that are never trained
    PYTHONPATH=examples/agents atropos-verl agents run speller:solve --tasks words.jsonl
"""

import hashlib
import json
import sys
from typing import Any

from anthropic import AsyncAnthropic


async def solve(task: str, session: Any) -> float:
    """The task is a word."""
    model = AsyncAnthropic(base_url=session.variables["ANTHROPIC_BASE_URL"], api_key=session.api_key)
    question = f"Spell this word backward (example: sun -> nus): {task}"
    messages: list[Any] = [{"role": "user", "content": question}]
    for reward in (1.0, 0.5):
        said = await model.messages.create(model="policy", messages=messages, max_tokens=16)
        text = "".join(block.text for block in said.content if block.type == "text")
        if text.strip() == task[::-1]:
            return reward
        messages += [{"role": "assistant", "content": said.content}, {"role": "user", "content": f"No. {question}"}]
    return 0.0


def is_held_out(word: str) -> bool:
    """One word in five."""
    return hashlib.sha256(word.encode()).digest()[0] % 5 == 0


if __name__ == "__main__":
    import reasoning_gym

    settings = {"min_word_len": 3, "max_word_len": 5, "size": 400, "seed": 1}
    words = {entry["metadata"]["word"] for entry in reasoning_gym.create_dataset("spell_backward", **settings)}
    for word in sorted(words):
        if is_held_out(word) == ("--held-out" in sys.argv):
            print(json.dumps(word))
