"""What a model can do, by its template and its vocabulary: think, call functions, fill in the middle.

The rules for thinking and calls are those of `mlx_lm.tokenizer_utils`, restated because the server never imports mlx; a test holds them
together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mlxd.modelfiles import MAX_JSON_BYTES, read_json

#: Whether a text is one token of the vocabulary.
Vocabulary = Callable[[str], bool]
#: A template, or several by name.
Templates = str | dict[str, str]

XTML = ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")
#: Any of these in the vocabulary.
THINKING = (("<think>", "</think>"), ("<longcat_think>", "</longcat_think>"), ("<|think:start|>", "<|think:end|>"), XTML)
#: Parsers of calls by what stands in the template; the first of which all does.
TEMPLATE_PARSERS = (
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("gemma4", ("<|tool_call>", "<tool_call|>")),
    ("function_gemma", ("<start_function_call>",)),
    ("longcat", ("<longcat_tool_call>",)),
    ("glm47", ("<arg_key>",)),
    ("pythonic", ("<|tool_list_start|>",)),
    ("pythonic", ("<|tool_call_start|>",)),
    ("qwen3_coder", ("<tool_call>\\n<function=",)),
    ("qwen3_coder", ("<tool_call>\n<function=",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("minicpm5", ('<function name="', '<param name="')),
    ("mistral", ("[TOOL_CALLS]",)),
    ("muse_spark", ("<atem:function_calls>",)),
    ("json_tools", ("<tool_call>", "tool_call.name")),
)
#: And by what is in the vocabulary.
VOCABULARY_PARSERS = (("kimi_k3", XTML), ("pythonic", ("<|tool_call_start|>", "<|tool_call_end|>")))
#: Model types for which mlx-lm brings both template and parser.
WITH_TEMPLATE = ("muse_spark",)
#: Marks of prefix, suffix and middle: Qwen and CodeGemma, StarCoder, DeepSeek, CodeLlama.
FILLING = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


def thinks(vocabulary: Vocabulary) -> bool:
    return any(all(map(vocabulary, tags)) for tags in THINKING)


def inserts(vocabulary: Vocabulary) -> bool:
    return filling(vocabulary) is not None


def filling(vocabulary: Vocabulary) -> tuple[str, str, str] | None:
    """The marks by which a model writes what stands between two texts: before the first, the second and the gap. None: it has none."""
    return next((marks for marks in FILLING if all(map(vocabulary, marks))), None)


def calls(model_type: str, tokenizer_config: dict[str, Any], templates: Templates, vocabulary: Vocabulary) -> bool:
    """Its template has a place for functions, and mlx-lm finds a parser for the calls."""
    if model_type in WITH_TEMPLATE:
        return True
    texts: Iterable[str] = [templates] if isinstance(templates, str) else templates.values()
    shows = bool(tokenizer_config.get("chat_template_type")) or any(re.search(r"\btools\b", text) for text in texts)
    return shows and bool(tokenizer_config.get("tool_parser_type") or tool_parser(templates, vocabulary))


def tool_parser(templates: Templates, vocabulary: Vocabulary) -> str | None:
    """The parser that mlx-lm infers: of several templates it looks at none."""
    if isinstance(templates, str):
        for parser, marks in TEMPLATE_PARSERS:
            if all(mark in templates for mark in marks):
                return parser
    return next((parser for parser, tokens in VOCABULARY_PARSERS if all(map(vocabulary, tokens))), None)


def read_vocabulary(directory: Path, tokenizer_config: dict[str, Any]) -> Vocabulary:
    """Of the tokens that are marks. tokenizer.json, of many MB, is read only when the settings list no added tokens. Raises OSError."""
    added = tokenizer_config.get("added_tokens_decoder")
    if isinstance(added, dict) and added:
        return {str(token.get("content")) for token in added.values() if isinstance(token, dict)}.__contains__
    path = directory / "tokenizer.json"
    text = path.read_bytes() if path.is_file() and path.stat().st_size <= MAX_JSON_BYTES else b""
    return lambda token: f'"{token}"'.encode() in text


def read_templates(directory: Path) -> Templates:
    """ "" without one. Raises Broken, OSError."""
    file = directory / "chat_template.jinja"
    if file.is_file() and file.stat().st_size <= MAX_JSON_BYTES:
        return file.read_text(encoding="utf-8", errors="replace")
    config = directory / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):
        return {str(one.get("name")): str(one.get("template")) for one in template if isinstance(one, dict)}
    return template if isinstance(template, str) else ""
