"""Signs of life of every rank in the rendezvous store, so that a rank that died or hangs can be named.

A collective that fails says at best which connection closed, not which rank is the cause: all ranks wait in a ring, and
one that hangs stops its neighbours first. So every rank publishes once a second, from a thread of its own, where its
main loop is. Whoever gives up waiting reads all signs twice, two seconds apart: a rank whose count stands still is dead
or frozen (SIGKILL, SIGSTOP, a lost node); one whose count grows while its step does not has a stuck main loop.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch.distributed as dist

INTERVAL = 1.0  # seconds between two signs of life
# A store answers within milliseconds, but hundreds of ranks may ask for all signs at once.
ANSWER_SECONDS = 60.0

T = TypeVar("T")


def answered_within(seconds: float, question: Callable[[], T]) -> T:
    """What a question to the store gives. Raises what that raises, and RuntimeError when it takes longer.

    Asked in a thread: a host that lost its power closes no connection, nor does a frozen one. Neither ever answers, and
    PyTorch's store has no timeout for that.
    """
    answer: Future[T] = Future()

    def ask() -> None:
        try:
            answer.set_result(question())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="question to the store", daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError as error:
        raise RuntimeError(f"no answer in {seconds:g} s") from error


@dataclass
class Sign:
    """What a rank last said of itself."""

    rank: int
    node: str
    count: int = 0  # grows with every sign
    step: int = 0
    phase: str = "start"
    changes: int = 0  # of step or phase: all ranks go the same way, so the rank that hangs has the fewest
    age: float = 0.0  # seconds since the main loop last made progress, by the rank's own clock
    failure: str = ""  # why the rank gave up, when it could still say so
    exit_code: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.node})"


class Heartbeats:
    """Publishes this rank's sign of life from a thread of its own and reads those of the others when asked."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, node: str) -> None:
        self.sign = Sign(rank, node)
        self.failure: Sign | None = None  # of the first rank that gave up
        self._world_size = world_size
        self._progress = time.monotonic()
        # Separate connections: a store's client handles one request at a time, and a reader who waits for a sign that
        # never comes would keep this rank from publishing its own, so that it would look dead too.
        self._write, self._read = store.clone(), store.clone()  # type: ignore[attr-defined]  # missing in the stubs
        self._lock, self._end = threading.Lock(), threading.Event()
        self._publish()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def progress(self, step: int, phase: str) -> None:
        """Note that the main loop came to `phase` of `step`. It only changes memory: the thread publishes it."""
        self.sign.changes += (step, phase) != (self.sign.step, self.sign.phase)
        self.sign.step, self.sign.phase, self._progress = step, phase, time.monotonic()

    def give_up(self, failure: str, exit_code: int) -> None:
        """Tell the others why this rank ends, so that they report the cause and not its consequence.

        Only the first rank to give up is kept: later ones gave up because of it. Raises RuntimeError without the store.
        """
        self.sign.failure, self.sign.exit_code = failure, exit_code
        self._publish()
        self._write.compare_set("failure", "", json.dumps(asdict(self.sign)))

    def stop(self) -> None:
        """End the thread; the last sign stays in the store."""
        self._end.set()
        self._thread.join(timeout=INTERVAL)

    def others(self) -> list[tuple[Sign, bool]]:
        """The other ranks' signs, with whether each is still being renewed; takes about two intervals.

        Raises RuntimeError when the store does not answer.
        """
        return answered_within(ANSWER_SECONDS, self._others)

    def _others(self) -> list[tuple[Sign, bool]]:
        everyone = range(self._world_size)
        before = self.signs(everyone)
        if self._end.wait(2.2 * INTERVAL):
            return []
        return [
            (sign, sign.count > before[rank].count)
            for rank, sign in self.signs(everyone).items()
            if rank != self.sign.rank
        ]

    def signs(self, ranks: Iterable[int]) -> dict[int, Sign]:
        """What ranks last said; the count of one that has not joined is -1.

        Raises RuntimeError when the store's host is gone, and waits as long as it does not answer.
        """
        signs = {}
        for rank in ranks:
            if self._read.check([str(rank)]):
                signs[rank] = Sign(**json.loads(self._read.get(str(rank))))
            else:
                signs[rank] = Sign(rank, "never reported", count=-1)
        return signs

    def _run(self) -> None:
        while not self._end.wait(INTERVAL):
            try:
                self._publish()
                # Looked up every second and not when a loss is noticed: the store may be lost along with the rank.
                if self.failure is None and self._write.check(["failure"]):
                    self.failure = Sign(**json.loads(self._write.get("failure")))
            except RuntimeError:  # the store's host is gone: whoever waits for it next says so
                return

    def _publish(self) -> None:
        with self._lock:
            self.sign.count += 1
            self.sign.age = time.monotonic() - self._progress
            self._write.set(str(self.sign.rank), json.dumps(asdict(self.sign)))
