"""Measures whether adapters add up: how well a picture follows one condition while another adapter acts on it.

    python benchmarks/interference.py
    python benchmarks/interference.py --seeds 1 --pairs 32

On `nano` it trains an adapter for each of three conditions of the same scenes, with recipes/nano-palette.yaml: outline,
depth and palette. Two pairs are measured, outline + palette and depth + palette. Each condition has a score of its own:
alone, with the same scene's other condition, with another scene's, and with an empty one (black, and for the palette
the middle grey). The arms differ in how the features F_i of two adapters become one:

    sum           F_1 + F_2
    joint         the sum of adapters that were trained together, `train --compose`
    longer        the sum of adapters that were trained alone for as many more updates as the joint ones
    rescaled      F max_i |F_i| / |F| for F = F_1 + F_2, at each of the four stages; |.| is the norm of a sample
    sqrt          (F_1 + F_2) / sqrt(2)

All pictures of a scene have the same prompt and noise. The prompts name no colours. An interval is that of the mean
over the scenes, each of which is the mean over the seeds; it holds for these adapters.

Jobs run in --processes processes of one thread. What is finished in --work is not run again. The result file is written
when everything is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import make_parser, write_result
from diffusers import MultiAdapter
from PIL import Image
from torch import Tensor

from t2i_adapter.config.recipe import load
from t2i_adapter.config.tree import CheckpointOptions, Config, DataOptions, TrackingOptions
from t2i_adapter.statistics import mean_interval
from t2i_adapter.verbs.make_data import ShapesOptions, make_shapes

RECIPE = Path(__file__).parents[1] / "recipes" / "nano-palette.yaml"
SIZE, GUIDANCE = 128, 3.0
SHAPES = ("circle", "square", "triangle", "star")
EMPTY = {"outline": 0, "depth": 0, "palette": 128}
"""Condition -> grey level of its empty map."""
SCORES = {"outline": ("edge F1", 1), "depth": ("edge F1", 1), "palette": ("palette CIEDE2000", -1)}
"""Condition -> its score, and 1 if more is better, else -1."""
PAIRS = (("outline", "palette"), ("depth", "palette"))
JOINT_RATE, JOINT_EMPTY_PROMPTS = 1e-3, 0.5
ARMS = ("sum", "joint", "longer", "rescaled", "sqrt")
BASELINES = ("sum", "longer")
"""Arms that every arm is compared with."""
SAME_ADAPTERS = ("rescaled", "sqrt")
"""Arms with the adapters of `sum`, which is measured before them."""
CASES = ("alone", "same", "other", "empty")


class Combined(MultiAdapter):
    """A `MultiAdapter` that combines the features of those adapters that act, of weight above 0, as an arm says."""

    def __init__(self, adapters: list[Any], arm: str) -> None:
        super().__init__(adapters)
        self.arm = arm

    def forward(self, xs: Any, adapter_weights: Any = None) -> list[Tensor]:
        acting = [(x, w, a) for x, w, a in zip(xs, adapter_weights, self.adapters, strict=True) if w]
        if not acting:
            return [torch.zeros_like(feature) for feature in self.adapters[0](xs[0])]
        each = [[w * feature for feature in adapter(x)] for x, w, adapter in acting]
        return [combine(stage, self.arm) for stage in zip(*each, strict=True)]


def combine(features: Sequence[Tensor], arm: str) -> Tensor:
    """One stage's features of all adapters, each (B,D,h,w), as one."""
    total = torch.stack(list(features)).sum(0)
    if arm == "sqrt":
        return total / len(features) ** 0.5
    if arm == "rescaled":
        return total * (_norms(features).amax(0) / _norms([total])[0].clamp(min=1e-12)).view(-1, 1, 1, 1)
    return total


def _norms(features: Sequence[Tensor]) -> Tensor:
    """(n,B): each sample's norm of each of n features (B,D,h,w)."""
    return torch.stack([feature.flatten(1).norm(dim=1) for feature in features])


# Data ---------------------------------------------------------------------------------------------------------------


def scenes(options: argparse.Namespace) -> Path:
    """The folder of the scenes."""
    return options.work / f"scenes-{options.scenes}-{options.pairs}"


