"""Pulling from a hub on loopback, with the real client: what a pull brings and what it never brings, what becomes of it when the hub, the
network, the disk or somebody with a KILL is against it, and who shares it."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from conftest import Daemon, eventually
from hub import BUILTIN, Fault, Hub, Repository, builtin_repository, hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_client import Background, Supervised, supervised, until

from mlxd import hub as client
from mlxd import messages, models
from mlxd.config import Supervisor as Limits
from mlxd.errors import MlxdError, Refused
from mlxd.messages import Abandon, Fetch, Fetched, Fetching
from mlxd.pull import Partial, Pull

NAME = "org/tiny"
WEIGHTS = (BUILTIN / "model.safetensors").read_bytes()
HALF = len(WEIGHTS) // 2
LIMITS = Limits(backoff_first_s=0.01, backoff_most_s=0.05)
TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def there() -> Iterator[Hub]:
    with hub() as one:
        yield one


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "hub"


class Puller:
    """Pulls in this process. `said`: all that it told."""

    def __init__(self, there: Hub, cache: Path, timeout_s: float = 5.0):
        self.there = there
        self.cache = cache
        self.timeout_s = timeout_s
        self.said: list[Fetching] = []

    def pull(self, name: str = NAME, token: str = "") -> None:
        """Raises MlxdError."""
        Pull(name, self.cache, client.Hub(self.there.url, token, self.timeout_s), LIMITS, self.said.append).run()

    def refused(self, name: str = NAME) -> Refused:
        with pytest.raises(Refused) as raised:
            self.pull(name)
        return raised.value

    def statuses(self) -> list[str]:
        return list(dict.fromkeys(word.status for word in self.said))

    def listed(self) -> list[str]:
        found = models.Catalogue(str(self.cache.parent / "models"), {"HF_HUB_CACHE": str(self.cache)}).scan()
        return [model.name for model in found if not model.builtin]

    def files(self) -> set[str]:
        """What lies in the snapshots."""
        return {path.name for path in self.cache.rglob("snapshots/*/*")}


@pytest.fixture
def puller(there: Hub, cache: Path) -> Puller:
    return Puller(there, cache)


# --- what comes -------------------------------------------------------------------------------------------------------------------


def test_a_pull_brings_the_model_and_nothing_else_and_lists_it(puller: Puller, there: Hub) -> None:
    """SEC-14: neither code nor pickle is ever on the disk."""
    puller.pull()
    assert puller.listed() == ["org/tiny:latest"]
    assert puller.files() == {path.name for path in BUILTIN.iterdir()} | {"LICENSE"}
    assert not list(puller.cache.rglob("*.py")) and b"canary" not in b"".join(p.read_bytes() for p in blobs(puller.cache))
    digest = f"sha256:{hashlib.sha256(WEIGHTS).hexdigest()}"
    expected = ["pulling manifest", f"pulling {digest[7:19]}", "verifying sha256 digest", "writing manifest"]
    assert puller.statuses() == expected
    last = [word for word in puller.said if word.digest][-1]
    assert (last.digest, last.total, last.completed) == (digest, len(WEIGHTS), len(WEIGHTS))
    assert not [seen for seen in there.seen if seen.path.endswith((".py", ".bin", "README.md"))]


def blobs(cache: Path) -> list[Path]:
    return [path for path in cache.glob("models--*/blobs/*") if path.is_file()]


def test_a_second_pull_asks_only_whether_there_is_a_newer_one(puller: Puller, there: Hub) -> None:
    puller.pull()
    there.seen.clear()
    puller.pull()
    assert [seen.path for seen in there.seen] == [f"/api/models/{NAME}/revision/main"]


def test_a_newer_revision_replaces_the_older_when_it_is_whole_and_what_is_the_same_is_not_fetched(
    puller: Puller, there: Hub
) -> None:
    puller.pull()
    old = current(puller.cache)
    there.repositories[NAME].files["generation_config.json"] = b'{"temperature": 0.5}'
    there.faults["generation_config.json"] = Fault("wrong", times=2)
    puller.refused()
    assert current(puller.cache) == old and puller.listed() == ["org/tiny:latest"]
    there.seen.clear()
    puller.pull()
    assert current(puller.cache).name == there.repositories[NAME].revision != old.name
    assert old.is_dir() and puller.listed() == ["org/tiny:latest"]
    assert there.starts() == []


def current(cache: Path) -> Path:
    found = models.current_snapshot(cache / "models--org--tiny")
    assert found is not None
    return found


def test_a_known_model_is_the_new_one_as_soon_as_it_is_pulled(puller: Puller, there: Hub) -> None:
    catalogue = models.Catalogue(str(puller.cache.parent / "models"), {"HF_HUB_CACHE": str(puller.cache)})
    puller.pull()
    old = catalogue.find(NAME).directory
    assert catalogue.known(NAME) is not None
    there.repositories[NAME].files["LICENSE"] = b"Do as we like.\n"
    puller.pull()
    assert catalogue.known(NAME) is None and catalogue.find(NAME).directory != old


def test_a_hub_that_cannot_be_reached_leaves_a_whole_model_as_it_is(puller: Puller, there: Hub) -> None:
    puller.pull()
    there.faults[""] = Fault(503, times=100)
    puller.pull()
    assert any("the model stays as it is here" in status for status in puller.statuses())
    shutil.rmtree(puller.cache)
    assert "answers 503" in str(puller.refused())


def test_other_letters_are_the_same_repository(puller: Puller, there: Hub) -> None:
    puller.pull()
    there.repositories["ORG/Tiny"] = there.repositories[NAME]
    there.seen.clear()
    puller.pull("ORG/Tiny")
    assert there.starts() == [] and puller.listed() == ["org/tiny:latest"]


def test_what_an_embedding_model_needs_comes_with_it(puller: Puller, there: Hub) -> None:
    there.repositories[NAME].files |= {
        "modules.json": b"[]",
        "1_Pooling/config.json": b"{}",
        "onnx/model.safetensors": b"x",
        "model.fp32.safetensors.bak": b"x",
    }
    puller.pull()
    snapshot = current(puller.cache)
    assert (snapshot / "1_Pooling" / "config.json").read_bytes() == b"{}"
    assert (snapshot / "modules.json").exists() and not (snapshot / "onnx").exists()
    assert not (snapshot / "model.fp32.safetensors.bak").exists()


# --- names ------------------------------------------------------------------------------------------------------------------------

#: SEC-09: what a client may not name, and the part of the sentence that says so.
NO_NAMES = {
    "http://evil.example/org/repo": "invalid model name",
    "evil.example/org/repo": "a host cannot be named",
    "evil.example:8080/repo": "a host cannot be named",
    "127.0.0.1:80/org/repo": "a host cannot be named",
    "/etc/passwd": "invalid model name",
    "../../etc": "invalid model name",
    "org/..": "invalid model name",
    "org/../../x": "invalid model name",
    "org/repo@main": "invalid model name",
    "org/repo?x=1": "invalid model name",
    "org/repo%2f..": "invalid model name",
    "org\\repo": "invalid model name",
    "org/re po": "invalid model name",
    "org/repo\n": "invalid model name",
    "org/repo:7b": "no tag '7b'",
    "org/re--po": "the Hugging Face hub has none like it",
    "org/repo.": "invalid model name",
    "org/repo.git": "the Hugging Face hub has none like it",
    "o" * 60 + "/" + "r" * 60: "the Hugging Face hub has none like it",
}


@pytest.mark.parametrize("name", NO_NAMES)
def test_sec_09_no_client_names_a_host_a_path_or_a_revision(name: str) -> None:
    with pytest.raises(Refused) as raised:
        models.repository_of(name)
    assert raised.value.status == 400 and NO_NAMES[name] in raised.value.message


def test_a_name_without_an_organisation_is_not_found_and_the_sentence_says_how_it_is_named() -> None:
    with pytest.raises(Refused) as raised:
        models.repository_of("llama3")
    assert raised.value.status == 404
    assert "model 'llama3' not found" in raised.value.message and "org/repo" in raised.value.message
    assert models.repository_of("org/repo") == models.repository_of("org/repo:latest") == "org/repo"


# --- hostile and unfit repositories -----------------------------------------------------------------------------------------------


def inodes(root: Path, besides: Path) -> set[tuple[str, int, int]]:
    """Every name below `root` but what is below `besides`."""
    found = set()
    for directory, names, files in os.walk(root):
        if Path(directory) == besides:
            names.clear()
            continue
        for name in (*names, *files):
            there = (Path(directory) / name).lstat()
            found.add((str(Path(directory) / name), there.st_ino, there.st_size))
    return found


hostile_parts = st.sampled_from(
    ["..", ".", "", "x", "~", "etc", "a\\b", "\0", "a\nb", "config.json", "model.safetensors", "C:", "é"]
)
hostile_paths = st.one_of(st.lists(hostile_parts, min_size=1, max_size=5).map("/".join), st.text(max_size=20)).filter(
    lambda path: path != "model.safetensors"  # which is no lie
)
hostile_hex = st.one_of(
    st.text(max_size=80),
    st.sampled_from(["../../../x", "a" * 41, "G" * 64, "", "a" * 64 + "/..", "A" * 64, "0" * 39]),
    st.integers(),
)


@pytest.mark.parametrize("examples", [8, pytest.param(200, marks=[pytest.mark.full, pytest.mark.timeout(900)])])
def test_sec_12_whatever_a_hub_says_nothing_is_made_outside_the_cache(tmp_path: Path, there: Hub, examples: int) -> None:
    """One lie at a time, in an answer that is otherwise true."""
    puller = Puller(there, tmp_path / "cache" / "hub")
    before = inodes(tmp_path, puller.cache)

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(path=hostile_paths, digest=hostile_hex, revision=hostile_hex, size=st.one_of(st.integers(), st.none(), st.floats()))
    def lie(path: Any, digest: Any, revision: Any, size: Any) -> None:
        for what, value in (("rfilename", path), ("sha256", digest), ("sha", revision), ("size", size)):
            there.repositories[NAME].alter = lambda told: lied(told, what, value)  # noqa: B023 it is called here
            with contextlib.suppress(MlxdError):
                puller.pull()
            assert puller.listed() == []
        made = {Path(name) for name, _, _ in inodes(tmp_path, puller.cache) - before}
        assert made <= {tmp_path / "cache", puller.cache}

    lie()


def lied(told: dict[str, Any], what: str, value: Any) -> dict[str, Any]:
    weights = next(one for one in told["siblings"] if "lfs" in one)
    place = told if what == "sha" else weights if what == "rfilename" else weights["lfs"]
    place[what] = value
    return told


@pytest.mark.parametrize(
    "path", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", "a\0b", "a//b", "./a", "a\x1b[31m", "x" * 2000, 5, None]
)
def test_sec_12_one_hostile_name_refuses_all_of_a_repository(puller: Puller, there: Hub, path: Any) -> None:
    def alter(told: dict[str, Any]) -> dict[str, Any]:
        return told | {"siblings": [*told["siblings"], {"rfilename": path, "size": 1, "blobId": "0" * 40}]}

    there.repositories[NAME].alter = alter
    refused = puller.refused()
    assert refused.status == 502 and "nothing of it is used" in refused.message and refused.message.isprintable()
    assert not (puller.cache / "models--org--tiny").exists() and len(there.seen) == 1


def test_two_names_that_are_one_on_a_mac_are_refused(puller: Puller, there: Hub) -> None:
    there.repositories[NAME].files["Config.json"] = b"{}"
    assert "upper and lower case" in str(puller.refused())


@pytest.mark.parametrize("answer", [b"", b"[]", b"{", b"null", b'{"id": 5}', b"[" * 100_000], ids=repr)
def test_an_answer_that_is_none_is_refused(puller: Puller, there: Hub, answer: bytes) -> None:
    there.repositories[NAME].answer = answer
    assert puller.refused().status == 502


def test_sec_14_a_model_that_needs_code_is_refused_before_its_weights_are_fetched(puller: Puller, there: Hub) -> None:
    files = there.repositories[NAME].files
    for key in ("model_file", "trust_remote_code"):
        files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"nested": {key: "modeling_evil.py"}}).encode()
        refused = puller.refused()
        assert refused.status == 400 and "asks to run code" in refused.message
        assert there.starts() == [] and puller.listed() == [] and not list(puller.cache.rglob("*.py"))
        files["config.json"] = (BUILTIN / "config.json").read_bytes()


def test_a_model_that_mlx_lm_cannot_run_is_refused_before_its_weights_are_fetched(puller: Puller, there: Hub) -> None:
    files = there.repositories[NAME].files
    true = dict(files)
    index = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}).encode()
    for change, sentence in (
        ({"config.json": b'{"model_type": "unheard_of"}'}, "which mlx-lm cannot run"),
        ({"config.json": b"{"}, "not valid JSON"),
        ({"tokenizer_config.json": b'{"tool_parser_type": "os"}'}, "tool_parser_type"),
        ({"model.safetensors.index.json": index}, "model-00001-of-00002.safetensors is missing"),
    ):
        files |= change
        refused = puller.refused()
        assert refused.status == 400 and sentence in refused.message
        there.repositories[NAME].files = files = dict(true)
    del files["tokenizer.json"]
    assert "tokenizer.json is missing" in str(puller.refused())
    assert there.starts() == [] and puller.listed() == []


def test_a_repository_of_another_format_is_refused_and_the_sentence_says_what_it_has(puller: Puller, there: Hub) -> None:
    there.repositories["org/gguf"] = Repository({"model.Q4.gguf": b"GGUF", "README.md": b"", "config.json": b"{}"}, set())
    there.repositories["org/bare"] = Repository({"model.safetensors": b""}, set())
    refused = puller.refused("org/gguf")
    assert refused.status == 400 and "it has .gguf" in refused.message and "MLX's safetensors format" in refused.message
    assert "no config.json" in str(puller.refused("org/bare"))
    assert len(there.seen) == 2 and not list(puller.cache.glob("models--*"))


def test_weights_that_are_no_model_are_not_listed(puller: Puller, there: Hub) -> None:
    """Their bytes are the hub's, and still no safetensors file."""
    there.repositories[NAME].files["model.safetensors"] = b"nonsense" * 1000
    refused = puller.refused()
    assert refused.status == 400 and "model.safetensors" in refused.message and puller.listed() == []


