"""Files of models that want more than to be read (SEC-14, 15, 16, 19, 20): headers that lie, settings that ask for code, templates that break
out, formats that are code. What the check lets through is loaded by MLX itself, in a process that may die of it."""

from __future__ import annotations

import importlib
import json
import random
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from server_client import Supervised, make_model, said, supervised

import mlxd
from mlxd.engine.text import Prompter
from mlxd.engine.view import make_view
from mlxd.errors import Refused
from mlxd.messages import Sampling, Submit, Want
from mlxd.modelfiles import DTYPE_BITS, MOST_NAME, Broken, check_settings, read_header, refuse_code
from mlxd.models import Catalogue

BUILTIN = Path(mlxd.__file__).parent / "builtin"

Header = dict[str, Any]


def whole() -> Header:
    """Of a file with a tensor of each size of element, an empty one and a scalar."""
    header: Header = {"__metadata__": {"format": "mlx"}}
    at = 0
    for name, dtype, shape, size in [
        ("a.weight", "BF16", [4, 8], 64),
        ("b.weight", "U32", [2, 3, 4], 96),
        ("c.bias", "F8_E4M3", [7], 7),
        ("d.none", "F32", [0, 4], 0),
        ("e.scalar", "I64", [], 8),
        ("f.mask", "BOOL", [5], 5),
    ]:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return header


DATA = bytes(range(180))


def written(path: Path, header: Any, data: bytes = DATA) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# --- SEC-19: the header ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {}, None])
def test_a_header_that_tells_the_truth_is_read(tmp_path: Path, metadata: Any) -> None:
    path = written(tmp_path / "m.safetensors", whole() | {"__metadata__": metadata})
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in read_header(path).items()}
    assert found == {name: (told["dtype"], told["shape"]) for name, told in whole().items() if name != "__metadata__"}
    assert {name: list(array.shape) for name, array in mx.load(str(path)).items()} == {
        name: shape for name, (_, shape) in found.items()
    }


def test_the_types_of_numbers_are_those_that_mlx_loads(tmp_path: Path) -> None:
    """Of all that the format knows."""
    for dtype, bits in (DTYPE_BITS | dict.fromkeys(("F64", "F8_E5M2", "F4", "F6_E2M3", "F6_E3M2"), 8)).items():
        told = {"w": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}}
        path = written(tmp_path / "m.safetensors", told, bytes(bits))
        if dtype in DTYPE_BITS:
            mx.eval(mx.load(str(path)))
            assert read_header(path)["w"].dtype == dtype
        else:
            with pytest.raises(RuntimeError, match="unsupported dtype"):
                mx.load(str(path))
            with pytest.raises(Broken, match=f"'{dtype}' for the type of 'w', which MLX cannot read"):
                read_header(path)


def changed(name: str, **told: Any) -> Callable[[Header], None]:
    return lambda header: header[name].update(told)


LIES: dict[str, tuple[Callable[[Header], Any], str]] = {
    "an overlap": (changed("b.weight", data_offsets=[0, 96]), "overlap"),
    "a gap": (lambda h: h.pop("a.weight"), "bytes between them"),
    "beyond the end": (changed("f.mask", shape=[6], data_offsets=[175, 181]), "cut short"),
    "short of the end": (lambda h: h.pop("f.mask"), "longer than its header says"),
    "backwards": (changed("a.weight", data_offsets=[64, 0]), "other bytes for 'a.weight' than its shape needs"),
    "negative": (changed("a.weight", data_offsets=[-64, 0]), "no safetensors file"),
    "offsets of reals": (changed("a.weight", data_offsets=[0.0, 64.0]), "no safetensors file"),
    "three offsets": (changed("a.weight", data_offsets=[0, 32, 64]), "no safetensors file"),
    "another shape": (changed("a.weight", shape=[4, 9]), "other bytes for 'a.weight'"),
    "another type": (changed("a.weight", dtype="F32"), "other bytes for 'a.weight'"),
    "a negative shape": (changed("a.weight", shape=[-4, -8]), "no safetensors file"),
    "a product that wraps to 32 elements": (changed("a.weight", shape=[2**32 + 1, 2**32, 32]), "that no tensor of MLX's can have"),
    "an empty one beyond 64 bits": (changed("d.none", shape=[0, 2**31 - 1, 2**31 - 1, 2**31 - 1]), "that no tensor of MLX's"),
    "an empty one beyond 32 bits": (changed("d.none", shape=[0, 2**40]), "that no tensor of MLX's"),
    "a thousand dimensions": (changed("e.scalar", shape=[1] * 1000), "that no tensor of MLX's"),
    "a bool as a number": (changed("f.mask", shape=[True, 5]), "no safetensors file"),
    "an unknown type": (changed("a.weight", dtype="Q4_0" * 1000), "'Q4_0Q4_0Q4_0Q4_0Q4_0' for the type of 'a.weight'"),
    "no type": (lambda h: h["a.weight"].pop("dtype"), "no safetensors file"),
    "more than there is to say": (changed("a.weight", file="/etc/passwd"), "no safetensors file"),
    "a tensor that is none": (lambda h: h.update({"x": []}), "no safetensors file"),
    "a long name": (lambda h: h.update({"n" * (MOST_NAME + 1): h["a.weight"]}), "longer than 512 characters"),
    "remarks that are no text": (lambda h: h.update({"__metadata__": {"format": 1}}), "no safetensors file"),
    "remarks that are a list": (lambda h: h.update({"__metadata__": []}), "no safetensors file"),
}


