"""What an environment's script says of itself, and what its interpreter and this machine lack for it. It is not run."""

import ast
import gc
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from atropos_verl.config.launch_schema import EnvironmentConfig
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError

_BARE = ("APIServerConfig", "ServerBaseline")


def option_value(args: Sequence[str], option: str) -> str | None:
    """The value of ``option`` in ``--option value`` or ``--option=value`` form; None: it is not given."""
    for index, word in enumerate(args):
        if word.startswith(f"{option}="):
            return word.split("=", 1)[1]
        if word == option and index + 1 < len(args):
            return args[index + 1]
    return None


def import_path() -> dict[str, str]:
    """PYTHONPATH with its entries made absolute: the children run in another directory."""
    entries = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if all(Path(entry).is_absolute() for entry in entries):
        return {}
    return {"PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in entries)}


def parse_script(source: bytes, script: Path) -> ast.Module:
    """Parses ``source`` while nothing is collected. Raises ``SyntaxError`` or ``ValueError``.

    CPython 3.11 counts the depth of ``ast.parse`` once per interpreter. A finaliser that logs a traceback parses too;
    the outer call then raises ``SystemError`` (AST constructor recursion depth mismatch).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source, str(script))
    finally:
        if was_enabled:
            gc.enable()


def script_of(program: Sequence[str], settings: EnvironmentConfig) -> Path | None:
    """The file of an environment, a module's by its directory and PYTHONPATH; None: not found."""
    paths = [Path(program[-1])]
    if settings.module is not None:
        entries = settings.env.get("PYTHONPATH", os.environ.get("PYTHONPATH", "")).split(os.pathsep)
        name = Path(*settings.module.split(".")).with_suffix(".py")
        paths = [Path(entry, name) for entry in (settings.cwd or ".", *entries)]
    return next((path for path in paths if path.is_file()), None)


def source_of(program: Sequence[str], settings: EnvironmentConfig) -> bytes:
    """The source of an environment; b"": not found. Nothing is run."""
    script = script_of(program, settings)
    return b"" if script is None else script.read_bytes()


def notes_of(config: RunConfig, settings: EnvironmentConfig, program: Sequence[str]) -> list[str]:
    """What is likely to keep an environment from working, before it is started."""
    source, notes = source_of(program, settings), []
    if source and b".cli(" not in source and b"env_manager" not in source:
        notes.append(f"{program[-1]} calls no .cli(): Atropos environments end with MyEnv.cli(), or start nothing")
    if settings.module is None and re.search(rb"^from \.", source, re.MULTILINE):
        notes.append(
            f"{program[-1]} imports from its own package: start it as a module, with PYTHONPATH (module=a.b.c)"
        )
    if settings.python is None and b"tokenize_for_trainer" in source and metadata.version("transformers") >= "5":
        notes.append("its tokenize_for_trainer needs transformers 4, and this interpreter has 5: set its python")
    url = option_value(settings.args, "--openai.base_url")
    if url and url.rstrip("/") != f"{config.gateway.advertise_url}/v1":
        notes.append(
            f"its arguments send it to {url}, not to the gateway of this run: what it samples is not the policy's"
        )
    return notes


def server_count(source: bytes) -> int | None:
    """The number of servers in the list that ``config_init`` returns; 0: it returns no list; None: not known.

    With a list of one, Atropos takes ``--openai`` arguments; with more it exits; without a list it ignores them and
    asks localhost:9004-9007 for ever. Followed are literal lists and names that are assigned once in the same function.
    """
    try:
        tree = parse_script(source, Path("environment"))
    except (SyntaxError, ValueError):
        return None
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    found = [_returned_servers(list(ast.walk(item))) for item in functions if item.name == "config_init"]
    return found[0] if len(found) == 1 else None


def _returned_servers(nodes: Sequence[ast.AST]) -> int | None:
    assigned: dict[str, list[ast.expr | None]] = defaultdict(list)
    for node in nodes:
        changed, value = [], getattr(node, "value", None)
        if isinstance(node, ast.Assign):
            changed = node.targets
        elif isinstance(node, ast.AnnAssign | ast.AugAssign):
            changed, value = [node.target], value if isinstance(node, ast.AnnAssign) else None
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            changed, value = [node.func.value], None  # append, extend, ...
        for target in changed:
            if isinstance(target, ast.Name):
                assigned[target.id].append(value)

    def count(value: ast.expr | None, depth: int = 2) -> int | None:
        if isinstance(value, ast.Name):
            values = assigned.pop(value.id, [])  # followed once: no circle
            return count(values[0], depth) if len(values) == 1 else None
        if isinstance(value, ast.Tuple) and depth == 2:  # what is returned: settings, servers
            return count(value.elts[-1], 1) if len(value.elts) == 2 else None
        if isinstance(value, ast.List) and not any(isinstance(item, ast.Starred) for item in value.elts):
            return len(value.elts)
        is_bare = isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in _BARE
        return 0 if is_bare else None

    counts = {count(node.value) for node in nodes if isinstance(node, ast.Return)}
    return counts.pop() if len(counts) == 1 else None


def imported_modules(tree: ast.Module) -> list[str]:
    """Lists the modules that a script imports when it is loaded, without the standard library's; of atroposlib, which
    is pinned, also the names: ``atroposlib.utils.x:name``.

    Imports inside functions and under ``try`` may be optional and are not counted.
    """
    found: dict[str, None] = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= dict.fromkeys(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            first = node.module.split(".")[0]
            names = [f"{node.module}:{alias.name}" for alias in node.names] if first == "atroposlib" else []
            found |= dict.fromkeys([first, *names])
    return [name for name in found if name not in sys.stdlib_module_names]


_OWN_DIRECTORY = ("os.path.dirname(os.path.abspath(__file__))", "os.path.dirname(__file__)")
_HARMLESS = r"print|info|warning|error|join|dirname|abspath|exists|from_pretrained|Field|super|__init__|list|\w+Error"
_MAKES_NO_FILE = re.compile(rf"(super\(\)\.|\w+\.)*({_HARMLESS})")
_ONLY_SOMETIMES = ast.If | ast.IfExp | ast.For | ast.AsyncFor | ast.While | ast.BoolOp | ast.Match
_ELSEWHERE = {"data_files", "data_dir", "cache_dir", None}
"""Arguments that say where something is; None: ``**arguments``."""


class _Needs(ast.NodeVisitor):
    """What a script loads in every case when it starts: at its top, in ``__init__`` and ``setup`` of the class whose
    ``.cli()`` it calls; not under a condition, in a loop, or where a failure is caught. Values are literal, or settings
    with a literal default."""

    def __init__(self, tree: ast.Module, args: Sequence[str], place: Path) -> None:
        self.needs: dict[tuple[str, str], bool] = {}
        """(kind, name) → whether nothing works without it. A file may be made by what the script calls before."""
        text = ast.unparse(tree)
        self.sends_no_group = False
        """Atropos's own code fails on what ``collect_trajectories`` returns."""
        self._args, self._place = args, place
        self._classes = re.findall(r"\b(\w+)\.cli\(", text)
        self._has_no_gpu_too = "is_available" in text
        self._makes_files = False
        nodes = list(ast.walk(tree))
        corpora = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "nltk.corpus"]
        has_own_place = "nltk.data.path" in text
        self._corpora = {alias.name for node in corpora if not has_own_place for alias in node.names}
        others = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module != "datasets"]
        own = [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        self._is_own_loader = "load_dataset" in {*own, *(alias.name for node in others for alias in node.names)}
        self._values: defaultdict[str, list[ast.expr]] = defaultdict(list)
        for node in nodes:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [getattr(target, "id", getattr(target, "attr", None)) for target in targets]
            for name in [node.arg] if isinstance(node, ast.keyword) else names:
                if name and isinstance(value := getattr(node, "value", None), ast.expr):
                    self._values[name].append(value)
        self.visit(tree)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:  # ast's name
        if node.name in self._classes:
            own = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)}
            for part in (part for name, part in own.items() if name in ("__init__", "setup")):
                self._visit_until_return(part.body)
            is_sent_as_it_is = [ast.unparse(base) for base in node.bases] == ["BaseEnv"]
            is_sent_as_it_is &= "postprocess_histories" not in own
            if "collect_trajectories" in own and is_sent_as_it_is:
                self.sends_no_group = _returns_a_list_of_tuples(own["collect_trajectories"])

    def _visit_until_return(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            self.visit(statement)
            if any(isinstance(part, ast.Return) for part in ast.walk(statement)):
                return

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        is_caught = isinstance(node, ast.Try) and not all(map(_raises, node.handlers))
        if isinstance(node, ast.With | ast.AsyncWith):
            is_caught = any("suppress(" in ast.unparse(item.context_expr) for item in node.items)
        if is_caught or isinstance(node, _ONLY_SOMETIMES):
            calls = [part for part in ast.walk(node) if isinstance(part, ast.Call)]
            self._makes_files |= any(map(_may_make_files, calls))
            return
        if isinstance(node, ast.Call):
            self._call(ast.unparse(node.func), node.args, {item.arg: item.value for item in node.keywords})
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.ctx, ast.Load)
            and ast.unparse(node.value) == "os.environ"
        ):
            self._add("environment variable", self._text(node.slice), certain=False)
        super().visit(node)
        self._makes_files |= isinstance(node, ast.Call) and _may_make_files(node)  # after what is in its arguments

    def _call(self, function: str, args: list[ast.expr], named: dict[str | None, ast.expr]) -> None:
        owner, _, last = function.rpartition(".")
        path = args[0] if args else named.get("path", named.get("name"))
        mode = args[1] if len(args) > 1 else named.get("mode", ast.Constant("r"))
        is_hub = function == "datasets.load_dataset" or (function == "load_dataset" and not self._is_own_loader)
        if is_hub and len(args) < 3 and not _ELSEWHERE & named.keys():
            self._add("data set", self._text(path))
        elif last == "from_pretrained" and isinstance(path, ast.Constant) and not _ELSEWHERE & named.keys():
            self._add("model", self._text(path))
        elif owner in self._corpora:
            self._add("NLTK corpus", owner)
        elif function == "open" and str(getattr(mode, "value", "")).startswith("r"):
            self._add("file", self._text(path), certain=not self._makes_files)
        elif last in ("OpenAI", "AsyncOpenAI") and not {"base_url", "api_key", None} & named.keys():
            self._add("environment variable", "OPENAI_API_KEY", certain=False)
        devices = [value.value for value in (*args, *named.values()) if isinstance(value, ast.Constant)]
        if not self._has_no_gpu_too and any(str(value).split(":")[0] == "cuda" for value in devices):
            self._add("device", "cuda", certain=False)

    def _text(self, value: ast.expr | None, depth: int = 3) -> str | None:
        if isinstance(value, ast.Constant):
            return value.value if isinstance(value.value, str) else None
        if isinstance(value, ast.Call) and ast.unparse(value) in _OWN_DIRECTORY:
            return str(self._place)
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "os.path.join":
            parts = [part for item in value.args if (part := self._text(item, depth - 1))]
            return str(Path(*parts)) if len(parts) == len(value.args) else None
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
            named = {item.arg: item.value for item in value.keywords}
            return self._text(value.args[0] if value.args else named.get("default"), depth)
        name = getattr(value, "attr", getattr(value, "id", None))
        if name is None or depth <= 0 or "--config" in self._args:
            return None
        found = {self._text(item, depth - 1) for item in self._values[name]}
        return option_value(self._args, f"--env.{name}") or (found.pop() if len(found) == 1 else None)

    def _add(self, kind: str, name: str | None, *, certain: bool = True) -> None:
        if name and "://" not in name:
            self.needs[kind, name] = certain


