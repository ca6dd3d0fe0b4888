"""Runs every command that the documentation shows, in the order of its page, with small local stand-ins.

tests/contract/test_docs.py only parses the commands with this version's flags.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

import pytest
from diffusers import T2IAdapter
from PIL import Image
from support.doc_pages import PAGES, code, commands
from support.processes import Run, ranks
from support.single_file import write_single_file
from support.tiny import write_tiny_sd
from torch.distributed.run import get_args_parser

from t2i_adapter.cli import PROG, main
from t2i_adapter.data.shapes import write_dataset
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.models import nano

ROOT = Path(__file__).resolve().parents[2]

STAND_INS = {
    "stabilityai/stable-diffusion-xl-base-1.0": "nano",
    "madebyollin/sdxl-vae-fp16-fix": str(nano.path() / "vae"),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "path/to/2-base": "sd15",
    "fusing/fill50k": "my-pictures",
    "$MODEL_DIR": "nano",
    "$OUTPUT_DIR": "guide",
    "OUTPUT_DIR": "runs/demo/adapter",
    "runs/nano-palette": "runs/from-recipe",
    "my-adapter/options.yaml": "runs/again/options.yaml",
    "iconify-json-fluent-emoji-flat-1.2.6.tgz": "icons.tgz",
}
"""Name in a shown command -> its local stand-in. The rest of the command is unchanged."""

SMALLER = (
    (r"--num 2000\b", "--num 4"),
    (r"(evaluate --sweep .*)--num 32\b", r"\1--split train --num 2"),  # a sweep needs twice as many pairs
    (r"--num_test 64\b", "--num_test 2"),
    (r"--num (64|400)\b", "--num 2"),
    (r"\bshapes:\d+", "shapes:4"),
    (r"\{0000\.\.0999\}", "{0000..0001}"),
    (r"--nproc_per_node 8\b", "--nproc_per_node 2"),
    (r"(--resolution[= ]|--data\.resolution )(1024|512)\b", r"\g<1>128"),
    (r"(--max_train_steps[= ]|--train\.max_steps )\d+", r"\g<1>2"),
    (r'--report_to="?wandb"?', "--report_to=none"),
    (r" --push_to_hub", ""),
    (r"--validation_steps=100\b", "--validation_steps=100 --num_validation_images=1"),
)
"""(pattern, replacement): fewer pictures and steps, which are enough to test that a command works."""

NOT_RUN = {
    "make ": "each target runs tests or the whole demo",
    f"{PROG} VERB": "the form of a command",
    f"{PROG} train --recipe FILE.yaml": "the form of a command",
    f"{PROG} prepare --recipe FILE.yaml": "the form of a command",
    f"{PROG} plan --recipe recipe-24gb": "needs the hub; tests/unit/test_plan.py plans for a card too",
    f"{PROG} push": "needs the hub; tests/unit/test_push.py runs it against a server",
    f"{PROG} pull": "needs the hub; tests/unit/test_pull.py runs it against a server",
    f"{PROG} generate --lora": "needs a LoRA; tests/unit/test_generate_several.py has a small one",
    f"{PROG} generate --controlnet": "needs a ControlNet; tests/unit/test_generate_several.py has a small one",
    f"{PROG} annotate depth": "needs weights of the hub; tests/unit/test_conditions_depth.py has small ones",
    f"{PROG} annotate segmentation": "needs weights; tests/unit/test_conditions_segmentation.py has small ones",
    f'{PROG} train --data "': "shards elsewhere; tests/e2e/test_sources.py reads them from servers",
    "python -m t2i_adapter.annotators.weights": "downloads",
    "python tests/campaigns/run.py": "minutes to hours; tests/campaigns runs the same code in short",
    "python benchmarks/gpu.py": "needs a GPU; tests/unit/test_gpu_benchmark.py runs it with small networks",
    "python benchmarks/scale.py": "takes hours; tests/unit/test_scale_page.py makes its tables",
    f"{PROG} plan --pairs 3000 --data.resolution 128 --card A100 --compare": "tests/unit/test_plan.py compares",
    "python -m nano_maker": "takes hours; tests/unit/test_nano.py tests its parts",
}

LINK = re.compile(r"http://\S+")
PAGES_WITH_COMMANDS = [page for page in PAGES if page.suffix == ".md" and commands(page)]
ICONS = {f"thing-{i}": {"body": f'<circle cx="16" cy="16" r="{4 + i % 9}" fill="#f00"/>'} for i in range(60)}
OWN_ANNOTATOR = ROOT / "docs" / "add-a-condition.md"
OWN_RECIPE = re.compile(r"(millions|recipe)\.yaml")
"""Recipes of a reader: they name data that the reader has."""
MILLIONS = ROOT / "docs" / "millions.md"


pytestmark = pytest.mark.usefixtures("nothing_is_left_running")


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a reader of the documentation has: pictures, conditions, recipes and a trained adapter."""
    root = tmp_path_factory.mktemp("docs")
    for name in ("recipes", "train_t2i_adapter_sdxl.py"):
        (root / name).symlink_to(ROOT / name)
    for folder in ("my-pictures", "runs/demo/data"):
        write_dataset(root / folder, num=4, split="train")
        write_dataset(root / folder, num=2, split="test")
    for name in ("house_outline", "circle", "condition", "mask", "conditioning_image_1", "conditioning_image_2"):
        shutil.copy(root / "my-pictures/test/00000_cond.png", root / f"{name}.png")
    shutil.copy(root / "my-pictures/test/00000.png", root / "photo.png")
    write_single_file(write_tiny_sd(root / "sd15"), root / "v2-base.safetensors")
    write_icons(root / "icons.tgz")
    write_photos(root / "my-photos", root / "my-pictures")
    write_shards(root / "shards", root / "my-pictures/train")
    (root / "millions.yaml").write_text(millions_recipe())
    (root / "tones.py").write_text(code(OWN_ANNOTATOR, '"""The picture in a few tones, for adapters that shade."""'))
    run(
        f"{PROG} train --data runs/demo/data --data.resolution 128 --train.max_steps 1 --output_dir runs/demo/adapter",
        root,
    )
    write_exported(root)
    for name in "abc":
        shutil.copytree(root / "runs/demo/adapter", root / "runs" / name)
    return root


