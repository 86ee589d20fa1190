"""A reward for ``reward.path``: the share of letters that are right, for prompts such as ``…: cat`` (answer: ``tac``)."""


def score(prompts, completions):
    """One score in [0, 1] per completion."""
    return [_share(prompt.split()[-1][::-1], completion.strip()) for prompt, completion in zip(prompts, completions)]


def _share(wanted, given):
    right = sum(a == b for a, b in zip(wanted, given))
    return right / max(len(wanted), len(given), 1)
