"""Generates the pictures of an evaluation into its folder, and measures them there.

What is there already is taken. With several processes each generates its share of the batches. Memory does not grow
with the number of pairs: pictures are written when they are generated, and read when they are measured or shown.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from PIL import Image

from t2i_adapter.evaluation.pairs import StoredPairs
from t2i_adapter.evaluation.plan import Column, Plan
from t2i_adapter.evaluation.processes import Processes
from t2i_adapter.evaluation.progress import Progress
from t2i_adapter.evaluation.store import LazySequence, PictureStore, picture_name
from t2i_adapter.models.family import AdapterPipeline


def read_conditions(pairs: StoredPairs, processes: Processes) -> None:
    """Reads every pair once and stores its condition; each process takes its share. Raises UserError for a bad row."""
    share = range(processes.rank, len(pairs), processes.world)
    with Progress(len(share), "reading", "pair", is_shown=processes.is_main) as progress:
        for _ in pairs.check(share):
            progress.advance(1)


def produce(
    plan: Plan,
    columns: Sequence[Column],
    store: PictureStore,
    open_pipeline: Callable[[], AdapterPipeline],
    processes: Processes,
) -> Mapping[str, Sequence[Sequence[Image.Image]]]:
    """Generates this process's share of the pictures that are missing, and waits for the other processes.

    A batch with a missing picture is generated whole, so that its pictures are the same bits as in an uninterrupted
    evaluation; only what is missing is written. The pipeline is opened if pictures are missing.

    Returns column -> the K pictures of each pair, which are read when they are asked for.
    """
    work = []
    for block in plan.blocks()[processes.rank :: processes.world]:
        missing = [
            column
            for column in columns
            if not all(store.has(column.name, picture_name(i, block.number)) for i in block.indices)
        ]
        if missing:
            work.append((block, missing))
    total = sum(len(block.indices) * len(missing) for block, missing in work)
    if processes.is_main:
        _report(plan, columns, total, processes)
    if work:
        pipeline = open_pipeline()
        if processes.is_main:
            plan.warn(pipeline)
        share = f" (process 1 of {processes.world})" if processes.world > 1 else ""
        with Progress(total, f"generating{share}", is_shown=processes.is_main) as progress:
            for block, missing in work:
                for column, images in plan.generate(pipeline, block, missing):
                    for index, image in zip(block.indices, images, strict=True):
                        name = picture_name(index, block.number)
                        if not store.has(column.name, name):
                            store.save(column.name, name, image)
                    progress.advance(len(images))
    processes.meet()
    return {column.name: _stored(store, column.name, plan) for column in columns}


def _report(plan: Plan, columns: Sequence[Column], total: int, processes: Processes) -> None:
    """Prints how many pictures are taken from the folder. With several processes this one counts its own share."""
    share = plan.blocks()[processes.rank :: processes.world]
    planned = sum(len(block.indices) for block in share) * len(columns)
    if total < planned:
        whose = f" of process 1 of {processes.world}" if processes.world > 1 else ""
        print(f"{planned - total} of {planned} pictures{whose} are there already", file=sys.stderr, flush=True)


def _stored(store: PictureStore, column: str, plan: Plan) -> Sequence[Sequence[Image.Image]]:
    def pair(index: int) -> Sequence[Image.Image]:
        return LazySequence(plan.pictures, lambda number: store.load(column, picture_name(index, number)))

    return LazySequence(len(plan.prompts), pair)
