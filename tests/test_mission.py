"""The table of what mlxd is for, row by row: each test does what its row says, with real servers. A second mlxd plays Ollama's part."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import NO_SPARE, Daemon, eventually, http
from neighbours import Neighbour, free_port, neighbour

from mlxd import endpoint, ports

__all__ = ["neighbour"]
#: They share two daemons.
pytestmark = pytest.mark.xdist_group("mission")


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Daemon]]:
    """Makes daemons of real parts, started and ready, each on a port of its own that its user gave it."""
    import tempfile

    with contextlib.ExitStack() as stack:

        def make(**settings: str) -> Daemon:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlxd-t-")))
            port = str(free_port())
            common = {
                "MLX_API_PORT": port,
                "MLX_MODELS_DIR": str(home / "models"),
                "HF_HOME": str(home / "hub"),
                "MLXD_SUPERVISOR_SPARE_BYTES": NO_SPARE,
            }
            one = Daemon(home, **common | settings)
            stack.callback(one.close)
            assert one.mlxd("start").returncode == 0, one.history()
            return one

        yield make


@pytest.fixture(scope="module")
def mlx(homes: Callable[..., Daemon], ollama: Daemon) -> Daemon:
    return homes(OLLAMA_URL=url(ollama), MLXD_OLLAMA_WANTED="1")


@pytest.fixture(scope="module")
def ollama(homes: Callable[..., Daemon]) -> Daemon:
    """A second mlxd."""
    return homes()


def url(one: Daemon) -> str:
    return f"http://localhost:{one.environ['MLX_API_PORT']}"


def curl(one: Daemon, path: str) -> tuple[int, Any]:
    port = int(one.environ["MLX_API_PORT"])
    status, _, body = http(port, f"GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n".encode())
    return status, json.loads(body)


CHAT = {"model": "mlxd-tiny", "messages": [{"role": "user", "content": "What is mlxd?"}], "stream": False}


def test_mlx_and_ollama_run_side_by_side_on_two_ports(mlx: Daemon, ollama: Daemon) -> None:
    assert mlx.environ["MLX_API_PORT"] != ollama.environ["MLX_API_PORT"]
    for one in (mlx, ollama):
        assert curl(one, "/api/tags")[0] == 200
        assert endpoint.Client(endpoint.Endpoint(None, url(one))).call("/api/chat", CHAT)["done"] is True


def test_the_checks_in_the_note_are_answered_exactly_so(mlx: Daemon) -> None:
    status, tags = curl(mlx, "/api/tags")
    assert status == 200 and [model["name"] for model in tags["models"]] == ["mlxd-tiny:latest"]
    status, health = curl(mlx, "/health")
    assert status == 200 and health["status"] == "ok"


def test_the_server_keeps_connections_for_two_minutes_and_is_one_process(mlx: Daemon) -> None:
    with socket.create_connection(("127.0.0.1", int(mlx.environ["MLX_API_PORT"])), timeout=20) as sock:
        for _ in range(2):  # on one connection
            sock.sendall(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while b'"version"' not in answer:
                answer += sock.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")
    assert len([p for p in mlx.ours() if "mlxd.server" in " ".join(p.cmdline())]) == 1
    from mlxd import server

    text = Path(server.__file__).read_text()
    assert "timeout_keep_alive=120" in text.replace(" ", "") and "limit_concurrency" in text


def test_start_runs_in_the_background_and_keeps_its_pid_for_the_monitor(mlx: Daemon) -> None:
    assert int(mlx.paths.pid_file.read_text()) == mlx.status()["supervisor"]["pid"]
    assert os.getsid(mlx.status()["supervisor"]["pid"]) != os.getsid(0)


def test_one_table_shows_all_services_on_the_ports_that_the_variables_name(mlx: Daemon, ollama: Daemon) -> None:
    ran = mlx.mlxd("check")
    assert ran.returncode == 0, ran.stdout
    rows = {line.split()[0]: line.split()[1:3] for line in ran.stdout.splitlines()[1:]}
    assert rows == {"mlx": [f"http://127.0.0.1:{mlx.environ['MLX_API_PORT']}", "ready"], "ollama": [url(ollama), "up"]}


def test_status_shows_ollama_beside_it(mlx: Daemon, ollama: Daemon) -> None:
    told = json.loads(mlx.mlxd("status", "--json").stdout)["ollama"]
    assert told["url"] == url(ollama) and told["state"] in ("up", "slow")
    assert "ollama " in mlx.mlxd("status").stdout


def test_status_tells_what_ollama_holds_in_memory(daemon: Callable[..., Daemon], neighbour: Callable[..., Neighbour]) -> None:
    d = daemon(OLLAMA_URL=neighbour().url)
    d.start()
    d.ready()

    def told() -> dict[str, Any]:
        return json.loads(d.mlxd("status", "--json").stdout)["ollama"]

    found = eventually(lambda: (now := told())["state"] == "up" and now, "an Ollama that is quick enough")
    assert found["memory_bytes"] == 5_000_000_000 and found["models"] == ["llama3:8b"]
    eventually(lambda: "memory 5.0 GB  llama3:8b" in d.mlxd("status").stdout, "its row")


def test_programs_find_the_server_through_two_variables(mlx: Daemon, ollama: Daemon, tmp_path: Path) -> None:
    code = "from mlxd.endpoint import resolve; print(resolve().url)"

    def asked(**environ: str) -> str:
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("MLX", "OLLAMA"))} | {"MLXD_HOME": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-c", code], env=outside | environ, cwd=tmp_path, capture_output=True, text=True
        ).stdout.strip()

    assert asked() == "http://localhost:11434"
    assert asked(MLX_API_URL="http://localhost:11435") == "http://localhost:11435"
    assert asked(MLX_API_URL="disabled", OLLAMA_URL=url(ollama)) == asked(MLX_API_URL="", OLLAMA_URL=url(ollama)) == url(ollama)
    (tmp_path / ".env").write_text(f"MLX_API_URL={url(mlx)}\n")
    assert asked() == url(mlx)


def test_the_app_is_imported_by_any_program_without_mlx(tmp_path: Path) -> None:
    code = "import sys; from mlxd.server import app; assert not {'mlx', 'mlx_lm'} & {n.split('.')[0] for n in sys.modules}"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PATH": os.environ["PATH"]}).returncode == 0
    assert list(tmp_path.iterdir()) == []


# --- what ends one of them, last ----------------------------------------------------------------------------------------------------


def test_the_monitor_starts_a_crashed_mlxd_again_and_says_why(mlx: Daemon) -> None:
    before = mlx.status()["supervisor"]["pid"]
    watching = subprocess.Popen(
        [sys.executable, "-m", "mlxd", "monitor", "--interval", "0.2"], env=mlx.environ, stdout=subprocess.PIPE, text=True
    )
    assert watching.stdout is not None
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(watching.stdout), daemon=True)  # type: ignore[arg-type]
    reader.start()
    try:
        eventually(lambda: any("mlx  ready" in line for line in lines), "a first round")
        os.kill(before, signal.SIGKILL)
        eventually(
            lambda: any("restarted through mlxd because it was down" in line for line in lines), "a restart", lambda: str(lines)
        )
    finally:
        watching.terminate()
    assert watching.wait(timeout=60) == 0
    reader.join(timeout=10)
    assert mlx.ready()["supervisor"]["pid"] != before


def test_recover_repairs_what_is_down_and_ends_with_a_report(mlx: Daemon) -> None:
    os.kill(mlx.status()["supervisor"]["pid"], signal.SIGKILL)
    ran = mlx.mlxd("recover")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.startswith("mlx  restarted through mlxd because it was down") and "\nservice  address" in ran.stdout
    assert curl(mlx, "/health")[0] == 200


@pytest.mark.skipif(sys.platform != "linux", reason="its owner is systemd here; test_recovery has launchd's part")
def test_recover_restarts_an_ollama_that_hangs_through_its_owner(mlx: Daemon, ollama: Daemon, tmp_path: Path) -> None:
    """As after sleep and wake: it accepts connections and answers nobody."""
    pids = [process.pid for process in ollama.ours()]
    listening = ports.listener(int(ollama.environ["MLX_API_PORT"]))
    assert listening is not None and listening.pid in pids
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f"""#!/bin/sh
case "$*" in
"--user show ollama.service"*) printf 'LoadState=loaded\\nActiveState=active\\nMainPID={listening.pid}\\n' ;;
"--user restart ollama.service") kill -CONT {" ".join(map(str, pids))} ;;
*) echo LoadState=not-found ;;
esac
""")
    systemctl.chmod(0o755)
    more = {"PATH": f"{tmp_path}:{mlx.environ['PATH']}", "MLXD_OLLAMA_RECOVER": "1", "MLX_HEALTH_MAX_TIME": "1"}
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        command = [sys.executable, "-m", "mlxd", "recover"]
        ran = subprocess.run(command, env=mlx.environ | more, capture_output=True, text=True, timeout=100, check=False)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "ollama  restarted through systemd --user because it was hung" in ran.stdout
    assert curl(ollama, "/api/tags")[0] == 200


def test_a_programs_client_goes_on_with_ollama_when_mlx_is_stopped_and_comes_back(mlx: Daemon, ollama: Daemon) -> None:
    client = endpoint.Client(endpoint.Endpoint(url(mlx), url(ollama)))
    assert client.url() == url(mlx)
    assert mlx.mlxd("stop").returncode == 0
    assert client.url() == url(ollama)
    assert client.call("/api/chat", CHAT)["message"]["content"]
    assert mlx.mlxd("start").returncode == 0
    assert client.url() == url(mlx)
