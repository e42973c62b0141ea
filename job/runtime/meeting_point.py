"""Where the ranks of a run under srun meet: whether that place is known and free. It needs no torch.

PyTorch's store would try an unknown name for ten minutes. A port that another program has ends rank 0 at once, but
without a word of whose port it was, while the others wait for that program's answer.
"""

from __future__ import annotations

import socket
import time

from job.errors import RetryError, UserError
from job.runtime.launcher_variables import Placement

LOOKUP_SECONDS = 30.0  # a name server may be busy when a thousand ranks ask at once


def find_meeting_point(here: Placement, node: str) -> None:
    """Look up where the ranks meet, and on rank 0 see whether the port is free. `node` is this host's name.

    UserError for a MASTER_ADDR that is no host; RetryError for a node that cannot be looked up, or a port in use.
    """
    look_up(here, node)
    if here.rank == 0:
        refuse_taken_port(here, node)


def look_up(here: Placement, node: str) -> None:
    """Find the address of the host where the ranks meet."""
    end = time.monotonic() + LOOKUP_SECONDS
    while True:
        try:
            socket.getaddrinfo(here.address, here.port)
            return
        except socket.gaierror as error:
            if time.monotonic() < end:
                time.sleep(1.0)
            elif here.address_given:
                raise UserError(
                    f"MASTER_ADDR={here.address} is no host that {node} knows ({error.strerror}); unset it, and the "
                    "ranks meet at the job's first node"
                ) from error
            else:
                raise RetryError(
                    f"{node} cannot look up {here.address}, the job's first node ({error.strerror}); export "
                    "MASTER_ADDR where the nodes know each other by other names"
                ) from error


def refuse_taken_port(here: Placement, node: str) -> None:
    """Try the port on which the store will listen."""
    # As the store does, which takes a port whose last connections are only waiting to be forgotten. On Linux another
    # listener is still found: bind fails.
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", here.port))
            probe.listen(1)
        except OSError as error:
            advice = "the next start takes another port"
            if here.port_given:
                advice = "MASTER_PORT is set; without it every job has a port of its own"
            raise RetryError(f"port {here.port} of {node} is not free ({error.strerror}): {advice}") from error
