"""A real Kubernetes of one node on loopback, in a temporary directory; nothing under /etc or /var is touched.

These run: etcd, API server, controllers, scheduler, dockerd, kubelet. The programs of Kubernetes are Debian's 1.20.2,
built by build.sh.

There is no pod network, no DNS and no kube-proxy: pods need hostNetwork, and images from the node's own dockerd.
By hand (as root): `python tests/k8s/stand_in.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from k8s_access import Access, wait_for

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cyclevae" / "kubernetes"
BUSYBOX = Path("/bin/busybox")
PROGRAMS = ("kubectl", "etcd", "dockerd", "docker", "runc", "openssl", "setpriv", "nsenter", "buildah", "debootstrap")
PREFIX = "cyclevae-k8s-"
NODE = "127.0.0.1"  # its name, and so its address


def unable() -> str | None:
    """Why this machine cannot be a node; None if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None] + [
        str(path) for path in (BUSYBOX, CACHE / "stamp") if not path.exists()
    ]
    if missing:
        return f"needs {', '.join(missing)}: `make k8s-tools` installs all but kubectl 1.21 or newer"
    if os.getuid() != 0:
        return "needs root, for containers"
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True).returncode:
            return "needs a machine that allows mounts"
        subprocess.run(["umount", place], check=True)
    if not Path("/sys/fs/cgroup/memory/tasks").exists():
        return "needs control groups of version 1, as Kubernetes 1.20 does"
    return None


def free_ports(count: int) -> list[int]:
    """Ports of this machine that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


RUNC = """\
#!{python}
# runc for a root without CAP_SYS_RESOURCE: a container's oom_score_adj may not go below ours, nor its limits above.
import json, os, sys
if "create" in sys.argv and "--bundle" in sys.argv:
    path = os.path.join(sys.argv[sys.argv.index("--bundle") + 1], "config.json")
    with open(path) as file:
        config = json.load(file)
    config["process"]["oomScoreAdj"] = max(0, config["process"].get("oomScoreAdj") or 0)
    config["process"].pop("rlimits", None)
    with open(path, "w") as file:
        json.dump(config, file)