def test_without_room_on_the_disk_nothing_is_fetched(puller: Puller, there: Hub) -> None:
    def alter(told: dict[str, Any]) -> dict[str, Any]:
        next(one for one in told["siblings"] if "lfs" in one)["lfs"]["size"] = 10**15
        return told

    there.repositories[NAME].alter = alter
    refused = puller.refused()
    assert refused.status == 507 and "needs 1100000.0 GB" in refused.message and " free; make room" in refused.message
    assert len(there.seen) == 1 and not list(puller.cache.glob("models--*"))


def test_offline_is_offline(there: Hub, home: Path) -> None:
    said, _ = by_hand(there, home, "env", "HF_HUB_OFFLINE=1").communicate(timeout=60)
    assert json.loads(said.splitlines()[-1]) == {"error": "HF_HUB_OFFLINE is set; unset it to pull models"} and there.seen == []


def test_who_may_not_have_it_is_told_what_to_do(puller: Puller, there: Hub) -> None:
    there.repositories[NAME].gated = True
    refused = puller.refused()
    assert refused.status == 502 and "accept its licence" in refused.message and "HF_TOKEN" in refused.message
    puller.pull(token=TOKEN)
    missing = puller.refused("org/nothing")
    assert missing.status == 404 and "model 'org/nothing' not found" in missing.message
    there.faults[""] = Fault(403)
    assert "HF_TOKEN" in str(puller.refused("org/other"))


