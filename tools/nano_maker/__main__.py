"""Makes the embedded base, stage by stage. A training stage resumes from its last checkpoint.

    npm pack @iconify-json/fluent-emoji-flat@1.2.6
    export PYTHONPATH=tools
    python -m nano_maker vae  --work DIR --emoji FILE.tgz --minutes 35
    python -m nano_maker text --work DIR --emoji FILE.tgz --minutes 15
    python -m nano_maker unet --work DIR --emoji FILE.tgz --minutes 70
    python -m nano_maker decoder --work DIR --emoji FILE.tgz --minutes 8
    python -m nano_maker export --work DIR --emoji FILE.tgz --out FOLDER
    python -m nano_maker measure --out FOLDER

`torchrun --nproc-per-node N -m nano_maker ...` runs a training stage on several processes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from nano_maker import cache, checkpoint, corpus, export, measure, run, text, unet, vae, words
from t2i_adapter.errors import UserError
from t2i_adapter.files import show_bytes

_MINUTES = {"vae": 35.0, "text": 15.0, "unet": 70.0, "decoder": 8.0}


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    run.join_group()
    try:
        options.run(options)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m nano_maker", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    stages = result.add_subparsers(required=True, metavar="STAGE")
    training = {
        "vae": (_vae, "train the autoencoder"),
        "text": (_text, "train the text encoders to predict what captions describe"),
        "unet": (_unet, "train the UNet on cached latents and text states; needs vae and text"),
        "decoder": (_decoder, "train the finished VAE's decoder further; its latents do not change"),
    }
    for name, (function, about) in training.items():
        stage = _stage(stages, name, function, about)
        stage.add_argument("--minutes", type=float, default=_MINUTES[name], help="time limit of all runs together")
        stage.add_argument("--seed", type=int, default=0)
        if name == "unet":
            stage.add_argument("--samples", type=int, default=20 * 1024, help="pictures to encode and train on")
    out = {"type": Path, "required": True, "help": "folder of the base, in the layout of diffusers"}
    exported = _stage(stages, "export", _export, "write the base in half precision")
    exported.add_argument("--out", **out)
    exported.add_argument("--note", default="", help="text for the card on how these weights were trained")
    measured = stages.add_parser("measure", help="measure an exported base; write its README.md and samples.png")
    measured.set_defaults(run=_measure)
    measured.add_argument("--out", **out)
    measured.add_argument("--num", type=int, default=256, help="unseen prompts")
    return result


def _stage(stages, name: str, function: Callable[[argparse.Namespace], None], about: str) -> argparse.ArgumentParser:
    stage = stages.add_parser(name, help=about)
    stage.set_defaults(run=function)
    stage.add_argument("--work", type=Path, required=True, help="folder of checkpoints and caches")
    stage.add_argument("--emoji", type=Path, required=True, help="@iconify-json/fluent-emoji-flat: .tgz or folder")
    return stage


def _vae(options: argparse.Namespace) -> None:
    vae.train(options.work, options.minutes, options.seed, _corpus(options).rgba)


def _text(options: argparse.Namespace) -> None:
    text.train(options.work, options.minutes, options.seed, _text_models(options), _corpus(options).targets)


def _unet(options: argparse.Namespace) -> None:
    models, base_vae = _trained_text(options), vae.finish(options.work)
    folder = options.work / "cache"
    cache.build(folder, options.samples, _corpus(options).picture, base_vae, models)
    if dist.is_initialized():
        dist.barrier()
    unet.train(options.work, options.minutes, options.seed, cache.Samples(folder), models)


def _decoder(options: argparse.Namespace) -> None:
    vae.train_decoder(options.work, options.minutes, options.seed, _corpus(options).rgba)


def _export(options: argparse.Namespace) -> None:
    network = unet.build()
    checkpoint.load(run.checkpoint_file(options.work, "unet"), {"ema": network})
    base = export.pipeline(vae.sharpest(options.work), _trained_text(options), network)
    size = export.write(options.out, base)
    files = {stage: run.checkpoint_file(options.work, stage) for stage in _MINUTES}
    stages = {stage: checkpoint.progress(file) for stage, file in files.items() if file.exists()}
    measure.write_recipe(options.out, {**stages, "note": options.note})
    print(f"{options.out}: {show_bytes(size)} of weights")


def _measure(options: argparse.Namespace) -> None:
    measure.run(options.out, options.num)


def _corpus(options: argparse.Namespace) -> corpus.Corpus:
    """Process 0 renders the emoji; the other processes wait for the file."""
    if run.rank() > 0:
        dist.barrier()
    result = corpus.load(options.work, options.emoji)
    if run.rank() == 0 and run.world() > 1:
        dist.barrier()
    return result


def _text_models(options: argparse.Namespace) -> text.TextModels:
    torch.manual_seed(options.seed if "seed" in options else 0)
    return text.build(words.tokenizers(words.domain_words(corpus.plain_icons(options.emoji))))


def _trained_text(options: argparse.Namespace) -> text.TextModels:
    models = _text_models(options)
    checkpoint.load(run.checkpoint_file(options.work, "text"), {"first": models.first, "second": models.second})
    models.first.eval().requires_grad_(False)
    models.second.eval().requires_grad_(False)
    return models


if __name__ == "__main__":
    main()
