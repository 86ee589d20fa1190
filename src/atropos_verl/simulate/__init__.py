"""A run on a virtual clock: the real batcher and rules of staleness and overlap, without models and machines."""

from atropos_verl.simulate.outcome import Outcome
from atropos_verl.simulate.run import simulate
from atropos_verl.simulate.workload import Layout, Recording, Workload

__all__ = ["Layout", "Outcome", "Recording", "Workload", "simulate"]
