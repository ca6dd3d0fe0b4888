"""The Python API: what `from t2i_adapter import ...` gives. Importing this module loads no torch.

Everything here is what the command line does, called from a program: the same options, files and numbers. All errors
that the user can fix are `UserError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin

from t2i_adapter.config import recipe as recipes
from t2i_adapter.config.read import allowed, item_kinds, nearest, option_types, read_value, with_values, without_none
from t2i_adapter.config.tree import Config
from t2i_adapter.environment import set_defaults
from t2i_adapter.errors import Stopped, UserError
from t2i_adapter.training.events import Callback
from t2i_adapter.training.events import Event as Event  # these three are shown by the package
from t2i_adapter.training.events import StopTraining as StopTraining
from t2i_adapter.types import Photo as Photo

if TYPE_CHECKING:
    from PIL import Image

    from t2i_adapter.generation.loaded import Condition, LoadedAdapters, Picture

set_defaults()


@dataclass(frozen=True)
class Run:
    """A training that has ended.

    Attributes:
        folder: the run's, with the adapter at its top if it is finished.
        is_finished: False if a callback, a signal or a limit ended it early; its checkpoint resumes it.
        reason: why it ended early, or "".
    """

    folder: Path
    is_finished: bool
    reason: str = ""


def make_config(values: Mapping[str, Any] | None = None, *, recipe: str | Path | None = None) -> Config:
    """Returns the options of a run: the defaults, with those of a recipe, with `values` over them.

    Args:
        values: option by its path, as in `t2i-adapter train --help`: {"data.location": "pairs", "optim.lr": 1e-4}.
        recipe: a YAML file, as for `train --recipe`.

    Raises UserError for an unknown option or a value that is not allowed.
    """
    config, kinds = recipes.load(recipe, Config()) if recipe else Config(), option_types(Config)
    for path in values or {}:
        if path not in kinds:
            known = nearest(path, list(kinds))
            raise UserError(f"{path}: no such option" + (f"; did you mean {known[0]!r}?" if known else ""))
    return with_values(config, {path: _checked(path, value, kinds[path]) for path, value in (values or {}).items()})


def train(config: Config, *, callbacks: Sequence[Callback] = ()) -> Run:
    """Trains an adapter in this process, as `t2i-adapter train` does.

    callbacks: each is called with an `Event` when the run logs something. One that raises `StopTraining` ends the run
    after it is saved; with another exception the run fails, as it would by an error of its own. With
    `checkpoint.resume` "auto" the same call goes on where the run stood.

    In a process group that the program has made, it trains with all processes of the group, which must all call it; the
    group and the rest of the process are afterwards as they were. Signals stop the run only if this is called in the
    main thread. Raises UserError as early as an error can be found.
    """
    from t2i_adapter.verbs.train import run

    config = replace(config, output_dir=str(Path(config.output_dir).expanduser()))
    try:
        run(config, summary=False, callbacks=callbacks)
    except Stopped as stop:
        return Run(Path(config.output_dir), False, str(stop))
    return Run(Path(config.output_dir), True)


def load(
    adapter: str | Path | Sequence[str | Path],
    *,
    base: str | Path | None = None,
    device: str = "auto",
    lora: Sequence[str] = (),
    quantize: str = "none",
    scheduler: str | None = None,
    **options: Any,
) -> LoadedAdapters:
    """Loads an adapter, or several that act together, with their base.

    Args:
        adapter: folder or hub id; several for adapters whose features are summed.
        base: hub id, diffusers folder, single .safetensors file or "nano"; None takes the one of the first adapter's
            training.
        device: auto, cpu, cuda, xpu, mps, ...
        lora: files "FILE[:weight]" that are added to the base.
        quantize: none, float8, int8 or nf4.
        scheduler: a short name or a class of diffusers; None is Euler ancestral.
        options: further options of `t2i-adapter generate` about models: precision, offload, max_tokens, base_vae, ...

    Raises UserError.
    """
    from t2i_adapter.generation.loaded import LoadedAdapters
    from t2i_adapter.generation.several import SeveralAdapters

    names = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    known = {"precision", "offload", "max_tokens", "xformers", "base_config", "base_revision", "base_variant"}
    if unknown := sorted(set(options) - known - {"base_vae"}):
        raise UserError(f"{unknown[0]}: no such option; allowed are {', '.join(sorted(known | {'base_vae'}))}.")
    asked = SeveralAdapters(
        adapter=tuple(map(str, names)), base=None if base is None else str(base), device=device, **options
    )
    return LoadedAdapters.load(asked, loras=lora, quantized=quantize, scheduler=scheduler)


def generate(
    adapters: LoadedAdapters,
    prompt: str | Sequence[str],
    condition: Condition | Sequence[Condition] | Sequence[Sequence[Condition]] | None,
    *,
    seed: int = 0,
    num: int = 1,
    size: tuple[int, int] | None = None,
    negative: str | None = None,
    init_image: Picture | None = None,
    mask: Picture | None = None,
    strength: float | None = None,
    progress: bool = False,
    **sampling: Any,
) -> list[Image.Image]:
    """Generates `num` pictures for each prompt: the pictures that `t2i-adapter generate` writes with the same options.

    Args:
        adapters: what `load` returned.
        prompt: one, or several.
        condition: a picture, a file, or `Photo(...)` of which the adapter's annotator makes the condition. With several
            prompts one for all or one for each. With several adapters each is a sequence of one an adapter. None
            generates with the base alone.
        seed: of each prompt's first picture; the others' seeds count up from it.
        size: (height, width) in pixels; None takes the training's.
        negative: what the pictures should not show.
        init_image, mask, strength: a picture to begin from, what of it is generated anew (white), and how much.
        progress: show a bar.
        sampling: steps, guidance, scale, control_guidance and the others of `t2i-adapter generate --help`.

    Raises UserError.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    rows = None if condition is None else _rows(condition, len(prompts), len(adapters.models))
    begins: dict[str, Any] = {"inits": [init_image] * len(prompts) * num if init_image is not None else ()}
    begins |= {"masks": [mask] * len(prompts) * num if mask is not None else (), "strength": strength}
    if init_image is None and (mask is not None or strength is not None):
        raise UserError("mask and strength need init_image, the picture that they are about.")
    return adapters.generate(
        [text for text in prompts for _ in range(num)],
        None if rows is None else [row for row in rows for _ in range(num)],
        [seed + index for _ in prompts for index in range(num)],
        size=size,
        negative=negative,
        progress=progress,
        **begins,
        **sampling,
    )