def _may_make_files(call: ast.Call) -> bool:
    """Not what is known to make none, and no constructor that gets nothing, so no path."""
    name = ast.unparse(call.func)
    is_bare = name.rpartition(".")[2][0].isupper() and not call.args and not call.keywords
    return not is_bare and _MAKES_NO_FILE.fullmatch(name) is None


def _returns_a_list_of_tuples(function: ast.AST) -> bool:
    """Whether what it returns first is a list to which it appends tuples and nothing else."""
    nodes = list(ast.walk(function))
    returned = [node.value for node in nodes if isinstance(node, ast.Return)]
    names = {ast.unparse(value.elts[0]) if isinstance(value, ast.Tuple) and value.elts else "" for value in returned}
    name = min(names, default="")
    stored = [node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == f"{name}.append"]
    is_made_once = len(names) == 1 and sum(node.id == name for node in stored) == 1
    return is_made_once and {type(argument) for call in calls for argument in call.args} == {ast.Tuple}


def _raises(handler: ast.ExceptHandler) -> bool:
    return any(isinstance(node, ast.Raise) for node in ast.walk(handler))


_LOOK = r"""
import functools, importlib.util, json, os, re, ssl, sys, urllib.error, urllib.request
from importlib import metadata
from pathlib import Path
def version(name):
    return next((found.version for found in metadata.distributions(name=name)), None)
def there(module):
    module, _, name = module.partition(":")
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        return False
    if spec is None or not name or not spec.submodule_search_locations:
        return spec is not None
    file = Path(list(spec.submodule_search_locations)[0], *module.split(".")[1:])
    if file.is_dir():
        if any(file.glob(name + "*")):
            return True
        file = file / "__init__.py"
    file = file.with_suffix(".py")
    return file.is_file() and re.search(rf"\b({name}|import \*)(?!\w)", file.read_text(errors="replace")) is not None
@functools.cache
def unreachable(url):
    if "all" in urllib.request.getproxies():
        return None  # urllib does not use it, and others do
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except Exception as error:
        if isinstance(getattr(error, "reason", error), ssl.SSLError):
            return None  # it answers, and others may have its certificate
        return f"{url} cannot be reached: {getattr(error, 'reason', error)}"
def plain(name):
    return re.sub("[^a-z0-9]", "", name.lower())
def obstacle(kind, name):
    if kind == "file":
        return None if Path(asked["cwd"], name).exists() else "not there from " + asked["cwd"]
    if kind == "environment variable":
        return None if os.environ.get(name) else "not set"
    if kind == "device":
        return None if any(Path("/dev").glob("nvidia[0-9]*")) else "there is none"
    try:
        if kind == "NLTK corpus":
            import nltk
            found = [file for place in nltk.data.path for file in Path(place).glob(f"*/{name}*")]
            why = None if found else unreachable(nltk.downloader.Downloader.DEFAULT_URL)
            return why and "not on this machine, and " + why
        from huggingface_hub import constants
    except ImportError:
        return None
    caches = constants.HF_HUB_CACHE, os.environ.get("HF_DATASETS_CACHE") or constants.HF_HOME + "/datasets"
    caches += (os.environ.get("TRANSFORMERS_CACHE") or constants.HF_HUB_CACHE,)
    kept = [plain(found.name) for cache in map(Path, caches) if cache.is_dir() for found in cache.iterdir()]
    if Path(asked["cwd"], name).exists() or any(found.endswith(plain(name)) for found in kept):
        return None
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable(constants.ENDPOINT)
    return why and "not in the cache of the Hugging Face Hub, and " + why
asked = json.loads(sys.argv[1])
sys.path = [*filter(None, sys.path)]
unmet = [(kind, name, why, certain) for kind, name, certain in asked["needs"] if (why := obstacle(kind, name))]
sys.path.insert(0, asked["place"])
print(json.dumps({
    "python": sys.version.split()[0],
    "versions": {name: version(name) for name in ("atroposlib", "transformers")},
    "lacking": [name for name in asked["modules"] if not there(name)],
    "unmet": unmet,
}))
"""
"""Runs in the environment's interpreter, directory and variables. The addresses are those of the libraries."""