def write_scenes(options: argparse.Namespace) -> None:
    """Writes scenes with a column for each condition, if they are missing."""
    from t2i_adapter.data.shapes import Scene, condition

    out = scenes(options)
    make_shapes(
        ShapesOptions(
            out=out,
            num=options.scenes,
            num_test=options.pairs,
            size=SIZE,
            condition="outline",
            max_shapes=2,
            kinds=SHAPES,
            patterns=("plain",),
        )
    )
    for split in ("train", "test"):
        table = out / split / "metadata.jsonl"
        rows = [json.loads(line) for line in table.read_text().splitlines()]
        if "palette" in rows[0]:
            continue
        for row in rows:
            scene = Scene.from_dict(json.loads(row["scene"]))
            for kind in EMPTY:
                name = f"{Path(row['file_name']).stem}_{kind}.png"
                condition(scene, SIZE, kind).save(out / split / name)
                row[kind] = name
        temporary = table.with_suffix(".new")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(table)


def folder_of(name: str, seed: int, options: argparse.Namespace) -> Path:
    """A job's folder, with what its numbers depend on in its name."""
    sizes = f"{options.scenes}-{options.updates}-{options.joint_updates}"
    return options.work / f"adapters-{sizes}" / f"seed-{seed}" / name


# Training -----------------------------------------------------------------------------------------------------------


def train(name: str, seed: int, options: argparse.Namespace, change: Callable[[Config], Config]) -> None:
    """Trains with the recipe and what `change` changes in it, unless it is finished."""
    from t2i_adapter.verbs import train as verb

    out = folder_of(name, seed, options)
    if (out / "seconds.json").is_file():
        return
    recipe = load(str(RECIPE), Config())
    config = change(
        replace(
            recipe,
            output_dir=str(out),
            data=replace(recipe.data, location=str(scenes(options)), prepared_dir=str(options.work / "cache")),
            train=replace(recipe.train, max_steps=options.updates, seed=seed, cpu_threads=1),
            checkpoint=CheckpointOptions(every=50, keep=1, resume="auto"),
            tracking=TrackingOptions(log_every=50, report_to="none"),
            validation=replace(recipe.validation, budget=0.0, split="none"),
        )
    )
    began = time.process_time()
    verb.run(config, summary=False)
    (out / "seconds.json").write_text(json.dumps(round(time.process_time() - began, 1)))


def shorter(config: Config, options: argparse.Namespace) -> Config:
    """The recipe of the joint training and of the equally long training alone."""
    return replace(
        config,
        data=replace(config.data, proportion_empty_prompts=JOINT_EMPTY_PROMPTS),
        optim=replace(config.optim, lr=JOINT_RATE),
        train=replace(config.train, max_steps=options.joint_updates),
    )


def train_alone(kind: str, seed: int, options: argparse.Namespace) -> None:
    """Trains the adapter of a condition, and continues it alone."""
    torch.set_num_threads(1)

    def column(config: Config) -> Config:
        return replace(config, data=replace(config.data, conditioning_image_column=kind))

    def longer(config: Config) -> Config:
        start = replace(config.adapter, init_from=str(folder_of(kind, seed, options)))
        return shorter(replace(column(config), adapter=start), options)

    train(kind, seed, options, column)
    train(f"{kind}-longer", seed, options, longer)


def train_together(pair: tuple[str, str], seed: int, options: argparse.Namespace) -> None:
    names = tuple(str(folder_of(kind, seed, options)) for kind in pair)

    def joint(config: Config) -> Config:
        return shorter(replace(config, adapter=replace(config.adapter, compose=names)), options)

    train("+".join(pair), seed, options, joint)


def adapters_of(arm: str, pair: tuple[str, str], seed: int, options: argparse.Namespace) -> list[Path]:
    """The folders of an arm's two adapters."""
    if arm == "joint":
        return [folder_of("+".join(pair), seed, options) / f"adapter-{i}-{kind}" for i, kind in enumerate(pair)]
    return [folder_of(f"{kind}-longer" if arm == "longer" else kind, seed, options) for kind in pair]


# Measurement --------------------------------------------------------------------------------------------------------


def run_pair(pair: tuple[str, str], seed: int, options: argparse.Namespace) -> None:
    """Trains the joint adapters of a pair of conditions, and measures all arms, each once."""
    torch.set_num_threads(1)
    train_together(pair, seed, options)
    for arm in ARMS:
        if not measurement(arm, pair, seed, options).is_file():
            write_measurement(arm, pair, seed, options)
            print(f"{' + '.join(pair)}, seed {seed}, {arm}", flush=True)


def measurement(arm: str, pair: tuple[str, str], seed: int, options: argparse.Namespace) -> Path:
    """The file of an arm's scores: {"scores": {condition: {case: (N,)}}, "norms": (N,4)}."""
    return folder_of("+".join(pair), seed, options) / f"{arm}-{options.pairs}-{options.sampling_steps}.json"


