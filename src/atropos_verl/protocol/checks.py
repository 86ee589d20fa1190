"""The client's settings, checked before anything is sent. Each error names the setting as the user wrote it."""

from __future__ import annotations

import ipaddress
import math
import re
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit

import httpx

from atropos_verl.errors import ConfigError

__all__ = ["at_least", "check_headers", "check_trust", "check_url", "is_this_machine", "without_password"]


def at_least(value: float, key: str, least: float, *, exclusive: bool = False) -> float:
    """``value``, a finite number of at least ``least`` (above it, when ``exclusive``). Raises ``ConfigError``."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least or (exclusive and value == least):
        raise ConfigError(f"{value!r} must be a number {'above' if exclusive else 'of at least'} {least:g}", key)
    return value


def check_url(api_url: str) -> str:
    """The URL's host. Raises ``ConfigError`` for what is not the address of an API."""
    key = "atropos.api_url"
    try:
        parts = urlsplit(api_url)
        host = parts.hostname or ""
        httpx.URL(api_url)
        valid = parts.scheme in ("http", "https") and host != "" and parts.port != 0 and not re.search(r"\s", api_url)
    except (ValueError, TypeError, AttributeError, httpx.InvalidURL) as error:
        raise ConfigError(f"{without_password(str(api_url))!r} is not a URL: {error}", key) from None
    if not valid:
        raise ConfigError(f"{without_password(api_url)!r} is not an http:// or https:// URL with a host", key)
    if parts.query or parts.fragment:
        raise ConfigError(f"{without_password(api_url)!r} must not hold a query or a fragment", key)
    return host


def without_password(api_url: str) -> str:
    """The URL as it may be shown: user and password left out."""
    return re.sub(r"//[^/@]*@", "//***@", api_url)


def check_headers(token: str | None, headers: Mapping[str, str] | None, api_url: str) -> dict[str, str]:
    """The headers of every request. Raises ``ConfigError``, never showing a value: it may be a secret."""
    found = dict(headers or {})
    for name, value in found.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or not re.fullmatch(r"[\x20-\x7e\t]*", value):
            raise ConfigError(f"{name!r} or its value cannot be an HTTP header", "atropos.headers")
    if token is None:
        return found
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ConfigError("a bearer token is visible ASCII characters without spaces or line ends", "atropos.token")
    if any(name.lower() == "authorization" for name in found) or "@" in urlsplit(api_url).netloc:
        raise ConfigError("there is another authorization in atropos.headers or atropos.api_url", "atropos.token")
    return {**found, "Authorization": f"Bearer {token}"}


def check_trust(verify: bool | str, *, needed: bool) -> bool | ssl.SSLContext:
    """What httpx is to trust. Raises ``ConfigError`` for a certificate file that cannot be read.

    Not ``needed`` (plain http): False, because loading the system's certificates takes 0.2 s.
    """
    if isinstance(verify, bool):
        return verify and needed
    try:
        return ssl.create_default_context(cafile=verify)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"{verify!r} holds no certificates that can be read: {error}", "atropos.ca_file") from None


def is_this_machine(host: str) -> bool:
    """The host is a name or address of the machine itself, which no proxy reaches."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified
