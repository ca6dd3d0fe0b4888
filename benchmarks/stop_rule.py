"""Simulates runs whose truth is known, and counts how often the statements of training/advice.py are wrong and how late
they come.

A run has 32 pairs (or 8, 16), 4 noise bands and a look every 100 updates. The losses of a run are those of the pairs
without an adapter, log-normal over the pairs, times what its scenario says. All looks of a run share pairs and noise:

- no effect: the right condition and another pair's have the same expected loss. `read` is wrong. In "new noise" nothing
  of a look comes back in the next one.
- twentieth strength, hundredth strength: the use of a weak adapter, USE and EFFECT below, and a fifth of it with half
  of the effect size.
- use at the limit: the use is exactly the limit below which `not_read` is said, so `not_read` is wrong.
- no use: the condition changes the loss of no pair.
- gain at the margin: the loss falls from each window to the next by exactly the margin. `plateau` is wrong.
- twice the margin: a slow, steady rise. `plateau` is wrong.
- plateau: the benefit rises until look 6 of 20, then it stays.
- U-curve: from look 8 of 20 on, the benefit of held-out pairs falls, that of the training's pairs rises.
- no overfitting: both stay from look 6 on.
- no benefit: the condition is read; on held-out pairs it neither helps nor harms on average, and it helps on the
  training's pairs. `harm` is wrong. In "no benefit, use hidden" the use spreads too widely to be proven, and `not_read`
  is wrong.
- other conditions: as "no benefit", but held-out pairs lose a tenth of what they have.

The pairs' effects follow a law: normal; log-normal, skewed with a heavy tail; quarter, a quarter of the pairs has all
of the effect (of the use, another quarter in each band); skewed, log-normal turned round, so that a one-sided lower
bound is wrong more often. `spread` is the standard deviation over the pairs of the difference between two looks, in
units of the loss without the adapter. `wander` is that of the adapter's own loss from look to look, which all pairs
share.

    OMP_NUM_THREADS=1 python benchmarks/stop_rule.py
    OMP_NUM_THREADS=1 python benchmarks/stop_rule.py --runs 100 --out short.json
    OMP_NUM_THREADS=1 python benchmarks/stop_rule.py --scenarios "no effect, new noise" --runs 10000
    python benchmarks/stop_rule.py --table

All 2,000 runs of each row take 5 minutes of CPU time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from common import make_parser, newest, read_earlier, write_result

from t2i_adapter.statistics import look_alpha, mean_interval, t_quantile
from t2i_adapter.training.advice import (
    LEAST_PAIRS,
    LEAST_USE,
    MARGIN,
    WINDOW_LOOKS,
    WINDOW_SHARE,
    Advisor,
    Look,
    benefit,
    use,
)

EVERY = 100  # updates from look to look
BANDS = 4
CORRELATION = 0.8  # of a pair's noise at a look with that at the next one
USE = np.array([0.06, 0.17, 0.28, 0.23])
"""Assumed use by band of an adapter at a twentieth of its strength: the size that one adapter of nano had."""
EFFECT = np.array([0.92, 1.17, 1.01, 0.92])
"""Assumed effect size by band: the use's mean over its standard deviation of the pairs."""
NEW_NOISE = "no effect, new noise"
FULL = 1000  # steps of the demo's size; `not_read` may be said from update 200 on


@dataclass(frozen=True)
class Row:
    """One line of the table: a scenario and its conditions."""

    scenario: str
    statement: str
    """The statement that is counted."""
    is_wrong: bool
    """Whether the statement is wrong in this scenario."""
    pairs: int = 32
    law: str = "normal"
    spread: float = 0.01
    wander: float = 0.0
    looks: int = 15


def effects(rng: np.random.Generator, law: str, shape: tuple[int, ...]) -> np.ndarray:
    """Factors of mean 1 and, but for `quarter`, of standard deviation 1."""
    if law == "normal":
        return 1 + rng.normal(size=shape)
    if law == "quarter":
        return 4.0 * (rng.random(shape) < 0.25)
    sigma = np.sqrt(np.log(2))
    skewed = np.exp(sigma * rng.normal(size=shape) - sigma**2 / 2)
    return 2 - skewed if law == "skewed" else skewed


