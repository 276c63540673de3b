"""Other names of models: the file they are kept in, and what they do in every dialect."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_client import Supervised, make_model, supervised

from mlxd import aliases
from mlxd.aliases import Alias, Aliases, Parameters
from mlxd.errors import Refused
from mlxd.messages import Release, Sampling, Want
from mlxd.models import Catalogue


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    make_model(tmp_path / "models" / "real")
    make_model(tmp_path / "models" / "other")
    return Catalogue(str(tmp_path / "models"), {"HF_HUB_CACHE": str(tmp_path / "hub")}, Aliases(tmp_path / "aliases.json"))


def refusal(call: Any, *arguments: Any, **more: Any) -> tuple[int, str]:
    with pytest.raises(Refused) as refused:
        call(*arguments, **more)
    return refused.value.status, refused.value.message


def names(catalogue: Catalogue) -> set[str]:
    return {model.name for model in catalogue.scan() if not model.builtin}


# --- the catalogue with them -------------------------------------------------------------------------------------------------------


def test_an_alias_is_the_model_under_another_name(catalogue: Catalogue) -> None:
    catalogue.define("Claude-X", "real", system="s")
    found, real = catalogue.find("claude-x"), catalogue.find("real")
    assert (found.name, found.weights, found.directory) == ("Claude-X:latest", real, real.directory)
    assert len(found.digest) == 64
    assert found.digest != real.digest
    assert found.modified_at > real.modified_at
    assert catalogue.known("CLAUDE-X:latest") == found
    assert names(catalogue) == {"real:latest", "other:latest", "Claude-X:latest"}
    assert catalogue.scan()[0].name == "Claude-X:latest"


def test_a_mere_copy_has_the_digest_of_the_model_and_a_digest_tells_settings_apart(catalogue: Catalogue) -> None:
    catalogue.define("copy", "real")
    catalogue.define("a", "real", Parameters(seed=1))
    catalogue.define("b", "real", Parameters(seed=1))
    catalogue.define("c", "real", Parameters(seed=2))
    catalogue.define("d", "other", Parameters(seed=1))
    digests = {name: catalogue.find(name).digest for name in ("real", "copy", "a", "b", "c", "d")}
    assert digests["copy"] == digests["real"]
    assert digests["a"] == digests["b"]
    assert len(set(digests.values())) == 4


def test_an_alias_of_an_alias_keeps_what_it_does_not_say_itself(catalogue: Catalogue) -> None:
    catalogue.define("one", "real", Parameters(seed=1, top_k=5), system="first", license=["l"])
    catalogue.define("two", "one", Parameters(top_k=7), system="second")
    catalogue.aliases.remove("one:latest")
    two = catalogue.find("two")
    assert two.alias is not None
    assert (two.alias.base, two.alias.system, two.alias.license) == ("real:latest", "second", ["l"])
    assert two.alias.parameters == Parameters(seed=1, top_k=7)


def test_an_alias_of_itself_changes_it_and_no_alias_leads_to_an_alias(catalogue: Catalogue) -> None:
    catalogue.define("a", "real")
    catalogue.define("b", "a", system="b")
    catalogue.define("a", "b", system="a")
    catalogue.define("a", "a", Parameters(seed=3))
    found = catalogue.find("a").alias
    assert found is not None
    assert (found.base, found.system, found.parameters.seed) == ("real:latest", "a", 3)
    assert {alias.base for alias in catalogue.aliases.all().values()} == {"real:latest"}


def test_the_name_of_a_model_is_no_alias_also_of_a_broken_one(tmp_path: Path, catalogue: Catalogue) -> None:
    (tmp_path / "models" / "other" / "config.json").write_text("{")
    for name in ("REAL", "other", "mlxd-tiny"):
        status, sentence = refusal(catalogue.define, name, "real")
        assert (status, "is the name of a model" in sentence) == (400, True)
    assert refusal(catalogue.define, "x", "other")[0] == 400
    assert refusal(catalogue.define, "x", "nope") == (404, "model 'nope' not found")
    assert refusal(catalogue.define, "../x", "real") == (400, "invalid model name")
    assert catalogue.aliases.all() == {}


def test_a_model_that_comes_under_the_name_of_an_alias_goes_first(tmp_path: Path, catalogue: Catalogue) -> None:
    catalogue.define("later", "real")
    make_model(tmp_path / "models" / "later")
    assert catalogue.find("later").alias is None
    assert [model.name for model in catalogue.scan()].count("later:latest") == 1


def test_an_alias_without_its_model_is_a_404_until_the_model_is_back(tmp_path: Path, catalogue: Catalogue) -> None:
    catalogue.define("alias", "real")
    directory = tmp_path / "models" / "real"
    directory.rename(tmp_path / "away")
    assert catalogue.known("alias") is None
    assert refusal(catalogue.find, "alias") == (404, "model 'alias' not found")
    assert names(catalogue) == {"other:latest"}
    (tmp_path / "away").rename(directory)
    assert catalogue.find("alias").weights.name == "real:latest"


def test_an_alias_of_a_broken_model_says_what_is_wrong(tmp_path: Path, catalogue: Catalogue) -> None:
    catalogue.define("alias", "real")
    (tmp_path / "models" / "real" / "tokenizer.json").unlink()
    assert refusal(catalogue.find, "alias") == (
        400,
        "model 'alias' cannot be loaded: tokenizer.json is missing; download the model again",
    )
    assert "alias:latest" not in names(catalogue)


def test_what_is_asked_counts_over_the_alias_and_the_alias_over_the_usual(catalogue: Catalogue) -> None:
    catalogue.define("a", "real", Parameters(temperature=0.1, repeat_last_n=-1, seed=-1, num_ctx=99, stop=["x"]))
    usual = Sampling(seed=7, temperature=0.8, top_k=40)
    drawn = catalogue.find("a").sampling(usual, top_k=3, top_p=None, temperature=None)
    assert drawn == Sampling(seed=7, temperature=0.1, top_k=3, penalty_last_n=-1)
    assert catalogue.find("real").sampling(usual, temperature=0.0) == Sampling(seed=7, temperature=0.0, top_k=40)


TEXT = {"role": "user", "content": "t"}
OTHER = {"role": "system", "content": "other"}


def test_a_conversation_begins_as_the_alias_has_it_and_its_own_system_text_counts() -> None:
    alias = Alias("a", "b", 0.0, system="mine", messages=[{"role": "user", "content": "before"}])
    mine = {"role": "system", "content": "mine"}
    assert alias.begin([TEXT], False) == [mine, *alias.messages, TEXT]
    assert alias.begin([OTHER, TEXT], False) == [OTHER, *alias.messages, TEXT]
    assert alias.begin([TEXT, OTHER], False) == [mine, *alias.messages, TEXT, OTHER]
    assert alias.begin([TEXT], True) == [mine, TEXT]


# --- the file -----------------------------------------------------------------------------------------------------------------------


def test_the_file_is_private_whole_and_seen_by_another_server(tmp_path: Path) -> None:
    path = tmp_path / "aliases.json"
    one, two = Aliases(path), Aliases(path)
    one.put(Alias("A:latest", "real:latest", 1.0, system="s"))
    assert two.known("a:latest") is None  # not read yet
    assert two.all()["a:latest"].system == "s"
    assert two.known("a:latest") is not None
    two.put(Alias("B:latest", "real:latest", 2.0))
    assert one.known("a:latest") is None  # the file has changed
    assert set(one.all()) == {"a:latest", "b:latest"}
    one.put(Alias("a:latest", "real:latest", 3.0))  # the last word on a name counts
    assert (two.all()["a:latest"].system, len(two.all())) == ("", 2)
    assert one.remove("b:latest")
    assert not one.remove("b:latest")
    assert set(two.all()) == {"a:latest"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aliases.json", "aliases.lock"]


WRITER = """
import sys
from pathlib import Path
from mlxd.aliases import Alias, Aliases
store = Aliases(Path(sys.argv[1]))
for number in range(20):
    store.put(Alias(f"{sys.argv[2]}{number}", "real:latest", 0.0))
