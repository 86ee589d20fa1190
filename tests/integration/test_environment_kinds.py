"""Every form of ``config_init`` that upstream environments have, unmodified and side by side in one launch."""

from pathlib import Path

import pytest
from support.runs import REPOSITORY, SMALL, LaunchRun

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
import yaml
sys.modules.setdefault("torch", None)
sys.path.insert(0, {examples!r})
from atroposlib.envs.server_handling.server_baseline import APIServerConfig, ServerBaseline
from spell_backward import SpellBackwardEnv

class Env(SpellBackwardEnv):
    @classmethod
    def config_init(cls):
        config, _ = super().config_init()
        servers = {servers}
        return config, servers

if __name__ == "__main__":
    Env.cli()
"""
ELSEWHERE = 'APIServerConfig(base_url="http://127.0.0.1:9/v1", model_name="x", api_key="x", server_type="vllm")'
KINDS = {
    "several": f"[{ELSEWHERE}, {ELSEWHERE}]",
    "bare": ELSEWHERE,
    "baseline": "ServerBaseline()",
    "reads_config": (
        "[APIServerConfig(**server) "
        'for server in yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))["openai"]]'
    ),
}


def test_each_of_them_sends_groups_that_are_trained(tmp_path: Path) -> None:
    for name, servers in KINDS.items():
        text = SCRIPT.format(examples=str(REPOSITORY / "examples" / "environments"), servers=servers)
        (tmp_path / f"{name}.py").write_text(text)
    listed = ", ".join(f"{name}: {{script: {tmp_path}/{name}.py}}" for name in KINDS)
    words = [*SMALL, f"environments={{{listed}}}", "steps=1000", "save_freq=-1"]

    def all_have_sent() -> bool:
        rows = (run.state().get("api") or {}).get("environments") or []
        return {row["name"].rsplit("_", 1)[0] for row in rows if row["groups"]} == set(KINDS)

    with LaunchRun(words, run_dir=tmp_path / "run") as run:
        run.wait_until(all_have_sent, "groups of every environment")
        run.wait_for_trained(3)
        assert [run.service(name)["restarts"] for name in KINDS] == [0] * len(KINDS)
        run.popen.terminate()
        run.must_end(130)
