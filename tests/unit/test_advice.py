"""Statements about runs whose truth is known: small arrays of losses, and the simulation of benchmarks/stop_rule.py."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import stop_rule

from t2i_adapter.statistics import mean_interval
from t2i_adapter.training.advice import (
    KEPT,
    LEAST_PAIRS,
    USUAL_CAUSES,
    Advice,
    Advisor,
    Look,
    benefit,
    benefit_by_band,
    remaining,
    training_benefit,
    use,
    use_by_band,
)

PAIRS, BANDS, EVERY = 32, 4, 100
LEVELS = np.array([1.0, 0.3, 0.1, 0.02])
"""The loss without an adapter of each band: the bands differ as those of real losses do."""


def make_looks(
    left: list[float], *, used: float = 0.2, seen: list[float] | None = None, spread: float = 0.005, pairs: int = PAIRS
) -> list[Look]:
    """Looks whose loss, relative to that without an adapter, is `left` on held-out pairs and `seen` on the training's;
    another pair's condition costs `used` more. spread: standard deviation of a pair's noise at a look."""
    rng = np.random.default_rng(len(left))
    none = LEVELS * np.exp(0.5 * rng.normal(size=(pairs, BANDS)))
    base = LEVELS * np.exp(0.5 * rng.normal(size=(pairs, BANDS)))
    looks = []
    for index, share in enumerate(left):
        right = none * share + LEVELS * spread * rng.normal(size=none.shape)
        other = right + none * used * (1 + 0.3 * rng.normal(size=none.shape))
        own = base * (seen or left)[index] + LEVELS * spread * rng.normal(size=none.shape)
        looks.append(Look(EVERY * (index + 1), right, other, none, np.stack([own, base], axis=1)))
    return looks


def add_all(advisor: Advisor, looks: list[Look]) -> list[Advice]:
    return [advice for look in looks for advice in advisor.add(look)]


def advise(looks: list[Look], *, steps: int = 2000, held_out: bool = True) -> tuple[Advisor, dict[str, Advice]]:
    """The advisor after the looks, and its statements by kind."""
    advisor = Advisor(steps=steps, held_out=held_out)
    advices = add_all(advisor, looks)
    kinds = [advice.kind for advice in advices]
    assert len(kinds) == len(set(kinds))
    return advisor, {advice.kind: advice for advice in advices}


def falling(*values: float) -> list[float]:
    """Remaining losses that fall evenly from 1 through `values`, five looks each."""
    return np.interp(np.arange(1, 5 * len(values) + 1), 5 * np.arange(len(values) + 1), [1, *values]).tolist()


# -- the values of pairs


def test_the_means_over_the_pairs_are_those_of_the_definition() -> None:
    look = make_looks([0.6])[0]
    assert look.other is not None
    right, other, none = look.right.mean(0), look.other.mean(0), look.none.mean(0)
    np.testing.assert_allclose(benefit_by_band(look).mean(0), 1 - right / none)
    np.testing.assert_allclose(use_by_band(look).mean(0), (other - right) / none)
    assert benefit(look).mean() == pytest.approx((1 - right / none).mean())
    assert use(look).mean() == pytest.approx(((other - right) / none).mean())
    assert remaining(look).mean() == pytest.approx(1 - benefit(look).mean())
    assert look.training is not None
    seen = training_benefit(look)
    assert seen is not None and seen.shape == (PAIRS,)
    assert seen.mean() == pytest.approx((1 - look.training[:, 0].mean(0) / look.training[:, 1].mean(0)).mean())


def test_the_interval_of_a_benefit_holds_the_ratio_of_the_expected_losses() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        none = np.exp(0.5 * rng.normal(size=(PAIRS, 1)))
        right = 0.4 * none + 0.2 * rng.random(none.shape) * none  # half of the loss is left, on average
        interval = mean_interval(benefit(Look(1, right, right, none)))
        held += interval.low <= 0.5 <= interval.high
    assert 0.92 < held / 2000 < 0.96  # 0.937 in 4,000 runs: the ratio of 32 skewed pairs is a little biased


# -- read, not read


def test_reading_is_said_at_the_first_look_that_shows_it() -> None:
    _, said = advise(make_looks([0.9] * 3, used=0.2))
    assert said["read"].step == EVERY
    assert said["read"].text.startswith(
        "The adapter reads the condition: on 32 held-out pairs the loss with the right condition is lower than with"
    )
    assert said["read"].numbers["use_low"] < 0.2 < said["read"].numbers["use_high"]
    assert "not_read" not in said


def test_pairs_of_the_training_are_not_called_held_out() -> None:
    _, said = advise(make_looks([0.9], used=0.2), held_out=False)
    assert "on 32 pairs of the training" in said["read"].text and "held-out" not in said["read"].text


def test_an_adapter_that_reads_in_one_band_only_is_seen_in_that_band() -> None:
    look = make_looks([0.9], used=0.0)[0]
    rng = np.random.default_rng(5)
    other = look.right + LEVELS * 0.3 * rng.normal(size=look.right.shape)
    other[:, 2] = look.right[:, 2] + LEVELS[2] * (0.12 + 0.1 * rng.normal(size=PAIRS))
    _, said = advise([Look(EVERY, look.right, other, look.none)])
    assert "certain in noise band 3 of 4 alone" in said["read"].text


def test_a_certain_use_of_a_millionth_is_not_called_reading() -> None:
    """A learning rate that is far too low moves the adapter the right way, by nothing that matters."""
    looks = make_looks([1.0] * 10, used=1e-6)
    assert mean_interval(use(looks[0])).low > 0
    _, said = advise(looks)
    assert set(said) == {"not_read"}


def test_not_reading_is_said_after_a_tenth_of_the_run_with_its_causes() -> None:
    looks = make_looks([1.0] * 10, used=0.0)
    _, said = advise(looks, steps=5000)
    assert said["not_read"].step == 500 and said["not_read"].text.endswith(USUAL_CAUSES)
    assert "after 500 updates" in said["not_read"].text
    advisor = Advisor(steps=5000, held_out=True)
    texts = [advice.text for look in looks for advice in advisor.add(look, lambda: ["The learning rate is 1e-7."])]
    assert len(texts) == 1 and texts[0].endswith(" The learning rate is 1e-7.")


@pytest.mark.parametrize(("steps", "updates"), [(100, 50), (400, 200), (1000, 200), (15_000, 1500), (10**6, 5000)])
def test_the_updates_before_not_reading_is_said(steps: int, updates: int) -> None:
    assert Advisor(steps=steps, held_out=True).least_updates == updates


def test_reading_after_all_is_said_after_not_reading() -> None:
    advisor = Advisor(steps=1000, held_out=True)
    looks = make_looks([1.0] * 4, used=0.0) + make_looks([0.9] * 6, used=0.3)[4:]
    for look in looks[4:]:
        object.__setattr__(look, "none", looks[0].none)
    assert [advice.kind for advice in add_all(advisor, looks)] == ["not_read", "read"]


def test_few_pairs_do_not_prove_that_no_gain_is_left() -> None:
    for pairs, kinds in ((LEAST_PAIRS, {"read", "plateau"}), (LEAST_PAIRS - 1, {"read"})):
        assert set(advise(make_looks([0.5] * 10, pairs=pairs))[1]) == kinds


# -- no gain left


def test_no_gain_left_is_said_two_windows_after_the_gain_ended() -> None:
    advisor, said = advise(make_looks([*falling(0.5), *[0.5] * 10]))
    assert said["plateau"].step == 10 * EVERY  # the windows are looks 5 to 7 and 8 to 10
    assert "in the last 300 updates (3 looks)" in said["plateau"].text and "less than 2 %" in said["plateau"].text
    assert advisor.is_plateau


def test_a_steady_rise_is_no_plateau() -> None:
    advisor, said = advise(make_looks(np.linspace(0.9, 0.4, 20).tolist()))
    assert "plateau" not in said and not advisor.is_plateau


def test_noise_that_hides_the_gain_is_no_proof_of_a_plateau() -> None:
    looks = make_looks([0.5] * 20, spread=0.3)
    gains = remaining(looks[14]) - remaining(looks[19])
    assert mean_interval(gains).low < 0 < mean_interval(gains).high  # no significant difference
    assert "plateau" not in advise(looks)[1]


def test_a_run_that_does_not_read_has_no_plateau() -> None:
    assert "plateau" not in advise(make_looks([1.0] * 20, used=0.0))[1]


def test_a_window_is_a_fifth_of_the_updates() -> None:
    """In a run of 60 looks three flat looks are too few."""
    left = np.interp(np.arange(60), [0, 50, 59], [0.9, 0.5, 0.5]).tolist()
    assert "plateau" not in advise(make_looks(left))[1]


def test_gain_that_comes_back_ends_the_plateau() -> None:
    advisor, said = advise(make_looks([*[0.5] * 8, *[0.45] * 2]))
    assert said["plateau"].step < said["plateau_over"].step == 9 * EVERY
    assert not advisor.is_plateau
    assert said["plateau_over"].numbers["gain"] == pytest.approx(0.1, abs=0.01)


def scored(looks: list[Look], rise: float, ceiling: float | None = None) -> list[Look]:
    """The looks with scores of 8 pictures that rise by `rise` from look to look."""
    scores = np.linspace(0.3, 0.5, 8)
    return [
        Look(look.step, look.right, look.other, look.none, score=scores + rise * i, score_ceiling=ceiling)
        for i, look in enumerate(looks)
    ]


def test_a_rising_score_of_pictures_holds_the_plateau_back() -> None:
    looks = make_looks([0.5] * 12)
    assert "plateau" in advise(scored(looks, 0.0))[1]
    assert "plateau" not in advise(scored(looks, 0.02))[1]
    assert "plateau" in advise(scored(looks, 0.02, ceiling=0.3))[1]  # no more than the targets themselves reach


# -- overfitting


def u_curve(rise: float) -> list[float]:
    return [*falling(0.5), *(0.5 + rise * i for i in range(1, 11))]


def test_overfitting_is_said_if_held_out_pairs_lose_what_the_training_gains() -> None:
    looks = make_looks(u_curve(0.01), seen=u_curve(-0.01))
    _, said = advise(looks)
    assert 600 <= said["overfitting"].step <= 900 and "since step 500" in said["overfitting"].text
    assert "32 pairs of the training fell by" in said["overfitting"].text
    assert "overfitting" not in advise(looks, held_out=False)[1]


@pytest.mark.parametrize(("held_out", "training"), [(0.01, 0.01), (0.0, -0.01), (-0.01, -0.02), (0.0005, -0.01)])
def test_overfitting_needs_a_loss_and_a_gap(held_out: float, training: float) -> None:
    assert "overfitting" not in advise(make_looks(u_curve(held_out), seen=u_curve(training)))[1]


def test_noise_of_held_out_pairs_is_no_overfitting_if_the_training_gains() -> None:
    looks = make_looks(u_curve(0.0), seen=u_curve(-0.04), spread=0.15)
    losses = [float(remaining(look).mean()) for look in looks]
    assert losses[-1] > 1.03 * min(losses[:-1])  # by noise
    assert "overfitting" not in advise(looks)[1]


# -- the best checkpoint


def test_the_best_checkpoint_is_the_earliest_that_is_not_worse_than_the_maximum() -> None:
    advisor, _ = advise(make_looks([*falling(0.5), *[0.5] * 10], spread=0.01))
    top = max(advisor.looks, key=lambda look: benefit(look).mean())
    assert top.step > 500  # noise makes a later look the maximum
    assert advisor.best() == 500
    text = advisor.describe_best()
    assert text is not None and "not worse than the maximum" in text and "fresh pairs" in text


def test_a_checkpoint_after_the_maximum_is_not_the_best() -> None:
    assert advise(make_looks(u_curve(0.02)))[0].best() == 500


def test_the_best_is_always_among_the_few_checkpoints_that_were_kept() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        left = (0.8 - np.cumsum(rng.normal(0.01, 0.01, 25))).tolist()
        advisor, kept = Advisor(steps=2500, held_out=True), set()
        assert advisor.best() is None and advisor.describe_best() is None
        for look in make_looks(left, spread=0.02):
            advisor.add(look)
            candidates = advisor.candidates()
            assert set(candidates) <= kept | {look.step} and len(candidates) <= KEPT
            assert advisor.best() == candidates[0]
            kept = set(candidates)


# -- state


def test_an_advisor_read_from_json_goes_on_as_the_one_that_was_not_interrupted() -> None:
    looks = scored(make_looks([*falling(0.5), *[0.5] * 10, 0.4, 0.4]), 0.0, ceiling=0.9)
    whole = Advisor(steps=2000, held_out=True)
    expected = add_all(whole, looks)
    for count in (0, 3, 11):
        before = Advisor(steps=2000, held_out=True)
        add_all(before, looks[: count + 2])  # two looks after the checkpoint that the run resumes from
        stored = json.loads(json.dumps(before.to_json(), allow_nan=False))
        resumed = Advisor.from_json(stored, steps=2000, held_out=True, until=EVERY * count)
        assert [look.step for look in resumed.looks] == [look.step for look in looks[:count]]
        after = add_all(resumed, looks[count:])
        assert after == [advice for advice in expected if advice.step > EVERY * count]
        assert resumed.to_json() == whole.to_json() and resumed.candidates() == whole.candidates()
        assert resumed.is_plateau == whole.is_plateau


def test_a_look_with_nan_is_discarded() -> None:
    looks = make_looks([0.5] * 9)
    looks[2].right[0, 0] = np.nan
    looks[4].training[:] = np.inf  # pyright: ignore[reportOptionalSubscript]
    advisor, said = advise(looks)
    assert [look.step for look in advisor.looks] == [100, 200, *range(400, 1000, 100)]
    assert "plateau" in said and 300 not in advisor.candidates()
    assert advisor.to_json()["looks"][3]["training"] is None


def test_looks_out_of_order_or_of_other_shapes_are_refused() -> None:
    first, second = make_looks([0.5] * 2)
    advisor = Advisor(steps=100, held_out=True)
    advisor.add(second)
    with pytest.raises(ValueError, match="step 100 after one at step 200"):
        advisor.add(first)
    with pytest.raises(ValueError, match="shape"):
        advisor.add(Look(300, first.right[:16], None, first.none[:16]))


def test_a_statement_is_written_with_its_numbers() -> None:
    read = advise(make_looks([0.9]))[1]["read"].to_json()
    assert read["kind"] == "read" and read["numbers"]["pairs"] == PAIRS and set(read) == {"kind", "text", "numbers"}


# -- the simulation, at a small size; benchmarks/stop_rule.py runs 2,000 of each


@pytest.mark.parametrize(
    "row",
    [
        stop_rule.Row("no effect", "read", True, looks=10),
        stop_rule.Row("use at the limit", "not_read", True, law="quarter", looks=10),
        stop_rule.Row("gain at the margin", "plateau", True, law="log-normal"),
        stop_rule.Row("no overfitting", "overfitting", True, spread=0.02, wander=0.005),
    ],
    ids=lambda row: row.scenario,
)
def test_a_wrong_statement_is_rare(row: stop_rule.Row) -> None:
    assert stop_rule.simulate(row, 150)["share"] <= 0.1  # 0.05 and 2.8 standard deviations of 150 runs


@pytest.mark.parametrize(
    "row",
    [
        stop_rule.Row("twentieth strength", "read", False, looks=10),
        stop_rule.Row("no use", "not_read", False, looks=10),
        stop_rule.Row("plateau", "plateau", False, spread=0.02, looks=20),
        stop_rule.Row("U-curve", "overfitting", False, spread=0.02, looks=20),
    ],
    ids=lambda row: row.scenario,
)
def test_a_right_statement_comes(row: stop_rule.Row) -> None:
    assert stop_rule.simulate(row, 40)["share"] > 0.9


def test_an_adapter_that_only_does_harm_is_not_one_that_reads():
    """As after shuffled pairs: features that follow the condition, and help with no pair."""
    looks = make_looks([1.15] * 5, used=0.0, spread=0.05, pairs=16)
    noisy = [
        replace(look, other=look.right + look.none * np.random.default_rng(3).normal(0, 0.3, (16, 1))) for look in looks
    ]
    _, said = advise(noisy)
    assert said.keys() == {"not_read"} and said["not_read"].step == 300
    assert "higher than without the adapter by" in said["not_read"].text


def test_harm_on_held_out_pairs_alone_is_named():
    looks = make_looks([1.5] * 5, used=0.3, seen=[0.6] * 5)
    _, said = advise(looks, steps=2000)
    assert said.keys() >= {"read", "harm"} and "polarity" in said["harm"].text
    assert said["harm"].numbers["benefit_high"] < 0 < said["harm"].numbers["training_low"]


def test_pairs_of_the_training_show_no_harm_of_held_out_ones():
    assert "harm" not in advise(make_looks([1.5] * 5, used=0.3, seen=[0.6] * 5), held_out=False)[1]
