"""What a script says of itself, and what is missing for it: modules, data sets, files."""

import sys
from pathlib import Path

import pytest
from starlette.applications import Starlette

from atropos_verl.config.launch_schema import EnvironmentConfig
from atropos_verl.errors import ConfigError
from atropos_verl.http_thread import ServerThread
from atropos_verl.launch import environment_script
from atropos_verl.launch.environment_script import check_needs, parse_script, server_count, source_of

Patch = pytest.MonkeyPatch
SETTING = "class C(BaseEnvConfig):\n    data: str = "
OPENS = "path = os.path.join(os.path.dirname(__file__), 'x.json'); "
LOADS = "load_dataset('a/b')"
DEEP = "text = " + " + ".join(["'a'"] * 3000)


def script(body: str, before: str = "", setup: str = "async def setup(self)") -> str:
    """An environment whose ``setup`` is ``body``: its line ends are those of the method."""
    body = body.replace("\n", "\n        ")
    own = f"class MyEnv(BaseEnv):\n    {setup}:\n        {body}\nMyEnv.cli()\n"
    return f"from datasets import load_dataset\n{before}\n{own}"


def test_what_a_script_loads_in_every_case() -> None:
    cases = {
        script("self.train = load_dataset('gsm8k', 'main')"): "data set gsm8k",
        script("load_dataset(self.config.data)", SETTING + "Field(default='a/b')"): "data set a/b",
        script("AutoModel.from_pretrained('org/judge')"): "model org/judge",
        script("words.words()", "from nltk.corpus import words"): "NLTK corpus words",
        script("with open('data.csv') as file: pass"): "file data.csv",
        script(OPENS + "print(path); json.load(open(path, mode='rb'))"): "file /e/x.json",
        script("super().__init__(); " + OPENS + "open(path)", setup="def __init__(self)"): "file /e/x.json",
        script("self.rules = [Rule()]; " + OPENS + "open(path)"): "file /e/x.json",
    }
    may_do_without = [  # or it may be there when it is read
        script("load_dataset(self.config.data)", SETTING + "Field(description='')"),
        script(OPENS + "Maker(path); open(path)"),
        script(OPENS + "\nif not os.path.exists(path):\n    make_it()\nopen(path)"),
        script("pass", f"class Judge:\n    def __init__(self):\n        {LOADS}"),
        script(f"if self.config.big:\n    {LOADS}"),
        script(f"if self.config.own:\n    return\n{LOADS}"),
        script(f"try:\n    {LOADS}\nexcept Exception:\n    pass"),
        script("load_dataset('json', data_files='a.json')"),
        script("load_dataset('a/b', cache_dir='/d'); AutoModel.from_pretrained('a/b', cache_dir='/d')"),
        script("load_dataset('train')", "from collections import load_dataset"),
        script(f"with contextlib.suppress(Exception):\n    {LOADS}"),
        script("words.words()", "from nltk.corpus import words\nnltk.data.path.append('/data')"),
        script("load_dataset(name_made_at_run_time())"),
        script("open('out.jsonl', 'w')"),
    ]
    for text in (*cases, *may_do_without):
        needs = environment_script.needs_of(parse_script(text.encode(), Path("/e/env.py")), (), Path("/e"))
        assert [f"{kind} {name}" for kind, name in needs] == ([cases[text]] if text in cases else []), text


TUPLES = script(
    "to_score = []\nfor choice in await self.answers(item):\n    to_score.append((choice, item))\nreturn to_score, []",
    setup="async def score(self, groups): ...\n    async def collect_trajectories(self, item)",
)


def test_only_tuples_that_are_sent_as_groups_are_refused() -> None:
    others = {
        "return to_score": "return await self.score(to_score)",
        "score(self, groups)": "postprocess_histories(self, trajectories)",
        "return": "to_score = await self.score(to_score)\n        return",
        "(choice, item)": "self.group_of(choice)",
        "BaseEnv": "OtherEnv",
    }
    texts = [TUPLES, *(TUPLES.replace(*change) for change in others.items())]
    found = [environment_script.sends_tuples(parse_script(text.encode(), Path("env.py"))) for text in texts]
    assert found == [True, False, False, False, False, False]


def test_the_servers_of_a_script_are_counted() -> None:
    counts = {
        "return config, [APIServerConfig(model_name='m')]": 1,
        "servers = [base.APIServerConfig()]; return config, servers": 1,
        "servers: object = [APIServerConfig(), APIServerConfig()]; return (config, servers)": 2,
        "servers = APIServerConfig(model_name='m'); return config, servers": 0,
        # Not known: made by a call, changed after it was made, different on two ways, too deep to be read.
        "return make()": None,
        "return config, [APIServerConfig()] * 2": None,
        "return config, [*more, APIServerConfig()]": None,
        "servers = [APIServerConfig()]; servers.append(other); return config, servers": None,
        "servers = [APIServerConfig()]; servers += [other]; return config, servers": None,
        "if big: return config, [APIServerConfig(), APIServerConfig()]\nreturn config, [APIServerConfig()]": None,
        f"{DEEP}; return config, [APIServerConfig()]": None,
    }
    made = "@classmethod\n    def config_init(cls)"
    assert {body: server_count(script(body, setup=made).encode()) for body in counts} == counts


