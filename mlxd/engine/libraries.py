"""What the libraries under an engine are told before it imports them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def prepare() -> None:
    """First thing in an engine. Downloads are the puller's job."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    scan_once()


def scan_once() -> None:
    """transformers reads its 1,600 files to see what they export, remembers that under the name of their directory, and reads them all again
    when it is asked by the name of a file in there: a quarter of an engine's start. Let both be one name."""
    from transformers.utils import import_utils

    scan = getattr(import_utils, "create_import_structure_from_path", None)
    if scan is None:  # another version, which may do it better
        return

    def once(place: str | Path) -> Any:
        path = Path(place)
        return scan(path.parent if path.is_file() else path)

    import_utils.create_import_structure_from_path = once
