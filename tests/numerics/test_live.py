"""Encoding within the step equals the cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import losses, tiny_config
from support.tiny import write_circles

from t2i_adapter.batches.encoders import Encoders
from t2i_adapter.batches.loader import make_partial_batches
from t2i_adapter.cache.context import PrepareContext
from t2i_adapter.cache.dataset import CachedDataset, LiveDataset
from t2i_adapter.cache.prepare import prepare
from t2i_adapter.config.tree import (
    BaseOptions,
    Config,
)
from t2i_adapter.data.source import open_source
from t2i_adapter.errors import UserError
from t2i_adapter.models.base import Base
from t2i_adapter.models.open import open_base
from t2i_adapter.types import Batch
from t2i_adapter.verbs.train import run

HALF = 2**-10
"""One step of float16, relative. Encoders' batches of another size change float32 sums by 1e-6. Rounding to 11 bits
hides that, except for values near a rounding edge, which move by one step."""
FIELDS = ("moments", "condition", "text", "pooled", "time_ids", "timesteps", "noise", "latent_noise")


def config(base: Path, data: Path, root: Path, **options: Any) -> Config:
    changes = {"data.proportion_empty_prompts": 0.3, "data.prepared_dir": str(root / "cache"), "train.max_steps": 4}
    changes |= {"optim.lr": 1e-3, "optim.schedule": "constant", "checkpoint.every": 100}
    changes |= {f"data.{name}": value for name, value in options.items()}
    return tiny_config(base, data, root / "run", changes)


def facts_of(options: Config, base: Base | None = None) -> CachedDataset | LiveDataset:
    base = base or open_base(options.base)
    assert options.data.prepared_dir
    context = PrepareContext(base, "cpu", torch.float32, Path(options.data.prepared_dir), progress=False)
    return prepare(open_source(options.data, 0), options.data, context, in_channels=3)


def batches(options: Config, base: Base | None = None) -> list[Batch]:
    facts = facts_of(options, base)
    encoders = Encoders(base or open_base(options.base), "cpu", torch.float32)
    drafts = make_partial_batches(facts, options, rank=0, world=1, start_step=0, stop_step=4, num_timesteps=1000)
    return [encoders.complete(draft) for draft in drafts]


@pytest.mark.parametrize(
    "options", [{}, {"text_cache": "disk"}, {"flip": True, "crop": "random", "views": 2, "caption_prefix": "floral "}]
)
def test_live_batches_are_the_cached_ones(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    cached = batches(config(tiny_base, tiny_data, tmp_path, **options))
    live = batches(config(tiny_base, tiny_data, tmp_path, cache="none", **options))
    assert len(cached) == len(live) == 4
    for one, other in zip(cached, live, strict=True):
        assert list(one.keys) == list(other.keys)
        for name in FIELDS:
            a, b = getattr(one, name), getattr(other, name)
            assert a.dtype == b.dtype, name
            if name in ("moments", "text", "pooled"):
                torch.testing.assert_close(
                    a, b, rtol=HALF, atol=1e-4, msg=lambda message, name=name: f"{name}: {message}"
                )
                assert torch.equal(a, a.half().float()), f"{name} is rounded as it is stored"
                assert torch.equal(b, b.half().float()), f"{name} is rounded as if it were stored"
            else:
                assert torch.equal(a, b), name


def test_a_live_run_has_the_losses_of_a_cached_one(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    def losses_of(name: str, **options: Any) -> list[float]:
        chosen = replace(config(tiny_base, tiny_data, tmp_path, **options), output_dir=str(tmp_path / name))
        run(chosen)
        return losses(tmp_path / name)

    cached, live = losses_of("cached"), losses_of("live", cache="none")
    # Moments and states differ by at most one step of float16 in few places (see HALF); a loss is a mean over hundreds.
    assert live == pytest.approx(cached, rel=1e-4)


def test_without_a_cache_nothing_is_stored_and_nothing_encoded_early(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    class NothingToEncode(Base):
        def text_encoder(self, device: Any, dtype: Any) -> Any:
            raise AssertionError("the text encoders were loaded")

        def latent_encoder(self, device: Any) -> Any:
            raise AssertionError("the VAE was loaded")

    options = config(tiny_base, tiny_data, tmp_path, cache="none")
    base = NothingToEncode(BaseOptions(name=str(tiny_base)), tiny_base)
    facts = facts_of(options, base)
    assert isinstance(facts, LiveDataset)
    assert not (tmp_path / "cache").exists()
    record = facts.fetch(0, 0)
    assert record.moments is None
    assert record.pixels is not None
    assert record.pixels.shape == (3, 64, 64)
    with pytest.raises(AssertionError, match="VAE was loaded"):
        batches(options, base)


def test_processes_that_look_at_different_times_make_each_caption_once(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    options = config(tiny_base, tiny_data, tmp_path, cache="none", text_cache="disk").data
    source, base = open_source(options, 0), open_base(BaseOptions(name=str(tiny_base)))
    cpu: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "root": tmp_path / "cache", "progress": False}
    early, late = (PrepareContext(base, **cpu, rank=rank, world=2, run_id="m", timeout=0.1) for rank in (0, 1))
    for context in (early, late):
        facts = prepare(source, options, context, in_channels=3)
        assert all(facts.text(caption) for number in range(len(facts)) for caption in facts.captions(number))
    assert facts.texts
    assert len(facts.texts.shards) == len({"", *(facts.captions(number)[0] for number in range(len(facts)))})


def test_live_samples_are_grouped_by_crop_size(tiny_base: Path, tmp_path: Path) -> None:
    from PIL import Image

    data = write_circles(tmp_path / "data", num=5, size=128)
    for path in (data / "train").glob("00002*.png"):
        Image.open(path).resize((256, 128)).save(path)
    buckets: dict[str, Any] = {"buckets": "generated", "bucket_step": 32}
    both = [config(tiny_base, data, tmp_path, cache=cache, **buckets) for cache in ("disk", "none")]
    cached, live = (facts_of(replace(one, data=replace(one.data, resolution=128))) for one in both)
    assert [group.tolist() for group in live.groups] == [group.tolist() for group in cached.groups]
    assert sorted(map(len, live.groups)) == [1, 4]
    assert live.shards == cached.shards == (5,)


def test_states_that_were_used_last_are_kept_and_no_more(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_base(BaseOptions(name=str(tiny_base)))
    each = 2 * (77 * 48 + 32)
    encoders = Encoders(base, "cpu", torch.float32, keep=3 * each)
    asked: list[list[str]] = []
    real = encoders._text.encode
    monkeypatch.setattr(encoders._text, "encode", lambda some, limit: asked.append(list(some)) or real(some, limit))
    first = encoders.states(["red circle", "", "red circle", "blue circle"])
    again = encoders.states(["", "green circle", "red circle", "red circle"])
    assert asked == [["red circle", "", "blue circle"], ["green circle"]], "each once"
    assert torch.equal(first[0][0], again[0][2])
    assert torch.equal(first[1][1], again[1][0])
    encoders.states(["blue circle"])
    assert asked[-1] == ["blue circle"], "the one that was used longest ago had to go"
    assert len(encoders._texts) == 3
    many = [f"red circle {'a ' * number}" for number in range(40)]
    states, pooled = encoders.states(many)
    assert states.shape == (40, 77, 48)
    assert pooled.shape == (40, 32)
    assert len(encoders._texts) == 3


def test_a_long_caption_is_reported_once(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoders = Encoders(open_base(BaseOptions(name=str(tiny_base))), "cpu", torch.float32)
    for words in (10, 80, 90):
        encoders.states(["circle " * words])
    assert capsys.readouterr().err.count("more than 75 tokens") == 1


def test_bad_rows_met_on_the_way_are_listed_and_their_number_is_bounded(tiny_base: Path, tmp_path: Path) -> None:
    data = write_circles(tmp_path / "data", num=8, size=64)
    (data / "train" / "00003.png").unlink()
    options = config(tiny_base, data, tmp_path, cache="none", on_bad_sample="skip", max_bad_share=0.2)
    run(options)
    [line] = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "train/00003.png (line 4)"
    assert "no such file" in json.loads(line)["reason"]
    strict = replace(options, output_dir=str(tmp_path / "strict"), data=replace(options.data, max_bad_share=0.1))
    with pytest.raises(UserError, match="1 of 8 rows cannot be used, and --data.max_bad_share 0.1 allows 0"):
        run(strict)


def test_pixels_are_those_that_would_be_encoded(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    live = facts_of(config(tiny_base, tiny_data, tmp_path, cache="none"))
    cached = facts_of(config(tiny_base, tiny_data, tmp_path))
    for number in range(len(live)):
        one, other = live.fetch(number, 0), cached.fetch(number, 0)
        assert (live.key(number), one.geometry) == (cached.key(number), other.geometry)
        assert np.array_equal(one.condition, other.condition)
        assert live.captions(number) == cached.captions(number)
