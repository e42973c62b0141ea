"""Every number that a run reports, in one table: its key in the logs, its unit, what it means, and where it is shown.

The logs (training_log.jsonl, evaluation.jsonl), Prometheus, the progress line, curves.png, the table of an evaluation
and Grafana's dashboards all read this table. So a new term of the loss needs its configuration, its computation and
an entry in LOSS_TERMS; a new metric of the evaluation needs its computation and an entry in EVALUATION. `make
generate` then writes the dashboards anew.

In Prometheus every series also carries the labels `run` and `rank`. Metrics OF_THE_RUN come from rank 0 alone, since
all ranks agree on them; metrics OF_EACH_RANK come from every rank. This module needs no torch: launchers and
generators read it, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Series = tuple[str, tuple[str, ...]]  # a metric's name in Prometheus, and the values of its own labels

# Where the time of a run goes, over all its starts, by the clock of rank 0.
PHASE_WORDS: Mapping[str, str] = {
    "productive": "steps that count",
    "replayed": "steps done again after a restart, because a kill came between them and their checkpoint",
    "waiting_for_data": "the loop stood still for its next batch",
    "checkpointing": "the loop stood still for a save",
    "evaluating": "the loop stood still for an evaluation or samples",
    "starting": "from the launcher's start, or else the process's, to the first step: imports, model, checkpoint",
    "lost": "a start's last seconds, which a kill kept from being counted, and its processes' end",
    "hung": "what was longer than that: the processes were there and reported no step",
    "queued": "from the end of a start to the beginning of the next one",
}
PHASES = tuple(PHASE_WORDS)

# What a step consists of; `<part>_seconds` in the log. Communication (the reduction of gradients) overlaps with
# backward.
STEP_PARTS = ("data_wait", "forward", "backward", "optimizer", "communication")

# Upper bounds of the histogram of step times, in seconds: from a tiny model on a GPU to a step that includes a
# compilation.
STEP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True)
class Metric:
    """One metric of Prometheus, and the number of the logs that it shows."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    unit: str
    help: str  # a sentence
    labels: tuple[str, ...] = ()  # besides run and rank
    key: str = ""  # in training_log.jsonl or evaluation.jsonl; empty: in neither, or under several keys, one a label
    curves: str = ""  # title of the panel of curves.png that shows it; empty: none

    # Of metrics of the evaluation alone:
    words: str = ""  # the help as the evaluation's table prints it
    panel: str = ""  # title of the panel in the run dashboard's row "Held-out text"
    sweep: str = ""  # title of its panel in the sweep dashboard
    headline: bool = False  # shown in the line that tells of an evaluation, and in the sweep dashboard's table
    curves_by_timestep: bool = False  # curves.png shows its values at every latent timestep, not only at t=1


@dataclass(frozen=True)
class LossTerm:
    """A term of the objective, before its weight. Its weight as applied is `<term>_weight` in the log."""

    term: str  # the label `term` of cyclevae_loss and cyclevae_loss_weight
    short: str  # on the progress line
    modes: tuple[str, ...]  # the kinds of steps that compute it: cycle_vae, l2t, t2l, unconditional
    weight: str = ""  # the key of the configuration's section `loss` that holds its weight; empty: the weight is 1
    ramp: tuple[str, ...] = ()  # keys of that section; their sum is the step at which the weight has grown to its value
    curves: str = ""  # title of the panel of curves.png that shows it
    sweep: str = ""  # title of its panel in the sweep dashboard
    unit: str = ""  # empty: a sum of terms of several units
    words: str = ""  # what it is
    held_out: str = ""  # the metric of the evaluation that measures the same on held-out samples; empty: there is none

    @property
    def key(self) -> str:
        """Its key in training_log.jsonl."""
        return "loss" if self.term == "total" else f"{self.term}_loss"

    @property
    def weight_key(self) -> str:
        """The key of its weight in training_log.jsonl."""
        return f"{self.term}_weight"


