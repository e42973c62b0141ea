"""What a run does at its pauses and at its end: it measures itself on held-out text, and shows what it came to."""

from __future__ import annotations

from job.assembly import Job, for_evaluation
from job.data.loader import evaluation_batches
from job.errors import UserError
from job.files import json_lines, write_json
from job.monitoring.curves import write_curves
from job.monitoring.evaluation_table import headline, table
from job.monitoring.progress import Progress
from job.objective.evaluation import evaluate
from job.runtime import distributed
from job.sample import round_trips, write_samples


class Stopped(Exception):
    """A stop was agreed in the middle of an evaluation."""


def evaluate_if_due(job: Job, done: int, progress: Progress) -> str | None:
    """Evaluate after `done` steps when it is time and not done yet. Returns why to stop, when a stop came in between."""
    c = job.config
    if job.evaluated == done or not (
        done == c.training.num_train_steps or (c.logging.eval_freq and done % c.logging.eval_freq == 0)
    ):
        return None
    batches = evaluation_batches(
        job.validation_data,
        num_samples=c.logging.num_eval_batches * c.training.eval_batch_size,
        batch_size=c.training.eval_batch_size,
        rank=job.process.rank,
        world_size=job.process.world_size,
        max_seq_len=c.model.max_seq_len,
        pad_to_max=c.data.pad_to_max,
        standardize=c.data.standardize_latents,
    )
    on_device = ({name: tensor.to(job.process.device) for name, tensor in batch.items()} for batch in batches)

    def between() -> None:
        job.watchdog.beat(done, "evaluating")
        reason = job.signals.agreed(distributed.agree_max, c.training.max_minutes)
        if reason:
            raise Stopped(reason)

    try:
        with job.phases("evaluate"), for_evaluation(job) as trainer:
            job.metrics = evaluate(trainer, on_device, c.training.seed, distributed.gather, between)
    except Stopped as stop:
        return str(stop)
    job.evaluated = done
    job.reporter.evaluation(done, job.metrics)
    progress.say(f"evaluation at step {done}  {headline(job.metrics)}")
    return None


def last_evaluation(job: Job, step: int) -> dict[str, float]:
    """The metrics of an evaluation after `step` steps that the run already made; empty when there is none."""
    lines = json_lines(job.run_dir / "evaluation.jsonl")
    return next((line for line in lines if line["step"] == step), {})


def finish(job: Job) -> None:
    """The files and the table that show what the run came to. result.json, written last, marks it finished."""
    c = job.config
    if not job.checkpointer.wait():
        raise UserError(
            f"{job.run_dir}/checkpoints: the last checkpoint could not be written; free space there and run the same command again"
        )
    with for_evaluation(job) as trainer:
        trips = round_trips(trainer, job.validation_data, c, c.logging.num_samples) if job.process.is_main else []
    if not job.process.is_main:
        return
    write_samples(job.run_dir / "samples.txt", trips)
    write_curves(job.run_dir)
    write_json(job.run_dir / "result.json", {"step": c.training.num_train_steps, **job.metrics}, indent=2)
    print(f"\n{table(job.metrics)}\n\n{(job.run_dir / 'samples.txt').read_text()}\nfinished: {job.run_dir}")
