"""hydra/launcher=slurm and `cyclevae slurm`: one SLURM job per run, whose batch step (batch.sh) starts the ranks."""
