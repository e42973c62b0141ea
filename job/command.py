"""What every command does around its work: one line for a user's mistake, and the exit code that launchers read."""

from __future__ import annotations

import difflib
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from job.config import keys
from job.errors import ExitCode, JobError, LostRankError, UsageError
from job.lgdlm.keys import LGDLM_KEYS
from job.runtime.failures import record_failure
from job.runtime.launcher_variables import let_hydra_raise

NOT_WRITABLE = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def explain(error: BaseException) -> str:
    """One line for what Hydra says of a command line or configuration file, with the key that may have been meant."""
    # Hydra and OmegaConf raise a few classes for everything and give the key and the choices only in their English
    # text, over several lines. Where these patterns no longer match, after an upgrade, the first lines are still shown.
    texts = [str(error)] + ([str(error.__cause__)] if error.__cause__ else [])
    unknown = re.search(r"Could not override '([^']+)'", texts[0]) or re.search(r"full_key: (\S+)", texts[-1])
    if unknown and re.search(r"not in (struct|')|Could not override", texts[-1]):
        return unknown_key(unknown.group(1))
    first_lines = [line.strip() for text in texts for line in text.splitlines()[:1]]
    options = re.search(r"Available options in '\S+:\s*(.*?)\s*Config search path", texts[0], re.DOTALL)
    choices = f"; choose one of {', '.join(options.group(1).split())}" if options else ""
    return ": ".join(first_lines) + choices


def unknown_key(key: str) -> str:
    """What to do about a configuration key that is not known."""
    lgdlm = LGDLM_KEYS.get(key) or LGDLM_KEYS.get(key.split(".")[0])
    if lgdlm:
        return f"{key} is a key of LGDLM that is not used here: {lgdlm}"
    near = difflib.get_close_matches(key, keys(), n=2, cutoff=0.6)
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


def guarded(command: Callable[[], object]) -> int:
    """Run a command; returns its exit code. A known failure ends in one line on stderr, anything else in a traceback.

    Every failure is also noted for the launcher (job.runtime.failures), and the other ranks of the run are told.
    """
    let_hydra_raise()
    try:
        return int(command() or ExitCode.FINISHED)  # type: ignore[call-overload]
    except JobError as error:
        cause, code = str(error), error.exit_code
        return end(f"error: {cause}", cause, code, consequence=isinstance(error, LostRankError))
    except (HydraException, OmegaConfBaseException) as error:
        cause = explain(error)
        return end(f"error: {cause}", cause, ExitCode.USAGE)
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return ExitCode.FAILED
    except KeyboardInterrupt:  # the usual end of `logs -f`
        return 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, OSError) and error.filename and error.errno in NOT_WRITABLE:
            cause = f"{error.filename}: {error.strerror}"
            return end(f"error: {cause}", cause, ExitCode.FAILED)
        cause = "".join(traceback.format_exception_only(error)).strip()
        if ranks() is None:
            record_failure(cause, ExitCode.FAILED, consequence=False)
            raise
        traceback.print_exc()
        return end("error: an unexpected failure, see its traceback", cause, ExitCode.FAILED)


def end(message: str, cause: str, code: ExitCode, consequence: bool = False) -> ExitCode:
    """Print `message`, note `cause` for the launcher and tell the other ranks; returns the exit code without them."""
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
