"""How every command ends."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from job.command import explain, guarded
from job.config import config_dir
from job.errors import ExitCode, RetryError, UserError
from job.files import storage_problem, write_text, write_whole

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UserError("no data in x"), ExitCode.FAILED, "error: no data in x\n"),
        (RetryError("lost another rank"), ExitCode.RETRY, "error: lost another rank\n"),
        (HydraException("mismatched input"), ExitCode.USAGE, "error: mismatched input\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/runs"),
            ExitCode.FAILED,
            "error: /runs: Permission denied\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_is_known_ends_in_a_line_and_a_code(
    raised: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise raised

    assert guarded(command) == code
    assert capsys.readouterr().err == said


def test_what_nobody_foresaw_ends_in_a_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0)


def test_a_command_without_a_result_has_finished() -> None:
    assert guarded(lambda: None) == ExitCode.FINISHED
    assert guarded(lambda: ExitCode.STOPPED) == ExitCode.STOPPED


@pytest.mark.parametrize(
    ("override", "written"),
    [
        ("data.dir=/a=b", """'data.dir="/a=b"'"""),
        ("data.dir=/a,b", """'data.dir="/a,b"'"""),
        ("data.dir=/a(b", """'data.dir="/a(b"'"""),
        ('data.dir=/a"b', """'data.dir="/a\\"b"'"""),
        ("data.dir=/a'b", """'data.dir="/a'"'"'b"'"""),
        ("logging.run_name=ä", """'logging.run_name="ä"'"""),
        ("training.allow_changed=[a=b]", """'training.allow_changed=["A","B"]'"""),
    ],
)
def test_a_value_that_hydra_takes_for_syntax_is_shown_as_it_wants_it(override: str, written: str) -> None:
    with pytest.raises(HydraException) as refused:
        compose_with(override)
    said = explain(refused.value)
    assert written in said
    assert "\n" not in said
    quoted = shlex.split(written)[0]
    if "A" not in quoted:
        assert compose_with(quoted) == override.partition("=")[2]


def compose_with(override: str) -> object:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("mmdit_cycle_vae", [override])
    return OmegaConf.select(config, override.partition("=")[0])


@pytest.mark.parametrize(
    ("part", "inner"),
    [("{typ: l2t, steps: 3}", "typ"), ("{type: l2t, steps: x}", "steps"), ("{type: l2t}", "steps")],
)
def test_a_wrong_inner_key_of_a_schedule_is_named(part: str, inner: str) -> None:
    with (
        initialize_config_dir(str(config_dir()), version_base="1.3"),
        pytest.raises((HydraException, OmegaConfBaseException)) as refused,
    ):
        OmegaConf.to_object(compose("mmdit_stable", ["loss=sequential", f"training.sequential_schedule=[{part}]"]))
    said = explain(refused.value)
    assert said.startswith("training.sequential_schedule: ")
    assert inner in said
    assert "did you mean" not in said


@pytest.mark.parametrize(
    ("number", "path", "said"),
    [
        (errno.ENOSPC, "nowhere/config.yaml", "nowhere/config.yaml: No space left on device"),
        (errno.ENOTDIR, "file/a/b", "file: is a file where a directory is needed"),
        (errno.EEXIST, "file", "file: is a file where a directory is needed"),
        (errno.EISDIR, "directory", "directory: is a directory where a file is needed"),
    ],
)
def test_what_is_wrong_with_a_disk_or_a_path_is_one_line(
    number: int, path: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()

    def command() -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / path))

    assert guarded(command) == ExitCode.FAILED
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {tmp_path}/{said}")
    assert len(printed.splitlines()) == 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_place_where_no_directory_can_be_made_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: Path("/proc/runs/demo").mkdir(parents=True)) == ExitCode.FAILED
    assert capsys.readouterr().err == "error: /proc/runs: No such file or directory\n"
    with pytest.raises(FileNotFoundError):  # which is a mistake of the program's
        guarded(lambda: Path("/proc/runs").read_text())


def test_a_file_that_does_not_fit_on_the_disk_is_named(tmp_path: Path) -> None:
    def refuse(_file: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as failed:
        write_whole(tmp_path / "config.yaml", refuse)
    assert storage_problem(failed.value) == f"{tmp_path}/config.yaml: No space left on device"


def test_an_array_that_does_not_fit_on_the_disk_is_named(tmp_path: Path) -> None:
    """NumPy's error has no number, and no name of a file."""

    def refuse(_file: object) -> None:
        raise OSError("225 requested and 0 written")

    with pytest.raises(OSError, match="full disk") as failed:
        write_whole(tmp_path / "latents.npy", refuse)
    said = "not written whole, as on a full disk (225 requested and 0 written)"
    assert storage_problem(failed.value) == f"{tmp_path}/latents.npy: {said}"