def look(python: str, program: Sequence[str], settings: EnvironmentConfig, run_dir: Path) -> dict[str, Any]:
    """What ``python`` has of what the script needs: ``python``, ``versions``, ``lacking`` (modules), ``unmet`` (kind,
    name, why, whether nothing works without it: data sets, files, variables, …), ``sends_no_group``.

    Raises ``SyntaxError``; ``OSError``, ``ValueError`` or ``subprocess.TimeoutExpired`` where it cannot be found out.
    """
    source, cwd = source_of(program, settings), Path(settings.cwd or run_dir).expanduser()
    script = script_of(program, settings) or Path(program[-1])
    tree = parse_script(source, script)
    place, modules = str(script.resolve().parent), imported_modules(tree)
    if settings.module is not None:
        place, modules = str(cwd.absolute()), [*modules, settings.module.split(".")[0]]
    if b"sys.path" in source:
        modules = [name for name in modules if name.startswith("atroposlib")]  # others may come from anywhere
    found = _Needs(tree, settings.args, script.parent.absolute())
    needs = [(*need, certain) for need, certain in found.needs.items()]
    asked = {"place": place, "modules": modules, "needs": needs, "cwd": str(cwd.absolute())}
    command, variables = [python, "-c", _LOOK, json.dumps(asked)], {**os.environ, **import_path(), **settings.env}
    options: dict[str, Any] = {"env": variables, "cwd": cwd if cwd.is_dir() else None}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=20.0, **options)
    return {**json.loads(answer.stdout), "sends_no_group": found.sends_no_group}


