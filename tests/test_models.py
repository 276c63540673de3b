"""Names and the catalogue, on real directories."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from server_client import make_model

from mlxd import abilities
from mlxd.errors import Refused
from mlxd.models import BUILTIN, Catalogue, canonical, chat_template, count_parameters, quantization


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return Catalogue(str(tmp_path / "models"), {"HF_HUB_CACHE": str(tmp_path / "hub")})


def refusal(catalogue: Catalogue, name: str) -> tuple[int, str]:
    with pytest.raises(Refused) as refused:
        catalogue.find(name)
    return refused.value.status, refused.value.message


def weights(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> None:
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny", "tiny:latest"),
        ("tiny:q4", "tiny:q4"),
        ("mlx-community/Qwen3-0.6B-4bit", "mlx-community/Qwen3-0.6B-4bit:latest"),
        ("host.example:5000/org/name:tag", "host.example:5000/org/name:tag"),
        ("host.example:5000/org/name", "host.example:5000/org/name:latest"),
        ("_x", "_x:latest"),
    ],
)
def test_a_name_without_a_tag_means_latest(name: str, expected: str) -> None:
    assert canonical(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "a/../b", "a//b", "/a", "a/", ":x", "a:", "a b", "a:b:c", "-a", ".a", "ü", "a\n", "x" * 81, "a/b/c/d", "a\x00"),
        *("a.", "a./b", "a:b.", "a..b", "a:.", "host.:1/a", "٣", "ａ", "/".join(["x" * 80] * 3) + ":" + "y" * 80),
    ],
)
def test_a_malformed_name_is_a_400(name: str) -> None:
    with pytest.raises(Refused) as refused:
        canonical(name)
    assert (refused.value.status, refused.value.message) == (400, "invalid model name")


@pytest.mark.parametrize("name", ["", "  "])
def test_a_blank_name_is_asked_for(name: str) -> None:
    with pytest.raises(Refused) as refused:
        canonical(name)
    assert (refused.value.status, refused.value.message) == (400, "model is required")


def test_an_empty_store_has_the_builtin_model_and_a_missing_directory_is_no_error(catalogue: Catalogue) -> None:
    assert [model.name for model in catalogue.scan()] in ([], [BUILTIN])


def test_models_are_found_flat_nested_and_in_the_hugging_face_cache(tmp_path: Path, catalogue: Catalogue) -> None:
    make_model(tmp_path / "models" / "flat")
    make_model(tmp_path / "models" / "org" / "Nested")
    repository = tmp_path / "hub" / "models--mlx-community--Qwen3-0.6B-4bit"
    revision = "0123456789abcdef" * 2 + "01234567"
    make_model(repository / "snapshots" / revision)
    make_model(repository / "snapshots" / ("f" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    (tmp_path / "hub" / "models--x--not-mlx" / "refs").mkdir(parents=True)
    (tmp_path / "hub" / "models--x--not-mlx" / "refs" / "main").write_text("../../..")
    (tmp_path / "models" / "notes").mkdir()
    names = {model.name for model in catalogue.scan()} - {BUILTIN}
    assert names == {"flat:latest", "org/Nested:latest", "mlx-community/Qwen3-0.6B-4bit:latest"}
    assert catalogue.find("FLAT").name == "flat:latest"
    assert catalogue.find("Org/nested:LATEST").directory == tmp_path / "models" / "org" / "Nested"
    assert catalogue.find("mlx-community/qwen3-0.6b-4bit").directory.name == revision


def test_a_name_has_at_most_256_characters_and_its_parts_80() -> None:
    longest = "/".join(["x" * 79, "y" * 80, "z" * 80]) + ":t" + "0" * 13
    assert len(longest) == 256 and canonical(longest) == longest
    with pytest.raises(Refused, match="invalid model name"):
        canonical(longest + "0")


def test_a_directory_that_cannot_be_served_is_said_once(
    tmp_path: Path, catalogue: Catalogue, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two whose names differ by capitals alone, the one that comes first is served."""
    for name in ("Same", "same", "trailing.", "größe"):
        make_model(tmp_path / "models" / name)
    if (tmp_path / "models" / "Same").samefile(tmp_path / "models" / "same"):
        pytest.skip("this file system does not tell capitals apart")
    for _ in range(2):
        assert {model.name for model in catalogue.scan()} == {BUILTIN, "Same:latest"}
    said = sorted(record.getMessage() for record in caplog.records)
    models = tmp_path / "models"
    assert said == [
        f"{models / 'größe'} is not served: its name cannot be that of a model; rename it",
        f"{models / 'same'} is not served: its name is that of {models / 'Same'} but for capitals; rename it",
        f"{models / 'trailing.'} is not served: its name cannot be that of a model; rename it",
    ]


