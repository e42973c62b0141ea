"""The dashboard of runs: how far they are, what they learn, how fast, and whether all is well."""

from __future__ import annotations

from collections.abc import Sequence

from job.metric_names import EVALUATION, Metric
from panels import OF_RANK, OF_RUN, Panel, Section, by_run, line, metric, number, unit_of

# What to look at first; the other panels of the evaluation follow in the order of the metrics' table.
FIRST_PANELS = ("Gains", "Cross-entropy", "Token accuracy", "Latent round trip")


def evaluation_panels() -> list[Panel]:
    """Panels of the evaluation's metrics, those with the same title in one."""
    titles = dict.fromkeys((*FIRST_PANELS, *(shown.panel for shown in EVALUATION if shown.panel)))
    return [evaluation_panel(title, [shown for shown in EVALUATION if shown.panel == title]) for title in titles]


def evaluation_panel(title: str, together: Sequence[Metric]) -> Panel:
    queries = []
    for shown in together:
        name = shown.name.removeprefix("cyclevae_")
        if shown.labels:
            queries.append((by_run(name, by="run, t"), "{{run}} t={{t}}"))
        else:
            queries.append((by_run(name), f"{{{{run}}}} {name.removeprefix('eval_')}"))
    help = together[0].help
    if len(together) > 1:
        help = "\n\n".join(f"{shown.key}: {shown.help}" for shown in together)
    return Panel(title, unit_of(together[0]), queries, help)


STEP_DURATION = "cyclevae_step_duration_seconds"
FIRING_OF_RUN = f'ALERTS{{{OF_RUN},alertname=~"Cyclevae.+",alertstate="firing"}}'
STEPS_LEFT = f"({by_run('target_steps')} - {by_run('step')})"
STEP_SECONDS = f"max by (run) (cyclevae:step_seconds:mean5m{{{OF_RUN}}})"

