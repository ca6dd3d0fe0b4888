"""Trains adapters of five kinds on the embedded base, and runs with a fault, and collects what their looks said.

    python benchmarks/control_runs.py
    python benchmarks/control_runs.py --runs canny "shuffled pairs"
    python benchmarks/control_runs.py --steps 60 --scenes 64 --pairs 8 --work runs/control-small --out small.json

Each run is `t2i-adapter train` with the demo's recipe, which measures control on held-out pairs by itself. The faults:
the conditions of other rows ("shuffled pairs"), a learning rate of 1e-7, and held-out conditions of the other polarity.
The last run, on scenes of one circle, may end at its plateau. Each adapter is then evaluated on the held-out pairs with
`t2i-adapter evaluate`, and those that should read their condition beside their own checkpoint after an eighth of
--steps: what its score rose by since then, pair by pair. The adapter of "inverted" is that of "canny", trained further
on its own pairs at a low rate.

A run that is finished in --work is not run again while its options are unchanged. A stopped run resumes. After each run
the program writes the result file with the numbers of all finished runs, and prints their table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from common import make_parser, write_result
from PIL import Image, ImageOps

from t2i_adapter.cli import main as command
from t2i_adapter.verbs.make_data import ShapesOptions, make_shapes

RECIPE = Path(__file__).parents[1] / "recipes" / "nano-shapes.yaml"
SIZE, GUIDANCE = 128, 3.0
MOST_SHAPES = 2
RESULT = "result.json"
EARLY = "early"
CONDITION = "conditioning_image_file_name"
Interval = dict[str, float]


@dataclass(frozen=True)
class Run:
    """A run and what it is expected to say.

    Attributes:
        condition: the map that the scene generator renders for the data.
        expected: the statement that the run must make, and `not_read` or `read`, the one that it must not make.
        judge: annotator whose maps of the generated pictures are scored; None for pictures without a score.
        metric: measure of `evaluate` for the result.
        flags: flags of `train` beside the recipe.
        prompts: column of the captions.
        spoil: what is done to the dataset, as a function of its folder.
        length: updates, as a share of --steps.
        begins_with: the run whose adapter this one begins with.
        kinds: kinds of shapes in the scenes; one shape a scene if they are named.
        pairs: held-out pairs of the looks, of which fewer mean more looks; None takes --pairs.
    """

    condition: Literal["outline", "canny", "depth", "segmentation", "palette"]
    expected: Literal["read", "not_read", "plateau", "inverted"]
    judge: str | None = None
    metric: str = "edge_f1"
    flags: tuple[str, ...] = ()
    prompts: str = "text"
    spoil: Callable[[Path], None] | None = None
    length: float = 1.0
    begins_with: str | None = None
    kinds: tuple[str, ...] = ()
    pairs: int | None = None


def shuffle_conditions(folder: Path) -> None:
    """Gives each row of each split the condition of another row."""
    for table in sorted(folder.glob("*/metadata.jsonl")):
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
        order = list(range(len(rows)))
        random.Random(0).shuffle(order)
        conditions = {place: rows[order[n - 1]][CONDITION] for n, place in enumerate(order)}  # the next in a ring
        lines = [json.dumps({**row, CONDITION: conditions[place]}) for place, row in enumerate(rows)]
        table.write_text("\n".join(lines) + "\n", encoding="utf-8")


def invert_held_out_conditions(folder: Path) -> None:
    """Makes the negative of each condition picture in test/."""
    for line in (folder / "test" / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        place = folder / "test" / json.loads(line)[CONDITION]
        with Image.open(place) as picture:
            inverted = ImageOps.invert(picture)
        inverted.save(place)


def canny(expected: Literal["read", "not_read", "plateau", "inverted"], **changes: Any) -> Run:
    return Run("canny", expected, judge="canny", metric="condition_f1", **changes)


RUNS: dict[str, Run] = {
    "canny": canny("read"),
    "lineart": Run("outline", "read", "lineart", "condition_error", ("--data.condition", "lineart")),
    "depth": Run("depth", "read"),
    "segmentation": Run("segmentation", "read"),
    "palette": Run(
        "palette",
        "read",
        "palette",
        "condition_error",
        ("--data.caption_column", "shapes", "--objective.noise_offset", "0.3"),
        prompts="shapes",
    ),
    "shuffled pairs": canny("not_read", spoil=shuffle_conditions),
    "rate 1e-7": canny("not_read", flags=("--optim.lr", "1e-7")),
    "inverted": canny(
        "inverted",
        flags=("--optim.lr", "1e-5"),
        spoil=invert_held_out_conditions,
        length=0.5,
        begins_with="canny",
    ),
    "until the plateau": canny(
        "plateau", flags=("--train.stop_when", "plateau"), length=4.0, kinds=("circle",), pairs=16
    ),
}


def folder_of(name: str, options: argparse.Namespace) -> Path:
    """The run's folder, with a digest of recipe and settings in its name."""
    run = RUNS[name]
    own = (name, run.flags, run.length, run.kinds, run.pairs)
    settings = (*own, options.steps, options.scenes, options.pairs, options.budget)
    digest = hashlib.sha256(repr(settings).encode() + RECIPE.read_bytes()).hexdigest()[:8]
    return options.work / f"{name.replace(' ', '-')}-{digest}"


