"""Muon against its definition: singular value decompositions in float64, and AdamW as torch has it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from t2i_adapter.config.tree import OptimOptions
from t2i_adapter.training.muon import Muon, orthogonal
from t2i_adapter.training.optim import make_optimizer


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(32, 200), (200, 32), (48, 48)])
def test_an_update_has_the_matrix_s_singular_vectors_and_nearly_equal_singular_values(shape: tuple[int, int]):
    given = matrix(*shape)
    scale = 0.2 * max(shape) ** 0.5
    got = orthogonal(given).double() / scale
    u, values, v = torch.linalg.svd(given.double(), full_matrices=False)
    inside = u.T @ got @ v.T  # diagonal, where singular vectors are kept
    # the quintic leaves singular values between 0.68 and 1.13 (those that were not tiny), bfloat16 a few hundredths
    large = values > 0.1 * values.max()
    assert inside.diagonal()[large].min() > 0.6
    assert inside.diagonal().max() < 1.25
    assert (inside - inside.diagonal().diag()).abs().max() < 0.06
    rms = got.square().mean().sqrt() * scale
    assert rms == pytest.approx(0.2, rel=0.25), "as large as an AdamW update, whatever the shape"


def test_momentum_looks_ahead_and_the_decay_is_decoupled():
    weight = nn.Parameter(matrix(8, 6))
    start, gradients = weight.detach().clone(), [matrix(8, 6, seed) for seed in (1, 2, 3)]
    optimizer = Muon([weight], lr=0.01, weight_decay=0.1)
    expected, mean = start.clone(), torch.zeros_like(start)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        mean = 0.95 * mean + 0.05 * gradient
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * orthogonal(0.05 * gradient + 0.95 * mean)
    # an update has bfloat16's 8 bits, and its steps are 0.01 of 0.2
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=3e-4)
    assert (weight.detach() - start).abs().max() > 3e-3


def test_a_convolution_is_a_matrix_of_its_output_channels():
    convolution, flat = (nn.Parameter(matrix(8, 36).reshape(shape)) for shape in ((8, 4, 3, 3), (8, 36)))
    for weight in (convolution, flat):
        weight.grad = matrix(8, 36, 1).reshape(weight.shape)
        Muon([weight], lr=0.1).step()
    assert torch.equal(convolution.detach().reshape(8, 36), flat.detach())


def test_vectors_follow_torchs_adamw():
    ours, theirs = (nn.Parameter(matrix(1, 20)[0]) for _ in range(2))
    options = {"lr": 0.01, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.1}
    for optimizer, weight in ((Muon([ours], **options), ours), (torch.optim.AdamW([theirs], **options), theirs)):
        for seed in range(5):
            weight.grad = matrix(1, 20, seed)[0]
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_the_options_make_it():
    options = OptimOptions(name="muon", lr=0.02, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.3)
    optimizer = make_optimizer(options, [nn.Parameter(matrix(2, 2))], 0.04)
    assert isinstance(optimizer, Muon)
    assert optimizer.defaults == {"lr": 0.04, "betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.3}


TWO = """
import sys
import torch
import torch.distributed as dist
from t2i_adapter.training.muon import Muon

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)

def stepped():
    weights = [torch.nn.Parameter(torch.full(shape, 0.5)) for shape in ((6, 4), (4, 6), (8, 2, 3, 3), (5,))]
    optimizer = Muon(weights, lr=0.1)
    for step in range(2):
        for index, weight in enumerate(weights):
            torch.manual_seed(10 * step + index)
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    return weights

alone = stepped()
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
shared = stepped()
assert all(torch.equal(a, b) for a, b in zip(alone, shared))
print("equal")
"""


def test_processes_that_share_the_work_come_to_the_same(tmp_path: Path):
    command = [sys.executable, "-c", TWO]
    others = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    try:
        assert [other.communicate(timeout=200)[0] for other in others] == ["equal\n"] * 2
    finally:
        for other in others:
            other.kill()
            other.wait(timeout=10)