RUN_NOW = Section(
    "Run",
    (
        number("Progress", "progress_ratio"),
        number("Step", "step"),
        Panel(
            "Time left",
            "s",
            [(f"{STEPS_LEFT} * {STEP_SECONDS}", "{{run}}")],
            "At the present step time, without evaluations and saves.",
            "number",
            width=4,
        ),
        number("Tokens per second", "tokens_per_second"),
        number("Restarts", "restarts_total"),
        Panel(
            "Alerts",
            "none",
            [(f"sum by (run) ({FIRING_OF_RUN}) or 0 * {by_run('step')}", "{{run}}")],
            "Alerts that fire; the runbook says what to do.",
            "number",
            width=4,
        ),
    ),
)
LOSSES, WEIGHTS = by_run("loss", by="run, term"), by_run("loss_weight", by="run, term")
OBJECTIVE = Section(
    "Objective",
    (
        Panel(
            "Loss terms and their weights",
            "none",
            [(LOSSES, "{{run}} {{term}}")],
            "Every term before its weight; dashed, on the right axis, its weight as applied.",
            right=[(WEIGHTS, "{{run}} weight of {{term}}")],
            width=16,
        ),
        Panel(
            "What each term adds",
            "none",
            [(f"{LOSSES} * {WEIGHTS}", "{{run}} {{term}}")],
            "Terms times their weights: what the gradient sees.",
            "stacked",
        ),
        line("Gradient norm", "grad_norm"),
        line("Learning rate", "learning_rate"),
        Panel(
            "Lengths of predicted latents",
            "none",
            [(by_run("latent_pred_norm"), "{{run}} head"), (by_run("x0_pred_norm"), "{{run}} x0")],
            "What the latent head predicts, and the latent that follows from it, in training.",
        ),
    ),
)
HELD_OUT_TEXT = Section("Held-out text", evaluation_panels())
THROUGHPUT = Section(
    "Throughput and utilization",
    (
        Panel(
            "Tokens per second",
            "short",
            [
                (by_run("tokens_per_second"), "{{run}}"),
                (f"cyclevae:tokens_per_second:mean5m{{{OF_RUN}}}", "{{run}} 5 min"),
            ],
            "All ranks together.",
        ),
        line("Model FLOPs utilization", "model_flops_utilization_ratio"),
        Panel(
            "Samples that lack a half",
            "percentunit",
            [
                (
                    f"sum by (run, kind) (rate(cyclevae_unpaired_samples_total{{{OF_RUN}}}[$__rate_interval])) "
                    f"/ on (run) group_left () "
                    f"sum by (run) (rate(cyclevae_samples_total{{{OF_RUN}}}[$__rate_interval]))",
                    "{{run}} {{kind}} alone",
                )
            ],
            "Share of the samples that are a text without a latent, or a latent without a text.",
        ),
        Panel(
            "Step time",
            "s",
            [
                (
                    f"histogram_quantile({quantile}, "
                    f"sum by (run, le) (rate({STEP_DURATION}_bucket{{{OF_RANK}}}[$__rate_interval])))",
                    f"{{{{run}}}} {legend}",
                )
                for quantile, legend in ((0.5, "p50"), (0.95, "p95"))
            ],
            "Quantiles over the ranks chosen; as exact as the histogram's buckets.",
        ),
        Panel(
            "Parts of the step",
            "s",
            [(f"avg by (run, part) (cyclevae_step_part_seconds{{{OF_RANK}}})", "{{run}} {{part}}")],
            "Communication overlaps with backward.",
            "stacked",
        ),
        Panel(
            "Forward by rank",
            "s",
            [(by_run("step_part_seconds", OF_RANK + ',part="forward"', "run, rank"), "{{run}} rank {{rank}}")],
            "The slowest rank is the one that all wait for.",
        ),
        Panel(
            "Waiting for data",
            "percentunit",
            [(f"cyclevae:data_wait:ratio5m{{{OF_RANK}}}", "{{run}} rank {{rank}}")],
            "Share of the step.",
        ),
    ),
)
HEALTH = Section(
    "Health",
    (
        Panel(
            "Time since progress",
            "s",
            [
                (
                    f"time() - {by_run('last_progress_timestamp_seconds', OF_RANK, 'run, rank')}",
                    "{{run}} rank {{rank}}",
                ),
                (by_run("stall_limit_seconds"), "{{run}} limit"),
            ],
            "Above the limit the rank counts as stalled.",
        ),
        Panel(
            "Steps without an update",
            "none",
            [(f"max by (run) (increase(cyclevae_nonfinite_steps_total{{{OF_RUN}}}[$__rate_interval]))", "{{run}}")],
            metric("nonfinite_steps_total").help,
        ),
        Panel(
            "Endpoints that answer",
            "none",
            [(f'sum by (run) (up{{job="cyclevae",{OF_RUN}}})', "{{run}}")],
            "One per rank.",
        ),
        Panel(
            "Device memory",
            "bytes",
            [
                (by_run(f"device_memory_{name}_bytes", OF_RANK, "run, rank"), f"{{{{run}}}} rank {{{{rank}}}} {name}")
                for name in ("used", "peak")
            ],
            "In use, and the most this process had in use.",
            right=[(f"cyclevae:device_memory:ratio{{{OF_RANK}}}", "{{run}} rank {{rank}} of all")],
        ),
        Panel(
            "Device utilization",
            "percentunit",
            [(by_run("device_utilization_ratio", OF_RANK, "run, rank"), "{{run}} rank {{rank}}")],
            metric("device_utilization_ratio").help,
        ),
        Panel(
            "Rank skew",
            "none",
            [(f"cyclevae:forward_skew:ratio5m{{{OF_RUN}}}", "{{run}}")],
            "Forward time of the slowest rank over the mean.",
        ),
    ),
)
CHECKPOINTS = Section(
    "Checkpoints and goodput",
    (
        Panel(
            "Age of the newest checkpoint",
            "s",
            [
                (f"cyclevae:checkpoint_age_seconds{{{OF_RUN}}}", "{{run}}"),
                (by_run("checkpoint_expected_interval_seconds"), "{{run}} expected interval"),
            ],
            "What a crash would lose now.",
        ),
        Panel(
            "Time of a save",
            "s",
            [(by_run(f"checkpoint_{name}_seconds"), f"{{{{run}}}} {name}") for name in ("duration", "stall")],
            "From the call to the commit, and how long the loop stood still.",
        ),
        Panel(
            "Checkpoints",
            "none",
            [(by_run(f"checkpoint_{name}_total"), f"{{{{run}}}} {name}") for name in ("saves", "failures")],
            "Since the start of the process.",
            right=[(by_run("checkpoint_size_bytes"), "{{run}} bytes")],
        ),
        Panel(
            "Where the time goes",
            "s",
            [(by_run("goodput_seconds_total", by="run, phase"), "{{run}} {{phase}}")],
            "Seconds since the run's first start, restarts included.",
            "stacked",
            width=12,
        ),
        Panel(
            "Goodput",
            "percentunit",
            [(f"cyclevae:goodput:ratio1h{{{OF_RUN}}}", "{{run}}")],
            "Share of the last hour spent on steps that count.",
            width=6,
        ),
        line("Replayed steps", "replayed_steps_total", width=6),
        Panel(
            "Configuration",
            "none",
            [(f"cyclevae_config_info{{{OF_RUN}}}", "")],
            "What was started.",
            "table",
            width=24,
        ),
    ),
)
OVERVIEW = (RUN_NOW, OBJECTIVE, HELD_OUT_TEXT, THROUGHPUT, HEALTH, CHECKPOINTS)
