"""Whether a checkpoint belongs to the run that wants to go on from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from job.config import FREE_ON_RESUME, Config, default_of, get, keys, to_dict
from job.errors import UserError
from job.runtime.checkpoint import Checkpoint, open_checkpoint
from job.runtime.checkpointer import Checkpointer
from job.runtime.optimizer import learning_rate


def record(step: int, config: Config, data_fingerprint: str, global_batch_size: int) -> dict[str, Any]:
    """What a checkpoint stores beside tensors; with the tensors it is all the loop needs to go on."""
    return {"step": step, "config": to_dict(config), "data": data_fingerprint, "global_batch_size": global_batch_size}


def refuse_another_run(
    saved: dict[str, Any], config: Config, data_fingerprint: str, global_batch_size: int
) -> list[str]:
    """Refuse a checkpoint whose configuration, data or global batch would change what the run computes.

    A run that went on with, say, another learning rate or dataset would be neither the old run nor the new one, and
    nothing in its logs would show where it changed. Keys that change nothing of the numbers (FREE_ON_RESUME: where logs
    go, how often it saves) are free, and so is training longer, of which the returned notes tell what becomes of the
    learning rate. Raises UserError naming the differing keys and how to allow them.
    """
    different = {}
    present = to_dict(config)
    for key, declared in keys().items():
        section, name = key.split(".")
        # A checkpoint from before a key existed was made by what is the key's default today.
        before, now = saved["config"].get(section, {}).get(name, default_of(declared)), present[section][name]
        longer = key == "training.num_train_steps" and now > before
        if key not in FREE_ON_RESUME and before != now and not longer:
            different[key] = f"{before} -> {get(config, key)}"
    if saved["data"] != data_fingerprint:
        different["data"] = "another dataset or tokenizer (dataset.json differs)"
    if saved["global_batch_size"] != global_batch_size:
        different["global_batch_size"] = f"{saved['global_batch_size']} -> {global_batch_size}"
    refused = {key: change for key, change in different.items() if key not in config.training.allow_changed}
    if refused:
        changes = ", ".join(f"{key}: {change}" for key, change in refused.items())
        # What another number of ranks makes of the same command: nobody asked for another global batch.
        as_before = f"go on with training.global_batch_size={saved['global_batch_size']}, "
        raise UserError(
            f"the run directory holds a checkpoint of another run ({changes}); "
            f"{as_before if 'global_batch_size' in refused else ''}give the run another logging.run_name, "
            f"or allow the change with training.allow_changed=[{','.join(refused)}]; see docs: explanation/exactness"
        )
    before = saved["config"].get("training", {}).get("num_train_steps", 0)
    return [_longer(saved["step"], before, config)] if config.training.num_train_steps > before else []


def _longer(step: int, before: int, config: Config) -> str:
    """What training to more steps than `before` does to the learning rate of a run that has done `step`."""
    training = config.training
    line = f"training.num_train_steps raised from {before} to {training.num_train_steps}: "
    if training.lr_schedule == "constant":
        return line + f"the learning rate stays {config.optimizer.lr:.3g}"
    shorter = dataclasses.replace(training, num_train_steps=before)
    then, now = (learning_rate(max(0, step - 1), config.optimizer, t) for t in (shorter, training))
    return line + (
        f"the {training.lr_schedule} schedule is stretched over all of them, so the learning rate goes on at {now:.3g} "
        f"where it was {then:.3g}, and falls to 0 at the new end"
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
            "begin anew: with training.resume=never (they are kept under other names) or another logging.run_name; "
            "see docs: explanation/how-a-run-survives"
        )
    if own is None and config.training.resume not in ("auto", "never"):
        return open_checkpoint(Path(config.training.resume))
    return own
