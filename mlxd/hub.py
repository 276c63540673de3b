"""The Hugging Face hub: what a repository holds, and the bytes of its files.

Owns the questions to the hub and what its answers may be: every name, revision, size and digest in them is checked here before anybody uses
it. The hub's host is HF_ENDPOINT's, nobody else names one; the token goes there and to no host that it redirects to. Writes no file, tries
nothing twice.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

import mlxd
from mlxd.endpoint import base_url
from mlxd.errors import MlxdError, Refused

# Read by huggingface_hub when it is imported. Telemetry: it would tell what runs here. Xet: it does not go on where it was killed.
os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import httpx2
import msgspec
from huggingface_hub import constants, get_session, get_token, hf_hub_url
from huggingface_hub.errors import OfflineModeIsEnabled
from msgspec import Struct

REVISION = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
#: So many files a repository of a model does not have.
MOST_FILES = 20_000
MOST_NAME_BYTES = 1024
#: What a hub says of a repository is some 300 bytes a file. All of it is to come within the time.
MOST_TREE_BYTES, TREE_S = 16 * 1024 * 1024, 60.0
#: The hub's own word for why it says no.
CODE = "x-error-code"
#: Answers after which the same question may get another one.
PASSING = (408, 425, 429, 500, 502, 503, 504)


class Trouble(MlxdError):
    """The hub could not be asked, or broke off: the next try may do better, not before `retry_s`."""

    def __init__(self, message: str, retry_s: float = 0.0):
        super().__init__(message)
        self.retry_s = retry_s


class Unreachable(Refused):
    """The hub was asked in vain, and is not asked any more."""

    def __init__(self, message: str):
        super().__init__(502, message)


class File(NamedTuple):
    """`digest`: 64 hex digits, the SHA-256 of its bytes, or 40, git's SHA-1 of it as a blob. It is also its name in the cache."""

    path: str
    size: int
    digest: str


class Tree(NamedTuple):
    """A repository's files at one commit, 40 hex digits."""

    revision: str
    files: list[File]


class Hub:
    """`token`: "" for none, None for that of HF_TOKEN or `hf auth login`. `timeout_s`: of an answer's beginning, and of each piece of it.
    Raises MlxdError when HF_ENDPOINT is no URL."""

    def __init__(
        self, url: str = constants.ENDPOINT, token: str | None = None, timeout_s: float = constants.HF_HUB_DOWNLOAD_TIMEOUT
    ):
        self.url = base_url(url, "HF_ENDPOINT")
        self.token = get_token() if token is None else token
        self.timeout_s = timeout_s
        self.host = urlsplit(self.url).netloc.rpartition("@")[2]

    def tree(self, repository: str) -> Tree:
        """The main branch of `org/repo`, as it is now. Raises Trouble, Refused (Unreachable when nobody may be asked)."""
        until = time.monotonic() + TREE_S
        body = bytearray()
        with self.answer(repository, f"{self.url}/api/models/{repository}/revision/main?blobs=true") as response:
            for piece in response.iter_bytes():
                body += piece
                if len(body) > MOST_TREE_BYTES:
                    raise malformed(repository, f"the hub says more than {MOST_TREE_BYTES} bytes of it")
                if time.monotonic() > until:
                    raise Trouble(f"{self.host} took more than {TREE_S:g} s to say what there is")
        try:
            return checked(repository, repositories.decode(body))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise malformed(repository, "its answer is not what a hub says of a repository") from None

    def read(self, repository: str, revision: str, file: File, start: int) -> Iterator[tuple[int, bytes]]:
        """The bytes of a file from `start` on, each piece with its offset: the first may be 0 where the hub knows no ranges. Raises Trouble,
        Refused."""
        url = hf_hub_url(repository, file.path, revision=revision, endpoint=self.url)
        with self.answer(repository, url, {"Range": f"bytes={start}-"} if start else {}) as response:
            offset = start if response.status_code == 206 else 0
            if offset and not response.headers.get("content-range", "").startswith(f"bytes {start}-"):
                raise Trouble(f"{self.host} sent another part of {file.path} than was asked for")
            for piece in response.iter_raw():
                yield offset, piece
                offset += len(piece)

    @contextlib.contextmanager
    def answer(self, repository: str, url: str, more: dict[str, str] | None = None) -> Iterator[httpx2.Response]:
        """The answer to a GET, 200 or 206, its body still to come. What errors say is not read. Raises Trouble, Refused."""
        headers = {"User-Agent": f"mlxd/{mlxd.__version__}", "Accept-Encoding": "identity"} | (more or {})
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"  # which httpx2 leaves out where it is sent on to another host
        try:
            with get_session().stream("GET", url, headers=headers, timeout=self.timeout_s) as response:
                if response.status_code not in (200, 206):
                    raise self.refusal(repository, response)
                yield response
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise self.judge(error) from error

    def refusal(self, repository: str, response: httpx2.Response) -> MlxdError:
        """What a status means to whoever wants the model."""
        status, code = response.status_code, response.headers.get(CODE, "")
        if code == "GatedRepo":
            return Refused(502, f"{repository} is gated: accept its licence at {self.host}/{repository} and {self.remedy}")
        if code in ("RepoNotFound", "RevisionNotFound"):
            return Refused(
                404, f"model '{repository}' not found on {self.host}; check the name, or, if it is private, {self.remedy}"
            )
        if status in PASSING:
            told = response.headers.get("retry-after", "")
            return Trouble(f"{self.host} answers {status}", float(told) if re.fullmatch(r"\d{1,6}", told) else 0.0)
        if status == 416:
            return Trouble(f"{self.host} cannot go on where a file stopped")
        if status in (401, 403):
            return Refused(
                502,
                f"{self.host} does not give {repository} ({status}): check the name, accept its licence there if it has one, and {self.remedy}",
            )
        return Refused(502, f"{self.host} answers {status} for {repository}")

    def judge(self, error: Exception) -> MlxdError:
        """What an error means. No words of it: they may hold a signed URL."""
        if isinstance(error, OfflineModeIsEnabled):
            return Unreachable("HF_HUB_OFFLINE is set; unset it to pull models")
        if isinstance(error, httpx2.TimeoutException):
            return Trouble(f"{self.host} was silent for {self.timeout_s:g} s")
        if isinstance(error, httpx2.ConnectError):
            return Trouble(f"{self.host} cannot be reached")
        if isinstance(error, httpx2.TransportError):
            return Trouble(f"{self.host} broke off")
        return Refused(502, f"{self.host} answers in a way that cannot be followed ({type(error).__name__})")

    @property
    def remedy(self) -> str:
        return "see that the token in HF_TOKEN has access to it" if self.token else "set HF_TOKEN to a token that has access to it"