def noise(rng: np.random.Generator, looks: int, shape: tuple[int, ...], correlation: float = CORRELATION) -> np.ndarray:
    """(looks, *shape) normal numbers of variance 1, each correlated with the one of the look before it."""
    values = rng.normal(size=(looks, *shape))
    for look in range(1, looks):
        values[look] = correlation * values[look - 1] + np.sqrt(1 - correlation**2) * values[look]
    return values


@dataclass(frozen=True)
class Losses:
    """Losses of a run's looks, in the shapes of `Look` with the looks in front."""

    none: np.ndarray
    right: np.ndarray
    other: np.ndarray
    training: np.ndarray | None = None
    truth: np.ndarray | None = None
    """(looks,) expected benefit of held-out pairs."""


def without_use(rng: np.random.Generator, row: Row, none: np.ndarray) -> Losses:
    """The pairs differ between the two conditions by numbers of mean 0: half of the variance is the pair's, half is the
    band's. The law `log-normal` is symmetric here, as the difference of two equal laws is."""
    shape = none.shape
    pair, band = (effects(rng, row.law, size) for size in ((shape[0], 1), shape))
    if row.law == "log-normal":
        pair, band = pair - effects(rng, row.law, (shape[0], 1)), band - effects(rng, row.law, shape)
    else:
        pair, band = pair - 1, band - 1
    if row.scenario == NEW_NOISE:
        difference = 0.2 * rng.normal(size=(row.looks, *shape))
    else:
        difference = 0.2 * (pair + band) / np.sqrt(2) + 0.1 * noise(rng, row.looks, shape)
    return Losses(none, np.tile(0.9 * none, (row.looks, 1, 1)), 0.9 * none + difference)


def with_use(rng: np.random.Generator, row: Row, none: np.ndarray, share: float, effect: np.ndarray) -> Losses:
    """The use is USE times `share`, in units of the loss without the adapter; `effect` is its mean over its standard
    deviation, by band. Bands share a third of the variance."""
    shape = none.shape
    each = effects(rng, row.law, shape) - 1
    if row.law == "normal":
        each = np.sqrt(1 / 3) * rng.normal(size=(shape[0], 1)) + np.sqrt(2 / 3) * each
    own = USE * share * (1 + (each + 0.3 * noise(rng, row.looks, shape)) / effect)
    return Losses(none, np.tile(0.9 * none, (row.looks, 1, 1)), 0.9 * none + own)


def at_the_limit(rng: np.random.Generator, row: Row, none: np.ndarray) -> Losses:
    return with_use(rng, row, none, LEAST_USE / float(USE.mean()), EFFECT)


def unread(rng: np.random.Generator, row: Row, none: np.ndarray) -> Losses:
    """The difference of the conditions has mean 0 and half a percent of spread over the pairs."""
    right = np.tile(0.9 * none, (row.looks, 1, 1))
    return Losses(none, right, right + 0.005 * noise(rng, row.looks, none.shape))


def with_curve(rng: np.random.Generator, row: Row, none: np.ndarray, left: np.ndarray, seen: np.ndarray) -> Losses:
    """The remaining loss of held-out pairs follows `left` (looks,), that of the training's pairs `seen`. A pair takes
    part in the changes by its factor of the law. The use is 20 %."""
    looks, (pairs, bands) = row.looks, none.shape

    def losses(base: np.ndarray, curve: np.ndarray) -> np.ndarray:
        factors = effects(rng, row.law, (pairs, 1)) if row.law != "normal" else 1 + 0.3 * rng.normal(size=(pairs, 1))
        mean = base * (curve[0] - factors * (curve[0] - curve)[:, None, None])
        jitter = row.spread / np.sqrt(2) * noise(rng, looks, (pairs, 1))
        return mean * (1 + wander[:, None, None]) + jitter

    wander = row.wander * rng.normal(size=looks)
    right = losses(none, left)
    base = pair_losses(rng, pairs)
    training = np.stack([losses(base, seen), np.broadcast_to(base, (looks, pairs, bands))], axis=2)
    return Losses(none, right, right + 0.2 * none * (1 + 0.3 * rng.normal(size=none.shape)), training, 1 - left)


