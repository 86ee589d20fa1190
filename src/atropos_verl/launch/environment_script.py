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
from collections.abc import Iterator, Sequence
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
        name = f"{settings.module.replace('.', '/')}.py"
        paths = [Path(entry, name) for entry in (settings.cwd or ".", *entries)]
    return next((path for path in paths if path.is_file()), None)


def source_of(program: Sequence[str], settings: EnvironmentConfig) -> bytes:
    """The source of an environment; b"": not found."""
    script = script_of(program, settings)
    return b"" if script is None else script.read_bytes()


def notes_of(config: RunConfig, settings: EnvironmentConfig, program: Sequence[str]) -> list[str]:
    source, notes = source_of(program, settings), []
    if source and b".cli(" not in source and b"env_manager" not in source:
        notes.append(f"{program[-1]} calls no .cli(): Atropos environments end with MyEnv.cli(), or start nothing")
    if settings.module is None and re.search(rb"^from \.", source, re.MULTILINE):
        text = "imports from its own package: start it as a module, with PYTHONPATH (module=a.b.c)"
        notes.append(f"{program[-1]} {text}")
    if settings.python is None and b"tokenize_for_trainer" in source and metadata.version("transformers") >= "5":
        notes.append("its tokenize_for_trainer needs transformers 4, and this interpreter has 5: set its python")
    url = option_value(settings.args, "--openai.base_url")
    if url and url.rstrip("/") != f"{config.gateway.advertise_url}/v1":
        text = "not to the gateway of this run: what it samples is not the policy's"
        notes.append(f"its arguments send it to {url}, {text}")
    return notes


def server_count(source: bytes) -> int | None:
    """The number of servers in the literal list that ``config_init`` returns; 0: it returns no list; None: not known.
    With a list of one, Atropos takes ``--openai`` arguments; with more it exits; without a list it ignores them and
    asks localhost:9004-9007 for ever."""
    try:
        tree = parse_script(source, Path("environment"))
        functions = [node for node in ast.walk(tree) if isinstance(node, _FUNCTION) and node.name == "config_init"]
        if len(functions) != 1 or _CHANGES_LIST.search(ast.unparse(functions[0])):
            return None
    except (SyntaxError, ValueError, RecursionError):
        return None
    nodes, assigned = list(ast.walk(functions[0])), defaultdict[str, list[ast.expr | None]](list)
    for node in nodes:
        for name in _names_set(node):
            assigned[name].append(getattr(node, "value", None))

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
    """The modules that a script imports in every case when it is loaded, without the standard library's; of atroposlib,
    which is pinned, also the names: ``atroposlib.utils.x:name``."""
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
_MAKES_NO_FILE = re.compile(rf"(super\(\)\.|\w+\.)*(({_HARMLESS})\(.*|[A-Z]\w*\(\))", re.DOTALL)
"""What is known to make none, and a constructor that gets nothing, so no path."""
_BRANCHES = ast.If | ast.IfExp | ast.For | ast.AsyncFor | ast.While | ast.BoolOp | ast.Match | ast.Lambda | ast.Try
_ELSEWHERE = {"data_files", "data_dir", "cache_dir", None}
"""Arguments that say where something is; None: ``**arguments``."""


def _own_classes(tree: ast.Module) -> list[tuple[ast.ClassDef, dict[str, ast.FunctionDef | ast.AsyncFunctionDef]]]:
    """The classes whose ``.cli()`` is called, with their methods."""
    called = re.findall(r"\b(\w+)\.cli\(", ast.unparse(tree))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in called]
    return [(node, {part.name: part for part in node.body if isinstance(part, _FUNCTION)}) for node in classes]


def _reached(body: Sequence[ast.stmt]) -> Iterator[tuple[ast.AST, bool]]:
    """What is run up to the first ``return``, and whether in every case: in no branch, loop, or caught error."""
    for node in body:
        if isinstance(node, ast.With | ast.AsyncWith) and "suppress(" not in ast.unparse(node).partition("\n")[0]:
            yield from ((item.context_expr, True) for item in node.items)
            yield from _reached(node.body)
        elif isinstance(node, ast.Try) and all(_RAISES.search(ast.unparse(part)) for part in node.handlers):
            yield from _reached(node.body)
        elif isinstance(node, _FUNCTION | ast.ClassDef):
            continue
        else:
            yield node, not any(isinstance(part, _BRANCHES | ast.With) for part in ast.walk(node))
        if any(isinstance(part, ast.Return) for part in ast.walk(node)):
            return


