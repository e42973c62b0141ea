"""Which nodes lose ranks, and when they are excluded, in bash with SLURM's commands played: no cluster needed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from job.launch.run_status import show
from job.launch.slurm.job_script import BAD_NODES, BATCH
from job.launch.slurm.run_directory import RunDirectory

# scontrol that knows hosts and keeps the list of excluded nodes, and sbatch that counts nodes of a partition of four.
SLURM = """
scontrol() {
    case "$1 $2" in
        "requeue "*) touch requeued ;;
        "show hostnames") echo "$3" | tr , '\\n' ;;
        "update "*) echo "${3#ExcNodeList=}" >excluded ;;
        *) echo "JobId=7 JobState=RUNNING Partition=main QOS=normal Features=(null) ExcNodeList=$(excluded)" ;;
    esac
}
excluded() { cat excluded 2>/dev/null || echo "(null)"; }
sbatch() {
    echo "$*" >>asked
    local without=${2#--exclude=} nodes=${4#--nodes=}
    [ $((4 - $(echo "$without" | tr , '\\n' | wc -l))) -ge "$nodes" ]
}
"""
TWO_NODES = {"n1": "0,1", "n2": "2,3"}


def failure(rank: int, consequence: bool) -> str:
    words = 'told by \\"rank\\": 3,'
    cause = json.dumps(consequence)
    return f'{{"rank": {rank}, "node": "x", "message": "{words}", "exit_code": 134, "consequence": {cause}}}'


def start(
    directory: Path,
    places: dict[str, str],
    told: list[int],
    itself: list[int] | None = None,
    code: int = 134,
    met: bool = True,
    **variables: str,
) -> list[dict[str, Any]]:
    """A start of a run whose ranks are on these nodes, and in which ranks have `told` that they lost another, and
    others that they hang `itself`.

    Returns what is known of nodes after it.
    """
    ranks = directory / "ranks.sh"
    lines = [f'[ ! -d "$CYCLEVAE_PLACES" ] || echo "{ids}" >$CYCLEVAE_PLACES/{node}' for node, ids in places.items()]
    failures = [failure(rank, True) for rank in told] + [failure(rank, False) for rank in itself or []]
    lines += [f"cat >>$CYCLEVAE_FAILURES <<'END'\n{one}\nEND" for one in failures]
    ranks.write_text("\n".join(lines + ["touch run/environment.json"] * met + [f"exit {code}"]))
    script = f"{SLURM}\nsource {BATCH}; source {BAD_NODES}\npoll=0.1 patience=2 linger=0\n"
    done = subprocess.run(
        ["bash", "-c", f"{script} claim() {{ :; }}; supervise run targets 5 bash ranks.sh"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ
        | {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": str(len(places)), "SLURM_NTASKS": "4", **variables},
    )
    assert done.returncode == code, done.stderr
    notes = directory / "run" / "slurm" / "nodes.jsonl"
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []


def test_a_node_that_lost_ranks_twice_is_excluded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first time it is only noted. Ranks that tell of the loss are on good nodes; the user's own list is kept."""
    (tmp_path / "excluded").write_text("n9\n")
    (first,) = start(tmp_path, TWO_NODES, told=[0, 1, 2])
    assert (first["node"], first["ranks"], first["restarts"], first["job"]) == ("n2", [3], 0, "7")
    assert (tmp_path / "excluded").read_text() == "n9\n"
    _, again, excluded = start(tmp_path, TWO_NODES, told=[0, 1], SLURM_RESTART_COUNT="1")
    assert (again["node"], again["ranks"], excluded["excluded"]) == ("n2", [2, 3], ["n2", "n9"])
    assert (tmp_path / "excluded").read_text() == "n2,n9\n"
    assert "--partition=main --nodes=2 --ntasks=4 --qos=normal" in (tmp_path / "asked").read_text()

    row = RunDirectory(tmp_path / "run").status(None, {})
    assert (row.lost_ranks, row.excluded_nodes) == ({"n2": 2}, ["n2", "n9"])
    show([row], as_json=False)
    assert "    starts in which nodes lost ranks: n2 in 2\n    excluded nodes: n2, n9\n" in capsys.readouterr().out


def test_a_rank_that_hangs_names_itself(tmp_path: Path) -> None:
    """Its failure is no consequence of another's."""
    (first,) = start(tmp_path, TWO_NODES, told=[0, 1, 2], itself=[3])
    assert (first["node"], first["ranks"]) == ("n2", [3])


def test_a_job_that_could_not_run_without_them_keeps_its_nodes(tmp_path: Path) -> None:
    places = {"n1": "0", "n2": "1", "n3": "2", "n4": "3"}
    for _ in range(2):
        notes = start(tmp_path, places, told=[0, 1, 2])
    assert [note["node"] for note in notes] == ["n4", "n4"]
    assert not (tmp_path / "excluded").exists()
    (log,) = (tmp_path / "run" / "slurm").glob("*.log")
    assert "n4 lost ranks twice, but the job could not run without: not excluded" in log.read_text()


@pytest.mark.parametrize(
    ("why", "told", "options"),
    [
        ("every node has lost ranks", [0, 2], {}),
        ("nobody has met", [0, 1, 2], {"met": False}),
        ("it is not wanted", [0, 1, 2], {"CYCLEVAE_EXCLUDE_BAD_NODES": "0"}),
        ("the prolog is the user's", [0, 1, 2], {"SLURM_TASK_PROLOG": "/bin/true"}),
        ("the ranks failed by themselves", [0, 1, 2], {"code": 1}),
    ],
)
def test_what_is_no_nodes_fault(why: str, told: list[int], options: dict[str, Any], tmp_path: Path) -> None:
    for _ in range(2):
        assert start(tmp_path, TWO_NODES, told, **options) == [], why
    assert not (tmp_path / "excluded").exists()


def test_one_node_alone_may_be_the_bad_one(tmp_path: Path) -> None:
    start(tmp_path, {"n1": "0"}, told=[])
    assert start(tmp_path, {"n1": "0"}, told=[])[-1]["excluded"] == ["n1"]


def test_a_prolog_writes_down_the_ranks_of_its_node(tmp_path: Path) -> None:
    """srun runs it for every task. The batch step has no step's number, and must leave nothing."""
    start(tmp_path, {}, told=[], code=1)
    assert list((tmp_path / "run/slurm/places").iterdir()) == []
    task = {"CYCLEVAE_PLACES": str(tmp_path), "SLURM_STEP_ID": "0", "SLURM_GTIDS": "4,6", "SLURMD_NODENAME": "n7"}
    for local in ("1", "0"):
        assert not (tmp_path / "n7").exists()
        prolog = [str(tmp_path / "run/slurm/place.sh")]
        subprocess.run(prolog, env=os.environ | task | {"SLURM_LOCALID": local}, check=True)
    assert (tmp_path / "n7").read_text() == "4,6\n"