def falling(per_window: float) -> Callable[[np.random.Generator, Row, np.ndarray], Losses]:
    """The loss falls from a window of WINDOW_LOOKS looks to the next by the share `per_window`."""

    def make(rng: np.random.Generator, row: Row, none: np.ndarray) -> Losses:
        left = 0.5 * (1 - per_window) ** (np.arange(row.looks) / WINDOW_LOOKS)
        return with_curve(rng, row, none, left, left)

    return make


def level_from(look: int, count: int) -> np.ndarray:
    """(count,) remaining loss that falls from 0.8 to 0.5 at look number `look`, from 1, and stays there."""
    return np.interp(np.arange(1, count + 1), [1, look], [0.8, 0.5])


def plateau(rng: np.random.Generator, row: Row, none: np.ndarray) -> Losses:
    left = level_from(6, row.looks)
    return with_curve(rng, row, none, left, left)


def u_curve(rng: np.random.Generator, row: Row, none: np.ndarray) -> Losses:
    """Held-out loss: 0.8 to 0.5 at look 8, then up by 0.01 a look. Training: on down by 0.01 a look."""
    after = 0.01 * np.maximum(0, np.arange(1, row.looks + 1) - 8)
    left = level_from(8, row.looks)
    return with_curve(rng, row, none, left + after, left - after)


def helping_by(
    rng: np.random.Generator, row: Row, none: np.ndarray, benefit: float, *, is_hidden: bool = False
) -> Losses:
    """Held-out pairs have the mean benefit `benefit`, with 0.1 times the law over the pairs; those of the training 0.3.
    The use is 20 %, or hidden: 5 %, and twenty times as much from pair to pair."""
    pairs = len(none)
    own = benefit + 0.1 * (effects(rng, row.law, (pairs, 1)) - 1) + 0.03 * noise(rng, row.looks, none.shape)
    right = none * (1 - own)
    each = 0.05 * (1 + 20 * rng.normal(size=(pairs, 1))) if is_hidden else 0.2 * (1 + 0.3 * rng.normal(size=(pairs, 1)))
    base = pair_losses(rng, pairs)
    seen = base * (0.7 + 0.03 * noise(rng, row.looks, base.shape))
    training = np.stack([seen, np.broadcast_to(base, seen.shape)], axis=2)
    return Losses(none, right, right + each * none, training)


def pair_losses(rng: np.random.Generator, pairs: int) -> np.ndarray:
    """(pairs, BANDS) losses without an adapter: log-normal, standard deviation of the logarithm 0.5 over the pairs and
    0.3 over the bands of a pair."""
    return np.exp(0.5 * rng.normal(size=(pairs, 1)) + 0.3 * rng.normal(size=(pairs, BANDS)) - 0.17)


SCENARIOS: dict[str, Callable[[np.random.Generator, Row, np.ndarray], Losses]] = {
    "no effect": without_use,
    NEW_NOISE: without_use,
    "twentieth strength": partial(with_use, share=1.0, effect=EFFECT),
    "hundredth strength": partial(with_use, share=0.2, effect=EFFECT / 2),
    "use at the limit": at_the_limit,
    "no use": unread,
    "gain at the margin": falling(MARGIN),
    "twice the margin": falling(2 * MARGIN),
    "plateau": plateau,
    "U-curve": u_curve,
    "no overfitting": plateau,
    "no benefit": partial(helping_by, benefit=0.0),
    "no benefit, use hidden": partial(helping_by, benefit=0.0, is_hidden=True),
    "other conditions": partial(helping_by, benefit=-0.1),
}


