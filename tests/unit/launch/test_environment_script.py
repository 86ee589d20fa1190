"""What a script says of itself, and what is missing for it: modules, data sets, files."""

import sys
from pathlib import Path

import pytest
from starlette.applications import Starlette

from atropos_verl.config.launch_schema import EnvironmentConfig
from atropos_verl.errors import ConfigError
from atropos_verl.http_thread import ServerThread
from atropos_verl.launch.environment_script import (
    check_needs,
    needs_of,
    parse_script,
    sends_tuples,
    server_count,
    source_of,
)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens there
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)


def outcome(tmp_path: Path, text: str, *args: str) -> str:
    """The refusal; "": none."""
    script = tmp_path / "env.py"
    script.write_text(f"from datasets import load_dataset\n{text}\nif __name__ == '__main__':\n    MyEnv.cli()\n")
    settings = EnvironmentConfig(script=str(script), args=args, cwd=str(tmp_path))
    try:
        check_needs(sys.executable, (str(script),), settings, tmp_path, "env.script")
    except ConfigError as error:
        return str(error).removeprefix(f"env.script: {script} ")
    return ""


SETUP = "class MyEnv(BaseEnv):\n    async def setup(self):\n        "
OFFLINE = " (not in the cache of the Hugging Face Hub, and HF_HUB_OFFLINE is set)"
LACKS = f", which {sys.executable} has not: install what provides them, or set python"
TUPLES = """class MyEnv(BaseEnv):
    async def collect_trajectories(self, item):
        to_score = []
        for choice in await self.answers(item):
            to_score.append((choice, item))
        return to_score, []
    async def score(self, rollout_group_data): ...
"""
OPENS = "path = os.path.join(os.path.dirname(__file__), 'x.json')\n        "


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (SETUP + "self.train = load_dataset('gsm8k', 'main')", "data set gsm8k"),
        (
            f"class C(BaseEnvConfig):\n    data: str = Field(default='a/b')\n{SETUP}load_dataset(self.config.data)",
            "data set a/b",
        ),
        (
            f"class C(BaseEnvConfig):\n    data: str = Field(description='')\n{SETUP}load_dataset(self.config.data)",
            None,
        ),
        (SETUP + "AutoModel.from_pretrained('org/judge')", "model org/judge"),
        (f"from nltk.corpus import words\n{SETUP}words.words()", "NLTK corpus words"),
        (SETUP + "with open('data.csv') as file: pass", "file data.csv"),
        (SETUP + OPENS + "print(path)\n        json.load(open(path, mode='rb'))", "file /e/x.json"),
        (SETUP.replace("setup", "__init__") + "super().__init__()\n        " + OPENS + "open(path)", "file /e/x.json"),
        (SETUP + "self.rules = [Rule()]\n        " + OPENS + "open(path)", "file /e/x.json"),
        # What it may do without, or what may be there when it is read.
        (SETUP + OPENS + "Maker(path)\n        open(path)", None),
        (SETUP + OPENS + "if not os.path.exists(path):\n            make_it()\n        open(path)", None),
        ("class Judge:\n    def __init__(self):\n        load_dataset('gsm8k')", None),
        (SETUP + "if self.config.big:\n            load_dataset('gsm8k')", None),
        (SETUP + "if self.config.own:\n            return\n        load_dataset('gsm8k')", None),
        (SETUP + "try:\n            load_dataset('gsm8k')\n        except Exception:\n            pass", None),
        (SETUP + "load_dataset('json', data_files='a.json')", None),
        (SETUP + "load_dataset('a/b', cache_dir='/d')\n        AutoModel.from_pretrained('a/b', cache_dir='/d')", None),
        (f"from collections import load_dataset\n{SETUP}load_dataset('train')", None),
        (SETUP + "with contextlib.suppress(Exception):\n            load_dataset('a/b')", None),
        (f"from nltk.corpus import words\nnltk.data.path.append('/data')\n{SETUP}words.words()", None),
        (SETUP + "load_dataset(name_made_at_run_time())", None),
        (SETUP + "open('out.jsonl', 'w')", None),
    ],
)
def test_what_a_script_loads_in_every_case(text: str, found: str | None) -> None:
    source = f"from datasets import load_dataset\n{text}\nMyEnv.cli()\n".encode()
    needs = needs_of(parse_script(source, Path("/e/env.py")), (), Path("/e"))
    assert [f"{kind} {name}" for kind, name in needs] == ([] if found is None else [found])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SETUP + "load_dataset('a/b')\n        load_dataset('c/d')", f"needs the data set a/b, c/d{OFFLINE}"),
        (SETUP + "with open('data.csv') as file: pass", "needs the file data.csv (not there from {cwd})"),
        ("import no_such_module", f"imports no_such_module{LACKS}"),
        (
            TUPLES,
            "returns tuples from collect_trajectories where Atropos sends ScoredDataGroups, so no group would ever "
            "arrive: have it return what score() makes of them, or define postprocess_histories",
        ),
        ("from atroposlib.envs.base import BaseEnv, no_name", f"imports atroposlib.envs.base.no_name{LACKS}"),
        # All is there, may be there, or cannot be found out.
        ("import sys\nsys.path.insert(0, 'lib')\nimport no_such_module", ""),
        ("from atroposlib.envs.base import ScoredDataGroup\nfrom atroposlib.utils import tokenize_for_trainer", ""),
        ("text = " + " + ".join(["'a'"] * 3000), ""),
        ("def broken(:", ""),
    ],
    ids=["data sets", "file", "module", "tuples", "name of atroposlib", "path", "there", "too deep", "broken"],
)
def test_what_a_start_needs_is_named_before_it(tmp_path: Path, text: str, words: str) -> None:
    assert outcome(tmp_path, text) == words.replace("{cwd}", str(tmp_path))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return to_score", "return await self.score(to_score)"),
        ("score(self, rollout_group_data)", "postprocess_histories(self, trajectories)"),
        ("return", "to_score = await self.score(to_score)\n        return"),
        ("(choice, item)", "self.group_of(choice)"),
        ("BaseEnv", "OtherEnv"),
    ],
)
def test_only_tuples_that_are_sent_as_groups_are_refused(old: str, new: str) -> None:
    for text, is_refused in ((TUPLES, True), (TUPLES.replace(old, new), False)):
        assert sends_tuples(parse_script(f"{text}\nMyEnv.cli()".encode(), Path("env.py"))) == is_refused


