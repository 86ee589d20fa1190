"""Tasks of Harbor that need no container: the environment is a directory, the agent asks the model twice.

``python harbor_parts.py DIRECTORY`` writes the tasks.
"""

import asyncio
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import httpx
from harbor.agents.base import BaseAgent
from harbor.environments.base import BaseEnvironment, ExecResult

WORDS = ("sun", "moon", "star", "rain", "snow", "wind", "tree", "leaf")
TEST = r"""#!/bin/sh
awk -v word="$(cat "$ROOT/tests/word")" -v said="$(cat "$ROOT/app/said")" 'BEGIN {
    for (i = 1; i <= length(word); i++) found += index(said, substr(word, i, 1)) > 0
    printf "{\"letters\": %.9f, \"length\": %.9f}", found / length(word), length(said) / 100
}' > "$ROOT/logs/verifier/reward.json"
"""


def write_tasks(directory: Path) -> None:
    for word in WORDS:
        task = directory / word
        for part in ("environment", "tests"):
            (task / part).mkdir(parents=True)
        (task / "task.toml").write_text('version = "1.0"\n')
        (task / "instruction.md").write_text(f"Spell this word backward (example: sun -> nus): {word}")
        (task / "tests" / "word").write_text(word)
        (task / "tests" / "test.sh").write_text(TEST)


class Directory(BaseEnvironment):
    """What commands call /app, /logs and /tests lies in a directory of this machine."""

    @staticmethod
    def type() -> str:
        return "directory"

    def _validate_definition(self) -> None: ...

    async def start(self, force_build):
        self.root = Path(tempfile.mkdtemp(prefix="harbor-root-"))
        for name in ("app", "tests", "logs/agent", "logs/verifier", "logs/artifacts"):
            (self.root / name).mkdir(parents=True)

    async def stop(self, delete):
        shutil.rmtree(self.root, ignore_errors=True)

    def at(self, path) -> Path:
        return self.root / str(path).lstrip("/")

    async def upload_file(self, source_path, target_path):
        shutil.copy(source_path, self.at(target_path))

    async def upload_dir(self, source_dir, target_dir):
        shutil.copytree(source_dir, self.at(target_dir), dirs_exist_ok=True)

    async def download_file(self, source_path, target_path):
        shutil.copy(self.at(source_path), target_path)

    async def download_dir(self, source_dir, target_dir):
        shutil.copytree(self.at(source_dir), target_dir, dirs_exist_ok=True)

    async def exec(self, command, cwd=None, env=None, timeout_sec=None, user=None):
        words = re.sub(r"(?<![\w.])/(app|logs|tests)\b", rf"{self.root}/\1", command)
        process = await asyncio.create_subprocess_shell(
            words,
            cwd=self.at(cwd or "app"),
            env={**os.environ, **(env or {}), "ROOT": str(self.root)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        return ExecResult(stdout=out.decode(), stderr=err.decode(), return_code=process.returncode)


class AsksTwice(BaseAgent):
    @staticmethod
    def name() -> str:
        return "asks-twice"

    def version(self) -> str:
        return "1"

    async def setup(self, environment): ...

    async def run(self, instruction, environment, context):
        messages = [{"role": "user", "content": instruction.strip()}]
        headers = {"Authorization": f"Bearer {self._get_env('OPENAI_API_KEY')}"}
        async with httpx.AsyncClient(headers=headers, timeout=60) as client:
            for _ in range(2):
                url = f"{self._get_env('OPENAI_BASE_URL')}/chat/completions"
                answer = await client.post(url, json={"model": "policy", "messages": messages})
                answer.raise_for_status()
                said = answer.json()["choices"][0]["message"]
                messages += [said, {"role": "user", "content": "Again."}]
        environment.at("app/said").write_text(said["content"])


if __name__ == "__main__":
    write_tasks(Path(sys.argv[1]))
