"""What every command does around its work: one line for a user's mistake, and the exit code that launchers read."""

from __future__ import annotations

import contextlib
import difflib
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from job.config import Config, config_dir, default_of, keys
from job.errors import ExitCode, JobError, LostRankError, UsageError
from job.files import locale_problem, storage_problem
from job.lgdlm.keys import LGDLM_KEYS
from job.output import tolerated_output
from job.runtime.failures import record_failure
from job.runtime.launcher_variables import let_hydra_raise

# Failures that a command meets on its way and that only make it fail once all else is done: a sweep goes on with its
# other batches, and Hydra, which calls the launcher for each, would stop at an exception.
at_the_end: list[JobError] = []
# Hydra's options that a value follows as a word of its own.
HYDRA_OPTIONS = (
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--config-dir",
    "-cd",
    "--package",
    "-p",
    "--cfg",
    "-c",
    "--experimental-rerun",
)
HYDRA_INFO = ("--info", "-i")  # whose value may be left out


def overrides_and_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of job.train as overrides, and Hydra's options with their values; each in their order.

    Hydra's parser takes the overrides in one piece only. People mix them with options, and of
    `a=1 --config-name demo b=2` the parser would call the second piece "unrecognized arguments".
    """
    overrides: list[str] = []
    options: list[str] = []
    left = list(arguments)
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            overrides.append(word)
            continue
        options.append(word)
        names_what = word in HYDRA_INFO and re.fullmatch(r"[a-z][a-z-]*", "".join(left[:1]))
        if left and (word in HYDRA_OPTIONS or names_what):
            options.append(left.pop(0))
    return overrides, options


def gather_overrides() -> None:
    """Put sys.argv, which Hydra reads, into an order that its parser takes."""
    overrides, options = overrides_and_options(sys.argv[1:])
    sys.argv[1:] = [*overrides, *options]


def explain(error: BaseException) -> str:
    """One line for what Hydra says of a command line or configuration file, with the key that may have been meant."""
    # Hydra and OmegaConf raise a few classes for everything and give the key and the choices only in their English
    # text, over several lines. Where these patterns no longer match, after an upgrade, the first lines are still shown.
    texts = [str(error)] + ([str(error.__cause__)] if error.__cause__ else [])
    if isinstance(error, OverrideParseException) and "=" not in error.override:
        return f"{error.override}: not of the form KEY=VALUE, which sets a key of the configuration (--help lists them)"
    if quoted := quoting(error):
        return quoted
    if inside := inside_a_list(texts):
        return inside
    raised_here = re.match(r"UserError raised while resolving interpolation: (.*)", texts[0])
    if raised_here:  # by a resolver of job.config; OmegaConf keeps its text alone
        return raised_here.group(1)
    unknown = re.search(r"Could not override '([^']+)'", texts[0]) or re.search(r"full_key: (\S+)", texts[-1])
    if unknown and re.search(r"not in (struct|')|Could not override", texts[-1]):
        return unknown_key(unknown.group(1))
    first_lines = [line.strip() for text in texts for line in text.splitlines()[:1]]
    options = re.search(r"Available options in '\S+:\s*(.*?)\s*Config search path", texts[0], re.DOTALL)
    choices = f"; choose one of {', '.join(options.group(1).split())}" if options else ""
    return ": ".join(first_lines) + choices


def quoting(error: BaseException) -> str | None:
    """How to write an override whose value Hydra took for syntax; None when that is not what is wrong."""
    ambiguous = re.match(r"Ambiguous value for argument '(.*)'$", str(error).splitlines()[0])
    if isinstance(error, OverrideParseException):
        override = error.override
    elif ambiguous:
        override = ambiguous.group(1)
    else:
        return None
    key, equals, value = override.partition("=")
    if not equals:
        return None
    if value[:1] in ("[", "{"):
        return (
            f"{override}: Hydra reads some characters of the value as syntax; put double quotes around the parts that "
            f"""hold them and single quotes around all of it: '{key}=["A","B"]'"""
        )
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    quoted = f'{key}="{escaped}"'
    try:
        understood = OverridesParser.create().parse_override(quoted).value() == value
    except HydraException:
        return None
    if not understood:
        return None
    # Two pairs of quotes: the shell takes off the outer one.
    return f"{override}: Hydra reads some characters of the value as syntax; write it as {shlex.quote(quoted)}"


def inside_a_list(texts: list[str]) -> str | None:
    """What is wrong with a part of a key's list, such as training.sequential_schedule; None for other errors."""
    outer = re.search(r"override '?([\w.]+)", texts[0])
    inner = re.search(r"full_key: (\S+)", texts[-1])
    missing = re.search(r"full_key: ([\w.]+)\[\d+\]\.(\w+)", texts[-1])
    named = missing or outer
    key = named.group(1) if named else ""
    if inner is None or key not in keys() or not isinstance(default_of(keys()[key]), list):
        return None
    unknown = re.match(r"Key '(\w+)' not in '(\w+)'", texts[-1])
    what = f"unknown key {unknown.group(1)} in a part of it" if unknown else texts[-1].splitlines()[0].strip()
    where = "" if unknown else f" (in {inner.group(1)})"
    example = "; a part looks like {type: l2t, steps: 1000}" if key == "training.sequential_schedule" else ""
    return f"{key}: {what}{where}{example}"