"""


def test_two_processes_that_write_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "aliases.json"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert set(Aliases(path).all()) == {f"{name}{number}" for name in "abc" for number in range(20)}


@pytest.mark.parametrize(
    "text", ["{", "5", '[{"name": 1}]', '[{"name": "a", "base": "b", "modified_at": 0, "parameters": {"seed": "x"}}]']
)
def test_a_file_that_is_no_list_of_aliases_is_as_none_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    path = tmp_path / "aliases.json"
    path.write_text(text)
    store = Aliases(path)
    assert (store.all(), store.all()) == ({}, {})
    assert caplog.text.count("no alias is known: aliases.json in the state directory: ") == 1
    status, sentence = refusal(store.put, Alias("a", "b", 0.0))
    assert (status, "mend or remove it" in sentence) == (500, True)
    assert path.read_text() == text


def test_aliases_are_limited_in_number_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Aliases(tmp_path / "aliases.json")
    assert refusal(store.put, Alias("a", "b", 0.0, system="x" * aliases.MOST_BYTES))[0] == 400
    monkeypatch.setattr(aliases, "MOST", 2)
    for name in "ab":
        store.put(Alias(name, "real", 0.0))
    assert refusal(store.put, Alias("c", "real", 0.0)) == (400, "there are 2 aliases, and no more may be: delete one first")
    store.put(Alias("a", "real", 1.0))
    assert set(store.all()) == {"a", "b"}


def test_a_lock_that_is_held_is_a_503_and_no_state_directory_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliases, "PATIENCE_S", 0.05)
    store = Aliases(tmp_path / "aliases.json")
    with store.changing():
        assert refusal(Aliases(store.path).put, Alias("a", "b", 0.0))[0] == 503
    assert refusal(Aliases().put, Alias("a", "b", 0.0))[0] == 503
    status, sentence = refusal(Aliases(tmp_path / "nowhere" / "aliases.json").put, Alias("a", "b", 0.0))
    assert (status, "No such file" in sentence) == (500, True)


# --- over HTTP ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Supervised]:
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home, supervised(Path(home), ("tiny", "caller")) as running:
        yield running


@pytest.fixture
def client(server: Supervised) -> Iterator[httpx.Client]:
    with server.client() as made:
        yield made
        for model in made.get("/api/tags").json()["models"]:
            if model["details"]["parent_model"]:
                assert made.request("DELETE", "/api/delete", json={"model": model["name"]}).status_code == 200


def create(client: httpx.Client, **more: Any) -> httpx.Response:
    return client.post("/api/create", json={"model": "pirate", "from": "tiny"} | more)


def echoed(client: httpx.Client, path: str, **more: Any) -> dict[str, Any]:
    """What the engine was asked."""
    asked = {"prompt": "echo"} if path == "/api/generate" else {"messages": [{"role": "user", "content": "echo"}]}
    answer = client.post(path, json={"model": "pirate", "stream": False} | asked | more).json()
    message = answer.get("message") or answer.get("choices", [{}])[0].get("message") or {"content": answer.get("response")}
    return json.loads(message["content"])  # type: ignore[no-any-return]


DIALECTS = ["/api/chat", "/api/generate", "/v1/chat/completions"]
SPOKEN = {
    "system": "Talk like a pirate.",
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Arr"}],
    "parameters": {
        "temperature": 0.2,
        "top_k": 5.0,
        "seed": 7,
        "stop": ["x"],
        "num_predict": 9,
        "num_ctx": 64,
        "repeat_penalty": 1.5,
    },
}


@pytest.mark.parametrize("path", DIALECTS)
def test_what_an_alias_says_holds_in_every_dialect_where_the_request_says_nothing(client: httpx.Client, path: str) -> None:
    assert create(client, **SPOKEN).status_code == 200
    got = echoed(client, path)
    system = {"role": "system", "content": SPOKEN["system"]}
    assert got["messages"] == [system, *SPOKEN["messages"], {"role": "user", "content": "echo"}]
    sampling = {"temperature": 0.2, "top_k": 5, "seed": 7, "repeat_penalty": 1.5}
    assert got["sampling"].items() >= sampling.items()
    assert (got["stop"], got["max_tokens"], got["num_ctx"]) == (["x"], 9, 64)


@pytest.mark.parametrize("path", DIALECTS)
def test_what_a_request_says_counts_over_its_alias(client: httpx.Client, path: str) -> None:
    create(client, **SPOKEN)
    own = {"role": "system", "content": "Talk."}
    asked: dict[str, Any] = {"temperature": 0.8, "stop": ["y"], "seed": 1}
    asked |= {"max_tokens": 3} if path == "/v1/chat/completions" else {"num_predict": 3, "num_ctx": 99}
    asked = asked if path == "/v1/chat/completions" else {"options": asked}
    asked |= {"system": "Talk."} if path == "/api/generate" else {"messages": [own, {"role": "user", "content": "echo"}]}
    got = echoed(client, path, **asked)
    assert got["messages"] == [own, *SPOKEN["messages"], {"role": "user", "content": "echo"}]
    assert (got["sampling"]["temperature"], got["sampling"]["seed"], got["sampling"]["top_k"]) == (0.8, 1, 5)
    assert (got["stop"], got["max_tokens"]) == (["y"], 3)
    if path != "/v1/chat/completions":
        assert got["num_ctx"] == 99


def test_a_raw_prompt_gets_the_options_of_an_alias_and_none_of_its_words(client: httpx.Client) -> None:
    create(client, **SPOKEN)
    got = echoed(client, "/api/generate", raw=True)
    assert (got["prompt"], got["messages"], got["sampling"]["temperature"]) == ("echo", None, 0.2)
    got = echoed(client, "/api/generate", context=[1, 2])
    assert (got["context_ids"], len(got["messages"])) == ([1, 2], 2)


def test_a_random_seed_may_be_asked_of_an_alias_with_a_fixed_one(client: httpx.Client) -> None:
    create(client, **SPOKEN)
    seeds = {echoed(client, "/api/chat", options={"seed": -1})["sampling"]["seed"] for _ in range(2)}
    assert len(seeds) == 2


def test_an_alias_loads_nothing_twice_and_is_shown_where_models_are(client: httpx.Client, server: Supervised) -> None:
    create(client, **SPOKEN)
    client.post("/api/copy", json={"source": "pirate", "destination": "org/Copy:v1"})
    before = server.count(Want)
    assert client.post("/api/chat", json={"model": "tiny", "messages": []}).json()["done_reason"] == "load"
    wanted = server.count(Want)
    for name in ("pirate", "Org/copy:V1"):
        answer = client.post("/api/chat", json={"model": name, "stream": False, "messages": [{"role": "user", "content": "n=1"}]})
        assert (answer.json()["model"], answer.json()["message"]["content"]) == (name, "w0 ")
    assert server.count(Want) == wanted <= before + 1
    tags = {model["name"]: model for model in client.get("/api/tags").json()["models"]}
    running = {model["name"]: model for model in client.get("/api/ps").json()["models"]}
    assert running.keys() == {"tiny:latest", "pirate:latest", "org/Copy:v1"}
    for name in ("pirate:latest", "org/Copy:v1"):
        assert tags[name]["details"]["parent_model"] == "tiny:latest"
        assert running[name] | tags[name] == running[name]
        assert running[name]["expires_at"] == running["tiny:latest"]["expires_at"]
        assert client.get(f"/v1/models/{name}").json()["id"] == name
    assert tags["pirate:latest"]["digest"] == tags["org/Copy:v1"]["digest"] != tags["tiny:latest"]["digest"]
    assert {"pirate:latest", "org/Copy:v1"} <= {model["id"] for model in client.get("/v1/models").json()["data"]}
    assert client.post("/api/generate", json={"model": "pirate", "keep_alive": 0}).json()["done_reason"] == "unload"
    assert client.get("/api/ps").json() == {"models": []}


def test_create_streams_its_statuses_and_show_reports_what_was_said(client: httpx.Client) -> None:
    answer = create(client, **SPOKEN, template="{{ .Prompt }}", license=["MIT", "BSD"])
    assert answer.headers["content-type"] == "application/x-ndjson"
    statuses = [json.loads(line)["status"] for line in answer.text.splitlines()]
    assert statuses[1:] == ["writing manifest", "success"]
    shown = client.post("/api/show", json={"name": "PIRATE"}).json()
    assert (shown["system"], shown["template"], shown["license"]) == (SPOKEN["system"], "{{ .Prompt }}", "MIT\nBSD")
    assert shown["messages"] == SPOKEN["messages"]
    parameters = dict(line.split(maxsplit=1) for line in shown["parameters"].splitlines())
    assert parameters == {
        "temperature": "0.2",
        "top_k": "5",
        "seed": "7",
        "repeat_penalty": "1.5",
        "num_ctx": "64",
        "num_predict": "9",
        "stop": '"x"',
    }
    lines = shown["modelfile"].splitlines()
    assert (lines[0], lines[-3]) == ("FROM tiny:latest", 'SYSTEM """Talk like a pirate."""')
    assert shown["details"]["parent_model"] == "tiny:latest"
    assert shown["model_info"]["general.basename"] == "pirate"
    assert create(client, stream=False).json() == {"status": "success"}


REFUSALS: list[tuple[dict[str, Any], int, str]] = [
    ({"model": ""}, 400, "model is required"),
    ({"model": "a b"}, 400, "invalid model name"),
    ({"model": "tiny"}, 400, "tiny:latest is the name of a model"),
    ({"from": None}, 400, "neither 'from' or 'files' was specified"),
    ({"from": "nope"}, 404, "model 'nope' not found"),
    ({"from": 5}, 400, "from: expected string"),
    ({"files": {"model.safetensors": "sha256:0"}}, 400, "files: mlxd makes no weights"),
    ({"adapters": {"a": "sha256:0"}}, 400, "adapters: mlxd makes no weights"),
    ({"quantize": "q4_K_M"}, 400, "quantize: mlxd makes no weights"),
    ({"parameters": {"temperature": "hot"}}, 400, 'option "temperature" must be of type float32'),
    ({"parameters": {"typical_p": 0.5}}, 400, 'option "typical_p" is not supported'),
    ({"parameters": []}, 400, "parameters: expected object"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0]: object missing required field content"),
    ({"license": 5}, 400, "license"),
    ({"system": "x" * aliases.MOST_BYTES}, 400, "pirate:latest has settings of more than 131072 bytes"),
]


@pytest.mark.parametrize(("change", "status", "sentence"), REFUSALS, ids=lambda value: str(value)[:40])
def test_what_cannot_be_created_is_refused(client: httpx.Client, change: dict[str, Any], status: int, sentence: str) -> None:
    answer = create(client, **change)
    assert (answer.status_code, sentence in answer.json()["error"]) == (status, True), answer.text
    assert client.post("/api/show", json={"model": "pirate"}).status_code == 404


@pytest.mark.parametrize(
    ("call", "status", "sentence"),
    [
        ({"source": "tiny"}, 400, "destination: model is required"),
        ({"destination": "x"}, 400, "source: model is required"),
        ({"source": "tiny", "destination": "a b"}, 400, "destination: invalid model name"),
        ({"source": "tiny", "destination": "caller"}, 400, "caller:latest is the name of a model"),
        ({"source": "nope", "destination": "x"}, 404, "model 'nope' not found"),
        ({"source": "nope", "destination": "nope"}, 404, "model 'nope' not found"),
    ],
)
def test_what_cannot_be_copied_is_refused(client: httpx.Client, call: dict[str, Any], status: int, sentence: str) -> None:
    answer = client.post("/api/copy", json=call)
    assert (answer.status_code, sentence in answer.json()["error"]) == (status, True), answer.text


def test_a_copy_answers_with_nothing_and_onto_itself_does_nothing(client: httpx.Client) -> None:
    for destination in ("claude-sonnet", "TINY:latest"):
        answer = client.post("/api/copy", json={"source": "tiny", "destination": destination})
        assert (answer.status_code, answer.content) == (200, b"")


def test_another_server_sees_what_the_first_has_written(server: Supervised, client: httpx.Client) -> None:
    create(client, system="s")
    file = server.home / "aliases.json"
    Aliases(file).put(Alias("by-hand:latest", "tiny:latest", 0.0))
    names = {model["name"] for model in client.get("/api/tags").json()["models"]}
    assert {"pirate:latest", "by-hand:latest"} <= names
    Aliases(file).remove("pirate:latest")
    assert client.post("/api/show", json={"model": "pirate"}).status_code == 404


# --- deleting -----------------------------------------------------------------------------------------------------------------------


def rm(client: httpx.Client, name: str) -> tuple[int, Any]:
    answer = client.request("DELETE", "/api/delete", json={"name": name})
    return answer.status_code, answer.json()["error"] if answer.content else None


def test_deleting_an_alias_leaves_the_model_and_deleting_nothing_is_a_404(client: httpx.Client) -> None:
    create(client)
    assert rm(client, "PIRATE:latest") == (200, None)
    assert rm(client, "pirate") == (404, "model 'pirate' not found")
    assert client.post("/api/show", json={"model": "tiny"}).status_code == 200
    assert rm(client, "") == (400, "model is required")
    assert rm(client, "../tiny") == (400, "invalid model name")
    assert rm(client, "mlxd-tiny") == (400, "mlxd-tiny:latest is a part of mlxd and cannot be deleted")


def test_a_deleted_model_is_gone_once_its_streams_have_ended_and_so_are_its_aliases(home: Path) -> None:
    with supervised(home, ("org/doomed", "kept")) as server, server.client() as client:
        client.post("/api/copy", json={"source": "org/doomed", "destination": "alias"})
        call = {"model": "alias", "messages": [{"role": "user", "content": "n=30 delay=0.02"}]}
        with client.stream("POST", "/api/chat", json=call) as answer:
            lines = answer.iter_lines()
            next(lines)
            with server.client() as other:
                assert rm(other, "org/doomed") == (200, None)
            said = [json.loads(line) for line in lines]
        assert (said[-1]["done_reason"], len(said)) == ("stop", 30)
        assert not (home / "models" / "org" / "doomed").exists()
        assert server.count(Release) == 1
        for name in ("org/doomed", "alias"):
            assert client.post("/api/chat", json=call | {"model": name}).status_code == 404
        names = [model["name"] for model in client.get("/api/tags").json()["models"]]
        assert [name for name in names if "mlxd" not in name] == ["kept:latest"]
        assert rm(client, "alias") == (200, None)
        assert rm(client, "alias")[0] == 404


def test_a_model_that_stays_busy_is_not_deleted(home: Path) -> None:
    settings: dict[str, Any] = {"server": {"queue_wait_s": 0.2}}
    with supervised(home, ("busy",), **settings) as server, server.client() as client:
        call = {"model": "busy", "messages": [{"role": "user", "content": "n=999 delay=0.1"}]}
        with client.stream("POST", "/api/chat", json=call) as answer:
            lines = answer.iter_lines()  # held: one that is dropped closes the connection
            next(lines)
            with server.client() as other:
                assert rm(other, "busy") == (503, "busy:latest is busy; please try again")
        assert (home / "models" / "busy").exists()


def test_a_broken_model_can_be_deleted_and_of_a_link_only_the_link_is(home: Path) -> None:
    with supervised(home, ("broken",)) as server, server.client() as client:
        (home / "models" / "broken" / "config.json").write_text("{")
        outside = make_model(home / "elsewhere" / "far")
        (home / "models" / "linked").symlink_to(outside)
        (home / "models" / "org").symlink_to(home / "elsewhere")
        assert client.post("/api/show", json={"model": "org/far"}).status_code == 200
        assert rm(client, "broken") == (200, None)
        assert rm(client, "linked") == (200, None)
        status, sentence = rm(client, "org/far")
        assert (status, "outside the models directory" in sentence) == (400, True)
        assert outside.exists()
        assert [path.name for path in (home / "models").iterdir()] == ["org"]


def test_a_model_of_the_hugging_face_cache_is_deleted_by_its_own_rules(home: Path) -> None:
    with supervised(home, ()) as server, server.client() as client:
        repository = home / "hub" / "models--org--hubbed"
        revision = "0123456789abcdef" * 2 + "01234567"
        blobs = make_model(repository / "blobs")
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir(parents=True)
        for file in blobs.iterdir():
            (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)
        assert client.post("/api/show", json={"model": "org/hubbed"}).status_code == 200
        assert rm(client, "org/hubbed") == (200, None)
        assert not repository.exists()
        assert rm(client, "org/hubbed")[0] == 404
