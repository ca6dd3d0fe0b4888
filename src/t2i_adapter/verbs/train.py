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
    from t2i_adapter.training.host import left_as_found

    if config.data.part:
        raise UserError(f"{config.data.part}: `prepare` alone encodes a part; omit it.", option="data.part")
    with left_as_found():  # also what libraries change when they are loaded
        preload("t2i_adapter.training.setup")
        _run_guarded(config, dry_run, stop_after, summary, callbacks)


def _run_guarded(
    config: Config, dry_run: bool, stop_after: int | None, summary: bool, callbacks: Sequence[Callback]
) -> None:
    from t2i_adapter.training.numerics import restored_switches
    from t2i_adapter.training.signals import Stopper

    config = replace(config, output_dir=str(user_path(config.output_dir)))  # "~" from a recipe or behind "="
    train = config.train
    limit = seconds_of(train.max_time) if train.max_time else None
    try:
        with Stopper(limit, stop_after, train.stop_signals, train.stop_code) as stopper, restored_switches():
            _run(config, stopper, dry_run, summary, callbacks)
    except Stopped as stop:
        is_main = os.environ.get("RANK", "0") == "0"
        raise Stopped(f"{stop}{_resume_advice(config)}" if is_main else "", stop.code) from None
    except Exception as fault:
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        names_itself = isinstance(fault, UserError) and fault.kind == "process_ended"
        if int(world) > 1 and not names_itself:
            text = redact(f"process {rank} of {world} fails: {type(fault).__name__}: {fault}")
            print(text, file=sys.stderr, flush=True)
        raise


def _run(config: Config, stopper: Stopper, dry_run: bool, summary: bool, callbacks: Sequence[Callback]) -> None:
    from t2i_adapter.training.setup import set_up
    from t2i_adapter.training.signals import Reason

    setup = set_up(config)
    peers, place = setup.peers, show_path(config.output_dir)
    with peers.naming_losses(), peers:
        setup.accelerator.print(setup.describe(), flush=True)
        if dry_run:
            setup.accelerator.print(f"Options\n{recipe.dump(config)}")
        elif (resume := setup.resume) and peers.from_main(lambda: _is_finished(setup, resume)):
            found = f"Finished already, with {show_path(resume)}: the adapter is in {place}."
            setup.accelerator.print(found)
        else:
            if line := peers.from_main(lambda: _stopped_before_restart(config)):
                raise Stopped(line, stopper.exit_code(Reason.TIME_IS_UP))
            _train(config, setup, stopper, summary, callbacks)


def _train(config: Config, setup: Setup, stopper: Stopper, summary: bool, callbacks: Sequence[Callback]) -> None:
    from t2i_adapter.runs.lock import lock
    from t2i_adapter.runs.page import write_report
    from t2i_adapter.runs.record import run_record
    from t2i_adapter.training import checkpoint, tracking
    from t2i_adapter.training.publish import publish
    from t2i_adapter.training.resume import versions
    from t2i_adapter.training.setup import make_trainer, write_options
    from t2i_adapter.training.summary import describe_end

    accelerator, folder = setup.accelerator, Path(config.output_dir)
    with ExitStack() as stack:

        def begin() -> Place | None:
            """Opens the run's folder on the main process; the hub repository to publish in."""
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
            return place

        place = setup.peers.main_works(begin)
        trainer = make_trainer(setup, setup.prepare_data(), stopper, callbacks)
        if setup.resume:
            trainer.resume(setup.resume)
        tracking.start(accelerator, config, is_resumed=setup.resume is not None)
        try:
            trainer.fit()
        except Stopped:
            tracking.finish(accelerator)
            raise

        def end() -> str:
            """Writes and publishes the adapter on the main process; the summary."""
            target = place or _find_repository(config, is_resumed=True)
            is_published = publish(trainer, setup.base, target, setup.source.parts)
            return describe_end(trainer, setup.source, is_published=is_published)

        text = setup.peers.main_works(end)
        tracking.finish(accelerator)
        if summary and text:
            print(text, flush=True)


def _stopped_before_restart(config: Config) -> str:
    """A line if torchrun has started these processes again after a signal or a limit stopped the run; else "".

    torchrun takes an exit code other than 0 for a fault and restarts, and the limit of time would begin anew.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return ""
    from t2i_adapter.runs.metrics import read_json
    from t2i_adapter.runs.record import FILE

    record = read_json(Path(config.output_dir) / FILE)
    if record.get("outcome") != "stopped":
        return ""
    return f"torchrun restarted a run that was stopped, so it stays stopped ({record.get('reason', '')})."


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
