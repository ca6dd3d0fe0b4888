#!/usr/bin/env python
"""Train a T2I-Adapter for SDXL, or for Stable Diffusion 1.5 or 2.1, with the flags of the diffusers script of this name
(docs/diffusers-script.md).

python train_t2i_adapter_sdxl.py --help, or under `accelerate launch` and `torchrun`.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("t2i_adapter") is None:  # a checkout whose package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from t2i_adapter.script import main

if __name__ == "__main__":
    sys.exit(main())
