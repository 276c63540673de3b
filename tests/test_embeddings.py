"""Embeddings, from the arithmetic to the client packages: the built-in model, and a tiny BERT that is made here."""

from __future__ import annotations

import base64
import json
import math
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import mlx_lm.utils
import msgspec
import numpy as np
import ollama
import openai
import pytest
from engine_client import DEADLINE_S, PLENTY, EngineProcess, Wire, make_tiny_model, spoil_row
from server_client import Background, RealEngine, Supervised, supervised, until

import mlxd
from mlxd import messages
from mlxd.api import vectors
from mlxd.config import Config
from mlxd.engine import bert
from mlxd.engine.batch import Batch
from mlxd.engine.embedding import Embedder, Texts, groups, read_pooling
from mlxd.engine.service import Service
from mlxd.engine.view import make_view
from mlxd.messages import Bye, Embed, Event, Load, Loaded, Sampling, Submit
from mlxd.modelfiles import Broken

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from make_tiny_bert import CONTEXT_TOKENS, SHAPE, make, make_tokenizer

BUILTIN = Path(mlxd.__file__).parent / "builtin"
TEXTS = ["the supervisor", "one engine owns one model, and every request is the server's", "x", "Ünïcode 42!"]


def ids_of(text: str) -> list[int]:
    return make_tokenizer().encode(text).ids  # type: ignore[no-any-return]


def numbers(vector: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))


def close(a: Any, b: Any, within: float = 1e-5) -> bool:
    return bool(np.abs(np.asarray(a) - np.asarray(b)).max() < within)


# --- the arithmetic ----------------------------------------------------------------------------------------------------------------


