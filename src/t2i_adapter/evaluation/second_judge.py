"""A second judge: an annotator that training never saw, which repeats the comparison of pictures with their targets.

A picture can score high with the annotator that made the conditions of the training because the adapter has learned
that annotator's habits. A judge of another formula has other habits.
"""

from __future__ import annotations

from t2i_adapter.annotators.registry import Annotator, open_annotator
from t2i_adapter.errors import UserError, flag
from t2i_adapter.evaluation.evaluate import ADAPTER, OTHER_CONDITION, Evaluation
from t2i_adapter.statistics import mean_interval

SECOND = {
    "canny": "lineart",
    "lineart": "canny",
    "sketch": "canny",
    "scribble": "canny",
    "lines": "canny",
    "softedge": "canny",
    "pidinet": "canny",
    "teed": "canny",
    "lineart-net": "canny",
    "mlsd": "lines",
    "palette": "blur,sigma=0.06",
    "tile": "palette",
    "blur": "palette",
    "grey": "lineart",
}
"""Kind -> the second judge that `auto` takes; none of them downloads anything. The other kinds have none: depth,
classes and poses need a network, and `iou` compares masks by another segmenter anyway."""


def open_second(named: str, judge: Annotator | None) -> Annotator | None:
    """Opens the second judge that `named` is: a spec, "none", or "auto" for the table's answer to the first judge.

    Raises UserError if it is the first judge itself, or if there is no first judge.
    """
    if named == "none":
        return None
    if named == "auto":
        spec = SECOND.get(judge.name) if judge else None
        return open_annotator(spec) if spec else None
    second = open_annotator(named)
    if judge is None:
        raise UserError(f"{named}: there is no first judge. Name one with {flag('judge')}.", option="second_judge")
    if second.fingerprint == judge.fingerprint:
        raise UserError(f"{named}: is the first judge. Name another kind, auto or none.", option="second_judge")
    return second


def second_opinion(evaluation: Evaluation, second: Annotator) -> str:
    """Returns one sentence: whether the second judge, too, sees that the adapter's own condition beats another pair's.

    It agrees if the 95 % interval of the paired difference lies above 0. "" if there is nothing to compare.
    """
    key = next((key for key in ("second_condition_f1", "second_condition_error") if key in evaluation.values), None)
    if key is None or not {ADAPTER, OTHER_CONDITION} <= set(evaluation.values[key]):
        return ""
    sign = 1 if key.endswith("f1") else -1
    columns = (evaluation.values[key][column] for column in (ADAPTER, OTHER_CONDITION))
    differences = [sign * (a - b) for a, b in zip(*columns, strict=True) if a is not None and b is not None]
    if len(differences) < 2:
        return ""
    gain = mean_interval(differences)
    verdict = "agrees" if gain.low > 0 else "disagrees" if gain.high < 0 else "is undecided"
    measure = "F1" if sign > 0 else "RMS difference"
    return (
        f"A judge that training never saw ({second.spec}) {verdict}: its {measure} to the target is better by "
        f"{gain.mean:.3f} ({gain.low:.3f} to {gain.high:.3f}) with the pair's own condition than with another's."
    )