POOL = "{samples}"  # in the words of a metric: the number of held-out texts, which the table fills in

# In the order of the progress line and of the accumulator's columns. Checkpoints hold these columns without their
# names, so that an interval which a resume cuts in two reads as one: with a term more, or in another order,
# checkpoints of before cannot be resumed.
TEXT_CURVES, LATENT_CURVES = "text losses", "latent losses"
NATS, SQUARED = "nats per token", "squared latent units"
LOSS_TERMS = (
    LossTerm("total", "loss", modes=(), sweep="Total loss", words="sum of the terms, each times its weight"),
    LossTerm(
        "base_l2t_text",
        "l2t",
        modes=("cycle_vae", "l2t"),
        curves=TEXT_CURVES,
        sweep="L2T loss",
        unit=NATS,
        words="cross-entropy of the text decoded from its latent",
        held_out="l2t/ce",
    ),
    LossTerm(
        "base_t2l_latent",
        "t2l",
        modes=("cycle_vae", "t2l"),
        weight="latent_loss_weight",
        curves=LATENT_CURVES,
        sweep="T2L loss",
        unit=SQUARED,
        words="squared error of the latent prediction from the text and noise",
        held_out="t2l/x0_mse",
    ),
    LossTerm(
        "cycle_text",
        "t2l2t",
        modes=("cycle_vae",),
        weight="cycle_text_weight",
        ramp=("cycle_text_warmup_steps", "cycle_text_ramp_steps"),
        curves=TEXT_CURVES,
        unit=NATS,
        words="cross-entropy of the text decoded from the latent predicted from it",
        held_out="t2l2t/ce",
    ),
    LossTerm(
        "cycle_latent",
        "l2t2l",
        modes=("cycle_vae",),
        weight="cycle_latent_weight",
        ramp=("cycle_latent_warmup_steps", "cycle_latent_ramp_steps"),
        curves=LATENT_CURVES,
        unit=SQUARED,
        words="squared error of the latent prediction from the text decoded from it",
    ),
    LossTerm(
        "text",
        "text",
        modes=("unconditional",),
        curves=TEXT_CURVES,
        unit=NATS,
        words="cross-entropy of masked tokens, given the others and a noisy latent",
    ),
    LossTerm(
        "latent",
        "latent",
        modes=("unconditional",),
        weight="latent_loss_weight",
        curves=LATENT_CURVES,
        unit=SQUARED,
        words="squared error of the latent prediction, given a partly masked text",
    ),
)


def gauge(name: str, unit: str, help: str, *labels: str, key: str = "", curves: str = "") -> Metric:
    return Metric(f"cyclevae_{name}", "gauge", unit, help, labels, key, curves)


def counter(name: str, unit: str, help: str, *labels: str, key: str = "") -> Metric:
    return Metric(f"cyclevae_{name}", "counter", unit, help, labels, key)


def evaluated(
    key: str,
    unit: str,
    words: str,
    *,
    panel: str = "",
    curves: str = "",
    sweep: str = "",
    headline: bool = False,
    by_timestep: bool = False,
    curves_by_timestep: bool = False,
) -> Metric:
    """A metric of the evaluation: `t2l/x0_cos` is cyclevae_eval_t2l_x0_cos in Prometheus.

    Where it is measured `by_timestep`, the log also holds `<key>@0.9`, which is the series with the label t="0.9";
    the plain key is t="1", the start of generation.
    """
    timestep_in_help = ", by latent timestep" if by_timestep else ""
    timestep_in_table = ", at t=1" if by_timestep else ""
    return Metric(
        name="cyclevae_eval_" + key.replace("/", "_"),
        kind="gauge",
        unit=unit,
        help=f"{words[0].upper()}{words[1:].replace(POOL, 'all')}{timestep_in_help}.",
        labels=("t",) if by_timestep else (),
        key=key,
        curves=curves,
        words=words + timestep_in_table,
        panel=panel,
        sweep=sweep,
        headline=headline,
        curves_by_timestep=curves_by_timestep,
    )


