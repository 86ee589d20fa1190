"""What a run leaves behind and shows: metrics, summary, quarantine, the terminal, and ``inspect``."""