def test_a_directory_behind_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    """As a scratch disk's that is not mounted."""
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    with pytest.raises(FileExistsError) as failed:
        (tmp_path / "runs").mkdir(exist_ok=True)
    assert storage_problem(failed.value) == f"{tmp_path}/runs: a link to {tmp_path}/scratch, which is not there"


def test_what_is_no_file_is_written_to_and_stays_what_it_is(tmp_path: Path) -> None:
    """A rename over it would leave a file in the place of a pipe, a link or, for root, /dev/null."""
    pipe, linked, link = tmp_path / "pipe", tmp_path / "file", tmp_path / "link"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    linked.write_bytes(b"old")
    link.symlink_to(linked)
    for path in (pipe, link):
        write_whole(path, lambda file: file.write(b"new"))
    assert os.read(reader, 10) == linked.read_bytes() == b"new"
    os.close(reader)
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "pipe"]


PRINTS = """
import sys
from job.command import guarded
def command():
    print("ä result")
    print("a warning", file=sys.stderr)
    open({path!r}, "w").close()
sys.exit(guarded(command, output_is_result={is_result}))
"""


@pytest.mark.parametrize(
    ("redirection", "is_result", "code", "said"),
    [
        (">/dev/full", False, 0, "a warning\n"),
        (">/dev/full", True, 1, "a warning\nerror: standard output: No space left on device\n"),
        (">/dev/full 2>/dev/full", False, 0, ""),
        (">&-", False, 0, "a warning\n"),
        (">&-", True, 1, "a warning\nerror: standard output: it is closed\n"),
        (">&- 2>&-", False, 0, ""),
        ("| cat", True, 0, "a warning\n"),
        ("| true", True, 1, "a warning\n"),
        ("| true", False, 0, "a warning\n"),
    ],
)
def test_output_that_cannot_be_written(redirection: str, is_result: bool, code: int, said: str, tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text(PRINTS.format(path=str(tmp_path / "results"), is_result=is_result))
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"{sys.executable}" "{script}" {redirection}'],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (code, said)
    assert (tmp_path / "results").exists()
    assert done.stdout in ("", "\\xe4 result\n")


def test_the_locale_c_ends_nothing(tmp_path: Path) -> None:
    """Its encoding is ASCII, and Python has the bytes of a name there that are none stand for themselves."""
    script, results = tmp_path / "command.py", tmp_path / "ä"
    script.write_text(PRINTS.format(path="X", is_result=True).replace("'X'", "sys.argv[1]"))
    locale_c = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script, results], env=locale_c, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "a warning\n")
    assert done.stdout == "\\xe4 result\n"
    assert results.exists()


def test_the_bytes_of_a_name_in_the_locale_c_are_written_as_they_are(tmp_path: Path) -> None:
    write_text(tmp_path / "README.md", "# " + "ä".encode().decode("ascii", "surrogateescape"))
    assert (tmp_path / "README.md").read_bytes() == "# ä".encode()


def test_characters_that_the_locale_lacks_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        "ä".encode("ascii")

    with pytest.raises(UnicodeEncodeError):
        guarded(command)
    monkeypatch.setattr("locale.getpreferredencoding", lambda _setlocale: "ANSI_X3.4-1968")
    assert guarded(command) == ExitCode.FAILED
    assert "the encoding of this locale is ANSI_X3.4-1968: set PYTHONUTF8=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["job --help", "job --version", "job.convert --help", "job.slurm --help", "job.train --help"]
)
@pytest.mark.parametrize(("redirection", "said"), [(">/dev/full", "No space left on device"), (">&-", "it is closed")])
def test_help_that_nobody_gets_is_one_line(command: str, redirection: str, said: str) -> None:
    shell = ["bash", "-c", f"{sys.executable} -m {command} {redirection}"]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"error: standard output: {said}\n")


@pytest.mark.parametrize("program", [["job.compare", "x"], ["job", "compare", "x"]])
def test_a_program_that_is_interrupted_while_it_loads_says_nothing(program: list[str], tmp_path: Path) -> None:
    (tmp_path / "hydra.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-m", *program], env=os.environ | path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
    library = [sys.executable, "-c", "import job.command"]
    assert b"KeyboardInterrupt" in subprocess.run(library, env=os.environ | path, capture_output=True).stderr


def test_closed_descriptors_are_not_given_to_files(tmp_path: Path) -> None:
    code = (
        "import sys; from job.output import open_standard_descriptors; open_standard_descriptors(); "
        f"sys.exit(open({str(tmp_path / 'file')!r}, 'w').fileno())"
    )
    done = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "{code}" <&- >&- 2>&-'], cwd=ROOT)
    assert done.returncode == 3


def test_a_python_without_the_packages_says_how_to_get_them() -> None:
    """As a new shell in a clone has: the program is there, and `source .venv/bin/activate` was forgotten."""
    bare = [sys.executable, "-S", "-m", "job.prepare", "--out", "data/x"]
    done = subprocess.run(bare, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith("then: source .venv/bin/activate\n")
    assert done.stderr.count("\n") == 1
