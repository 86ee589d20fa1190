"""Each environment's share of the batch: group sizes that fit, and weights made ``min_batch_allocation``s."""

from __future__ import annotations

from atropos_verl.config.launch_schema import EnvironmentConfig, LaunchConfig
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.launch.keys import option_value

__all__ = ["allocate", "check_groups"]

_ROUNDING = 1e-9


def allocate(config: RunConfig, launch: LaunchConfig, *, embedded: bool) -> tuple[dict[str, float | None], list[str]]:
    """``--env.min_batch_allocation`` of one process of each environment, and what to warn of.

    Atropos itself uses weights only to bound concurrent requests (512 times the share, which seldom binds), so a
    weight alone moves nothing. A least share of every batch does. Where weights differ, each environment therefore
    gets its share of what explicit allocations leave, rounded down to whole groups; what rounding leaves is filled
    with the oldest groups.
    """
    chosen = launch.chosen
    total = sum(settings.min_batch_allocation or 0.0 for settings in chosen.values())
    if total > 1 + _ROUNDING:
        raise ConfigError(f"min_batch_allocation of all environments adds up to {total:g}, above 1", "environments")
    result = {name: _per_copy(config, settings.min_batch_allocation, settings) for name, settings in chosen.items()}
    free = {name: settings for name, settings in chosen.items() if settings.min_batch_allocation is None}
    weights = sum(settings.weight for settings in free.values())
    uneven = len({settings.weight / settings.copies for settings in chosen.values()}) > 1
    warnings: list[str] = []
    if len(chosen) < 2 or not uneven or weights <= 0 or not free:
        return result, warnings
    if not embedded:  # upstream stops delivering when an environment with an allocation dies: only where asked for
        return result, [_WEIGHTS_ONLY]
    for name, settings in free.items():
        result[name] = _per_copy(config, (1 - total) * settings.weight / weights, settings)
        if result[name] is None and settings.weight > 0:
            warnings.append(
                f"environments.{name}: its share of a batch of {config.batch_size} is less than one group of "
                f"{_group_size(config, settings)}; it gets what the others leave. A larger batch_size holds the share"
            )
    return result, warnings


_WEIGHTS_ONLY = (
    "weights are handed to the environments, but this API uses them for concurrency only: shares of the trained "
    "sequences will not follow them. Set min_batch_allocation of each environment, or use the embedded API"
)


def _per_copy(config: RunConfig, share: float | None, settings: EnvironmentConfig) -> float | None:
    """``share`` of the batch in whole groups, divided over the copies; None: less than one group each."""
    if share is None:
        return None
    group = _group_size(config, settings)
    groups = int(share * config.batch_size / settings.copies / group + _ROUNDING)
    # The API takes int(batch_size * allocation): a hair more, so that 1/3 of 24 is 8 and not 7.
    return None if groups == 0 else min(1.0, round(groups * group / config.batch_size + _ROUNDING, 12))


def _group_size(config: RunConfig, settings: EnvironmentConfig) -> int:
    given = option_value(settings.args, "--env.group_size")
    if given is not None and given.isdigit() and int(given) > 0:
        return int(given)
    return settings.group_size or config.group_size


def check_groups(config: RunConfig, launch: LaunchConfig, *, embedded: bool) -> list[str]:
    """Raises ``ConfigError`` where no batch can be filled exactly; what to warn of otherwise."""
    sizes = {name: _group_size(config, settings) for name, settings in launch.chosen.items()}
    largest = max(sizes.values())
    for name, size in sizes.items():
        key = f"environments.{name}.group_size"
        if size > config.batch_size:
            raise ConfigError(f"{size} is above batch_size {config.batch_size}: no batch would hold a group", key)
        if config.batch_size % size or largest % size:
            message = (
                f"groups of {size} do not fill a batch of {config.batch_size} exactly beside groups of {largest}: "
                "batch_size must be a multiple of each group size, and the largest of every other"
            )
            if not embedded:
                raise ConfigError(f"{message}; an upstream API would never deliver a batch", key)
            return [f"{key}: {message}; some batches will be smaller"]
    return []
