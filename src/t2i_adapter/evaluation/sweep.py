"""Searches the sampling options with which an adapter controls best, and confirms the answer on fresh pairs.

The points of a grid are measured on few pairs, and the better ones on more (`halving.py`). Control is raised; prompt
and quality must not get worse by more than a margin. The two best points are then measured on pairs that took no part
in the choice, and so is the fitted schedule of strengths (`bands.py`). Only what these pairs confirm is recommended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import date
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from t2i_adapter.errors import UserError
from t2i_adapter.evaluation.bands import Band, fit_bands, measure_losses, middle_timesteps, schedule_text
from t2i_adapter.evaluation.evaluate import picture_seeds
from t2i_adapter.evaluation.halving import (
    CANDIDATES,
    STATEMENTS_ALPHA,
    Comparison,
    Goal,
    Limit,
    Search,
    compare,
    halve,
    most_pictures,
    recommend,
    rung_sizes,
)
from t2i_adapter.evaluation.headline import METRICS, headline_key
from t2i_adapter.evaluation.pairs import Pair
from t2i_adapter.evaluation.sweep_options import describe_point, point_values
from t2i_adapter.evaluation.sweep_values import ValueFile, Values
from t2i_adapter.generation.generate import TextStates, encode_prompts, generate
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.models.family import AdapterPipeline
from t2i_adapter.progress import Bar, progress_bar
from t2i_adapter.types import CHUNK_TOKENS, MaxTokens

MARGINS = {"object_color": 1.0, "background_color": 1.0, "saturation": 2.0, "clipped": 0.02, "clip_score": 0.5}
"""Metric of prompt or quality -> how much worse than the default's its mean may be, in its unit.

