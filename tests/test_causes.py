"""Why a process ended, told from what such processes really say, and what the next one gets less of."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Daemon, eventually
from engine_client import DEADLINE_S, PLENTY, EngineProcess, make_tiny_model

import mlxd
from mlxd import causes, child, messages, supervisor
from mlxd.causes import CAUSES, End
from mlxd.config import Config
from mlxd.config import Server as ServerSettings
from mlxd.messages import Bye, Tuning

Make = Callable[..., Daemon]
ABRT, SEGV, KILL = signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL
METAL = "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer execution failed: "
NO_MEMORY = METAL + "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
#: What faulthandler writes after every abort, some of it for each thread.
STACKS = "Fatal Python error: Aborted\n\nThread 0x00000001f0f2f100 (most recent call first):\n" + 300 * (
    '  File "/opt/venv/lib/python3.12/site-packages/mlx_lm/generate.py", line 1260 in next\n'
)

ABORTS = {
    # mlx-lm#854, omlx#2079, mlx#479
    NO_MEMORY: "memory",
    # omlx#1387
    METAL.replace("[METAL]", "\n[METAL]")
    + "Impacting Interactivity\n(0000000e: kIOGPUCommandBufferCallbackErrorImpactingInteractivity)": "watchdog",
    # omlx#3706
    METAL + "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)": "watchdog",
    METAL + "Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)": "watchdog",
    METAL
    + "Ignored (for causing prior/excessive GPU errors) (00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)": "ignored",
    # mlx-openai-server#169
    METAL + "Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)": "victim",
    # mlx-vlm#270: nothing that we have a cure for
    METAL + "Invalid Resource (00000009:kIOGPUCommandBufferCallbackErrorInvalidResource)": "aborted",
    # mlx#63
    "libc++abi: terminating due to uncaught exception of type std::runtime_error: [malloc_or_wait] Unable to allocate 9663676416 bytes.": (
        "memory"
    ),
    "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc": "memory",
    "terminate called without an active exception": "aborted",
    "": "aborted",
}

#: What an engine says of an exception that it caught, as the text of its last word.
BYES = {
    # mlx-lm#831, #1672
    "RuntimeError: [metal::malloc] Resource limit (499000) exceeded.": "handles",
    "RuntimeError: [metal::malloc] Attempting to allocate 18253611008 bytes which is greater than the maximum allowed buffer size of "
    "17179869184 bytes.": "memory",
    "RuntimeError: [malloc] Unable to allocate 4294967296 bytes.": "memory",
    "RuntimeError: [METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).": (
        "memory"
    ),
    "RuntimeError: cudaMallocAsync(&buf, size, stream) failed: out of memory": "memory",
    "MemoryError: ": "memory",
    "OSError: [Errno 28] No space left on device: '/home/me/mlxd/views/engine-1/config.json'": "disk",
    "ModuleNotFoundError: No module named 'sentencepiece'": "import",
    "ImportError: cannot import name 'BatchGenerator' from 'mlx_lm.generate'": "import",
    "ValueError: the model talks of a MemoryError, of Insufficient Memory and of an ImportError": "error",
    "WrongOutput: the model gave no numbers": "error",
}

LOG = "2026-11-23 18:37:34,684 mlxd.engine.control loading Insufficient Memory from /models/ImportError\n"
TRACEBACK = 'Traceback (most recent call last):\n  File "engine.py", line 1, in <module>\n'


@pytest.mark.parametrize("words", ABORTS)
def test_an_abort_is_known_by_what_was_printed_before_the_stacks(words: str) -> None:
    for number in (ABRT, SEGV):
        cause, line = causes.judge(End(signal=number, words=f"{LOG}{words}\n{STACKS}"))
        expected = ABORTS[words] if ABORTS[words] != "aborted" else {ABRT: "aborted", SEGV: "segfault"}[number]
        assert cause.name == expected
        assert line in words


@pytest.mark.parametrize("text", BYES)
def test_an_exception_is_known_by_the_last_word(text: str) -> None:
    assert causes.judge(End(code=70, bye=Bye("error", text), words=LOG + NO_MEMORY))[0].name == BYES[text]
    if not text.startswith(("ValueError", "WrongOutput")):
        assert causes.judge(End(code=1, words=LOG + TRACEBACK + text))[0].name == BYES[text]


@pytest.mark.parametrize(
    ("end", "name"),
    [
        (End(), "spawn"),
        (End(signal=KILL), "killed"),
        (End(signal=KILL, starved=True), "memory"),  # jetsam, and Linux' own
        (End(signal=KILL, words=LOG + NO_MEMORY), "killed"),  # a Metal error aborts: this one came from elsewhere
        (End(signal=signal.SIGTERM), "terminated"),
        (End(signal=signal.SIGINT), "terminated"),
        (End(signal=SEGV), "segfault"),
        (End(signal=signal.SIGBUS), "segfault"),
        (End(signal=signal.SIGUSR2), "signal"),
        (End(signal=60), "signal"),
        (End(signal=KILL, suspicion="frozen", starved=True), "frozen"),
        (End(signal=signal.SIGTERM, suspicion="paused"), "paused"),
        (End(signal=signal.SIGTERM, suspicion="stalled"), "stalled"),
        (End(signal=signal.SIGTERM, intended=True), "stopped"),
        (End(code=0, intended=True, bye=Bye("refused", "config.json is missing")), "refused"),
        (End(code=0, bye=Bye("stopped")), "stopped"),
        (End(code=70, bye=Bye("deadline", "the chat template took over 2 s")), "deadline"),
        (End(code=1, bye=Bye("a word of a later version")), "error"),
        (End(code=78), "configuration"),
        (End(code=0), "exited"),
        (End(code=70, words=LOG), "error"),
        (End(code=1, words=f"{TRACEBACK}MemoryError\n{LOG}{TRACEBACK}KeyError: 1"), "error"),  # the first one was survived
        (End(code=1, words=f"{TRACEBACK}KeyError: 1\n{LOG}{TRACEBACK}MemoryError"), "memory"),
        (End(signal=SEGV, untried=True), "blas"),
        (End(signal=ABRT, words="OpenBLAS blas_thread_init: pthread_create failed", untried=True), "blas"),
        (End(signal=signal.SIGILL, untried=True), "blas"),
        (End(code=127, words="python: symbol lookup error: undefined symbol: cblas_sgemm", untried=True), "blas"),
        (End(code=1, words=f"{TRACEBACK}ImportError: libmlx.so: undefined symbol: cblas_sgemm", untried=True), "blas"),
        (End(signal=signal.SIGTERM, suspicion="no hello", untried=True), "blas"),
        (End(signal=KILL, untried=True), "killed"),
        (End(signal=ABRT, words=NO_MEMORY, untried=True), "memory"),
        (End(code=0, bye=Bye("refused", "config.json is missing"), untried=True), "refused"),
        (End(signal=signal.SIGTERM, intended=True, untried=True), "stopped"),
        (End(code=70, bye=Bye("error", "KeyError: 1"), untried=True), "error"),
    ],
)
def test_the_nearest_evidence_counts(end: End, name: str) -> None:
    assert causes.judge(end)[0].name == name


def test_whoever_ended_it_decides_who_is_blamed() -> None:
    assert {name for name, cause in CAUSES.items() if cause.faultless} == {
        "killed",
        "terminated",
        "paused",
        "stopped",
        "deadline",
        "disk",
        "victim",
        "grown",
        "blas",
    }
    assert {name for name, cause in CAUSES.items() if cause.pressure} == {"memory"}
    assert all(cause.faultless for cause in CAUSES.values() if cause.outside)


def test_every_suspicion_of_the_supervisor_is_a_cause() -> None:
    lines = [
        line for line in Path(supervisor.__file__).read_text().splitlines() if "suspicion = " in line or "self.accuse(" in line
    ]
    found = set(re.findall(r'"([a-z ]+)"', "\n".join(lines))) - {"fault"}  # a hold's cause, on the same line
    assert found >= {"frozen", "stalled", "no hello", "link closed", "protocol", "unresponsive"}
    assert found <= CAUSES.keys()


def test_the_document_lists_every_cause() -> None:
    table = (Path(mlxd.__file__).parent.parent / "docs" / "causes.md").read_text()
    column = "\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`([a-z ]+)`", column)) == CAUSES.keys()


def test_what_gave_it_away_is_kept_when_the_stacks_are_longer() -> None:
    words = f"{LOG}{NO_MEMORY}\n{STACKS}"
    kept = child.told(words, NO_MEMORY)
    assert kept.startswith(NO_MEMORY + "\n...\n")
    assert kept.endswith(STACKS[-1000:])
    assert len(kept) == child.LAST_WORDS_BYTES
    assert child.told("short " + NO_MEMORY, NO_MEMORY) == "short " + NO_MEMORY


# --- the next start ----------------------------------------------------------------------------------------------------------------


def test_each_death_takes_half_of_what_it_was_about_down_to_a_floor() -> None:
    tuning, steps = Tuning(), []
    for _ in range(7):
        tuning = causes.eased(tuning, causes.MEMORY, 512, 32)
        steps.append((tuning.prefill_tokens, tuning.max_concurrent, tuning.cache_share))
    assert steps[:4] == [(256, 16, 0.5), (128, 8, 0.25), (64, 4, 0.125), (64, 2, 0.0)]
    assert steps[-1] == (64, 1, 0.0)
    assert causes.eased(Tuning(), causes.MEMORY, 16, 1) == Tuning(16, 1, 0.5, "ran out of memory")


def test_deaths_of_several_kinds_add_up_and_the_blameless_take_nothing() -> None:
    tuning = causes.eased(Tuning(), causes.WATCHDOG, 512, 32)
    assert tuning == Tuning(256, None, 1.0, causes.WATCHDOG.what)
    tuning = causes.eased(tuning, causes.HANDLES, 512, 32)
    assert tuning == Tuning(256, 16, 0.5, causes.HANDLES.what)
    for cause in (causes.KILLED, causes.ABORTED, causes.ERROR, causes.STALLED, causes.VICTIM):
        assert causes.eased(tuning, cause, 512, 32) is tuning


def test_the_remedy_is_a_sentence() -> None:
    tuning = causes.eased(Tuning(), causes.MEMORY, 512, 32)
    assert causes.remedy(causes.MEMORY, tuning) == (
        "ran out of memory; starts again with prefill step 256, 16 requests at once and half the prefix cache"
    )
    watchdog = causes.eased(Tuning(), causes.WATCHDOG, 512, 32)
    assert causes.remedy(causes.WATCHDOG, watchdog).endswith("too long; starts again with prefill step 256")
    assert causes.remedy(causes.IGNORED, Tuning(256)).endswith("starts again with prefill step 256 after a pause of 5 s")
    assert causes.remedy(causes.IMPORT, tuning) == "could not import a library; install mlxd again"
    assert causes.remedy(causes.KILLED, Tuning()) == "was killed from outside"
    assert causes.in_words(Tuning(None, 1, 0.0)) == "one request at a time and no prefix cache"
    assert causes.in_words(Tuning()) == ""


# --- through real processes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["memory", "watchdog", "victim"])
def test_an_engine_that_aborts_leaves_its_cause_and_starts_again_with_less(daemon: Make, home: Path, name: str) -> None:
    words = home / "words"
    words.write_text(next(text for text, cause in ABORTS.items() if cause == name) + "\n" + STACKS)
    d = daemon(server="--want a:latest", engine=f"--say-file {words} --abort --first 2 {home}/count")
    d.start()
    told = d.until(
        "two deaths and a third engine", lambda s: s["engines"][0]["restarts"] == 2 and s["engines"][0]["state"] == "ready"
    )
    first, second = [record for record in d.exits() if record["child"] == "engine"][:2]
    assert (first["cause"], second["cause"], first["signal"]) == (name, name, signal.SIGABRT)
    assert "[METAL] Command buffer execution failed" in first["text"]
    if name == "victim":
        assert told["state"] == "ready"
        return
    assert ("prefill step 256" in first["remedy"], "prefill step 128" in second["remedy"]) == (True, True)
    assert ("16 requests at once" in first["remedy"]) == ("half the prefix cache" in first["remedy"]) == (name == "memory")
    assert told["state"] == "degraded"
    assert (
        f"it now runs with prefill step 128{', 8 requests at once and a quarter of' if name == 'memory' else ''}" in told["reason"]
    )
    assert f"it {second['remedy']}" in d.log()


def test_what_was_taken_is_given_back_when_the_engine_has_been_well_for_a_while(daemon: Make, home: Path) -> None:
    words = home / "words"
    words.write_text(NO_MEMORY)
    d = daemon(
        server="--want a:latest",
        engine=f"--say-file {words} --abort --first 1 {home}/count",
        MLXD_SUPERVISOR_HEALTHY_S="3",
    )
    d.start()
    d.until("less", lambda s: "it now runs with prefill step 256" in s["reason"])
    d.ready()


def test_a_stack_of_a_suspicion_that_passed_is_in_no_record(daemon: Make) -> None:
    d = daemon(server="--want a:latest", MLXD_HEALTH_SUSPECT_S="2", MLXD_HEALTH_FROZEN_S="600")
    d.start()
    pid = d.ready()["engines"][0]["pid"]
    dump = d.paths.dump(f"engine-{d.status()['engines'][0]['slot']}")
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: "has not beaten for" in d.log(), "the suspicion", d.history)
    os.kill(pid, signal.SIGUSR1)  # one more, for a dump that surely comes
    os.kill(pid, signal.SIGCONT)
    eventually(lambda: dump.stat().st_size == 0, "an empty dump", d.history)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: any(record["pid"] == pid for record in d.exits()), "the record", d.history)
    assert next(record for record in d.exits() if record["pid"] == pid)["stack"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce RLIMIT_AS")
def test_an_engine_whose_weights_do_not_fit_its_address_space_dies_of_memory(tmp_path: Path) -> None:
    """REL-13."""
    model = make_tiny_model(tmp_path / "m", config={"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8})
    limited = tmp_path / "limited.py"
    limited.write_text(LIMITED)
    with EngineProcess(tmp_path / "e", script=str(limited)) as process:
        process.word(messages.Hello)
        process.say(messages.Load("m", str(model), PLENTY))
        bye = process.word(Bye)
        assert bye.cause == "error", bye
        status = process.wait()
        assert causes.judge(End(code=status, bye=bye))[0] is causes.MEMORY


#: Room for a blank engine and its threads, not for 120 MB of weights.
LIMITED = """
import re, resource
from mlxd.engine import batch
from mlxd.engine.__main__ import main
used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 80 * 2**20,) * 2)
main()
"""


def test_a_tuned_engine_runs_fewer_rows_at_once_and_the_others_wait(tmp_path: Path) -> None:
    settings = Config(server=ServerSettings(max_concurrent=8))
    prompts = [[(7 * i + 31 * n) % 500 + 2 for i in range(150)] for n in range(6)]
    asked = [{"prompt_ids": prompt, "max_tokens": 30} for prompt in prompts]
    model = make_tiny_model(tmp_path / "m")
    with EngineProcess(tmp_path / "a", settings) as process, process.load(model).connect() as wire:
        expected = [wire.ask(**fields).ids for fields in asked]
    with EngineProcess(tmp_path / "b", settings) as process:
        process.word(messages.Hello)
        process.say(messages.Load("tiny", str(model), PLENTY, Tuning(prefill_tokens=64, max_concurrent=2, cache_share=0.0)))
        process.word(messages.Ready)
        with process.connect() as wire:
            jobs = [wire.submit(**fields) for fields in asked]
            wire.cancel(jobs[4])  # while it waits
            alive: list[int] = []
            while not all(wire.results[job].ended for job in jobs if job != jobs[4]):
                wire.step(time.monotonic() + DEADLINE_S)
                alive.append(sum(bool(wire.results[job].events[1:]) and not wire.results[job].ended for job in jobs))
            assert max(alive) == 2
            assert [wire.results[job].ids for job in jobs if job != jobs[4]] == expected[:4] + expected[5:]
            done = [[e.done for e in wire.results[job].events if isinstance(e, messages.Progress)] for job in jobs]
            assert all(steps == sorted(steps) and steps[-1] == 150 and len(steps) >= 3 for n, steps in enumerate(done) if n != 4)
            assert len(wire.results[jobs[4]].events) <= 1  # accepted at most
            assert wire.ask(**asked[0]).cached == 0
