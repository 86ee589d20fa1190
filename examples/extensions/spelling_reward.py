"""A reward for ``reward.path``: the share of right letters, for the demo's prompts ``… -> nus): cat`` (``tac``)."""

import re

WORD = re.compile(r"-> nus\): (\w+)")


def score(prompts, completions):
    """One score in [0, 1] per completion. A prompt is the whole text before the answer, chat template included."""
    wanted = [WORD.search(prompt).group(1)[::-1] for prompt in prompts]
    return [_share(word, completion.strip()) for word, completion in zip(wanted, completions, strict=True)]


def _share(wanted, given):
    right = sum(a == b for a, b in zip(wanted, given, strict=False))
    return right / max(len(wanted), len(given), 1)
