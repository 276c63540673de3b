"""What the documents say about the tree is true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec

import mlxd
from mlxd import causes, cli, config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [*ROOT.glob("*.md"), ROOT / "bench" / "README.md", *(ROOT / "docs").glob("*.md")]


def test_the_tree_in_the_readme_names_every_file_and_no_other() -> None:
    tree = README[README.index("## The tree") :]
    there = {p.name for p in Path(mlxd.__file__).parent.rglob("*.py")} - {"__main__.py"}
    assert set(re.findall(r"[a-z_]+\.py", tree)) == there


def test_every_command_in_the_readme_exists_and_every_command_is_in_the_readme() -> None:
    table = README[README.index("| command |") : README.index("`--json` is")]
    named = set(re.findall(r"`(?:mlxd )?([a-z]+)[^`]*`", table))
    assert named == set(cli.FILES)


def test_every_example_of_config_toml_is_a_configuration(tmp_path: Path) -> None:
    sections = {field.name for field in msgspec.structs.fields(config.Config)} | {"services"}
    read = 0
    for file in (ROOT / "docs").glob("*.md"):
        for text in re.findall(r"^```toml\n(.*?)^```", file.read_text(), re.M | re.S):
            if tomllib.loads(text).keys() <= sections:  # else it is another program's
                (tmp_path / "config.toml").write_text(text)
                config.load(tmp_path / "config.toml", [], {})
                config.read_services(tmp_path / "config.toml")
                read += 1
    assert read > 5


def test_troubleshooting_says_what_to_do_about_every_cause() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| (`[^|]*`) \| [^|]+ \|", text[text.index("## By cause") : text.index("## Doctor")], re.M)
    assert {cause for row in rows for cause in re.findall(r"`([^`]+)`", row)} == set(causes.CAUSES)


def test_what_troubleshooting_quotes_is_what_mlxd_says() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    table = text[text.index("## By symptom") : text.index("## By cause")]
    quoted = [code for code in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", table, flags=re.M | re.S)) if " " in code]
    quoted = [code for code in quoted if not code.startswith(("mlxd", "make", "ssh", "[ollama]"))]
    source = "".join(file.read_text() for file in Path(mlxd.__file__).parent.rglob("*.py"))
    unsaid = [code for code in quoted for part in re.split(r"\d+|NAME|\(.*\)", code) if part.strip(" '") not in source]
    assert len(quoted) > 7 and not unsaid


def test_links_between_documents_lead_somewhere() -> None:
    wrong = []
    for file in DOCUMENTS:
        for link in re.findall(r"\]\(([^)\s]+)\)", without_fences(file)):
            target, _, anchor = link.partition("#")
            if target.startswith(("http:", "https:")):
                continue
            place = (file.parent / target).resolve() if target else file
            if not place.exists() or (anchor and anchor not in anchors(place)):
                wrong.append(f"{file.name}: {link}")
    assert not wrong


def test_every_document_is_in_the_list_of_documents() -> None:
    text = (ROOT / "docs" / "README.md").read_text()
    there = {file.name for file in (ROOT / "docs").iterdir() if file.suffix != ".png"} - {"README.md"}
    assert set(re.findall(r"\]\(([^)/#]+)\)", text)) == there


def without_fences(file: Path) -> str:
    return re.sub(r"^```.*?^```", "", file.read_text(), flags=re.M | re.S)


def anchors(file: Path) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_fences(file), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
