"""The sweep of the verb `evaluate`: searches sampling options, writes sweep.json and sweep.html, records the answer.

Importing this module loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_adapter.evaluation.sweep_options import make_points
from t2i_adapter.evaluation.sweep_values import FILE_NAME as VALUES
from t2i_adapter.evaluation.sweep_values import ValueFile
from t2i_adapter.files import fingerprint, output_folder, show_path, user_path
from t2i_adapter.flags import command_line
from t2i_adapter.generation.options import POINT
from t2i_adapter.models.record import FILE_NAME, write_sampling

if TYPE_CHECKING:
    from t2i_adapter.annotators.registry import Annotator
    from t2i_adapter.evaluation.pairs import Pair
    from t2i_adapter.evaluation.sweep import Sweep
    from t2i_adapter.generation.options import SamplingOptions
    from t2i_adapter.generation.pipeline import Models
    from t2i_adapter.verbs.evaluate import EvaluateOptions


def run_sweep(
    options: EvaluateOptions,
    adapter: str,
    models: Models,
    pairs: Sequence[Pair],
    judge: Annotator | None,
    settings: Callable[[SamplingOptions], Mapping[str, Any]],
) -> Sweep:
    """Searches the points of a sweep on the first half of the pairs, and confirms the answer on the second half.

    The default point has the options given, and plain ones for the others.

    Args:
        adapter: its folder or hub id; a local folder's record gets the answer.
        judge: as of an evaluation.
        settings: the default point -> everything that the numbers depend on, as plain JSON types.

    Raises UserError.
    """
    from t2i_adapter.evaluation.measures import Measures
    from t2i_adapter.evaluation.sweep import sweep
    from t2i_adapter.evaluation.sweep_page import make_sweep_page

    default = replace(options, defaults="plain").settle({})
    points, folder, half = make_points(options, default), output_folder(options.out), len(pairs) // 2
    facts = settings(default)
    if options.overwrite:
        (folder / VALUES).unlink(missing_ok=True)
    stored = ValueFile(folder / VALUES, values_digest(facts))
    if stored.count:
        print(f"sweep: {show_path(folder / VALUES)} has measurements of these settings; they are taken.", flush=True)
    found = sweep(
        models.pipeline(),
        pairs[:half],
        pairs[half:],
        points,
        measure=Measures([judge] if judge else [], pairs, clip=options.clip, seed=options.seed).picture,
        metric=options.sweep_metric,
        bands=options.sweep_bands,
        seed=options.seed,
        max_tokens=models.max_tokens,
        stored=stored,
        say=lambda line: print(line, flush=True),
    )
    numbers, page = folder / "sweep.json", folder / "sweep.html"
    content = {**found.to_json(), "settings": dict(facts)}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    numbers.write_text(text + "\n", encoding="utf-8")
    page.write_text(make_sweep_page(found, facts, command_line("evaluate", options)), encoding="utf-8")
    print("\n".join([found.answer(), show_path(numbers), show_path(page)]))
    print(write_record(found, adapter, models.digest, is_wanted=options.write))
    return found


def values_digest(settings: Mapping[str, Any]) -> str:
    """Returns a digest of the settings on which a point's values depend: without the point and the sweep's options."""
    others = (*POINT, "out", "write", "overwrite", "pictures", "batch_size", "defaults")
    own = {name: value for name, value in settings.items() if name not in others and not name.startswith("sweep")}
    return fingerprint(settings=json.dumps(own, sort_keys=True, default=str))


def write_record(found: Sweep, adapter: str, digest: str, *, is_wanted: bool) -> str:
    """Writes the recommended point into the adapter's record and card, and returns a line that says what was done."""
    from t2i_adapter.export.card import refresh_card

    folder = user_path(adapter)
    path: Path = folder / FILE_NAME
    if found.is_default:
        return f"{FILE_NAME} is unchanged, because no other point was confirmed."
    if not is_wanted:
        return f"{FILE_NAME} is unchanged, as --no_write asks."
    if not path.is_file():
        what = "is no local folder" if not folder.is_dir() else f"has no {FILE_NAME}"
        return f"The point is not written, because {adapter} {what}: pass its options to `generate` as flags."
    write_sampling(folder, found.record(digest))
    refresh_card(folder)
    return f"{show_path(path)} has the point now: `generate` uses it by default."
