"""A filter for ``data.filter_path``: leave out groups whose scores hardly differ.

Such a group has advantages near 0. It costs a forward and a backward and teaches little.
"""

LEAST_SPREAD = 0.1


def keep(groups):
    """One bool per group."""
    return [group.scores.max() - group.scores.min() >= LEAST_SPREAD for group in groups]