def measure(name: str, options: argparse.Namespace) -> None:
    """Makes the data, trains and evaluates, if the run's folder has no result yet; writes the result there."""
    run, folder = RUNS[name], folder_of(name, options)
    if (folder / RESULT).is_file():
        return
    if run.begins_with:
        measure(run.begins_with, options)
    data, adapter = make_data(run, options), folder / "adapter"
    began = time.perf_counter()
    succeed(training_words(run, data, adapter, options))
    seconds = time.perf_counter() - began
    evaluated = folder / "evaluation"
    judge = [] if run.judge is None or run.judge in run.flags else ["--judge", run.judge]
    adapters = [str(adapter)]
    if run.expected in ("read", "plateau"):
        adapters.append(str(copy_early(adapter, folder / EARLY, early_update(options))))
    succeed(
        [
            *("evaluate", "--adapter", *adapters, "--data", str(data), "--num", str(options.pairs)),
            *("--caption_column", run.prompts, "--guidance", str(GUIDANCE), "--steps", str(options.sampling_steps)),
            *("--out", str(evaluated), *judge),
        ]
    )
    rows = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluation = json.loads((evaluated / "evaluation.json").read_text(encoding="utf-8"))
    metrics = {
        metric: {column.removesuffix(f"-{adapter.name}"): value for column, value in row.items()}
        for metric, row in evaluation["metrics"].items()
    }
    found = {**collect(rows), "seconds": round(seconds, 1), "metric": run.metric, "evaluation": metrics}
    if len(adapters) > 1:
        rise = rise_since_early(evaluation["comparison"]["differences_to_first"][run.metric], adapter.name)
        found |= {"early_update": early_update(options), "rise": rise}
    found["as_expected"] = is_as_expected(run.expected, found)
    (folder / RESULT).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def early_update(options: argparse.Namespace) -> int:
    return max(1, options.steps // 8)


def copy_early(adapter: Path, out: Path, update: int) -> Path:
    """Copies the adapter of a checkpoint, with the run's record, so that it can be evaluated."""
    shutil.copytree(adapter / f"checkpoint-{update}" / "t2iadapter", out, dirs_exist_ok=True)
    shutil.copy(adapter / "t2i_adapter.json", out)
    return out


def rise_since_early(to_first: dict[str, Any], last: str) -> dict[str, Any]:
    """The paired difference last minus early, from the difference to whichever of them ranks first."""
    if last in to_first:
        return to_first[last]
    found = dict(to_first[EARLY])
    low, high = found["ci95"]
    return found | {"mean": -found["mean"], "ci95": [-high, -low]}


def training_words(run: Run, data: Path, adapter: Path, options: argparse.Namespace) -> list[str]:
    """The words of `t2i-adapter` for a run."""
    steps = max(1, round(run.length * options.steps))
    own = [*run.flags]
    if run.begins_with:
        own += ["--adapter.init_from", str(folder_of(run.begins_with, options) / "adapter")]
    if run.judge and run.judge not in run.flags:
        own += ["--validation.judge", run.judge]
    return [
        *("train", "--recipe", str(RECIPE), "--data", str(data), "--output_dir", str(adapter)),
        *("--train.max_steps", str(steps), "--checkpoint.resume", "auto"),
        *("--checkpoint.every", str(early_update(options)), "--checkpoint.keep_every", str(early_update(options))),
        *("--train.cpu_threads", str(options.threads), "--validation.guidance", str(GUIDANCE)),
        *("--validation.budget", str(options.budget)),
        *("--validation.held_out", str(run.pairs or options.pairs)),
        *("--tracking.report_to", "none", "--data.prepared_dir", str(options.work / "cache"), *own),
    ]


def make_data(run: Run, options: argparse.Namespace) -> Path:
    """Writes one or two shapes on a plain ground with the run's maps, if they are missing. The scenes are the same in
    all runs."""
    name = "-".join(["data", run.condition, *run.kinds, str(options.scenes), str(options.pairs)])
    plain = options.work / name
    kinds: dict[str, Any] = {"kinds": run.kinds, "max_shapes": 1} if run.kinds else {"max_shapes": MOST_SHAPES}
    scenes = ShapesOptions(
        out=plain,
        num=options.scenes,
        num_test=options.pairs,
        size=SIZE,
        condition=run.condition,
        patterns=("plain",),
        **kinds,
    )
    make_shapes(scenes)
    if run.spoil is None:
        return plain
    spoilt = plain.with_name(f"{plain.name}-{run.spoil.__name__}")
    if not spoilt.is_dir():
        unfinished = spoilt.with_name(f".{spoilt.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(plain, unfinished)
        run.spoil(unfinished)
        unfinished.rename(spoilt)
    return spoilt


def succeed(words: list[str]) -> None:
    assert command(words) == 0, " ".join(words)


def collect(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the rows of a run's metrics.jsonl say of its control.

    Returns:
        updates: the last step. gain, score: the looks. advice: [{step, kind, text}]. read_at: step of the first `read`,
        or None. looks_seconds: time of all looks. share: that time as a share of the run's, at its last look.
    """
    gain = [{"step": row["step"], **row["gain"]} for row in rows if "gain" in row]
    advice = [{"step": row["step"], **row["advice"]} for row in rows if "advice" in row]
    reads = [statement["step"] for statement in advice if statement["kind"] == "read"]
    return {
        "updates": max((row["step"] for row in rows), default=0),
        "gain": [
            {name: look.get(name) for name in ("step", "pairs", "on", "use", "benefit", "training_benefit", "bands")}
            for look in gain
        ],
        "score": [{"step": row["step"], **row["score"]} for row in rows if "score" in row],
        "advice": [{name: statement[name] for name in ("step", "kind", "text")} for statement in advice],
        "read_at": min(reads, default=None),
        "warnings": [row["warning"] for row in rows if "warning" in row],
        "looks_seconds": round(sum(look["seconds"] for look in gain), 2),
        "share": gain[-1]["share"] if gain else None,
    }


def is_as_expected(expected: str, found: dict[str, Any]) -> bool:
    """Whether a run made the statement that it must make, and none that contradicts it.

    For "inverted": at the last look that measured both, the benefit of the held-out pairs is significantly below that
    of the training's pairs; and `evaluate` finds no higher score with the own condition than with another's.
    """
    kinds = {statement["kind"] for statement in found["advice"]}
    if expected == "read":
        return "read" in kinds and "not_read" not in kinds
    if expected == "not_read":
        return "not_read" in kinds and "read" not in kinds
    if expected == "plateau":
        return {"read", "plateau"} <= kinds
    looks = [look for look in found["gain"] if look["training_benefit"]]
    if not looks:
        return False
    columns = found["evaluation"][found["metric"]]
    is_uncontrolled = columns["adapter"]["ci95"][0] <= columns["other_condition"]["mean"]
    return looks[-1]["benefit"]["high"] < looks[-1]["training_benefit"]["low"] and is_uncontrolled


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The Markdown table of the documentation."""
    lines = [
        "| run | updates | read at | use at its last look | benefit at the end | score, first and last look "
        "| score less other condition's | statements | time of looks | evaluated, early and last | rise |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        gain, score = row["gain"], row["score"]
        last = gain[-1] if gain else None
        uses = [look["use"] for look in gain if look["use"]]  # a run whose condition is read measures it no more
        cells = [
            name,
            f"{row['updates']:,}",
            "never" if row["read_at"] is None else f"{row['read_at']:,}",
            shown(uses[-1]) if uses else "not measured",
            shown(last["benefit"]) if last else "not measured",
            f"{shown(score[0]['adapter'])}, {shown(score[-1]['adapter'])}" if score else "not measured",
            shown(score[-1]["difference"]) if score else "not measured",
            ", ".join(f"{statement['kind']} ({statement['step']:,})" for statement in row["advice"]) or "none",
            "not measured" if row["share"] is None else f"{100 * row['share']:.1f} %",
            *evaluated_cells(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def evaluated_cells(row: dict[str, Any]) -> tuple[str, str]:
    if "rise" not in row:
        return "", ""
    columns = row["evaluation"][row["metric"]]
    means = [f"{columns[name]['mean']:.3f}" for name in (f"adapter-{EARLY}", "adapter")]
    rise = {"mean": row["rise"]["mean"], "low": row["rise"]["ci95"][0], "high": row["rise"]["ci95"][1]}
    return f"{row['metric']} {', '.join(means)}", shown(rise)


def shown(interval: Interval) -> str:
    return f"{interval['mean']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="RUN")
    parser.add_argument("--steps", type=int, default=800, help="updates of a run, 16 samples each")
    parser.add_argument("--scenes", type=int, default=2000, help="scenes to train on")
    parser.add_argument("--pairs", type=int, default=48, help="held-out scenes")
    parser.add_argument("--sampling_steps", type=int, default=12, help="denoising steps of an evaluated picture")
    parser.add_argument("--budget", type=float, default=0.05, help="share of the training time for the looks")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--work", type=Path, default=Path("runs/control_runs"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = ("steps", "scenes", "pairs", "sampling_steps", "budget", "threads")
    for name in options.runs:
        measure(name, options)
        finished = [name for name in RUNS if (folder_of(name, options) / RESULT).is_file()]
        rows = {name: json.loads((folder_of(name, options) / RESULT).read_text(encoding="utf-8")) for name in finished}
        content = {"settings": {name: getattr(options, name) for name in names}, "runs": rows}
        write_result("control_runs", content, options.out)
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
