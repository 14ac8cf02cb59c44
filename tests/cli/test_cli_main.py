"""Verbs, flags, exit codes, signals, and what is imported when."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from olive.cli import main
from olive.cli.main import VERBS, entry
from olive.errors import ConfigError, EnvironmentFault, PassFailed, UntrustedInput

SOURCE = str(Path(main.__file__).parents[2])
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "datasets", "pandas", "numpy", "peft")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": SOURCE}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=60
    )


def test_help_imports_nothing_of_ours() -> None:
    code = (
        "import sys; from olive.cli.main import entry; entry(['--help']); entry(['run', '--help']);"
        "found = {m.split('.')[0] for m in sys.modules};"
        "print(sorted(found & {'pydantic', 'rich', 'yaml', 'jinja2', 'psutil'}))"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_package_import_is_light_and_has_run_and_plan() -> None:
    code = (
        "import sys, olive; from olive.workflows import run;"
        "assert olive.run is run and callable(olive.plan);"
        "print([m for m in sys.modules if m.split('.')[0] in ('pydantic', 'rich', *sys.argv[1:])])"
    )
    done = python(code, *HEAVY)
    assert done.stdout.strip() == "[]", done.stderr


def test_plan_imports_nothing_heavy(tmp_path: Path) -> None:
    document = tmp_path / "document.json"
    passes = {"builder": {"type": "ModelBuilder", "precision": "int4"}}
    body = {"input_model": {"type": "HfModel", "model_path": "nowhere"}, "passes": passes}
    document.write_text(json.dumps(body), encoding="utf-8")
    code = (
        "import sys; from olive.cli.main import entry; code = entry(['plan', sys.argv[1]]);"
        "print(code, [m for m in sys.modules if m.split('.')[0] in sys.argv[2:]])"
    )
    done = python(code, str(document), *HEAVY)
    assert done.stdout.splitlines()[-1].endswith("[]"), done.stdout + done.stderr


@pytest.mark.parametrize("name", sorted(VERBS))
def test_every_verb_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry([*name.split(), "--help"]) == 0
    assert f"usage: olive {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], "olive has no verb rnu; did you mean run?"),
        (["--confg", "x"], "olive has no option --confg; write a verb first"),
        (["run", "--confg", "x"], "olive run has no option --confg; did you mean --config?"),
        (["run", "x", "--outputdir=y"], "did you mean --output-dir?"),
        (["run", "-x", "y"], "olive run has no option -x"),
        (["run"], "no document was named"),
        (["run", "a", "--config", "b"], "two documents were named, a and b"),
        (["run", "a", "b"], "unrecognized arguments: b"),
        (["config", "migate"], "did you mean migrate?"),
        (["cache", "gcc"], "did you mean gc?"),
        (["cache", "gc", "--max-size", "lots"], "'lots' is no size"),
        (["cache", "gc", "--older-than", "-"], "'-' is no time"),
        (["chat", "x", "--max-new-tokens", "0"], "no whole number from 1"),
        (["cache", "ls", "--cache-dir", "/nowhere/at/all"], "there is no cache at"),
        (["cache", "explain"], "takes one KEY"),
    ],
)
def test_usage_errors(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_bare_names_show_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry([]) == 2
    assert entry(["help"]) == 0
    assert entry(["cache"]) == 2
    assert entry(["cache", "--help"]) == 0
    assert capsys.readouterr().out.count("cache verify") == 4


def test_a_value_may_look_like_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(["chat", "/nowhere", "--prompt=--what"]) == 2
    assert "there is no folder /nowhere" in capsys.readouterr().err


def failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("olive.workflows.plan", fail)


SECRET = "hf_" + "a1" * 15


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            ConfigError("wrong", where="f.json:3: $.x", fix="write y"),
            2,
            "error: wrong\n  at  f.json:3: $.x\n  fix write y\n",
        ),
        (PassFailed("failed"), 3, "error: failed\n"),
        (EnvironmentFault("no disk"), 5, "error: no disk\n"),
        (UntrustedInput("pickle"), 6, "error: pickle\n"),
        (RuntimeError(f"bug {SECRET}"), 7, "our own defect, RuntimeError: bug [redacted]"),
        (ModuleNotFoundError("x", name="torch"), 5, "torch is not installed; pip install 'olive-next[cpu]'"),
        (ModuleNotFoundError("No module named 'olive.x'", name="olive.x"), 7, "our own defect"),
        (MemoryError(), 5, "memory ran out"),
        (OSError(28, "No space left on device", "/x"), 5, "No space left on device: /x"),
        (KeyboardInterrupt(), 130, "stopped."),
    ],
)
def test_errors_to_exit_codes(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(error, monkeypatch)
    assert entry(["run", "document.json"]) == code
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told


def test_traceback_only_with_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(PassFailed("failed"), monkeypatch)
    assert entry(["run", "document.json", "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err
    assert entry(["--debug", "run", "document.json"]) == 3
    assert "Traceback" in capsys.readouterr().err


WAITING = """
import sys, time
from types import SimpleNamespace
from pathlib import Path
import olive.workflows as workflows
workflows.plan = lambda *a, **k: SimpleNamespace(
    findings=(), steps=(), to_run=(), host=0, store_root=Path.cwd() / "cache"
)
def carry_out(plan):
    print("going", flush=True)
    time.sleep(60)
workflows.carry_out = carry_out
from olive.cli.main import entry
sys.exit(entry(["run", "document.json"]))
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_say_what_is_kept(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": SOURCE}
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "going\n"
    process.send_signal(sent)
    started = time.monotonic()
    _, told = process.communicate(timeout=20)
    assert time.monotonic() - started < 10
    assert process.returncode == code
    lines = [line for line in told.splitlines() if line]
    assert lines[1:] == [
        "stopped. Finished steps and checkpoints are kept in cache; the same command continues from there."
    ]


def test_a_closed_pipe_is_no_defect() -> None:
    code = (
        "import sys, olive.cli.config as c; from olive.cli.main import entry;"
        "c.schema = lambda args: print('x' * 1000000) or 0; sys.exit(entry(['config', 'schema']))"
    )
    shell = f'{sys.executable} -c "{code}" | head -c 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", shell],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": SOURCE},
        timeout=60,
    )
    assert done.returncode == 141
    assert done.stderr == ""


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"1.2.3 of {name}")
    assert entry(["--version"]) == 0
    assert capsys.readouterr().out == "olive-next 1.2.3 of olive-next\n"


def test_sigterm_handler_is_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    entry(["rnu"])
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_command_of_olive_0_5(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "olive.workflows.run", "--config", "none.json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": SOURCE},
        cwd=tmp_path,
        timeout=60,
    )
    assert (done.returncode, "there is no file none.json" in done.stderr) == (2, True)