def rows() -> list[Row]:
    """The lines of the table. With 8 pairs `plateau` is not said, so it is not simulated."""
    found: list[Row] = []
    laws = ("normal", "log-normal", "quarter")
    for pairs in (8, 16, 32):
        found += [
            *(Row("no effect", "read", True, pairs, law, looks=10) for law in ("normal", "log-normal", "skewed")),
            Row(NEW_NOISE, "read", True, pairs, looks=20),
            *(Row("twentieth strength", "read", False, pairs, law, looks=10) for law in ("normal", "log-normal")),
            Row("hundredth strength", "read", False, pairs, looks=10),
            *(Row("use at the limit", "not_read", True, pairs, law, looks=10) for law in laws),
            Row("no use", "not_read", False, pairs, looks=10),
            *(Row("no benefit", "harm", True, pairs, law, looks=10) for law in laws),
            *(Row("no benefit, use hidden", "not_read", True, pairs, law, looks=10) for law in laws),
            Row("other conditions", "harm", False, pairs, looks=10),
        ]
        if pairs >= LEAST_PAIRS:
            found += [
                *(Row("gain at the margin", "plateau", True, pairs, law) for law in laws),
                Row("twice the margin", "plateau", True, pairs, wander=0.005),
                *(Row("plateau", "plateau", False, pairs, spread=spread, looks=20) for spread in (0.01, 0.02, 0.03)),
                Row("plateau", "plateau", False, pairs, spread=0.02, wander=0.005, looks=20),
            ]
        found += [
            Row("no overfitting", "overfitting", True, pairs, spread=0.02, wander=0.005, looks=20),
            Row("U-curve", "overfitting", False, pairs, spread=0.02, wander=0.005, looks=20),
        ]
    return found


def simulate(row: Row, runs: int) -> dict[str, Any]:
    """The row with what its runs showed: the share of runs with the statement, the look that it was made at (median and
    90 % quantile of those runs), and without effect the share in which a plain test of 5 % at each look claims a use.

    For the U-curve also by how much the true benefit of the best checkpoint, and that of the measured maximum, are
    below the run's highest.
    """
    rng = np.random.default_rng([*row.scenario.encode(), *row.law.encode(), row.pairs])
    said: list[int] = []
    naive = 0
    chosen: list[tuple[float, float]] = []
    for _ in range(runs):
        losses = SCENARIOS[row.scenario](rng, row, pair_losses(rng, row.pairs))
        advisor = Advisor(steps=FULL, held_out=True)
        is_naive = False
        found = None
        for index in range(row.looks):
            training = None if losses.training is None else losses.training[index]
            look = Look(EVERY * (index + 1), losses.right[index], losses.other[index], losses.none, training)
            advices = advisor.add(look)
            if found is None and any(advice.kind == row.statement for advice in advices):
                found = index + 1
            if row.scenario in ("no effect", NEW_NOISE):
                is_naive |= mean_interval(use(look), 0.1).low > 0
            elif found is not None and row.scenario != "U-curve":
                break
        naive += is_naive
        if found is not None:
            said.append(found)
        if row.scenario == "U-curve" and losses.truth is not None:
            measured = [float(benefit(look).mean()) for look in advisor.looks]
            top, best = int(np.argmax(measured)), (advisor.best() or 0) // EVERY - 1
            chosen.append((losses.truth.max() - losses.truth[best], losses.truth.max() - losses.truth[top]))
    result = {**asdict(row), "runs": runs, "share": round(len(said) / runs, 4)}
    if said:
        result |= {"look": float(np.median(said)), "look_90": float(np.quantile(said, 0.9))}
    if row.scenario in ("no effect", NEW_NOISE):
        result["plain_test"] = round(naive / runs, 4)
    if chosen:
        result |= dict(zip(("best_below", "maximum_below"), np.mean(chosen, axis=0).round(4).tolist(), strict=True))
    return result


def compare_reads(runs: int, pairs: int = 32, look: int = 5) -> list[dict[str, Any]]:
    """Share of runs in which look number `look` shows a use: by the mean over the bands alone, by the bands alone, and
    by both, which share the error. The use is in all bands at half of its effect size, or in one band at all of it."""
    rng = np.random.default_rng(0)
    error = look_alpha(look)
    found = []
    for name, effect in (("all bands, half of the effect", EFFECT / 2), ("one band", EFFECT * [0, 0, 0, 1])):
        shared = rng.normal(size=(runs, pairs, 1))
        each = np.sqrt(1 / 3) * shared + np.sqrt(2 / 3) * rng.normal(size=(runs, pairs, BANDS))
        uses = USE / EFFECT * (effect + each)
        mean, band = _t(uses.mean(2)), _t(uses)
        is_in = {
            "mean": mean > _quantile(error, pairs),
            "bands": (band > _quantile(error / BANDS, pairs)).any(1),
            "both": (mean > _quantile(error / 2, pairs)) | (band > _quantile(error / 2 / BANDS, pairs)).any(1),
        }
        found.append({"use": name, "pairs": pairs, "look": look, **{k: float(v.mean()) for k, v in is_in.items()}})
    return found