# Scalars of the objective besides its terms, means over the log interval; also columns of the accumulator, after the
# terms.
STEP_MEANS = (
    gauge("latent_timestep_mean", "ratio", "Mean latent timestep that T2L trained at.", key="t_lat_mean"),
    gauge("latent_pred_norm", "latent units", "Mean length of what the latent head predicts.", key="latent_pred_norm"),
    gauge("x0_pred_norm", "latent units", "Mean length of the latent that follows from it.", key="x0_pred_norm"),
    gauge(
        "grad_norm",
        "1",
        "Gradient norm before clipping, mean over the log interval.",
        key="grad_norm",
        curves="gradient norm",
    ),
)

# The rows of an evaluation's table, in its order.
CROSS_ENTROPY, ACCURACY = "held-out cross-entropy, nats per token", "held-out token accuracy"
GAINS, COSINES = "what latent (nats) and text (MSE) bring", "cosine of predicted latents"
WHOLE, CHRF = "whole texts and repeated tokens", "BLEU and chrF"
RETRIEVAL = "retrieval of latents"
ERRORS, DIRECTIONS = "error and length of predicted latents, t=1", "latent directions in use"
EVALUATION = (
    evaluated(
        "l2t/ce",
        "nats",
        "cross-entropy of the text decoded from its latent, nats per token",
        panel="Cross-entropy",
        curves=CROSS_ENTROPY,
        sweep="Held-out cross-entropy",
        headline=True,
    ),
    evaluated(
        "l2t/token_acc",
        "ratio",
        "share of tokens right in the text decoded from its latent",
        panel="Token accuracy",
        curves=ACCURACY,
    ),
    evaluated(
        "l2t/latent_gain",
        "nats",
        "what the right latent saves the decoder against another's, nats per token",
        panel="Gains",
        curves=GAINS,
        sweep="Latent gain",
        headline=True,
    ),
    evaluated(
        "t2l/x0_cos",
        "ratio",
        "cosine of the latent predicted from the text to the true one",
        panel="Cosine of predicted latents",
        curves=COSINES,
        headline=True,
        by_timestep=True,
        curves_by_timestep=True,
    ),
    evaluated(
        "t2l/x0_mse",
        "squared latent units",
        "mean squared error of the latent predicted from the text",
        panel="Error of predicted latents",
        curves=ERRORS,
        by_timestep=True,
    ),
    evaluated(
        "t2l/x0_norm_ratio",
        "ratio",
        "length of the latent predicted from the text against the true one's",
        panel="Length of predicted latents",
        curves=ERRORS,
        by_timestep=True,
    ),
    evaluated(
        "t2l/text_gain",
        "squared latent units",
        "what the right text saves in mean squared error against another's",
        panel="Gains",
        curves=GAINS,
        sweep="Text gain",
        headline=True,
    ),
    evaluated(
        "t2l2t/ce",
        "nats",
        "cross-entropy of the text decoded from the latent predicted from it, nats per token",
        panel="Cross-entropy",
        curves=CROSS_ENTROPY,
    ),
    evaluated(
        "t2l2t/token_acc",
        "ratio",
        "share of tokens right in the text decoded from the latent predicted from it",
        panel="Token accuracy",
        curves=ACCURACY,
        sweep="Round-trip accuracy",
        headline=True,
    ),
    evaluated(
        "text/most_frequent_at_place_acc",
        "ratio",
        "share of tokens right for guessing at each place, from either end, what is most frequent there",
        panel="Token accuracy",
        curves=ACCURACY,
    ),
    evaluated(
        "text/most_frequent_token_acc",
        "ratio",
        "share of tokens right for always guessing the most frequent one",
        panel="Token accuracy",
        curves=ACCURACY,
    ),
    # Of texts decoded freely, as the configuration's section `decoding` says.
    evaluated(
        "t2l2t/decoded_token_acc",
        "ratio",
        "the same as t2l2t/token_acc, decoded as configured (decoding.*)",
        panel="Token accuracy",
        curves=ACCURACY,
    ),
    evaluated(
        "l2t/decoded_token_acc",
        "ratio",
        "the same as l2t/token_acc, decoded as configured",
        panel="Token accuracy",
        curves=ACCURACY,
    ),
    evaluated(
        "t2l2t/exact_match",
        "ratio",
        "share of texts that come back whole from the latent predicted from them",
        panel="Whole texts",
        curves=WHOLE,
        sweep="Round-trip exact match",
        headline=True,
    ),
    evaluated(
        "l2t/exact_match",
        "ratio",
        "share of texts that come back whole from their latent",
        panel="Whole texts",
        curves=WHOLE,
    ),
    evaluated(
        "t2l2t/bleu",
        "percent",
        "BLEU of the text -> latent -> text round trip",
        panel="BLEU and chrF",
        curves=CHRF,
    ),
    evaluated("l2t/bleu", "percent", "BLEU of texts decoded from their latents", panel="BLEU and chrF", curves=CHRF),
    evaluated("t2l2t/chrf", "percent", "chrF of the round trip", panel="BLEU and chrF", curves=CHRF),
    evaluated("l2t/chrf", "percent", "chrF of texts decoded from their latents", panel="BLEU and chrF", curves=CHRF),
    evaluated(
        "t2l2t/repeats",
        "ratio",
        "share of equal neighbours among the tokens of round trips",
        panel="Repeated tokens",
        curves=WHOLE,
    ),
    evaluated(
        "text/repeats",
        "ratio",
        "share of equal neighbours among the tokens of the true texts",
        panel="Repeated tokens",
        curves=WHOLE,
    ),
    evaluated(
        "t2l2t/distinct_2",
        "ratio",
        "different pairs of neighbours as a share of all pairs, in round trips",
        panel="Repeated tokens",
        curves=WHOLE,
    ),
    evaluated(
        "text/distinct_2",
        "ratio",
        "different pairs of neighbours as a share of all pairs, in the true texts",
        panel="Repeated tokens",
        curves=WHOLE,
    ),
    evaluated(
        "l2t2l/cos",
        "ratio",
        "cosine of the latent predicted from the decoded text to the true one",
        panel="Latent round trip",
        curves=COSINES,
        sweep="Round-trip cosine",
        headline=True,
    ),
    evaluated(
        "l2t2l/retrieval_at_1",
        "ratio",
        "how often the true latent is the nearest of {samples} to the one predicted from the decoded text",
        panel="Retrieval",
        curves=RETRIEVAL,
    ),
    evaluated(
        "l2t2l/retrieval_at_5",
        "ratio",
        "how often it is among the 5 nearest of {samples}",
        panel="Retrieval",
        curves=RETRIEVAL,
    ),
    evaluated(
        "l2t2l/retrieval_at_10",
        "ratio",
        "how often it is among the 10 nearest of {samples}",
        panel="Retrieval",
        curves=RETRIEVAL,
    ),
    evaluated(
        "latent/active_dims",
        "dimensions",
        "directions over which predicted latents vary (participation ratio)",
        panel="Latent directions in use",
        curves=DIRECTIONS,
    ),
    evaluated(
        "latent/active_dims_data",
        "dimensions",
        "directions over which the data's latents vary (participation ratio)",
        panel="Latent directions in use",
        curves=DIRECTIONS,
    ),
    evaluated(
        "pseudo/entropy",
        "nats",
        "entropy of the decoder's distribution, nats per token",
        panel="Cross-entropy",
        curves=CROSS_ENTROPY,
    ),
)
EVALUATION_SIZE = (
    evaluated("samples", "samples", "held-out texts in the evaluation"),
    evaluated("tokens", "tokens", "tokens of these texts"),
    evaluated("step", "steps", "steps done at the last evaluation"),
)

