"""The verb `train`: from options to a finished adapter. Importing this module loads no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from t2i_adapter.config import recipe
from t2i_adapter.config.tree import Config, seconds_of
from t2i_adapter.errors import Stopped, UserError, redact
from t2i_adapter.files import show_command, show_path, user_path
from t2i_adapter.imports import preload

if TYPE_CHECKING:
    from t2i_adapter.export.hub import Place
    from t2i_adapter.training.events import Callback
    from t2i_adapter.training.setup import Setup
    from t2i_adapter.training.signals import Stopper


def run(
    config: Config,
    *,
    dry_run: bool = False,
    stop_after: int | None = None,
    summary: bool = True,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Trains an adapter.

    dry_run: prints the options and the plan, and returns before a file is written or a weight is loaded.
    stop_after: a step after which the run stops as if `max_time` were reached. summary: prints one at the end.
    callbacks: get an `Event` for each entry of the log.

    Raises UserError as early as an error can be found, and Stopped if a signal or a limit ends the run early.
    """
    if config.data.part:
        raise UserError(f"{config.data.part}: `prepare` alone encodes a part; omit it.", option="data.part")
    preload("t2i_adapter.training.setup")
    from t2i_adapter.training.numerics import restored_switches
    from t2i_adapter.training.signals import Stopper

    config = replace(config, output_dir=str(user_path(config.output_dir)))  # "~" from a recipe or behind "="
    limit = config.train.max_time
    try:
        with Stopper(seconds_of(limit) if limit else None, stop_after) as stopper, restored_switches():
            _run(config, stopper, dry_run, summary, callbacks)
    except Stopped as stop:
        is_main = os.environ.get("RANK", "0") == "0"
        raise Stopped(f"{stop}{_resume_advice(config)}" if is_main else "", stop.code) from None
    except Exception as fault:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            rank = f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
            print(redact(f"{rank} fails: {type(fault).__name__}: {fault}"), file=sys.stderr, flush=True)
        raise


def _run(config: Config, stopper: Stopper, dry_run: bool, summary: bool, callbacks: Sequence[Callback]) -> None:
    from t2i_adapter.runs.lock import lock
    from t2i_adapter.runs.page import write_report
    from t2i_adapter.runs.record import run_record
    from t2i_adapter.training import checkpoint, tracking
    from t2i_adapter.training.publish import publish
    from t2i_adapter.training.resume import versions
    from t2i_adapter.training.setup import make_trainer, set_up, write_options
    from t2i_adapter.training.summary import describe_end

    setup = set_up(config)
    accelerator = setup.accelerator
    accelerator.print(setup.describe(), flush=True)
    if dry_run:
        accelerator.print(f"Options\n{recipe.dump(config)}")
        return
    if setup.resume and _is_finished(setup, setup.resume):
        place = show_path(config.output_dir)
        accelerator.print(f"Finished already, with {show_path(setup.resume)}: the adapter is in {place}.")
        return
    folder = Path(config.output_dir)
    with ExitStack() as stack:
        place = None
        if accelerator.is_main_process:
            stack.enter_context(lock(folder))
            checkpoint.tidy(folder)
            place = _find_repository(config, is_resumed=setup.resume is not None)
            write_options(config, setup.plan)
            if setup.resume is None:  # a run killed before its first checkpoint may have left lines
                tracking.truncate_metrics(folder / "metrics.jsonl", 0)
            stack.callback(write_report, folder)  # after the record of how the run ended
            record = run_record(
                folder,
                steps=setup.plan.steps,
                first_step=checkpoint.read_state(setup.resume)["step"] if setup.resume else 0,
                global_batch=setup.plan.global_batch,
                versions=versions(),
                resume=_resume_command(config),
            )
            stack.enter_context(record)
        trainer = make_trainer(setup, setup.prepare_data(), stopper, callbacks)
        if setup.resume:
            trainer.resume(setup.resume)
        tracking.start(accelerator, config, is_resumed=setup.resume is not None)
        try:
            trainer.fit()
        except Stopped:
            tracking.finish(accelerator)
            raise
        end = ""
        if accelerator.is_main_process:
            place = place or _find_repository(config, is_resumed=True)
            is_published = publish(trainer, setup.base, place, setup.source.parts)
            end = describe_end(trainer, setup.source, is_published=is_published)
        tracking.finish(accelerator)
        if summary and end:
            print(end, flush=True)


def _find_repository(config: Config, *, is_resumed: bool) -> Place | None:
    """The hub repository to publish in, None if there is none to publish in.

    If the hub refuses, a new run raises UserError. A resumed run was accepted when it began, so it prints a line and
    trains: the hub may be back at its end.
    """
    from t2i_adapter.training.publish import find_repository

    try:
        return find_repository(config)
    except UserError as fault:
        if not is_resumed:
            raise
        print(f"{fault} Training does not wait for it; `t2i-adapter push` publishes later.", flush=True)
        return None


def _is_finished(setup: Setup, resume: Path) -> bool:
    """Whether the run of the checkpoint `resume` has made its last step and has written its adapter after it."""
    from t2i_adapter.training import checkpoint
    from t2i_adapter.training.compose import is_written
    from t2i_adapter.training.control import ended_at

    if setup.config.checkpoint.resume not in ("auto", "latest"):
        return False
    step = checkpoint.read_state(resume)["step"]
    is_plateau = setup.config.train.stop_when == "plateau" and ended_at(Path(setup.config.output_dir)) == step
    return (step >= setup.plan.steps or is_plateau) and is_written(setup.config, step)


def _resume_advice(config: Config) -> str:
    """How to resume a run, or "" if its options are not written yet."""
    from t2i_adapter.training.setup import OPTIONS

    if not (Path(config.output_dir) / OPTIONS).is_file():
        return ""
    command = _resume_command(config)
    if not command:
        return " Resume with the command that started it, and --checkpoint.resume auto."
    return f" Resume with:\n  {command}"


def _resume_command(config: Config) -> str:
    """The command that resumes a run from its options.yaml; "" for one on several machines."""
    from t2i_adapter.training.setup import OPTIONS

    here, world = os.environ.get("LOCAL_WORLD_SIZE", "1"), os.environ.get("WORLD_SIZE", "1")
    if here != world:
        return ""
    launch = ["t2i-adapter"] if world == "1" else ["torchrun", "--nproc_per_node", world, "-m", "t2i_adapter"]
    token = ["--hub.token", "TOKEN"] if config.hub.token else []
    file = Path(config.output_dir) / OPTIONS
    return show_command(*launch, "train", "--recipe", file, "--checkpoint.resume", "auto", *token)
