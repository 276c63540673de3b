"""What the documents say about the tree is true."""

from __future__ import annotations

import re
from pathlib import Path

import mlxd
from mlxd import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_tree_in_the_readme_names_every_file_and_no_other() -> None:
    tree = README[README.index("## The tree") :]
    there = {p.name for p in Path(mlxd.__file__).parent.rglob("*.py")} - {"__main__.py"}
    assert set(re.findall(r"[a-z_]+\.py", tree)) == there


def test_every_command_in_the_readme_exists_and_every_command_is_in_the_readme() -> None:
    table = README[README.index("| command |") : README.index("`--json` is")]
    named = set(re.findall(r"`(?:mlxd )?([a-z]+)[^`]*`", table))
    assert named == set(cli.FILES)