def compare_windows(runs: int, pairs: int = 32, looks: int = 25) -> list[dict[str, Any]]:
    """Share of runs whose plateau from look 8 on is found: by the means of two windows, or by each look of the last
    window against the single look before it. Both spend the error of look k at their test k. correlation: of a pair's
    noise at a look with that at the next one."""
    rng = np.random.default_rng(0)
    found = []
    for spread, correlation in product((0.01, 0.02, 0.03), (CORRELATION, 0.0)):
        jitter = spread / np.sqrt(2) * noise(rng, looks, (runs, pairs), correlation)
        left = level_from(8, looks)[:, None, None] + jitter
        said = {"windows": np.zeros(runs, bool), "single looks": np.zeros(runs, bool)}
        for count in range(2 * WINDOW_LOOKS, looks + 1):
            length = max(WINDOW_LOOKS, round(count * WINDOW_SHARE))
            last, before = left[count - length : count], left[count - 2 * length : count - length]
            bound = _quantile(look_alpha(count - 2 * WINDOW_LOOKS + 1), pairs)
            said["windows"] |= _t(last.mean(0) - (1 - MARGIN) * before.mean(0)) > bound
            said["single looks"] |= (_t((last - (1 - MARGIN) * before[-1]).swapaxes(1, 2)) > bound).all(0)
        shares = {name: float(is_said.mean()) for name, is_said in said.items()}
        found.append({"spread": spread, "correlation": correlation, "pairs": pairs, "looks": looks, **shares})
    return found


def _t(values: np.ndarray) -> np.ndarray:
    """Student's statistic of the mean over the pairs, axis 1."""
    return values.mean(1) / values.std(1, ddof=1) * np.sqrt(values.shape[1])


def _quantile(error: float, pairs: int) -> float:
    return t_quantile(1 - error, pairs - 1)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a line for each scenario and its conditions, columns for the numbers of pairs."""
    counts = sorted({result["pairs"] for result in results})
    keys = ("scenario", "statement", "is_wrong", "law", "spread", "wander")
    lines: dict[tuple[Any, ...], dict[int, str]] = {}
    for result in results:
        shown = f"{100 * result['share']:.1f} %"
        if not result["is_wrong"] and "look" in result:
            shown += f", look {result['look']:.0f} ({result['look_90']:.0f})"
        if "plain_test" in result:
            shown += f"; plain tests {100 * result['plain_test']:.1f} %"
        lines.setdefault(tuple(result[key] for key in keys), {})[result["pairs"]] = shown
    head = ["scenario", "statement", "law", "spread", *(f"N = {count}" for count in counts)]
    out = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for (scenario, statement, is_wrong, law, spread, wander), cells in lines.items():
        name = f"`{statement}`" + (" (wrong)" if is_wrong else "")
        wide = f"{spread}" + (f", wander {wander}" if wander else "")
        out.append("| " + " | ".join([scenario, name, law, wide, *(cells.get(count, "") for count in counts)]) + " |")
    return "\n".join(out)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=2000, help="runs of each row (default: 2000)")
    parser.add_argument(
        "--scenarios", nargs="*", default=list(SCENARIOS), help="simulate only these, and copy the other rows"
    )
    parser.add_argument("--table", action="store_true", help="print the table of the newest result, measure nothing")
    args = parser.parse_args()
    if args.table:
        file = args.out or newest("stop_rule")
        print(table(json.loads(file.read_text(encoding="utf-8"))["rows"]) if file else "no result")
        return
    wanted = [row for row in rows() if row.scenario in args.scenarios]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(partial(simulate, runs=args.runs), wanted))
    others = [
        row for row in read_earlier("stop_rule", args.out).get("rows", []) if row["scenario"] not in args.scenarios
    ]
    results = sorted([*others, *results], key=lambda row: (list(SCENARIOS).index(row["scenario"]), row["pairs"]))
    print(table(results))
    choices = {"reads": compare_reads(args.runs), "windows": compare_windows(args.runs)}
    write_result("stop_rule", {"rows": results, "choices": choices}, args.out)


if __name__ == "__main__":
    main()
