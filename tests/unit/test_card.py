"""The model card: front matter as the hub reads it, results, limits, and what stays when it is written anew."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from PIL import Image
from support.push_hub import card_faults

from t2i_adapter.config.tree import AdapterOptions, BaseOptions, DataOptions, HubOptions
from t2i_adapter.data.formats import is_hub_dataset
from t2i_adapter.errors import UserError
from t2i_adapter.evaluation.evaluate import ADAPTER, NO_ADAPTER, OTHER_CONDITION
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.export.card import SECTIONS, complete_card, missing_sections, new_card, write_card
from t2i_adapter.export.card_pictures import CardSample
from t2i_adapter.export.card_text import Facts
from t2i_adapter.export.measured import read_evaluation
from t2i_adapter.export.release import Release, make_release
from t2i_adapter.generation.pipeline import weights_digest
from t2i_adapter.models.adapter import build_adapter, load_adapter
from t2i_adapter.models.base import Base
from t2i_adapter.models.open import downloaded_commit, open_base
from t2i_adapter.models.record import Metadata

CANNY = {
    "name": "canny",
    "options": {"low": 50.0, "high": 150.0},
    "version": 1,
    "channels": 3,
    "kind": "map",
    "polarity": "white on black",
}
RECORD = Metadata(
    base={"name": "owner/base", "commit": "c" * 40},
    condition=CANNY,
    resolution=64,
    data={"name": "owner/pairs", "split": "train", "is_on_hub": True},
    training={"global_batch": 8},
    steps=300,
)
CONFIG = {"adapter_type": "full_adapter_xl", "in_channels": 3, "downscale_factor": 16}
FACTS = Facts(RECORD, CONFIG, "me/my-adapter")


def head_of(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n", 2)[1])


def section(card: str, name: str) -> str:
    return card.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0]


def numbers(mean: float, half: float = 0.01) -> dict[str, Any]:
    return {"mean": mean, "ci95": [mean - half, mean + half]}


def row(adapter: float, other: float, none: float) -> dict[str, Any]:
    return {ADAPTER: numbers(adapter), OTHER_CONDITION: numbers(other), NO_ADAPTER: numbers(none)}


METRICS = {"iou": row(0.9, 0.2, 0.3), "object_color": row(3.0, 3.0, 3.0), "saturation": row(9.0, 1.0, 1.0)}


def write_evaluation(
    folder: Path, metrics: Mapping[str, Any] = METRICS, *, count: int = 12, pictures: bool = True, **settings: Any
) -> Path:
    """A folder as `evaluate` writes it; the pair number n has IoU 0.99 - n / 100, and the grey value 10 n."""
    pairs = [
        {
            "key": f"private/{n}.png",
            "prompt": f"prompt {n}",
            "seed": n,
            "truth": "scene",
            "metrics": {"iou": {ADAPTER: 0.99 - n / 100}},
        }
        for n in range(count)
    ]
    content = {
        "num": count,
        "metrics": metrics,
        "pairs": pairs,
        "settings": {"data": "/home/me/photos", "out": "a/b", "split": "test", **settings},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(content))
    Image.new("RGB", (32, 32)).save(folder / "sheet.png")
    for column in ("condition", "adapter", "no_adapter", "target") if pictures else ():
        place = folder / "pictures" / column
        place.mkdir(parents=True, exist_ok=True)
        for n in range(count):
            name = f"{n:05d}" if column in ("condition", "target") else f"{n:05d}-0"
            Image.new("RGB", (64, 64), (10 * n,) * 3).save(place / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter with a card of one sample. Read only."""
    folder = tmp_path_factory.mktemp("card") / "my-adapter"
    torch.manual_seed(0)
    save_adapter(
        build_adapter(AdapterOptions(), open_base(BaseOptions(name=str(tiny_base))).unet_config),
        folder,
        metadata=RECORD,
    )
    picture = Image.new("RGB", (64, 64), "red")
    sample = CardSample("a red house", picture.convert("L"), [picture, picture], target=picture)
    write_card(folder, metadata=RECORD, repo_id=str(folder), samples=[sample])
    return folder


def card_of(release: Release) -> str:
    return content_of(release, "README.md").decode()


def content_of(release: Release, name: str) -> bytes:
    [file] = [file for file in release.files if file.name == name]
    return file.content if isinstance(file.content, bytes) else file.content.read_bytes()


