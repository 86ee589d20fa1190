"""Platform and registrations in verl, in processes of their own (verl keeps its choice)."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from atropos_verl.backends.local.worker import PolicyWorker
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.verl_plugin import activate, ray_environment, shims


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("VERL_") and k != "PYTHONWARNINGS"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=plain | environment)


def test_a_choice_made_before_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.plugin.platform import platform_manager

    monkeypatch.setattr(platform_manager, "_current_platform", Mock(device_name="cuda"))
    monkeypatch.setenv("VERL_PLATFORM", "nvidia")
    with pytest.raises(RuntimeError, match="verl has already picked 'cuda'"):
        activate("cpu")


def test_ray_may_take_longer_than_it_gives_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Symptom: "The current node timed out during startup" on a busy machine."""
    import ray
    from ray._private import services

    known = Mock(side_effect=[RuntimeError("not there yet")] * 100 + ["node"])
    found = list[str]()
    monkeypatch.setattr(services, "get_node", known)
    monkeypatch.setattr(shims.time, "sleep", lambda _: None)
    monkeypatch.setattr(ray, "init", lambda **_: found.append(services.get_node("address", "id")))
    shims.start_ray(num_cpus=1)
    assert found == ["node"] and services.get_node is known


def test_cpu_is_chosen_where_verl_is_imported_already_but_has_picked_none() -> None:
    code = "import verl.utils.tensordict_utils; from atropos_verl import verl_plugin; verl_plugin.activate('cpu');"
    done = _run("-W", "ignore", "-c", f"{code} from verl.utils.device import get_device_name; print(get_device_name())")
    assert done.stdout.split() == ["cpu"], done.stderr[-2000:]


def test_with_its_environment_verl_knows_platform_and_rollouts_before_anyone_asks() -> None:
    code = (
        "from verl.utils.device import get_device_name\n"
        "from verl.workers.rollout.replica import get_rollout_replica_class\n"
        "from verl.workers.rollout import get_rollout_class\n"
        "print(get_device_name(), get_rollout_replica_class('transformers').__name__,"
        " get_rollout_class('transformers').__name__)"
    )
    done = _run("-W", "ignore", "-c", code, **ray_environment("cpu"))
    assert done.stdout.split()[-3:] == ["cpu", "TransformersReplica", "TransformersServerAdapter"], done.stderr[-2000:]


def test_modules_that_the_user_named_stay_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "theirs")
    for _ in range(2):
        found = ray_environment("cpu")["VERL_USE_EXTERNAL_MODULES"]
        assert found == "theirs,atropos_verl.verl_plugin.plugin"
        monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", found)


def test_building_a_trainer_warns_of_nothing_and_leaves_the_users_filters_alone(tmp_path: Path) -> None:
    code = (
        "import warnings; from atropos_verl import AtroposTrainer; before = list(warnings.filters);"
        f"AtroposTrainer.from_config({{'atropos': {{'api_url': 'http://127.0.0.1:9'}}, 'run_dir': {str(tmp_path)!r},"
        " 'trainer': {'device': 'cpu'}}, reward_fn=len).close(); assert warnings.filters == before;"
        "warnings.warn('of the user')"
    )
    done = _run("-c", code)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines() == ["<string>:1: UserWarning: of the user"]


def test_a_network_interface_of_another_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = torch.distributed
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    monkeypatch.setattr(distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(distributed, "init_process_group", Mock(side_effect=RuntimeError("Unable to find none0")))
    config = RunConfig.from_mapping({"trainer": {"device": "cpu"}})
    with pytest.raises(ConfigError, match=r"none0; is that .* of this machine: GLOO_SOCKET_IFNAME=none0\?$"):
        PolicyWorker(config, config.resolve_model_path())


def test_a_tracker_that_cannot_write_stops_neither_the_run_nor_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from verl.utils.tracking import Tracking

    monkeypatch.setattr(Tracking, "log", Tracking.log)  # is put back at the end
    shims.let_trackers_fail()
    full, sound = Mock(), Mock()
    full.log.side_effect = OSError(28, "No space left on device")
    tracking = Tracking.__new__(Tracking)
    tracking.logger = {"file": full, "tensorboard": sound}
    tracking.log(data={"loss": 1.0}, step=3)
    sound.log.assert_called_once_with(data={"loss": 1.0}, step=3)
    assert "step 3 did not reach file (trainer.logger): [Errno 28] No space left on device" in caplog.text
