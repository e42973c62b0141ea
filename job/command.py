"""What every command does around its work: one line for a user's mistake, and the exit code that launchers read."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from job.config import LGDLM_KEYS, keys
from job.errors import ExitCode, UserError

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
    return f"unknown configuration key {key}" + (f"; did you mean {' or '.join(near)}?" if near else "; the keys and their meanings are in job/config.py")


def guarded(command: Callable[[], object]) -> None:
    """Run a command and exit with its code; mistakes of the user end in one line, anything else in a traceback."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let Hydra raise instead of printing and exiting
    from job.runtime import distributed

    try:
        command()
    except UserError as error:
        message, code = f"error: {error}", error.exit_code
    except (HydraException, OmegaConfBaseException) as error:
        message, code = f"error: {explain(error)}", ExitCode.USAGE
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        sys.exit(ExitCode.FAILED)
    except Exception as error:
        if isinstance(error, OSError) and error.filename and error.errno in NOT_WRITABLE:
            message, code = f"error: {error.filename}: {error.strerror}", ExitCode.FAILED
        elif not distributed.is_distributed():
            raise
        else:
            traceback.print_exc()
            message, code = "error: an unexpected failure, see its traceback", ExitCode.FAILED
    else:
        return
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    distributed.give_up(message, code)
    if distributed.is_distributed():
        distributed.leave(code)  # destructors of a broken process group would wait for lost ranks
    sys.exit(code)
