"""Launchers: what submits runs to clusters, watches them and ends them.

points.py, submission.py, waiting.py, failures.py, restarts.py, run_status.py and command_line.py hold what all
launchers share; refusal.py keeps out two that other packages bring. Each launcher is a room of its own (slurm/,
kubernetes/) that imports nothing from the others. A further one needs: its room, the Hydra plugin that makes it known
(hydra_plugins/, with a file in configs/hydra/launcher), and its line in job/__main__.py.

No launcher imports torch: commands answer at once, also on a login node.
"""
