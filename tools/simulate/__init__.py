"""A run on a virtual clock: the real batcher and rules of staleness and overlap, without models and machines."""

from simulate.outcome import Outcome
from simulate.recording import Recording
from simulate.run import simulate
from simulate.workload import Layout, Workload

__all__ = ["Layout", "Outcome", "Recording", "Workload", "simulate"]
