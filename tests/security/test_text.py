"""Text from data, records and names is escaped in pages, cards and terminals; links are not uploaded."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from t2i_adapter.cli import main
from t2i_adapter.errors import UserError, redact
from t2i_adapter.export.card import SECTIONS, write_card
from t2i_adapter.export.card_pictures import CardSample
from t2i_adapter.export.card_text import markdown
from t2i_adapter.export.release import make_release
from t2i_adapter.models.record import Metadata

ATTACKS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "![x](javascript:alert(1)) [y](http://evil/)",
    "</code></td></table><iframe src=//evil>",
    "---\nlicense: evil\n---",
    "```\n<b>out of the fence</b>\n```",
    "| a | b |\n|---|---|",
    "&lt;b&gt; &amp; <!-- evaluation -->",
)


class Tags(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(name for name, _ in attrs)}


def dangerous(page: str) -> set[str]:
    tags = Tags()
    tags.feed(page)
    return {tag for tag in tags.found if tag in ("script", "iframe", "object", "embed") or tag.startswith("on")}


def test_the_doctors_page_shows_captions_as_text(tiny_data: Path, tmp_path: Path):
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    rows = []
    for number, attack in enumerate(ATTACKS):
        Image.new("RGB", (64, 64)).save(folder / f"{number}.png")
        name = f"{number}.png"
        rows.append({"file_name": name, "conditioning_image_file_name": name, "text": attack})
    rows.append({"file_name": "<img src=x onerror=alert(1)>.png", "conditioning_image_file_name": "x", "text": "a"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit):  # exit code for faulty rows
        main(["doctor", str(tmp_path / "data"), "--data.resolution", "64", "--workers", "0", "--html", str(page)])
    text = page.read_text()
    assert "alert(1)" in text, "the captions are not shown"
    assert dangerous(text) == set()
    assert "default-src 'none'" in text


def card(folder: Path, attack: str) -> str:
    picture = Image.new("RGB", (8, 8))
    samples = [CardSample(attack, picture, [picture], target=picture)]
    record = Metadata(
        base={"name": attack, "commit": attack},
        condition={"name": attack, "options": {attack: attack}, "polarity": attack, "column": attack},
        data={"name": attack, "is_on_hub": True},
        optim={attack: attack},
        versions={attack: attack},
        steps=1,
    )
    licence = {"license": attack}
    return write_card(folder, metadata=record, repo_id=attack, samples=samples, licence=licence).read_text()


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_card_shows_names_and_prompts_as_text(tmp_path: Path, attack: str):
    text = card(tmp_path, attack)
    head, body = text[4:].split("\n---\n", 1)
    assert yaml.safe_load(head)["license"] == attack
    fence, outside = False, []
    for line in body.splitlines():  # a line that starts with ``` ends a fence
        fence ^= line.startswith("```")
        outside += [] if fence else [line]
    assert dangerous("\n".join(outside)) == set() and "<b>" not in "\n".join(outside)
    for mark in SECTIONS:
        assert outside.count(f"<!-- {mark} -->") == outside.count(f"<!-- end of {mark} -->") == 1


def test_markdown_escapes_all_markup():
    for attack in ATTACKS:
        shown = markdown(attack)
        assert "\n" not in shown and "<" not in shown
        assert "](" not in shown and "![" not in shown


def test_control_characters_do_not_reach_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    row = {"file_name": "\x1b]0;owned\x07\x1b[2J\u202e.png", "conditioning_image_file_name": "x", "text": "a"}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["annotate", "canny", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "o"), "--workers=0"])
    printed = capsys.readouterr()
    assert "\x1b" not in printed.err + printed.out and "\u202e" not in printed.err + printed.out
    assert redact("a\x1b[31mb\x00c") == "a\\x1b[31mb\\x00c"


@pytest.mark.parametrize(
    "name", ["README.md", "images/sample_00.png", "diffusion_pytorch_model.fp16.safetensors", "options.yaml"]
)
def test_a_link_in_an_adapters_folder_is_not_uploaded(tmp_path: Path, name: str):
    folder, secret = tmp_path / "adapter", tmp_path / "id_rsa"
    secret.write_text("secret")
    (folder / "images").mkdir(parents=True)
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        (folder / file).write_text("{}")
    (folder / "options.yaml").write_text("output_dir: x\n")
    (folder / "t2i_adapter.json").write_text(json.dumps({"schema": 1, "base": {"name": "nano"}}))
    (folder / "notes.txt").write_text("not for the hub")
    sent = {file.name for file in make_release(folder, "me/x").files}
    own = {"config.json", "diffusion_pytorch_model.safetensors", "t2i_adapter.json"}
    assert sent == {*own, "README.md", "recipe.yaml"}
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(UserError, match="is a link"):
        make_release(folder, "me/x")