def unknown_key(key: str) -> str:
    """What to do about a configuration key that is not known."""
    lgdlm = LGDLM_KEYS.get(key) or LGDLM_KEYS.get(key.split(".")[0])
    if lgdlm:
        return f"{key} is a key of LGDLM that is not used here: {lgdlm}"
    same = [known for known in keys() if known.rpartition(".")[2] == key]
    near = same or difflib.get_close_matches(key, keys(), n=2, cutoff=0.6)
    if near:
        return f"unknown configuration key {key}; did you mean {' or '.join(near)}?"
    return f"unknown configuration key {key}; the keys and their meanings are in job/config.py"


def refuse_unknown_keys(values: DictConfig) -> None:
    """Refuse keys that were appended to the configuration (`+key=value`), which Hydra lets pass."""
    plain: dict[str, Any] = OmegaConf.to_container(values)  # type: ignore[assignment]
    for section, content in plain.items():
        for name in content if isinstance(content, dict) else [""]:
            if f"{section}.{name}" not in keys():
                raise UsageError(unknown_key(f"{section}.{name}".rstrip(".")))


def composed(config_name: str, overrides: Sequence[str]) -> Config:
    """The configuration that job.train makes of these arguments, not validated yet. Raises what `guarded` explains."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        values = compose(config_name, list(overrides))
    refuse_unknown_keys(values)
    config: Config = OmegaConf.to_object(values)  # type: ignore[assignment]
    return config


def guarded(command: Callable[[], object], output_is_result: bool = True) -> int:
    """Run a command; returns its exit code. A known failure ends in one line on stderr, anything else in a traceback.

    Every failure is also noted for the launcher (job.runtime.failures), and the other ranks of the run are told. A
    command whose `output_is_result` has failed when its output could not be written, for instance on a full disk; one
    that leaves files has not, since they are whole.
    """
    let_hydra_raise()
    with tolerated_output(end_with_reader=output_is_result) as output:
        try:
            code = exit_code_of(command)
        except SystemExit as ended:
            if ended.code:  # a wrong command line: argparse has said so
                raise
            code, output_is_result = ExitCode.FINISHED, True  # --help, which is printed and nothing else
        output.flush_to_the_end()
        if code != ExitCode.FINISHED or not output_is_result or output.failure is None:
            return code
        if output.problem:
            return end(f"error: {output.problem}", output.problem, ExitCode.FAILED)
        return ExitCode.FAILED  # `... | head`


def exit_code_of(command: Callable[[], object]) -> int:
    """Run a command and say how it failed; returns its exit code."""
    try:
        code = int(command() or ExitCode.FINISHED)  # type: ignore[call-overload]
        if at_the_end:
            raise at_the_end.pop()
        return code
    except JobError as error:
        cause, code = str(error), error.exit_code
        return end(f"error: {cause}", cause, code, consequence=isinstance(error, LostRankError))
    except (HydraException, OmegaConfBaseException) as error:
        cause = explain(error)
        return end(f"error: {cause}", cause, ExitCode.USAGE)
    except BrokenPipeError:  # `... | head`
        return ExitCode.FAILED
    except KeyboardInterrupt:  # the usual end of `logs -f`
        return 128 + signal.SIGINT
    except Exception as error:
        if problem := storage_problem(error) or locale_problem(error):
            return end(f"error: {problem}", problem, ExitCode.FAILED)
        cause = "".join(traceback.format_exception_only(error)).strip()
        if ranks() is None:
            record_failure(cause, ExitCode.FAILED, consequence=False)
            raise
        traceback.print_exc()
        return end("error: an unexpected failure, see its traceback", cause, ExitCode.FAILED)


def end(message: str, cause: str, code: ExitCode, consequence: bool = False) -> ExitCode:
    """Print `message`, note `cause` for the launcher and tell the other ranks; returns the exit code without them."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    record_failure(cause, code, consequence)
    if distributed := ranks():
        distributed.give_up(message, code)
        distributed.leave(code)  # destructors of a broken process group would wait for lost ranks
    return code


def ranks() -> Any:
    """The module job.runtime.distributed when this process is one of several ranks, else None.

    It is looked up among the loaded modules and not imported, because it imports torch. Launchers do not import torch,
    so they never load this module.
    """
    distributed = sys.modules.get("job.runtime.distributed")
    return distributed if distributed is not None and distributed.is_distributed() else None
