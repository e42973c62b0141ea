"""Every metric a run exports: name, type, unit, labels and meaning, and which number of the logs it is.

All carry the labels run and rank. Metrics of the run come from rank 0 alone, metrics of a rank from each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Series = tuple[str, tuple[str, ...]]  # name of the metric, values of its own labels
PHASES = ("productive", "replayed", "waiting_for_data", "checkpointing", "evaluating", "starting")
PARTS = ("data_wait", "forward", "backward", "optimizer", "communication")
STEP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True)
class Metric:
    """A metric; `unit` is of its values."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    unit: str
    help: str
    labels: tuple[str, ...] = ()


def gauge(name: str, unit: str, help: str, *labels: str) -> Metric:
    return Metric(f"cyclevae_{name}", "gauge", unit, help, labels)


def counter(name: str, unit: str, help: str, *labels: str) -> Metric:
    return Metric(f"cyclevae_{name}", "counter", unit, help, labels)


EVALUATION = (
    gauge("eval_l2t_ce", "nats", "Cross-entropy per token of held-out text decoded from its latent."),
    gauge("eval_l2t_token_acc", "ratio", "Share of these tokens decoded right."),
    gauge(
        "eval_l2t_latent_gain",
        "nats",
        "What the right latent saves the decoder per token against another text's latent.",
    ),
    gauge(
        "eval_t2l_x0_cos",
        "ratio",
        "Cosine of the latent predicted from the text to the true one, by latent timestep.",
        "t",
    ),
    gauge(
        "eval_t2l_x0_mse",
        "squared latent units",
        "Mean squared error of the predicted latent, by latent timestep.",
        "t",
    ),
    gauge(
        "eval_t2l_x0_norm_ratio",
        "ratio",
        "Length of the predicted latent against the true one's, by latent timestep.",
        "t",
    ),
    gauge(
        "eval_t2l_text_gain",
        "squared latent units",
        "What the right text saves in mean squared error against another text.",
    ),
    gauge("eval_t2l2t_ce", "nats", "Cross-entropy per token of the text decoded from the latent predicted from it."),
    gauge("eval_t2l2t_token_acc", "ratio", "Share of tokens right after text to latent to text."),
    gauge("eval_l2t2l_cos", "ratio", "Cosine of the latent predicted from the decoded text to the true one."),
    gauge("eval_l2t2l_retrieval_at_1", "ratio", "How often the true latent is the nearest of all to that one."),
    gauge(
        "eval_latent_active_dims", "dimensions", "Directions over which predicted latents vary (participation ratio)."
    ),
    gauge(
        "eval_latent_active_dims_data",
        "dimensions",
        "Directions over which the data's latents vary (participation ratio).",
    ),
    gauge("eval_pseudo_entropy", "nats", "Entropy per token of the decoder's distribution."),
    gauge(
        "eval_text_most_frequent_token_acc", "ratio", "Share of tokens right for always guessing the most frequent one."
    ),
    gauge("eval_samples", "samples", "Held-out texts in the evaluation."),
    gauge("eval_tokens", "tokens", "Tokens of these texts."),
    gauge("eval_step", "steps", "Steps done at the last evaluation."),
)
RUN = (
    gauge(
        "loss",
        "nats or squared latent units",
        "Term of the objective before its weight, mean over the log interval and all ranks; term=total is their sum.",
        "term",
    ),
    gauge("loss_weight", "ratio", "Weight of a term as applied.", "term"),
    gauge("loss_weight_target", "ratio", "Weight of a term after its ramp.", "term"),
    gauge("loss_weight_target_step", "steps", "Step at which the ramp of a term's weight ends.", "term"),
    gauge("learning_rate", "1", "Learning rate of the last step."),
    gauge("grad_norm", "1", "Gradient norm before clipping, mean over the log interval."),
    gauge("latent_timestep_mean", "ratio", "Mean latent timestep that T2L trained at."),
    gauge("latent_pred_norm", "latent units", "Mean length of what the latent head predicts."),
    gauge("x0_pred_norm", "latent units", "Mean length of the latent that follows from it."),
    gauge("epoch", "epochs", "Epoch of the training data."),
    gauge("target_steps", "steps", "Steps of the whole run."),
    gauge("progress_ratio", "ratio", "Steps done of the whole run's."),
    gauge(
        "tokens_per_second",
        "tokens per second",
        "Tokens of the log interval over the time of its steps, all ranks together.",
    ),
    gauge(
        "model_flops_utilization_ratio",
        "ratio",
        "Operations the model needs, counted per modality, over what the devices could do meanwhile.",
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
    counter(
        "nonfinite_steps_total",
        "steps",
        "Steps whose update was skipped because the loss or a gradient was not finite.",
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
)
RANK = (
    gauge("step", "steps", "Steps done."),
    Metric(
        "cyclevae_step_duration_seconds",
        "histogram",
        "seconds",
        "Time of a step on the host, the wait for its data included.",
    ),
    gauge(
        "step_part_seconds",
        "seconds",
        "Mean time per step of a part of it; communication, the gradients' reduction, overlaps with backward.",
        "part",
    ),
    gauge("device_memory_used_bytes", "bytes", "Memory in use on the GPU; without one, of this process."),
    gauge("device_memory_limit_bytes", "bytes", "Memory of the GPU; without one, of the host or its control group."),
    gauge(
        "device_memory_peak_bytes",
        "bytes",
        "Most memory that this process had in use: tensors on the GPU; without one, resident.",
    ),
    gauge(
        "device_utilization_ratio",
        "ratio",
        "Share of the time in which the GPU computed; without one, of the processors' time that this process used.",
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
        "When the rank last came forward, in a step, an evaluation or a save, since 1970.",
    ),
    gauge("stall_limit_seconds", "seconds", "Time without progress after which the rank counts as stalled."),
    gauge("build_info", "1", "What runs; the value is 1.", "version", "commit", "torch", "mmdit", "python", "built"),
)
RANK_NAMES = frozenset(metric.name for metric in RANK)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in (*RUN, *RANK)}

TERMS = {
    "total": "loss",
    "base_l2t_text": "base_l2t_text_loss",
    "base_t2l_latent": "base_t2l_latent_loss",
    "cycle_text": "cycle_text_loss",
    "cycle_latent": "cycle_latent_loss",
    "text": "text_loss",
    "latent": "latent_loss",
}
_TRAINING: dict[str, Series] = {
    **{key: ("cyclevae_loss", (term,)) for term, key in TERMS.items()},
    **{f"{term}_weight": ("cyclevae_loss_weight", (term,)) for term in TERMS},
    **{f"{part}_seconds": ("cyclevae_step_part_seconds", (part,)) for part in PARTS},
    **{
        key: (f"cyclevae_{key}", ())
        for key in (
            "step",
            "epoch",
            "grad_norm",
            "latent_pred_norm",
            "x0_pred_norm",
            "tokens_per_second",
            "device_memory_used_bytes",
            "device_memory_limit_bytes",
            "device_memory_peak_bytes",
        )
    },
    "lr": ("cyclevae_learning_rate", ()),
    "t_lat_mean": ("cyclevae_latent_timestep_mean", ()),
    "nonfinite_steps": ("cyclevae_nonfinite_steps_total", ()),
    "model_flops_utilization": ("cyclevae_model_flops_utilization_ratio", ()),
    "device_utilization": ("cyclevae_device_utilization_ratio", ()),
}
NOT_EXPORTED = {"step_seconds"}  # the histogram has it


def training_series(key: str) -> Series | None:
    """The series of a key of training_log.jsonl; None for one that is exported otherwise. KeyError for one that has none."""
    return None if key in NOT_EXPORTED else _TRAINING[key]


def evaluation_series(key: str) -> Series:
    """The series of a key of evaluation.jsonl: `t2l/x0_cos@0.9` is cyclevae_eval_t2l_x0_cos{t="0.9"}. KeyError for one that has none."""
    name, _, t = key.partition("@")
    metric = METRICS[f"cyclevae_eval_{name.replace('/', '_')}"]
    return metric.name, ((t or "1",) if metric.labels else ())
