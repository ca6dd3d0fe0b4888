"""Options of sampling: the text of a schedule, what control guidance needs, and values that a record recommends."""

from __future__ import annotations

from typing import Any

import pytest

from t2i_adapter.errors import UserError
from t2i_adapter.generation.options import (
    POINT,
    RequestedSampling,
    SamplingOptions,
    parse_schedule,
)

RECOMMENDED = {"scale": 1.25, "control_guidance": 1.5, "from": {"metric": "condition_f1"}}


def test_a_schedule_is_read_in_any_order() -> None:
    assert parse_schedule("none") == ()
    assert parse_schedule("937:1, 187:0.8,437:.5,0:2.") == ((0, 2.0), (187, 0.8), (437, 0.5), (937, 1.0))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "'' is not timestep:factor"),
        ("187", "'187' is not timestep:factor"),
        ("187:0.8,", "'' is not timestep:factor"),
        ("187=0.8", "'187=0.8' is not"),
        ("187.5:1", "'187.5:1' is not"),
        ("-1:1", "'-1:1' is not"),
        ("187:-1", "'187:-1' is not"),
        ("187:nan", "'187:nan' is not"),
        ("187:inf", "'187:inf' is not"),
        ("١:1", "is not timestep:factor"),
        ("187:1,187:2", "names timestep 187 twice"),
        ("None", "or none"),
    ],
)
def test_a_bad_schedule_is_one_line(text: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as fault:
        SamplingOptions(scale_schedule=text)
    assert str(fault.value).startswith("--scale_schedule ")
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"control_guidance": -1.0}, "--control_guidance -1.0: allowed is 0 or more"),
        ({"control_guidance": 1.5, "guidance": 1.0}, "--control_guidance 1.5 acts on .* --guidance 1 turns off"),
        ({"control_guidance": 6.0}, "--control_guidance 6: allowed is 0 to 5, .* --guidance; .* --control_passes 3"),
        ({"control_passes": 4}, "--control_passes 4"),
        ({"condition_start": -0.1}, "--condition_start -0.1"),
        ({"condition_start": 0.6, "condition_factor": 0.5}, "--condition_start 0.6: allowed is 0 to 0.5, .*factor"),
    ],
)
def test_errors_name_the_options(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        SamplingOptions(**changes)
    with pytest.raises(UserError, match=named):
        RequestedSampling(**changes, defaults="plain")
    with pytest.raises(UserError, match=named):
        RequestedSampling(**changes).settle({})


def test_what_is_allowed_at_the_limits() -> None:
    SamplingOptions(control_guidance=5.0)
    SamplingOptions(control_guidance=0.0)
    SamplingOptions(control_guidance=6.0, control_passes=3)
    SamplingOptions(control_guidance=1.5, control_passes=3, guidance=1.0)
    SamplingOptions(control_guidance=1.0, guidance=0.0)


def test_a_record_may_allow_what_plain_values_do_not() -> None:
    request = RequestedSampling(control_guidance=6.0)
    assert request.settle({"guidance": 7}) == SamplingOptions(control_guidance=6.0, guidance=7.0)
    assert request.settle({"control_passes": 3}) == SamplingOptions(control_guidance=6.0, control_passes=3)
    two = RequestedSampling(control_guidance=6.0, control_passes=2)
    assert two.settle({"guidance": 7}).control_passes == 2
    with pytest.raises(UserError, match="--control_guidance 6"):
        RequestedSampling(control_guidance=6.0, control_passes=2, guidance=5.0)


def test_without_a_record_all_values_are_plain() -> None:
    assert RequestedSampling().settle({}) == SamplingOptions()
    assert RequestedSampling(steps=3, batch_size=2).settle({}) == SamplingOptions(steps=3, batch_size=2)
    assert RequestedSampling().describe_point({}) is None
    assert RequestedSampling().describe_point({"scale": 1}) is None, "nothing differs from the plain values"


def test_a_record_fills_what_is_not_given() -> None:
    assert RequestedSampling().settle(RECOMMENDED) == SamplingOptions(scale=1.25, control_guidance=1.5)
    given = RequestedSampling(scale=1.0, guidance=3.0)
    assert given.settle(RECOMMENDED) == SamplingOptions(scale=1.0, guidance=3.0, control_guidance=1.5)
    assert given.describe_point(RECOMMENDED) == (
        "sampling: control_guidance 1.5, as the adapter's record recommends (--defaults plain ignores it)"
    )
    plain = RequestedSampling(defaults="plain")
    assert plain.settle(RECOMMENDED) == SamplingOptions()
    assert plain.describe_point(RECOMMENDED) is None
    everything = {name: getattr(SamplingOptions(), name) for name in POINT}
    assert RequestedSampling().settle(everything) == SamplingOptions()


@pytest.mark.parametrize(
    ("recommended", "named"),
    [
        ({"scale": "strong"}, "t2i_adapter.json: sampling.scale is 'strong'; allowed is a number"),
        ({"scale": None}, "sampling.scale is 'None'"),
        ({"scale": float("nan")}, "sampling.scale is 'nan'"),
        ({"control_passes": 2.5}, "sampling.control_passes is '2.5'; allowed is one of 2, 3"),
        ({"scale": -1}, "recommended values, which --defaults plain ignores: --scale -1.0"),
        ({"scale_schedule": ["1:1"]}, "recommended values, which --defaults plain ignores: --scale_schedule"),
        ({"control_guidance": 4}, "do not fit .*: --control_guidance 4: allowed is 0 to 3"),
    ],
)
def test_a_bad_record_is_one_line(recommended: dict[str, Any], named: str) -> None:
    request = RequestedSampling(guidance=3.0)
    with pytest.raises(UserError, match=named):
        request.settle(recommended)
    assert RequestedSampling(guidance=3.0, defaults="plain").settle(recommended) == SamplingOptions(guidance=3.0)
