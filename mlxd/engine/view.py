"""A private view of a model's directory: what libraries may see of it, and whether they may see it at all.

Owns the view: links to the files that are data, and copies of the small JSON files without what would call code; and the checks of what
reaches mlx-lm's imports. The checks of the files themselves are in `modelfiles`. Imports nothing of MLX: the puller asks here, too.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import pkgutil
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlxd.modelfiles import (
    ENCODERS,
    INDEX,
    Broken,
    check_format,
    check_settings,
    check_tokenizer,
    read_json,
    read_weights,
    refuse_code,
)

#: Linked into the view, besides the weights. No *.py, no pickle.
DATA = {
    INDEX,
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tiktoken.model",
}
#: Read, stripped of `auto_map` and written into the view.
SETTINGS = {
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "hf_quant_config.json",
}


def make_view(directory: Path, view: Path) -> dict[str, Any]:
    """Check the model in `directory` and make `view` anew from it. Returns the model's config.json. Raises Broken."""
    try:
        names = sorted(p.name for p in directory.iterdir() if is_data_file(p))
    except OSError as error:
        raise Broken(
            f"its directory cannot be read: {error.strerror}; put the model's files there or name another model"
        ) from error
    check_format(names)
    settings = read_settings(directory, names)
    read_weights(directory, names)
    check_tokenizer(names)
    shutil.rmtree(view, ignore_errors=True)
    view.mkdir(parents=True, mode=0o700)
    for name in names:
        if name in settings:
            try:
                text = json.dumps(without_auto_map(settings[name]))
            except RecursionError:
                raise Broken(f"{name} is nested too deeply; download the model again") from None
            (view / name).write_text(text, encoding="utf-8")
        elif name in DATA or name.endswith((".safetensors", ".jinja", ".tiktoken")):
            (view / name).symlink_to((directory / name).resolve())
    return settings["config.json"]


def read_settings(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The JSON files among `names` that libraries will see, if mlx-lm can run what they describe, and none asks for code. Raises Broken."""
    if "config.json" not in names:
        raise Broken("config.json is missing; download the model again")
    settings = {name: read_json(directory / name) for name in names if name in SETTINGS}
    for name, found in settings.items():  # what libraries will see, whatever becomes of the files
        refuse_code(name, found)
    check_settings(directory, [name for name in names if name not in SETTINGS])
    check_model_type(settings["config.json"])
    check_plugins(settings.get("tokenizer_config.json", {}))
    return settings


def is_data_file(path: Path) -> bool:
    """A regular file, or a link to one: the Hugging Face cache is links."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def without_auto_map(found: Any) -> Any:
    """`auto_map` names code for other tools; models that carry it load without."""
    if isinstance(found, dict):
        return {key: without_auto_map(value) for key, value in found.items() if key != "auto_map"}
    if isinstance(found, list):
        return [without_auto_map(value) for value in found]
    return found


def check_model_type(config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise Broken("config.json names no model_type; mlxd needs a model in MLX's format")
    if model_type in ENCODERS:
        return
    if remapping().get(model_type, model_type) not in modules("models"):
        raise Broken(f"config.json has model_type {model_type!r}, which mlx-lm cannot run; use a text model that it supports")


def check_plugins(config: dict[str, Any]) -> None:
    """Both names reach importlib in mlx-lm; only its own modules may be named."""
    for key, package in (("tool_parser_type", "tool_parsers"), ("chat_template_type", "chat_templates")):
        known = modules(package)
        if config.get(key) and config[key] not in known:
            raise Broken(
                f"tokenizer_config.json has {key} {config[key]!r}, which mlx-lm does not know; known are {', '.join(known)}"
            )


def mlx_lm() -> Path:
    """Where it is installed; importing it takes 2 s and 250 MB."""
    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def modules(package: str) -> list[str]:
    """The modules of one of mlx-lm's packages."""
    return [module.name for module in pkgutil.iter_modules([str(mlx_lm() / package)])]


@functools.cache
def remapping() -> dict[str, str]:
    """mlx-lm's MODEL_REMAPPING: a model_type -> the module that runs it."""
    tree = ast.parse((mlx_lm() / "utils.py").read_text(encoding="utf-8"))
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    value = next(node.value for node in assigned if isinstance(name := node.targets[0], ast.Name) and name.id == "MODEL_REMAPPING")
    found: dict[str, str] = ast.literal_eval(value)
    return found
