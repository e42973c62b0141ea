"""`cyclevae COMMAND ...` is `python -m job.COMMAND ...`."""

from __future__ import annotations

import runpy
import sys

from job.errors import ExitCode
from job.output import tolerated_output
from job.versions import program_version

COMMANDS = {
    "train": "train a model",
    "prepare": "turn text into shards",
    "plan": "what a run will need, before it is queued: parameters, memory, time, checkpoints",
    "evaluate": "measure a run's model on held-out text",
    "compare": "runs beside each other: what differs, what came of it, and whether that is chance",
    "doctor": "what keeps a machine, a cluster, a run or a model from training well",
    "curves": "draw the curves of a run, also of one that is running or was stopped",
    "report": "one page of all about a run, also of one that is running or was stopped",
    "sample": "read and write texts through a run's model",
    "encode": "texts to latents, from file to file",
    "decode": "latents to texts, from file to file",
    "benchmark": "measure the speed of settings against each other",
    "slurm": "submit runs to a SLURM cluster, watch, cancel and resume them",
    "k8s": "the same on a Kubernetes cluster",
    "convert": "LGDLM data and checkpoints to ours; export a model, push it to the Hugging Face hub",
}


def usage() -> str:
    """The commands with a line for each."""
    commands = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return f"usage: cyclevae COMMAND ...\n\n{commands}\n\n`cyclevae COMMAND --help` tells more; `cyclevae --version`"


def answer(text: str) -> ExitCode:
    """Print what was asked for; returns the exit code. job.command would do the same, and takes longer to load."""
    with tolerated_output(end_with_reader=False) as output:
        print(text)
        output.flush_to_the_end()
        if output.problem:
            print(f"error: {output.problem}", file=sys.stderr)
        return ExitCode.FAILED if output.failure else ExitCode.FINISHED


def main() -> None:
    """Run the command that the first argument names; the others are its own."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("-h", "--help"):
        sys.exit(answer(usage()))
    if command == "--version":
        sys.exit(answer(program_version()))
    if command not in COMMANDS:
        print(usage(), file=sys.stderr)
        sys.exit(ExitCode.USAGE)
    del sys.argv[1]
    # As `python -m` would, so that a command's usage shows its own name and only its own imports are loaded.
    runpy.run_module(f"job.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