def test_the_front_matter_is_what_the_hub_reads(adapter: Path, tmp_path: Path) -> None:
    release = make_release(adapter, "me/my-adapter", evaluation=write_evaluation(tmp_path / "evaluation"))
    text = card_of(release)
    assert card_faults(text) == []
    data = ModelCard(text).data
    assert data.library_name == "diffusers" and data.pipeline_tag == "text-to-image"
    assert {"t2i-adapter", "stable-diffusion-xl", "canny"} <= set(data.tags or ())
    assert "controlnet" not in (data.tags or ()), "it would be taken for a ControlNet"
    assert (data.base_model, data.get("base_model_relation")) == ("owner/base", "adapter")
    assert data.datasets == ["owner/pairs"]
    names = {file.name for file in release.files}
    widget = data.get("widget")
    assert {entry["output"]["url"] for entry in widget} < names, "the gallery's pictures are uploaded"
    assert [entry["text"] for entry in widget] == ["a red house"] * 2 + [f"prompt {n}" for n in (0, 3, 6, 8, 11)]
    assert str(data.get("thumbnail")).endswith("/me/my-adapter/resolve/main/images/sample_00_00.png")
    assert {f"images/sample_00{part}.png" for part in ("", "_condition", "_00", "_01", "_target")} < names
    assert "https://arxiv.org/abs/2302.08453" in text and "c" * 40 in text and "<Gallery />" in text


def test_the_results_are_in_the_hubs_model_index(adapter: Path, tmp_path: Path) -> None:
    release = make_release(adapter, "me/my-adapter", evaluation=write_evaluation(tmp_path / "evaluation"))
    data = ModelCard(card_of(release)).data
    assert data.model_name == "my-adapter" and data.eval_results
    found: dict[str, EvalResult] = {f"{one.metric_type} {one.metric_value}": one for one in data.eval_results}
    assert set(found) == {"iou 0.9", "iou 0.2", "iou 0.3", "object_color 3.0"}, "without metrics of quality"
    floor = found["iou 0.3"]
    assert floor.metric_name == "IoU of the objects, floor: no adapter (95 % interval 0.290 to 0.310)"
    assert floor.dataset_type == "owner/pairs" and floor.dataset_split == "test" and floor.task_type == "text-to-image"
    assert str(floor.source_url).endswith("/me/my-adapter/resolve/main/evaluation.json")
    own = Facts(replace(RECORD, data={"name": "photos"}), CONFIG, "me/my-adapter")
    measured = read_evaluation(tmp_path / "evaluation")
    head = head_of(complete_card(new_card(own), own, measured=measured))
    assert head["model-index"][0]["results"][0]["dataset"]["type"] == "other" and "datasets" not in head


def test_the_hubs_rules_that_the_tests_know_find_faults() -> None:
    for wrong in (
        "license: other",
        "base_model_relation: lora",
        "widget: [{text: a}]",
        "model-index: [{name: a, results: [{task: {}, metrics: [{type: x}]}]}]",
    ):
        assert card_faults(f"---\n{wrong}\n---\n"), wrong


def test_typical_pairs_are_shown_by_rank_with_their_pictures(adapter: Path, tmp_path: Path) -> None:
    release = make_release(adapter, "me/my-adapter", evaluation=write_evaluation(tmp_path / "evaluation"))
    text = section(card_of(release), "evaluation").replace("\\", "")
    assert "| best, rank 1 of 12: 0.99<br>prompt 0 | ![condition](images/pair_00_condition.png) |" in text
    assert "worst, rank 12 of 12: 0.88<br>prompt 11" in text and "![target](images/pair_04_target.png)" in text
    shown = Image.open(io.BytesIO(content_of(release, "images/pair_02_adapter.png")))
    assert shown.getpixel((0, 0)) == (60, 60, 60), "the median pair is number 6"
    without = write_evaluation(tmp_path / "without", pictures=False)
    release = make_release(adapter, "me/my-adapter", evaluation=without)
    assert not [file.name for file in release.files if "pair_" in file.name] and "pair_" not in card_of(release)


def test_what_is_published_of_an_evaluation_names_no_file_and_no_caption(adapter: Path, tmp_path: Path) -> None:
    release = make_release(adapter, "me/my-adapter", evaluation=write_evaluation(tmp_path / "evaluation"))
    text = content_of(release, "evaluation.json").decode()
    content = json.loads(text)
    assert "private" not in text and "prompt" not in text and "/home" not in text
    assert content["num"] == 12 and content["metrics"]["iou"] == METRICS["iou"]
    assert content["pairs"][3] == {"seed": 3, "truth": "scene", "metrics": {"iou": {ADAPTER: 0.96}}}
    assert content["settings"]["data"] == "photos" and content["settings"]["out"] == "b"


