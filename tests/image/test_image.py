"""The image, built for real and run under the restrictions that clusters put on containers."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import build
import pytest
from container import IMAGE, MARKS, USER, Container

from job.__main__ import COMMANDS
from job.errors import ExitCode

pytestmark = MARKS
STEPS = 200
SMALL = f"""
    --config-name demo model.hidden_size=32 model.n_blocks=1 model.n_heads=2 model.head_dim=16 model.cond_dim=32
    training.num_train_steps={STEPS} training.train_batch_size=2 training.eval_batch_size=8
    logging.log_freq=1 logging.eval_freq=0 logging.save_freq=0 logging.num_eval_batches=1 monitoring.port=9400
""".split()
TWO = ("torchrun", "--standalone", "--nproc_per_node=2", "-m", "job.train", *SMALL)
LGDLM = [
    "torchrun",
    "--standalone",
    "--nproc_per_node=1",
    "latentDLM_mmdit/train_mmdit_stable.py",
    "--config-name",
    "mmdit_cycle_vae",
    "loss.loss_type=cycle_vae",
]
LGDLM_OTHER_SCRIPT = [word.replace("_stable", "") for word in LGDLM]
NOT_WRITABLE = ["train", "data=synthetic", "logging.save_dir=/nowhere"]
SLOW_DISK = """import os, pathlib, time
fsync, opened = os.fsync, pathlib.Path.open
def slow(handle):
    if "/checkpoints/" in os.readlink(f"/proc/self/fd/{handle}"):
        time.sleep(4)
    fsync(handle)
def slowly_opened(path, *arguments, **options):
    # The run must not end before podman comes to stop it, which waits for builds that hold its storage.
    if path.name == "training_log.jsonl":
        time.sleep(0.5)
    return opened(path, *arguments, **options)
os.fsync, pathlib.Path.open = slow, slowly_opened
"""
INSIDE = """cat /proc/1/comm $(command -v torchrun)
which pip
ls -A /var/lib/apt/lists
find / -xdev ! -type l -perm -o+w ! -perm -1000 ! -path '/proc/*' ! -path '/dev/*' 2> /dev/null
find / -xdev -name .cache -path '/tmp/*' -prune -o -name .cache -print 2> /dev/null
cd /opt/cyclevae/lib/python3*/site-packages
find job hydra_plugins -type f
"""
Start = Callable[..., Container]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as it is now, in a clone of its own: nothing changes it while the tests run."""
    directory = tmp_path_factory.mktemp("source") / "clone"
    build.run("git", "clone", "--quiet", "--shared", build.ROOT, directory)
    for name in build.run(
        "git", "-C", build.ROOT, "ls-files", "--cached", "--others", "--exclude-standard"
    ).splitlines():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).unlink(missing_ok=True)
        if (build.ROOT / name).exists():
            shutil.copy2(build.ROOT / name, directory / name)
    return directory


@pytest.fixture(scope="session")
def labels(source: Path) -> dict[str, str]:
    """The labels of the image, once it is built."""
    build.image(source=source, tag=IMAGE)
    described: list[dict[str, dict[str, str]]] = json.loads(build.run("podman", "image", "inspect", IMAGE))
    return described[0]["Labels"]


@pytest.fixture(scope="session")
def built_again(
    labels: dict[str, str], source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Future[str]]:
    """The same once more without any cached layer, while other tests run.

    In another directory, and with other times and modes of the sources.
    """
    copied = shutil.copytree(source, tmp_path_factory.mktemp("again") / "copy", copy_function=shutil.copy)
    for path in copied.rglob("*"):
        path.chmod(0o777 if path.is_dir() or os.access(path, os.X_OK) else 0o666)
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(build.image, "--no-cache", "--layers=false", source=copied, tag="localhost/cyclevae:again")
    subprocess.run(["buildah", "rmi", "localhost/cyclevae:again"], env=build.environment(), capture_output=True)