def cases_of(pair: tuple[str, str]) -> dict[tuple[str, str], tuple[str | None, str | None]]:
    """(condition, case) -> whose map each of the two adapters gets: "own", "other" scene's, "empty", or None if it does
    not act. The case `same` is the same for both conditions."""
    found: dict[tuple[str, str], tuple[str | None, str | None]] = {}
    for number, kind in enumerate(pair):
        for case, second in zip(CASES, (None, "own", "other", "empty"), strict=True):
            found[kind, case] = ("own", second) if number == 0 else (second, "own")
    return found


def write_measurement(arm: str, pair: tuple[str, str], seed: int, options: argparse.Namespace) -> None:
    from t2i_adapter.config.tree import BaseOptions
    from t2i_adapter.evaluation.pairs import open_pairs, read_pairs
    from t2i_adapter.generation.generate import encode_prompts, generate
    from t2i_adapter.generation.options import SamplingOptions, Strength
    from t2i_adapter.models.adapter import load_adapter
    from t2i_adapter.models.open import open_base

    networks = [load_adapter(str(folder)).eval() for folder in adapters_of(arm, pair, seed, options)]
    network: Any = Combined(networks, arm)
    pipeline = open_base(BaseOptions()).pipeline(network, "cpu", torch.float32)
    columns = []
    for kind in pair:
        data = DataOptions(
            location=str(scenes(options)),
            split="test",
            max_train_samples=options.pairs,
            caption_column="shapes",
            conditioning_image_column=kind,
        )
        columns.append(read_pairs(open_pairs(data, options.pairs, 0), SIZE, 3))
    rows = list(zip(*columns, strict=True))
    count = len(rows)
    texts = encode_prompts(pipeline, [first.prompt for first, _ in rows], guidance=GUIDANCE)
    sampling = SamplingOptions(steps=options.sampling_steps, guidance=GUIDANCE)
    seeds = [seed * count + number for number in range(count)]

    def condition(number: int, part: int, source: str | None) -> Image.Image:
        if source in (None, "empty"):
            return Image.new("RGB", (SIZE, SIZE), (EMPTY[pair[part]],) * 3)
        return rows[(number + (source == "other")) % count][part].condition

    pictures: dict[tuple[str | None, str | None], list[Image.Image]] = {}
    scores: dict[str, dict[str, list[float]]] = {kind: {} for kind in pair}
    cases = cases_of(pair)
    if arm == "sum":
        cases |= {(kind, "none"): (None, None) for kind in pair}
    elif arm in SAME_ADAPTERS:  # one adapter alone gives the same pictures in these arms
        known = json.loads(measurement("sum", pair, seed, options).read_text())["scores"]
        for kind in pair:
            scores[kind]["alone"] = known[kind]["alone"]
            del cases[kind, "alone"]
    for (kind, case), sources in cases.items():
        if sources not in pictures:
            pictures[sources] = generate(
                pipeline,
                texts,
                [[condition(number, part, source) for part, source in enumerate(sources)] for number in range(count)],
                seeds,
                size=(SIZE, SIZE),
                sampling=sampling,
                strengths=[Strength(scale=0.0 if source is None else 1.0) for source in sources],
            )
        part = pair.index(kind)
        scores[kind][case] = [score(kind, p, row[part]) for p, row in zip(pictures[sources], rows, strict=True)]
    content = {"scores": scores, "norms": norm_ratios(networks, rows, arm)}
    measurement(arm, pair, seed, options).write_text(json.dumps(content))


def score(kind: str, picture: Image.Image, pair: Any) -> float:
    """How well a picture follows the condition of a pair of `kind` (SCORES)."""
    from t2i_adapter.annotators.registry import annotate, open_annotator
    from t2i_adapter.evaluation.kinds import palette_difference
    from t2i_adapter.evaluation.metrics import measure

    if kind == "palette":
        got = annotate(open_annotator("palette"), picture.convert("RGB"))
        return palette_difference(np.asarray(got), np.asarray(pair.condition.convert("RGB")))
    return measure(np.asarray(picture.convert("RGB")), pair.truth)["edge_f1"]


@torch.no_grad()
def norm_ratios(networks: Sequence[Any], rows: Sequence[Any], arm: str) -> list[list[float]]:
    """(N,4): |F| / max_i |F_i| of each scene at each stage, F being the combined features of its two conditions."""
    found = []
    for row in rows:
        maps = [torch.from_numpy(np.array(pair.condition.convert("RGB"))).permute(2, 0, 1)[None] / 255 for pair in row]
        each = [network(values) for network, values in zip(networks, maps, strict=True)]
        stages = list(zip(*each, strict=True))
        found.append([float(_norms([combine(s, arm)])[0, 0] / _norms(s).amax()) for s in stages])
    return found


