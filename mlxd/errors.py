"""The one family of errors that a person is meant to read."""

from __future__ import annotations

#: What a server that ends says to the streams that it still has.
REPLACED = "the server is being stopped or replaced; please try again"


class MlxdError(Exception):
    """Something a person can act on. The message is one sentence that says what to do.

    `exit_status` is what the command line ends with: 1 failed, 3 not running, 4 not ready, 75 temporary, 78 configuration.
    """

    exit_status = 1


class ConfigError(MlxdError):
    """A setting, a file or a directory that only a person can mend."""

    exit_status = 78


class NotRunning(MlxdError):
    """There is no daemon to ask."""

    exit_status = 3


class Refused(MlxdError):
    """A request that gets no answer, or no more of one, and why: each dialect renders it in its own shape.

    `status`: of HTTP. `retry_s`: when to come again (`Retry-After`); None: not said. `code`: a word for programs.
    `hopeless`: the same request would fail again (`x-should-retry: false`).
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, retry_s: float | None = None, hopeless: bool = False):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.retry_s = retry_s
        self.hopeless = hopeless
