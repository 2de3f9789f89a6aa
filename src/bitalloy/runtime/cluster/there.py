"""A call on a node of a cluster that carries a resource, which the call holds alone."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from bitalloy.core.errors import BitalloyError
from bitalloy.runtime.cluster.executor import SCHEME, SETTLE_S, connect, imported_ray, threads_of_workers

Result = TypeVar("Result")

OWN_RESOURCES = frozenset({"CPU", "GPU", "memory", "object_store_memory"})
"""Resources that Ray gives nodes by itself."""
POLL_S = 1.0
"""Seconds after which what the call shows is looked at again."""
END_S = 30
"""Seconds within which a call must end that is stopped."""


def call_there(
    address: str,
    resource: str,
    call: Callable[..., Result],
    arguments: Sequence[object],
    *,
    watch: Callable[[], None],
    tell: Callable[[str], object],
) -> Result:
    """Call a function on a node that carries a resource; no other call of this kind is on that node meanwhile.

    Args:
        address: `ray://HOST:PORT` of a cluster that runs, in which this machine is.
        resource: a custom resource, of which each node of the target has 1.
        call: a function that nodes can import.
        arguments: its arguments.
        watch: called about every second until the call has ended, and then once more.
        tell: called with a sentence where the call must wait for a node.

    Raises:
        BitalloyError: no node carries the resource, the cluster cannot be reached, the node is lost, or `call` raises.
    """
    if not address.startswith(SCHEME):
        raise BitalloyError(f"--measure-on {resource} needs a cluster that runs: --executor ray://HOST:PORT.")
    if not re.fullmatch(r"[A-Za-z_][\w.-]{0,79}", resource) or resource in OWN_RESOURCES:
        raise BitalloyError(f"--measure-on is '{resource[:80]}'; expected local, or a custom resource such as target.")
    ray = imported_ray(f"--measure-on {resource}")
    begun = not ray.is_initialized()
    if begun:
        connect(ray, address)
    try:
        _check_nodes(ray, address, resource)
        if not _is_free(ray, resource):
            tell(f"Every node with '{resource}' is taken by another command; this one waits for it.")
        kind = ray.remote(call).options(
            num_cpus=0, resources={resource: 1}, max_retries=0, runtime_env=threads_of_workers()
        )
        result: Result = _awaited(ray, kind.remote(*arguments), watch)
        return result
    finally:
        if begun:
            ray.shutdown()


def _is_free(ray: Any, resource: str) -> bool:
    """Tell whether a node with the resource has it to give; Ray knows of one that was given back a little later."""
    end = time.monotonic() + SETTLE_S
    while ray.available_resources().get(resource, 0) < 1:
        if time.monotonic() >= end:
            return False
        time.sleep(0.1)
    return True


def _check_nodes(ray: Any, address: str, resource: str) -> None:
    amounts = [node["Resources"].get(resource, 0) for node in ray.nodes() if node["Alive"]]
    start = f"`ray start --address={address.removeprefix(SCHEME)} --resources '{{\"{resource}\": 1}}'`"
    if not any(amounts):
        raise BitalloyError(
            f"None of the {len(amounts)} nodes of the cluster carries '{resource}'. Start those of the target with "
            f"{start}."
        )
    if any(amount not in (0, 1) for amount in amounts):
        raise BitalloyError(
            f"A node carries {max(amounts):g} of '{resource}', so that as many commands would measure there at once. "
            f"Start it with {start}."
        )


def _awaited(ray: Any, reference: Any, watch: Callable[[], None]) -> Any:
    try:
        while not ray.wait([reference], timeout=POLL_S)[0]:
            watch()
        return ray.get(reference)
    except KeyboardInterrupt:
        with suppress(ray.exceptions.RayError):
            ray.cancel(reference)
            ray.wait([reference], timeout=END_S)
        raise
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except ray.exceptions.RayError as error:
        raise BitalloyError(
            f"The node that runs the command is lost: {str(error).splitlines()[0]} What is done is kept, and the same "
            "command goes on from here."
        ) from error
    finally:
        watch()