OF_THE_RUN = (
    gauge(
        "loss",
        "nats or squared latent units",
        "Term of the objective before its weight, mean over the log interval and all ranks; term=total is their sum.",
        "term",
    ),
    gauge("loss_weight", "ratio", "Weight of a term as applied.", "term"),
    gauge("loss_weight_target", "ratio", "Weight of a term after its ramp.", "term"),
    gauge("loss_weight_target_step", "steps", "Step at which the ramp of a term's weight ends.", "term"),
    gauge("learning_rate", "1", "Learning rate of the last step.", key="lr", curves="learning rate"),
    *STEP_MEANS,
    gauge("epoch", "epochs", "Epoch of the training data.", key="epoch"),
    gauge("target_steps", "steps", "Steps of the whole run."),
    gauge("progress_ratio", "ratio", "Steps done of the whole run's."),
    gauge(
        "tokens_per_second",
        "tokens per second",
        "Tokens of the log interval over the time of its steps, all ranks together.",
        key="tokens_per_second",
        curves="tokens per second",
    ),
    gauge(
        "model_flops_utilization_ratio",
        "ratio",
        "Operations the model needs, counted per modality, over what the devices could do meanwhile.",
        key="model_flops_utilization",
    ),
    gauge(
        "device_peak_flops",
        "operations per second",
        "What one device can do: monitoring.peak_tflops, known of the GPU, or measured with a matrix product.",
    ),
    counter(
        "model_flops_total", "operations", "Operations the model needed for all steps done, replayed ones included."
    ),
    counter("steps_total", "steps", "Optimizer steps done, replayed ones included, over restarts."),
    counter(
        "replayed_steps_total", "steps", "Steps done again after a restart, since they were not in the checkpoint."
    ),
    counter("tokens_total", "tokens", "Text tokens trained on, over restarts."),
    counter("samples_total", "samples", "Samples trained on, over restarts."),
    counter("unpaired_samples_total", "samples", "Those of them that are a text or a latent alone.", "kind"),
    counter(
        "nonfinite_steps_total",
        "steps",
        "Steps whose update was skipped because the loss or a gradient was not finite.",
        key="nonfinite_steps",
    ),
    counter("restarts_total", "starts", "How often the run was started again."),
    counter(
        "goodput_seconds_total",
        "seconds",
        "Where the time of the run went, over restarts, by the clock of rank 0.",
        "phase",
    ),
    gauge("checkpoint_step", "steps", "Step of the newest checkpoint on disk."),
    gauge(
        "checkpoint_last_success_timestamp_seconds",
        "seconds",
        "When the newest checkpoint on disk was committed, since 1970.",
    ),
    gauge("checkpoint_size_bytes", "bytes", "Size of the newest checkpoint, all ranks' shares."),
    gauge(
        "checkpoint_expected_interval_seconds",
        "seconds",
        "Time between checkpoints that logging.save_freq or save_minutes gives at the present step time.",
    ),
    gauge(
        "config_info",
        "1",
        "The run's configuration in a few words; the value is 1.",
        "loss_type",
        "parameterization",
        "latent_t_mode",
        "implementation",
        "dtype",
        "device",
        "world_size",
    ),
    *EVALUATION,
    *EVALUATION_SIZE,
)
OF_EACH_RANK = (
    gauge("step", "steps", "Steps done.", key="step"),
    Metric(
        "cyclevae_step_duration_seconds",
        "histogram",
        "seconds",
        "Time of a step on the host, the wait for its data included.",
        key="step_seconds",
    ),
    gauge(
        "step_part_seconds",
        "seconds",
        "Mean time per step of a part of it; communication, the gradients' reduction, overlaps with backward.",
        "part",
    ),
    gauge(
        "device_memory_used_bytes",
        "bytes",
        "Memory in use on the GPU; without one, of this process.",
        key="device_memory_used_bytes",
    ),
    gauge(
        "device_memory_limit_bytes",
        "bytes",
        "Memory of the GPU; without one, of the host or its control group.",
        key="device_memory_limit_bytes",
    ),
    gauge(
        "device_memory_peak_bytes",
        "bytes",
        "Most memory that this process had in use: tensors on the GPU; without one, resident.",
        key="device_memory_peak_bytes",
    ),
    gauge(
        "device_utilization_ratio",
        "ratio",
        "Share of the time in which the GPU computed; without one, of the processors' time that this process used.",
        key="device_utilization",
    ),
    counter("checkpoint_saves_total", "saves", "Checkpoints saved since the start of the process."),
    counter(
        "checkpoint_failures_total", "saves", "Checkpoints that could not be saved since the start of the process."
    ),
    gauge("checkpoint_duration_seconds", "seconds", "Time of the last save, from the loop's call to the commit."),
    gauge("checkpoint_stall_seconds", "seconds", "Of which the loop stood still."),
    gauge("checkpoint_share_bytes", "bytes", "Size of this rank's share of the last save."),
    gauge("start_timestamp_seconds", "seconds", "When this process was started, since 1970."),
    gauge("last_step_timestamp_seconds", "seconds", "When the last step ended, since 1970."),
    gauge(
        "last_progress_timestamp_seconds",
        "seconds",
        "When the rank last made progress, in a step, an evaluation or a save, since 1970.",
    ),
    gauge("stall_limit_seconds", "seconds", "Time without progress after which the rank counts as stalled."),
    gauge("build_info", "1", "What runs; the value is 1.", "version", "commit", "torch", "mmdit", "python", "built"),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in (*OF_THE_RUN, *OF_EACH_RANK)}
