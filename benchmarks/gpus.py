# SPDX-License-Identifier: Apache-2.0
"""Work that is spread over GPUs: several processes at a time, each of which sees one GPU alone."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import TypeVar

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def visible(gpu: int) -> str:
    """The name of a GPU, of those that this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(gpu) if not given else given.split(",")[gpu]


def environment(gpu: int | None) -> dict[str, str] | None:
    """That of a process which sees one GPU; None: as this process."""
    return None if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": visible(gpu)}


def spread(
    work: Callable[[Item, int | None], Outcome], items: Iterable[Item], workers: int, gpus: int
) -> Iterator[Outcome]:
    """What comes of all items, in their order: so many at a time, each on a GPU that has the fewest others.

    Args:
        work: Takes an item and the number of its GPU, None without GPUs.
        items: What is worked on.
        workers: At a time, over all GPUs.
        gpus: Numbers 0 to `gpus - 1` are used; 0: all as this process.
    """
    free: Queue[int | None] = Queue()
    for worker in range(workers):
        free.put(worker % gpus if gpus else None)

    def one(item: Item) -> Outcome:
        gpu = free.get()
        try:
            return work(item, gpu)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(one, items)
