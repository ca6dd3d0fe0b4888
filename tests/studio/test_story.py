"""The whole way in a browser on `nano`: data, run, pause and resume, drawing, release, with one server and one run."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Page, expect
from safetensors.numpy import load_file
from support.browser import PATIENCE, Server, Window
from support.tiny import write_circles

STEPS = 40
RUN = "runs/first"
RECIPE = f"""\
output_dir: {RUN}
data:
  location: data/shapes
  condition: canny
  max_train_samples: 32
  resolution: 128
train:
  max_steps: {STEPS}
  seed: 7
validation:
  held_out: 8
  budget: 0.3
tracking:
  log_every: 2
  report_to: none
"""
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("root"))
    yield server
    server.stop()
    server.end_jobs()


@pytest.fixture(scope="module")
def window(server: Server, browser: Browser) -> Iterator[Window]:
    window = Window(browser, server.start())
    yield window
    window.close()


@pytest.fixture(scope="module")
def shapes(window: Window) -> str:
    """The address of a dataset of shapes, which the page Data draws."""
    page = window.open("/data", "form")
    page.get_by_role("button", name="Draw a small dataset of shapes").click()
    page.wait_for_selector(".tile img")
    page.close()
    return page.url.removeprefix(window.base)


def open_dataset(page: Page, window: Window, place: str) -> str:
    page.goto(f"{window.base}/data")
    page.get_by_label("Where it is").fill(place)
    page.get_by_role("button", name="Open", exact=True).click()
    page.wait_for_selector(".tile img")
    return page.url.removeprefix(window.base)


def option(page: Page, path: str) -> str:
    return page.locator(f'[data-option="{path}"] :is(input, textarea, select)').first.input_value()


def fill(page: Page, path: str, value: str) -> None:
    page.locator(f'[data-option="{path}"] :is(input, textarea)').first.fill(value)


def test_an_empty_folder_has_a_first_step_on_every_page(window: Window):
    for path, words in {
        "/": "No run yet",
        "/data": "No dataset is open yet",
        "/compare": "Choose two runs or more",
        "/try": "No adapter yet",
        "/release": "No adapter yet",
    }.items():
        page = window.open(path)
        expect(page.get_by_role("heading", name=words)).to_be_visible()
        page.close()


def test_pairs_are_seen_in_several_ways(window: Window, shapes: str):
    page = window.open(shapes, ".tile img")
    expect(page.get_by_text("of 200 rows")).to_be_visible()
    page.locator(".tile").nth(2).click()
    dialog = page.locator("dialog")
    for view in ("Side by side", "Wipe", "Overlay", "Blink"):
        dialog.get_by_role("tab", name=view).click()
        for picture in dialog.locator("img").all():
            expect(picture).to_have_js_property("complete", True)
            assert picture.evaluate("one => one.naturalWidth") > 0
    page.close()


def test_a_caption_is_edited_and_an_older_edit_is_refused(window: Window, shapes: str, server: Server):
    pages = [window.open(shapes, ".tile img") for _ in range(2)]
    for page in pages:
        page.locator(".tile").nth(3).click()
        expect(page.locator("dialog textarea")).not_to_have_value("")
    pages[0].locator("dialog textarea").fill("a caption of the first tab")
    with pages[0].expect_response(re.compile("/captions$")):
        pages[0].get_by_role("button", name="Save the caption").click()
    expect(pages[0].get_by_role("button", name="Save the caption")).to_be_disabled()
    rows = (server.root / "data" / "shapes" / "train" / "metadata.jsonl").read_text()
    assert rows.count("a caption of the first tab") == 1
    window.allowed += ["400", "409", "412"]
    pages[1].locator("dialog textarea").fill("a caption of the second tab")
    pages[1].get_by_role("button", name="Save the caption").click()
    expect(pages[1].locator("dialog [role=alert]")).to_contain_text("a caption of the first tab")
    assert (server.root / "data" / "shapes" / "train" / "metadata.jsonl").read_text() == rows
    for page in pages:
        page.close()


def test_the_doctors_findings_filter_the_rows_and_rows_are_skipped(window: Window, server: Server, shapes: str):
    folder = write_circles(server.root / "data" / "circles", num=12)
    (folder / "train" / "00005.png").write_bytes(b"no picture")
    window.allowed += ["400", "415"]  # the picture that cannot be shown
    page = window.open("/data")
    open_dataset(page, window, "data/circles")
    page.get_by_role("button", name="Check the dataset").click()
    finding = page.locator(".findings button:not([disabled])").first
    finding.click()
    expect(page.get_by_text("1 of 12 rows")).to_be_visible()
    page.locator(".tile").first.click()
    page.get_by_role("button", name="Skip this row").click()
    expect(page.get_by_role("button", name="Use this row")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_text("1 rows are skipped by")).to_be_visible()
    page.get_by_role("link", name="Train on it").click()
    page.wait_for_selector("[data-option]")
    assert option(page, "data.location") == "data/circles"
    assert option(page, "data.skip").endswith("-skip.txt")
    expect(page.get_by_label("The command of this run")).to_contain_text("-skip.txt")
    expect(page.locator('[data-option="data.skip"] .field-error')).to_have_count(0)
    with page.expect_response(re.compile("/drafts/")):
        page.get_by_role("button", name="Clear", exact=True).click()
    page.close()


def test_errors_stand_at_their_fields_and_the_draft_survives_a_reload(window: Window, shapes: str):
    page = window.open("/new", "[data-option]")
    fill(page, "output_dir", "first")
    fill(page, "data.location", "data/shapes")
    fill(page, "optim.lr", "-1")
    field = page.locator('[data-option="optim.lr"]')
    expect(field.locator(".field-error")).to_contain_text("-1")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(field.locator("input")).to_be_focused()
    assert field.locator("input").get_attribute("aria-invalid") == "true"
    fill(page, "optim.lr", "0.002")
    expect(page.locator("textarea.code")).to_have_value(re.compile("lr: 0.002"))
    with page.expect_response(lambda answer: "drafts" in answer.url and ":41" in (answer.request.post_data or "")):
        fill(page, "train.max_steps", "41")
    page.reload()
    page.wait_for_selector("[data-option]")
    assert (option(page, "optim.lr"), option(page, "train.max_steps")) == ("0.002", "41")
    page.get_by_role("button", name="Save as a recipe").click()
    page.locator("dialog input").fill("mine")
    page.locator("dialog").get_by_role("button", name="Save").click()
    expect(page.locator(".recipes b", has_text="mine")).to_be_visible()
    page.close()


def test_a_recipes_text_changes_the_form_and_a_wrong_line_is_named(window: Window, shapes: str):
    page = window.open("/new", "[data-option]")
    expect(page.locator("textarea.code")).to_have_value(re.compile("max_steps: 41"))  # the draft of the test before
    page.locator("textarea.code").fill("optim:\n  lr: nothing\n")
    expect(page.get_by_text(re.compile("line 2.*nothing")).first).to_be_visible()
    page.locator("textarea.code").fill(RECIPE)
    expect(page.locator('[data-option="train.max_steps"] input')).to_have_value(str(STEPS))
    page.close()


@pytest.fixture(scope="module")
def trained(window: Window, server: Server, shapes: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run, started by the page, through a killed server, a pause and a resume; and the same run undisturbed."""
    page = window.open("/new", "[data-option]")
    page.locator("textarea.code").fill(RECIPE)
    command = page.get_by_label("The command of this run")
    expect(command).to_contain_text("--train.seed 7")
    words = shlex.split(command.inner_text())[1:]
    page.get_by_role("button", name=re.compile("^Start$|^Put into the queue$")).click()
    page.wait_for_url(re.compile("/(jobs|runs)/"))
    expect(page.locator("progress").first).to_be_visible()
    page.wait_for_url(re.compile("/runs/first"))
    expect(page.locator("main")).to_contain_text("training")

    window.allowed += ["ERR_", "Failed to fetch"]  # what the browser prints while there is no server
    server.stop(signal.SIGKILL)
    expect(page.get_by_text("The studio does not answer")).to_be_visible()
    server.start()
    expect(page.get_by_text("The studio does not answer")).to_have_count(0)
    expect(page.locator(".facts")).to_contain_text(re.compile(rf"step\s*[1-9][0-9]* of {STEPS}"))  # numbers come again
    second = window.open(page.url.removeprefix(window.base))
    page.get_by_role("button", name="Pause").click()
    expect(second.get_by_role("button", name="Resume")).to_be_visible()  # the other tab knows it, too
    assert "stopped" in second.locator(".facts").inner_text()
    step = json.loads((server.root / RUN / "run.json").read_text())
    assert step["outcome"] == "stopped", step
    second.get_by_role("button", name="Resume").click()
    undisturbed = tmp_path_factory.mktemp("undisturbed") / "run"
    words[words.index(RUN)] = str(undisturbed)
    subprocess.run([sys.executable, "-m", "t2i_adapter", *words], cwd=server.root, check=True, capture_output=True)
    expect(page.locator(".facts .badge")).to_have_text("finished")
    expect(page.locator(".facts")).to_contain_text(f"{STEPS} of {STEPS}")
    second.close()
    page.close()
    return {"run": server.root / RUN, "undisturbed": undisturbed}


