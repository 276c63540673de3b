"""What is installed: the locks, the wheel, and the sentence for a machine without a Python."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCKS = ["run", "cuda13", "build", "test"]
#: One entry: a pinned requirement and its hashes, on lines that end in a backslash but for the last.
ENTRY = re.compile(r"(?P<requirement>[^\s\\][^\\\n]*?)(?: \\\n    --hash=sha256:[0-9a-f]{64})+")
MAC = {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"}
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}


def lock_text(name: str) -> str:
    return (ROOT / "requirements" / f"{name}.txt").read_text()


def locked(name: str) -> list[Requirement]:
    return [Requirement(entry["requirement"]) for entry in ENTRY.finditer(lock_text(name))]


def versions(name: str, platform: dict[str, str]) -> dict[str, str]:
    """What the lock installs on `platform`: name -> version."""
    chosen = [entry for entry in locked(name) if entry.marker is None or entry.marker.evaluate(platform)]
    pins = {canonicalize_name(entry.name): str(entry.specifier).removeprefix("==") for entry in chosen}
    assert len(pins) == len(chosen), f"{name}: the same package twice"
    return pins


def project() -> dict[str, object]:
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def build_wheel(directory: Path, tree: Path = ROOT) -> Path:
    code = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, directory], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory / done.stdout.split()[-1]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_names_versions_and_hashes_and_nothing_else(name: str) -> None:
    comment, entries = lock_text(name).split("\n", 1)
    assert comment.startswith("# ") and "/" not in comment
    assert ENTRY.sub("", entries).strip() == ""
    for entry in locked(name):
        assert entry.url is None and not entry.extras
        assert re.fullmatch(r"==[\w.+!]+", str(entry.specifier)), entry


@pytest.mark.parametrize("platform", [MAC, LINUX], ids=["macos", "linux"])
def test_the_locked_versions_are_what_the_project_asks_for(platform: dict[str, str]) -> None:
    table = project()
    asked = {
        "run": table["project"]["dependencies"],
        "cuda13": table["project"]["dependencies"],
        "build": table["build-system"]["requires"],
        "test": table["project"]["optional-dependencies"]["test"],
    }
    for name in LOCKS:
        pins = versions(name, platform)
        for requirement in map(Requirement, asked[name]):
            if requirement.marker is None or requirement.marker.evaluate(platform):
                assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), f"{name}: {requirement}"


def test_only_one_package_brings_libmlx() -> None:
    cpu, cuda, mac = versions("run", LINUX), versions("cuda13", LINUX), versions("run", MAC)
    assert "mlx-cpu" in cpu and "mlx-cuda-13" not in cpu
    assert "mlx-cuda-13" in cuda and "mlx-cpu" not in cuda
    assert "mlx-metal" in mac and "mlx-cpu" not in mac
    assert cpu["mlx"] == cpu["mlx-cpu"] == cuda["mlx-cuda-13"] == mac["mlx-metal"]


@pytest.mark.parametrize("platform", [MAC, LINUX], ids=["macos", "linux"])
def test_a_package_in_two_locks_has_one_version(platform: dict[str, str]) -> None:
    run = versions("run", platform)
    for name in LOCKS[1:]:
        pins = versions(name, platform)
        assert {package: pins[package] for package in pins.keys() & run.keys()} == {
            package: run[package] for package in pins.keys() & run.keys()
        }


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info"
    assert {name.split("/")[0] for name in names} == {"mlxd", info}
    assert not [name for name in names if name.endswith((".pth", ".pyc", ".so"))]
    assert "mlxd/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    for manager in ("launchd", "systemd"):
        there = {f"mlxd/{manager}/{file.name}" for file in (ROOT / manager).iterdir()}
        assert there and there == {name for name in names if name.startswith(f"mlxd/{manager}/")}
    for kind in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        assert [name for name in names if name.startswith("mlxd/builtin/") and name.endswith(f"/{kind}")], (
            f"no {kind} of the built-in model"
        )
    assert {f"mlxd/web/{file.name}" for file in (ROOT / "mlxd" / "web").iterdir()} <= set(names)


def test_building_the_wheel_elsewhere_and_later_gives_the_same_file(wheel: Path, tmp_path: Path) -> None:
    tree = tmp_path / "elsewhere"
    for name in ("mlxd", "launchd", "systemd"):
        shutil.copytree(ROOT / name, tree / name, copy_function=shutil.copyfile)  # with today's times
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copyfile(ROOT / name, tree / name)
    again = build_wheel(tmp_path, tree)
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(wheel.read_bytes()).digest()


def test_sec_31_all_that_is_installed_from_outside_is_locked_by_its_hash() -> None:
    text = (ROOT / "Makefile").read_text()
    assert "LOCKED = $(PIP) install -q --require-hashes --no-deps --only-binary :all:\n" in text
    for line in [
        line for line in text.splitlines() if "install" in line and ("$(PIP)" in line or "$(LOCKED)" in line or "pip " in line)
    ]:
        from_a_lock = "$(LOCKED) -r " in line or line.startswith("LOCKED =")
        assert from_a_lock or "--no-index" in line and "--no-build-isolation" in line and "--no-deps" in line, line
    readme = re.findall(r"^pip install .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert readme and all("--require-hashes" in line or "--no-build-isolation" in line for line in readme), readme


@pytest.mark.parametrize("honest", [True, False], ids=["right", "wrong"])
def test_a_wrong_hash_is_refused(wheel: Path, tmp_path: Path, honest: bool) -> None:
    digest = hashlib.sha256(wheel.read_bytes() + (b"" if honest else b"?")).hexdigest()
    lock = tmp_path / "lock.txt"
    lock.write_text(f"mlxd=={wheel.name.split('-')[1]} --hash=sha256:{digest}\n")
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-index", "--find-links", wheel.parent]
    target = ["--target", tmp_path / "target", "--no-compile"]
    done = subprocess.run(
        [*pip, *target, "--require-hashes", "--no-deps", "-r", lock], capture_output=True, text=True, env=without_pip_settings()
    )
    assert (done.returncode == 0) is honest, done.stderr
    assert (tmp_path / "target" / "mlxd").exists() is honest
    if not honest:
        assert "DO NOT MATCH THE HASHES" in done.stderr


def without_pip_settings() -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if not name.startswith("PIP_")}, "PIP_CONFIG_FILE": os.devnull}


def find_python(path: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    command = ["/bin/sh", ROOT / "tools" / "find_python.sh"]
    return subprocess.run(command, env={"PATH": str(path), **settings}, capture_output=True, text=True)


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A PATH with uname on it and no Python."""
    directory = tmp_path / "bin"
    directory.mkdir()
    (directory / "uname").symlink_to(str(shutil.which("uname")))
    return directory


