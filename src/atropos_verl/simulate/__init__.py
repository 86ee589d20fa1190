"""A run on a virtual clock: the real batcher and rules of staleness and overlap, without models and machines."""

from atropos_verl.simulate.outcome import Outcome
from atropos_verl.simulate.recording import Recording
from atropos_verl.simulate.run import simulate
from atropos_verl.simulate.workload import Layout, Workload

__all__ = ["Layout", "Outcome", "Recording", "Workload", "simulate"]