@pytest.mark.parametrize("lie", LIES)
def test_sec_19_a_header_that_lies_is_broken_with_a_sentence(tmp_path: Path, lie: str) -> None:
    tell, sentence = LIES[lie]
    header = whole()
    tell(header)
    with pytest.raises(Broken) as broken:
        read_header(written(tmp_path / "m.safetensors", header))
    assert sentence in str(broken.value) and str(broken.value).startswith("m.safetensors ")
    assert len(str(broken.value)) < 300


@pytest.mark.parametrize(
    "text", [b"[]", b"null", b"", b"{" * 100_000, b'{"a":' * 100_000, b'{"a": ' + b"[" * 100_000, b"\xff\xfe{}", b'{"a": NaN}']
)
def test_sec_19_a_header_that_is_no_object_is_no_safetensors_file(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(Broken, match="no safetensors file"):
        read_header(written(tmp_path / "m.safetensors", text, b""))


def test_sec_19_a_header_longer_than_the_format_allows_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_100)  # a hole: it takes no room
    with pytest.raises(Broken, match="no safetensors file"):
        read_header(path)


NUMBERS = [
    0,
    1,
    -1,
    7,
    8,
    64,
    180,
    181,
    2**31 - 1,
    2**31,
    2**32,
    2**32 + 1,
    2**63 - 1,
    2**63,
    2**64,
    2**64 + 64,
    1.5,
    64.0,
    True,
    None,
    "8",
]
DTYPES = [*DTYPE_BITS, "F64", "F4", "F8_E5M2", "", "f32", None]


def mutated(draw: random.Random) -> bytes:
    """A file with one to three things wrong, or none that matters."""
    header, data = whole(), bytearray(DATA)
    tensors = [told for name, told in header.items() if name != "__metadata__"]
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        told = draw.choice(tensors)
        match draw.randrange(9):
            case 0:
                told["data_offsets"] = [draw.choice(NUMBERS) for _ in range(draw.choice([0, 1, 2, 2, 2, 3]))]
            case 1:
                told["data_offsets"] = [
                    at + draw.choice([-64, -8, -1, 0, 1, 8, 64]) for at in told["data_offsets"] if type(at) is int
                ]
            case 2:
                told["shape"] = [draw.choice(NUMBERS) for _ in range(draw.choice([0, 1, 2, 3, 40]))]
            case 3:  # as many elements otherwise
                told["shape"] = draw.choice(
                    [told["shape"] * 2, told["shape"][::-1], [*told["shape"], 1], [1] * 8 + told["shape"], [0]]
                )
            case 4:
                told["dtype"] = draw.choice(DTYPES)
            case 5:
                header[draw.choice(["", "\x00", "a.weight", "🙂", "x" * 100, "__metadata__"])] = draw.choice(
                    [told, {}, None, [told]]
                )
            case 6:
                del data[draw.randrange(len(data)) :]
                data += bytes(draw.choice([0, 0, 1, 64]))
            case 7:
                data += bytes(draw.choice([1, 64, 5000]))
            case 8:
                header["__metadata__"] = draw.choice([None, {}, {"a": "b" * 5000}, {"a": {}}, {"a": 1}, "text", ["a"]])
    text = bytearray(json.dumps(header, ensure_ascii=draw.random() < 0.5).encode())
    if draw.random() < 0.3:  # bytes of the header
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(text))
            text[place : place + draw.choice([0, 1, 1, 3])] = draw.choice(
                [b"", b" ", b'"', b"}", b"[", b"9", b"-", b"\xff", b"\x00"]
            )
    length = len(text) + (draw.choice([-1, 1, 8, -len(text), 2**40, 2**63]) if draw.random() < 0.1 else 0)
    return struct.pack("<Q", length % 2**64) + bytes(text) + bytes(data)


