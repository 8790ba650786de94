"""Recordings over workers: this process, processes of this machine, or a Dask cluster, all as one executor.

concurrent.futures and Dask do the scheduling. Processes are spawned, because a forked one inherits torch's threads in
an unknown state, and end when this one does, even by SIGKILL: otherwise they would write on beside a rerun.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import torch
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from evkernels.arguments import InputError
from evkernels.demo.terminal import Terminal
from evkernels.events.optional import require
from evkernels.preprocess.convert import Result, convert, settled
from evkernels.preprocess.settings import Settings

_CONNECT_SECONDS = 10


@contextmanager
def workers(jobs: int, scheduler: str | None, recordings: int) -> Iterator[Executor | None]:
    """What runs the conversions of so many recordings; None is this process.

    Raises:
        InputError: if the scheduler does not answer.
        ImportError: without Dask.
    """
    jobs = min(jobs, recordings)
    if scheduler:
        distributed = require("distributed", "dask", "--scheduler")
        try:
            client = distributed.Client(scheduler, timeout=_CONNECT_SECONDS)
        except (OSError, ValueError, ImportError) as error:
            raise InputError(f"--scheduler {scheduler}: expected a Dask scheduler, got: {error}") from error
        with client:
            if not client.scheduler_info()["workers"]:
                Terminal().line(f"--scheduler {scheduler} has no workers yet: waiting for one")
            # A recording is written once; tried again on another worker it would only die again.
            yield client.get_executor(pure=False, retries=0)
    elif jobs == 1:
        yield None
    else:
        threads = max(1, torch.get_num_threads() // jobs)
        context = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(threads,))
        try:
            yield executor
        finally:
            executor.shutdown(cancel_futures=True)


def run(
    pairs: list[tuple[Path, Path]],
    settings: Settings,
    overwrite: bool,
    start: Callable[[int], AbstractContextManager[Executor | None]],
) -> int:
    """Converts all recordings, shows how far it is, and says at the end what became of them.

    Args:
        pairs: Recordings and the folders of their results.
        settings: What to make.
        overwrite: Make again what is there.
        start: From the number of recordings that are not finished, if there are any, to what runs them.

    Returns:
        The exit code.
    """
    terminal = Terminal()
    begin = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    with Progress(*columns, console=terminal.console, transient=True, disable=not terminal.watched) as progress:
        whole = progress.add_task("recordings", total=len(pairs))
        # Closed before anything else is done, whatever happens: then no worker writes on.
        with closing(_results(pairs, settings, overwrite, start, progress)) as made:
            for result in made:
                results.append(result)
                progress.advance(whole)
                _say(terminal, result)
    _summary(terminal, results, time.perf_counter() - begin)
    outcomes = {result.outcome for result in results}
    return 1 if "failed" in outcomes else 2 if "bad input" in outcomes else 0


def _results(pairs, settings: Settings, overwrite: bool, start, progress: Progress) -> Iterator[Result]:
    """Those known without work first: workers take seconds to start, a finished file a millisecond to look at."""
    left = []
    for source, folder in pairs:
        result = settled(source, folder, settings, overwrite)
        if result is None:
            left.append((source, folder))
        else:
            yield result
    if left:
        with start(len(left)) as executor:
            if executor is None:
                yield from _here(left, settings, overwrite, progress)
            else:
                yield from _there(left, settings, overwrite, executor)


def _here(pairs, settings: Settings, overwrite: bool, progress: Progress) -> Iterator[Result]:
    for source, folder in pairs:
        task = progress.add_task(escape(source.name), total=None)
        yield convert(
            source,
            folder,
            settings,
            overwrite,
            lambda done, total, task=task: progress.update(task, completed=done, total=total),
        )
        progress.remove_task(task)


def _there(pairs, settings: Settings, overwrite: bool, executor: Executor) -> Iterator[Result]:
    futures = {executor.submit(convert, source, folder, settings, overwrite): source for source, folder in pairs}
    for future in as_completed(futures):
        lost = future.cancelled() or isinstance(future.exception(), BrokenProcessPool)
        if not lost and future.exception() is None:
            yield future.result()
            continue
        if lost:
            reason = "its worker was lost; the same command goes on"
        else:
            # A fault of the program: whoever reports it needs to see where.
            traceback.print_exception(future.exception())
            reason = f"{type(future.exception()).__name__}: {future.exception()}"
        yield Result(futures[future], "failed", message=" ".join(f"{futures[future]}: {reason}".split()))


def _say(terminal: Terminal, result: Result) -> None:
    if result.outcome == "written":
        rate = result.events / max(result.seconds, 1e-9)
        terminal.line(
            f"{result.source}: {result.events:,} events in {result.windows:,} windows, {result.seconds:.1f} s, "
            f"{rate:,.0f} events/s"
        )
    elif result.outcome == "finished before":
        terminal.line(f"{result.source}: skipped, finished before")
    else:
        print(f"evkernels preprocess: {result.message}", file=sys.stderr, flush=True)
    for note in result.notes:
        terminal.line(note)


def _summary(terminal: Terminal, results: list[Result], seconds: float) -> None:
    by = {
        outcome: [r for r in results if r.outcome == outcome] for outcome in dict.fromkeys(r.outcome for r in results)
    }
    counts = ", ".join(f"{len(group)} {outcome}" for outcome, group in by.items())
    events, windows = (sum(getattr(result, name) for result in results) for name in ("events", "windows"))
    rate = events / max(seconds, 1e-9)
    terminal.line(
        f"{len(results)} recordings: {counts}; {events:,} events in {windows:,} windows, {seconds:.1f} s, "
        f"{rate:,.0f} events/s"
    )
    for result in [*by.get("bad input", []), *by.get("failed", [])]:
        terminal.line(f"  {result.outcome}: {result.source}")


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
