"""What an environment's script says of itself, and what its interpreter and this machine lack for it. It is not run."""

import ast
import contextlib
import gc
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from atropos_verl.config.launch_schema import EnvironmentConfig
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError

_SERVER = re.compile(r"([\w.]+\.)?(APIServerConfig|ServerBaseline)")
_CHANGES_LIST = re.compile(r"\.(append|extend|insert)\(|\+=")
_RAISES = re.compile(r"^\s*raise\b", re.MULTILINE)
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


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
    """Raises ``SyntaxError`` or ``ValueError``. Nothing is collected meanwhile: CPython 3.11 counts the depth of
    ``ast.parse`` once per interpreter, and a finaliser that logs a traceback parses too (``SystemError``)."""
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
    """The source of an environment; b"": not found."""
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
    """The number of servers in the literal list that ``config_init`` returns; 0: it returns no list; None: not known.

    With a list of one, Atropos takes ``--openai`` arguments; with more it exits; without a list it ignores them and
    asks localhost:9004-9007 for ever.
    """
    try:
        tree = parse_script(source, Path("environment"))
        functions = [node for node in ast.walk(tree) if isinstance(node, _FUNCTION) and node.name == "config_init"]
        if len(functions) != 1 or _CHANGES_LIST.search(ast.unparse(functions[0])):
            return None
    except (SyntaxError, ValueError, RecursionError):
        return None
    nodes, assigned = list(ast.walk(functions[0])), defaultdict[str, list[ast.expr | None]](list)
    for node in nodes:
        for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
            assigned[getattr(target, "id", "")].append(getattr(node, "value", None))

    def followed(value: ast.expr | None) -> ast.expr | None:
        while isinstance(value, ast.Name):
            values = assigned.pop(value.id, [])  # once: no circle
            value = values[0] if len(values) == 1 else None
        return value

    returned = [node.value for node in nodes if isinstance(node, ast.Return)]
    value = followed(returned[0]) if len(returned) == 1 else None
    if isinstance(value, ast.Tuple) and len(value.elts) == 2:  # settings, servers
        value = followed(value.elts[1])
    if isinstance(value, ast.List) and not any(isinstance(item, ast.Starred) for item in value.elts):
        return len(value.elts)
    return 0 if isinstance(value, ast.Call) and _SERVER.fullmatch(ast.unparse(value.func)) else None


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


class Needs(ast.NodeVisitor):
    """What a script loads in every case when it starts: at its top, in ``__init__`` and ``setup`` of the class whose
    ``.cli()`` it calls; not under a condition, in a loop, or where a failure is caught. Values are literal, or settings
    with a literal default."""

    def __init__(self, tree: ast.Module, args: Sequence[str], place: Path) -> None:
        self.found: dict[tuple[str, str], None] = {}
        """(kind, name), in order."""
        text, nodes = ast.unparse(tree), list(ast.walk(tree))
        self.sends_no_group = False
        """Atropos's own code fails on what ``collect_trajectories`` returns."""
        self._args, self._place = args, place
        self._classes = re.findall(r"\b(\w+)\.cli\(", text)
        self._makes_files = False
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        self._modules = {alias.name: node.module for node in imports for alias in node.names}
        if "nltk.data.path" in text:  # its corpora are elsewhere
            self._modules = {name: module for name, module in self._modules.items() if module != "nltk.corpus"}
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
            own = {part.name: part for part in node.body if isinstance(part, _FUNCTION)}
            for method in (method for name, method in own.items() if name in ("__init__", "setup")):
                for statement in method.body:
                    self.visit(statement)
                    if any(isinstance(part, ast.Return) for part in ast.walk(statement)):
                        break
            sends_it = [ast.unparse(base) for base in node.bases] == ["BaseEnv"] and "postprocess_histories" not in own
            if "collect_trajectories" in own and sends_it:
                self.sends_no_group = _returns_a_list_of_tuples(own["collect_trajectories"])

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, _FUNCTION | ast.Lambda):
            return
        is_caught = isinstance(node, ast.Try) and not all(
            _RAISES.search(ast.unparse(handler)) for handler in node.handlers
        )
        if isinstance(node, ast.With | ast.AsyncWith):
            is_caught = any("suppress(" in ast.unparse(item.context_expr) for item in node.items)
        if is_caught or isinstance(node, _ONLY_SOMETIMES):
            self._makes_files |= any(map(_may_make_files, ast.walk(node)))
            return
        if isinstance(node, ast.Call):
            self._call(ast.unparse(node.func), node.args, {item.arg: item.value for item in node.keywords})
        super().visit(node)
        self._makes_files |= _may_make_files(node)  # after what is in its arguments

    def _call(self, function: str, args: list[ast.expr], named: dict[str | None, ast.expr]) -> None:
        owner, _, last = function.rpartition(".")
        path = args[0] if args else named.get("path", named.get("name"))
        mode = args[1] if len(args) > 1 else named.get("mode", ast.Constant("r"))
        is_elsewhere = len(args) > 2 or not _ELSEWHERE.isdisjoint(named)
        if last == "load_dataset" and (owner or self._modules.get(last)) == "datasets" and not is_elsewhere:
            self._add("data set", self._text(path))
        elif last == "from_pretrained" and isinstance(path, ast.Constant) and not is_elsewhere:
            self._add("model", self._text(path))
        elif self._modules.get(owner) == "nltk.corpus":
            self._add("NLTK corpus", owner)
        elif function == "open" and str(getattr(mode, "value", "")).startswith("r") and not self._makes_files:
            self._add("file", self._text(path))

    def _text(self, value: ast.expr | None, depth: int = 3) -> str | None:
        if isinstance(value, ast.Constant):
            return value.value if isinstance(value.value, str) else None
        if isinstance(value, ast.Call):
            function, named = ast.unparse(value.func), {item.arg: item.value for item in value.keywords}
            if ast.unparse(value) in _OWN_DIRECTORY:
                return str(self._place)
            if function == "Field":
                return self._text(value.args[0] if value.args else named.get("default"), depth)
            parts = [part for item in value.args if (part := self._text(item, depth - 1))]
            is_whole = function == "os.path.join" and len(parts) == len(value.args)
            return str(Path(*parts)) if is_whole else None
        name = getattr(value, "attr", getattr(value, "id", None))
        if name is None or depth <= 0 or "--config" in self._args:
            return None
        found = {self._text(item, depth - 1) for item in self._values[name]}
        return option_value(self._args, f"--env.{name}") or (found.pop() if len(found) == 1 else None)

    def _add(self, kind: str, name: str | None) -> None:
        if name and "://" not in name:
            self.found[kind, name] = None


