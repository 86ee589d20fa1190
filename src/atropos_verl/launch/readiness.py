"""When is a service up? A free port, a probe, and a bounded wait that notices a death at once."""

from __future__ import annotations

import http.client
import socket
import time
import urllib.request
from collections.abc import Callable

from atropos_verl.errors import ServiceError
from atropos_verl.launch.process import ManagedProcess

__all__ = ["free_port", "http_probe", "try_to_listen", "wait_until_ready"]


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nothing listens on. Free at this moment only: bind it soon.

    Raises:
        OSError: ``host`` is no address of this machine.
    """
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def try_to_listen(host: str, port: int) -> None:
    """Raises ``OSError`` when ``host``:``port`` cannot be listened on at this moment."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        probe.listen()


def http_probe(url: str, timeout: float = 1.0) -> bool:
    """Whether ``GET url`` is answered with 2xx within ``timeout`` seconds. Never raises for a server's doings.

    Proxy settings of the environment are not used: a service of this run is asked directly.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout) as answer:
            return bool(200 <= answer.status < 300)
    except (OSError, http.client.HTTPException):  # URLError, HTTPError (4xx, 5xx) and timeouts are OSErrors
        return False


def wait_until_ready(
    probe: Callable[[], bool],
    *,
    name: str,
    timeout: float,
    interval: float = 0.1,
    process: ManagedProcess | None = None,
) -> None:
    """Ask ``probe`` every ``interval`` seconds until it says True.

    Args:
        name: of the service, for the message.
        timeout: seconds.
        process: the service, if it is ours: when it dies, the wait ends at once.

    Raises:
        ServiceError: the process died first, or ``timeout`` passed. With the last lines of its log.
    """
    deadline = time.monotonic() + timeout
    while not probe():
        if process is not None:
            process.check()
        if time.monotonic() >= deadline:
            where = "" if process is None else f"; its log is {process.spec.log_path}"
            raise ServiceError(
                f"{name} was not ready after {timeout:g} s{where}",
                name,
                None,
                "" if process is None else process.log_tail(),
            )
        time.sleep(interval)