#: Loads each file of a directory whole; what MLX raises is told, and so is how far it came.
LOADER = """
import sys
from pathlib import Path
import mlx.core as mx
for path in sorted(Path(sys.argv[1]).iterdir()):
    print(path.name, flush=True)
    try:
        mx.eval(mx.load(str(path)))
    except (RuntimeError, ValueError) as error:
        print("refused:", error, flush=True)
print("alive")
"""


@pytest.mark.parametrize("count", [1000, pytest.param(20_000, marks=pytest.mark.full)])
def test_sec_19_no_mutated_file_that_is_let_through_kills_mlx_or_is_refused_by_it(tmp_path: Path, count: int) -> None:
    draw = random.Random(count)
    kept = tmp_path / "accepted"
    kept.mkdir()
    for number in range(count):
        path = kept / f"{number:05}.safetensors"
        path.write_bytes(mutated(draw))
        try:
            read_header(path)
        except Broken as broken:
            assert len(str(broken)) < 300
            path.unlink()
    accepted = len(list(kept.iterdir()))
    assert count / 20 < accepted < count / 2
    loader = subprocess.run([sys.executable, "-c", LOADER, str(kept)], capture_output=True, text=True, timeout=120, check=False)
    assert loader.returncode == 0 and loader.stdout.endswith("alive\n"), loader.stdout[-500:] + loader.stderr[-2000:]
    assert "refused:" not in loader.stdout


