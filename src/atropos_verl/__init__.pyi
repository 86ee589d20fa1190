"""Types of the names that the package loads on first use. No interpreter runs this file."""

from atropos_verl.backends.local.trainer import AtroposTrainer as AtroposTrainer
from atropos_verl.config.schema import RunConfig as RunConfig
from atropos_verl.errors import AtroposAPIError as AtroposAPIError
from atropos_verl.errors import AtroposVerlError as AtroposVerlError
from atropos_verl.protocol.client import AtroposClient as AtroposClient
from atropos_verl.protocol.wire import decode_batch as decode_batch
from atropos_verl.training.samples import build_samples as build_samples
from atropos_verl.training.weight_sync import AtroposShardingManager as AtroposShardingManager
from atropos_verl.types import SampleReport as SampleReport
from atropos_verl.types import SampleSettings as SampleSettings
from atropos_verl.types import ScoredGroup as ScoredGroup
from atropos_verl.types import TrainingSample as TrainingSample

__version__: str
__all__: list[str]

def __dir__() -> list[str]: ...