A CIEDE2000 difference of 1 is just visible; saturation is a mean CIELAB chroma, clipped a share of pixels.
"""
SHOWN_PAIRS = 4
"""Fresh pairs of which the page shows pictures."""
LOSS_PAIRS = 64
"""Pairs, at most, of the loss at each noise level."""
Measure = Callable[[Image.Image, Pair], Mapping[str, float | None]]
"""A picture and its pair -> all metrics of the picture."""


@dataclass(frozen=True)
class Schedule:
    """The fitted schedule of strengths, and what pictures say about it.

    Attributes:
        bands: the noise levels.
        text: the schedule as the option `scale_schedule` takes it; None if every fitted strength may be 1.
        comparison: the recommended point with the schedule against it without, on fresh pairs; None without a schedule.
        values: those of the recommended point with the schedule on fresh pairs; None without a schedule.
    """

    bands: Sequence[Band]
    text: str | None = None
    comparison: Comparison | None = None
    values: Values | None = None

    @property
    def is_kept(self) -> bool:
        return self.comparison is not None and self.comparison.is_confirmed


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep. Points are named by their place in `points`; 0 is the default.

    Attributes:
        points: the points that were measured.
        search: their values on the choosing pairs.
        candidates: the points that were compared with the default on fresh pairs, best first.
        comparisons: one for each candidate.
        recommended: the point that is recommended; 0 if no candidate was confirmed.
        fresh: the values of the default and the candidates on fresh pairs.
        targets: metric -> its mean over the true pictures of all pairs, the best that can be reached.
        schedule: strength by noise level; None if it was not measured.
        pairs: the fresh pairs whose pictures are shown.
        pictures: the default's pictures of these pairs.
        better: the pictures with the recommended options, with the schedule if it is kept.
        count: number of pictures that were measured.
        seconds: time of all of it.
    """

    points: Sequence[SamplingOptions]
    search: Search
    candidates: Sequence[int]
    comparisons: Sequence[Comparison]
    recommended: int
    fresh: Mapping[int, Values]
    targets: Mapping[str, float | None]
    schedule: Schedule | None
    pairs: Sequence[Pair]
    pictures: Sequence[Image.Image]
    better: Sequence[Image.Image]
    count: int
    seconds: float

    @property
    def goal(self) -> Goal:
        return self.search.goal

    @property
    def is_default(self) -> bool:
        """Whether nothing better than the default was confirmed."""
        return self.recommended == 0 and not (self.schedule and self.schedule.is_kept)

    def sampling(self) -> SamplingOptions:
        """The recommended options, with the schedule if pictures confirm it."""
        point = self.points[self.recommended]
        if self.schedule and self.schedule.is_kept and self.schedule.text:
            return replace(point, scale_schedule=self.schedule.text)
        return point

    def answer(self) -> str:
        """The result in one or two sentences."""
        metric = METRICS[self.goal.metric]
        if self.recommended:
            found = self.comparisons[list(self.candidates).index(self.recommended)]
            point = describe_point(self.points[self.recommended])
            text = (
                f"Recommended: {point}. On {found.pairs} fresh pairs its gain over the default in {metric.name} is "
                f"{_signed(found.gain.mean)}, with a lower bound of {_signed(found.gain.low)}."
            )
        elif not self.candidates:
            text = "No point has better control than the default at a quality within the margins; the default stays."
        else:
            text = f"Fresh pairs confirm no point as better; the default stays. {self._doubt()}"
        return f"{text} {self._about_schedule()}".strip()

    def _doubt(self) -> str:
        """Why the best candidate was not confirmed."""
        metric, best = METRICS[self.goal.metric], self.comparisons[0]
        point = describe_point(self.points[self.candidates[0]])
        if not best.is_better:
            return (
                f"The best candidate was {point}: its gain in {metric.name} is {_signed(best.gain.mean)} there, with a "
                f"lower bound of {_signed(best.gain.low)}."
            )
        names = ", ".join(METRICS[name].name for name in best.too_harmful)
        return (
            f"The best candidate was {point}: its control is better, but it is not shown to stay within the margin of: "
            f"{names}."
        )

    def _about_schedule(self) -> str:
        if self.schedule is None:
            return ""
        if self.schedule.text is None:
            return "The fitted strength is 1 within its interval at every noise level, so there is no schedule to test."
        if self.schedule.is_kept:
            return f"Pictures confirm the fitted schedule {self.schedule.text}."
        return "Pictures do not confirm the fitted schedule of strengths, so it is not recommended."

    def record(self, digest: str) -> dict[str, Any]:
        """Returns what the adapter's record holds under `sampling`: the point, and where it comes from."""
        default, best = self.fresh[0], self.fresh[self.recommended]
        if self.schedule and self.schedule.is_kept and self.schedule.values:
            best = self.schedule.values
        return {
            **point_values(self.sampling()),
            "from": {
                "metric": self.goal.metric,
                "default": _mean(default[self.goal.metric]),
                "recommended": _mean(best[self.goal.metric]),
                "default_point": point_values(self.points[0]),
                "pairs": len(default[self.goal.metric]),
                "steps": self.points[0].steps,
                "adapter_sha256": digest,
                "date": date.today().isoformat(),
            },
        }

    def to_json(self) -> dict[str, Any]:
        """Returns everything that was measured as plain JSON types, without the pictures."""
        goal, search = self.goal, self.search
        final = {point: (count, points) for count, points in search.rungs for point in points}
        return {
            "metric": goal.metric,
            "higher_is_better": goal.sign > 0,
            "margins": {metric: limit.margin for metric, limit in goal.limits.items()},
            "answer": self.answer(),
            "recommended": {"is_default": self.is_default, **point_values(self.sampling())},
            "targets": dict(self.targets),
            "points": [
                {
                    **point_values(point),
                    "pairs": final[number][0],
                    "means": {metric: _mean(row) for metric, row in search.values[number].items()},
                    "against_default": compare(
                        goal, search.values[number], search.first(0, final[number][0]), 0.025
                    ).to_json(),
                    "on_front": number in search.front(),
                }
                for number, point in enumerate(self.points)
            ],
            "rungs": [{"pairs": count, "points": len(points)} for count, points in search.rungs],
            "confirmation": [
                {
                    **point_values(self.points[number]),
                    "means": {metric: _mean(row) for metric, row in self.fresh[number].items()},
                    "default_means": {metric: _mean(row) for metric, row in self.fresh[0].items()},
                    "against_default": comparison.to_json(),
                }
                for number, comparison in zip(self.candidates, self.comparisons, strict=True)
            ],
            "bands": [band.to_json() for band in self.schedule.bands] if self.schedule else None,
            "schedule": self._schedule_json(),
            "pictures": self.count,
            "seconds": round(self.seconds, 1),
        }

    def _schedule_json(self) -> dict[str, Any] | None:
        if self.schedule is None:
            return None
        compared = self.schedule.comparison
        return {
            "scale_schedule": self.schedule.text,
            "against_no_schedule": compared.to_json() if compared else None,
            "kept": self.schedule.is_kept,
        }


def _signed(gain: float) -> str:
    """A gain as text; its sign is + where a point is better, whatever the direction of the metric."""
    return f"{gain:+.3f}"


