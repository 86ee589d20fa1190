"""Shows runs: the terminal, ``inspect``, ``report`` with its page, and the screen of a launch."""
