"""A reward for ``reward.path``: the share of right letters, for prompts such as ``…: cat`` (wanted: ``tac``)."""


def score(prompts, completions):
    """One score in [0, 1] per completion."""
    wanted = [prompt.split()[-1][::-1] for prompt in prompts]
    return [_share(word, completion.strip()) for word, completion in zip(wanted, completions, strict=True)]


def _share(wanted, given):
    right = sum(a == b for a, b in zip(wanted, given, strict=False))
    return right / max(len(wanted), len(given), 1)
