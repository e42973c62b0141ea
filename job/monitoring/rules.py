"""Prometheus' recording rules and alerts, with what to do about each alert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MINUTE, HOUR = 60.0, 3600.0
PROGRESSED = "max by (run) (cyclevae_progress_ratio) > 0.25"


@dataclass(frozen=True)
class Alert:
    """Fires when `signal condition` holds for `hold` seconds. The signal alone has a value as long as a run is healthy, too."""

    name: str
    signal: str
    condition: str
    hold: float
    severity: str
    summary: str
    runbook: str


class Durations:
    """Writes durations for Prometheus, `speed` times shorter than they say: a test cannot wait for an hour."""

    def __init__(self, speed: float) -> None:
        self.speed = speed

    def __call__(self, seconds: float) -> str:
        milliseconds = max(1, round(1000 * seconds / self.speed))
        for unit, size in (("h", 3_600_000), ("m", 60_000), ("s", 1000)):
            if milliseconds % size == 0:
                return f"{milliseconds // size}{unit}"
        return f"{milliseconds}ms"


def recordings(d: Durations) -> dict[str, str]:
    """Expressions by the name they are recorded under; what several panels and alerts ask for, free of the labels that a restart changes."""
    window = d(5 * MINUTE)
    return {
        "cyclevae:loss:mean5m": f"max by (run, term) (avg_over_time(cyclevae_loss[{window}]))",
        "cyclevae:tokens_per_second:mean5m": f"max by (run) (avg_over_time(cyclevae_tokens_per_second[{window}]))",
        "cyclevae:step_seconds:mean5m": f"sum by (run, rank) (rate(cyclevae_step_duration_seconds_sum[{window}])) / "
        f"sum by (run, rank) (rate(cyclevae_step_duration_seconds_count[{window}]))",
        "cyclevae:data_wait:ratio5m": f'max by (run, rank) (avg_over_time(cyclevae_step_part_seconds{{part="data_wait"}}[{window}])) '
        "/ cyclevae:step_seconds:mean5m",
        "cyclevae:forward_skew:ratio5m": f'max by (run) (avg_over_time(cyclevae_step_part_seconds{{part="forward"}}[{window}])) / '
        f'avg by (run) (avg_over_time(cyclevae_step_part_seconds{{part="forward"}}[{window}]))',
        "cyclevae:device_memory:ratio": "max by (run, rank) (cyclevae_device_memory_used_bytes / cyclevae_device_memory_limit_bytes)",
        "cyclevae:goodput:ratio1h": f'sum by (run) (increase(cyclevae_goodput_seconds_total{{phase="productive"}}[{d(HOUR)}])) / '
        f"sum by (run) (increase(cyclevae_goodput_seconds_total[{d(HOUR)}]))",
        "cyclevae:checkpoint_age_seconds": 'time() - max by (run) ({__name__=~"cyclevae_checkpoint_last_success_timestamp_seconds|'
        'cyclevae_start_timestamp_seconds"})',
    }


def alerts(d: Durations) -> list[Alert]:
    """Every alert."""
    return [*liveness(d), *learning(d), *machine(d)]


def liveness(d: Durations) -> list[Alert]:
    """Runs that stand still, are gone, or cannot save."""
    return [
        Alert(
            "CyclevaeRunStalled",
            "time() - cyclevae_last_progress_timestamp_seconds - cyclevae_stall_limit_seconds",
            "> 0 and on (run, rank) cyclevae_last_step_timestamp_seconds",
            15,
            "critical",
            "Run {{ $labels.run }}, rank {{ $labels.rank }}: no step, evaluation or save for too long",
            "A rank waits for another one. Look which ranks are gone or last came forward earliest (`cyclevae_last_progress_timestamp_seconds`); after "
            "training.sick_rank_timeout_seconds the run ends by itself and names the rank in its output. Then look at that node: its processes, GPU "
            "errors (`dmesg`, `nvidia-smi`), network.",
        ),
        Alert(
            "CyclevaeTargetGone",
            'up{job="cyclevae"}',
            "== 0",
            MINUTE,
            "critical",
            "Run {{ $labels.run }}, rank {{ $labels.rank }} ({{ $labels.instance }}) does not answer Prometheus",
            "The process died, is stopped or its node is away. Look at the job in the scheduler (`squeue -j JOB_ID`, `kubectl get pods`) and at the end "
            "of its output. If the job is over, it was killed: start the run again, it goes on from its checkpoint; or delete the file that announces it "
            "in monitoring.targets_dir.",
        ),
        Alert(
            "CyclevaeRunEndedEarly",
            f"max by (run) (max_over_time(cyclevae_progress_ratio[{d(30 * MINUTE)}]))",
            "< 1 unless on (run) max by (run) (cyclevae_progress_ratio)",
            MINUTE,
            "warning",
            "Run {{ $labels.run }} is gone before its last step",
            "It stopped or failed and has not been started again. Read the last lines of its output and its exit code: 143 stopped with a checkpoint, "
            "134 worth a retry, 1 needs a person. The same command goes on from the checkpoint.",
        ),
        Alert(
            "CyclevaeCheckpointTooOld",
            "cyclevae:checkpoint_age_seconds",
            "> 3 * max by (run) (cyclevae_checkpoint_expected_interval_seconds) + 60",
            MINUTE,
            "warning",
            "Run {{ $labels.run }}: the newest checkpoint is {{ $value | humanizeDuration }} old",
            "Saves fail, hang or take longer than the time between them. Compare `cyclevae_checkpoint_duration_seconds` with logging.save_freq; look for "
            "`warning: checkpoint` in the output and at the file system.",
        ),
        Alert(
            "CyclevaeCheckpointFailing",
            f"max by (run) (increase(cyclevae_checkpoint_failures_total[{d(15 * MINUTE)}]))",
            "> 0",
            0,
            "critical",
            "Run {{ $labels.run }}: checkpoints cannot be written",
            "The output names the rank and the reason: usually a full disk or quota (`df`, `quota`), or permissions. The run goes on and tries again at the "
            "next save; free space below RUN/checkpoints, or lower logging.keep_last.",
        ),
    ]


def learning(d: Durations) -> list[Alert]:
    """Runs whose objective is sick."""
    base = 'cyclevae:loss:mean5m{term=~"base_.+|text|latent"}'
    return [
        Alert(
            "CyclevaeNonfiniteSteps",
            f"max by (run) (increase(cyclevae_nonfinite_steps_total[{d(10 * MINUTE)}]))",
            "> 0",
            0,
            "warning",
            "Run {{ $labels.run }}: steps were skipped because the loss or a gradient was not finite",
            "A few at the start of bf16 training are harmless. If they go on, the run ends after training.max_nonfinite_steps in a row and names the term, "
            "the parameter and the samples: look at these samples and at the gradient norm before; lower optimizer.lr or optimizer.grad_clip_norm.",
        ),
        Alert(
            "CyclevaeLossDiverging",
            base,
            f"> 1.5 * min_over_time({base}[{d(6 * HOUR)}]) + 0.1",
            5 * MINUTE,
            "warning",
            "Run {{ $labels.run }}: {{ $labels.term }} is at {{ $value }}, far above its best",
            "Look at gradient norm and learning rate at the moment it turned. Go back to a checkpoint from before (logging.keep_every) with a lower "
            "optimizer.lr; if it turned when a cycle term set in, lower that term's weight or lengthen its ramp.",
        ),
        Alert(
            "CyclevaeLatentGainCollapsed",
            "max by (run) (cyclevae_eval_l2t_latent_gain)",
            f"< 0.05 and on (run) {PROGRESSED}",
            10 * MINUTE,
            "warning",
            "Run {{ $labels.run }}: the decoder ignores the latent (gain {{ $value }} nats per token)",
            "Any other latent serves the decoder as well. Check that latents and texts belong together (`python -m job.prepare` of a few samples), that "
            "latents are standardized, and that the text loss is not stuck at the unigram entropy; compare `cyclevae_eval_latent_active_dims` with the "
            "data's.",
        ),
        Alert(
            "CyclevaeTextGainCollapsed",
            'max by (run) (cyclevae_eval_t2l_text_gain) / (max by (run) (cyclevae_eval_t2l_text_gain) + max by (run) (cyclevae_eval_t2l_x0_mse{t="1"}))',
            f"< 0.02 and on (run) {PROGRESSED}",
            10 * MINUTE,
            "warning",
            "Run {{ $labels.run }}: the encoder ignores the text ({{ $value | humanizePercentage }} of the error)",
            "Any other text gives the same latent. Look at model.latent_parameterization: epsilon with loss.latent_t_mode=full is degenerate. Raise "
            "loss.latent_loss_weight if the latent loss does not fall.",
        ),
        Alert(
            "CyclevaeCycleWeightNotRamping",
            'max by (run, term) (cyclevae_loss_weight{term=~"cycle_.+"}) / max by (run, term) (cyclevae_loss_weight_target{term=~"cycle_.+"} > 0)',
            "< 0.99 and on (run, term) max by (run, term) (cyclevae_loss_weight_target_step) < on (run) group_left () max by (run) (cyclevae_step)",
            MINUTE,
            "warning",
            "Run {{ $labels.run }}: {{ $labels.term }} has not come to its weight",
            "The ramp is over, but the weight as applied is below loss.cycle_*_weight. Compare config.yaml of the run with the command it was started by: "
            "the ramp counts optimizer steps from the start of the run.",
        ),
    ]


def machine(d: Durations) -> list[Alert]:
    """Runs that are slower than they need to be, or soon out of memory."""
    speed = "cyclevae:tokens_per_second:mean5m"
    return [
        Alert(
            "CyclevaeThroughputDrop",
            f"{speed} / avg_over_time({speed}[{d(HOUR)}])",
            "< 0.7",
            5 * MINUTE,
            "warning",
            "Run {{ $labels.run }}: {{ $value | humanizePercentage }} of the throughput of its last hour",
            "Look at the parts of the step: data_wait grew: the file system; forward or backward on one rank: that GPU's clocks and temperature "
            "(`nvidia-smi -q -d PERFORMANCE`); communication: the network.",
        ),
        Alert(
            "CyclevaeRankSkew",
            "cyclevae:forward_skew:ratio5m",
            "> 1.5",
            10 * MINUTE,
            "warning",
            "Run {{ $labels.run }}: the slowest rank needs {{ $value }} times the mean time for its forward pass",
            "All ranks wait for the slowest. Find it in the panel of parts by rank; look at its node for other processes, throttling, a wrong number of CPU "
            "threads. Unequal text lengths: set data.length_bucketing.",
        ),
        Alert(
            "CyclevaeDataStarvation",
            "cyclevae:data_wait:ratio5m",
            "> 0.2",
            10 * MINUTE,
            "warning",
            "Run {{ $labels.run }}, rank {{ $labels.rank }}: {{ $value | humanizePercentage }} of the step waits for data",
            "Raise data.num_workers, move data.dir to a faster or local disk.",
        ),
        Alert(
            "CyclevaeDeviceMemoryNearFull",
            "cyclevae:device_memory:ratio",
            "> 0.95",
            5 * MINUTE,
            "warning",
            "Run {{ $labels.run }}, rank {{ $labels.rank }}: {{ $value | humanizePercentage }} of the device's memory in use",
            "A longer batch may end the run. Lower training.train_batch_size and set training.global_batch_size to keep the batch, or set "
            "training.activation_checkpointing=true. On CPUs: other processes on the host, data.num_workers.",
        ),
    ]


def rule_file(speed: float = 1.0) -> dict[str, Any]:
    """Prometheus' rule file; a test runs it `speed` times faster."""
    d = Durations(speed)
    interval = d(30)
    return {
        "groups": [
            {
                "name": "cyclevae-recordings",
                "interval": interval,
                "rules": [{"record": name, "expr": expression} for name, expression in recordings(d).items()],
            },
            {
                "name": "cyclevae-alerts",
                "interval": interval,
                "rules": [
                    {
                        "alert": alert.name,
                        "expr": f"{alert.signal} {alert.condition}",
                        **({"for": d(alert.hold)} if alert.hold else {}),
                        "labels": {"severity": alert.severity},
                        "annotations": {"summary": alert.summary, "runbook": alert.runbook},
                    }
                    for alert in alerts(d)
                ],
            },
        ]
    }


def runbook() -> str:
    """What to do about each alert, as Markdown."""
    parts = ["# Runbook", "What each alert means and where to look."]
    for alert in alerts(Durations(1)):
        hold = f", for {Durations(1)(alert.hold)}" if alert.hold else ""
        parts += [
            f"## {alert.name}",
            f"Fires ({alert.severity}) when `{alert.signal} {alert.condition}`{hold}.",
            alert.runbook,
        ]
    return "\n\n".join(parts) + "\n"
