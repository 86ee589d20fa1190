"""A run on a virtual clock: the real batcher and rules of staleness and overlap, without models and machines."""