def _mean(row: Iterable[float | None]) -> float | None:
    values = [value for value in row if value is not None]
    return float(np.mean(values)) if values else None


def make_goal(metrics: Iterable[str], wanted: str | None = None) -> Goal:
    """Returns what a sweep over pictures with these metrics raises and what it holds.

    wanted: the metric to raise; None takes the headline's. Raises UserError if it is not measured.
    """
    known = [metric for metric in metrics if metric in METRICS]
    if wanted is not None and (wanted not in known or wanted in MARGINS):
        allowed = ", ".join(metric for metric in known if metric not in MARGINS)
        raise UserError(
            f"{wanted}: allowed are the metrics of control that are measured here: {allowed}.", option=_ASKED
        )
    metric = wanted or headline_key(known)
    limits = {name: Limit(_sign(name), MARGINS[name]) for name in known if name in MARGINS}
    return Goal(metric, _sign(metric), limits)


_ASKED = "sweep_metric"


def _sign(metric: str) -> int:
    return 1 if METRICS[metric].higher_is_better else -1


def sweep(
    pipeline: AdapterPipeline,
    choosing: Sequence[Pair],
    fresh: Sequence[Pair],
    points: Sequence[SamplingOptions],
    *,
    measure: Measure,
    metric: str | None = None,
    bands: bool = True,
    seed: int = 0,
    max_tokens: MaxTokens = CHUNK_TOKENS,
    stored: ValueFile | None = None,
    say: Callable[[str], object] = print,
) -> Sweep:
    """Measures the points of a sweep and returns what is recommended.

    Args:
        choosing: pairs on which points are chosen; the first rung takes 8 of them, the last one all.
        fresh: other pairs, on which the chosen points and the schedule are confirmed.
        points: what to measure, the default first (`sweep_options.make_points`).
        measure: measures one picture.
        metric: the metric of control to raise; None takes the headline's.
        bands: fit and test a schedule of strengths too.
        seed: decides the noise of each pair.
        stored: measurements of an earlier call with the same pairs and settings; new ones are added.
        say: prints a line. Raises UserError.
    """
    assert fresh and len(choosing) >= 2
    began, sizes = time.monotonic(), rung_sizes(len(choosing))
    pairs = [*choosing, *fresh]
    of_targets = [measure(pair.target, pair) for pair in pairs]
    metrics = list(dict.fromkeys(name for row in of_targets for name in row))
    goal = make_goal(metrics, metric)
    most = most_pictures(len(points), sizes) + (CANDIDATES + 1 + bands) * len(fresh)
    limits = ", ".join(f"{name} {limit.margin:g}" for name, limit in goal.limits.items())
    say(
        f"sweep: {len(points)} points on {', '.join(map(str, sizes))} pairs, then {CANDIDATES} candidates and the "
        f"default on {len(fresh)} fresh pairs: at most {most:,} pictures of {points[0].steps} steps.\n"
        f"  raises {goal.metric}; margins of quality: {limits or 'none'}"
    )
    most_guidance = max(point.guidance for point in points)
    texts = encode_prompts(pipeline, [pair.prompt for pair in pairs], guidance=most_guidance, max_tokens=max_tokens)
    first, last, shown = len(choosing), len(pairs), slice(len(choosing), len(choosing) + SHOWN_PAIRS)
    with progress_bar("sweep", most, "picture", disable=None) as bar:

        def show(line: str) -> None:
            with tqdm.external_write_mode():
                say(line)

        measured = _Pictures(pipeline, pairs, texts, seed, measure, metrics, stored or ValueFile(None, ""), bar)

        def measure_point(point: int, start: int, end: int) -> Values:
            values = measured.values(points[point], start, end)
            if 0 < measured.made == end - start:
                show(f"  {measured.pace:.2g} s a picture: at most {most * measured.pace / 60:.1f} minutes")
            return values

        def on_rung(search: Search) -> None:
            count, alive = search.rungs[-1]
            best = max(alive, key=search.control)
            show(
                f"  {time.monotonic() - began:5.0f} s: {count} pairs, {len(alive)} points; best control: "
                f"{'the default' if best == 0 else describe_point(points[best])}"
            )

        search = halve(len(points), 0, goal, measure_point, sizes, on_rung=on_rung)
        candidates = search.candidates()
        show(f"  {len(fresh)} fresh pairs, {len(candidates)} candidates and the default")
        values = {number: measured.values(points[number], first, last) for number in (0, *candidates)}
        alpha = STATEMENTS_ALPHA / max(1, len(candidates))
        comparisons = [compare(goal, values[number], values[0], alpha) for number in candidates]
        recommended, schedule = recommend(candidates, comparisons, 0), None
        best = points[recommended]
        if bands:
            show("  the loss at each noise level")
            schedule = Schedule(measured.bands(min(LOSS_PAIRS, len(choosing))))
            if text := schedule_text(schedule.bands):
                scheduled = replace(best, scale_schedule=text)
                with_schedule = measured.values(scheduled, first, last)
                # The point to compare with was chosen on these pairs, out of the candidates and the default.
                alpha = STATEMENTS_ALPHA / (len(candidates) + 1)
                compared = compare(goal, with_schedule, values[recommended], alpha)
                schedule = Schedule(schedule.bands, text, compared, with_schedule)
                best = scheduled if schedule.is_kept else best
        pictures = measured.generate(points[0], shown)
        better = pictures if best == points[0] else measured.generate(best, shown)
    return Sweep(
        points=points,
        search=search,
        candidates=candidates,
        comparisons=comparisons,
        recommended=recommended,
        fresh=values,
        targets={name: _mean(row.get(name) for row in of_targets) for name in metrics},
        schedule=schedule,
        pairs=fresh[:SHOWN_PAIRS],
        pictures=pictures,
        better=better,
        count=measured.count,
        seconds=time.monotonic() - began,
    )


