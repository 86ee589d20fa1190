"""How an environment is given keys without their standing in the process list.

Atropos takes its settings from arguments, which every user of the machine can read in ``ps``, or from the YAML file of
``--config`` (it looks at no environment variable: the openai client's ``OPENAI_API_KEY`` serves chat only, not
``/generate``). So the gateway's key goes into a file that only its owner can read. The API's token goes there too, as
the password in the API's URL: Atropos cannot send a bearer token, but its HTTP client (aiohttp) makes HTTP Basic
authentication of a URL's password, and our API takes that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import yaml

from atropos_verl.errors import ConfigError

__all__ = [
    "KEY_OPTION",
    "URL_OPTION",
    "PrivateArguments",
    "option_value",
    "private_arguments",
    "user_arguments",
]

KEY_OPTION = "--openai.api_key"
URL_OPTION = "--env.rollout_server_url"
_FILE_OPTION = "--config"


@dataclass(frozen=True, slots=True)
class PrivateArguments:
    """Words for an environment's command line, and the private files that must exist when it starts."""

    words: tuple[str, ...] = ()
    files: Mapping[Path, str] = field(default_factory=dict)


def private_arguments(
    *,
    api_key: str | None,
    api_url: str | None = None,
    token: str | None = None,
    args: Sequence[str],
    omit: Sequence[str] = (),
    file: Path,
    cwd: Path,
    key: str,
) -> PrivateArguments:
    """Gateway key and API address for one environment.

    Args:
        api_key: of the gateway; None: it has none.
        api_url: of the API; None: it is not told (``evaluate`` needs none).
        token: of the API.
        args: the user's own arguments, which win. A ``--config`` among them is read: ours holds its content too.
        omit: arguments of ours to leave out; ``--config``: an Atropos that does not know it gets keys as arguments.
        file: where the private file is to lie.
        cwd: the environment's working directory, which a relative ``--config`` starts from.
        key: dotted name of the setting that ``args`` is, for the message.

    Raises:
        ConfigError: the user's ``--config`` cannot be read.
    """

    def is_ours(option: str) -> bool:
        return option not in omit and option_value(args, option) is None

    # The openai client refuses to start without a key.
    wanted = {KEY_OPTION: api_key or "none"} if is_ours(KEY_OPTION) else {}
    secret = {KEY_OPTION} if api_key else set()
    if api_url is not None and is_ours(URL_OPTION):
        wanted[URL_OPTION] = _with_password(api_url, token) if token else api_url
        secret |= {URL_OPTION} if token else set()
    given = option_value(args, _FILE_OPTION)
    settings = {} if given is None or _FILE_OPTION in omit else _read(cwd / Path(given).expanduser(), key)
    servers = settings.get("openai") or {}
    if isinstance(servers, list) and len(servers) > 1:
        secret -= {KEY_OPTION}
        wanted.pop(KEY_OPTION, None)  # several servers of the user's own: Atropos takes no argument beside them
    if _FILE_OPTION in omit:
        secret = set()
    words = [word for option, value in wanted.items() if option not in secret for word in (option, value)]
    private = {option: value for option, value in wanted.items() if option in secret}
    if not private:
        return PrivateArguments(tuple(words))
    if KEY_OPTION in private:
        server = servers[0] if isinstance(servers, list) and servers else servers
        settings["openai"] = {**(server or {}), "api_key": private[KEY_OPTION]}
    if URL_OPTION in private:
        settings["env"] = {**(settings.get("env") or {}), "rollout_server_url": private[URL_OPTION]}
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return PrivateArguments((*words, _FILE_OPTION, str(file)), {file: text})


def option_value(args: Sequence[str], option: str) -> str | None:
    """The value of ``option`` in ``--option value`` or ``--option=value`` form; None: it is not given."""
    for index, word in enumerate(args):
        if word.startswith(f"{option}="):
            return word.split("=", 1)[1]
        if word == option and index + 1 < len(args):
            return args[index + 1]
    return None


def user_arguments(args: Sequence[str], private: PrivateArguments) -> tuple[str, ...]:
    """``args`` without a ``--config`` that the private file has taken in."""
    if not private.files:
        return tuple(args)
    kept: list[str] = []
    words = iter(args)
    for word in words:
        if word == _FILE_OPTION:
            next(words, None)
        elif not word.startswith(f"{_FILE_OPTION}="):
            kept.append(word)
    return tuple(kept)


def _with_password(url: str, token: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"atropos:{quote(token, safe='')}@{host}").geturl()


def _read(path: Path, key: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path} (--config): {error}", key) from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} (--config) is not a mapping", key)
    return dict(content)