def test_an_unknown_name_is_a_404_that_repeats_it(catalogue: Catalogue) -> None:
    assert refusal(catalogue, "Nope:7b") == (404, "model 'Nope:7b' not found")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json is missing"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (lambda d: (d / "config.json").write_text("[" * 100_000), "config.json is not valid JSON"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda d: os.truncate(d / "model.safetensors", 100), "model.safetensors is cut short"),
        (lambda d: os.truncate(d / "model.safetensors", 4), "model.safetensors is cut short"),
        (lambda d: os.truncate(d / "model.safetensors", 200), "model.safetensors is cut short"),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"not JSON" + bytes(99)),
            "model.safetensors is no safetensors file",
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-00002-of-00002.safetensors"}}'),
            "model-00002-of-00002.safetensors is missing",
        ),
        (
            lambda d: (d / "model.safetensors").rename(d / "model-00001-of-00002.safetensors"),
            "model-00002-of-00002.safetensors is missing, and model-00001-of-00002.safetensors is there",
        ),
        (lambda d: (d / "config.json").write_text('{"model_file": "evil.py"}'), "config.json asks to run code"),
        (lambda d: (d / "config.json").write_text('{"trust_remote_code": true}'), "config.json asks to run code"),
    ],
)
def test_a_broken_model_is_not_listed_and_says_what_is_wrong(tmp_path: Path, catalogue: Catalogue, spoil: object, why: str) -> None:
    directory = make_model(tmp_path / "models" / "bad")
    assert catalogue.find("bad")
    spoil(directory)  # type: ignore[operator]
    status, message = refusal(catalogue, "bad")
    assert status == 400
    assert message.startswith("model 'bad' cannot be loaded: ")
    assert why in message
    assert str(tmp_path) not in message
    assert "bad:latest" not in {model.name for model in catalogue.scan()}


def test_auto_map_is_no_code_that_mlxd_would_run(tmp_path: Path, catalogue: Catalogue) -> None:
    make_model(tmp_path / "models" / "community", {"auto_map": {"AutoModel": "modeling.py"}})
    assert catalogue.find("community")


def test_a_changed_directory_is_noticed_and_an_unchanged_one_is_not_read_again(tmp_path: Path, catalogue: Catalogue) -> None:
    directory = make_model(tmp_path / "models" / "m")
    first = catalogue.find("m")
    assert catalogue.known("m") is first
    assert catalogue.find("m") is first
    (directory / "config.json").write_text('{"model_type": "other"}')
    assert catalogue.known("m") is None
    second = catalogue.find("m")
    assert second.family == "other"
    assert second.digest != first.digest
    shutil.rmtree(directory)
    assert catalogue.known("m") is None
    assert refusal(catalogue, "m")[0] == 404


def test_details_come_from_the_files(tmp_path: Path, catalogue: Catalogue) -> None:
    directory = make_model(
        tmp_path / "models" / "q", {"model_type": "llama", "quantization": {"bits": 4, "group_size": 64}}, thinks=True
    )
    weights(
        directory / "model.safetensors",
        {
            "layer.weight": ("U32", [128, 8], 4096),  # 128 x 64 weights of 4 bits
            "layer.scales": ("F16", [128, 1], 256),
            "layer.biases": ("F16", [128, 1], 256),
            "norm.weight": ("F16", [64], 128),
        },
    )
    model = catalogue.find("q")
    assert (model.family, model.parameters, model.parameter_size, model.quantization) == ("llama", 8256, "8.26K", "4bit")
    assert (model.context_length, model.thinks, len(model.digest)) == (4096, True, 64)
    assert model.size_bytes == (directory / "model.safetensors").stat().st_size


def test_whether_it_thinks_is_read_from_the_settings_if_they_say(tmp_path: Path, catalogue: Catalogue) -> None:
    for number, (added, thinks) in enumerate([({}, True), ({"1": {"content": "<a>"}}, False), (None, True)]):
        directory = make_model(tmp_path / "models" / f"t{number}", thinks=True)
        (directory / "tokenizer_config.json").write_text(json.dumps({} if added is None else {"added_tokens_decoder": added}))
        assert catalogue.find(f"t{number}").thinks is thinks
    tags = {"1": {"content": "<think>"}, "2": {"content": "</think>"}}
    directory = make_model(tmp_path / "models" / "t")
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tags}))
    assert catalogue.find("t").thinks


def test_the_chat_template_is_found_wherever_it_stands(tmp_path: Path) -> None:
    assert chat_template(tmp_path) == ""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "plain"}))
    assert chat_template(tmp_path) == "plain"
    several = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert chat_template(tmp_path) == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert chat_template(tmp_path) == "file"


