"""Functions run in several processes at once, for tests of what they do together."""

import multiprocessing
from collections.abc import Callable

import torch.multiprocessing

# Imported once, by the process that all others are forks of: it takes a process longer than most tests. What is not
# installed, such as the tests themselves, that process does not find.
IMPORTED = ["pytest", "torch._dynamo.testing", "evkernels.nn", "evkernels.alignment", "evkernels.train.trainer"]


def run(function: Callable, arguments: tuple, count: int = 2) -> None:
    """Calls ``function(rank, *arguments)`` in `count` processes; raises what it raises in one of them."""
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    if can_fork:
        multiprocessing.set_forkserver_preload(IMPORTED)
    method = "forkserver" if can_fork else "spawn"
    torch.multiprocessing.start_processes(function, arguments, nprocs=count, start_method=method)
