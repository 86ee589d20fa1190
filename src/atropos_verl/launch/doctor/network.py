"""Ports that must be free, and the trajectory API that must answer."""

from __future__ import annotations

import http.client
import json
import socket
import urllib.error
import urllib.request

from atropos_verl.config.findings import Finding, missing, ok, warning

__all__ = ["check_api", "check_port"]

_SECTION = "network"
_API_SECONDS = 3.0


def check_port(name: str, host: str, port: int) -> Finding:
    """Whether ``host``:``port`` can be listened on now; 0 is any free port."""
    if port == 0:
        return ok(_SECTION, name, f"any free port of {host}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen()
    except OSError as error:
        todo = f"set {name} to a free port, or to 0 for any"
        return missing(_SECTION, name, f"cannot listen on {host}:{port}: {error.strerror or error}", todo)
    return ok(_SECTION, name, f"{host}:{port} is free")


def check_api(url: str, token: str | None, *, timeout: float = _API_SECONDS) -> Finding:
    """``GET /status`` with the run's token. Proxies of the environment are not used."""
    name = "trajectory API"
    request = urllib.request.Request(f"{url.rstrip('/')}/status", headers={"Accept": "application/json"})
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as answer:
            content = json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            sent = "the token was refused" if token else "it demands a token"
            return missing(_SECTION, name, f"{url}: {error.code}, {sent}", "set ATROPOS_API_TOKEN (or atropos.token)")
        return missing(_SECTION, name, f"{url}/status answers {error.code}", "is it an Atropos API? see its log")
    except ValueError:
        return missing(_SECTION, name, f"{url}/status answers no JSON", "is it an Atropos API?")
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "reason", None) or error
        return missing(_SECTION, name, f"{url} does not answer: {why}", "start it, or correct atropos.api_url")
    if not isinstance(content, dict) or "current_step" not in content:
        return missing(_SECTION, name, f"{url}/status is not that of an Atropos API", "correct atropos.api_url")
    step, queue = content.get("current_step"), content.get("queue_size")
    if content.get("queue_size"):
        todo = "an earlier run's groups would be trained first; atropos.reset=true forgets them"
        return warning(_SECTION, name, f"{url}: step {step}, {queue} groups queued", todo)
    return ok(_SECTION, name, f"{url}: step {step}, queue empty")