def test_a_run_through_kill_pause_and_resume_ends_with_the_bits_of_an_undisturbed_one(trained: dict[str, Path]):
    one, other = (load_file(trained[name] / "diffusion_pytorch_model.safetensors") for name in ("run", "undisturbed"))
    assert one.keys() == other.keys()
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []


def test_a_run_shows_curves_pictures_log_and_options(window: Window, trained: dict[str, Path]):
    page = window.open("/")
    page.locator("tr[data-run] a").first.click()
    expect(page.get_by_role("heading", name="Loss", exact=True)).to_be_visible()
    page.get_by_role("tab", name="Log").click()
    expect(page.locator("pre.log")).to_contain_text("training")
    page.get_by_role("tab", name="Options").click()
    expect(page.get_by_role("row", name=re.compile(f"train.max_steps {STEPS}"))).to_be_visible()
    page.close()


def test_a_plan_is_made_for_the_form(window: Window, trained: dict[str, Path]):
    page = window.open("/new", "[data-option]")
    page.locator("textarea.code").fill(RECIPE.replace(RUN, "runs/second"))
    expect(page.locator('[data-option="output_dir"] input')).to_have_value("second")
    page.get_by_role("button", name="Plan it").click()
    expect(page.get_by_label("The plan", exact=True)).to_contain_text(f"{STEPS} of ")
    page.get_by_role("button", name="Clear", exact=True).click()
    page.close()


