"""What the dashboards show: panels with their queries, as plain data. `$run`, `$rank` and `$sweep` are the dashboards' variables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

RUN, RANK = 'run=~"$run"', 'run=~"$run",rank=~"$rank"'


@dataclass(frozen=True)
class Panel:
    """A panel: (query, legend) pairs; `right` are drawn against the right axis. For a table the legend is the column."""

    title: str
    unit: str  # of Grafana
    queries: Sequence[tuple[str, str]]
    help: str
    kind: Literal["lines", "stacked", "number", "table"] = "lines"
    right: Sequence[tuple[str, str]] = ()
    width: int = 8


Rows = Sequence[tuple[str, Sequence[Panel]]]


def by_run(name: str, matchers: str = RUN, by: str = "run") -> str:
    """A metric of runs without the labels that a restart changes."""
    return f"max by ({by}) ({name}{{{matchers}}})"


def number(title: str, unit: str, query: str, help: str) -> Panel:
    return Panel(title, unit, [(query, "{{run}}")], help, "number", width=4)


def evaluation(title: str, unit: str, names: Sequence[str], help: str) -> Panel:
    return Panel(title, unit, [(by_run(f"cyclevae_eval_{name}"), f"{{{{run}}}} {name}") for name in names], help)


def by_t(title: str, unit: str, name: str, help: str) -> Panel:
    return Panel(title, unit, [(by_run(f"cyclevae_eval_t2l_{name}", by="run, t"), "{{run}} t={{t}}")], help)


FIRING = 'ALERTS{alertname=~"Cyclevae.+",alertstate="firing"}'
STEP = "cyclevae_step_duration_seconds"

OVERVIEW: Rows = (
    (
        "Run",
        (
            number("Progress", "percentunit", by_run("cyclevae_progress_ratio"), "Steps done of the whole run's."),
            number("Step", "none", by_run("cyclevae_step"), "Steps done."),
            number(
                "Time left",
                "s",
                f"({by_run('cyclevae_target_steps')} - {by_run('cyclevae_step')}) * max by (run) (cyclevae:step_seconds:mean5m{{{RUN}}})",
                "At the present step time, without evaluations and saves.",
            ),
            number(
                "Tokens per second",
                "short",
                by_run("cyclevae_tokens_per_second"),
                "All ranks together, over the last log interval.",
            ),
            number("Restarts", "none", by_run("cyclevae_restarts_total"), "How often the run was started again."),
            number(
                "Alerts",
                "none",
                f"sum by (run) ({FIRING.replace('{', '{' + RUN + ',')}) or 0 * {by_run('cyclevae_step')}",
                "Alerts that fire; the runbook says what to do.",
            ),
        ),
    ),
    (
        "Objective",
        (
            Panel(
                "Loss terms and their weights",
                "none",
                [(by_run("cyclevae_loss", by="run, term"), "{{run}} {{term}}")],
                "Every term before its weight; dashed, on the right axis, its weight as applied.",
                right=[(by_run("cyclevae_loss_weight", by="run, term"), "{{run}} weight of {{term}}")],
                width=16,
            ),
            Panel(
                "What each term adds",
                "none",
                [
                    (
                        f"{by_run('cyclevae_loss', by='run, term')} * {by_run('cyclevae_loss_weight', by='run, term')}",
                        "{{run}} {{term}}",
                    )
                ],
                "Terms times their weights: what the gradient sees.",
                "stacked",
            ),
            Panel(
                "Gradient norm",
                "none",
                [(by_run("cyclevae_grad_norm"), "{{run}}")],
                "Before clipping, mean over the log interval.",
            ),
            Panel("Learning rate", "none", [(by_run("cyclevae_learning_rate"), "{{run}}")], "Of the last step."),
            Panel(
                "Lengths of predicted latents",
                "none",
                [
                    (by_run("cyclevae_latent_pred_norm"), "{{run}} head"),
                    (by_run("cyclevae_x0_pred_norm"), "{{run}} x0"),
                ],
                "What the latent head predicts, and the latent that follows from it, in training.",
            ),
        ),
    ),
    (
        "Held-out text",
        (
            evaluation(
                "Gains",
                "none",
                ("l2t_latent_gain", "t2l_text_gain"),
                "What the right latent (nats per token) and the right text (squared error) bring against another's: at 0 that direction is blind.",
            ),
            evaluation(
                "Cross-entropy",
                "none",
                ("l2t_ce", "t2l2t_ce", "pseudo_entropy"),
                "Nats per token, decoded from the true and from the predicted latent.",
            ),
            evaluation(
                "Token accuracy",
                "percentunit",
                ("l2t_token_acc", "t2l2t_token_acc", "text_most_frequent_token_acc"),
                "Decoded from the true latent, after the round trip, and for always guessing the most frequent token.",
            ),
            evaluation(
                "Latent round trip",
                "percentunit",
                ("l2t2l_cos", "l2t2l_retrieval_at_1"),
                "Latent to text to latent: cosine, and how often it finds itself.",
            ),
            by_t(
                "Cosine of predicted latents",
                "percentunit",
                "x0_cos",
                "By latent timestep; 1 is generation from the text alone.",
            ),
            by_t("Error of predicted latents", "none", "x0_mse", "Mean squared error by latent timestep."),
            by_t(
                "Length of predicted latents",
                "percentunit",
                "x0_norm_ratio",
                "Against the true ones, by latent timestep.",
            ),
            evaluation(
                "Latent directions in use",
                "none",
                ("latent_active_dims", "latent_active_dims_data"),
                "Participation ratio of predicted and of true latents.",
            ),
        ),
    ),
    (
        "Throughput and utilization",
        (
            Panel(
                "Tokens per second",
                "short",
                [
                    (by_run("cyclevae_tokens_per_second"), "{{run}}"),
                    (f"cyclevae:tokens_per_second:mean5m{{{RUN}}}", "{{run}} 5 min"),
                ],
                "All ranks together.",
            ),
            Panel(
                "Model FLOPs utilization",
                "percentunit",
                [(by_run("cyclevae_model_flops_utilization_ratio"), "{{run}}")],
                "Operations the model needs, counted per modality, over what the devices could do.",
            ),
            Panel(
                "Step time",
                "s",
                [
                    (
                        f"histogram_quantile({q}, sum by (run, le) (rate({STEP}_bucket{{{RANK}}}[$__rate_interval])))",
                        f"{{{{run}}}} p{p}",
                    )
                    for q, p in ((0.5, 50), (0.95, 95))
                ],
                "Quantiles over the ranks chosen; as exact as the histogram's buckets.",
            ),
            Panel(
                "Parts of the step",
                "s",
                [(f"avg by (run, part) (cyclevae_step_part_seconds{{{RANK}}})", "{{run}} {{part}}")],
                "Communication overlaps with backward.",
                "stacked",
            ),
            Panel(
                "Forward by rank",
                "s",
                [
                    (
                        by_run("cyclevae_step_part_seconds", RANK + ',part="forward"', "run, rank"),
                        "{{run}} rank {{rank}}",
                    )
                ],
                "The slowest rank is the one that all wait for.",
            ),
            Panel(
                "Waiting for data",
                "percentunit",
                [(f"cyclevae:data_wait:ratio5m{{{RANK}}}", "{{run}} rank {{rank}}")],
                "Share of the step.",
            ),
        ),
    ),
    (
        "Health",
        (
            Panel(
                "Time since progress",
                "s",
                [
                    (
                        f"time() - {by_run('cyclevae_last_progress_timestamp_seconds', RANK, 'run, rank')}",
                        "{{run}} rank {{rank}}",
                    ),
                    (by_run("cyclevae_stall_limit_seconds"), "{{run}} limit"),
                ],
                "Above the limit the rank counts as stalled.",
            ),
            Panel(
                "Steps without an update",
                "none",
                [(f"max by (run) (increase(cyclevae_nonfinite_steps_total{{{RUN}}}[$__rate_interval]))", "{{run}}")],
                "Steps skipped because the loss or a gradient was not finite.",
            ),
            Panel(
                "Endpoints that answer",
                "none",
                [(f'sum by (run) (up{{job="cyclevae",{RUN}}})', "{{run}}")],
                "One per rank.",
            ),
            Panel(
                "Device memory",
                "bytes",
                [
                    (
                        by_run(f"cyclevae_device_memory_{name}_bytes", RANK, "run, rank"),
                        f"{{{{run}}}} rank {{{{rank}}}} {name}",
                    )
                    for name in ("used", "peak")
                ],
                "In use, and the most this process had in use.",
                right=[(f"cyclevae:device_memory:ratio{{{RANK}}}", "{{run}} rank {{rank}} of all")],
            ),
            Panel(
                "Device utilization",
                "percentunit",
                [(by_run("cyclevae_device_utilization_ratio", RANK, "run, rank"), "{{run}} rank {{rank}}")],
                "Share of the time in which the device computed.",
            ),
            Panel(
                "Rank skew",
                "none",
                [(f"cyclevae:forward_skew:ratio5m{{{RUN}}}", "{{run}}")],
                "Forward time of the slowest rank over the mean.",
            ),
        ),
    ),
    (
        "Checkpoints and goodput",
        (
            Panel(
                "Age of the newest checkpoint",
                "s",
                [
                    (f"cyclevae:checkpoint_age_seconds{{{RUN}}}", "{{run}}"),
                    (by_run("cyclevae_checkpoint_expected_interval_seconds"), "{{run}} expected interval"),
                ],
                "What a crash would lose now.",
            ),
            Panel(
                "Time of a save",
                "s",
                [
                    (by_run(f"cyclevae_checkpoint_{name}_seconds"), f"{{{{run}}}} {name}")
                    for name in ("duration", "stall")
                ],
                "From the call to the commit, and how long the loop stood still.",
            ),
            Panel(
                "Checkpoints",
                "none",
                [
                    (by_run(f"cyclevae_checkpoint_{name}_total"), f"{{{{run}}}} {name}")
                    for name in ("saves", "failures")
                ],
                "Since the start of the process.",
                right=[(by_run("cyclevae_checkpoint_size_bytes"), "{{run}} bytes")],
            ),
            Panel(
                "Where the time goes",
                "s",
                [(by_run("cyclevae_goodput_seconds_total", by="run, phase"), "{{run}} {{phase}}")],
                "Seconds since the run's first start, restarts included.",
                "stacked",
                width=12,
            ),
            Panel(
                "Goodput",
                "percentunit",
                [(f"cyclevae:goodput:ratio1h{{{RUN}}}", "{{run}}")],
                "Share of the last hour spent on steps that count.",
                width=6,
            ),
            Panel(
                "Replayed steps",
                "none",
                [(by_run("cyclevae_replayed_steps_total"), "{{run}}")],
                "Steps done again after restarts.",
                width=6,
            ),
            Panel(
                "Configuration",
                "none",
                [(f"cyclevae_config_info{{{RUN}}}", "")],
                "What was started.",
                "table",
                width=24,
            ),
        ),
    ),
)

SWEEP = 'run=~"$sweep"'
COMPARISON: Rows = (
    (
        "Points of the sweep",
        (
            Panel(
                "Results so far",
                "none",
                [
                    (by_run("cyclevae_step", SWEEP), "steps"),
                    (by_run("cyclevae_eval_l2t_ce", SWEEP), "l2t/ce"),
                    (by_run("cyclevae_eval_l2t_latent_gain", SWEEP), "l2t/latent_gain"),
                    (by_run("cyclevae_eval_t2l_x0_cos", SWEEP + ',t="1"'), "t2l/x0_cos"),
                    (by_run("cyclevae_eval_t2l_text_gain", SWEEP), "t2l/text_gain"),
                    (by_run("cyclevae_eval_t2l2t_token_acc", SWEEP), "t2l2t/token_acc"),
                    (by_run("cyclevae_eval_l2t2l_cos", SWEEP), "l2t2l/cos"),
                    (by_run("cyclevae_tokens_per_second", SWEEP), "tokens/s"),
                ],
                "The last evaluation of every point.",
                "table",
                width=24,
            ),
            *(
                Panel(title, unit, [(by_run(name, SWEEP + matchers), "{{run}}")], help, width=12)
                for title, unit, name, matchers, help in (
                    (
                        "Total loss",
                        "none",
                        "cyclevae_loss",
                        ',term="total"',
                        "Weights differ between points: compare terms.",
                    ),
                    ("L2T loss", "none", "cyclevae_loss", ',term="base_l2t_text"', "Nats per token, training."),
                    ("T2L loss", "none", "cyclevae_loss", ',term="base_t2l_latent"', "Training."),
                    (
                        "Held-out cross-entropy",
                        "none",
                        "cyclevae_eval_l2t_ce",
                        "",
                        "Nats per token from the true latent.",
                    ),
                    (
                        "Latent gain",
                        "none",
                        "cyclevae_eval_l2t_latent_gain",
                        "",
                        "Nats per token; 0: the decoder ignores the latent.",
                    ),
                    (
                        "Text gain",
                        "none",
                        "cyclevae_eval_t2l_text_gain",
                        "",
                        "Squared error; 0: the encoder ignores the text.",
                    ),
                    (
                        "Round-trip accuracy",
                        "percentunit",
                        "cyclevae_eval_t2l2t_token_acc",
                        "",
                        "Text to latent to text.",
                    ),
                    ("Round-trip cosine", "percentunit", "cyclevae_eval_l2t2l_cos", "", "Latent to text to latent."),
                    ("Gradient norm", "none", "cyclevae_grad_norm", "", "Before clipping."),
                    ("Tokens per second", "short", "cyclevae_tokens_per_second", "", "All ranks together."),
                )
            ),
        ),
    ),
)

ALL = 'run=~".+"'
CLUSTER: Rows = (
    (
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
    (
        "Runs",
        (
            Panel(
                "All runs",
                "none",
                [
                    (by_run("cyclevae_step", ALL), "steps"),
                    (by_run("cyclevae_progress_ratio", ALL), "progress"),
                    (by_run("cyclevae_loss", ALL + ',term="total"'), "loss"),
                    (by_run("cyclevae_tokens_per_second", ALL), "tokens/s"),
                    (by_run("cyclevae_model_flops_utilization_ratio", ALL), "MFU"),
                    ("cyclevae:goodput:ratio1h", "goodput"),
                    ("cyclevae:checkpoint_age_seconds", "checkpoint age, s"),
                    (by_run("cyclevae_restarts_total", ALL), "restarts"),
                    (f"sum by (run) ({FIRING}) or 0 * {by_run('cyclevae_step', ALL)}", "alerts"),
                ],
                "Every run that answers.",
                "table",
                width=24,
            ),
            Panel(
                "Tokens per second",
                "short",
                [(by_run("cyclevae_tokens_per_second", ALL), "{{run}}")],
                "By run.",
                "stacked",
                width=12,
            ),
            Panel(
                "Model FLOPs utilization",
                "percentunit",
                [(by_run("cyclevae_model_flops_utilization_ratio", ALL), "{{run}}")],
                "By run.",
                width=12,
            ),
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