def make_condition(photo: Picture, kind: str) -> Image.Image:
    """Returns the condition map of a photo, of the photo's size.

    kind: one of `t2i-adapter conditions`, options after commas: "canny,low=50". Raises UserError.
    """
    from PIL import Image

    from t2i_adapter.annotators.registry import annotate, open_annotator
    from t2i_adapter.generation.condition import read_photo

    picture = photo if isinstance(photo, Image.Image) else read_photo(str(photo))
    return annotate(open_annotator(kind), picture.convert("RGB"))


def _rows(condition: Any, prompts: int, adapters: int) -> list[Sequence[Any]]:
    """Returns for each prompt one condition an adapter. Raises UserError if their numbers do not match."""
    is_list = isinstance(condition, list | tuple)
    rows: list[Sequence[Any]]
    if adapters == 1:
        rows = [one if isinstance(one, list | tuple) else [one] for one in (condition if is_list else [condition])]
    else:
        has_rows = is_list and all(isinstance(one, list | tuple) for one in condition)
        rows = list(condition) if has_rows else [condition if is_list else [condition]]
    if len(rows) not in (1, prompts):
        raise UserError(f"{len(rows)} conditions for {prompts} prompts; give one for each, or a single one for all.")
    return rows * prompts if len(rows) == 1 else rows


def _checked(path: str, value: Any, kind: Any) -> Any:
    """The value as a flag or a recipe would give it. Raises UserError if it is not of the option's type."""
    inner = without_none(kind)
    try:
        if value is None and inner is not kind:
            return None
        if get_origin(inner) is tuple:
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError(value)
            each = zip(value, item_kinds(inner, len(value)), strict=True)
            return tuple(read_value(str(item), item_kind) for item, item_kind in each)
        return read_value(str(value), inner)
    except ValueError:
        raise UserError(f"{value!r}: {allowed(kind, str(value))}", option=path) from None
