"""Runs beside each other: what differs in their settings, and what their figures say of it. It imports no torch."""
