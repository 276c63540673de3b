"""launchctl, systemctl and loginctl in small, for a PATH of scripts that call it: `fake_manager.py DIRECTORY NAME WORD...`.

In the directory lie `calls.jsonl` (every call), `replies.json` (a verb, or verb and words -> [[status, stderr], ...], played before anything
else; status null: as always) and `jobs.json` (job -> pid, 0 without a process, -N: gone after N more looks). A job is begun with the
environment and the command of its file and nothing else, as launchd and systemd do.
"""

from __future__ import annotations

import contextlib
import json
import os
import plistlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import psutil

HERE, PROGRAM = Path(sys.argv[1]), sys.argv[2]
REPLIES, JOBS, CALLS = HERE / "replies.json", HERE / "jobs.json", HERE / "calls.jsonl"


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def end(status: int, words: str = "") -> NoReturn:
    print(words, file=sys.stderr if status else sys.stdout)
    sys.exit(status)


class Jobs(dict[str, int]):
    """What is loaded, and the pid of each."""

    def keep(self) -> None:
        JOBS.write_text(json.dumps(self))

    def pid(self, job: str) -> int:
        with contextlib.suppress(psutil.Error, ValueError):
            process = psutil.Process(self.get(job) or -1)
            return process.pid if process.status() != psutil.STATUS_ZOMBIE else 0
        return 0

    def begin(self, job: str, command: list[str], environ: dict[str, str]) -> None:
        self.setdefault(job, 0)
        if command and not self.pid(job):
            with open(HERE / f"{job}.log", "ab") as log:
                self[job] = subprocess.Popen(
                    command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True
                ).pid
        self.keep()

    def finish(self, job: str) -> None:
        if pid := self.pid(job):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                process.terminate()
                process.wait(timeout=60)


def launchctl(verb: str, words: list[str], jobs: Jobs) -> None:
    job = words[-1].rpartition("/")[2] if "/" in words[-1] else ""
    if verb == "print" and re.fullmatch(r"(gui|user)/\d+|system", words[0]):
        end(0, words[0])
    if verb == "print":
        if jobs.get(job, 0) < 0:  # after a bootout
            jobs[job] += 1
            jobs.keep()
            if jobs[job] == 0:
                del jobs[job]
                jobs.keep()
            end(0, f"{job} = {{\n\tstate = running\n}}")
        if job not in jobs:
            end(113, f'Could not find service "{job}" in domain')
        pid = jobs.pid(job)
        end(0, f"{job} = {{\n\tstate = {'running' if pid else 'not running'}\n" + (f"\tpid = {pid}\n" if pid else "") + "}")
    if verb in ("bootstrap", "kickstart"):
        file = HERE / "path" / job if verb == "kickstart" else Path(words[1])
        content = plistlib.loads(file.read_bytes())
        job = content["Label"]
        if verb == "bootstrap":
            if job in jobs:
                end(5, "Bootstrap failed: 5: Input/output error")
            (HERE / "path").mkdir(exist_ok=True)
            (HERE / "path" / job).write_bytes(file.read_bytes())
        if "-k" in words:
            jobs.finish(job)
        command = content["ProgramArguments"] if content.get("KeepAlive") else []
        jobs.begin(job, command, content["EnvironmentVariables"])
    if verb == "bootout":
        if job not in jobs:
            end(3, "Boot-out failed: 3: No such process")
        jobs.finish(job)
        looks = read(REPLIES).get("bootout lasts", 0)
        if looks:
            jobs[job] = -looks
        else:
            del jobs[job]
        jobs.keep()


def systemctl(verb: str, words: list[str], jobs: Jobs) -> None:
    job = words[-1] if verb != "show" else words[0]
    directory = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd/user"
    text = (directory / job).read_text() if (directory / job).is_file() else ""
    enabled = HERE / f"{job}.enabled"
    if verb == "show":
        state = "active" if jobs.pid(job) or (job in jobs and job.endswith(".timer")) else "inactive"
        file = "enabled" if enabled.exists() else "disabled"
        loaded = "loaded" if text else "not-found"
        end(0, f"LoadState={loaded}\nActiveState={state}\nUnitFileState={file}\nMainPID={jobs.pid(job)}\nExecMainStatus=0")
    if verb == "enable":
        enabled.touch()
    if verb in ("stop", "restart"):
        for one in words:
            jobs.finish(one)
            jobs.pop(one, None)
        jobs.keep()
    if verb == "disable":
        enabled.unlink(missing_ok=True)
    if verb in ("start", "restart"):
        command = re.search(r'^ExecStart="(.+?)" (.+)$', text, re.MULTILINE)
        environ = dict(pair.split("=", 1) for pair in re.findall(r'^Environment="(.*)"$', text, re.MULTILINE))
        jobs.begin(job, [command[1], *command[2].split()] if command else [], environ)


def main() -> None:
    words = [word for word in sys.argv[3:] if word != "--user"]
    with open(CALLS, "a") as calls:
        calls.write(json.dumps([PROGRAM, *sys.argv[3:]]) + "\n")
    replies = read(REPLIES)
    for key in (" ".join(words), words[0]):
        if isinstance(script := replies.get(key), list) and script:
            status, told = script.pop(0)
            REPLIES.write_text(json.dumps(replies))
            if status is not None:
                end(status, told)
    if PROGRAM == "loginctl":
        lingers = HERE / "lingers"
        if words[0] == "enable-linger":
            lingers.touch()
        end(0, "Linger=yes" if lingers.exists() else "Linger=no")
    (launchctl if PROGRAM == "launchctl" else systemctl)(words[0], words[1:] or [""], Jobs(read(JOBS)))


if __name__ == "__main__":
    main()