def needs_of(tree: ast.Module, args: Sequence[str], place: Path) -> list[tuple[str, str]]:
    """(kind, name) of what a script loads in every case when it starts: at its top, in ``__init__`` and ``setup`` of
    the class whose ``.cli()`` it calls. Values are literal, or settings with a literal default."""
    values, modules = defaultdict[str, list[ast.expr | None]](list), dict[str, str | None]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            modules |= {alias.name: node.module for alias in node.names}
        for name in [node.arg] if isinstance(node, ast.keyword) else _names_set(node):
            values[name or ""].append(getattr(node, "value", None))

    def text_of(value: ast.expr | None, depth: int = 3) -> str | None:
        if isinstance(value, ast.Constant):
            return value.value if isinstance(value.value, str) else None
        if isinstance(value, ast.Call):
            if ast.unparse(value) in _OWN_DIRECTORY:
                return str(place)
            if (function := ast.unparse(value.func)) == "Field":
                given = (*value.args, *(item.value for item in value.keywords if item.arg == "default"))
                return text_of(next(iter(given), None), depth)
            parts = [part for item in value.args if (part := text_of(item, depth - 1))]
            return str(Path(*parts)) if function == "os.path.join" and len(parts) == len(value.args) else None
        name = getattr(value, "attr", getattr(value, "id", None))
        if name is None or depth <= 0 or "--config" in args:
            return None
        found = {text_of(item, depth - 1) for item in values[name] if item is not None}
        return option_value(args, f"--env.{name}") or (found.pop() if len(found) == 1 else None)

    reached = list[tuple[ast.AST, bool]]()
    own = {node.name: methods for node, methods in _own_classes(tree)}
    for node in tree.body:
        methods = own.get(node.name, {}) if isinstance(node, ast.ClassDef) else {}
        for body in ([node], *(methods[name].body for name in ("__init__", "setup") if name in methods)):
            reached += _reached(body)
    found, makes_files = dict[tuple[str, str | None], None](), False
    for node, is_certain in reached:
        calls = [part for part in ast.walk(node) if isinstance(part, ast.Call)]
        for call in calls if is_certain else ():
            function, named = ast.unparse(call.func), {item.arg: item.value for item in call.keywords}
            owner, _, last = function.rpartition(".")
            path = call.args[0] if call.args else named.get("path", named.get("name"))
            mode = call.args[1] if len(call.args) > 1 else named.get("mode", ast.Constant("r"))
            is_elsewhere = len(call.args) > 2 or not _ELSEWHERE.isdisjoint(named)
            if last == "load_dataset" and (owner or modules.get(last)) == "datasets" and not is_elsewhere:
                found["data set", text_of(path)] = None
            elif last == "from_pretrained" and isinstance(path, ast.Constant) and not is_elsewhere:
                found["model", text_of(path)] = None
            elif modules.get(owner) == "nltk.corpus" and "nltk.data.path" not in ast.unparse(tree):
                found["NLTK corpus", owner] = None
            elif function == "open" and str(getattr(mode, "value", "")).startswith("r") and not makes_files:
                found["file", text_of(path)] = None
        makes_files |= not all(_MAKES_NO_FILE.fullmatch(ast.unparse(call)) for call in calls)
    return [(kind, name) for kind, name in found if name and "://" not in name]


def _names_set(node: ast.AST) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [name for target in targets if (name := getattr(target, "id", getattr(target, "attr", None)))]


def sends_tuples(tree: ast.Module) -> bool:
    """Whether Atropos's own code fails on what ``collect_trajectories`` returns: a list to which it appends tuples."""
    for node, methods in _own_classes(tree):
        function = methods.get("collect_trajectories")
        if function is None or "postprocess_histories" in methods or [*map(ast.unparse, node.bases)] != ["BaseEnv"]:
            continue
        nodes = list(ast.walk(function))
        values = [part.value for part in nodes if isinstance(part, ast.Return)]
        names = {ast.unparse(value.elts[0]) if isinstance(value, ast.Tuple) and value.elts else "" for value in values}
        name = min(names, default="")
        calls = [part for part in nodes if isinstance(part, ast.Call) and ast.unparse(part.func) == f"{name}.append"]
        is_made_once = len(names) == 1 and [word for part in nodes for word in _names_set(part)].count(name) == 1
        if is_made_once and {type(argument) for call in calls for argument in call.args} == {ast.Tuple}:
            return True
    return False


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
    place = Path(list(spec.submodule_search_locations)[0], *module.split(".")[1:])
    files = [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
    text = "".join(file.read_text(errors="replace") for file in files)
    return any(place.glob(name + "*")) or re.search(rf"\b({name}|import \*)(?!\w)", text) is not None
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
    """Raises ``ConfigError`` for what an environment cannot start without. What cannot be found out is passed over."""
    lacking = list[str]()  # clauses that begin with a verb
    with contextlib.suppress(SyntaxError, OSError, ValueError, RecursionError, subprocess.TimeoutExpired):
        source, cwd = source_of(program, settings), Path(settings.cwd or run_dir).expanduser()
        script = script_of(program, settings) or Path(program[-1])
        tree = parse_script(source, script)
        place, modules = str(script.resolve().parent), imported_modules(tree)
        if settings.module is not None:
            place, modules = str(cwd.absolute()), [*modules, settings.module.split(".")[0]]
        if b"sys.path" in source:
            modules = [name for name in modules if name.startswith("atroposlib")]  # others may come from anywhere
        needs = needs_of(tree, settings.args, script.parent.absolute())
        asked = {"place": place, "modules": modules, "needs": needs, "cwd": str(cwd.absolute())}
        command, variables = [python, "-c", _LOOK, json.dumps(asked)], {**os.environ, **import_path(), **settings.env}
        options: dict[str, Any] = {"env": variables, "cwd": cwd if cwd.is_dir() else None}
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20.0, **options)
        seen: dict[str, Any] = json.loads(answer.stdout)
        if names := ", ".join(name.replace(":", ".") for name in seen["lacking"]):
            lacking.append(f"imports {names}, which {python} has not: install what provides them, or set python")
        if sends_tuples(tree):
            text = "returns tuples from collect_trajectories where Atropos sends ScoredDataGroups, so no group would"
            text += " ever arrive: have it return what score() makes of them, or define postprocess_histories"
            lacking.append(text)
        lacking += [f"needs the {kind} {', '.join(names)} ({why})" for kind, (why, names) in seen["unmet"].items()]
    if lacking:
        raise ConfigError(f"{program[-1]} {'; '.join(lacking)}", key)