# Result -------------------------------------------------------------------------------------------------------------


def summarize(pair: tuple[str, str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """An entry for each arm and condition: the mean of each case, and paired differences from `alone` and from the arms
    BASELINES, all oriented so that more is better."""
    entries = []
    baselines = {name: _scores(name, pair, options) for name in BASELINES}
    for arm in ARMS:
        own, norms = _scores(arm, pair, options), _read(arm, pair, options, "norms")
        for kind in pair:
            name, sign = SCORES[kind]
            cases = {case: _means(own[kind][case]) for case in CASES} | {"none": _means(baselines["sum"][kind]["none"])}
            entries.append(
                {
                    "pair": " + ".join(pair),
                    "condition": kind,
                    "arm": arm,
                    "score": name,
                    "more_is_better": sign > 0,
                    "cases": {case: mean_interval(values).to_json() for case, values in cases.items()},
                    "better_than_alone": {
                        case: mean_interval(sign * (cases[case] - cases["alone"])).to_json() for case in CASES[1:]
                    },
                    **{
                        f"better_than_{baseline}": {
                            case: mean_interval(sign * (cases[case] - _means(scores[kind][case]))).to_json()
                            for case in CASES
                        }
                        for baseline, scores in baselines.items()
                    },
                    "norm_ratio": np.mean(norms, axis=(0, 1)).round(3).tolist(),
                }
            )
    return entries


def _means(values: np.ndarray) -> np.ndarray:
    """(S,N) of S seeds -> (N,)."""
    return np.asarray(values).mean(axis=0)


def _scores(arm: str, pair: tuple[str, str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """condition -> case -> (S,N)."""
    seeds = _read(arm, pair, options, "scores")
    return {kind: {case: np.array([one[kind][case] for one in seeds]) for case in seeds[0][kind]} for kind in pair}


def _read(arm: str, pair: tuple[str, str], options: argparse.Namespace, key: str) -> list[Any]:
    return [json.loads(measurement(arm, pair, seed, options).read_text())[key] for seed in range(options.seeds)]


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The Markdown table of docs/compose.md: means, and paired differences from `alone` with half widths."""
    lines = ["| condition, with | arm | alone | same scene's | another scene's | empty |", "|---|---|---|---|---|---|"]
    earlier = ""
    for entry in sorted(entries, key=lambda entry: (entry["pair"], entry["condition"])):  # stable: the arms keep order
        first, second = entry["pair"].split(" + ")
        name = f"{entry['condition']} ({entry['score']}), with {second if entry['condition'] == first else first}"
        digits = 2 if entry["more_is_better"] else 1
        cells = [f"{entry['cases']['alone']['mean']:.{digits}f}"]
        for case in CASES[1:]:
            found, sign = entry["better_than_alone"][case], 1 if entry["more_is_better"] else -1
            half = found["high"] - found["mean"]
            mean = entry["cases"][case]["mean"]
            cells.append(f"{mean:.{digits}f} ({sign * found['mean']:+.{digits}f} ± {half:.{digits}f})")
        lines.append(f"| {name if name != earlier else ''} | {entry['arm']} | {' | '.join(cells)} |")
        earlier = name
    return "\n".join(lines)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=64, help="held-out scenes")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each adapter")
    parser.add_argument("--scenes", type=int, default=400, help="scenes to train on")
    parser.add_argument("--updates", type=int, default=150, help="updates of each adapter alone")
    parser.add_argument("--joint_updates", type=int, default=60, help="further updates, alone or together")
    parser.add_argument("--sampling_steps", type=int, default=12, help="denoising steps of a picture")
    parser.add_argument("--processes", type=int, default=2, help="jobs at a time, each on one CPU thread")
    parser.add_argument("--work", type=Path, default=Path("runs/interference"))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    write_scenes(options)
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for seed in range(options.seeds):
            for job in [pool.submit(train_alone, kind, seed, options) for kind in EMPTY]:
                job.result()
            for job in [pool.submit(run_pair, pair, seed, options) for pair in PAIRS]:
                job.result()
    entries = [entry for pair in PAIRS for entry in summarize(pair, options)]
    names = ("pairs", "seeds", "scenes", "updates", "joint_updates", "sampling_steps", "processes")
    settings = {name: getattr(options, name) for name in names}
    content = {"settings": settings, "rows": entries}
    print(table(entries), flush=True)
    write_result("interference", content, options.out)


if __name__ == "__main__":
    main()
