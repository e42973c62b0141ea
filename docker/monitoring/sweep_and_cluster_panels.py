"""The dashboard that compares the points of a sweep, and the one of all runs of a cluster."""

from __future__ import annotations

from job.metric_names import EVALUATION, LOSS_TERMS
from panels import FIRING, OF_ANY_RUN, OF_SWEEP, Panel, Query, Section, by_run, line, metric


def sweep_columns() -> list[Query]:
    """The columns of the table of a sweep's points: steps done, headlines of the last evaluation, speed."""
    headlines = []
    for shown in EVALUATION:
        if shown.headline:
            matchers = OF_SWEEP + ',t="1"' if shown.labels else OF_SWEEP
            headlines.append((by_run(shown.name.removeprefix("cyclevae_"), matchers), shown.key))
    return [
        (by_run("step", OF_SWEEP), "steps"),
        *headlines,
        (by_run("tokens_per_second", OF_SWEEP), "tokens/s"),
    ]


def sweep_panels() -> list[Panel]:
    """What is compared between the points of a sweep, a panel each."""
    loss_help = metric("loss").help + " Weights may differ between points: compare terms."
    losses = [
        Panel(
            term.sweep,
            "none",
            [(by_run("loss", f'{OF_SWEEP},term="{term.term}"'), "{{run}}")],
            loss_help,
            width=12,
        )
        for term in LOSS_TERMS
        if term.sweep
    ]
    evaluated = [
        line(shown.sweep, shown.name.removeprefix("cyclevae_"), OF_SWEEP, width=12)
        for shown in EVALUATION
        if shown.sweep
    ]
    return [
        *losses,
        *evaluated,
        line("Gradient norm", "grad_norm", OF_SWEEP, width=12),
        line("Tokens per second", "tokens_per_second", OF_SWEEP, width=12),
    ]


COMPARISON = (
    Section(
        "Points of the sweep",
        (
            Panel("Results so far", "none", sweep_columns(), "The last evaluation of every point.", "table", width=24),
            *sweep_panels(),
        ),
    ),
)

ALERTS_BY_RUN = f"sum by (run) ({FIRING}) or 0 * {by_run('step', OF_ANY_RUN)}"
CLUSTER = (
    Section(
        "Now",
        (
            Panel("Runs", "none", [("count(max by (run) (cyclevae_step))", "runs")], "That answer.", "number", width=6),
            Panel("Ranks", "none", [('sum(up{job="cyclevae"})', "ranks")], "That answer.", "number", width=6),
            Panel(
                "Tokens per second",
                "short",
                [("sum(max by (run) (cyclevae_tokens_per_second))", "all runs")],
                "Of all runs together.",
                "number",
                width=6,
            ),
            Panel("Alerts", "none", [(f"count({FIRING}) or vector(0)", "firing")], "That fire.", "number", width=6),
        ),
    ),
    Section(
        "Runs",
        (
            Panel(
                "All runs",
                "none",
                [
                    (by_run("step", OF_ANY_RUN), "steps"),
                    (by_run("progress_ratio", OF_ANY_RUN), "progress"),
                    (by_run("loss", OF_ANY_RUN + ',term="total"'), "loss"),
                    (by_run("tokens_per_second", OF_ANY_RUN), "tokens/s"),
                    (by_run("model_flops_utilization_ratio", OF_ANY_RUN), "MFU"),
                    ("cyclevae:goodput:ratio1h", "goodput"),
                    ("cyclevae:checkpoint_age_seconds", "checkpoint age, s"),
                    (by_run("restarts_total", OF_ANY_RUN), "restarts"),
                    (ALERTS_BY_RUN, "alerts"),
                ],
                "Every run that answers.",
                "table",
                width=24,
            ),
            Panel(
                "Tokens per second",
                "short",
                [(by_run("tokens_per_second", OF_ANY_RUN), "{{run}}")],
                "By run.",
                "stacked",
                width=12,
            ),
            line("Model FLOPs utilization", "model_flops_utilization_ratio", OF_ANY_RUN, width=12),
            Panel(
                "Device utilization",
                "percentunit",
                [("avg by (node) (cyclevae_device_utilization_ratio)", "{{node}}")],
                "By node.",
                width=12,
            ),
            Panel(
                "Device memory",
                "percentunit",
                [
                    (
                        "max by (node) (cyclevae_device_memory_used_bytes / cyclevae_device_memory_limit_bytes)",
                        "{{node}}",
                    )
                ],
                "The fullest device of a node.",
                width=12,
            ),
            Panel(
                "Goodput",
                "percentunit",
                [("cyclevae:goodput:ratio1h", "{{run}}")],
                "Share of the last hour spent on steps that count.",
                width=12,
            ),
            Panel(
                "Time since progress",
                "s",
                [("time() - min by (run) (cyclevae_last_progress_timestamp_seconds)", "{{run}}")],
                "Of the slowest rank.",
                width=12,
            ),
        ),
    ),
)
