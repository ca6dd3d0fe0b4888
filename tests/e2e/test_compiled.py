"""A compiled UNet: the same numbers and gradients; without a compiler, a line and an uncompiled run."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from t2i_adapter.training.compile import SHORT_RUN, compile_unet

SCRIPT = """
import copy
import torch
from diffusers.models.resnet import ResnetBlock2D
from t2i_adapter.devices import sharing_cores
from t2i_adapter.training.compile import SHORT_RUN, compile_unet

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=4, groups=2)

    def forward(self, picture, time):
        return self.block(picture, time)

torch.manual_seed(0)
net = unet = Net().requires_grad_(False)
picture, time = torch.randn(2, 8, 4, 4), torch.randn(2, 4)

def gradient(_=None):
    given = picture.clone().requires_grad_()
    (got,) = torch.autograd.grad(unet(given, time).square().sum(), given)
    return got

plain = gradient()
said = []
assert compile_unet(unet, torch.device("cpu"), "off", None, said.append) == 0
for kind in KINDS:
    unet = copy.deepcopy(net)
    assert compile_unet(unet, torch.device("cpu"), kind, SHORT_RUN, said.append) == 1
    with sharing_cores(2) as threads:
        found = list(threads.map(gradient, range(4)))
    for got in found:
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-5)
graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
with torch.no_grad():
    unet(picture[:1], time[:1])  # another shape, as in validation: it is not compiled for
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
blocks = torch.nn.ModuleList([Net(), Net(), Net()])
assert compile_unet(blocks, torch.device("cuda"), "on", None, said.append) == 3, "on a GPU each block by itself"
print(graphs, len(said), *said)
"""


def run(*kinds: str, **environment: str) -> tuple[int, int, str]:
    """Graphs that were made, lines said, and those."""
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("KINDS", repr(kinds))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    graphs, lines, *said = done.stdout.strip().splitlines()[-1].split(" ", 2)
    return int(graphs), int(lines), "".join(said)


def test_compiled_it_gives_the_same_gradients_on_several_threads_at_once():
    graphs, lines, said = run("on", "graphs")
    assert graphs >= 2
    assert lines == 0, said


def test_without_a_compiler_one_line_says_so_and_it_runs_as_it_is():
    graphs, lines, said = run("on", CXX="no-such-compiler", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
    assert lines == 1
    assert said.startswith("--train.compile: the UNet cannot be compiled here (")
    assert graphs == 0


def test_a_run_that_is_too_short_for_it_is_told():
    said: list[str] = []
    blocks = torch.nn.ModuleList([])
    for steps in (SHORT_RUN - 1, SHORT_RUN, None):
        compile_unet(blocks, torch.device("cuda"), "on", steps, said.append)
    assert said == ["--train.compile on: compiling takes a minute or more, and 999 updates may not make up for it."]