def test_the_token_goes_to_the_hub_and_to_nobody_else(puller: Puller, there: Hub) -> None:
    puller.pull(token=TOKEN)
    assert {seen.token for seen in there.seen if seen.where == "hub"} == {f"Bearer {TOKEN}"}
    assert {seen.token for seen in there.seen if seen.where == "cdn"} == {None}
    assert TOKEN not in repr(puller.said)


# --- when it goes wrong on the way ------------------------------------------------------------------------------------------------


def test_sec_13_a_wrong_byte_is_fetched_again_once(puller: Puller, there: Hub) -> None:
    there.faults = {"model.safetensors": Fault("wrong"), "tokenizer.json": Fault("wrong")}
    puller.pull()
    assert puller.listed() == ["org/tiny:latest"] and there.starts() == [0, 0]
    assert (current(puller.cache) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("path", ["model.safetensors", "tokenizer.json"])
def test_sec_13_wrong_bytes_twice_end_the_pull_and_nothing_of_them_stays(puller: Puller, there: Hub, path: str) -> None:
    there.faults = {path: Fault("wrong", times=2)}
    refused = puller.refused()
    assert refused.status == 502 and f"{path} of org/tiny came twice with other bytes" in refused.message
    assert puller.listed() == [] and not list(puller.cache.rglob("*.mlxd"))
    assert path not in puller.files()


def test_a_file_that_somebody_left_wrong_in_the_cache_is_not_believed(puller: Puller) -> None:
    blob = puller.cache / "models--org--tiny" / "blobs" / hashlib.sha256(WEIGHTS).hexdigest()
    blob.parent.mkdir(parents=True)
    blob.write_bytes(bytes(len(WEIGHTS)))
    puller.pull()
    assert blob.read_bytes() == WEIGHTS


@pytest.mark.parametrize("kind", ["reset", "truncate", "stall"])
def test_rel_19_a_download_goes_on_where_it_broke_off(there: Hub, cache: Path, kind: str) -> None:
    puller = Puller(there, cache, timeout_s=0.5)
    there.faults["model.safetensors"] = Fault(kind, times=3, at=500_000)
    puller.pull()
    assert there.starts()[0] == 0 and len(there.starts()) == 4
    assert there.starts() == sorted(set(there.starts())), "each goes on where the one before it stopped"
    assert (current(cache) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("path", ["", "model.safetensors"])
def test_rel_19_a_hub_that_is_busy_is_asked_again_when_it_says(puller: Puller, there: Hub, path: str) -> None:
    there.faults[path] = Fault(429, times=2, headers={"Retry-After": "1"})
    puller.pull()
    assert [status for status in puller.statuses() if "answers 429; trying again in 1 s" in status]
    there.faults[""] = Fault(429, headers={"Retry-After": "86400"})
    assert "answers 429" in str(puller.refused("org/other"))


def test_rel_19_a_hub_that_brings_nothing_is_left_alone_after_a_while(puller: Puller, there: Hub) -> None:
    there.faults["model.safetensors"] = Fault(500, times=100)
    refused = puller.refused()
    assert refused.status == 502 and "it goes on where it stopped" in refused.message
    assert len(there.starts()) == 8 and puller.listed() == []


def test_a_hub_that_knows_no_ranges_begins_anew(puller: Puller, there: Hub) -> None:
    path = puller.cache / "models--org--tiny" / "blobs" / f"{hashlib.sha256(WEIGHTS).hexdigest()}.mlxd"
    path.parent.mkdir(parents=True)
    path.write_bytes(WEIGHTS[:HALF])
    there.faults["model.safetensors"] = Fault("", ranges=False)
    puller.pull()
    assert there.starts() == [HALF] and (current(puller.cache) / "model.safetensors").read_bytes() == WEIGHTS


def test_rel_19_the_same_bytes_again_and_again_are_no_progress(puller: Puller, there: Hub) -> None:
    there.faults["model.safetensors"] = Fault("truncate", times=100, at=HALF, ranges=False)
    assert "it goes on where it stopped" in str(puller.refused())
    assert len(there.starts()) == 8


@pytest.mark.parametrize("left", [WEIGHTS[:HALF], bytes(HALF), WEIGHTS, WEIGHTS + b"more"], ids=["half", "wrong", "whole", "long"])
def test_what_an_earlier_pull_left_is_gone_on_with_if_it_is_right(puller: Puller, there: Hub, left: bytes) -> None:
    path = puller.cache / "models--org--tiny" / "blobs" / f"{hashlib.sha256(WEIGHTS).hexdigest()}.mlxd"
    path.parent.mkdir(parents=True)
    path.write_bytes(left)
    puller.pull()
    expected = {WEIGHTS[:HALF]: [HALF], bytes(HALF): [HALF, 0], WEIGHTS: [], WEIGHTS + b"more": [0]}[left]
    assert there.starts() == expected
    assert (current(puller.cache) / "model.safetensors").read_bytes() == WEIGHTS


def test_bytes_of_another_program_in_the_file_are_never_taken_for_those_that_came(tmp_path: Path) -> None:
    data = bytes(range(256)) * 64
    file = client.File("model.safetensors", len(data), hashlib.sha256(data).hexdigest())
    with Partial(tmp_path / "part", file, lambda *_: None) as partial:
        partial.put(0, data[:5000])
        with open(tmp_path / "part", "ab") as other:
            other.write(b"x" * 777)
        partial.put(5000, data[5000:])
        assert not partial.is_right()
    with Partial(tmp_path / "part", file, lambda *_: None) as partial:
        partial.put(0, data)
        assert partial.is_right()


@pytest.mark.parametrize("path", ["", "config.json"])
@pytest.mark.parametrize("body", [b"[]", b'"Service Unavailable"', b"<html>", b"{" * 5000])
def test_what_a_gateway_says_in_the_hubs_place_is_another_try(puller: Puller, there: Hub, path: str, body: bytes) -> None:
    there.faults[path] = Fault(503, body=body)
    puller.pull()
    assert puller.listed() == ["org/tiny:latest"]
    assert any("answers 503; trying again" in status for status in puller.statuses())


def test_an_answer_without_an_end_is_refused(puller: Puller, there: Hub) -> None:
    there.repositories[NAME].answer = b" " * (client.MOST_TREE_BYTES + 1)
    assert "the hub says more than" in puller.refused().message


# --- the API ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    """Whose supervisor is the test."""
    with supervised(tmp_path_factory.mktemp("pull"), server={"ping_s": 0.3}) as running:
        running.refuses_pulls = False
        yield running


def post(server: Supervised, name: Any, **more: Any) -> httpx.Response:
    with server.client() as one:
        return one.post("/api/pull", json={"model": name} | more)


def lines(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.text.splitlines()]


def count(server: Supervised, word: Any) -> int:
    return server.words.count(word)


def awaited(server: Supervised, word: Any, times: int = 1) -> None:
    until(f"{word} {times} times", lambda: count(server, word) >= times, server.told)


@pytest.mark.parametrize("name", [*NO_NAMES, "", " ", "nobody", None])
def test_sec_09_a_name_that_is_none_is_refused_at_once(server: Supervised, name: str | None) -> None:
    for stream in (True, False):
        answer = post(server, name, stream=stream)
        assert (answer.status_code, list(answer.json())) == (404 if name == "nobody" else 400, ["error"])
        assert NO_NAMES.get(name or "", "model") in answer.json()["error"]
    assert not [word for word in server.words if isinstance(word, Fetch)]


@pytest.mark.parametrize("name", ["tiny", "mlxd-tiny:latest", "TINY"])
def test_a_model_that_is_here_and_not_of_the_hub_is_a_success_at_once(server: Supervised, name: str) -> None:
    assert lines(post(server, name)) == [{"status": "success"}]
    assert post(server, name, stream=False).json() == {"status": "success"}


def test_a_pull_is_told_as_ollama_tells_it(server: Supervised) -> None:
    asked = Background(lambda: post(server, "org/told"))
    awaited(server, Fetch("org/told"))
    digest = "sha256:" + "ab" * 32
    for done in (0, 50, 100):
        server.say(Fetching("org/told", f"pulling {digest[7:19]}", digest, 100, done))
        time.sleep(0.05)  # else only the newest may be told
    server.say(Fetching("org/told", "verifying sha256 digest"))
    server.say(Fetching("org/told", "writing manifest"))
    server.say(Fetched("org/told"))
    answer = asked.result()
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson")
    told = [line for n, line in enumerate(lines(answer)) if line not in lines(answer)[:n]]
    assert told[0] == {"status": "pulling manifest"}
    assert told[-4] == {"status": "pulling abababababab", "digest": digest, "total": 100, "completed": 100}
    assert [line["status"] for line in told[-3:]] == ["verifying sha256 digest", "writing manifest", "success"]
    assert count(server, Abandon("org/told")) == 0


def test_a_pull_that_fails_is_an_error_line_or_without_a_stream_a_status(server: Supervised) -> None:
    asked = [Background(lambda stream=stream: post(server, "org/fails", stream=stream)) for stream in (True, False)]
    awaited(server, Fetch("org/fails"), 2)
    server.say(Fetched("org/fails", "org/fails is refused: it is a fake", 400))
    streamed, whole = [one.result() for one in asked]
    assert (streamed.status_code, lines(streamed)[-1]) == (200, {"error": "org/fails is refused: it is a fake"})
    assert (whole.status_code, whole.json()) == (400, {"error": "org/fails is refused: it is a fake"})


def test_three_clients_share_one_pull_and_the_last_that_leaves_ends_it(server: Supervised) -> None:
    """One that is silent for long hears the last line again, so that nobody in between gives up on it."""
    abandon = Abandon("org/shared")
    with contextlib.ExitStack() as first, contextlib.ExitStack() as others:
        stays = first.enter_context(server.client())
        one = first.enter_context(stays.stream("POST", "/api/pull", json={"model": "org/shared"}))
        for name in ("ORG/shared", "org/shared:latest"):
            leaves = others.enter_context(server.client())
            others.enter_context(leaves.stream("POST", "/api/pull", json={"name": name}))
        awaited(server, Fetch("org/shared"), 2)
        server.say(Fetching("org/shared", "pulling manifest"))
        heard = one.iter_lines()
        assert [next(heard) for _ in range(3)] == ['{"status":"pulling manifest"}'] * 3
        others.close()
        server.let_pass(2)
        assert count(server, abandon) == 0
    awaited(server, abandon)
    server.say(Fetching("org/shared", "pulling manifest"))  # it was on its way
    awaited(server, abandon, 2)
    assert server.health()["queue"] == {"running": 0, "waiting": 0}


def test_a_server_that_is_replaced_ends_its_pull_with_a_line_and_the_next_one_has_its_own(server: Supervised) -> None:
    asked = Background(lambda: post(server, "org/moves"))
    awaited(server, Fetch("org/moves"))
    old = server.servers[-1]
    server.start()
    again = Background(lambda: (old.say(messages.Drain(0.5)), until("the end of the old", lambda: old.process.poll() is not None)))
    answer = asked.result()
    again.result()
    assert "please try again" in lines(answer)[-1]["error"]
    again = Background(lambda: post(server, "org/moves"))
    awaited(server, Fetch("org/moves"))
    server.say(Fetched("org/moves"))
    assert lines(again.result())[-1] == {"status": "success"}


# --- processes --------------------------------------------------------------------------------------------------------------------


def environment(there: Hub, home: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": there.url,
        "HF_HUB_CACHE": str(home / "cache" / "hub"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DOWNLOAD_TIMEOUT": "120",  # what stalls is held, for the test to look at
        "MLX_MODELS_DIR": str(home / "models"),
        "MLXD_HOME": str(home / "mlxd"),
        "MLXD_SUPERVISOR_BACKOFF_FIRST_S": "0.05",
    }


def by_hand(there: Hub, home: Path, *before: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*before, sys.executable, "-m", "mlxd.pull", NAME],
        env=os.environ | environment(there, home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_rel_19_a_pull_that_is_killed_goes_on_where_it_was(there: Hub, home: Path) -> None:
    """And what it had was not listed; one beside it waits its turn, and says so."""
    there.faults["model.safetensors"] = Fault("stall", at=HALF)
    first = by_hand(there, home)
    try:
        assert there.held.wait(60)
        partial = home / "cache" / "hub" / "models--org--tiny" / "blobs" / f"{hashlib.sha256(WEIGHTS).hexdigest()}.mlxd"
        until("all that was sent", lambda: partial.stat().st_size == HALF)
        assert TOKEN not in Path(f"/proc/{first.pid}/cmdline").read_text() if sys.platform == "linux" else True
        second = by_hand(there, home)
        assert second.stdout is not None and "waiting for another pull" in second.stdout.readline()
    finally:
        first.kill()
    first.communicate()
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and json.loads(said.splitlines()[-1]) == {"status": "success"}
    assert there.starts() == [0, HALF]


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on the size of files, as a shell sets it on Linux")
def test_rel_07_a_disk_that_is_full_ends_a_pull_cleanly(there: Hub, home: Path) -> None:
    """A limit on the size of a file stands for it. With room, it goes on where it stopped."""
    said, errors = by_hand(there, home, "bash", "-c", 'ulimit -f 1000; exec "$@"', "bash").communicate(timeout=60)
    assert "the disk of the Hugging Face cache is full" in json.loads(said.splitlines()[-1])["error"] and errors == ""
    assert models.current_snapshot(home / "cache" / "hub" / "models--org--tiny") is None
    said, _ = by_hand(there, home).communicate(timeout=60)
    assert json.loads(said.splitlines()[-1]) == {"status": "success"} and there.starts() == [0, 1000 * 1024]


@pytest.fixture
def running(daemon: Callable[..., Daemon], there: Hub, home: Path) -> Daemon:
    """A real server and fake engines."""
    d = daemon(server=None, **environment(there, home) | {"MLXD_HOME": str(home)})
    d.start()
    d.ready()
    return d


class Client:
    """Follows a pull in a thread, until its end or until it leaves."""

    def __init__(self, d: Daemon, name: str = NAME):
        self.lines: list[dict[str, Any]] = []
        self.http = http.client.HTTPConnection("127.0.0.1", d.status()["port"], timeout=60)
        self.http.connect()
        self.sock = self.http.sock
        self.name = name
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        with contextlib.suppress(http.client.HTTPException, OSError), contextlib.closing(self.http):
            self.http.request("POST", "/api/pull", json.dumps({"model": self.name}))
            for line in self.http.getresponse():
                self.lines.append(json.loads(line))

    def end(self) -> dict[str, Any]:
        self.thread.join(60)
        assert not self.thread.is_alive(), self.lines
        return self.lines[-1]

    def leave(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        self.thread.join(60)


def pids(d: Daemon) -> list[int]:
    return [one["pid"] for one in d.status().get("pullers", []) if one["pid"]]


def tags(d: Daemon) -> set[str]:
    return {model["name"] for model in json.loads(d.get("/api/tags")[2])["models"]}


def test_a_puller_is_shared_is_started_again_when_it_is_killed_and_outlives_servers_and_supervisors(
    running: Daemon, there: Hub
) -> None:
    d = running
    engines = [engine["pid"] for engine in d.status()["engines"]]
    there.faults["model.safetensors"] = Fault("stall", at=HALF)
    clients = [Client(d) for _ in range(3)]
    eventually(lambda: there.held.is_set(), "the puller at half", d.history)
    eventually(lambda: all(line_of(one) for one in clients), "lines for all", d.history)
    (pid,) = pids(d)
    assert tags(d) == {"mlxd-tiny:latest"}, "half a model is none"
    secret(d, pid)
    there.held.clear()
    there.faults["model.safetensors"] = Fault("stall", at=100_000)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: there.held.is_set(), "the next puller, further on", d.history)
    (pid,) = pids(d)
    assert d.mlxd("restart", "--supervisor").returncode == 0
    assert pids(d) == [pid]
    assert d.mlxd("restart").returncode == 0
    clients.append(Client(d))
    eventually(lambda: line_of(clients[-1]), "the same pull through the next server", d.history)
    assert pids(d) == [pid]
    there.held.clear()
    there.faults.clear()
    os.kill(pid, signal.SIGKILL)
    assert [one.end() for one in clients] == [{"status": "success"}] * 4
    assert tags(d) == {"mlxd-tiny:latest", "org/tiny:latest"}
    first, second, third = there.starts()
    assert (first, second) == (0, HALF) and third > HALF
    d.until("no puller", lambda told: not told["pullers"])
    assert [engine["pid"] for engine in d.status()["engines"]] == engines
    ends = [record["cause"] for record in d.exits() if record["child"] == "puller"]
    assert ends == ["killed", "killed", "stopped"]
    happened = [
        event["event"] for event in map(json.loads, d.paths.events.read_text().splitlines()) if event["child"] == "puller-1"
    ]
    assert happened == ["readied", "died", "readied", "died", "readied", "pulled", "ended"]


def line_of(client: Client) -> bool:
    return any("digest" in line for line in client.lines)


def secret(d: Daemon, pid: int) -> None:
    """The token is with the puller alone, and on no command line and in no log."""
    for process in d.ours():
        environ = process.environ()
        if process.pid != d.status()["supervisor"]["pid"] and process.pid not in [p.pid for p in d.processes]:
            assert (TOKEN in environ.values()) == (process.pid == pid), process
        assert TOKEN not in " ".join(process.cmdline())
    assert not [log for log in d.paths.logs.iterdir() if TOKEN in log.read_text(errors="replace")]


def test_the_last_client_that_leaves_ends_the_puller_and_a_stop_does_too(running: Daemon, there: Hub) -> None:
    """No more than two run at once. A server that is killed takes its clients with it. After a new start it goes on."""
    d = running
    for name in ("org/a", "org/b"):
        there.repositories[name] = builtin_repository()
    there.faults["model.safetensors"] = Fault("stall", times=3, at=HALF)
    clients = [Client(d, name) for name in (NAME, "org/a")]
    d.until("two pullers", lambda told: [one["state"] for one in told["pullers"]] == ["ready", "ready"])
    third = Client(d, "org/b")
    eventually(lambda: {"status": "waiting for other downloads to end"} in third.lines, "the third waits", d.history)
    both = pids(d)
    eventually(lambda: len(there.starts()) == 2, "both at half", d.history)
    assert d.mlxd("restart", "--supervisor").returncode == 0
    assert pids(d) == both and len(d.status()["pullers"]) == 3
    clients[0].leave()
    d.until("the third is begun", lambda told: [one["model"] for one in told["pullers"]] == ["org/a", "org/b"])
    eventually(lambda: len(there.starts()) == 3, "the third at half", d.history)
    server = d.status()["server"]["pid"]
    os.kill(server, signal.SIGKILL)
    d.until("no puller, and another server", lambda told: not told["pullers"] and told["server"]["pid"] not in (None, server))
    d.ready()
    there.faults["model.safetensors"] = Fault("stall", at=1000)
    last = Client(d)
    eventually(lambda: len(there.starts()) == 4, "it goes on", d.history)
    assert there.starts()[-1] > 0
    os.kill(d.status()["supervisor"]["pid"], signal.SIGTERM)
    assert "mlxd is stopping" in last.end()["error"]
    d.processes[0].wait(60)
    d.start()
    d.ready()
    there.faults["model.safetensors"] = Fault("stall", at=1000)
    typed = Background(lambda: d.mlxd("pull", NAME))
    eventually(lambda: len(there.starts()) == 5, "the command's", d.history)
    os.kill(d.status()["server"]["pid"], signal.SIGKILL)
    assert typed.result().stdout == f"pulled  {NAME}\n", "the command asks the next server"
    assert there.starts()[-1] > 0 and tags(d) == {"mlxd-tiny:latest", "org/tiny:latest"}


def test_a_puller_ends_when_its_supervisor_is_killed(running: Daemon, there: Hub) -> None:
    d = running
    there.faults["model.safetensors"] = Fault("stall", at=HALF)
    client = Client(d)
    eventually(there.held.is_set, "the puller at half", d.history)
    os.kill(d.status()["supervisor"]["pid"], signal.SIGKILL)
    eventually(lambda: not d.ours(), "nobody of it", d.history)
    client.thread.join(60)


def test_a_puller_that_dies_and_dies_is_given_up_and_the_client_is_told(
    daemon: Callable[..., Daemon], there: Hub, home: Path
) -> None:
    """One that cannot import its library."""
    (home / "broken").mkdir()
    (home / "broken" / "httpx2.py").write_text("raise ImportError('broken')\n")
    d = daemon(server=None, **environment(there, home) | {"MLXD_HOME": str(home), "PYTHONPATH": str(home / "broken")})
    d.start()
    d.ready()
    assert "its download died again and again (import)" in Client(d).end()["error"]
    d.until("no puller", lambda told: not told["pullers"])
    assert len(d.exits()) == 5
    assert d.mlxd("pull", NAME).returncode == 1


def test_an_address_that_is_none_is_said_by_its_name(daemon: Callable[..., Daemon], there: Hub, home: Path) -> None:
    d = daemon(server=None, **environment(there, home) | {"MLXD_HOME": str(home), "HF_ENDPOINT": "nonsense"})
    d.start()
    d.ready()
    assert Client(d).end() == {"error": "HF_ENDPOINT must be a URL such as http://localhost:11434, not 'nonsense'"}
    done = d.mlxd("pull", NAME)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "Error: HF_ENDPOINT must be a URL such as http://localhost:11434, not 'nonsense'"


# --- the command line -------------------------------------------------------------------------------------------------------------


def test_mlxd_pull_brings_a_model_that_then_answers_with_the_real_engine(
    daemon: Callable[..., Daemon], there: Hub, home: Path
) -> None:
    """First without a daemon, then through one, which asks for a token. The hub's is in `.env`, which is the daemon's own."""
    outside = {name: value for name, value in environment(there, home).items() if name != "HF_TOKEN"}
    (home / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
    d = daemon(server=None, engine=None, **outside | {"MLXD_HOME": str(home)})
    wrong = d.mlxd("pull", "org/nothing")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.splitlines()[-1].startswith("Error: model 'org/nothing' not found on 127.0.0.1")
    done = d.mlxd("pull", NAME)
    assert (done.returncode, done.stdout) == (0, f"pulled  {NAME}\n")
    assert "\x1b" not in done.stderr and "writing manifest" in done.stderr.splitlines()
    shutil.rmtree(home / "cache")
    (home / "token").write_text("admin administrator-0123\n")
    (home / "token").chmod(0o600)
    d.start()
    d.ready()
    done = d.mlxd("pull", NAME, "--json")
    assert done.returncode == 0 and done.stderr == ""
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert said[0] == {"status": "pulling manifest"} and said[-1] == {"status": "success"}
    assert {seen.token for seen in there.seen if seen.where == "hub"} == {f"Bearer {TOKEN}"}
    packaged = ollama.Client(d.status()["url"], headers={"Authorization": "Bearer administrator-0123"})
    there.repositories[NAME].files["LICENSE"] = b"Do as we like.\n"
    assert [part.status for part in packaged.pull(NAME, stream=True)][-1] == packaged.pull(NAME).status == "success"
    with httpx.Client(base_url=d.status()["url"], timeout=60, trust_env=False) as asking:
        asking.headers["Authorization"] = "Bearer administrator-0123"
        body = {"messages": [{"role": "user", "content": "What is mlxd?"}], "stream": False, "options": {"temperature": 0}}
        answers = [asking.post("/api/chat", json=body | {"model": name}).json() for name in (NAME, "mlxd-tiny")]
    assert answers[0]["message"]["content"] == answers[1]["message"]["content"] != ""


def test_no_file_of_the_current_directory_is_run(there: Hub, home: Path, tmp_path: Path) -> None:
    """A cloned repository is such a directory."""
    (tmp_path / "httpx2.py").write_text("open('canary', 'w')\nraise SystemExit('shadowed')\n")
    command = [str(Path(sys.executable).with_name("mlxd")), "pull", NAME]
    done = subprocess.run(command, env=os.environ | environment(there, home), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "canary").exists()


def test_on_a_terminal_there_is_a_bar_and_ctrl_c_ends_it_with_a_sentence(there: Hub, home: Path) -> None:
    there.faults["model.safetensors"] = Fault("stall", at=HALF)
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxd", "pull", NAME],
        env=os.environ | environment(there, home) | {"TERM": "xterm", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=end,
    )
    os.close(end)
    shown = b""
    try:
        while b"/2.7 MB" not in shown:
            shown += os.read(terminal, 65536)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # Linux: its end is closed
            while more := os.read(terminal, 65536):
                shown += more
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert (process.returncode, out) == (1, b"")
    assert b"pulling manifest" in shown and b"\x1b" in shown
    assert shown.decode().splitlines()[-1].endswith(f"Error: interrupted; `mlxd pull {NAME}` goes on where it stopped")
