"""The outermost guard of the command: whatever is raised, one line and an exit code; signals, streams, JSON alone."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meswitch.cli.message import one_line
from meswitch.errors import FormatError, MeswitchError
from test_cli import run


class Panic(BaseException):
    """As a panic of the native module, which is no Exception."""


def raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Any:
    """`meswitch inspect` in which `error` is raised after something was printed."""

    def broken(_: Path) -> Any:
        print("a library's own word")
        raise error

    monkeypatch.setattr("meswitch.delta.directory.Delta.open", broken)
    return run("inspect", "delta", "--json")


@pytest.mark.parametrize(
    ("error", "line", "hint"),
    [
        (MeswitchError("expected 2", hint="take\none away"), "MeswitchError: expected 2", "take one away"),
        (FormatError("expected a\nmanifest\x1b[2J"), r"FormatError: expected a manifest\x1b[2J", None),
        (KeyError("weight"), "internal error: KeyError: 'weight'", "report"),
        (ValueError(), "internal error: ValueError", "report"),
        (RecursionError("maximum recursion depth exceeded"), "internal error: RecursionError: maximum", "report"),
        (Panic("range end index 9"), "internal error: Panic: range end index 9", "report"),
        (MemoryError(), "out of memory: MemoryError", "smaller model"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: RuntimeError", "smaller model"),
        (OSError(errno.ENOSPC, "No space left on device", "a"), "OSError: [Errno 28] No space left on device", None),
        (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid"), "UnicodeDecodeError: 'utf-8' codec", "not UTF-8"),
        (RuntimeError("error unpacking string as utf-8"), "RuntimeError: error unpacking string", "not UTF-8"),
        (ModuleNotFoundError("No module named 'peft'"), "ModuleNotFoundError: No module named 'peft'", "doctor"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_is_raised_is_one_line_and_a_hint(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, line: str, hint: str | None
) -> None:
    found = raises(monkeypatch, error)
    assert found.exit_code == 1 and found.stdout == ""
    noise, said, *hints = found.stderr.splitlines()
    assert noise == "a library's own word" and said.startswith(line)
    assert len(hints) == (hint is not None) and all(text.startswith("hint: ") and hint in text for text in hints)


def test_the_environment_may_ask_for_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, shown in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("MESWITCH_DEBUG", value)
        found = raises(monkeypatch, KeyError("weight"))
        assert ("Traceback" in found.stderr) == shown
        assert found.stderr.splitlines()[-2] == "internal error: KeyError: 'weight'"
    assert "MESWITCH_DEBUG=1" in run("--help").stdout


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    found = raises(monkeypatch, KeyboardInterrupt())
    assert found.exit_code == 130 and found.stdout == "" and found.stderr.splitlines()[-1] == "interrupted"


def test_json_is_all_there_is_on_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(_: Path) -> Any:
        print("a library's own word")
        return SimpleNamespace(inspect=lambda: {"bytes": 3})

    monkeypatch.setattr("meswitch.delta.directory.Delta.open", noisy)
    found = run("inspect", "delta", "--json")
    assert found.exit_code == 0 and json.loads(found.stdout) == {"bytes": 3} and "own word" in found.stderr
    assert run("--version").stdout.startswith("meswitch "), "what follows prints on stdout again"


@pytest.mark.parametrize("args", [["inspect", "delta", "--json"], ["--version"]])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), ""),
        (OSError(errno.ENOSPC, "No space left on device"), "OSError: [Errno 28] No space left on device\n"),
    ],
)
def test_a_stdout_that_takes_nothing(
    monkeypatch: pytest.MonkeyPatch, args: list[str], error: OSError, said: str
) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise error

    monkeypatch.setattr("meswitch.delta.directory.Delta.open", lambda _: SimpleNamespace(inspect=dict))
    found = run(*args, stdout=Full())
    assert found.exit_code == 1 and found.stderr == said


def test_a_line_is_one_line() -> None:
    assert one_line(" one \n\n two\tthree\x07 ") == r"one two\tthree\x07"
    cut = one_line("a" * 5000 + "end")
    assert len(cut) < 2100 and cut.startswith("aaa") and cut.endswith("end")


# --- the process ---------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "meswitch.cli"]
SIGNALLED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.{signal})
            for _ in range(1000): pass
sys.meta_path.insert(0, Finder())
from meswitch.cli import main
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="needs the signals of POSIX")
@pytest.mark.parametrize(
    ("name", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated"), ("SIGHUP", 129, "")]
)
def test_a_signal_ends_quietly_from_the_first_import_on(name: str, code: int, word: str) -> None:
    assert hasattr(signal, name)
    found = subprocess.run([sys.executable, "-c", SIGNALLED.format(signal=name)], capture_output=True, text=True)
    assert found.returncode == code and found.stdout == ""
    assert found.stderr.startswith(word) and found.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="needs a shell of POSIX")
@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ('"$@" --version >&- 2>&- <&-', 0, ""),
        ('"$@" --help >/dev/full', 1, "OSError: [Errno 28] No space left on device\n"),
        ('"$@" inspect caf\udce9 2>&-', 1, ""),
    ],
)
def test_streams_that_are_closed_or_full(shell: str, code: int, said: str) -> None:
    found = subprocess.run(["sh", "-c", shell, "sh", *COMMAND], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (code, "", said)


def test_a_pipe_that_nobody_reads_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run([*COMMAND, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (found.returncode, found.stderr) == (1, "")