os.execv("{runc}", ["runc", *sys.argv[1:]])
"""


class Node(Access):
    """The node's directory, the environment in which kubectl and docker reach it, and its daemons."""

    def __init__(self, base: Path) -> None:
        sockets = {"KUBECONFIG": str(base / "kubeconfig"), "DOCKER_HOST": f"unix://{base}/docker.sock"}
        super().__init__(base, {**os.environ, **sockets})
        self.base = base
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        etcd_port, peer_port, self._api_port, self._kubelet_port = free_ports(4)
        self._etcd_url, self._peer_url = f"http://127.0.0.1:{etcd_port}", f"http://127.0.0.1:{peer_port}"
        self.server = f"https://127.0.0.1:{self._api_port}"
        (base / "log").mkdir()

    def idle_pod(self) -> dict[str, Any]:
        container = {"name": "main", "image": "lab/pause", "imagePullPolicy": "Never"}
        return {"hostNetwork": True, "containers": [container]}

    def start(self) -> None:
        self._make_keys()
        self._make_place()
        self._daemon("dockerd", *self._within(), "dockerd", "--config-file", str(self._docker_settings()))
        self._daemon(
            "etcd",
            "etcd",
            "--data-dir",
            "etcd",
            "--listen-client-urls",
            self._etcd_url,
            "--advertise-client-urls",
            self._etcd_url,
            "--listen-peer-urls",
            self._peer_url,
            "--initial-advertise-peer-urls",
            self._peer_url,
            "--initial-cluster",
            f"default={self._peer_url}",
            "--unsafe-no-fsync",
        )
        self.start_server()
        wait_for(lambda: self.run("docker", "info", check=False), "dockerd")
        self._import_busybox()
        kubeconfig = f"--kubeconfig={self.base}/kubeconfig"
        self._kubernetes(
            "kube-controller-manager",
            kubeconfig,
            "--leader-elect=false",
            "--port=0",
            "--secure-port=0",
            "--root-ca-file=ca.crt",
            "--controllers=*,-nodeipam,-cloud-node-lifecycle,-service,-route",
            "--service-account-private-key-file=sa.key",
        )
        self._kubernetes("kube-scheduler", kubeconfig, "--leader-elect=false", "--port=0", "--secure-port=0")
        self._daemon(
            "kubelet",
            *self._within(),
            str(CACHE / "kubernetes"),
            "kubelet",
            kubeconfig,
            f"--config={self._kubelet_settings()}",
            f"--root-dir={self.base}/kubelet",
            f"--cert-dir={self.base}/pki",
            f"--docker-endpoint={self.env['DOCKER_HOST']}",
            "--pod-infra-container-image=lab/pause",
            f"--hostname-override={NODE}",
            "--runtime-cgroups=/",
        )
        wait_for(lambda: " Ready " in self.kubectl("get", "nodes", check=False), "the node to be ready")
        wait_for(lambda: self.kubectl("get", "serviceaccount", "default", check=False), "the default service account")

    def _make_place(self) -> None:
        """A mount namespace for dockerd and kubelet, so that what is mounted for pods is there for both and no other.

        In it /var/log is the node's own: every kubelet keeps logs in /var/log/pods, wherever its own directory is, and
        removes those of pods that it does not know. A second node on this machine would take the first one's.
        """
        done = self.base / "place"
        mounts = f"mount -t tmpfs tmpfs /var/log && mkdir /var/log/pods /var/log/containers && touch {done}"
        self._daemon("place", "unshare", "--mount", "sh", "-c", f"{mounts} && exec sleep infinity")
        wait_for(done.exists, "a mount namespace")

    def _within(self) -> list[str]:
        """What starts a program there."""
        return ["nsenter", f"--mount=/proc/{self._daemons['place'].pid}/ns/mnt", f"--wd={self.base}"]

    def _daemon(self, name: str, *command: str) -> None:
        with (self.base / "log" / f"{name}.log").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                env=self.env,
                cwd=self.base,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _kubernetes(self, name: str, *arguments: str) -> None:
        self._daemon(name, str(CACHE / "kubernetes"), name, *arguments)

    def start_server(self) -> None:
        """Start the API server; returns when it is ready."""
        self._kubernetes(
            "kube-apiserver",
            f"--etcd-servers={self._etcd_url}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={self._api_port}",
            "--tls-cert-file=server.crt",
            "--tls-private-key-file=server.key",
            "--client-ca-file=ca.crt",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-account-signing-key-file=sa.key",
            "--service-account-key-file=sa.pub",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--authorization-mode=RBAC",
            "--allow-privileged=true",
            "--endpoint-reconciler-type=none",
            "--profiling=false",
        )
        wait_for(lambda: self.kubectl("get", "--raw", "/readyz", check=False) == "ok", "the API server")

    def kill_server(self) -> None:
        """Kill the API server as a crash would."""
        self._daemons["kube-apiserver"].kill()
        self._daemons["kube-apiserver"].wait()

    def compact(self) -> None:
        """Let etcd forget all versions of objects but the newest: watches from an older one are answered 410."""
        revision = self._etcd("maintenance/status", {})["header"]["revision"]
        self._etcd("kv/compaction", {"revision": revision})

    def _etcd(self, path: str, question: dict[str, str]) -> dict[str, Any]:
        request = urllib.request.Request(f"{self._etcd_url}/v3/{path}", json.dumps(question).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            return dict(json.load(answer))

    def _make_keys(self) -> None:
        """Certificates of the server and of an administrator, key of the service accounts, kubeconfig."""

        def openssl(*arguments: str) -> None:
            subprocess.run(["openssl", *arguments], cwd=self.base, check=True, capture_output=True)

        new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        openssl("req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.crt", "-days", "30", "-subj", "/CN=lab")
        (self.base / "san").write_text("subjectAltName=IP:127.0.0.1\n")
        for name, subject in (("server", "/CN=kube-apiserver"), ("admin", "/O=system:masters/CN=admin")):
            openssl("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", subject)
            openssl(
                "x509",
                "-req",
                "-in",
                f"{name}.csr",
                "-CA",
                "ca.crt",
                "-CAkey",
                "ca.key",
                "-CAcreateserial",
                "-days",
                "30",
                "-out",
                f"{name}.crt",
                "-extfile",
                "san",
            )
        openssl("ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", "sa.key")
        openssl("pkey", "-in", "sa.key", "-pubout", "-out", "sa.pub")
        self._write_kubeconfig()

    def _write_kubeconfig(self) -> None:
        """The administrator's."""
        cluster = {"server": self.server, "certificate-authority": f"{self.base}/ca.crt"}
        user = {"client-certificate": f"{self.base}/admin.crt", "client-key": f"{self.base}/admin.key"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "lab",
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "me"}}],
            "clusters": [{"name": "lab", "cluster": cluster}],
            "users": [{"name": "me", "user": user}],
        }
        (self.base / "kubeconfig").write_text(yaml.safe_dump(config))

    def _docker_settings(self) -> Path:
        (self.base / "runc").write_text(RUNC.format(python=sys.executable, runc=shutil.which("runc")))
        (self.base / "runc").chmod(0o755)
        settings = {
            "iptables": False,
            "ip6tables": False,
            "bridge": "none",
            "data-root": f"{self.base}/docker",
            "exec-root": f"{self.base}/exec",
            "pidfile": f"{self.base}/docker.pid",
            "hosts": [self.env["DOCKER_HOST"]],
            "storage-driver": "overlay2",
            "shutdown-timeout": 1,
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "runtimes": {"lab": {"path": f"{self.base}/runc"}},
            "default-runtime": "lab",
        }
        (self.base / "daemon.json").write_text(json.dumps(settings))
        return self.base / "daemon.json"

    def _kubelet_settings(self) -> Path:
        settings = {
            "kind": "KubeletConfiguration",
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "address": "127.0.0.1",
            "port": self._kubelet_port,
            "healthzPort": 0,
            "cgroupDriver": "cgroupfs",
            "cgroupsPerQOS": False,
            "enforceNodeAllocatable": [],
            "evictionHard": {},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
        }
        (self.base / "kubelet.yaml").write_text(yaml.safe_dump(settings))
        return self.base / "kubelet.yaml"

    def _import_busybox(self) -> None:
        """Two images of one static program.

        They are lab/pause, which holds pods' namespaces, and lab/busybox for pods that need no more than a shell.
        """
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            tar.add(BUSYBOX, "bin/busybox")
            for name in ("sh", "sleep", "cat"):
                link = tarfile.TarInfo(f"bin/{name}")
                link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(link)
        hold = json.dumps(
            ["sh", "-c", "trap exit TERM; sleep 2147483647 & wait"]
        )  # a first process without a handler would ignore TERM
        for image, command in (("lab/pause", f"ENTRYPOINT {hold}"), ("lab/busybox", 'CMD ["sh"]')):
            subprocess.run(
                ["docker", "import", "--change", command, "-", image],
                env=self.env,
                input=archive.getvalue(),
                check=True,
                capture_output=True,
            )

    def stop(self) -> None:
        """End the kubelet first, so that nothing starts containers again, then these and all other daemons."""
        for name in ("kubelet", "kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd"):
            self._end(name)
        with contextlib.suppress(Exception):  # a node that did not come up has none
            self.run("sh", "-c", "docker ps --quiet | xargs --no-run-if-empty docker kill")
        self._end("dockerd")
        self._end("place")
        sweep(self.base)

    def _end(self, name: str) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        daemon.terminate()
        try:
            daemon.wait(30)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def sweep(base: Path) -> None:
    """Remove a node's directory with all that is mounted in it."""

    def unmounted() -> bool:
        mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for place in (inside := sorted((place for place in mounted if place.startswith(f"{base}/")), reverse=True)):
            subprocess.run(["umount", "--lazy", place], capture_output=True)  # a daemon that is ending may be faster
        return not inside

    wait_for(unmounted, f"{base} to be unmounted")
    shutil.rmtree(base, ignore_errors=True)


@contextlib.contextmanager
def node(keep_logs: Path | None = None) -> Iterator[Node]:
    """A running node; its pods and daemons end with the context. Logs of daemons are copied to `keep_logs`."""
    base = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))  # short: paths of sockets are limited to 108 bytes
    base.chmod(0o755)
    with (base / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for other in Path("/tmp").glob(f"{PREFIX}*/lock"):  # what a session left behind that was killed
            with contextlib.suppress(BlockingIOError, FileNotFoundError), other.open() as theirs:
                fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
                sweep(other.parent)
        one = Node(base)
        try:
            one.start()
            yield one
        finally:
            if keep_logs:
                shutil.copytree(base / "log", keep_logs, dirs_exist_ok=True)
            one.stop()
