"""Whether a rank comes to the store at which the torchrun of its node met the others.

Pods of a job are started again one by one. So a torchrun may still meet the attempt that is just ending, and seconds
later, when PyTorch is loaded, its ranks come to the store of the next one at the same address. There the other torchrun
waits for a torchrun of this node, and these ranks wait for those that it would start: five minutes, until one gives up.

So every store has a mark, which the first to ask leaves there. torchrun asks before it meets the others and hands the
mark to its ranks, and they ask again. Only where torchrun is given the node that keeps the store (its static
rendezvous): its other kinds hold on to their store themselves.
"""

from __future__ import annotations

from argparse import Namespace
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from job.errors import LostRankError
from job.runtime.launcher_variables import DEFAULT_PORT

KEY = "cyclevae/mark"
PATIENCE_SECONDS = 600  # torchrun's own, unless its --rdzv-conf has a timeout


def mark_of(store: dist.Store) -> str:
    """A word that all get who ask this store, and no other store gives."""
    return store.compare_set(KEY, "", uuid4().hex).decode()


def mark_for(options: Namespace) -> str | None:
    """The mark of the store at which torchrun, called with these options, will meet the others; waits for that store.

    None where this node keeps it, or torchrun holds on to it. Raises DistNetworkError when it does not come.
    """
    if options.standalone or options.rdzv_backend != "static" or options.node_rank == 0:
        return None
    given = dict(part.split("=", 1) for part in options.rdzv_conf.split(",") if "=" in part)
    host, port = parse_rendezvous_endpoint(
        options.rdzv_endpoint or options.master_addr, options.master_port or DEFAULT_PORT
    )
    patience = timedelta(seconds=int(given.get("timeout", PATIENCE_SECONDS)))
    return mark_of(dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience))


def refuse_another(store: dist.Store, mark: str | None) -> None:
    """LostRankError unless the store has the mark that torchrun found there; None: it found none."""
    if mark is not None and mark_of(store) != mark:
        raise LostRankError(
            "the node where the ranks meet was started again after the torchrun of this node had met it: this one must "
            "be started again too"
        )