def oracle(directory: Path, ids: list[int], pooling: str, first_position: int = 0, heads: int = 4) -> Any:
    """BERT once more, one text at a time, from its paper and in numpy alone."""
    loaded: Any = mx.load(str(directory / "model.safetensors"))
    w = {name.removeprefix("bert.").removeprefix("roberta."): np.array(value, np.float64) for name, value in loaded.items()}

    def linear(x: Any, name: str) -> Any:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Any, name: str) -> Any:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    e = "embeddings"
    x = np.stack([w[f"{e}.word_embeddings.weight"][i] for i in ids])
    x = (
        x
        + w[f"{e}.position_embeddings.weight"][first_position : first_position + len(ids)]
        + w[f"{e}.token_type_embeddings.weight"][0]
    )
    x = norm(x, f"{e}.LayerNorm")
    for number in range(SHAPE["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        q, k, v = (np.split(linear(x, f"{layer}.attention.self.{part}"), heads, axis=-1) for part in ("query", "key", "value"))
        mixed = []
        for a, b, c in zip(q, k, v, strict=True):
            scores = np.exp(a @ b.T / math.sqrt(a.shape[-1]))
            mixed.append(scores / scores.sum(-1, keepdims=True) @ c)
        x = norm(x + linear(np.concatenate(mixed, -1), f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        up = linear(x, f"{layer}.intermediate.dense")
        up = up * np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))(up)
        x = norm(x + linear(up, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    pooled = {"mean": x.mean(0), "cls": x[0], "last": x[-1]}[pooling]
    return pooled / np.linalg.norm(pooled)


def encoder(directory: Path, view: Path) -> Embedder:
    return Embedder(bert.load(view, make_view(directory, view)), read_pooling(directory))


def embedded(embedder: Embedder, ids: list[list[int]], budget: int = 512) -> list[list[float]]:
    texts = Texts(None, ids)
    assert sum(embedder.embed(texts, budget)) == texts.tokens
    return [numbers(vector) for vector in texts.vectors]


@pytest.mark.parametrize(
    ("pooling", "asked", "prefix"),
    [("mean", None, ""), ("mean", "mean_tokens", "bert."), ("cls", "cls_token", ""), ("last", "lasttoken", "bert.")],
)
def test_a_bert_agrees_with_a_second_implementation(tmp_path: Path, pooling: str, asked: str | None, prefix: str) -> None:
    directory = make(tmp_path / "m", prefix=prefix, pooling=asked)
    ids = [ids_of(text) for text in TEXTS]
    got = embedded(encoder(directory, tmp_path / "view"), ids)
    assert all(close(one, oracle(directory, text, pooling)) for one, text in zip(got, ids, strict=True))


def test_a_roberta_counts_positions_from_its_padding(tmp_path: Path) -> None:
    changes = {"model_type": "xlm-roberta", "pad_token_id": 1, "type_vocab_size": 1}
    directory = make(tmp_path / "m", prefix="roberta.", **changes)
    made = bert.load(tmp_path / "view", make_view(directory, tmp_path / "view"))
    assert made.context_length == CONTEXT_TOKENS - 2
    assert close(embedded(Embedder(made, "mean"), [[5, 6, 7]])[0], oracle(directory, [5, 6, 7], "mean", first_position=2))


def test_a_padded_text_has_the_vector_that_it_has_alone(tmp_path: Path) -> None:
    embedder = encoder(make(tmp_path / "m"), tmp_path / "view")
    ids = [ids_of(text) for text in TEXTS]
    assert close(embedded(embedder, ids), [embedded(embedder, [one])[0] for one in ids], 1e-6)


def test_a_quantised_bert_is_nearly_the_same(tmp_path: Path) -> None:
    directory = make(tmp_path / "m")
    ids = [ids_of(text) for text in TEXTS]
    exact = embedded(encoder(directory, tmp_path / "view"), ids)
    weights: Any = dict(mx.load(str(directory / "model.safetensors")))
    for name in [name for name in weights if "encoder" in name and weights[name].ndim == 2]:
        stem = name.removesuffix("weight")
        weights[name], weights[f"{stem}scales"], weights[f"{stem}biases"] = mx.quantize(weights[name], group_size=32, bits=8)
    mx.eval(weights)
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(SHAPE | {"quantization": {"group_size": 32, "bits": 8}}))
    assert 1e-6 < np.abs(np.array(embedded(encoder(directory, tmp_path / "view"), ids)) - exact).max() < 0.05


@pytest.fixture(scope="module")
def causal() -> Any:
    return mlx_lm.utils.load_model(BUILTIN)[0]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_causal_models_states_are_pooled_whatever_shares_their_step(causal: Any, pooling: Any) -> None:
    ids = [[(7 * i + 31 * n) % 900 + 10 for i in range(length)] for n, length in enumerate((3, 40, 17, 1))]
    states = [np.array(causal.model(mx.array([one])))[0] for one in ids]
    expected = [state.mean(0) if pooling == "mean" else state[-1] for state in states]
    expected = [vector / np.linalg.norm(vector) for vector in expected]
    for budget in (512, 64, 16):  # all side by side; in three groups; the long ones in pieces
        assert close(embedded(Embedder(causal, pooling), ids, budget), expected), budget


def test_texts_share_the_budget_of_a_step_padding_included() -> None:
    assert groups([], 512) == []
    assert groups([600, 10, 300, 300, 200, 212], 512) == [[0], [2], [3], [5, 4], [1]]
    for lengths in ([600, 10, 300, 300, 200, 212], [1] * 1000, [512], [5, 4, 3, 2, 1]):
        found = groups(lengths, 512)
        assert sorted(i for group in found for i in group) == list(range(len(lengths)))
        assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 512 for group in found)
    assert len(groups([1] * 1000, 512)) == 2


POOLING: dict[str, tuple[dict[str, Any], str]] = {
    "nothing said": ({}, "mean"),
    "without modules.json": ({"1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}}, "cls"),
    "the newer form": ({"1_Pooling/config.json": {"pooling_mode": "lasttoken"}}, "last"),
    "another directory": (
        {"modules.json": [{"type": "a.Pooling", "path": "pool"}], "pool/config.json": {"pooling_mode_lasttoken": True}},
        "last",
    ),
    "two at once": (
        {"1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}},
        "1_Pooling/config.json asks for cls_token and max_tokens pooling",
    ),
    "none": ({"1_Pooling/config.json": {}}, "asks for no pooling"),
    "not downloaded": ({"modules.json": [{"type": "a.Pooling", "path": "1_Pooling"}]}, "1_Pooling/config.json is missing"),
    "a layer behind it": (
        {"modules.json": [{"type": "a.models.Dense", "path": "2_Dense"}]},
        "a module that mlxd does not do (Dense)",
    ),
    "no list": ({"modules.json": {}}, "modules.json is not a JSON list"),
    "no modules": ({"modules.json": [1]}, "does not do (without a type)"),
    "a path out of it": ({"modules.json": [{"type": "Pooling", "path": "../x"}]}, "names no pooling"),
}


@pytest.mark.parametrize("name", POOLING)
def test_pooling_is_read_from_the_models_files_and_never_guessed(tmp_path: Path, name: str) -> None:
    files, expected = POOLING[name]
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(json.dumps(content))
    try:
        assert read_pooling(tmp_path) == expected
    except Broken as why:
        assert expected in str(why)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_act": "swish9"}, "config.json has hidden_act 'swish9'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"hidden_size": "big"}, "config.json: Expected `int`, got `str` - at `$.hidden_size`"),
    ],
)
def test_a_bert_of_another_kind_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    directory = make(tmp_path / "m")
    (directory / "config.json").write_text(json.dumps(SHAPE | changes))
    with pytest.raises(Broken) as refused:
        encoder(directory, tmp_path / "view")
    assert sentence in str(refused.value)


# --- the engine ----------------------------------------------------------------------------------------------------------------------


class Stage:
    """What the gates before the engines hold back at present, by the job and what of it went through."""

    def __init__(self) -> None:
        self.holds: Callable[[Submit | Embed, list[Event]], bool] = lambda submit, seen: False


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage()


@pytest.fixture(scope="module")
def server(stage: Stage) -> Iterator[Supervised]:
    """With a BERT and the built-in model on real engines, and a fake one."""
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home:
        make(Path(home) / "models" / "bert")
        with supervised(Path(home), ("fake",)) as running, running.client() as client:
            running.passes = lambda submit, seen, event: not stage.holds(submit, seen)
            for model in ("bert", "mlxd-tiny"):
                assert client.post("/api/embed", json={"model": model, "keep_alive": -1}).json()["embeddings"] == []
            yield running


@pytest.fixture
def client(server: Supervised) -> Iterator[httpx.Client]:
    with server.client() as made:
        yield made


def wire(server: Supervised, model: str) -> Wire:
    engine = server.engine(f"{model}:latest")
    assert isinstance(engine, RealEngine)
    return engine.real.connect()


def test_an_engine_cuts_what_is_too_long_or_says_so(server: Supervised) -> None:
    with wire(server, "bert") as engine:
        long = "server " * 100
        cut = engine.embed([long, [7] * 100]).embedded
        assert cut is not None and cut.tokens == 2 * CONTEXT_TOKENS
        assert cut.vectors[:1] == engine.embed(["server " * (CONTEXT_TOKENS - 2)]).embedded.vectors  # type: ignore[union-attr]
        for text, size in ((long, "102 tokens"), ([7] * 100, "100 tokens"), ("x" * 3000, "3000 bytes")):
            failed = engine.embed(["x", text], truncate=False).failed
            assert failed is not None and failed.status == 400
            assert failed.message == f"the input length exceeds the context length: input[1] has {size}, the model reads 64 tokens"
        short = engine.embed(["server " * 20], num_ctx=10).embedded
        assert short is not None and short.tokens == 10


@pytest.mark.parametrize("token", [-1, 109, 2**40])
def test_numbers_that_are_no_tokens_are_a_400(server: Supervised, token: int) -> None:
    with wire(server, "bert") as engine:
        failed = engine.embed([[5, token, 6]]).failed
        assert failed is not None
        assert (failed.status, failed.message) == (400, f"{token} is not a token of this model, whose tokens are 0 to 108")


def test_a_text_without_tokens_has_a_vector_of_length_one(server: Supervised) -> None:
    with wire(server, "mlxd-tiny") as engine:
        done = engine.embed(["", "\x00"]).embedded
        assert done is not None
        assert all(math.isclose(math.hypot(*numbers(vector)), 1, abs_tol=1e-6) for vector in done.vectors)


def test_more_vectors_than_a_frame_holds_are_a_400(server: Supervised) -> None:
    with wire(server, "mlxd-tiny") as engine:
        failed = engine.embed([""] * 130_000).failed
        assert failed is not None
        assert (failed.status, failed.message) == (400, "input: at most 129024 vectors of 128 numbers in one request")


def test_a_bert_is_asked_for_no_text(server: Supervised) -> None:
    with wire(server, "bert") as engine:
        failed = engine.ask(prompt="the server").failed
        assert failed is not None
        assert (failed.status, failed.message) == (400, "bert:latest does not support generate")


def test_a_big_embedding_does_not_stop_a_stream_and_can_be_cancelled(server: Supervised) -> None:
    """Pieces of the one and tokens of the other come in turn; what is cancelled gives no more events, and its place is free."""
    order: list[str] = []
    with wire(server, "mlxd-tiny") as engine:
        stream = engine.submit(messages=[{"role": "user", "content": "Tell me a long story about mlxd."}])
        engine.until(lambda: len(engine.results[stream].ids) > 2)
        big = engine.submit_texts([[(7 * i + n) % 900 + 10 for i in range(260)] for n in range(3)])
        endless = engine.submit_texts([[(7 * i + n) % 900 + 10 for i in range(260)] for n in range(1000)])
        while not engine.results[big].ended:
            frame = engine.read(time.monotonic() + DEADLINE_S)
            assert isinstance(frame, messages.Step | messages.Pulse)
            for event in frame.events if isinstance(frame, messages.Step) else []:
                engine.results[event.job].take(event)
                if event.job in (big, stream):
                    order.append("piece" if event.job == big else "token")
        assert order.count("piece") == 4  # and the vectors
        assert "token" in order[order.index("piece") :]
        engine.cancel(endless)
        engine.cancel(stream)
        before = len(engine.results[endless].events)
        engine.until(lambda: engine.pulses and engine.pulses[-1].counters.running == 0)
        assert len(engine.results[endless].events) < before + 5
        assert engine.results[endless].embedded is None


def test_an_engine_without_text_shows_that_it_lives_and_never_tells_what_is_no_number(tmp_path: Path) -> None:
    """It ends with output that means nothing, as any engine does: its memory is not to be trusted."""
    spoilt = ids_of("7")[1]
    directory = spoil_row(make(tmp_path / "m"), "embeddings.word_embeddings.weight", spoilt, math.nan)
    settings = msgspec.convert({"health": {"canary_s": 0.5}}, Config)
    with EngineProcess(tmp_path / "e", settings) as process, process.load(directory).connect() as engine:
        engine.until(lambda: engine.pulses and engine.pulses[-1].counters.canaries > 0)
        before = engine.pulses[-1].counters
        done = engine.embed(TEXTS[:2]).embedded
        assert done is not None
        engine.until(lambda: engine.pulses[-1].counters.finished > before.finished)
        assert engine.pulses[-1].counters.prefilled == before.prefilled + done.tokens
        bad = engine.submit_texts(["7 of 9"])
        bye = process.word(Bye)
        assert (bye.cause, "the model gave no numbers" in bye.text) == ("error", True)
        assert not engine.results[bad].events


def test_a_causal_model_with_a_module_of_its_own_says_why_it_does_not_embed(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "m")
    (directory / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]')
    batch = Batch(Config(), print)
    opened = batch.open(Load("tiny", str(directory), PLENTY), tmp_path / "view")
    service = Service(batch, opened, Loaded(pid=1, model="tiny", context_length=1024), 2.0, print)
    assert opened.generates
    assert service.inability(Submit(job=1, sampling=Sampling(seed=0), prompt="x")) == ""
    why = service.inability(Embed(job=1, inputs=["x"]))
    assert why == "tiny does not support embeddings: modules.json names a module that mlxd does not do (Dense)"


# --- the server ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["bert", "mlxd-tiny"])
def test_the_ollama_package_gets_one_vector_for_each_text(server: Supervised, model: str) -> None:
    client = ollama.Client(server.url)
    answer = client.embed(model, TEXTS)
    assert answer.model == model
    assert len(answer.embeddings) == len(TEXTS)
    assert all(math.isclose(math.hypot(*vector), 1, abs_tol=1e-6) for vector in answer.embeddings)
    for text, vector in zip(TEXTS, answer.embeddings, strict=True):
        assert close(client.embed(model, text).embeddings[0], vector)
    assert close(client.embeddings(model, TEXTS[1]).embedding, answer.embeddings[1])
    assert 0 < answer.load_duration <= answer.total_duration  # type: ignore[operator]
    assert answer.prompt_eval_count == sum(client.embed(model, text).prompt_eval_count for text in TEXTS)  # type: ignore[misc]


@pytest.mark.parametrize("model", ["bert", "mlxd-tiny"])
def test_the_openai_package_gets_the_same_vectors_in_base64_and_as_numbers(server: Supervised, model: str) -> None:
    native = ollama.Client(server.url).embed(model, TEXTS)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    for form in (openai.omit, "float"):  # by itself the package asks for base64
        answer = client.embeddings.create(model=model, input=TEXTS, encoding_format=form)  # type: ignore[arg-type]
        assert [entry.index for entry in answer.data] == [0, 1, 2, 3]
        assert close([entry.embedding for entry in answer.data], native.embeddings, 1e-6)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == native.prompt_eval_count
    one = client.embeddings.create(model=model, input=TEXTS[0])
    assert close(one.data[0].embedding, native.embeddings[0])


def test_the_openai_package_may_send_tokens(server: Supervised) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    ids = [ids_of(text) for text in TEXTS]
    texts = client.embeddings.create(model="bert", input=TEXTS)
    tokens = client.embeddings.create(model="bert", input=ids)
    assert close([entry.embedding for entry in tokens.data], [entry.embedding for entry in texts.data], 1e-6)
    assert close(client.embeddings.create(model="bert", input=ids[1]).data[0].embedding, texts.data[1].embedding)


def test_fewer_dimensions_are_the_first_ones_made_one_long_again(server: Supervised, client: httpx.Client) -> None:
    full = ollama.Client(server.url).embed("bert", TEXTS).embeddings
    cut = ollama.Client(server.url).embed("bert", TEXTS, dimensions=8).embeddings
    for long, short in zip(full, cut, strict=True):
        assert close(np.array(long[:8]) / math.hypot(*long[:8]), short, 1e-6)
    sent = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").embeddings.create(model="bert", input=TEXTS, dimensions=8)
    assert close([entry.embedding for entry in sent.data], cut, 1e-6)
    assert len(client.post("/api/embed", json={"model": "bert", "input": "x", "dimensions": 32.0}).json()["embeddings"][0]) == 32
    for path in ("/api/embed", "/v1/embeddings"):
        refused = client.post(path, json={"model": "bert", "input": "x", "dimensions": 33})
        assert (refused.status_code, "dimensions: the vectors of this model have 32 numbers" in refused.text) == (400, True)


def test_base64_is_little_endian_float32(server: Supervised, client: httpx.Client) -> None:
    answer = client.post("/v1/embeddings", json={"model": "bert", "input": "x", "encoding_format": "base64"}).json()
    plain = client.post("/v1/embeddings", json={"model": "bert", "input": "x"}).json()
    assert numbers(base64.b64decode(answer["data"][0]["embedding"])) == plain["data"][0]["embedding"]
    assert (answer["object"], answer["data"][0]["object"], answer["model"]) == ("list", "embedding", "bert")


def test_nothing_to_embed_loads_the_model_and_keep_alive_0_unloads_it(server: Supervised, client: httpx.Client) -> None:
    def loaded() -> bool:
        return any(model["name"] == "fake:latest" for model in client.get("/api/ps").json()["models"])

    for path, key, empty in (("/api/embed", "embeddings", {"input": []}), ("/api/embeddings", "embedding", {"prompt": ""})):
        answer = client.post(path, json={"model": "fake"} | empty)
        assert (answer.status_code, answer.json()[key]) == (200, [])
        assert loaded()
        assert client.post(path, json={"model": "fake", "keep_alive": 0}).json()[key] == []
        until("the model to go", lambda: not loaded(), server.told)
    assert len(client.post("/api/embed", json={"model": "fake", "input": ["x", ""], "keep_alive": 0}).json()["embeddings"]) == 2
    until("the model to go", lambda: not loaded(), server.told)
    assert client.post("/api/generate", json={"model": "bert"}).json()["done_reason"] == "load"


def test_a_bert_is_listed_as_an_embedding_model_and_chats_with_nobody(client: httpx.Client) -> None:
    listed = {model["name"]: model["capabilities"] for model in client.get("/api/tags").json()["models"]}
    assert listed["bert:latest"] == ["embedding"]
    assert "completion" in listed["mlxd-tiny:latest"]
    assert client.post("/api/show", json={"model": "bert"}).json()["capabilities"] == ["embedding"]
    message = [{"role": "user", "content": "hello"}]
    for path, body, word in (
        ("/api/generate", {"prompt": "hello"}, "generate"),
        ("/api/chat", {"messages": message}, "chat"),
        ("/v1/chat/completions", {"messages": message}, "completions"),
    ):
        refused = client.post(path, json={"model": "bert"} | body)
        assert (refused.status_code, f"bert does not support {word}" in refused.text) == (400, True), refused.text


TOO_MANY = ["x"] * (vectors.MOST_INPUTS + 1)
OLLAMA_REFUSALS: list[tuple[dict[str, Any], int, str]] = [
    ({"model": None}, 400, "model is required"),
    ({"model": "nope"}, 404, "model 'nope' not found"),
    ({"input": 5}, 400, "input: invalid input type"),
    ({"input": ["x", 5]}, 400, "input: invalid input type"),
    ({"input": {"a": 1}}, 400, "input: invalid input type"),
    ({"input": TOO_MANY}, 400, "input: at most 8192 inputs in one request, not 8193"),
    ({"input": "x" * (vectors.MOST_INPUT_BYTES + 1)}, 400, "input: at most 16777216 bytes of text"),
    ({"input": "server " * 100, "truncate": False}, 400, "the input length exceeds the context length: input[0] has 102 tokens"),
    ({"truncate": "no"}, 400, "truncate: expected bool"),
    ({"dimensions": 0}, 400, "dimensions: expected int >= 1"),
    ({"dimensions": 1.5}, 400, "dimensions: expected an integer, got 1.5"),
    ({"options": {"num_ctx": "big"}}, 400, 'option "num_ctx" must be of type int'),
    ({"keep_alive": "soon"}, 400, 'keep_alive: "soon" is not a duration'),
]


@pytest.mark.parametrize(("change", "status", "sentence"), OLLAMA_REFUSALS, ids=lambda value: str(value)[:40])
def test_bad_input_is_a_sentence_in_ollamas_words(client: httpx.Client, change: dict[str, Any], status: int, sentence: str) -> None:
    answer = client.post("/api/embed", json={"model": "bert", "input": "x"} | change)
    assert (answer.status_code, sentence in answer.json()["error"]) == (status, True), answer.text


OPENAI_REFUSALS: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"model": None}, 400, "model is required", None),
    ({"model": "nope"}, 404, "model 'nope' not found", None),
    ({"input": None}, 400, "input: invalid input", "input"),
    ({"input": []}, 400, "input: invalid input", "input"),
    ({"input": 5}, 400, "input: expected", "input"),
    ({"input": ["x", 5]}, 400, "input[1]: invalid input: expected a text or a list of tokens", "input[1]"),
    ({"input": [5, "x"]}, 400, "input: invalid input: expected a text or a list of tokens", "input"),
    ({"input": [[]]}, 400, "input[0]: invalid input", "input[0]"),
    ({"input": [[5, 1.5]]}, 400, "input[0][1]: expected an integer, got 1.5", "input[0][1]"),
    ({"input": [["x"]]}, 400, "input[0][0]: expected number, got string", "input[0][0]"),
    ({"input": [5, 1000]}, 400, "1000 is not a token of this model", None),
    ({"input": "server " * 100}, 400, "the input length exceeds the context length", None),
    ({"input": TOO_MANY}, 400, "input: at most 8192 inputs", "input"),
    ({"encoding_format": "hex"}, 400, "encoding_format: invalid enum value 'hex'", "encoding_format"),
    ({"dimensions": -1}, 400, "dimensions: expected int >= 1", "dimensions"),
]