def test_the_verdict_and_the_limits_follow_from_the_intervals(tmp_path: Path) -> None:
    def written(**metrics: Any) -> str:
        folder = write_evaluation(tmp_path / "evaluation", metrics, not_measured=["kid: not measured: needs 50 pairs."])
        return complete_card(new_card(FACTS), FACTS, measured=read_evaluation(folder)).replace("\\", "")

    card = written(**METRICS)
    assert "against 0.200 (0.190 to 0.210) with another pair's condition and 0.300" in card
    assert "with no adapter: the adapter controls the picture." in card
    limits = section(card, "limits")
    assert "In the worst tenth of the measured pairs the IoU of the objects is at most 0.88." in limits
    assert "Measured to be worse than without the adapter: chroma above the target's (CIELAB)." in limits
    assert "Not shown to be better than the floors: colour of the objects against the prompt (CIEDE2000)." in limits
    assert "kid: not measured: needs 50 pairs." in limits
    assert "crops of 64 x 64 pixels" in limits and "multiples of 16, better of 32" in limits
    assert "300 updates of 8 pairs each" in limits
    weak = written(iou=row(0.31, 0.3, 0.2))
    assert "does not show that the adapter controls" in weak
    assert "How well it controls was not measured." in section(new_card(FACTS), "limits")
    again = complete_card(card, FACTS)
    assert "at most 0.88" in section(again, "limits").replace("\\", ""), "limits of an evaluation stay"


def test_a_new_evaluation_replaces_the_earlier_one(tmp_path: Path) -> None:
    card = new_card(FACTS)
    for mean in (0.5, 0.75):
        measured = read_evaluation(write_evaluation(tmp_path / "evaluation", {"iou": row(mean, 0.1, 0.1)}))
        card = complete_card(card, FACTS, measured=measured, licence={"license": "apache-2.0"})
    assert "0.750 (0.740 to 0.760)" in card and "0.500" not in card and card.count("## Evaluation") == 1
    assert head_of(card)["license"] == "apache-2.0" and len(head_of(card)["widget"]) == 5


def test_an_evaluation_of_other_weights_or_of_several_adapters_is_refused(adapter: Path, tmp_path: Path) -> None:
    digest = weights_digest(load_adapter(str(adapter)))
    make_release(adapter, "me/x", evaluation=write_evaluation(tmp_path / "own", adapter_sha256=digest))
    with pytest.raises(UserError, match="measured other weights"):
        make_release(adapter, "me/x", evaluation=write_evaluation(tmp_path / "other", adapter_sha256="0" * 64))
    several = write_evaluation(tmp_path / "several")
    content = json.loads((several / "evaluation.json").read_text())
    (several / "evaluation.json").write_text(json.dumps({**content, "adapters": {"a": {}, "b": {}}}))
    with pytest.raises(UserError, match=r"compares several adapters \(a, b\); name the folder adapter-NAME"):
        read_evaluation(several)
    with pytest.raises(UserError, match="not a folder of `evaluate`"):
        read_evaluation(tmp_path)


def test_what_somebody_wrote_into_the_card_stays() -> None:
    card = new_card(FACTS)
    extra = "widget:\n- text: mine\n  output:\n    url: mine.png\nco2: 3\ntags:\n- my-tag\n"
    card = card.replace("tags:\n", extra, 1).replace("<!-- limits -->", "My own words.\n\n<!-- limits -->")
    card = card.replace("<!-- programs -->\n", "").replace("<!-- end of programs -->\n", "")
    done = complete_card(card, replace(FACTS, repo_id="you/other"))
    head = head_of(done)
    assert "my-tag" in head["tags"] and "canny" in head["tags"] and head["co2"] == 3
    assert head["widget"] == [{"text": "mine", "output": {"url": "mine.png"}}]
    assert "My own words." in done and "from_pretrained('you/other'" in done
    assert missing_sections(done) == ["programs"] and missing_sections(new_card(FACTS)) == []
    assert complete_card(done, replace(FACTS, repo_id="you/other")) == done


