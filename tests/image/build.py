"""Builds the real image on a machine that can pull none.

Its base is a Debian made by debootstrap, its PyTorch the one that pip finds here.

    python tests/image/build.py                     # localhost/cyclevae:test, in a storage of its own
    python tests/image/build.py --archive FILE.tar  # and writes it as `docker load` and `podman load` read it
    python tests/image/build.py --load              # and loads it into the docker daemon of DOCKER_HOST
    python tests/image/build.py --clean             # removes base, storage and cached layers

From Python (with this directory on sys.path): `build.image()`, `build.archive(path)`, `build.load(docker_host)`. As
root; `make image-tools` installs the programs. The first build of a day takes minutes and is kept in
~/.cache/cyclevae/image; with nothing changed the next takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cyclevae" / "image"
PROGRAMS = ("buildah", "podman", "runc", "debootstrap")
# Made anew every day, as Debian's updates come in: cached and new layers are to have the same packages.
BASE = f"localhost/base:{datetime.date.today()}"
IMAGE = "localhost/cyclevae:test"
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"
STORAGE = """[storage]
driver = "overlay"
graphroot = "{cache}/storage"
runroot = "{cache}/run"
"""
# Host network, cgroupfs and small limits, because this may itself be a container. Locks in files instead of shared
# memory, because other podmans may use that.
CONTAINERS = """[containers]
default_ulimits = ["nofile=1024:4096", "nproc=8192:8192"]
netns = "host"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = "{cache}/tmp"
"""


@cache
def environment() -> dict[str, str]:
    """Environment in which buildah and podman use our storage and nobody else's.

    Whoever finds it unused removes the containers of killed processes, and the images of other days.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    for name, text in (("storage.conf", STORAGE), ("containers.conf", CONTAINERS)):
        (CACHE / name).write_text(text.format(cache=CACHE))
    env = {
        **os.environ,
        "CONTAINERS_STORAGE_CONF": f"{CACHE}/storage.conf",
        "CONTAINERS_CONF": f"{CACHE}/containers.conf",
    }
    users = os.open(CACHE / "users", os.O_RDWR | os.O_CREAT)  # stays open, and so locked, as long as this process lives
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for program, *force in (("podman", "--force"), ("buildah",)):
            subprocess.run([program, "rm", "--all", *force], env=env, capture_output=True)
        if subprocess.run(["buildah", "inspect", "--type=image", BASE], env=env, capture_output=True).returncode:
            subprocess.run(["buildah", "rmi", "--all", "--force"], env=env, capture_output=True)
    fcntl.flock(users, fcntl.LOCK_SH)
    return env


def run(*command: str | Path, **kwargs: str) -> str:
    """Run a program to its end; returns what it printed. RuntimeError with the end of its output when it fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment() | kwargs
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stdout[-3000:]}")
    return done.stdout


def pip_options() -> dict[str, str]:
    """What this machine's pip is told about indexes, files and variables alike."""
    listed = run(sys.executable, "-m", "pip", "config", "list")
    return {
        name: value
        for name, value in re.findall(r"^[\w:]+\.([\w-]+)='(.*)'$", listed, re.MULTILINE)
        if name in ("index-url", "extra-index-url", "find-links", "trusted-host")
    }


def base() -> None:
    """Make the base, with this machine's certificates and pip's options, unless it is there."""
    if BASE in run("buildah", "images", "--noheading", "--format", "{{.Name}}:{{.Tag}}").splitlines():
        return
    with tempfile.TemporaryDirectory(prefix="cyclevae-base-") as scratch:
        root = Path(scratch) / "root"
        run("debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", root)
        shutil.copy(f"/{CERTIFICATES}", root / CERTIFICATES)
        for own in Path("/usr/local/share/ca-certificates").glob("*.crt"):
            shutil.copy(own, root / "usr/local/share/ca-certificates")
        (root / "etc/pip.conf").write_text(
            "\n".join(["[global]", f"cert = /{CERTIFICATES}", *(f"{k} = {v}" for k, v in pip_options().items())]) + "\n"
        )
        shutil.rmtree(root / "var/cache/apt/archives")
        run("tar", "--create", "--directory", root, "--file", f"{scratch}/base.tar", ".")
        container = run("buildah", "from", "scratch").strip()
        run("buildah", "add", container, f"{scratch}/base.tar", "/")
        run("buildah", "commit", "--rm", container, BASE)


def image(*options: str, source: Path = ROOT, tag: str = IMAGE, **variables: str) -> str:
    """Build the image of a source tree with docker/build; returns the build's output.

    `options` go to buildah, `variables` into its environment.
    """
    base()
    torch = next(line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("torch=="))
    places = {
        Path(place.removeprefix("file://").removesuffix("/simple"))
        for value in pip_options().values()
        for place in value.split()
    }
    mounts = [f"--volume={place}:{place}:ro" for place in sorted(places) if place.is_dir()]
    return run(
        source / "docker/build",
        "--isolation=chroot",
        *mounts,
        f"--build-arg=BASE_IMAGE={BASE}",
        f"--build-arg=TORCH={torch}",
        *options,
        BUILDER="buildah",
        TAG=tag,
        **variables,
    )


def archive(path: Path, tag: str = IMAGE) -> Path:
    """Write the built image as `docker load` reads it, named cyclevae:test there."""
    path.unlink(missing_ok=True)
    run("buildah", "push", "--quiet", tag, f"docker-archive:{path}:cyclevae:test")
    return path


def load(docker_host: str, tag: str = IMAGE, docker: str = "docker") -> None:
    """Load the built image into a docker daemon as cyclevae:test."""
    with tempfile.TemporaryDirectory(prefix="cyclevae-image-") as scratch:
        run(docker, "load", "--quiet", "--input", archive(Path(scratch) / "image.tar", tag), DOCKER_HOST=docker_host)


def clean() -> None:
    """Remove base, storage and cached layers."""
    if CACHE.exists():
        run("buildah", "rmi", "--all", "--force")
        if os.path.ismount(CACHE / "storage/overlay"):
            run("umount", "--lazy", CACHE / "storage/overlay")
        shutil.rmtree(CACHE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the image on a stand-in for its base.")
    parser.add_argument("--archive", type=Path, help="write it there")
    parser.add_argument("--load", action="store_true", help="load it into the docker daemon of DOCKER_HOST")
    parser.add_argument("--clean", action="store_true", help="remove base, storage and cached layers")
    arguments = parser.parse_args()
    if arguments.clean:
        return clean()
    image()
    if arguments.archive:
        archive(arguments.archive)
    if arguments.load:
        load(os.environ["DOCKER_HOST"])
    return None


if __name__ == "__main__":
    main()