@pytest.fixture(scope="session")
def start(
    labels: dict[str, str], built_again: Future[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Start]:
    """Starts containers, all with the same directories for runs and data."""
    directory, started = tmp_path_factory.mktemp("volumes"), []
    for name in ("runs", "data"):
        (directory / name).mkdir()
        (directory / name).chmod(0o775)  # of group 0

    def one(*arguments: str, **options: Any) -> Container:
        started.append(Container(directory, *arguments, **options))
        return started[-1]

    yield one
    for container in started:
        container.remove()


@pytest.fixture(scope="session")
def undisturbed(start: Start) -> Container:
    """Two processes that train on the embedded text from beginning to end."""
    prepared = start(
        "prepare", "--out", "data/demo", "--max-samples", "2000", "--vocab-size", "400", "--latent-dim", "8"
    )
    assert prepared.exit_code() == 0, prepared.said
    whole = start(*TWO, "logging.run_name=whole")
    assert whole.exit_code() == ExitCode.FINISHED, whole.said
    return whole


def losses(run: Path) -> list[tuple[int, float]]:
    return [
        (line["step"], line["loss"]) for line in map(json.loads, (run / "training_log.jsonl").read_text().splitlines())
    ]


def test_dockerfile_is_clean_to_hadolint() -> None:
    build.run(Path(sys.executable).with_name("hadolint"), build.ROOT / "Dockerfile")


def test_two_processes_train_on_the_embedded_text(undisturbed: Container) -> None:
    """Without network, capabilities or a writable root, as a user that does not exist."""
    run = undisturbed.directory / "runs/whole"
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    assert (run / "curves.png").exists()
    assert json.loads((run / "result.json").read_text())
    assert (run / "result.json").stat().st_uid == int(USER)


def test_a_stop_saves_however_slow_the_disk_is_and_the_run_goes_on(
    start: Start, undisturbed: Container, labels: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    tmp_path.chmod(0o755)
    slow_disk = (f"--volume={tmp_path}:/slow:ro", "--env=PYTHONPATH=/slow")
    run = undisturbed.directory / "runs/stopped"
    container = start(*TWO, "logging.run_name=stopped", options=slow_disk)
    container.wait_for(run / "training_log.jsonl", 10)
    metrics = container.execute(
        "python", "-c", "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9400/metrics').read().decode())"
    )
    container.stop(grace=120)
    assert container.exit_code() == ExitCode.STOPPED, container.said
    saving = re.search(r"stop: .* to the step's end, ([\d.]+) s to save", container.said)
    assert saving
    assert float(saving[1]) > 10  # what Docker waits by default, before it kills
    stopped_at = losses(run)[-1][0]
    assert 10 <= stopped_at < STEPS
    assert [path.name for path in (run / "checkpoints").glob("step_*")]

    again = start(*TWO, "logging.run_name=stopped")
    assert again.exit_code() == ExitCode.FINISHED, again.said
    assert f"from step {stopped_at} to {STEPS}" in again.said
    assert losses(run) == losses(undisturbed.directory / "runs/whole")

    build_info = next(line for line in metrics.splitlines() if line.startswith("cyclevae_build_info"))
    for name, label in (("version", "version"), ("commit", "revision"), ("built", "created")):
        assert f'{name}="{labels[f"org.opencontainers.image.{label}"]}"' in build_info


def test_a_compiled_run(start: Start) -> None:
    """The compiler writes to /tmp alone, and runs as a user that does not exist."""
    few_graphs = "loss.loss_type=l2t"  # to compile them is what takes the time
    compiled = ["training.compile_model=true", "training.num_train_steps=2", "logging.run_name=compiled"]
    container = start("train", "data=synthetic", *SMALL[2:], few_graphs, *compiled)
    assert container.exit_code(600) == ExitCode.FINISHED, container.said


def test_labels_say_what_was_built(labels: dict[str, str]) -> None:
    project = tomllib.loads((build.ROOT / "pyproject.toml").read_text())["project"]
    assert labels["org.opencontainers.image.title"] == project["name"]
    assert labels["org.opencontainers.image.version"] == project["version"]
    assert labels["org.opencontainers.image.description"] == project["description"].split(",")[0]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["org.opencontainers.image.revision"])
    assert labels["org.opencontainers.image.base.name"] == build.BASE


def test_a_launch_line_of_lgdlm_runs_unchanged(start: Start) -> None:
    container = start(
        *LGDLM, "data=synthetic", "training.num_train_steps=2", "logging.run_name=lgdlm", "training.eval_batch_size=4"
    )
    assert container.exit_code() == ExitCode.FINISHED, container.said
    assert (container.directory / "runs/lgdlm/result.json").exists()


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (LGDLM_OTHER_SCRIPT, ExitCode.FAILED, "error: data.dir is not set"),
        (NOT_WRITABLE, ExitCode.FAILED, "error: /nowhere: Read-only file system"),
        (["train", "training.num_train_stepz=1"], ExitCode.USAGE, "did you mean training.num_train_steps"),
        (["prepare"], ExitCode.USAGE, "--out"),
        (["trian"], ExitCode.USAGE, "usage: cyclevae COMMAND"),
        (["sh", "-c", "exit 7"], 7, ""),
        (["sh", "-c", "kill -KILL $$"], 137, ""),
    ],
)
def test_exit_codes_pass_through_and_mistakes_are_a_line(
    start: Start, command: list[str], code: int, words: str
) -> None:
    container = start(*command)
    assert container.exit_code() == code, container.said
    assert words in container.said
    assert "Traceback" not in container.said


