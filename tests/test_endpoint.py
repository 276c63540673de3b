"""Where programs find a server, and `mlxd env`."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import dotenv
import pytest
from conftest import Daemon
from neighbours import Neighbour, neighbour

from mlxd import endpoint
from mlxd.errors import ConfigError, NotRunning

__all__ = ["neighbour"]
MLX, OLLAMA = "http://localhost:11435", "http://localhost:11434"


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment without anything, in a directory without anything."""
    monkeypatch.chdir(tmp_path)
    return {"MLXD_HOME": str(tmp_path / "home")}


@pytest.mark.parametrize(
    ("environ", "url", "urls"),
    [
        ({}, OLLAMA, [OLLAMA]),
        ({"MLX_API_URL": MLX}, MLX, [MLX, OLLAMA]),
        ({"MLX_API_URL": MLX + "/"}, MLX, [MLX, OLLAMA]),
        ({"MLX_API_URL": "disabled"}, OLLAMA, [OLLAMA]),
        ({"MLX_API_URL": "Disabled "}, OLLAMA, [OLLAMA]),
        ({"MLX_API_URL": ""}, OLLAMA, [OLLAMA]),
        ({"OLLAMA_URL": "https://nas:8443/ollama"}, "https://nas:8443/ollama", ["https://nas:8443/ollama"]),
        ({"OLLAMA_URL": ""}, OLLAMA, [OLLAMA]),
        ({"OLLAMA_URL": "http://[::1]:1", "MLX_API_URL": MLX}, MLX, [MLX, "http://[::1]:1"]),
    ],
)
def test_a_program_is_sent_where_the_variables_say(
    nowhere: dict[str, str], environ: dict[str, str], url: str, urls: list[str]
) -> None:
    found = endpoint.resolve(nowhere | environ)
    assert found.url == url
    assert found.urls == urls


@pytest.mark.parametrize("name", ["MLX_API_URL", "OLLAMA_URL"])
@pytest.mark.parametrize(
    "url", ["localhost:11434", "off", "ftp://x", "http://", "http://x:port", "http://x:0", "http://x y", "http://x?a", "http://[x"]
)
def test_what_is_no_url_is_refused_with_the_name_of_its_variable(nowhere: dict[str, str], name: str, url: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a URL") as caught:
        endpoint.resolve(nowhere | {name: url})
    assert caught.value.exit_status == 78


def test_a_env_file_counts_and_the_nearer_one_counts_more(nowhere: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".env").write_text("MLX_API_URL=http://far:1\nOLLAMA_URL=http://far:2\nMLX_API_PORT=4\n")
    (tmp_path / ".env").write_text("MLX_API_URL='http://near:1'\n")
    assert endpoint.resolve(nowhere).urls == ["http://near:1", "http://far:2"]
    assert endpoint.resolve(nowhere | {"MLX_API_URL": "disabled"}).urls == ["http://far:2"]


def test_a_env_file_of_the_working_directory_moves_no_state_and_opens_no_port(nowhere: dict[str, str], tmp_path: Path) -> None:
    names = ("MLXD_HOME", "MLX_API_HOST", "MLXD_SERVER_HOST", "MLXD_SECURITY_STRICT_HOST")
    (tmp_path / ".env").write_text("".join(f"{name}=x\n" for name in names) + "MLX_API_PORT=7\n")
    found = endpoint.environment(nowhere)
    assert found == nowhere | {"MLX_API_PORT": "7"}


def test_it_is_imported_without_mlx_and_without_any_package(tmp_path: Path) -> None:
    code = (
        "import sys, sysconfig; from mlxd import endpoint; endpoint.resolve();"
        "print(sorted({n.split('.')[0] for n in sys.modules} & {'mlx', 'mlx_lm', 'msgspec', 'psutil', 'starlette', 'http', 'asyncio'}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []


def test_the_client_takes_mlx_while_it_is_well_and_ollama_when_it_is_not(neighbour: Callable[..., Neighbour]) -> None:
    mlx, ollama = neighbour(), neighbour()
    client = endpoint.Client(endpoint.Endpoint(mlx.url, ollama.url), look_s=0.3)
    assert client.url() == ollama.url  # an Ollama has no /health: nothing that plays MLX there is taken for it
    client = endpoint.Client(endpoint.Endpoint(None, ollama.url))
    assert client.call("/api/version") == {"version": "0.12.0"}
    assert client.call("/api/chat", {"model": "x"})["message"]["content"] == "I am Ollama."
    ollama.end()
    with pytest.raises(NotRunning, match="start mlxd with `mlxd start`, or Ollama"):
        client.call("/api/version")


# --- mlxd env -----------------------------------------------------------------------------------------------------------------------


def test_env_prints_where_mlxd_is_for_every_kind_of_client(daemon: Callable[..., Daemon]) -> None:
    d = daemon(OLLAMA_URL="http://localhost:5")
    ran = d.mlxd("env")
    assert ran.returncode == 1 and "run `mlxd start` first" in ran.stderr
    d.start()
    d.ready()
    url = f"http://127.0.0.1:{d.status()['port']}"
    assert json.loads(d.mlxd("env", "--json").stdout) == {
        "MLX_API_URL": url,
        "OLLAMA_URL": "http://localhost:5",
        "OLLAMA_HOST": url,
        "OPENAI_BASE_URL": f"{url}/v1",
        "ANTHROPIC_BASE_URL": url,
    }


def test_env_of_a_stopped_mlxd_says_where_it_would_be(daemon: Callable[..., Daemon]) -> None:
    assert "export MLX_API_URL=http://127.0.0.1:18435\n" in daemon(MLX_API_PORT="18435").mlxd("env").stdout


def test_env_with_mlx_turned_off_sends_everybody_to_ollama(daemon: Callable[..., Daemon]) -> None:
    ran = daemon(MLX_API_URL="disabled", OLLAMA_URL="http://localhost:5").mlxd("env")
    assert ran.stdout.splitlines() == [
        "export MLX_API_URL=disabled",
        "export OLLAMA_URL=http://localhost:5",
        "export OLLAMA_HOST=http://localhost:5",
        "export OPENAI_BASE_URL=http://localhost:5/v1",
        "export ANTHROPIC_BASE_URL=http://localhost:5",
    ]


def test_env_is_quoted_for_each_reader(daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    url = "http://x/$(touch)';&*~!%"
    d = daemon(MLX_API_URL=url)
    ran = subprocess.run(
        ["sh", "-c", d.mlxd("env").stdout + 'printf %s "$MLX_API_URL"'], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.stdout == url and list(tmp_path.iterdir()) == []
    assert dotenv.dotenv_values(stream=io.StringIO(d.mlxd("env", "--dotenv").stdout), interpolate=False)["MLX_API_URL"] == url
    told = d.mlxd("env", "--shell", "fish").stdout
    assert r"set -gx MLX_API_URL 'http://x/$(touch)\';&*~!%'" in told
    if shutil.which("fish"):
        ran = subprocess.run(["fish", "-c", told + 'printf %s "$MLX_API_URL"'], capture_output=True, text=True)
        assert ran.stdout == url


def test_env_of_a_bad_variable_is_exit_78(daemon: Callable[..., Daemon]) -> None:
    ran = daemon(OLLAMA_URL="nas").mlxd("env")
    assert ran.returncode == 78 and "OLLAMA_URL must be a URL" in ran.stderr
