"""The verb `evaluate`: measures adapters on held-out pairs; writes evaluation.json, report.html and sheet.png.

Importing this module loads no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from t2i_adapter.config.dataset import DatasetOptions
from t2i_adapter.config.tree import to_dict
from t2i_adapter.errors import UserError, require
from t2i_adapter.evaluation.sweep_options import SweepOptions
from t2i_adapter.flags import Words
from t2i_adapter.generation.options import ModelOptions, RequestedSampling, SamplingOptions
from t2i_adapter.imports import preload

if TYPE_CHECKING:
    from t2i_adapter.annotators.registry import Annotator
    from t2i_adapter.data.source import Source
    from t2i_adapter.evaluation.evaluate import Evaluation
    from t2i_adapter.evaluation.pairs import StoredPairs
    from t2i_adapter.evaluation.plan import Column
    from t2i_adapter.evaluation.processes import Processes
    from t2i_adapter.evaluation.store import PictureStore
    from t2i_adapter.generation.pipeline import Models
    from t2i_adapter.models.family import AdapterPipeline


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(DatasetOptions, ModelOptions, RequestedSampling, SweepOptions):
    """Measure how well pictures follow their conditions, on held-out pairs and with two controls."""

    adapter: Annotated[tuple[str, ...], Words("ADAPTER")]  # pyright: ignore[reportIncompatibleVariableOverride]
    """The adapter: its folder, or a hub id. Several adapters are compared on the same pairs, conditions and noise. The
    flag may be omitted: `evaluate A B`."""
    split: str = "test"
    """Split of the dataset: pairs that the adapter was not trained on."""
    num: int = 64
    """Pairs to measure, chosen by the seed. With --sweep: pairs that choose a point; as many others confirm it."""
    pictures: int = 1
    """Pictures of each pair in each column, from different noise. A pair's value is their mean."""
    resolution: int | None = None
    """Side of the pictures in pixels. None: the resolution of the adapter's training."""
    steps: int = 20
    """Denoising steps (Euler ancestral)."""
    seed: int = 0
    """Decides the pairs, the noise of each picture, and the other condition of each pair."""
    condition: str | None = None
    """Kind of condition to make from the pairs' images (see `t2i-adapter conditions`), options after commas. None does
    what the adapter's training did, by its t2i_adapter.json: the recorded kind, or the column. `none` takes the column.
    """
    judge: str | None = None
    """Kind of condition to make of every generated picture, too, and compare with the pair's condition. None takes the
    kind that made the pairs' conditions, if they were made; `none` skips the comparison."""
    second_judge: str = "auto"
    """Another kind, which makes a map of every generated picture and of its target; the two are compared. `auto` takes
    one that needs no download, if there is one for the judge's kind; `none` skips it."""
    clip: str | None = None
    """Folder or hub id of a CLIP model, with weights in safetensors, for the CLIP score of picture and prompt."""
    quality: bool = False
    """Measure KID, and FID from 2,000 pairs on. They need the packages torchmetrics and torch-fidelity, which downloads
    the weights of Inception v3."""
    overwrite: bool = False
    """Replace the pictures that `out` holds. Without it, pictures of the same settings are taken, and pictures of other
    settings are an error."""
    out: str = "evaluation"
    """Folder for evaluation.json, report.html, sheet.png and the generated pictures; for sweep.json and sweep.html with
    --sweep."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sweep()
        assert not isinstance(self.adapter, str), "a tuple of adapters"
        require("adapter", bool(self.adapter), "()", "name one adapter or more")
        if self.sweep:
            require("adapter", len(self.adapter) == 1, " ".join(self.adapter), "a sweep takes one adapter")
        if not self.data:
            raise UserError("is required: a folder, manifest, shards or a hub id", option="data")
        require("num", self.num >= 2, self.num, "2 or more: each pair needs another one's condition as control")
        require("pictures", 1 <= self.pictures <= 64, self.pictures, "allowed is 1 to 64")
        require("seed", 0 <= self.seed < 2**63, self.seed, "allowed is 0 to 2^63 - 1")


def run(options: EvaluateOptions) -> list[Evaluation]:
    """Measures each adapter, writes the files to `out`, and prints the means; or searches its sampling options.

    With several processes all generate, and rank 0 measures, writes and prints. Returns one evaluation for each
    adapter; an empty list in the other processes, and after a sweep. Raises UserError.
    """
    preload("t2i_adapter.generation.pipeline")
    from t2i_adapter.evaluation.processes import find_processes

    processes = find_processes()
    try:
        return _run(options, processes)
    finally:
        processes.leave()


def _run(options: EvaluateOptions, processes: Processes) -> list[Evaluation]:
    from t2i_adapter.annotators.registry import open_annotator
    from t2i_adapter.evaluation.adapters import adapter_names, all_columns, check_comparable
    from t2i_adapter.evaluation.evaluate import measure_columns
    from t2i_adapter.evaluation.measures import Measures
    from t2i_adapter.evaluation.pairs import StoredPairs
    from t2i_adapter.evaluation.plan import Plan, plan_batch
    from t2i_adapter.evaluation.pooled import inception_features
    from t2i_adapter.evaluation.produce import produce, read_conditions
    from t2i_adapter.evaluation.second_judge import open_second
    from t2i_adapter.evaluation.store import LazySequence
    from t2i_adapter.files import output_folder
    from t2i_adapter.generation.pipeline import open_models
    from t2i_adapter.models.adapter import check_resolution

    source = open_dataset(options)
    models = [open_models(model_options(options, adapter)) for adapter in options.adapter]
    check_comparable(options.adapter, models, options.condition, options.resolution)
    resolution = options.resolution or models[0].resolution
    if resolution is None:
        raise UserError(
            f"is needed: {options.adapter[0]} does not record the resolution of its training.", option="resolution"
        )
    for model in models:
        check_resolution(resolution, resolution, model.adapter_config)
    spec = options.judge or source.annotate
    judge = None if spec in (None, "none") else open_annotator(spec)
    if options.sweep:
        _sweep(options, source, models[0], judge, resolution, processes)
        return []
    pairs = StoredPairs(source, resolution, models[0].channels)
    second = open_second(options.second_judge, judge)
    names = adapter_names(options.adapter)
    sampling = [options.settle(model.recommended) for model in models]
    columns = all_columns(names, models, sampling)
    out = output_folder(options.out)
    store = _open_store(options, out, source, pairs, models, columns, resolution, processes)
    if processes.is_main:
        _describe(options, names, models)
    pairs.keep_conditions(store)
    read_conditions(pairs, processes)
    processes.meet()
    size = (resolution, resolution)
    plan = Plan(
        prompts=pairs.prompts,
        conditions=LazySequence(len(pairs), pairs.condition),
        size=size,
        seed=options.seed,
        pictures=options.pictures,
        batch=plan_batch(size, sampling[0], len(pairs)),
        max_tokens=models[0].max_tokens,
    )
    pictures = produce(plan, columns, store, lambda: _open_pipeline(models), processes)
    if not processes.is_main:
        return []
    measures = Measures(
        [each for each in (judge, second) if each],
        pairs,
        clip=options.clip,
        features=inception_features if options.quality else None,
        seed=options.seed,
    )
    evaluation = measure_columns(plan, pairs, pictures, measures)
    faults = [] if source.annotate else _pair_faults(pairs, judge, models[0])
    settings = {
        **_settings(options, sampling, models, resolution),
        "judge": judge.record() if judge else None,
        "second_judge": second.record() if second else None,
        "not_measured": measures.missing,
        "pair_faults": faults,
    }
    return _report(options, evaluation, names, models, settings, out, second)


def _pair_faults(pairs: StoredPairs, judge: Annotator | None, models: Models) -> list[str]:
    """Sentences on what is wrong with the conditions of the first pairs, which are not made by an annotator."""
    from t2i_adapter.doctor.pairing import check_pairs

    some = range(min(16, len(pairs)))
    if len(some) < 4:
        return []
    polarity = models.metadata.condition.get("polarity") if models.metadata else None
    conditions, targets = [pairs.condition(i) for i in some], [pairs[i].target for i in some]
    found = check_pairs(conditions, targets, judge, polarity)
    return [sentence for fault, sentence in found.items() if judge or fault != "unpaired"]


def _sweep(
    options: EvaluateOptions,
    source: Source,
    models: Models,
    judge: Annotator | None,
    resolution: int,
    processes: Processes,
) -> None:
    """Searches the sampling options of one adapter. Raises UserError with several processes."""
    from t2i_adapter.evaluation.pairs import read_pairs
    from t2i_adapter.verbs.sweep import run_sweep

    if processes.world > 1:
        raise UserError("runs in one process; start it without a launcher.", option="sweep")
    judged = {"judge": judge.record() if judge else None}
    pairs = read_pairs(source, resolution, models.channels)
    run_sweep(
        options,
        options.adapter[0],
        models,
        pairs,
        judge,
        lambda point: {**_settings(options, [point], [models], resolution), **judged},
    )


def _describe(options: EvaluateOptions, names: list[str], models: list[Models]) -> None:
    """Prints how prompts are read, and which recommended options are taken."""
    if line := models[0].describe_text():
        print(line, flush=True)
    for name, model in zip(names, models, strict=True):
        if line := options.describe_point(model.recommended):
            print(f"{name}: {line}" if len(names) > 1 else line, flush=True)


def model_options(options: EvaluateOptions, adapter: str) -> ModelOptions:
    """Returns the options of one of the adapters."""
    values = {each.name: getattr(options, each.name) for each in fields(ModelOptions)}
    return ModelOptions(**{**values, "adapter": adapter})


def _open_pipeline(models: list[Models]) -> AdapterPipeline:
    """Loads the base once. The other adapters are moved beside it, and take turns in its pipeline."""
    import torch

    pipeline = models[0].pipeline()
    for model in models[1:]:
        torch.nn.Module.to(model.adapter, models[0].device, pipeline.adapter.dtype)
    return pipeline


def _open_store(
    options: EvaluateOptions,
    out: Path,
    source: Source,
    pairs: StoredPairs,
    models: list[Models],
    columns: list[Column],
    resolution: int,
    processes: Processes,
) -> PictureStore:
    """Opens the folder of pictures, which rank 0 prepares. Raises UserError if it holds pictures of other settings."""
    from importlib.metadata import version

    from t2i_adapter.annotators.registry import open_annotator
    from t2i_adapter.evaluation.store import FOLDER, PictureStore

    common = {
        "num": len(pairs),
        "seed": options.seed,
        "pairs_sha256": pairs.digest,
        "condition": source.annotate,
        "annotator": open_annotator(source.annotate).fingerprint if source.annotate else None,
        "resolution": resolution,
        "base": to_dict(models[0].base.options),
        "max_tokens": models[0].max_tokens,
        "device": models[0].device.partition(":")[0],
        "precision": models[0].precision,
        "xformers": options.xformers,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }
    digests = {id(model.adapter): model.digest for model in models}
    own = {
        column.name: {"adapter_sha256": digests.get(id(column.adapter)), **_sampling(column.sampling)}
        for column in columns
    }
    store = PictureStore(out / FOLDER, common, own, {each.name for each in fields(options)})
    if not options.overwrite:
        store.check()
    processes.meet()
    if processes.is_main:
        store.prepare(overwrite=options.overwrite)
    processes.meet()
    return store


def _sampling(sampling: SamplingOptions) -> dict[str, Any]:
    """The options of sampling on which a picture depends."""
    names = [each.name for each in fields(SamplingOptions) if each.name != "batch_size"]
    return {name: getattr(sampling, name) for name in names}


def _report(
    options: EvaluateOptions,
    evaluation: Evaluation,
    names: list[str],
    models: list[Models],
    settings: dict[str, Any],
    out: Path,
    second: Annotator | None,
) -> list[Evaluation]:
    """Writes and prints the result; returns the evaluation of each adapter."""
    from t2i_adapter.evaluation.adapters import adapter_column
    from t2i_adapter.evaluation.compare import compare, evaluation_of
    from t2i_adapter.evaluation.plan import ADAPTER
    from t2i_adapter.evaluation.report import comparison_text, to_text, write_comparison, write_files
    from t2i_adapter.evaluation.second_judge import second_opinion
    from t2i_adapter.files import output_folder, show_path
    from t2i_adapter.flags import changed_options, command_line

    def described(one: EvaluateOptions) -> dict[str, Any]:
        return {"changed": changed_options(one), "command": command_line("evaluate", one)}

    def opinion(one: Evaluation) -> str:
        return second_opinion(one, second) if second else ""

    if len(names) == 1:
        settings["second_opinion"] = opinion(evaluation)
        files = write_files(out, evaluation, settings, **described(options))
        lines = [to_text(evaluation), settings["second_opinion"], *settings["pair_faults"], *settings["not_measured"]]
        lines += map(show_path, files)
        print("\n".join(filter(None, lines)))
        return [evaluation]
    comparison, singles, opinions = compare(evaluation, names), [], []
    for name, adapter, model, used in zip(names, options.adapter, models, settings["sampling"], strict=True):
        singles.append(evaluation_of(evaluation, name))
        folder = output_folder(str(out / adapter_column(ADAPTER, name)))
        line = opinion(singles[-1])
        opinions += [f"{name}: {line}"] if line else []
        own = {**settings, **used, "adapter": adapter, "adapter_sha256": model.digest, "second_opinion": line}
        own.pop("sampling")
        write_files(folder, singles[-1], own, **described(replace(options, adapter=(adapter,))))
    adapters = dict(zip(names, options.adapter, strict=True))
    files = write_comparison(out, evaluation, comparison, settings, **described(options), adapters=adapters)
    lines = [comparison_text(evaluation, comparison), *opinions, *settings["pair_faults"], *settings["not_measured"]]
    lines += map(show_path, files)
    print("\n".join(lines))
    return singles


def open_dataset(options: EvaluateOptions) -> Source:
    """Opens the pairs to measure. Raises UserError if the split has fewer than `num`, or twice that for a sweep."""
    from t2i_adapter.evaluation.pairs import condition_spec, open_pairs

    condition = None if options.conditioning_dir else condition_spec(options.condition, options.adapter[0])
    times = 2 if options.sweep else 1
    data = options.dataset(max_train_samples=times * options.num, condition=condition)
    return open_pairs(data, options.num, options.seed, times=times)


def _settings(
    options: EvaluateOptions, sampling: list[SamplingOptions], models: list[Models], resolution: int
) -> dict[str, Any]:
    """Everything that the numbers depend on, as plain JSON types. One adapter is a text, several are lists."""
    from importlib.metadata import version

    from t2i_adapter.evaluation.metrics import TOLERANCE
    from t2i_adapter.generation.records import LIBRARIES

    model, is_one = models[0], len(models) == 1
    return {
        **asdict(options),
        **(asdict(sampling[0]) if is_one else {"sampling": [asdict(each) for each in sampling]}),
        "adapter": options.adapter[0] if is_one else list(options.adapter),
        "base": to_dict(model.base.options),
        "resolution": resolution,
        "device": model.device,
        "precision": model.precision,
        "max_tokens": model.max_tokens,
        "edge_tolerance_px": TOLERANCE * resolution,
        "adapter_sha256": model.digest if is_one else [each.digest for each in models],
        "versions": {name: version(name) for name in LIBRARIES},
    }