class Lfs(Struct):
    size: int
    sha256: str


class Sibling(Struct, rename="camel"):
    """A file, as the hub's API has it."""

    rfilename: str
    size: int | None = None
    blob_id: str | None = None
    lfs: Lfs | None = None


class Repository(Struct):
    sha: str
    siblings: list[Sibling]


repositories = msgspec.json.Decoder(Repository)


def checked(repository: str, told: Repository) -> Tree:
    """What the hub told of a repository, if it can be true. Raises Refused: one bad name and nothing of the repository is used."""
    if not REVISION.fullmatch(told.sha):
        raise malformed(repository, "its revision is not 40 hex digits")
    if len(told.siblings) > MOST_FILES:
        raise malformed(repository, f"it has more than {MOST_FILES} files")
    files = []
    for one in told.siblings:
        check_path(repository, one.rfilename)
        size, digest = (one.lfs.size, one.lfs.sha256) if one.lfs is not None else (one.size, one.blob_id)
        if size is None or size < 0:
            raise malformed(repository, f"{one.rfilename} has no size")
        if digest is None or not (SHA256 if one.lfs is not None else REVISION).fullmatch(digest):
            raise malformed(repository, f"{one.rfilename} has no digest")
        files.append(File(one.rfilename, size, digest))
    names = [file.path.lower() for file in files]
    if len(set(names)) < len(names):
        raise malformed(repository, "two of its files differ in upper and lower case alone")
    return Tree(told.sha, files)


def check_path(repository: str, path: str) -> None:
    """Raises Refused unless it names a place below the directory that it is put into, on every system. Lexical: in the cache there are links
    on the way."""
    if not path or len(path.encode(errors="replace")) > MOST_NAME_BYTES:
        raise malformed(repository, "a file has no name, or one without an end")
    if "\\" in path or not path.isprintable() or any(part in ("", ".", "..") for part in path.split("/")):
        raise malformed(repository, f"{ascii(path)[:80]} is no name of a file")


def malformed(repository: str, what: str) -> Refused:
    return Refused(502, f"{repository} is refused, nothing of it is used: {what}", hopeless=True)