EVALUATION_BY_KEY: Mapping[str, Metric] = {metric.key: metric for metric in (*EVALUATION, *EVALUATION_SIZE)}
TRAINING_BY_KEY: Mapping[str, Metric] = {
    metric.key: metric for metric in METRICS.values() if metric.key and metric not in EVALUATION_BY_KEY.values()
}

# What the objective reports of a step, in the order of the accumulator's columns.
STEP_METRICS = (*(term.key for term in LOSS_TERMS), *(metric.key for metric in STEP_MEANS))

# Keys of training_log.jsonl of which several share one metric, told apart by a label.
_LABELLED: Mapping[str, Series] = (
    {term.key: ("cyclevae_loss", (term.term,)) for term in LOSS_TERMS}
    | {term.weight_key: ("cyclevae_loss_weight", (term.term,)) for term in LOSS_TERMS}
    | {f"{part}_seconds": ("cyclevae_step_part_seconds", (part,)) for part in STEP_PARTS}
)


def training_series(key: str) -> Series | None:
    """The series of a key of training_log.jsonl; None where a histogram shows it.

    KeyError for a key that is not in the table.
    """
    if key in _LABELLED:
        return _LABELLED[key]
    metric = TRAINING_BY_KEY[key]
    return None if metric.kind == "histogram" else (metric.name, ())


def evaluation_series(key: str) -> Series:
    """The series of a key of evaluation.jsonl. KeyError for a key that is not in the table.

    `t2l/x0_cos@0.9` is cyclevae_eval_t2l_x0_cos{t="0.9"}, and `t2l/x0_cos` the same with t="1".
    """
    plain, _, t = key.partition("@")
    metric = EVALUATION_BY_KEY[plain]
    return metric.name, ((t or "1",) if metric.labels else ())


def at_timesteps(key: str, values: Mapping[str, float]) -> dict[str, float]:
    """The values of an evaluation's metric at the latent timesteps besides 1, by timestep: of `<key>@0.9` as "0.9"."""
    return {name.partition("@")[2]: value for name, value in values.items() if name.startswith(f"{key}@")}