def test_the_condition_is_described_and_its_command_is_ours() -> None:
    text = section(new_card(FACTS), "condition").replace("\\", "")
    assert "three channels (RGB), drawn in white on black. Edges one pixel wide, by Canny's detector." in text
    assert "Options: low 50.0, high 150.0." in text
    assert "t2i-adapter annotate canny,low=50.0,high=150.0 photo.png --out condition.png" in text
    column = replace(FACTS, metadata=replace(RECORD, condition={"column": "depth", "kind": "map"}))
    text = section(new_card(replace(column, config={"in_channels": 1})), "condition")
    assert "column depth" in text and "one channel (grey)" in text and "annotate" not in text
    unknown = replace(RECORD, condition={"name": "file.py:Own", "options": {"x": 1}})
    text = section(new_card(replace(FACTS, metadata=unknown)), "condition")
    assert "annotate" not in text and "does not make such maps" in text


def test_each_program_gets_the_recommended_strength_and_share_of_steps() -> None:
    point = {"scale": 0.8, "condition_factor": 0.7}
    text = section(new_card(replace(FACTS, metadata=replace(RECORD, sampling=point))), "programs")
    assert "`strength` 0.8, `start_percent` 0 and `end_percent` 0.7." in text
    assert "*Control Weight* 0.8, *Ending Control Step* 0.7" in text
    assert "begin and end 0 % and 70 %" in text and "`me/my-adapter`" in text
    assert "models/controlnet/my-adapter.safetensors" in text and "multiples of 32 pixels" in text
    grey = section(new_card(replace(FACTS, config={**CONFIG, "in_channels": 1})), "programs")
    assert "mean of red, green and blue" in grey and "takes the red one" in grey
    strength = section(new_card(FACTS), "sampling")
    assert "The best strength was not measured." in strength


def test_every_section_is_there_in_its_order() -> None:
    card = new_card(FACTS)
    assert missing_sections(card) == []
    places = [card.index(f"<!-- {name} -->") for name in SECTIONS]
    assert places == sorted(places)
    use = section(card, "use")
    assert use.index("does not load adapters") < use.index("T2IAdapter.from_pretrained('me/my-adapter'")


def test_an_adapter_for_sd15_is_described_as_one() -> None:
    facts = replace(FACTS, config={**CONFIG, "adapter_type": "full_adapter"})
    card = new_card(facts)
    assert "stable-diffusion" in head_of(card)["tags"] and "stable-diffusion-xl" not in head_of(card)["tags"]
    assert "StableDiffusionAdapterPipeline.from_pretrained" in card and "for Stable Diffusion, " in card
    assert "multiples of 64 pixels" in card and "XL" not in card.split("## Training")[0].replace("controlnet", "")


def test_the_licence_other_needs_a_name_and_a_link() -> None:
    with pytest.raises(UserError, match="--hub.license_name is needed"):
        HubOptions(license="other")
    with pytest.raises(UserError, match="only the licence `other` has it"):
        HubOptions(license="mit", license_link="LICENSE")
    licence = HubOptions(license="other", license_name="mine", license_link="LICENSE").licence
    card = new_card(FACTS, licence=licence)
    assert card_faults(card) == [] and head_of(card)["license_name"] == "mine"
    changed = head_of(complete_card(card, FACTS, licence={"license": "mit"}))
    assert changed["license"] == "mit" and "license_link" not in changed, "no name of the former licence stays"


def test_the_commit_of_a_downloaded_base_is_known(tiny_base: Path, tmp_path: Path) -> None:
    commit = "0123456789" * 4
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / commit).symlink_to(tiny_base)
    options = BaseOptions(name="owner/base")
    assert downloaded_commit(Base(options, tmp_path / "snapshots" / commit)) == commit
    assert downloaded_commit(open_base(BaseOptions(name=str(tiny_base)))) is None
    assert downloaded_commit(open_base(BaseOptions(name=str(tmp_path / "snapshots" / commit)))) is None


def test_a_dataset_of_the_hub_is_told_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "photos").mkdir(parents=True)
    for location, is_hub in (
        ("fusing/fill50k", True),
        ("data/photos", False),
        ("data/gone", False),
        ("shapes", False),
        ("pairs.csv", False),
        ("https://host/a.tar", False),
        ("/no/such/folder", False),
    ):
        assert is_hub_dataset(DataOptions(location=location)) is is_hub, location
    assert is_hub_dataset(DataOptions(location="squad", kind="hub"))
