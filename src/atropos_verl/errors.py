"""Every error this package raises on purpose, as one tree.

Every class can be pickled with its attributes (they cross process boundaries under Ray): ``__init__`` takes the message
first and has defaults for all else, so that ``Exception`` rebuilds the error from its message and its attributes."""


class AtroposVerlError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(AtroposVerlError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one: ``key`` (``"optim.lr"``; ""
    when it concerns the whole)."""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key


class AtroposAPIError(AtroposVerlError):
    """The trajectory API did not do what was asked. ``reason`` is one line, ``base_url`` the API as configured."""

    def __init__(self, reason: str, base_url: str = "") -> None:
        super().__init__(reason)
        self.reason, self.base_url = reason, base_url

    def __str__(self) -> str:
        if not self.base_url:
            return f"ATROPOS API ERROR: {self.reason}"
        return (
            f"ATROPOS API ERROR: {self.reason}\n\n"
            "Ensure that:\n"
            f"1. Atropos server is running on {self.base_url}\n"
            "2. The API endpoints are accessible\n"
            "3. Network connectivity is available"
        )


class AtroposConnectionError(AtroposAPIError, ConnectionError):
    """No connection: refused, host not found, TLS failure, unreachable, or reset while talking."""


class AtroposTimeoutError(AtroposAPIError, TimeoutError):
    """The API did not answer, or had no batch, within the time allowed (seconds)."""


class AtroposHTTPStatusError(AtroposAPIError):
    """The API answered with an HTTP error. ``status_code`` is the code, ``body`` the start of the answer."""

    def __init__(self, reason: str, base_url: str = "", status_code: int = 0, body: str = "") -> None:
        super().__init__(reason, base_url)
        self.status_code, self.body = status_code, body

    def __str__(self) -> str:
        # The server runs and has read the request.
        return f"ATROPOS API ERROR: {self.reason}" if self.status_code == 422 else super().__str__()


class AtroposProtocolError(AtroposAPIError, ValueError):
    """The server answered, but not as an Atropos trajectory API does."""


class DataError(AtroposVerlError, ValueError):
    """A group of trajectories cannot be trained on. The message names field, sequence, index and value."""


class UnsupportedFieldError(DataError):
    """The group carries a field this trainer does not use; the message names the config key that ignores it."""


class EngineError(AtroposVerlError):
    """The inference engine failed."""


class GenerationRequestError(EngineError, ValueError):
    """The request itself is wrong (too long, bad parameter). ``param`` names the offending parameter."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class EngineStoppedError(EngineError):
    """The engine was closed, or its thread died, while the request waited."""


class WeightSyncError(AtroposVerlError):
    """The inference engine does not hold the trainer's weights."""


class TrainingDivergedError(AtroposVerlError):
    """The loss or the gradient norm is not finite."""


class CheckpointError(AtroposVerlError):
    """A checkpoint could not be written or read."""


class StorageError(AtroposVerlError):
    """Records that must survive the process cannot be stored or read."""


class StorageWriteError(StorageError):
    """The disk refused a write (full, no permission): nothing was stored."""


class StorageDamagedError(StorageError):
    """The file cannot be used: it is damaged, is something else, or another process holds it."""


class StorageInUseError(StorageDamagedError):
    """Another process holds the file."""


class ServiceError(AtroposVerlError):
    """A process of the run, ``service``, died or never became ready. ``returncode``: its exit status (None: still
    running, negative: signal number); ``log_tail``: the last lines of its log."""

    def __init__(self, message: str, service: str = "", returncode: int | None = None, log_tail: str = "") -> None:
        super().__init__(message)
        self.service, self.returncode, self.log_tail = service, returncode, log_tail

    def __str__(self) -> str:
        text = str(self.args[0])
        return f"{text}\n--- last lines of {self.service} ---\n{self.log_tail}" if self.log_tail else text