def test_quantization_is_the_dtype_that_holds_most() -> None:
    tensors = {"a": ("BF16", [1000]), "b": ("F32", [10])}
    assert quantization(tensors, 0) == "BF16"
    assert count_parameters(tensors, 0) == 1010
    assert quantization({}, 0) == "unknown"


# --- what a model can do -------------------------------------------------------------------------------------------------------------

TOKENS = [
    [],
    ["<think>", "</think>"],
    ["<think>"],
    ["<longcat_think>", "</longcat_think>"],
    ["<|think:start|>", "<|think:end|>"],
    ["<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"],
    ["<|open|>", "<|close|>", "<|sep|>"],
    ["<|tool_call_start|>", "<|tool_call_end|>"],
    ["<|tool_call_start|>"],
]
TEMPLATES = [
    "",
    *("".join(marks) for _, marks in abilities.TEMPLATE_PARSERS),
    *(marks[0] for _, marks in abilities.TEMPLATE_PARSERS),
    "<tool_call>{{ tool_call.arguments }}",
    "<tool_call><arg_key>[TOOL_CALLS]tool_call.name",
]


@pytest.mark.parametrize("tokens", TOKENS, ids=lambda tokens: "".join(tokens))
def test_the_rules_for_thinking_and_calls_are_mlx_lms(tokens: list[str]) -> None:
    theirs = importlib.import_module("mlx_lm.tokenizer_utils")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    several = {"default": "<tool_call>tool_call.name", "tool_use": "[TOOL_CALLS]"}
    for template in [*TEMPLATES, several]:
        tokenizer = SimpleNamespace(
            chat_template=template, get_vocab=lambda: vocabulary, encode=lambda text, add_special_tokens: [1]
        )
        assert abilities.tool_parser(template, vocabulary.__contains__) == theirs._infer_tool_parser(tokenizer), template
        assert abilities.thinks(vocabulary.__contains__) == (theirs._infer_thinking(tokenizer)[0] is not None)


def test_no_parser_and_no_template_of_mlx_lms_is_forgotten() -> None:
    parsers = importlib.import_module("mlx_lm.tool_parsers")
    known = {name for name, _ in abilities.TEMPLATE_PARSERS + abilities.VOCABULARY_PARSERS}
    assert known | {"laguna"} == {module.name for module in pkgutil.iter_modules(parsers.__path__)}  # laguna: by its settings only
    models = Path(importlib.import_module("mlx_lm.models").__path__[0])
    with_defaults = {path.stem for path in models.glob("*.py") if "TOKENIZER_DEFAULTS = " in path.read_text()}
    assert with_defaults == set(abilities.WITH_TEMPLATE)


JSON_TOOLS = "{% if tools %}<tool_call>{{ tool_call.name }}{% endif %}"


@pytest.mark.parametrize(
    ("settings", "config", "calls"),
    [
        ({}, {}, False),
        ({"chat_template": JSON_TOOLS}, {}, True),
        ({"chat_template": JSON_TOOLS.replace("tools", "functions")}, {}, False),
        ({"chat_template": "{{ tools }}"}, {}, False),
        ({"chat_template": "{{ tools }}", "tool_parser_type": "laguna"}, {}, True),
        ({"tool_parser_type": "laguna"}, {}, False),
        ({"chat_template": [{"name": "default", "template": JSON_TOOLS}]}, {}, False),
        ({"chat_template_type": "deepseek_v32", "tool_parser_type": "laguna"}, {}, True),
        ({}, {"model_type": "muse_spark"}, True),
    ],
)
def test_a_model_calls_functions_if_its_template_knows_them_and_a_parser_is_found(
    tmp_path: Path, catalogue: Catalogue, settings: dict[str, Any], config: dict[str, Any], calls: bool
) -> None:
    directory = make_model(tmp_path / "models" / "m", config)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    assert catalogue.find("m").calls is calls


@pytest.mark.parametrize("marks", abilities.FILLING)
def test_a_model_fills_in_the_middle_if_its_vocabulary_has_the_marks(
    tmp_path: Path, catalogue: Catalogue, marks: tuple[str, str, str]
) -> None:
    for number, tokens in enumerate([marks, marks[:2]]):
        directory = make_model(tmp_path / "models" / f"m{number}")
        (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": list(tokens)}}, ensure_ascii=False))
        assert catalogue.find(f"m{number}").inserts is (number == 0)


def test_the_builtin_model_thinks_and_calls_and_does_not_fill_in(catalogue: Catalogue) -> None:
    model = catalogue.find(BUILTIN)
    assert (model.thinks, model.calls, model.inserts, model.builtin) == (True, True, False, True)
