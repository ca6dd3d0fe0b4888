"""Options of the demo, and the run it makes. Importing this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from t2i_adapter.config.tree import (
    CheckpointOptions,
    Config,
    DataOptions,
    ObjectiveOptions,
    OptimOptions,
    TrackingOptions,
    TrainOptions,
)
from t2i_adapter.verbs.make_data import Kind

SIZE = 128
GUIDANCE = 3.0
"""What suits `nano`, says its card; SDXL's usual 5 to 7.5 oversaturates flat colours."""


MIN_SNR_GAMMA = 0.05


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The main job from end to end on the embedded base: data, training, pictures, measured control."""

    out: str = "runs/demo"
    """Folder of the results: adapter/, sheet.png, report.html, evaluation.json; an earlier demo in it is replaced."""
    num_train: int = 2000
    """Pairs to train on."""
    num_test: int = 64
    """Unseen pairs to measure on."""
    steps: int = 400
    """Updates of the adapter."""
    kinds: tuple[Kind, ...] = ("circle",)
    """Shapes to draw: circles, as in the set that the guide trains on, or any of the others too."""
    max_shapes: int = 1
    """Shapes in a scene, at most; 1 to 3."""
    seed: int = 0
    """Decides scenes, training and pictures."""


def training(data_dir: str, output_dir: str, *, steps: int, seed: int) -> Config:
    """The demo's training; recipes/nano-shapes.yaml is the same as a file."""
    return Config(
        output_dir=output_dir,
        data=DataOptions(train_data_dir=data_dir, resolution=SIZE, num_workers=0),
        train=TrainOptions(batch_size=16, max_steps=steps, seed=seed, ema_decay=0.9),
        # On a base this small the layout is settled where nearly all is noise: weigh the loss towards there.
        objective=ObjectiveOptions(min_snr_gamma=MIN_SNR_GAMMA, stratify=True),
        optim=OptimOptions(name="muon", lr=1e-2, schedule="cosine", warmup_steps=0),
        checkpoint=CheckpointOptions(every=steps, keep=1),
        tracking=TrackingOptions(log_every=10),
    )
