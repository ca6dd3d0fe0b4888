"""benchmarks/control_guidance.py: its rows, its intervals over pairs and over seeds, and its table."""

from __future__ import annotations

import control_guidance as benchmark
import numpy as np
import pytest

from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.statistics import mean_interval


@pytest.mark.parametrize("rows", [benchmark.MAIN, benchmark.ALL], ids=["main", "all"])
def test_every_block_has_a_reference_and_rows_that_sampling_allows(rows: list[benchmark.Row]) -> None:
    assert len({(row.data, row.file) for row in rows}) == len(rows), "no two rows share a file"
    for row in rows:
        SamplingOptions(guidance=row.guidance, control_guidance=row.control, control_passes=row.passes)
        [reference] = [other for other in rows if other.block == row.block and other.label == "r 1"]
        assert (reference.control, reference.passes) == (1, 2), "the pipeline of diffusers"


def test_differences_are_averaged_over_seeds_or_over_pairs_first() -> None:
    differences = np.array([[0.1, 0.2, np.nan, 0.3], [0.3, 0.2, 0.5, 0.5]])
    found = benchmark.intervals(differences)
    assert found["over_pairs"] == pytest.approx(mean_interval([0.2, 0.2, 0.4]).to_json())
    assert found["over_seeds"] == pytest.approx(mean_interval([0.2, 1 / 3]).to_json())
    assert benchmark.intervals(differences[:1])["over_seeds"] is None, "one seed has no interval"


def test_the_table_names_a_block_once_and_states_both_intervals() -> None:
    interval = {"mean": 0.01, "low": 0.0, "high": 0.02}
    metric = {"mean": 0.5, "over_pairs": interval, "over_seeds": {**interval, "high": 0.04}}
    entry = {"data": "circles", "adapter": "full", "guidance": 3.0, "passes": 2}
    plain = {**entry, "row": "r 1", "metrics": {name: {"mean": 0.49} for name in benchmark.METRICS}}
    guided = {**entry, "row": "r 0", "metrics": dict.fromkeys(benchmark.METRICS, metric)}
    assert benchmark.table([plain, guided]).splitlines()[2:] == [
        "| circles, full, 3 | r 1 | 2 | 0.490 | 0.490 | 0.49 |",
        "|  | r 0 | 2 | 0.500 (+0.010 ± 0.010 / 0.030) | 0.500 (+0.010 ± 0.010 / 0.030) | 0.50 (+0.01 ± 0.01 / 0.03) |",
    ]
