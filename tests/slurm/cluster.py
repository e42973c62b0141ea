"""A private SLURM cluster with accounting, in a temporary directory.

It has its own munge socket, ports and database; nothing under /etc or /var is touched.
By hand: `python tests/slurm/cluster.py` prints the SLURM_CONF to export, and ends with Ctrl-C.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DEADLINE = 120.0  # seconds, for a machine that is as busy as it likes
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "sbatch", "sacct")
TABLES = ("system_tables", "performance_tables", "system_tables_data")

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ctld_port}
AuthType=auth/munge
AuthInfo=socket={base}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={base}/ctld
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd.%n.log
PlugStackConfig={base}/plugstack.conf
TaskProlog={base}/prolog
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,requeue_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=20
MinJobAge=3600
MaxArraySize={max_array_size}
FirstJobId={first_job}
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={base}/munge.sock
JobCompType=jobcomp/none
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
DefMemPerCPU=512
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=60 DefaultTime=10 State=UP PriorityTier=1 GraceTime=20
PartitionName=abrupt Nodes={names} MaxTime=60 DefaultTime=10 State=UP PriorityTier=1 GraceTime=0
PartitionName=high Nodes={names} MaxTime=60 DefaultTime=10 State=UP PriorityTier=10
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={base}/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser={user}
LogFile={base}/log/slurmdbd.log
PidFile={base}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={db_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
"""

USERS = """\
CREATE USER 'slurm'@'%' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct.* TO 'slurm'@'%';
CREATE USER 'slurm'@'localhost' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct.* TO 'slurm'@'localhost';
"""


def missing_programs() -> list[str]:
    """Programs of SLURM and its accounting that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago.

    They lie between those of the runs' rendezvous and those that Linux gives to connections by itself.
    """
    return [port for port in random.sample(range(30000, 32768), 20 * count) if not listens(port)][:count]


