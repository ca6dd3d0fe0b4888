"""The verb `evaluate`: measures an adapter on held-out pairs; writes evaluation.json, report.html and sheet.png.

Importing this module loads no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from t2i_adapter.config.dataset import DatasetOptions
from t2i_adapter.config.tree import to_dict
from t2i_adapter.errors import UserError, require
from t2i_adapter.evaluation.sweep_options import SweepOptions
from t2i_adapter.generation.options import ModelOptions, RequestedSampling, SamplingOptions
from t2i_adapter.imports import preload

if TYPE_CHECKING:
    from t2i_adapter.data.source import Source
    from t2i_adapter.evaluation.evaluate import Evaluation
    from t2i_adapter.evaluation.sweep import Sweep
    from t2i_adapter.generation.pipeline import Models


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(DatasetOptions, ModelOptions, RequestedSampling, SweepOptions):
    """Measure how well pictures follow their conditions, on held-out pairs and with two controls."""

    split: str = "test"
    """Split of the dataset: pairs that the adapter was not trained on."""
    num: int = 64
    """Pairs to measure, chosen by the seed. Three pictures are generated of each. With --sweep: pairs that choose a
    point; as many others confirm it."""
    resolution: int | None = None
    """Side of the pictures in pixels. None: the resolution of the adapter's training."""
    steps: int = 20
    """Denoising steps (Euler ancestral)."""
    seed: int = 0
    """Decides the pairs, the noise of each, and the other condition of each."""
    condition: str | None = None
    """Kind of condition to make from the pairs' images (see `t2i-adapter conditions`), options after commas. None does
    what the adapter's training did, by its t2i_adapter.json: the recorded kind, or the column. `none` takes the column.
    """
    judge: str | None = None
    """Kind of condition to make of every generated picture, too, and compare with the pair's condition. None takes the
    kind that made the pairs' conditions, if they were made; `none` skips the comparison."""
    out: str = "evaluation"
    """Folder for evaluation.json, report.html and sheet.png; for sweep.json and sweep.html with --sweep."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sweep()
        if not self.data:
            raise UserError("is required: a folder, manifest, shards or a hub id", option="data")
        require("num", self.num >= 2, self.num, "2 or more: each pair needs another one's condition as control")
        require("seed", 0 <= self.seed < 2**63, self.seed, "allowed is 0 to 2^63 - 1")


def run(options: EvaluateOptions) -> Evaluation | Sweep:
    """Measures the adapter, writes the three files to `out`, and prints the means; or searches its sampling options."""
    preload("t2i_adapter.generation.pipeline")
    from t2i_adapter.annotators.registry import open_annotator
    from t2i_adapter.evaluation.evaluate import evaluate
    from t2i_adapter.evaluation.pairs import read_pairs
    from t2i_adapter.evaluation.report import to_text, write_files
    from t2i_adapter.files import output_folder, show_path
    from t2i_adapter.flags import changed_options, command_line
    from t2i_adapter.generation.pipeline import open_models
    from t2i_adapter.models.adapter import check_resolution

    source = open_dataset(options)
    models = open_models(options)
    resolution = options.resolution or models.resolution
    if resolution is None:
        raise UserError(
            f"is needed: {options.adapter} does not record the resolution of its training.", option="resolution"
        )
    check_resolution(resolution, resolution, models.adapter_config)
    pairs = read_pairs(source, resolution, models.channels)
    spec = options.judge or source.annotate
    judge = None if spec in (None, "none") else open_annotator(spec)
    if options.sweep:
        from t2i_adapter.verbs.sweep import run_sweep

        judged = {"judge": judge.record() if judge else None}
        return run_sweep(
            options,
            options.adapter,
            models,
            pairs,
            judge,
            lambda point: {**_settings(options, point, models, resolution), **judged},
        )
    out = output_folder(options.out)
    sampling = options.settle(models.recommended)
    for line in filter(None, (models.describe_text(), options.describe_point(models.recommended))):
        print(line, flush=True)
    evaluation = evaluate(
        models.pipeline(), pairs, sampling=sampling, seed=options.seed, judge=judge, max_tokens=models.max_tokens
    )
    settings = {**_settings(options, sampling, models, resolution), "judge": judge.record() if judge else None}
    files = write_files(
        out, evaluation, settings, changed=changed_options(options), command=command_line("evaluate", options)
    )
    print("\n".join([to_text(evaluation), *map(show_path, files)]))
    return evaluation


def open_dataset(options: EvaluateOptions) -> Source:
    """Opens the pairs to measure. Raises UserError if the split has fewer than `num`, or twice that for a sweep."""
    from t2i_adapter.evaluation.pairs import condition_spec, open_pairs

    condition = None if options.conditioning_dir else condition_spec(options.condition, options.adapter)
    times = 2 if options.sweep else 1
    data = options.dataset(max_train_samples=times * options.num, condition=condition)
    return open_pairs(data, options.num, options.seed, times=times)


def _settings(options: EvaluateOptions, sampling: SamplingOptions, models: Models, resolution: int) -> dict[str, Any]:
    """Everything that the numbers depend on, as plain JSON types."""
    from importlib.metadata import version

    from t2i_adapter.evaluation.metrics import TOLERANCE
    from t2i_adapter.verbs.generate import LIBRARIES

    return {
        **asdict(options),
        **asdict(sampling),
        "base": to_dict(models.base.options),
        "resolution": resolution,
        "device": models.device,
        "precision": models.precision,
        "max_tokens": models.max_tokens,
        "edge_tolerance_px": TOLERANCE * resolution,
        "adapter_sha256": models.digest,
        "versions": {name: version(name) for name in LIBRARIES},
    }