def check_needs(python: str, program: Sequence[str], settings: EnvironmentConfig, run_dir: Path, key: str) -> list[str]:
    """Says what an environment may lack. Raises ``ConfigError`` for what it cannot start without; what cannot be found
    out is passed over."""
    try:
        refused, notes = what_lacks(look(python, program, settings, run_dir), python)
    except (SyntaxError, OSError, ValueError, RecursionError, subprocess.TimeoutExpired):
        return []
    if refused:
        raise ConfigError(f"{program[-1]} {'; '.join(refused)}", key)
    return [f"{program[-1]} {note}" for note in notes]


def what_lacks(seen: Mapping[str, Any], python: str) -> tuple[list[str], list[str]]:
    """What ``look`` missed, as clauses that begin with a verb: what nothing works without, and what may be missed."""
    names = ", ".join(name.replace(":", ".") for name in seen["lacking"])
    refused = [f"imports {names}, which {python} has not: install what provides them, or set python"] if names else []
    if seen["sends_no_group"]:
        refused.append(
            "returns tuples from collect_trajectories where Atropos sends ScoredDataGroups, so no group would ever "
            "arrive: have it return what score() makes of them, or define postprocess_histories"
        )
    unmet: defaultdict[tuple[str, str, bool], list[str]] = defaultdict(list)
    for kind, name, why, certain in seen["unmet"]:
        unmet[kind, why, certain].append(name)
    refused += [f"needs the {kind} {', '.join(names)} ({why})" for (kind, why, sure), names in unmet.items() if sure]
    notes = [f"reads the {kind} {', '.join(names)} ({why})" for (kind, why, sure), names in unmet.items() if not sure]
    return refused, notes
