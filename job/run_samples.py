"""Round trips of the same few held-out texts while a run trains: samples.jsonl, and one of them in the progress output.

Their draws depend on training.seed and the text's number alone. So what changes from line to line is the model, and
making them changes nothing of the training, whose own draws are functions of the seed and the step.
"""

from __future__ import annotations

from job.monitoring.progress import Progress
from job.round_trips import RoundTrip, as_paragraphs, round_trips
from job.training_run import TrainingRun, for_evaluation

SHOWN_WIDTH = 200  # characters of a text in the progress output


def is_due(frequency: int, done: int, total: int) -> bool:
    """Whether something that is done every `frequency` steps (0: never) and at the end is done after `done` steps."""
    return done == total or bool(frequency and done % frequency == 0)


def sample_if_due(run: TrainingRun, done: int, progress: Progress) -> None:
    """Write a line of samples.jsonl after `done` steps when it is time and not done yet."""
    logging = run.config.logging
    frequency = logging.eval_freq if logging.sample_freq is None else logging.sample_freq
    none_wanted = logging.sample_freq == 0 or logging.num_samples == 0
    if none_wanted or run.sampled == done or not is_due(frequency, done, run.config.training.num_train_steps):
        return
    run.watchdog.beat(done, "making samples")
    with run.reporter.phases("evaluate"):
        run.trips = make_samples(run)
    run.sampled = done
    if run.process.is_main:
        run.reporter.samples(done, [trip.record() for trip in run.trips])
        progress.say(f"sample at step {done}\n{as_paragraphs([run.trips[0].shortened(SHOWN_WIDTH)])}".rstrip())


def make_samples(run: TrainingRun) -> list[RoundTrip]:
    """Round trips of the first logging.num_samples held-out texts, on rank 0; none on the others.

    All ranks call it together, since shards are gathered here.
    """
    c = run.config
    with for_evaluation(run) as objective:
        if not run.process.is_main:
            return []
        return round_trips(
            objective,
            run.held_out,
            run.loader.format,
            c.logging.num_samples,
            c.training.eval_batch_size,
            c.decoding,
            c.training.seed,
        )
