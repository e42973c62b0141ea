"""A real run of two ranks under a real Prometheus and Alertmanager.

Every panel and rule has something to show, and what goes wrong is told. The tests share the run and follow each other.
Rules' times are 60 times shorter: 5 minutes are 5 seconds. None of them waits for a moment that can be missed: what is
looked for stays until it was seen, on a machine that is as busy as it likes.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from picture import draw, substitute
from stack import MISSING, PUSHGATEWAY, ROOT, Stack, free_port, until

from job.config import Config, MonitoringConfig
from job.files import json_lines
from job.monitoring.flops import Work
from job.monitoring.goodput import Times
from job.monitoring.phases import Phases
from job.monitoring.reporter import Reporter
from job.runtime.checkpointer import SaveStats
from job.runtime.distributed import Process
from rules import Durations, alerts, recordings

pytestmark = [
    pytest.mark.monitoring,
    pytest.mark.skipif(
        bool(MISSING), reason=f"{', '.join(MISSING)} not found: `make monitoring-tools` installs Debian's packages"
    ),
    pytest.mark.timeout(1200),
]
SPEED = 60.0
RUN = "lab/a=1"
MOST_SERIES = {"0": 130, "1": 50}  # of the run and its first rank; of every further rank
SETTINGS = """model=small data=synthetic model.hidden_size=32 model.n_blocks=1 model.n_heads=2 model.head_dim=16
model.cond_dim=32 model.max_seq_len=16 data.synthetic_samples=64 data.synthetic_vocab_size=32
data.synthetic_latent_dim=8 training.device=cpu training.num_train_steps=100000 training.train_batch_size=2
training.sick_rank_timeout_seconds=900 training.max_nonfinite_steps=100000 logging.log_freq=2
logging.eval_freq=20 logging.save_freq=20 logging.num_samples=1 logging.num_eval_batches=1
training.eval_batch_size=4 monitoring.host=127.0.0.1 monitoring.stalled_after_seconds=3"""


class Training:
    """The run, started by the same command every time."""

    def __init__(self, runs: Path) -> None:
        self.runs, self.poison, self.output = runs, runs / "poison", ""
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "job.runtime.torchrun",
            "--nproc-per-node",
            "2",
            str(Path(__file__).parent / "poisoned_train.py"),
            *SETTINGS.split(),
            f"logging.save_dir={self.runs}",
            f"logging.run_name='{RUN}'",
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "POISON": str(self.poison)}
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        threading.Thread(
            target=self._drain, args=(self.process,), daemon=True
        ).start()  # a pipe: file size limits do not touch it

    def workers(self) -> dict[str, int]:
        """Process ids by rank."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = {pid: re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes()) for pid in children}
        return {rank[1].decode(): int(pid) for pid, rank in found.items() if rank}

    def kill(self) -> None:
        assert self.process is not None
        for pid in [self.process.pid, *self.workers().values()]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(30)

    def _drain(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.output += line


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    training = Training(tmp_path_factory.mktemp("runs"))
    training.start()
    yield training
    print(training.output[-5000:])  # shown when a test failed
    assert training.process is not None
    if training.process.poll() is None:
        training.kill()


@pytest.fixture(scope="module")
def stack(training: Training, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stack"), training.runs, SPEED)
    yield stack
    stack.close()


def addresses(training: Training) -> dict[str, str]:
    groups = [group for path in (training.runs / ".targets").glob("*.json") for group in json.loads(path.read_text())]
    return {group["labels"]["rank"]: group["targets"][0] for group in groups}


def dashboard_queries() -> list[tuple[str, str]]:
    boards = [json.loads(path.read_text()) for path in sorted((ROOT / "docker/grafana/dashboards").glob("*.json"))]
    return [
        (panel["title"], target["expr"])
        for board in boards
        for panel in board["panels"]
        for target in panel.get("targets", [])
    ]


@pytest.mark.parametrize(
    "command",
    [
        "promtool check config docker/prometheus/prometheus.yml",
        "promtool check rules docker/prometheus/rules.yml",
        "promtool test rules tests/monitoring/rules_test.yml",
        "amtool check-config docker/alertmanager/alertmanager.yml",
    ],
)
def test_the_programs_accept_our_files(command: str) -> None:
    result = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_panel_and_rule_has_something_to_show(training: Training, stack: Stack) -> None:
    expected = [
        ("up", 'up{job="cyclevae"}'),
        *((name, name) for name in recordings(Durations(SPEED))),
        *((alert.name, alert.signal) for alert in alerts(Durations(SPEED))),
        *((title, substitute(query, ".*", "5s")) for title, query in dashboard_queries()),
    ]

    def all_seen() -> bool:
        """A query over the last second is empty whenever the machine was too busy to scrape in it."""
        expected[:] = [(name, expression) for name, expression in expected if not stack.query(expression)]
        return not expected

    def targets() -> set[tuple[str, str, str]]:
        return {
            (r["metric"]["run"], r["metric"]["rank"], r["metric"]["job_id"])
            for r in stack.query('up{job="cyclevae"} == 1')
        }

    until(lambda: stack.value(f'cyclevae_eval_step{{run="{RUN}"}}'), "the run evaluates")
    try:
        until(all_seen, "nothing is empty")
    except AssertionError as error:
        raise AssertionError(f"{error}: {expected}") from error
    until(lambda: targets() == {(RUN, "0", "local"), (RUN, "1", "local")}, "both ranks answer")
    assert not stack.query('{exported_run!=""}')  # labels of metrics and targets agree


def test_rules_are_all_evaluated(stack: Stack) -> None:
    with urllib.request.urlopen(f"{stack.url}/api/v1/rules") as answer:
        rules = [rule for group in json.load(answer)["data"]["groups"] for rule in group["rules"]]
    assert len(rules) == len(recordings(Durations(SPEED))) + len(alerts(Durations(SPEED)))
    assert [rule for rule in rules if rule["health"] != "ok"] == []


def test_promtool_accepts_the_metrics_and_they_are_few(training: Training, stack: Stack) -> None:
    for rank, address in addresses(training).items():
        with urllib.request.urlopen(f"http://{address}/metrics") as answer:
            exposed = answer.read().decode()
        checked = subprocess.run(["promtool", "check", "metrics"], input=exposed, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        assert (checked.stdout + checked.stderr).strip() == ""
        assert len([line for line in exposed.splitlines() if not line.startswith("#")]) <= MOST_SERIES[rank]
    for rank, most in MOST_SERIES.items():
        query = f'count({{__name__=~"cyclevae_.+",run="{RUN}",rank="{rank}"}})'
        assert until(lambda query=query: stack.value(query), "a scrape") <= most  # type: ignore[misc]


def test_the_log_holds_what_prometheus_has(training: Training, stack: Stack) -> None:
    end = time.time()
    series = stack.range(f'cyclevae_loss{{run="{RUN}",term="base_l2t_text"}}', end - 60, end, 1)[0]
    shown = {float(value) for _, value in series["values"]}
    until(
        lambda: (
            shown <= {line["base_l2t_text_loss"] for line in json_lines(training.runs / RUN / "training_log.jsonl")}
        ),
        "what is shown is logged",
    )


def test_the_panels_can_be_drawn(stack: Stack, tmp_path: Path) -> None:
    draw(tmp_path / "panels.png", stack.range, RUN, time.time(), 20, "5s")
    assert (tmp_path / "panels.png").stat().st_size > 20_000


def test_a_frozen_rank(training: Training, stack: Stack) -> None:
    def health() -> int | None:
        try:
            return urllib.request.urlopen(f"http://{addresses(training)['0']}/healthz").status
        except urllib.error.HTTPError as error:
            return error.code

    until(lambda: health() == 200, "it is well")
    frozen = training.workers()["1"]
    os.kill(frozen, signal.SIGSTOP)
    try:
        until(lambda: stack.notified("firing", "CyclevaeTargetGone", run=RUN, rank="1"), "the frozen rank is gone")
        until(lambda: stack.notified("firing", "CyclevaeRunStalled", run=RUN, rank="0"), "the other rank is stalled")
        assert health() == 503
    finally:
        os.kill(frozen, signal.SIGCONT)
    until(lambda: stack.notified("resolved", "CyclevaeTargetGone", run=RUN, rank="1"), "the rank is back")
    until(lambda: stack.notified("resolved", "CyclevaeRunStalled", run=RUN, rank="0"), "the run goes on")
    until(lambda: health() == 200, "it is well again")


def test_losses_that_are_not_finite(training: Training, stack: Stack) -> None:
    training.poison.touch()
    until(lambda: stack.notified("firing", "CyclevaeNonfiniteSteps", run=RUN), "skipped steps are told")
    training.poison.unlink()
    until(
        lambda: not stack.active("CyclevaeNonfiniteSteps", run=RUN), "no more are skipped"
    )  # a critical alert may mute the notification


def test_checkpoints_that_do_not_fit(training: Training, stack: Stack) -> None:
    """No file may grow beyond 10 kB, as if the disk or the quota were full."""
    for pid in training.workers().values():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    until(lambda: stack.notified("firing", "CyclevaeCheckpointFailing", run=RUN), "failed saves are told")
    for pid in training.workers().values():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    until(lambda: stack.notified("resolved", "CyclevaeCheckpointFailing", run=RUN), "saves succeed again")


def test_the_pushgateway_holds_a_short_job_until_its_end(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    gateway = subprocess.Popen([PUSHGATEWAY, f"--web.listen-address={address}"], stderr=subprocess.DEVNULL)

    def pushed() -> str:
        try:
            with urllib.request.urlopen(f"http://{address}/metrics") as answer:
                return "".join(line.decode() for line in answer if line.startswith(b"cyclevae_"))
        except OSError:
            return "not ready"

    try:
        until(lambda: pushed() == "", "the Pushgateway answers")
        config = Config(
            monitoring=MonitoringConfig(host="127.0.0.1", pushgateway=address, targets_dir=str(tmp_path / "targets"))
        )
        with Reporter(
            config,
            tmp_path / "short",
            Process(0, 0, 1, torch.device("cpu"), "here"),
            Phases(),
            Work(config.model, 32, 8),
            dtype=torch.float32,
            saves=SaveStats(),
            silence=lambda: 0.0,
            gather=lambda value: [value],
            times=Times(0.0),
        ):
            until(lambda: 'run="short"' in pushed(), "the metrics are pushed")
        assert pushed() == ""
    finally:
        gateway.terminate()
        gateway.wait(20)


def test_a_killed_job_and_its_restart(training: Training, stack: Stack) -> None:
    def counter(name: str) -> float:
        return stack.value(f'max(cyclevae_{name}{{run="{RUN}"}})') or 0.0

    old = addresses(training)
    training.kill()
    reached = json.loads((training.runs / RUN / "goodput.json").read_text())
    for rank in old:
        until(lambda rank=rank: stack.active("CyclevaeTargetGone", run=RUN, rank=rank), f"rank {rank} does not answer")  # type: ignore[misc]
    assert addresses(training) == old  # nobody was left to remove the file
    training.start()
    until(
        lambda: counter("restarts_total") == 1 and counter("steps_total") > reached["steps"],
        "it goes on where its counters were",
    )
    new = addresses(training)
    assert new.keys() == old.keys()
    assert set(new.values()).isdisjoint(old.values())
    until(lambda: counter("tokens_total") > reached["tokens"], "tokens are counted on")
    until(lambda: counter("step") > reached["furthest"], "it is as far as it was")
    until(lambda: not stack.active("CyclevaeTargetGone", run=RUN), "its endpoints answer")


def test_a_stopped_job_leaves_nothing_behind(training: Training, stack: Stack) -> None:
    assert training.process is not None
    training.process.send_signal(signal.SIGTERM)
    assert training.process.wait(240) == 143, training.output[-3000:]
    assert addresses(training) == {}
    until(lambda: not stack.query('up{job="cyclevae"}'), "Prometheus has no target left")
    until(lambda: stack.notified("firing", "CyclevaeRunEndedEarly", run=RUN), "its early end is told")
    until(lambda: not stack.active("CyclevaeTargetGone"), "nothing is missed")
    assert "Traceback" not in training.output