@pytest.mark.parametrize(("change", "status", "sentence", "param"), OPENAI_REFUSALS, ids=lambda value: str(value)[:40])
def test_bad_input_is_an_error_object_of_openais(
    client: httpx.Client, change: dict[str, Any], status: int, sentence: str, param: str | None
) -> None:
    answer = client.post("/v1/embeddings", json={"model": "bert", "input": "x"} | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), answer.text
    assert sentence in error["message"]


def test_a_large_answer_goes_out_in_pieces_and_whole(client: httpx.Client) -> None:
    texts = [f"x{n}" for n in range(vectors.MOST_INPUTS)]
    answer = client.post("/api/embed", json={"model": "fake", "input": texts}).json()
    assert len(answer["embeddings"]) == len(texts)
    assert [len(vector) for vector in answer["embeddings"]] == [4] * len(texts)
    assert answer["prompt_eval_count"] == sum(map(len, texts))


def test_an_engines_refusal_is_the_answer(client: httpx.Client) -> None:
    answer = client.post("/v1/embeddings", json={"model": "fake", "input": "fail=400"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "scripted failure")


def test_an_embedding_whose_engine_is_killed_halfway_is_answered_all_the_same(server: Supervised, stage: Stage) -> None:
    texts = [f"server number {n} " * 20 for n in range(30)]
    whole = ollama.Client(server.url).embed("bert", texts).embeddings
    stage.holds = lambda submit, seen: isinstance(submit, Embed) and bool(seen)
    with server.client() as client:
        asked = Background(lambda: client.post("/api/embed", json={"model": "bert", "input": texts}))
        engine = server.engine("bert:latest")
        assert engine is not None and engine.gate is not None
        until("the first piece", lambda: engine.gate.held, server.told)
        stage.holds = lambda submit, seen: False
        engine.kill()
        answer = asked.result()
    assert answer.headers["x-mlxd-resumed"] == "1"
    assert answer.json()["embeddings"] == whole