def fake(directory: Path, name: str, body: str) -> None:
    script = directory / name
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)


def test_without_a_python_one_sentence_says_what_to_install(bare_path: Path) -> None:
    done = find_python(bare_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "install" in done.stderr
    assert ("brew install python@3.12" if sys.platform == "darwin" else "apt install python3 python3-venv") in done.stderr


def test_the_newest_python_that_has_venv_is_taken(bare_path: Path) -> None:
    fake(bare_path, "python3.13", "exit 1")  # no venv, or too old: the question it is asked fails
    fake(bare_path, "python3.12", "exit 0")
    fake(bare_path, "python3", "exit 0")
    assert find_python(bare_path).stdout == f"{bare_path}/python3.12\n"


def test_the_python_that_was_asked_for_is_the_only_one_tried(bare_path: Path) -> None:
    fake(bare_path, "python3.12", "exit 0")
    fake(bare_path, "mine", "exit 0")
    assert find_python(bare_path, PYTHON="mine").stdout == f"{bare_path}/mine\n"
    done = find_python(bare_path, PYTHON="missing")
    assert done.returncode == 1 and "PYTHON=missing" in done.stderr


def test_this_python_is_found_fit_to_run_mlxd(tmp_path: Path) -> None:
    assert find_python(tmp_path, PYTHON=sys.executable).stdout == f"{sys.executable}\n"
