"""A cluster as CYCLEVAE_TEST_KUBECONFIG wants it, on a machine that has none: the tests' own node, operators played.

    python tests/k8s/stand_in.py

As root, with what `make k8s-tools` installs. Prints what to export, and ends with Ctrl-C. Like a cluster that is there
it has operators, a namespace with the two claims, and the image; it lacks a pod network and a second node.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import tempfile
from pathlib import Path

import yaml
from k8s_access import KUBECONFIG
from k8s_claims import volumes
from k8s_lab import define, define_pytorch_jobs, load_image
from k8s_node import node
from k8s_operator import TrainingOperator
from k8s_runs import ROOT
from k8s_trainer import Kueue, Trainer

NAMESPACE = "lab"
# All pods are on the node's own network, and its image is in its own dockerd.
POD = {"hostNetwork": True}


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), node() as one, tempfile.TemporaryDirectory() as directory:
        define_pytorch_jobs(one)
        for group_version in ("trainer.kubeflow.org/v1alpha1", "kueue.x-k8s.io/v1beta1"):
            define(one, group_version)
        players = [TrainingOperator(one), Trainer(one), Kueue(one, manages=("pytorchjobs", "trainjobs"))]
        one.kubectl("create", "namespace", NAMESPACE)
        one.kubectl("config", "set-context", "--current", f"--namespace={NAMESPACE}")
        one.kubectl("create", "--filename=-", stdin=yaml.safe_dump_all(volumes(NAMESPACE, Path(directory))))
        one.kubectl("apply", "--filename", str(ROOT / "k8s" / "base" / "claims.yaml"))
        queue = {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "LocalQueue", "metadata": {"name": "gold"}}
        one.kubectl("create", "--filename=-", stdin=json.dumps(queue))
        load_image(one)
        print(f"export {KUBECONFIG}={one.env['KUBECONFIG']} CYCLEVAE_TEST_IMAGE=cyclevae:test")
        print(f"export CYCLEVAE_TEST_QUEUE=gold CYCLEVAE_TEST_POD='{json.dumps(POD)}'", flush=True)
        signal.pause()
        for player in players:
            player.stop()
    sys.exit()


if __name__ == "__main__":
    main()
