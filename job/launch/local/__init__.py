"""Runs on this machine, several at a time."""
