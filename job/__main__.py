"""`cyclevae COMMAND ...` is `python -m job.COMMAND ...`."""

from __future__ import annotations

import runpy
import sys

COMMANDS = {
    "train": "train a model",
    "prepare": "turn text into shards",
    "evaluate": "measure a run's model on held-out text",
    "sample": "read and write texts through a run's model",
    "benchmark": "measure the speed of settings against each other",
    "slurm": "submit runs to a SLURM cluster, watch, cancel and resume them",
    "k8s": "the same on a Kubernetes cluster",
    "convert": "LGDLM data and checkpoints to ours; export for inference",
}


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        print(
            "usage: cyclevae COMMAND ...\n\n"
            + "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
            + "\n\n`cyclevae COMMAND --help` tells more.",
            file=sys.stdout if command in ("-h", "--help") else sys.stderr,
        )
        sys.exit(0 if command in ("-h", "--help") else 2)
    del sys.argv[1]
    runpy.run_module(f"job.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
