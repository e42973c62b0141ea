"""Prometheus' recording rules and alerts, with what to do about each alert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from job.metric_names import LOSS_TERMS
from job.monitoring.evaluation_table import IGNORED_LATENT_GAIN, IGNORED_TEXT_GAIN

MINUTE, HOUR = 60.0, 3600.0
# Gains are near zero at the start of every run: what they say counts only when a quarter of it is over.
PROGRESSED = "max by (run) (cyclevae_progress_ratio) > 0.25"


@dataclass(frozen=True)
class Alert:
    """Fires when `signal condition` holds for `hold` seconds.

    The signal alone has a value as long as a run is healthy, too: so a test can see that it asks for something that
    exists, where an alert that never fires would look like one that is misspelt.
    """

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
    """What several panels and alerts ask for: expressions by the name they are recorded under.

    A job that is started again has another job_id, instance and node. The `max by (run)` drops these labels, so that
    a mean over time goes on over a restart.
    """
    window, hour = d(5 * MINUTE), d(HOUR)
    step_seconds = "cyclevae_step_duration_seconds"
    data_wait = f'avg_over_time(cyclevae_step_part_seconds{{part="data_wait"}}[{window}])'
    forward = f'avg_over_time(cyclevae_step_part_seconds{{part="forward"}}[{window}])'
    productive = f'increase(cyclevae_goodput_seconds_total{{phase="productive"}}[{hour}])'
    # A run that was just started again has an old checkpoint, whose age says nothing: its own start counts as one.
    saved_or_started = "cyclevae_checkpoint_last_success_timestamp_seconds|cyclevae_start_timestamp_seconds"
    return {
        "cyclevae:loss:mean5m": f"max by (run, term) (avg_over_time(cyclevae_loss[{window}]))",
        "cyclevae:tokens_per_second:mean5m": f"max by (run) (avg_over_time(cyclevae_tokens_per_second[{window}]))",
        "cyclevae:step_seconds:mean5m": f"sum by (run, rank) (rate({step_seconds}_sum[{window}]))"
        f" / sum by (run, rank) (rate({step_seconds}_count[{window}]))",
        "cyclevae:data_wait:ratio5m": f"max by (run, rank) ({data_wait}) / cyclevae:step_seconds:mean5m",
        "cyclevae:forward_skew:ratio5m": f"max by (run) ({forward}) / avg by (run) ({forward})",
        "cyclevae:device_memory:ratio": "max by (run, rank) "
        "(cyclevae_device_memory_used_bytes / cyclevae_device_memory_limit_bytes)",
        "cyclevae:goodput:ratio1h": f"sum by (run) ({productive})"
        f" / sum by (run) (increase(cyclevae_goodput_seconds_total[{hour}]))",
        "cyclevae:checkpoint_age_seconds": f'time() - max by (run) ({{__name__=~"{saved_or_started}"}})',
    }


def alerts(d: Durations) -> list[Alert]:
    """Every alert."""
    return [*liveness(d), *checkpoints(d), *losses(d), *gains(d), *ramps(d), *machine(d)]


def liveness(d: Durations) -> list[Alert]:
    """Runs that stand still or are gone."""
    return [
        Alert(
            name="CyclevaeRunStalled",
            signal="time() - cyclevae_last_progress_timestamp_seconds - cyclevae_stall_limit_seconds",
            condition="> 0 and on (run, rank) cyclevae_last_step_timestamp_seconds",
            hold=15,
            severity="critical",
            summary="Run {{ $labels.run }}, rank {{ $labels.rank }}: no step, evaluation or save for too long",
            runbook="A rank waits for another one. Look which ranks are gone or made no progress for longest "
            "(`cyclevae_last_progress_timestamp_seconds`); after training.sick_rank_timeout_seconds the run "
            "ends by itself and names the rank in its output. Then look at that node: its processes, GPU errors"
            " (`dmesg`, `nvidia-smi`), network.",
        ),
        Alert(
            name="CyclevaeTargetGone",
            signal='up{job="cyclevae"}',
            condition="== 0",
            hold=MINUTE,
            severity="critical",
            summary="Run {{ $labels.run }}, rank {{ $labels.rank }} ({{ $labels.instance }}) "
            "does not answer Prometheus",
            runbook="The process died, is stopped or its node is away. Look at the job in the scheduler (`squeue -j "
            "JOB_ID`, `kubectl get pods`) and at the end of its output. If the job is over, it was killed: "
            "start the run again, it goes on from its checkpoint; or delete the file that announces it in "
            "monitoring.targets_dir.",
        ),
        Alert(
            name="CyclevaeRunEndedEarly",
            signal=f"max by (run) (max_over_time(cyclevae_progress_ratio[{d(30 * MINUTE)}]))",
            condition="< 1 unless on (run) max by (run) (cyclevae_progress_ratio)",
            hold=MINUTE,
            severity="warning",
            summary="Run {{ $labels.run }} is gone before its last step",
            runbook="It stopped or failed and has not been started again. Read the last lines of its output and its "
            "exit code: 143 stopped with a checkpoint, 134 worth a retry, 1 needs a person. The same command "
            "goes on from the checkpoint.",
        ),
    ]


def checkpoints(d: Durations) -> list[Alert]:
    """Runs that cannot save."""
    return [
        Alert(
            name="CyclevaeCheckpointTooOld",
            signal="cyclevae:checkpoint_age_seconds",
            condition="> 3 * max by (run) (cyclevae_checkpoint_expected_interval_seconds) + 60",
            hold=MINUTE,
            severity="warning",
            summary="Run {{ $labels.run }}: the newest checkpoint is {{ $value | humanizeDuration }} old",
            runbook="Saves fail, hang or take longer than the time between them. Compare "
            "`cyclevae_checkpoint_duration_seconds` with logging.save_freq; look for `warning: checkpoint` in "
            "the output and at the file system.",
        ),
        Alert(
            name="CyclevaeCheckpointFailing",
            signal=f"max by (run) (increase(cyclevae_checkpoint_failures_total[{d(15 * MINUTE)}]))",
            condition="> 0",
            hold=0,
            severity="critical",
            summary="Run {{ $labels.run }}: checkpoints cannot be written",
            runbook="The output names the rank and the reason: usually a full disk or quota (`df`, `quota`), or "
            "permissions. The run goes on and tries again at the next save; free space below RUN/checkpoints, "
            "or lower logging.keep_last.",
        ),
    ]


def losses(d: Durations) -> list[Alert]:
    """Runs whose loss is sick."""
    # Neither the total, which grows when a cycle term sets in, nor terms whose weight still grows: they may rise in a
    # healthy run.
    steady_terms = "|".join(term.term for term in LOSS_TERMS if term.modes and not term.ramp)
    loss = f'cyclevae:loss:mean5m{{term=~"{steady_terms}"}}'
    return [
        Alert(
            name="CyclevaeNonfiniteSteps",
            signal=f"max by (run) (increase(cyclevae_nonfinite_steps_total[{d(10 * MINUTE)}]))",
            condition="> 0",
            hold=0,
            severity="warning",
            summary="Run {{ $labels.run }}: steps were skipped because the loss or a gradient was not finite",
            runbook="A few at the start of bf16 training are harmless. If they go on, the run ends after "
            "training.max_nonfinite_steps in a row and names the term, the parameter and the samples: look at "
            "these samples and at the gradient norm before; lower optimizer.lr or optimizer.grad_clip_norm.",
        ),
        Alert(
            name="CyclevaeLossDiverging",
            signal=loss,
            condition=f"> 1.5 * min_over_time({loss}[{d(6 * HOUR)}]) + 0.1",
            hold=5 * MINUTE,
            severity="warning",
            summary="Run {{ $labels.run }}: {{ $labels.term }} is at {{ $value }}, far above its best",
            runbook="Look at gradient norm and learning rate at the moment it turned. Go back to a checkpoint from "
            "before (logging.keep_every) with a lower optimizer.lr; if it turned when a cycle term set in, "
            "lower that term's weight or lengthen its ramp.",
        ),
    ]


def gains(d: Durations) -> list[Alert]:
    """Runs one of whose directions ignores its input."""
    text_gain = "max by (run) (cyclevae_eval_t2l_text_gain)"
    error = 'max by (run) (cyclevae_eval_t2l_x0_mse{t="1"})'
    return [
        Alert(
            name="CyclevaeLatentGainCollapsed",
            signal="max by (run) (cyclevae_eval_l2t_latent_gain)",
            condition=f"< {IGNORED_LATENT_GAIN} and on (run) {PROGRESSED}",
            hold=10 * MINUTE,
            severity="warning",
            summary="Run {{ $labels.run }}: the decoder ignores the latent (gain {{ $value }} nats per token)",
            runbook="Any other latent serves the decoder as well. Check that latents and texts belong together (`python"
            " -m job.prepare` of a few samples), that latents are standardized, and that the text loss is not "
            "stuck at the unigram entropy; compare `cyclevae_eval_latent_active_dims` with the data's.",
        ),
        Alert(
            name="CyclevaeTextGainCollapsed",
            signal=f"{text_gain} / ({text_gain} + {error})",
            condition=f"< {IGNORED_TEXT_GAIN} and on (run) {PROGRESSED}",
            hold=10 * MINUTE,
            severity="warning",
            summary="Run {{ $labels.run }}: the encoder ignores the text "
            "({{ $value | humanizePercentage }} of the error)",
            runbook="Any other text gives the same latent. Look at model.latent_parameterization: epsilon with "
            "loss.latent_t_mode=full is degenerate. Raise loss.latent_loss_weight if the latent loss does not "
            "fall.",
        ),
    ]


def ramps(d: Durations) -> list[Alert]:
    """Runs in which a term of the loss has not come to its weight."""
    terms = "|".join(term.term for term in LOSS_TERMS if term.ramp)
    weight = f'max by (run, term) (cyclevae_loss_weight{{term=~"{terms}"}})'
    target = f'max by (run, term) (cyclevae_loss_weight_target{{term=~"{terms}"}} > 0)'
    ramp_end = "max by (run, term) (cyclevae_loss_weight_target_step)"
    return [
        Alert(
            name="CyclevaeCycleWeightNotRamping",
            signal=f"{weight} / {target}",
            condition=f"< 0.99 and on (run, term) {ramp_end} < on (run) group_left () max by (run) (cyclevae_step)",
            hold=MINUTE,
            severity="warning",
            summary="Run {{ $labels.run }}: {{ $labels.term }} has not come to its weight",
            runbook="The ramp is over, but the weight as applied is below loss.cycle_*_weight. Compare config.yaml of "
            "the run with the command it was started by: the ramp counts optimizer steps from the start of the "
            "run.",
        ),
    ]


def machine(d: Durations) -> list[Alert]:
    """Runs that are slower than they need to be, or soon out of memory."""
    speed = "cyclevae:tokens_per_second:mean5m"
    return [
        Alert(
            name="CyclevaeThroughputDrop",
            signal=f"{speed} / avg_over_time({speed}[{d(HOUR)}])",
            condition="< 0.7",
            hold=5 * MINUTE,
            severity="warning",
            summary="Run {{ $labels.run }}: {{ $value | humanizePercentage }} of the throughput of its last hour",
            runbook="Look at the parts of the step: data_wait grew: the file system; forward or backward on one rank: "
            "that GPU's clocks and temperature (`nvidia-smi -q -d PERFORMANCE`); communication: the network.",
        ),
        Alert(
            name="CyclevaeRankSkew",
            signal="cyclevae:forward_skew:ratio5m",
            condition="> 1.5",
            hold=10 * MINUTE,
            severity="warning",
            summary="Run {{ $labels.run }}: the slowest rank needs {{ $value }} times the mean time "
            "for its forward pass",
            runbook="All ranks wait for the slowest. Find it in the panel of parts by rank; look at its node for other "
            "processes, throttling, a wrong number of CPU threads. Unequal text lengths: set "
            "data.length_bucketing.",
        ),
        Alert(
            name="CyclevaeDataStarvation",
            signal="cyclevae:data_wait:ratio5m",
            condition="> 0.2",
            hold=10 * MINUTE,
            severity="warning",
            summary="Run {{ $labels.run }}, rank {{ $labels.rank }}: {{ $value | humanizePercentage }} "
            "of the step waits for data",
            runbook="Raise data.num_workers, move data.dir to a faster or local disk.",
        ),
        Alert(
            name="CyclevaeDeviceMemoryNearFull",
            signal="cyclevae:device_memory:ratio",
            condition="> 0.95",
            hold=5 * MINUTE,
            severity="warning",
            summary="Run {{ $labels.run }}, rank {{ $labels.rank }}: {{ $value | humanizePercentage }} "
            "of the device's memory in use",
            runbook="A longer batch may end the run. Lower training.train_batch_size and set training.global_batch_size"
            " to keep the batch, or set training.activation_checkpointing=true. On CPUs: other processes on the"
            " host, data.num_workers.",
        ),
    ]


def rule_file(speed: float = 1.0) -> dict[str, Any]:
    """Prometheus' rule file; a test runs it `speed` times faster."""
    d = Durations(speed)
    groups = {
        "cyclevae-recordings": [{"record": name, "expr": expression} for name, expression in recordings(d).items()],
        "cyclevae-alerts": [alert_rule(alert, d) for alert in alerts(d)],
    }
    return {"groups": [{"name": name, "interval": d(30), "rules": rules} for name, rules in groups.items()]}


def alert_rule(alert: Alert, d: Durations) -> dict[str, Any]:
    """An alert as it stands in the rule file."""
    rule: dict[str, Any] = {"alert": alert.name, "expr": f"{alert.signal} {alert.condition}"}
    if alert.hold:
        rule["for"] = d(alert.hold)
    rule["labels"] = {"severity": alert.severity}
    rule["annotations"] = {"summary": alert.summary, "runbook": alert.runbook}
    return rule


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
