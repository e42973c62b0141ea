"""Whether the ranks of this machine can talk: an all-reduce between them, over NCCL on GPUs and gloo without."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from job.checks import Check, trouble, well

SECONDS = 120.0
MEGABYTES = {"nccl": 256, "gloo": 16}
REPEATS = 5


def loopback_check(gpus: int, seconds: float = SECONDS) -> Check:
    """Start a process for each GPU, or two without any, and let them sum a tensor."""
    backend, ranks = ("nccl", gpus) if gpus else ("gloo", 2)
    name = f"{backend} loop-back"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [backend, str(ranks), str(port)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "job.health.loopback", str(rank), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        until = time.monotonic() + seconds
        said = [process.communicate(timeout=max(0.1, until - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        return trouble(
            name,
            f"{ranks} processes did not come together within {seconds:.0f} s",
            "look at NCCL_DEBUG=INFO; NCCL_P2P_DISABLE=1 tells a fault between GPUs from one of the network",
        )
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = next((err for process, (_, err) in zip(processes, said, strict=True) if process.returncode), None)
    if failed is not None:
        reason = failed.strip().splitlines()[-1] if failed.strip() else "no word of why"
        remedy = "look at the loopback interface and NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
        return trouble(name, f"{ranks} processes cannot sum a tensor: {reason}", remedy)
    return well(name, f"{ranks} processes sum {MEGABYTES[backend]} MB at {float(said[0][0]):.2g} GB/s")


def main(rank: int, backend: str, ranks: int, port: int) -> None:
    """One of the processes: prints gigabytes a second, or fails."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=SECONDS),
    )
    tensor = torch.ones(MEGABYTES[backend] * 250_000, device=device)
    dist.all_reduce(tensor)
    if float(tensor[0]) != ranks or float(tensor[-1]) != ranks:
        raise SystemExit(f"the sum of {ranks} ones came out as {float(tensor[0]):g}")
    started = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(tensor)
    last = float(tensor[0])  # waits for the device
    seconds = (time.perf_counter() - started) / REPEATS
    dist.destroy_process_group()
    if last:
        print(MEGABYTES[backend] / 1000 / seconds)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