def test_a_module_is_found_by_its_directory_and_by_pythonpath(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "env.py").write_text("x")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    places = ({"cwd": str(tmp_path)}, {"env": {"PYTHONPATH": f"/nowhere:{tmp_path}"}}, {})
    found = [source_of(("-m", "pkg.env"), EnvironmentConfig(module="pkg.env", **where)) for where in places]
    assert found == [b"x", b"x", b""]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens there
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)


def outcome(tmp_path: Path, text: str, *args: str) -> str:
    """The refusal; "": none."""
    path = tmp_path / "env.py"
    path.write_text(text)
    settings = EnvironmentConfig(script=str(path), args=args, cwd=str(tmp_path))
    try:
        check_needs(sys.executable, (str(path),), settings, tmp_path, "env.script")
    except ConfigError as error:
        return str(error).removeprefix(f"env.script: {path} ")
    return ""


LACKS = f", which {sys.executable} has not: install what provides them, or set python"
IMPORTS = "from atroposlib.envs.base import"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            script(f"{LOADS}; load_dataset('c/d')"),
            "needs the data set a/b, c/d (not in the cache of the Hugging Face Hub, and HF_HUB_OFFLINE is set)",
        ),
        (script("with open('data.csv') as file: pass"), "needs the file data.csv (not there from {cwd})"),
        ("import no_such_module", f"imports no_such_module{LACKS}"),
        (
            TUPLES,
            "returns tuples from collect_trajectories where Atropos sends ScoredDataGroups, so no group would ever "
            "arrive: have it return what score() makes of them, or define postprocess_histories",
        ),
        (f"{IMPORTS} BaseEnv, no_name", f"imports atroposlib.envs.base.no_name{LACKS}"),
        # All is there, may be there, or cannot be found out.
        ("import sys\nsys.path.insert(0, 'lib')\nimport no_such_module", ""),
        (f"{IMPORTS} ScoredDataGroup\nfrom atroposlib.utils import tokenize_for_trainer", ""),
        (DEEP, ""),
        ("def broken(:", ""),
    ],
    ids=["data sets", "file", "module", "tuples", "name of atroposlib", "path", "there", "too deep", "broken"],
)
def test_what_a_start_needs_is_named_before_it(tmp_path: Path, text: str, words: str) -> None:
    assert outcome(tmp_path, text) == words.replace("{cwd}", str(tmp_path))


def test_what_is_in_the_cache_or_chosen_is_not_missing(tmp_path: Path) -> None:
    text = script("load_dataset(self.config.data)", SETTING + "'openai/gsm8k'")
    assert "openai/gsm8k" in outcome(tmp_path, text)
    assert "data set of/mine" in outcome(tmp_path, text, "--env.data", "of/mine")
    assert outcome(tmp_path, text, "--config", "mine.yaml") == "", "it may name another"
    (tmp_path / "hf" / "datasets" / "openai___gsm8k").mkdir(parents=True)
    assert outcome(tmp_path, text) == ""


def test_a_data_set_that_can_be_downloaded_is_not_missing(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ServerThread(Starlette(), service="hub", advice="", host="127.0.0.1", port=0) as hub:  # answers 404
        monkeypatch.setenv("HF_ENDPOINT", url := hub.url)
        assert outcome(tmp_path, script(LOADS)) == ""
    assert outcome(tmp_path, script(LOADS)).startswith(
        f"needs the data set a/b (not in the cache of the Hugging Face Hub, and {url} cannot be reached: "
    )
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    assert outcome(tmp_path, script(LOADS)) == "", "urllib has no SOCKS; others may reach it"


def test_modules_are_looked_for_where_the_environment_finds_them(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "mine.py").write_text("import its_neighbour")
    (tmp_path / "src" / "its_neighbour.py").touch()
    (tmp_path / "link.py").symlink_to(tmp_path / "src" / "mine.py")
    settings = EnvironmentConfig(module="mine", cwd=str(tmp_path), env={"PYTHONPATH": "src"})
    check_needs(sys.executable, ("-m", "mine"), settings, tmp_path, "env.module")
    link = str(tmp_path / "link.py")
    check_needs(sys.executable, (link,), EnvironmentConfig(script=link), tmp_path, "env.script")
