"""job.train, whose latents on rank 0 are not finite as long as the file named by POISON exists."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from job.data.loader import Batch, Loader

if __name__ == "__main__":
    poison, micro_batch = Path(os.environ["POISON"]), Loader.micro_batch

    def poisoned(self: Loader, step: int, number: int) -> Batch:
        batch = micro_batch(self, step, number)
        if self.split.rank == 0 and poison.exists():
            batch["latent"] = batch["latent"] * float("nan")
        return batch

    Loader.micro_batch = poisoned  # type: ignore[method-assign]
    runpy.run_module("job.train", run_name="__main__", alter_sys=True)