def draw(page: Page) -> None:
    """A triangle, by the mouse."""
    box = page.locator("canvas.board").bounding_box()
    assert box is not None
    at = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in ((0.3, 0.3), (0.7, 0.3), (0.5, 0.7))]
    page.mouse.move(*at[0])
    page.mouse.down()
    for place in (*at[1:], at[0]):
        page.mouse.move(*place, steps=6)
    page.mouse.up()


WHITE = """() => {
  const one = document.querySelector("canvas.board");
  const data = one.getContext("2d").getImageData(0, 0, one.width, one.height).data;
  return data.filter((value, n) => n % 4 === 0 && value > 0).length;
}"""


def white(page: Page) -> int:
    """Pixels of the canvas that are not black."""
    return page.evaluate(WHITE)


def test_a_line_is_drawn_and_a_picture_appears(window: Window, trained: dict[str, Path]):
    page = window.open("/try", "canvas")
    assert page.locator("canvas.board").evaluate("one => one.width") == 128
    draw(page)
    drawn = white(page)
    assert drawn > 50
    page.keyboard.press("Control+z")
    assert white(page) == 0
    page.keyboard.press("Control+Shift+Z")
    assert white(page) == drawn
    page.get_by_label("Prompt", exact=True).fill("a red circle")
    page.get_by_label("Steps", exact=True).fill("2")
    page.get_by_label("Show").select_option("strengths")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".result img")).to_have_count(4)
    assert (
        page.locator(".result img").first.evaluate("async one => { await one.decode(); return one.naturalWidth; }")
        == 128
    )
    page.get_by_label("Steps", exact=True).fill("0")
    window.allowed += ["400"]
    page.keyboard.press("Control+Enter")
    expect(page.locator(".field-error")).to_be_visible()
    page.close()


def test_a_map_is_sent_and_a_photo_becomes_one(window: Window, trained: dict[str, Path]):
    page = window.open("/try", "canvas")
    picture, data = Image.new("RGB", (200, 200)), io.BytesIO()
    ImageDraw.Draw(picture).rectangle((50, 50, 150, 150), fill="white")
    picture.save(data, "PNG")
    file = {"name": "square.png", "mimeType": "image/png", "buffer": data.getvalue()}
    page.get_by_label("Send a map").set_input_files(file)
    page.wait_for_function(WHITE)
    assert white(page) > 60 * 60  # the picture as it is, at the canvas's size
    page.get_by_role("button", name="Clear").click()
    assert white(page) == 0
    page.get_by_label("Make it from a photo").set_input_files(file)
    page.wait_for_function(WHITE)
    assert 100 < white(page) < 2000  # its edges
    window.allowed += ["415"]
    page.get_by_label("Send a map").set_input_files({**file, "buffer": b"no picture"})
    expect(page.get_by_role("alert").first).to_be_visible()
    page.close()


def test_a_card_is_edited_and_the_adapter_written_for_another_program(window: Window, trained: dict[str, Path]):
    page = window.open("/release", "text=Publish on the hub")
    page.get_by_role("tab", name="Edit README.md").click()
    text = page.get_by_label("README.md", exact=True)
    text.fill(text.input_value() + "\nA sentence of mine.\n")
    with page.expect_response(re.compile("/card$")):
        page.get_by_role("button", name="Save", exact=True).click()
    assert "A sentence of mine." in (trained["run"] / "README.md").read_text()
    page.get_by_role("tab", name="As it will be published").click()
    expect(page.get_by_label("The card")).to_contain_text("A sentence of mine.")
    page.get_by_role("button", name="diffusers").click()
    expect(page.get_by_label("Other programs").locator(".badge", has_text="done")).to_be_visible()
    page.get_by_role("button", name="List what would be sent").click()
    expect(page.get_by_label("Output of push")).to_contain_text("README.md")
    page.close()
