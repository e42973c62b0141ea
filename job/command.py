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
from job.errors import ExitCode, JobError, UsageError
from job.lgdlm.keys import LGDLM_KEYS

NOT_WRITABLE = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def explain(error: BaseException) -> str:
    """One line for what Hydra says of a command line or configuration file, with the key that may have been meant."""
    texts = [str(error)] + ([str(error.__cause__)] if error.__cause__ else [])
    unknown = re.search(r"Could not override '([^']+)'", texts[0]) or re.search(r"full_key: (\S+)", texts[-1])
    if unknown and re.search(r"not in (struct|')|Could not override", texts[-1]):
        return unknown_key(unknown.group(1))
    lines = [line.strip() for text in texts for line in text.splitlines()[:1]]
    options = re.search(r"Available options in '\S+:\s*(.*?)\s*Config search path", texts[0], re.DOTALL)
    return ": ".join(lines) + (f"; choose one of {', '.join(options.group(1).split())}" if options else "")


def unknown_key(key: str) -> str:
    """What to do about a configuration key that is not known."""
    if key in LGDLM_KEYS or key.split(".")[0] in LGDLM_KEYS:
        return f"{key} is a key of LGDLM that is not used here: {LGDLM_KEYS.get(key) or LGDLM_KEYS[key.split('.')[0]]}"
    near = difflib.get_close_matches(key, keys(), n=2, cutoff=0.6)
    return f"unknown configuration key {key}" + (
        f"; did you mean {' or '.join(near)}?" if near else "; the keys and their meanings are in job/config.py"
    )


def refuse_unknown_keys(values: DictConfig) -> None:
    """Refuse keys that were appended to the configuration (`+key=value`), which Hydra lets pass."""
    plain: dict[str, Any] = OmegaConf.to_container(values)  # type: ignore[assignment]
    for section, content in plain.items():
        for name in content if isinstance(content, dict) else [""]:
            if f"{section}.{name}" not in keys():
                raise UsageError(unknown_key(f"{section}.{name}".rstrip(".")))


def guarded(command: Callable[[], object]) -> int:
    """Run a command; returns its exit code. A user's mistake ends in one line, anything else in a traceback; other ranks are told."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let Hydra raise instead of printing and exiting
    try:
        return int(command() or ExitCode.FINISHED)  # type: ignore[call-overload]
    except JobError as error:
        message, code = f"error: {error}", error.exit_code
    except (HydraException, OmegaConfBaseException) as error:
        message, code = f"error: {explain(error)}", ExitCode.USAGE
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return ExitCode.FAILED
    except KeyboardInterrupt:  # the usual end of `logs -f`
        return 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, OSError) and error.filename and error.errno in NOT_WRITABLE:
            message, code = f"error: {error.filename}: {error.strerror}", ExitCode.FAILED
        elif ranks() is None:
            raise
        else:
            traceback.print_exc()
            message, code = "error: an unexpected failure, see its traceback", ExitCode.FAILED
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    if distributed := ranks():
        distributed.give_up(message, code)
        distributed.leave(code)  # destructors of a broken process group would wait for lost ranks
    return code


def ranks() -> Any:
    """job.runtime.distributed in one of several ranks, else None. Who never loaded it is none: it imports torch, launchers do not."""
    distributed = sys.modules.get("job.runtime.distributed")
    return distributed if distributed is not None and distributed.is_distributed() else None