def _may_make_files(node: ast.AST) -> bool:
    """A call, but not of what is known to make none, nor of a constructor that gets nothing, so no path."""
    if not isinstance(node, ast.Call):
        return False
    name = ast.unparse(node.func)
    is_bare = name.rpartition(".")[2][0].isupper() and not node.args and not node.keywords
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


_LOOK = r"""
import functools, importlib.util, json, os, re, ssl, sys, urllib.error, urllib.request
from pathlib import Path
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
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except Exception as error:
        why = getattr(error, "reason", error)
        # Other libraries can use a proxy, or have a certificate, where urllib does not.
        known = "all" not in urllib.request.getproxies() and not isinstance(why, ssl.SSLError)
        return f"{url} cannot be reached: {why}" if known else None
def plain(name):
    return re.sub("[^a-z0-9]", "", name.lower())
def obstacle(kind, name):
    if kind == "file":
        return None if Path(asked["cwd"], name).exists() else "not there from " + asked["cwd"]
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
unmet = {}
for kind, name in asked["needs"]:
    if why := obstacle(kind, name):
        unmet.setdefault(kind, (why, []))[1].append(name)
sys.path.insert(0, asked["place"])
print(json.dumps({"lacking": [name for name in asked["modules"] if not there(name)], "unmet": unmet}))
"""
"""Runs in the environment's interpreter, directory and variables. The addresses are those of the libraries."""


def check_needs(python: str, program: Sequence[str], settings: EnvironmentConfig, run_dir: Path, key: str) -> None:
    """Raises ``ConfigError`` for what an environment cannot start without: modules, data sets, models, corpora, files.
    What cannot be found out is passed over."""
    lacking = []
    with contextlib.suppress(SyntaxError, OSError, ValueError, RecursionError, subprocess.TimeoutExpired):
        lacking = _lacking(python, program, settings, run_dir)
    if lacking:
        raise ConfigError(f"{program[-1]} {'; '.join(lacking)}", key)


def _lacking(python: str, program: Sequence[str], settings: EnvironmentConfig, run_dir: Path) -> list[str]:
    """Clauses that begin with a verb."""
    source, cwd = source_of(program, settings), Path(settings.cwd or run_dir).expanduser()
    script = script_of(program, settings) or Path(program[-1])
    tree = parse_script(source, script)
    place, modules = str(script.resolve().parent), imported_modules(tree)
    if settings.module is not None:
        place, modules = str(cwd.absolute()), [*modules, settings.module.split(".")[0]]
    if b"sys.path" in source:
        modules = [name for name in modules if name.startswith("atroposlib")]  # others may come from anywhere
    needs = Needs(tree, settings.args, script.parent.absolute())
    asked = {"place": place, "modules": modules, "needs": list(needs.found), "cwd": str(cwd.absolute())}
    command, variables = [python, "-c", _LOOK, json.dumps(asked)], {**os.environ, **import_path(), **settings.env}
    options: dict[str, Any] = {"env": variables, "cwd": cwd if cwd.is_dir() else None}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=20.0, **options)
    seen: dict[str, Any] = json.loads(answer.stdout)
    names = ", ".join(name.replace(":", ".") for name in seen["lacking"])
    refused = [f"imports {names}, which {python} has not: install what provides them, or set python"] if names else []
    if needs.sends_no_group:
        text = "returns tuples from collect_trajectories where Atropos sends ScoredDataGroups, so no group would ever"
        refused.append(f"{text} arrive: have it return what score() makes of them, or define postprocess_histories")
    unmet = (f"needs the {kind} {', '.join(names)} ({why})" for kind, (why, names) in seen["unmet"].items())
    return [*refused, *unmet]