class _Pictures:
    """Generates and measures pictures of the pairs, all points with the same noise.

    Attributes:
        count: pictures that were measured, in this call or an earlier one.
        made: pictures of this call alone.
    """

    def __init__(
        self,
        pipeline: AdapterPipeline,
        pairs: Sequence[Pair],
        texts: TextStates,
        seed: int,
        measure: Measure,
        metrics: Sequence[str],
        stored: ValueFile,
        bar: Bar,
    ) -> None:
        self.pipeline, self.pairs, self.texts, self.seed = pipeline, pairs, texts, seed
        self.measure, self.metrics, self.stored, self.bar = measure, metrics, stored, bar
        self.seeds = picture_seeds(len(pairs), seed)
        self.count, self.made, self._seconds = 0, 0, 0.0

    @property
    def pace(self) -> float:
        """Seconds a picture."""
        return self._seconds / self.made

    def values(self, sampling: SamplingOptions, start: int, end: int) -> Values:
        """Returns the values of pairs `start` to `end`: metric -> one value a pair."""
        key = f"{sampling} {start}-{end}"
        found = self.stored.get(key)
        if found is None or set(found) != set(self.metrics):
            began, part = time.monotonic(), slice(start, end)
            rows = [self.measure(*both) for both in zip(self.generate(sampling, part), self.pairs[part], strict=True)]
            found = {name: [row.get(name) for row in rows] for name in self.metrics}
            self.stored.put(key, found)
            self.made += len(rows)
            self._seconds += time.monotonic() - began
        self.count += end - start
        self.bar.update(end - start)
        return found

    def generate(self, sampling: SamplingOptions, part: slice) -> list[Image.Image]:
        """Returns the pictures of some of the pairs."""
        pairs = self.pairs[part]
        return generate(
            self.pipeline,
            _part(self.texts, part, is_guided=sampling.guidance > 1),
            [pair.condition for pair in pairs],
            self.seeds[part],
            size=(pairs[0].condition.height, pairs[0].condition.width),
            sampling=sampling,
        )

    def bands(self, count: int) -> list[Band]:
        """Fits the strength of least loss at each noise level, on the first `count` pairs."""
        timesteps = middle_timesteps(len(self.pipeline.scheduler.alphas_cumprod))
        states, pooled = self.texts.states[:count], self.texts.pooled[:count]
        losses = measure_losses(self.pipeline, self.pairs[:count], states, pooled, self.seeds[:count], timesteps)
        return fit_bands(losses, timesteps, self.seed)


def _part(texts: TextStates, part: slice, *, is_guided: bool) -> TextStates:
    """The states of some of the prompts, without negative ones unless guidance is on."""
    rows = {field.name: getattr(texts, field.name) for field in fields(texts)}
    kept = {name: row for name, row in rows.items() if row is not None and (is_guided or "negative" not in name)}
    some: dict[str, Any] = {name: kept[name][part] if name in kept else None for name in rows}
    return TextStates(**some)
