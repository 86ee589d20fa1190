"""atroposlib's own API tests against our server. They ship in its wheel, and expect the server on port 8000."""

import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.trajectory_server import ServerProcess

SUITES = ("test_api_compression.py", "test_api_legacy.py", "test_api_messages_handling.py")


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_upstreams_own_tests_pass(tmp_path: Path) -> None:
    if not port_is_free(8000):
        pytest.skip("port 8000, which upstream's tests demand, is taken")
    found = find_spec("atroposlib")
    assert found is not None and found.submodule_search_locations is not None
    tests = Path(found.submodule_search_locations[0]) / "tests"
    with ServerProcess(tmp_path, port=8000) as server:
        # Their fixtures also start upstream's server, which ends at once, since the port is taken.
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tests}"]
        ran = subprocess.run(
            [*command, *(str(tests / name) for name in SUITES)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert "36 passed" in ran.stdout, ran.stdout[-4000:]
        assert ran.returncode == 0
        # It was ours that answered.
        assert "trainer registered" in server.log_path.read_text()
        assert server.stop() == 0