def wait_for(condition: Callable[[], object], what: str, seconds: float = DEADLINE) -> None:
    """Poll until `condition()` is true; TimeoutError naming `what`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.1)


def listens(port: int) -> bool:
    """Whether something accepts connections on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class PrivateCluster:
    """The cluster's directory, the environment in which SLURM's commands reach it, and its daemons."""

    def __init__(self, base: Path, nodes: int, cpus: int, max_array_size: int) -> None:
        self.base, self.user = base, getpass.getuser()
        self.names = [
            f"127.0.1.{number + 1}" for number in range(nodes)
        ]  # addresses as names: every program can resolve them
        self.env = {**os.environ, "SLURM_CONF": str(base / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        ctld_port, self._db_port, self._dbd_port, *ports = free_ports(nodes + 3)
        lines = [
            f"NodeName={name} NodeHostname=localhost NodeAddr={name} Port={port} CPUs={cpus} "
            f"RealMemory=8000 Gres=gpu:2 Weight={number} State=UNKNOWN"  # a job of one node goes to the first if it can
            for number, (name, port) in enumerate(zip(self.names, ports, strict=True), 1)
        ]
        for directory in ("ctld", "spool", "log", "db"):
            (base / directory).mkdir()
        (base / "plugstack.conf").touch()
        (base / "prolog").write_text("#!/bin/sh\necho print welcome to the cluster\n")  # as sites do, on every task
        (base / "prolog").chmod(0o755)
        (base / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        (base / "munge.key").write_bytes(os.urandom(1024))
        (base / "munge.key").chmod(0o600)
        (base / "slurm.conf").write_text(
            SLURM_CONF.format(
                base=base,
                user=self.user,
                ctld_port=ctld_port,
                dbd_port=self._dbd_port,
                nodes="\n".join(lines),
                names=",".join(self.names),
                max_array_size=max_array_size,
                first_job=random.randrange(1, 20000),
            )
        )  # runs' ports are made of it: another cluster has others
        (base / "slurmdbd.conf").write_text(
            SLURMDBD_CONF.format(base=base, user=self.user, db_port=self._db_port, dbd_port=self._dbd_port)
        )
        (base / "slurmdbd.conf").chmod(0o600)

    def run(self, *command: str, check: bool = True) -> str:
        """Standard output of a command of SLURM."""
        return subprocess.run(
            command, env=self.env, text=True, capture_output=True, check=check, timeout=DEADLINE
        ).stdout.strip()

    def start(self) -> None:
        base = self.base
        self._daemon(
            "munged",
            "-F",
            f"--key-file={base}/munge.key",
            f"--socket={base}/munge.sock",
            f"--pid-file={base}/munged.pid",
            f"--log-file={base}/log/munged.log",
            f"--seed-file={base}/munged.seed",
            "--num-threads=2",
        )
        wait_for((base / "munge.sock").exists, "munged")
        self._start_database()
        self._daemon("slurmdbd", "-D")
        wait_for(lambda: listens(self._dbd_port), "slurmdbd")
        self.run("sacctmgr", "-i", "add", "cluster", "lab")
        self._start_controller()
        for name in self.names:
            self._daemon("slurmd", "-D", "-N", name)
        wait_for(
            lambda: self.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D") == str(len(self.names)), "slurmd"
        )

    def _start_controller(self) -> None:
        self._controller = self._daemon("slurmctld", "-D")
        wait_for(lambda: "UP" in self.run("scontrol", "ping", check=False), "slurmctld")

    @contextlib.contextmanager
    def controller_away(self) -> Iterator[None]:
        """No command gets an answer meanwhile; jobs and their steps go on."""
        self._controller.terminate()
        self._controller.wait(30)
        self._daemons.remove(self._controller)
        try:
            yield
        finally:
            self._start_controller()

    def _start_database(self) -> None:
        base, common = self.base, [f"--user={self.user}", f"--datadir={self.base}/db", "--skip-log-bin"]
        # What mariadb-install-db of the client package does. Its files have had MySQL's name up to Debian 12.
        places = [Path("/usr/share", brand, f"{brand}_{TABLES[0]}.sql") for brand in ("mariadb", "mysql")]
        first = next(path for path in places if path.exists())
        tables = "".join(first.with_name(first.name.replace(TABLES[0], name)).read_text() for name in TABLES)
        with (base / "log" / "bootstrap.out").open("w") as output:
            subprocess.run(
                ["mariadbd", "--no-defaults", "--bootstrap", *common],
                input=f"CREATE DATABASE mysql;\nUSE mysql;\nSET @auth_root_socket=NULL;\n{tables}",
                text=True,
                check=True,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        (base / "users.sql").write_text(USERS)
        self._daemon(
            "mariadbd",
            "--no-defaults",
            *common,
            f"--socket={base}/db.sock",
            "--bind-address=127.0.0.1",
            f"--port={self._db_port}",
            f"--pid-file={base}/db.pid",
            f"--init-file={base}/users.sql",
            "--skip-name-resolve",
            "--innodb-buffer-pool-size=64M",
            "--innodb-lock-wait-timeout=900",
        )
        wait_for(lambda: listens(self._db_port), "mariadbd")

    def _daemon(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.base / "log" / "daemons.out").open("ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "TERM", *command],
                    env=self.env,
                    cwd=self.base,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            )
        return self._daemons[-1]

    def stop(self) -> None:
        with contextlib.suppress(Exception):  # a cluster that did not come up has nothing to cancel
            self.run("scancel", "-f", "-u", self.user)
            wait_for(lambda: not self.run("squeue", "-h"), "jobs to end")
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@contextlib.contextmanager
def cluster(nodes: int = 2, cpus: int = 4, max_array_size: int = 3) -> Iterator[PrivateCluster]:
    """A running cluster; its jobs and daemons end with the context."""
    base = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: paths of sockets are limited to 108 bytes
    base.chmod(0o755)  # munged wants every directory above its socket open to all
    try:
        one = PrivateCluster(base, nodes, cpus, max_array_size)
        try:
            one.start()
            yield one
        finally:
            one.stop()
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), cluster() as here:
        print(f"export SLURM_CONF={here.env['SLURM_CONF']}", flush=True)
        signal.pause()
