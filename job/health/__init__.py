"""Whether a machine can train, and whether a run is learning: the verdicts of `cyclevae doctor`."""