# --- SEC-15: settings that ask for code --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "preprocessor_config.json", "tokenizer.json", "anything.json"]
)
@pytest.mark.parametrize("key", ["model_file", "trust_remote_code", "custom_pipelines"])
def test_sec_15_code_that_any_json_file_asks_for_at_any_depth_is_refused(tmp_path: Path, name: str, key: str) -> None:
    directory = make_model(tmp_path / "models" / "m")
    catalogue = Catalogue(str(tmp_path / "models"), {"HF_HUB_CACHE": str(tmp_path / "hub")})
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in key)
    for written_so in (key, escaped):
        (directory / name).write_text(f'{{"model_type": "llama", "a": [0, {{"b": {{"{written_so}": ["evil.py"]}}}}]}}')
        with pytest.raises(Refused, match=f"{name} asks to run code that came with the model \\({key}\\)"):
            catalogue.find("m")
        with pytest.raises(Broken, match=f"{name} asks to run code"):
            make_view(directory, tmp_path / "view")
    assert not (tmp_path / "view").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", '{"model": {"vocab": {"model_file": 7, "trust_remote_code": 8}}}'),
        ("config.json", '{"trust_remote_code": false, "model_file": null}'),
        ("notes.json", "no JSON: model_file, trust_remote_code"),
        ("notes.json", '{"about": "it has no model_file"}'),
        ("notes.txt", '{"model_file": "evil.py"}'),
    ],
)
def test_sec_15_what_only_looks_like_it_is_let_through(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    check_settings(tmp_path, [name])


# --- SEC-14, SEC-20: through every API --------------------------------------------------------------------------------------------

#: Every endpoint that would load a model, and a body for it.
ASKING: dict[str, dict[str, Any]] = {
    "/api/generate": {"prompt": "hello"},
    "/api/chat": {"messages": said("hello")},
    "/api/embed": {"input": "hello"},
    "/api/embeddings": {"prompt": "hello"},
    "/v1/chat/completions": {"messages": said("hello")},
    "/v1/completions": {"prompt": "hello"},
    "/v1/embeddings": {"input": "hello"},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": said("hello"), "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": said("hello")},
}
FOREIGN = ["model.gguf", "weights.npz", "weights.npy", "pytorch_model.bin", "model.pt", "model.pkl"]


@pytest.fixture(scope="module")
def server() -> Iterator[Supervised]:
    """With the models evil, whose Python leaves a canary, and foreign-0, -1, ..., of other formats, the odd ones without any settings."""
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home:
        models = Path(home) / "models"
        make_model(models / "evil", {"model_file": "evil.py"})
        (models / "evil" / "evil.py").write_text(f"open({str(Path(home) / 'canary')!r}, 'w')")
        for number, name in enumerate(FOREIGN):
            directory = make_model(models / f"foreign-{number}")
            (directory / "model.safetensors").rename(directory / name)
            if number % 2:
                (directory / "config.json").unlink()
        with supervised(Path(home), ()) as running:
            yield running


@pytest.mark.parametrize("path", ASKING)
def test_sec_14_a_model_with_code_of_its_own_is_a_400_in_every_api_and_no_engine_sees_it(server: Supervised, path: str) -> None:
    with server.client() as client:
        answer = client.post(path, json={"model": "evil"} | ASKING[path])
    assert answer.status_code == 400, answer.text
    assert "config.json asks to run code that came with the model (model_file)" in answer.text
    assert not server.count(Want)
    assert not (server.home / "canary").exists()


@pytest.mark.parametrize("number", range(len(FOREIGN)))
def test_sec_20_weights_in_another_format_are_refused_with_what_is_wanted(server: Supervised, number: int) -> None:
    path = list(ASKING)[number]
    with server.client() as client:
        answer = client.post(path, json={"model": f"foreign-{number}"} | ASKING[path])
        listed = client.get("/api/tags").json()["models"]
    assert answer.status_code == 400, answer.text
    assert (
        f"its weights are in {FOREIGN[number]}, and mlxd reads .safetensors alone: download this model in MLX's format"
        in answer.text
    )
    assert not [model for model in listed if "foreign" in model["name"]]
    assert not server.count(Want)


def test_sec_20_other_formats_beside_safetensors_are_never_in_the_view(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "m", {"model_type": "llama"})
    for name in [*FOREIGN, "evil.py", "model.pth", "evil.so"]:
        (directory / name).write_bytes(b"evil")
    make_view(directory, tmp_path / "view")
    assert {path.name for path in (tmp_path / "view").iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}


def test_sec_20_a_file_of_another_format_hides_no_model_below_it(tmp_path: Path) -> None:
    make_model(tmp_path / "models" / "org" / "m")
    (tmp_path / "models" / "org" / "training.bin").write_bytes(b"")
    catalogue = Catalogue(str(tmp_path / "models"), {"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert catalogue.find("org/m")


# --- SEC-16: templates ---------------------------------------------------------------------------------------------------------------

SECRET = "s3cret-of-this-machine"
#: What has broken out of templates: classes by way of a string, globals of the functions that are there, files, and the two ways to
#: `str.format` that Jinja closed late (CVE-2024-56326, CVE-2025-27516). CANARY: a file to make, SECRET: one to read.
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'][1]['__subclasses__']() }}",
    "{{ ''|attr('__class__')|attr('__mro__')|last|attr('__subclasses__')() }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{% for c in [].__class__.__base__.__subclasses__() %}{{ c }}{% endfor %}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{{ joiner.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ namespace.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ lipsum.__globals__['os'].popen('cat SECRET').read() }}",
    "{{ lipsum.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ strftime_now.__globals__['__builtins__']['exec']('open(\"CANARY\", \"w\")') }}",
    "{{ raise_exception.__code__ }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch CANARY') }}",
    "{{ '{0.__class__}'.format(cycler) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(cycler) }}",
    "{{ ('{0.__class__}'|attr('format'))(cycler) }}",
    "{% include 'SECRET' %}",
    "{% import 'SECRET' as s %}{{ s }}",
    "{% extends 'SECRET' %}",
    "{% set _ = messages.append({'role': 'user', 'content': 'evil'}) %}{{ messages }}",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return importlib.import_module("mlx_lm.utils").load_tokenizer(BUILTIN)


@pytest.mark.parametrize("escape", ESCAPES)
def test_sec_16_a_template_breaks_out_of_nothing(tmp_path: Path, tokenizer: Any, escape: str) -> None:
    """It is refused, or what it says tells nothing and has done nothing; the conversation is as it was."""
    canary, secret = tmp_path / "canary", tmp_path / "secret"
    secret.write_text(SECRET)
    tokenizer._tokenizer.chat_template = escape.replace("CANARY", str(canary)).replace("SECRET", str(secret))
    messages = said("hello")
    try:
        text = Prompter(tokenizer, 4096, 1024).render(messages, Submit(job=1, sampling=Sampling(seed=0), messages=messages))
    except Refused as refused:
        assert refused.status == 400
        text = refused.message
    assert not canary.exists()
    assert not [sign for sign in (SECRET, "<class '", "<code ", "evil") if sign in text], text
    assert messages == said("hello")


def test_a_template_that_is_harmless_is_rendered_by_the_same_way(tokenizer: Any) -> None:
    tokenizer._tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content|trim }}{% endfor %}"
    submit = Submit(job=1, sampling=Sampling(seed=0), messages=said("hello "))
    assert Prompter(tokenizer, 4096, 1024).render(said("hello "), submit) == "<user>hello"


def test_settings_deeper_than_python_goes_are_searched_and_break_no_list(tmp_path: Path) -> None:
    deep: Any = {"model_file": "evil.py"}
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(Broken, match="asks to run code"):
        refuse_code("config.json", deep)
