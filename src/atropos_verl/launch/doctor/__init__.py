"""``atropos-verl doctor``: what this machine can run, and what is missing, before anything slow starts."""
