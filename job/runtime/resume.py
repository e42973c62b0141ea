"""Whether a checkpoint belongs to the run that wants to go on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from job.config import FREE_ON_RESUME, Config, get, keys, to_dict
from job.errors import UserError
from job.runtime.checkpoint import Checkpoint, open_checkpoint
from job.runtime.checkpointer import Checkpointer


def record(step: int, config: Config, data_fingerprint: str, global_batch_size: int) -> dict[str, Any]:
    """What a checkpoint stores beside tensors; with the tensors it is all the loop needs to go on."""
    return {"step": step, "config": to_dict(config), "data": data_fingerprint, "global_batch_size": global_batch_size}


def refuse_another_run(saved: dict[str, Any], config: Config, data_fingerprint: str, global_batch_size: int) -> None:
    """Refuse a checkpoint whose configuration, data or global batch would change what the run computes.

    A run that went on with, say, another learning rate or dataset would be neither the old run nor the new one, and
    nothing in its logs would show where it changed. Keys that change nothing of the numbers (FREE_ON_RESUME: where logs
    go, how often it saves) are free. Raises UserError naming the differing keys and how to allow them.
    """
    different = {}
    present = to_dict(config)
    for key in keys():
        section, name = key.split(".")
        before, now = saved["config"].get(section, {}).get(name), present[section][name]
        if key not in FREE_ON_RESUME and before != now:
            different[key] = f"{before} -> {get(config, key)}"
    if saved["data"] != data_fingerprint:
        different["data"] = "another dataset or tokenizer (dataset.json differs)"
    if saved["global_batch_size"] != global_batch_size:
        different["global_batch_size"] = f"{saved['global_batch_size']} -> {global_batch_size}"
    refused = {key: change for key, change in different.items() if key not in config.training.allow_changed}
    if refused:
        changes = ", ".join(f"{key}: {change}" for key, change in refused.items())
        raise UserError(
            f"the run directory holds a checkpoint of another run ({changes}); give the run another logging.run_name, "
            f"or allow the change with training.allow_changed=[{','.join(refused)}]"
        )


def find_checkpoint(config: Config, checkpointer: Checkpointer) -> Checkpoint | None:
    """Where to go on from: the run's own newest valid checkpoint, else the one that training.resume names, else
    nothing.

    Raises UserError when training.resume=never would write over checkpoints, and when all of the run's own are damaged
    (training.resume=never then sets them aside and begins anew).
    """
    own = checkpointer.newest_valid()
    never = config.training.resume == "never"
    if never and own is not None:
        raise UserError(
            f"{checkpointer.directory} holds checkpoints that training.resume=never would write over; "
            "give the run another logging.run_name, or move the directory away"
        )
    if own is None and checkpointer.damaged and never:
        checkpointer.set_aside_damaged()
    elif own is None and checkpointer.damaged:
        # A run that began at step 0 here would remove them one by one as it came by their steps.
        raise UserError(
            f"{checkpointer.directory}: none of the {len(checkpointer.damaged)} checkpoints is valid; restore one, or "
            "begin anew: with training.resume=never (they are kept under other names) or another logging.run_name"
        )
    if own is None and config.training.resume not in ("auto", "never"):
        return open_checkpoint(Path(config.training.resume))
    return own
