"""Captions of more than 75 tokens: encoded as ComfyUI does, cached by their own size, equal to the UNet in any run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import losses, tiny_config
from support.tiny import write_circles

from t2i_adapter.batches.encoders import Encoders
from t2i_adapter.cache.context import PrepareContext
from t2i_adapter.cache.prepare import prepare
from t2i_adapter.cache.records import TEXT_VERSION, caption_bytes
from t2i_adapter.cache.shards import Shards
from t2i_adapter.cache.texts import open_texts
from t2i_adapter.config.tree import AdapterOptions, BaseOptions, Config
from t2i_adapter.data.pair import PairTransform
from t2i_adapter.data.source import open_source
from t2i_adapter.doctor.report import diagnose
from t2i_adapter.files import fingerprint
from t2i_adapter.generation.generate import encode_prompts
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.base import Base
from t2i_adapter.models.encoders import TextEncoder, text_beyond
from t2i_adapter.models.open import open_base
from t2i_adapter.training.memory import Shapes
from t2i_adapter.types import MaxTokens, count_chunks, text_length
from t2i_adapter.verbs.train import run

WORDS = ("red", "purple", "blue", "circle", "square", "background", "white", "with", "cyan", "a")
LIMITS: tuple[MaxTokens, ...] = (75, 150, 225)


def caption_of(tokens: int) -> str:
    """A caption of so many tokens for `nano` and for the tiny base, each word another than the one before."""
    return " ".join(WORDS[number * (number + 3) % 10] for number in range(tokens))


@pytest.fixture(scope="module")
def nano() -> Base:
    return open_base(BaseOptions(name="nano"))


@pytest.fixture(scope="module")
def encoder(nano: Base) -> TextEncoder:
    return nano.text_encoder("cpu", torch.float32)


def comfy_states(encoder: TextEncoder, caption: str) -> tuple[torch.Tensor, torch.Tensor]:
    """ComfyUI's states (77 n,D) and pooled (P,) of a prompt without weights, stated again: the first encoder pads with
    the end token and the second with token 0, and one chunk follows the other."""
    states, pooled = [], []
    for tokenizer, network, pad in zip(encoder.tokenizers, encoder.encoders, ("end", 0), strict=True):
        start, end = tokenizer("").input_ids
        tokens = tokenizer(caption, add_special_tokens=False).input_ids
        rows: list[list[int]] = [[start]]
        for token in tokens:
            if len(rows[-1]) == 76:
                rows[-1].append(end)
                rows.append([start])
            rows[-1].append(token)
        rows[-1].append(end)
        rows[-1] += [end if pad == "end" else 0] * (77 - len(rows[-1]))
        with torch.no_grad():
            outputs = [network(torch.tensor([row]), output_hidden_states=True) for row in rows]
        states.append(torch.cat([output.hidden_states[-2][0] for output in outputs]))
        pooled.append(outputs[0][0][0])
    return torch.cat(states, dim=-1), pooled[1]


@pytest.mark.parametrize("tokens", [0, 1, 74, 75, 76, 149, 150, 151, 224, 225])
def test_the_states_are_comfyuis(encoder: TextEncoder, tokens: int) -> None:
    caption = caption_of(tokens)
    assert encoder.count_tokens(caption) == tokens
    expected, pooled = comfy_states(encoder, caption)
    assert len(expected) == 77 * max(1, -(-tokens // 75))
    for limit in LIMITS:
        if tokens <= limit:
            [states], [vector] = encoder.encode([caption], limit)
            own = states[: len(expected)]
            # Other batch sizes sum float32 in another order.
            torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(vector, pooled, rtol=1e-5, atol=1e-5)
            assert len(states) == text_length(limit)
            assert torch.equal(states, own.repeat(len(states) // len(own), 1))


def test_what_lies_beyond_the_limit_is_cut_off(encoder: TextEncoder) -> None:
    words = caption_of(400).split()
    for limit in LIMITS:
        whole, cut = (encoder.encode([" ".join(some)], limit) for some in (words, words[:limit]))
        assert torch.equal(whole[0], cut[0]) and torch.equal(whole[1], cut[1])
        shorter, _ = encoder.encode([" ".join(words[: limit - 1])], limit)
        assert not torch.equal(shorter, cut[0])
        assert text_beyond(encoder.tokenizers[0], " ".join(words), limit) == " ".join(words[limit:])
    assert text_beyond(encoder.tokenizers[0], "red", 75) == ""


ODD = ["", " ", "Ünïcode 你好 🙂, (x)", "it's  \n two lines", "<|endoftext|> red", "!" * 90, "A" * 200, caption_of(90)]


def test_with_one_chunk_the_states_are_those_of_diffusers_to_the_bit(nano: Base, encoder: TextEncoder) -> None:
    pipeline: Any = nano.pipeline(build_adapter(AdapterOptions(), nano.unet_config), "cpu", torch.float32, text=encoder)
    pipeline.unet = None
    states, _, pooled, _ = pipeline.encode_prompt(ODD, do_classifier_free_guidance=False)
    ours = encoder.encode(ODD)
    assert torch.equal(ours[0], states) and torch.equal(ours[1], pooled)
    negative = pipeline.encode_prompt(ODD, do_classifier_free_guidance=True, negative_prompt="blue")
    found = encode_prompts(pipeline, ODD, guidance=5.0, negative="blue")
    for ours, theirs in zip(vars(found).values(), (negative[0], negative[2], negative[1], negative[3]), strict=True):
        assert torch.equal(ours, theirs)


def test_a_caption_means_the_same_to_the_unet_in_every_run(nano: Base, encoder: TextEncoder) -> None:
    """Repeated chunks leave attention as it is; empty ones would not."""
    unet = nano.unet("cpu", torch.float32)
    caption = "red circle with blue background"
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, 16, 16, generator=generator)

    def predict(states: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[128, 128, 0, 0, 128, 128]])}
        with torch.no_grad():
            return unet(noisy, 500, encoder_hidden_states=states, added_cond_kwargs=added).sample

    plain = predict(*encoder.encode([caption]))
    for limit in LIMITS:
        torch.testing.assert_close(predict(*encoder.encode([caption], limit)), plain, rtol=1e-4, atol=1e-5)
    (states, pooled), (empty, _) = encoder.encode([caption]), encoder.encode([""])
    padded = predict(torch.cat([states, empty], 1), pooled)
    assert (padded - plain).norm() / plain.norm() > 1e-3
    two = caption_of(120)
    torch.testing.assert_close(
        predict(*encoder.encode([two], 150)), predict(*encoder.encode([two], 225)), rtol=1e-4, atol=1e-5
    )


def test_lengths() -> None:
    assert [text_length(limit) for limit in LIMITS] == [77, 154, 462]
    chunks = [count_chunks(tokens, 150) for tokens in (0, 1, 75, 76, 150, 151, 1000)]
    assert chunks == [1, 1, 1, 2, 2, 2, 2]


# In a run -----------------------------------------------------------------------------------------------------------


def config(base: Path, data: Path, out: Path, **options: Any) -> Config:
    changes = {"train.max_steps": 3, "optim.lr": 1e-3, "optim.schedule": "constant", "checkpoint.every": 100}
    changes |= {"data.prepared_dir": str(out.parent / "cache"), "data.proportion_empty_prompts": 0.3}
    return tiny_config(base, data, out, {**changes, **{f"data.{name}": value for name, value in options.items()}})


@pytest.fixture
def long_data(tmp_path: Path) -> Path:
    """Six pairs with captions of 5, 80, 150, 151, 230 and 5 tokens."""
    data = write_circles(tmp_path / "data", num=6, size=64)
    metadata = data / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    for row, tokens in zip(rows, (None, 80, 150, 151, 230, None), strict=True):
        row["text"] = caption_of(tokens) if tokens else row["text"]
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def test_short_captions_have_equal_losses_whatever_the_limit(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    found = {}
    for limit in LIMITS:
        run(config(tiny_base, tiny_data, tmp_path / str(limit), max_tokens=limit))
        found[limit] = losses(tmp_path / str(limit))
    assert found[150] == pytest.approx(found[75], rel=1e-5)
    assert found[225] == pytest.approx(found[75], rel=1e-5)


def test_long_captions_count_and_cached_and_live_runs_agree(tiny_base: Path, long_data: Path, tmp_path: Path) -> None:
    def losses_of(name: str, **options: Any) -> list[float]:
        run(config(tiny_base, long_data, tmp_path / name, **options))
        return losses(tmp_path / name)

    cut = losses_of("cut")
    for limit in (150, 225):
        cached = losses_of(f"cached {limit}", max_tokens=limit)
        # Rounding of the states to float16 moves a loss by 1e-7 here, and the cut-off words by 7e-5.
        assert losses_of(f"live {limit}", max_tokens=limit, cache="none") == pytest.approx(cached, rel=1e-5)
        assert losses_of(f"text {limit}", max_tokens=limit, text_cache="live") == pytest.approx(cached, rel=1e-5)
        assert cached != pytest.approx(cut, rel=5e-5)


def prepared(base: Base, data: Path, root: Path, limit: int) -> Any:
    options = config(Path(base.name), data, root / "run", max_tokens=limit).data
    context = PrepareContext(base, "cpu", torch.float32, root / "cache", progress=False)
    return prepare(open_source(options, 0), options, context, in_channels=3)


def test_a_record_has_only_the_chunks_of_its_caption(
    tiny_base: Path, long_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = open_base(BaseOptions(name=str(tiny_base)))
    dataset = prepared(base, long_data, tmp_path, 225)
    assert "captions: 1 of 7 have more than 225 tokens" in capsys.readouterr().out
    read: Callable[[str], Any] = dataset.texts.shards.get
    keys = dataset.texts.keys([dataset.captions(number)[0] for number in range(6)])
    positions = [len(read(key.tobytes()).arrays["states"]) // 77 for key in keys]
    assert positions == [1, 2, 2, 3, 3, 1]
    encoders = Encoders(base, "cpu", torch.float32, max_tokens=225)
    for number in range(6):
        [caption] = dataset.captions(number)
        record, (states, pooled) = dataset.text(caption), encoders.states([caption])
        assert record.states.shape == (462, 48)
        np.testing.assert_allclose(record.states, states[0].numpy(), rtol=2**-10, atol=1e-4)
        np.testing.assert_allclose(record.pooled, pooled[0].numpy(), rtol=2**-10, atol=1e-4)


def test_doctor_knows_the_limit_and_the_bytes(tiny_base: Path, long_data: Path, tmp_path: Path) -> None:
    base, tail = open_base(BaseOptions(name=str(tiny_base))), 20  # bytes at a shard's end, which belong to no record
    for limit, long in ((75, 4), (150, 2), (225, 1)):
        texts = prepared(base, long_data, tmp_path, limit).texts
        size = sum(path.stat().st_size - tail for path in texts.shards.folder.glob("*.shard"))
        options = config(tiny_base, long_data, tmp_path / "run", max_tokens=limit).data
        source = open_source(options, 0)
        transform = PairTransform.of(options, 3, source.annotate)
        report = diagnose(source, transform, base, options, timed_rows=1, workers=0)
        assert report.needs.caption_bytes == size
        [finding] = [finding for finding in report.findings if finding.kind == "long_caption"]
        assert len(finding.reasons) == long
        assert finding.reasons[4] == "230 tokens"


def test_the_planned_memory_and_disk_know_the_limit(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    base = open_base(BaseOptions(name=str(tiny_base)))
    assert [caption_bytes(base, limit) for limit in LIMITS] == [2 * (n * 77 * 48 + 32) for n in (1, 2, 3)]
    adapter = build_adapter(AdapterOptions(), base.unet_config)
    steps = [
        Shapes(config(tiny_base, tiny_data, tmp_path / "run", max_tokens=limit), base, adapter, torch.float32)
        .memory(1, height=64, width=64)
        .step
        for limit in LIMITS
    ]
    assert steps[0] < steps[1] < steps[2]


def test_caches_of_short_captions_stay_valid(tiny_base: Path, tmp_path: Path) -> None:
    base = open_base(BaseOptions(name=str(tiny_base)))
    before = fingerprint(weights=base.text_fingerprint, dtype=torch.float32, version=TEXT_VERSION)
    context = PrepareContext(base, "cpu", torch.float32, tmp_path)
    names = [open_texts(context, limit).fingerprint for limit in LIMITS]
    assert names[0] == before, "the folder's name has no part for the option"
    assert len(set(names)) == 3


def test_a_caption_of_one_chunk_has_an_equal_record_for_every_limit(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    base = open_base(BaseOptions(name=str(tiny_base)))
    [caption] = prepared(base, tiny_data, tmp_path, 75).captions(0)
    found = [prepared(base, tiny_data, tmp_path, limit).texts for limit in LIMITS]
    arrays = [Shards(one.shards.folder).get(one.keys([caption])[0].tobytes()) for one in found]
    for one in arrays:
        assert one is not None
        assert np.array_equal(one.arrays["states"], arrays[0].arrays["states"])  # type: ignore[union-attr]
