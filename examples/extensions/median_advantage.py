"""An advantage for ``algorithm.advantage_path``: the score minus the median of its group.

One outlier moves a mean, and with it the advantage of every other answer. It does not move the median.
"""

import numpy as np


def advantage(scores, group):
    """float64 [G] from the raw scores [G]."""
    return scores - np.median(scores)