def test_what_is_in_the_cache_or_chosen_by_an_argument_is_not_missing(tmp_path: Path) -> None:
    text = f"class C:\n    name: str = 'openai/gsm8k'\n{SETUP}load_dataset(self.config.name)"
    assert "openai/gsm8k" in outcome(tmp_path, text)
    assert "data set of/mine" in outcome(tmp_path, text, "--env.name", "of/mine")
    assert outcome(tmp_path, text, "--config", "mine.yaml") == "", "it may name another"
    (tmp_path / "hf" / "datasets" / "openai___gsm8k").mkdir(parents=True)
    assert outcome(tmp_path, text) == ""


def test_a_data_set_that_can_be_downloaded_is_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    app = Starlette()
    with ServerThread(app, service="hub", advice="", host="127.0.0.1", port=0) as hub:  # answers 404
        monkeypatch.setenv("HF_ENDPOINT", url := hub.url)
        assert outcome(tmp_path, SETUP + "load_dataset('a/b')") == ""
    assert outcome(tmp_path, SETUP + "load_dataset('a/b')").startswith(
        f"needs the data set a/b (not in the cache of the Hugging Face Hub, and {url} cannot be reached: "
    )
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    assert outcome(tmp_path, SETUP + "load_dataset('a/b')") == "", "urllib has no SOCKS; others may reach it"


def test_modules_are_looked_for_where_the_environment_finds_them(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "mine.py").write_text("import its_neighbour")
    (tmp_path / "src" / "its_neighbour.py").write_text("")
    (tmp_path / "link.py").symlink_to(tmp_path / "src" / "mine.py")
    settings = EnvironmentConfig(module="mine", cwd=str(tmp_path), env={"PYTHONPATH": "src"})
    check_needs(sys.executable, ("-m", "mine"), settings, tmp_path, "env.module")
    link = str(tmp_path / "link.py")
    check_needs(sys.executable, (link,), EnvironmentConfig(script=link), tmp_path, "env.script")


SCRIPT = """
class Env(BaseEnv):
    @classmethod
    def config_init(cls):
        {before}
        return {value}
"""


@pytest.mark.parametrize(
    ("before", "value", "count"),
    [
        ("config = 1", "config, [APIServerConfig(model_name='m')]", 1),
        ("servers = [base.APIServerConfig()]", "config, servers", 1),
        ("servers: object = [APIServerConfig(), APIServerConfig()]", "(config, servers)", 2),
        ("servers = APIServerConfig(model_name='m')", "config, servers", 0),
        # Not known: made by a call, changed after it was made, different on two ways.
        ("config = 1", "make()", None),
        ("config = 1", "config, [APIServerConfig()] * 2", None),
        ("config = 1", "config, [*more, APIServerConfig()]", None),
        ("servers = [APIServerConfig()]; servers.append(other)", "config, servers", None),
        ("servers = [APIServerConfig()]; servers += [other]", "config, servers", None),
        ("if big: return config, [APIServerConfig(), APIServerConfig()]", "config, [APIServerConfig()]", None),
        ("text = " + " + ".join(["'a'"] * 3000), "config, [APIServerConfig()]", None),  # too deep to be read
    ],
)
def test_the_servers_of_a_script_are_counted(before: str, value: str, count: int | None) -> None:
    assert server_count(SCRIPT.format(before=before, value=value).encode()) == count


def test_a_module_is_found_by_its_directory_and_by_pythonpath(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "env.py").write_text("x")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    found = [
        source_of(("-m", "pkg.env"), EnvironmentConfig(module="pkg.env", **where))
        for where in ({"cwd": str(tmp_path)}, {"env": {"PYTHONPATH": f"/nowhere:{tmp_path}"}}, {})
    ]
    assert found == [b"x", b"x", b""]
