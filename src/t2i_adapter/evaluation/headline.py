"""The answer of an evaluation: which metric answers, whether the adapter beats the controls, and typical pairs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from t2i_adapter.evaluation.evaluate import ADAPTER, NO_ADAPTER, OTHER_CONDITION, Evaluation
from t2i_adapter.evaluation.metrics import TOLERANCE, Estimate


@dataclass(frozen=True)
class Metric:
    """A metric in words.

    Attributes:
        name: the metric within a sentence.
        meaning: one or two sentences for a reader who does not know the metric.
        higher_is_better: whether a larger value is the better one.
        digits: decimals to show.
        most: end of the metric's range; None if it has none.
    """

    name: str
    meaning: str
    higher_is_better: bool = True
    digits: int = 2
    most: float | None = 1.0

    @property
    def direction(self) -> str:
        return "higher is better" if self.higher_is_better else "lower is better"

    @property
    def least(self) -> float:
        """The difference for which numbers of pairs are stated: 0.02 on a scale from 0 to 1, otherwise 1."""
        return 0.02 if self.most is not None else 1.0

    def show(self, value: float) -> str:
        return f"{value:.{self.digits}f}"

    def show_estimate(self, estimate: Estimate) -> str:
        """For example "0.93 (0.92 to 0.94)"."""
        return f"{self.show(estimate.mean)} ({self.show(estimate.low)} to {self.show(estimate.high)})"


METRICS = {
    "iou": Metric(
        "IoU of the objects",
        "IoU compares the objects of the generated picture with the true ones: "
        "their common area divided by the area that both cover. 0 is no overlap, 1 is the exact shape and place.",
    ),
    "edge_f1": Metric(
        "F1 of the objects' outline",
        "F1 of the two outlines; "
        f"a pixel matches within {100 * TOLERANCE:.2f} % of the side. 0 is no match, 1 is a full match.",
    ),
    "condition_f1": Metric(
        "agreement with the condition (F1)",
        "The condition of the generated picture is compared with the pair's own; "
        f"a pixel matches within {100 * TOLERANCE:.2f} % of the side. "
        "0 is no common line, 1 is every line in its place.",
    ),
    "condition_error": Metric(
        "difference from the condition (RMS)",
        "The condition of the generated picture is compared with the pair's own. 0 is equal, 1 is black against white.",
        higher_is_better=False,
        digits=3,
    ),
    "f1_exact": Metric(
        "agreement with the condition (F1), exact",
        "As the agreement with the condition, but a pixel matches only at its own place. A picture moved by one pixel "
        "has a low value.",
    ),
    "f1_1px": Metric(
        "agreement with the condition (F1), within 1 px",
        "As the agreement with the condition, within 1 pixel of the picture.",
    ),
    "f1_2px": Metric(
        "agreement with the condition (F1), within 2 px",
        "As the agreement with the condition, within 2 pixels of the picture.",
    ),
    "f1_4px": Metric(
        "agreement with the condition (F1), within 4 px",
        "As the agreement with the condition, within 4 pixels of the picture.",
    ),
    "condition_iou": Metric(
        "IoU of the condition's area",
        "The white area of the generated picture's condition is compared with the pair's own.",
    ),
    "condition_miou": Metric(
        "mIoU of the condition's classes",
        "The mean IoU of the classes, from one confusion matrix over all pictures.",
    ),
    "label_accuracy": Metric(
        "share of pixels of the right class",
        "The class of each pixel of the generated picture is compared with the pair's condition.",
    ),
    "ms_ssim": Metric(
        "agreement with the condition (MS-SSIM)",
        "The condition of the generated picture is compared with the pair's own at several scales. 1 is equal.",
    ),
    "depth_error": Metric(
        "difference in depth (RMS) after scale and shift",
        "The depth of the generated picture is scaled and shifted to fit the pair's condition best. 0 is equal.",
        higher_is_better=False,
        digits=3,
    ),
    "depth_spearman": Metric(
        "rank correlation of the depth (Spearman)",
        "1 is the same order from near to far, 0 is no relation.",
    ),
    "depth_rmse_255": Metric(
        "difference in depth (RMS), 0 to 255",
        "The depth of the generated picture is compared with the pair's condition, without scale and shift.",
        higher_is_better=False,
        digits=1,
        most=None,
    ),
    "condition_color": Metric(
        "difference of the condition's colours (CIEDE2000)",
        "The mean over the cells of the colour map. A difference of 1 is just visible.",
        higher_is_better=False,
        most=None,
    ),
    "normal_angle": Metric(
        "angle between the surfaces' directions, degrees",
        "The mean over all pixels. 0 is equal.",
        higher_is_better=False,
        digits=1,
        most=None,
    ),
    "pose_oks": Metric(
        "agreement of the people's joints (OKS)",
        "The joints of the people in the generated picture are compared with those in the target. 1 is equal; a person "
        "without a counterpart counts 0.",
    ),
    "pose_pck": Metric(
        "share of the joints in their place (PCK)",
        "A joint is in its place within a tenth of the torso's length.",
    ),
    "people_matched": Metric(
        "share of the target's people that are found",
        "A person is found if a person of the generated picture has an OKS of 0.5 or more with it.",
    ),
    "second_condition_f1": Metric(
        "agreement with the target by a second judge (F1)",
        "Another annotator makes a map of the generated picture and of the target, and the two are compared.",
    ),
    "second_condition_error": Metric(
        "difference from the target by a second judge (RMS)",
        "Another annotator makes a map of the generated picture and of the target, and the two are compared.",
        higher_is_better=False,
        digits=3,
    ),
    "clip_score": Metric(
        "agreement with the prompt (CLIP score)",
        "100 times the cosine between CLIP's vectors of the picture and of the prompt, or 0 if that is negative.",
        digits=1,
        most=None,
    ),
    "kid": Metric(
        "distance of all pictures from all targets (KID)",
        "The squared distance of the two sets of pictures in the features of Inception v3. It can be below 0.",
        higher_is_better=False,
        digits=4,
        most=None,
    ),
    "fid": Metric(
        "distance of all pictures from all targets (FID)",
        "The distance of the two sets of pictures in the features of Inception v3. It is too large for few pictures.",
        higher_is_better=False,
        digits=1,
        most=None,
    ),
    "diversity": Metric(
        "difference between the pictures of one condition (RMS in CIELAB)",
        "The pictures of one pair are compared with each other, scaled down by 8. 0 is equal pictures for all seeds.",
        most=None,
        digits=1,
    ),
    "clipped": Metric(
        "share of clipped pixels above the target's",
        "Pixels with a channel at 0 or 255. 0 is no more than in the target.",
        higher_is_better=False,
        digits=3,
    ),
    "saturation": Metric(
        "chroma above the target's (CIELAB)",
        "The mean chroma of the picture minus the target's. 0 is no more than in the target.",
        higher_is_better=False,
        digits=1,
        most=None,
    ),
    "object_color": Metric(
        "colour of the objects against the prompt (CIEDE2000)",
        "A difference of 1 is just visible; unrelated colours differ by 30 and more.",
        higher_is_better=False,
        most=None,
    ),
    "background_color": Metric(
        "colour of the background against the prompt (CIEDE2000)",
        "A difference of 1 is just visible; unrelated colours differ by 30 and more.",
        higher_is_better=False,
        most=None,
    ),
}
CONTROLS = {OTHER_CONDITION: "with another pair's condition", NO_ADAPTER: "without the adapter"}
"""Column -> its words in a sentence."""

ANSWERS = (
    *("condition_iou", "depth_error", "label_accuracy", "condition_color", "normal_angle", "pose_oks", "ms_ssim"),
    *("condition_f1", "condition_error"),
)
"""The metrics that can answer, the one for a kind of map before those for all kinds. Each has a value for a pair."""

Verdict = Literal["better", "open", "worse"]


@dataclass(frozen=True)
class Headline:
    """The answer of an evaluation.

    Attributes:
        metric: the key of the metric that answers.
        verdict: "better" if the adapter's interval lies on the better side of every control's interval, "worse" if it
            lies on the worse side of one, else "open".
        title: the verdict as a short sentence.
        sentence: the means and intervals of the adapter and the controls.
        line: means of the adapter and the controls and the adapter's interval, on one short line.
        wins: a sentence with the number of pairs in which the adapter beats all controls; "" without controls.
    """

    metric: str
    verdict: Verdict
    title: str
    sentence: str
    line: str
    wins: str


def headline(evaluation: Evaluation) -> Headline:
    """Returns the answer. The evaluation needs the column ADAPTER."""
    key = headline_metric(evaluation)
    metric, estimates = METRICS[key], evaluation.estimates[key]
    controls = [column for column in CONTROLS if column in estimates]
    sentence = f"The {metric.name} is {metric.show_estimate(estimates[ADAPTER])} with the adapter"
    against = [f"{metric.show_estimate(estimates[column])} {CONTROLS[column]}" for column in controls]
    sentence += f", against {' and '.join(against)}." if against else "."
    means = [f"{metric.show(estimates[column].mean)} {CONTROLS[column]}" for column in controls]
    line = ", ".join([f"{metric.show_estimate(estimates[ADAPTER])} with the adapter", *means])
    verdict = _verdict(estimates[ADAPTER], [estimates[column] for column in controls], metric)
    titles = {
        "better": "Yes, the adapter controls the picture.",
        "open": "Control is not shown: the intervals overlap." if controls else "No control was generated.",
        "worse": "No, the adapter does not control the picture.",
    }
    return Headline(key, verdict, titles[verdict], sentence, f"{metric.name}: {line}", _wins(evaluation, key, controls))


def headline_metric(evaluation: Evaluation) -> str:
    """Returns what the judge measures for its kind of map, if there was a judge, else "iou"."""
    return headline_key(evaluation.estimates)


def headline_key(metrics: Collection[str]) -> str:
    """As `headline_metric`, from the names of the metrics that were measured."""
    return next((key for key in ANSWERS if key in metrics), "iou")


def rank_pairs(evaluation: Evaluation, columns: Sequence[str] = (ADAPTER,)) -> list[int]:
    """Returns the indices of all pairs, best first by the headline metric's mean over `columns`.

    Pairs without a value come last; equal pairs keep their order.
    """
    key = headline_metric(evaluation)
    rows, sign = [evaluation.values[key][column] for column in columns], -1 if METRICS[key].higher_is_better else 1

    def badness(index: int) -> tuple[bool, float]:
        values = [value for row in rows if (value := row[index]) is not None]
        return (False, sign * sum(values) / len(values)) if values else (True, 0.0)

    return sorted(range(len(evaluation.pairs)), key=badness)


def typical_pairs(evaluation: Evaluation, count: int = 5, columns: Sequence[str] = (ADAPTER,)) -> list[tuple[int, str]]:
    """Returns (index of a pair, its place in words) at `count` evenly spaced ranks, from the best to the worst."""
    ranks, total = rank_pairs(evaluation, columns), len(evaluation.pairs)
    count = min(count, total)
    places = [round(n * (total - 1) / max(1, count - 1)) for n in range(count)]
    names = {0: "best", total - 1: "worst"}
    if count % 2 and count > 1:
        names.setdefault(places[count // 2], "median")
    if count == 5:
        names.setdefault(places[1], "upper quartile")
        names.setdefault(places[3], "lower quartile")
    return [
        (
            ranks[place],
            f"{names[place]}, rank {place + 1} of {total}" if place in names else f"rank {place + 1} of {total}",
        )
        for place in places
    ]


def _verdict(adapter: Estimate, controls: Sequence[Estimate], metric: Metric) -> Verdict:
    def is_better(a: Estimate, b: Estimate) -> bool:
        return a.low > b.high if metric.higher_is_better else a.high < b.low

    if any(is_better(control, adapter) for control in controls):
        return "worse"
    return "better" if controls and all(is_better(adapter, control) for control in controls) else "open"


def _wins(evaluation: Evaluation, key: str, controls: Sequence[str]) -> str:
    """Counts the pairs that have all values."""
    if not controls:
        return ""
    sign = 1 if METRICS[key].higher_is_better else -1
    rows = zip(*(evaluation.values[key][column] for column in (ADAPTER, *controls)), strict=True)
    whole = [[sign * value for value in row if value is not None] for row in rows if None not in row]
    won = sum(own > max(others) for own, *others in whole)
    beaten = "both controls" if len(controls) == 2 else "the control"
    return f"The adapter is better than {beaten} in {won} of {len(whole)} pairs."
