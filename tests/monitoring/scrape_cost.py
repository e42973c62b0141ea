"""What scrapes cost a training run: `python tests/monitoring/scrape_cost.py [--rate 1] [--pairs 60] [overrides]`.

Two figures: the processor time of one scrape in the process that trains, and the time per token with scrapes against
without, from pairs of windows that follow each other closely, since the machine's own noise is larger than what is
looked for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from stack import ROOT, until

WINDOW = 2.5  # seconds


class Scraper:
    """Scrapes at a rate while `on`."""

    def __init__(self, url: str, rate: float) -> None:
        self.on, self.count = False, 0
        self._url, self._rate = url, rate
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(1 / self._rate)
            if self.on:
                with urllib.request.urlopen(self._url) as answer:
                    answer.read()
                self.count += 1


def scrape_seconds(url: str, scrapes: int = 500) -> float:
    """Processor time of one scrape, in the process that serves it, measured in this one."""
    from prometheus_client.exposition import generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    from job.metric_names import METRICS
    from job.monitoring.exporter import Metrics

    with urllib.request.urlopen(url) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    metrics = Metrics("demo", 0, dict)
    metrics.set(
        {
            (name, tuple(s.labels[label] for label in METRICS[name].labels)): s.value
            for family in families
            for s in family.samples
            if (name := s.name) in METRICS
        }
    )
    started = time.thread_time()
    for _ in range(scrapes):
        generate_latest(metrics.registry)
    return (time.thread_time() - started) / scrapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=1.0, help="scrapes a second")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "demo" / "training_log.jsonl"
        command = [
            sys.executable,
            "-m",
            "job.train",
            "--config-name",
            "demo",
            *options.overrides,
            f"logging.save_dir={directory}",
            "monitoring.host=127.0.0.1",
            "training.num_train_steps=1000000",
            "logging.log_freq=1",
            "logging.eval_freq=0",
            "logging.save_freq=0",
        ]
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            target = until(lambda: next(Path(directory, ".targets").glob("*.json"), None), "the run listens")
            url = f"http://{json.loads(target.read_text())[0]['targets'][0]}/metrics"
            until(lambda: log.exists() and len(log.read_text().splitlines()) > 20, "it trains")
            scraper, ratios = Scraper(url, options.rate), []
            for number in range(options.pairs):
                times = {}
                for on in (False, True) if number % 2 else (True, False):
                    scraper.on = on
                    before = len(log.read_text().splitlines())
                    time.sleep(WINDOW)
                    steps = [json.loads(line) for line in log.read_text().splitlines()[before:]]
                    seconds = sum(step["step_seconds"] for step in steps)
                    times[on] = seconds / sum(step["step_seconds"] * step["tokens_per_second"] for step in steps)
                ratios.append(times[True] / times[False])
            scraper.on = False
            time.sleep(1)
            low, middle, high = (statistics.quantiles(ratios, n=4)[i] for i in (0, 1, 2))
            cost, error = scrape_seconds(url), statistics.stdev(ratios) / len(ratios) ** 0.5
            print(
                f"one scrape: {1000 * cost:.2f} ms of processor time; "
                f"{options.rate:g} a second: {100 * cost * options.rate:.2f}% of one processor"
            )
            print(
                f"step of {1000 * seconds / len(steps):.0f} ms; time per token with scrapes / without: "
                f"mean {statistics.mean(ratios):.4f} +- {error:.4f}, median {middle:.4f} "
                f"(quartiles {low:.4f} to {high:.4f}; {options.pairs} pairs, {scraper.count} scrapes)"
            )
        finally:
            run.kill()
            run.wait()


if __name__ == "__main__":
    main()
