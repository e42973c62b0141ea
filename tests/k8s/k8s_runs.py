"""What the Kubernetes tests do with runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from k8s_node import Node

ROOT = Path(__file__).parent.parent.parent


def cyclevae(kubernetes: Node, *arguments: str, kubeconfig: Path | None = None, seconds: float = 240) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS...` with the cluster as the current one."""
    env = {**kubernetes.env, "KUBECONFIG": str(kubeconfig or kubernetes.env["KUBECONFIG"])}
    return subprocess.run([sys.executable, *arguments], env=env, cwd=ROOT, text=True, capture_output=True, timeout=seconds)