def test_every_command_is_there(start: Start) -> None:
    container = start(
        "sh",
        "-c",
        f"for command in {' '.join(COMMANDS)}; do cyclevae $command --help > /dev/null || echo $command; done",
    )
    assert (container.exit_code(), container.said) == (0, "")


def test_what_is_in_the_image(start: Start, source: Path) -> None:
    """All of the package, an init, our torchrun; no pip, no cache; nothing that the user could change."""
    container = start("sh", "-c", INSIDE)
    assert container.exit_code() == 0, container.said
    init, *lines = container.said.splitlines()
    assert init == "tini"
    assert 'exec python -m job.runtime.torchrun "$@"' in lines
    assert not [line for line in lines if line.startswith("/")]
    known = build.run("git", "-C", source, "ls-files", "job", "configs", "hydra_plugins").splitlines()
    assert {re.sub("^configs/", "job/configs/", name) for name in known if (source / name).exists()} <= set(lines), (
        "pyproject.toml lists the packages"
    )


def test_a_tampered_wheel_fails_the_build(labels: dict[str, str], source: Path, tmp_path: Path) -> None:
    dockerfile = (source / "Dockerfile").read_text()
    tampered = tmp_path / "Dockerfile"
    copied = "COPY --from=wheel /wheel /wheel\n"
    tampered.write_text(
        dockerfile.replace(copied, copied + 'RUN for wheel in /wheel/*.whl; do echo >> "$wheel"; done\n')
    )
    with pytest.raises(RuntimeError, match="DO NOT MATCH THE HASHES"):
        build.image("--target=package", f"--file={tampered}", source=source, tag="localhost/cyclevae:tampered")


def test_only_the_wheel_that_was_asked_for_goes_in(labels: dict[str, str], source: Path, tmp_path: Path) -> None:
    """As for a release whose hash is known: WHEEL_SHA256 takes the same source, and no other."""
    build.image("--target=wheel", source=source, tag="localhost/cyclevae:wheel")
    requirement = build.run(
        "podman", "run", "--rm", "--network=none", "localhost/cyclevae:wheel", "cat", "/wheel/requirement.txt"
    )
    known = f"--build-arg=WHEEL_SHA256={requirement.strip().rpartition(':')[2]}"
    build.image("--target=package", known, source=source, tag="localhost/cyclevae:known")
    changed = shutil.copytree(source, tmp_path / "copy")
    with (changed / "job/train.py").open("a") as file:
        file.write("\n")
    with pytest.raises(RuntimeError, match="DO NOT MATCH THE HASHES"):
        build.image("--target=package", known, source=changed, tag="localhost/cyclevae:changed")
    build.run("buildah", "rmi", "localhost/cyclevae:wheel", "localhost/cyclevae:known")


def test_a_tampered_dependency_fails_the_build(labels: dict[str, str], source: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(source, tmp_path / "copy")
    lock = changed / "docker/build.lock"
    lock.write_text(re.sub(r"sha256:[0-9a-f]{2}", "sha256:00", lock.read_text()))
    with pytest.raises(RuntimeError, match="DO NOT MATCH THE HASHES"):
        build.image("--target=builder", source=changed, tag="localhost/cyclevae:tampered")


def test_the_same_again_gives_the_same_files(
    labels: dict[str, str], built_again: Future[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Type, mode, owner and content of every path, of two builds that share nothing but the base image.

    Cached layers keep the times of when they were made.
    """
    built_again.result()
    one, two = contents(IMAGE), contents("localhost/cyclevae:again")
    assert len(one) > 10_000
    assert {path for path in one | two if one.get(path) != two.get(path)} == set()
    with capfd.disabled():
        print(f"\nimage of {sum(entry[-1] for entry in one.values()) / 1e9:.2f} GB in {len(one)} files")


def contents(tag: str) -> dict[str, tuple[Any, ...]]:
    """What an image holds: type and mode, owner, group, content, size, by path."""
    container = build.run("buildah", "from", tag).strip()
    found: dict[str, tuple[Any, ...]] = {}
    try:
        root = build.run("buildah", "mount", container).strip()
        for folder, folders, files in os.walk(root):
            for path in (f"{folder}/{name}" for name in (*folders, *files)):
                is_link, status = os.path.islink(path), os.lstat(path)
                content = os.readlink(path) if is_link else ""
                if not is_link and os.path.isfile(path):
                    with open(path, "rb") as file:
                        content = hashlib.file_digest(file, "sha256").hexdigest()
                size = status.st_size if content else 0
                found[path.removeprefix(root)] = (status.st_mode, status.st_uid, status.st_gid, content, size)
    finally:
        build.run("buildah", "rm", container)
    return found