def write_exported(root: Path) -> None:
    """Writes a small adapter of a shape that other programs read, and a file of it as they have it."""
    record = {"base": {"name": "stabilityai/stable-diffusion-xl-base-1.0"}, "resolution": 1024}
    network = T2IAdapter(3, [16, 32, 64, 64], 2, 16, "full_adapter_xl")
    save_adapter(network, root / "my-sdxl-adapter", metadata=record)
    run(f"{PROG} export my-sdxl-adapter --to a1111 --name their --out theirs", root)
    next((root / "theirs").iterdir()).rename(root / "their-adapter.safetensors")


def write_photos(folder: Path, pictures: Path) -> None:
    """Writes pictures with captions in text files beside them, in train/ and test/, from an image folder."""
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        for number, row in enumerate(rows_of(pictures / split), start=1):
            with Image.open(pictures / split / row["file_name"]) as picture:
                picture.save(folder / split / f"{number:04d}.jpg", quality=95)
            (folder / split / f"{number:04d}.txt").write_text(row["text"])


def write_shards(folder: Path, pictures: Path) -> None:
    """Writes two tar shards with the pairs of an image folder's split."""
    folder.mkdir()
    rows = rows_of(pictures)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for number, row in enumerate(rows[shard::2]):
                tar.add(pictures / row["file_name"], f"{number}.png")
                member = tarfile.TarInfo(f"{number}.txt")
                member.size = len(row["text"].encode())
                tar.addfile(member, io.BytesIO(row["text"].encode()))


def rows_of(split: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (split / "metadata.jsonl").read_text().splitlines()]


def millions_recipe() -> str:
    """Returns the recipe that docs/millions.md shows, for two small shards and nano."""
    smaller = (
        ("{0000..0999}", "{0000..0001}"),
        ("resolution: 1024", "resolution: 128"),
        ("max_steps: 20000", "max_steps: 2"),
        *STAND_INS.items(),
    )
    recipe = code(MILLIONS, "# millions.yaml")
    for shown, instead in smaller:
        recipe = recipe.replace(shown, instead)
    return recipe


