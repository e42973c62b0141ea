"""What every command does around its work: one line for a user's mistake, and the exit code that launchers read."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from job.config import LGDLM_KEYS, keys
from job.errors import ExitCode, UserError


def explain(error: Exception) -> str:
    """One line for what Hydra says of a command line or configuration file, with the key that may have been meant."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"full_key: (\S+)", text) or re.search(r"Key '([^']+)' not in", text)
    if "is not in struct" in text or "not in 'Config'" in text or "Key '" in text:
        key = unknown.group(1) if unknown else ""
        if key in LGDLM_KEYS:
            return f"{key} is a key of LGDLM that is not used here: {LGDLM_KEYS[key]}"
        near = difflib.get_close_matches(key, keys(), n=2, cutoff=0.5)
        return f"unknown configuration key {key}" + (f"; did you mean {' or '.join(near)}?" if near else "; all keys are in job/config.py")
    return text


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
    except MemoryError:
        message, code = "error: out of memory; lower training.train_batch_size or data.num_workers", ExitCode.FAILED
    else:
        return
    print(message, file=sys.stderr, flush=True)
    distributed.give_up(message, code)
    if distributed.is_distributed():
        distributed.leave(code)  # destructors of a broken process group would wait for lost ranks
    sys.exit(code)
