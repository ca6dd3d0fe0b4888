"""Coverage-guided fuzzing of the property tests that use no fixture.

Inputs that reach a new branch are kept and mutated further. Optional: needs atheris (pip install atheris), which has
wheels for Linux.

    python tests/fuzz/guided.py --seconds 60                    every test in turn
    python tests/fuzz/guided.py --test test_any_words_are_flags_or_a_line
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODULES = ("test_fuzz_options", "test_fuzz_files")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="time for each test")
    parser.add_argument("--test", help="run only this test")
    parser.add_argument("--here", action="store_true", help="fuzz in this process, which exits at the end")
    options = parser.parse_args()
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    if options.here:
        search(options.test, options.seconds)
    failed = []
    for name in [options.test] if options.test else properties():
        print(f"{name}: {options.seconds} s", flush=True)
        words = ["--here", "--test", name, "--seconds", str(options.seconds)]
        if subprocess.run([sys.executable, __file__, *words], timeout=options.seconds + 600).returncode:
            failed.append(name)
    print(f"{len(failed)} failed: {', '.join(failed)}" if failed else "no failure found")
    return 1 if failed else 0


def properties() -> dict[str, Callable[[bytes], object]]:
    """Test -> function that runs it on bytes."""
    found = {}
    for module in map(importlib.import_module, MODULES):
        for name, test in vars(module).items():
            if hasattr(test, "hypothesis") and not inspect.signature(test).parameters:
                found[name] = test.hypothesis.fuzz_one_input
    return found


def search(name: str, seconds: int) -> None:
    """Fuzzes one test; never returns."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["t2i_adapter"]):
        feed = properties()[name]
    with tempfile.TemporaryDirectory() as corpus:
        atheris.Setup([name, corpus, f"-max_total_time={seconds}", "-max_len=4096"], feed)
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