def write_icons(file: Path) -> None:
    content = json.dumps({"prefix": "x", "height": 32, "icons": ICONS}).encode()
    with tarfile.open(file, "w:gz") as tar:
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def world(reader_folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy for one page, with the folder data/ that its commands expect; docs/data.md makes it itself."""
    root = tmp_path / "world"
    shutil.copytree(reader_folder, root, symlinks=True)
    if "data.md" not in request.node.name:
        shutil.copytree(root / "my-pictures", root / "data")
    return root


def small(command: str, number: int) -> str:
    """The command with stand-ins and smaller sizes. number: its place on the page."""
    for pattern, instead in SMALLER:
        command = re.sub(pattern, instead, command)
    for name, here in STAND_INS.items():
        command = command.replace(name, here)
    if re.search(r"t2i[-_]adapter train ", command):
        command = command.partition(" #")[0]
        ours = {"--train.max_steps": "2"}
        if OWN_RECIPE.search(command):
            pass
        elif "--recipe" in command:
            ours |= {"--data": "my-pictures"}
            ours["--output_dir"] = "runs/again" if "resume" in command or number == 0 else f"runs/{number}"
        else:
            ours |= {"--data.resolution": "128", "--output_dir": f"runs/{number}"}
        if "--validation.prompts" in command:
            ours |= {"--validation.steps": "1", "--validation.num_images": "1"}
        command += "".join(f" {flag} {value}" for flag, value in ours.items() if flag not in command)
    if re.match(rf"{PROG} (generate|evaluate) ", command) and "--steps" not in command:
        command = command.partition(" #")[0] + " --steps 2"
    return command


def run(command: str, cwd: Path) -> None:
    """Runs a command: verbs in this process, which has imported the libraries; the processes of torchrun as its forks;
    other launchers as programs. The studio is started, asked, and ended."""
    words = shlex.split(command, comments=True)
    if words[:2] == [PROG, "studio"]:
        run_studio(words[2:], cwd)
        return
    if words[0] == PROG:
        here = Path.cwd()
        os.chdir(cwd)
        try:
            assert main(words[1:]) == 0, command
        except SystemExit as stop:
            assert not stop.code, command
        finally:
            os.chdir(here)
        return
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        assert launch.module and launch.training_script == "t2i_adapter", command
        spread = [Run(cwd, *launch.training_script_args, env=env) for env in ranks(int(launch.nproc_per_node))]
        for process in spread:
            assert process.wait() == 0, f"{command}\n{process.said()}"
        return
    program = ["-m", "accelerate.commands.accelerate_cli"] if words[0] == "accelerate" else []
    line = [sys.executable, *program, *words[1:]]
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=240, env=dict(os.environ))
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def run_studio(words: list[str], cwd: Path) -> None:
    """Starts a studio in a folder of its own and opens its link. With --link the command prints a link to it, which is
    opened instead."""
    root = cwd / "studio"
    root.mkdir(exist_ok=True)
    asks = "--link" in words
    server = [root, "--port", "0", "--no_open_browser"] if asks else [*words, "--port", "0", "--no_open_browser"]
    command = [sys.executable, "-m", "t2i_adapter", "studio"]
    with subprocess.Popen([*command, *map(str, server)], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            link = next((found[0] for line in process.stdout if (found := LINK.search(line))), None)
            if asks:
                said = subprocess.run([*command, *words], cwd=root, capture_output=True, text=True, timeout=60)
                link = said.stdout.strip()
            assert link, f"studio {words}: no link was printed"
            cookies = urllib.request.HTTPCookieProcessor()
            with urllib.request.build_opener(cookies).open(link, timeout=60) as page:
                assert "app.js" in page.read().decode()
            role = "reader" if "--read_only" in words else "owner"
            assert any((cookie.value or "").startswith(role) for cookie in cookies.cookiejar)
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=lambda page: page.name)
def test_the_commands_of_a_page_work(page: Path, world: Path):
    wanted = [command for command in commands(page) if not command.startswith(tuple(NOT_RUN))]
    for number, command in enumerate(wanted):
        run(small(command, number), world)


def test_every_exception_is_still_needed():
    shown = [command for page in PAGES for command in commands(page)]
    assert all(any(command.startswith(start) for command in shown) for start in NOT_RUN)
    text = "\n".join(page.read_text() for page in PAGES)
    assert all(name in text for name in STAND_INS)
