"""The verb `train`: from options to a finished adapter."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

from t2i_adapter.config import recipe as load
from t2i_adapter.config.tree import Config, seconds_of
from t2i_adapter.data.source import open_source
from t2i_adapter.errors import Stopped, UserError, redact
from t2i_adapter.models.open import open_base
from t2i_adapter.models.record import read_metadata
from t2i_adapter.training import checkpoint, tracking
from t2i_adapter.training.data import prepare_data
from t2i_adapter.training.lock import lock
from t2i_adapter.training.publish import find_repository, publish
from t2i_adapter.training.setup import (
    DTYPES,
    OPTIONS,
    Setup,
    _write_options,
    make_accelerator,
    make_adapter,
    make_trainer,
    set_up,
)
from t2i_adapter.training.signals import Stopper
from t2i_adapter.training.validation import read_rows


def run(config: Config, *, dry_run: bool = False, stop_after: int | None = None) -> None:
    """Trains an adapter as the options say. Raises UserError for what a person can mend, as early as it can be known,
    and Stopped where a signal or `max_time` ends the run before its last step.

    dry_run prints the options and the plan, and stops before anything is written or any weight is loaded. stop_after:
    a step after which to stop as if the time were up.
    """
    limit = config.train.max_time
    try:
        with Stopper(seconds_of(limit) if limit else None, stop_after) as stopper:
            _run(config, stopper, dry_run)
    except Stopped as stop:
        is_main = os.environ.get("RANK", "0") == "0"
        raise Stopped(f"{stop}{_how_to_go_on(config)}" if is_main else "", stop.code) from None
    except Exception as fault:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            who = f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
            print(redact(f"{who} fails: {type(fault).__name__}: {fault}"), file=sys.stderr, flush=True)
        raise


def _run(config: Config, stopper: Stopper, dry_run: bool) -> None:
    setup = set_up(config)
    accelerator = setup.accelerator
    accelerator.print(f"{setup.source.describe()}\nPlan\n{setup.plan.describe()}", flush=True)
    if dry_run:
        accelerator.print(f"Options\n{load.dump(config)}")
        return
    if _is_finished(setup):
        accelerator.print(f"Finished already, with {setup.resume}: the adapter is in {config.output_dir}.")
        return
    with ExitStack() as held:
        repo_id = None
        if accelerator.is_main_process:
            held.enter_context(lock(Path(config.output_dir)))
            checkpoint.tidy(Path(config.output_dir))
            repo_id = _repository(config, resumed=setup.resume is not None)
            _write_options(config, setup.plan)
            if setup.resume is None:  # a start that was killed before its first checkpoint has left lines
                tracking.truncate_metrics(Path(config.output_dir) / "metrics.jsonl", 0)
        trainer = make_trainer(setup, stopper)
        if setup.resume:
            trainer.resume(setup.resume)
        tracking.start(accelerator, config)
        try:
            trainer.fit()
        except Stopped:
            tracking.finish(accelerator)
            raise
        if accelerator.is_main_process:
            repo_id = repo_id or _repository(config, resumed=True)
            publish(trainer, setup.base, repo_id)
        tracking.finish(accelerator)


def _repository(config: Config, *, resumed: bool) -> str | None:
    """Where the adapter will be published. A new run is refused where that will not work; one that goes on was not
    refused when it began, and a hub that is away meanwhile must not keep it from its end."""
    try:
        return find_repository(config)
    except UserError as fault:
        if not resumed:
            raise
        print(f"{fault} Training does not wait for it; `t2i-adapter push` publishes later.", flush=True)
        return None


def _is_finished(setup: Setup) -> bool:
    """Whether the run that is to go on has made its last step, and its adapter has been written since."""
    if setup.resume is None or setup.config.checkpoint.resume not in ("auto", "latest"):
        return False
    try:
        record = read_metadata(setup.config.output_dir)
    except UserError:  # it is written anew
        return False
    made = checkpoint.read_state(setup.resume)["step"]
    return made >= setup.plan.steps and record is not None and record.steps == made


def _how_to_go_on(config: Config) -> str:
    """The command that goes on with a run, once its options are written."""
    recipe = Path(config.output_dir) / OPTIONS
    if not recipe.is_file():
        return ""
    here, world = os.environ.get("LOCAL_WORLD_SIZE", "1"), os.environ.get("WORLD_SIZE", "1")
    if here != world:
        return " Go on with the command that started it, and --checkpoint.resume auto."
    launch = "t2i-adapter" if world == "1" else f"torchrun --nproc_per_node {world} -m t2i_adapter"
    token = " --hub.token TOKEN" if config.hub.token else ""
    return f" Go on with:\n  {launch} train --recipe {shlex.quote(str(recipe))} --checkpoint.resume auto{token}"


def prepare(config: Config, *, dry_run: bool = False) -> None:
    """Makes what a run with these options would find in the cache, and stops. Raises UserError.

    dry_run prints the options and what there is to prepare, and stops.
    """
    if config.data.cache == "none":
        raise UserError("--data.cache none: keeps nothing, so there is nothing to prepare; leave it out.")
    if config.data.max_train_samples is not None and config.train.seed is None:
        raise UserError("--max_train_samples: the seed chooses the rows; give the --seed that training will have.")
    accelerator = make_accelerator(config)
    rows = read_rows(config)
    base = open_base(config.base)
    seed = config.train.seed or 0
    make_adapter(config, base, seed)  # checks that the sizes fit
    source = open_source(config.data, seed)
    accelerator.print(source.describe(), flush=True)
    if dry_run:
        accelerator.print(f"Options\n{load.dump(config)}")
        return
    prepare_data(config, accelerator, base, source, DTYPES[accelerator.mixed_precision], [row.prompt for row in rows])
