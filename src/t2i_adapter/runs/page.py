"""Makes report.html in a run's folder: what the run does, whether its condition is read, curves, pictures, options.

The page is one file that loads nothing. The trainer writes it again after each look; it is made from the run's folder
alone, so `t2i-adapter runs report` makes the same page later.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from t2i_adapter.errors import redact
from t2i_adapter.files import show_bytes, show_command, write_atomic
from t2i_adapter.reports.html import make_page, quoted, table, text
from t2i_adapter.reports.plot import Line, line_plot, smooth, thin
from t2i_adapter.runs.metrics import COLUMNS, Look, Note
from t2i_adapter.runs.pictures import FIXED, SIDE, Pair, Pictures, chosen
from t2i_adapter.runs.read import Run, read_run
from t2i_adapter.runs.words import ADVICE, first, moment, percent, plateau, state, value, verdict
from t2i_adapter.statistics import Interval

logger = logging.getLogger(__name__)
FILE = "report.html"
"""In a run's folder: its page."""
REFRESH_SECONDS = 30
"""How often the page of a running run loads itself again."""
MOST_NOTES = 100
"""Lines of advice and warnings on the page; of more, the last ones are shown."""
MOST_ROWS = 100
"""Rows of a table of numbers."""
SCORES: dict[str, str] = dict(
    zip(COLUMNS, ("adapter", "another pair's condition", "no adapter", "target (ceiling)"), strict=True)
)
"""Columns of a score and their names."""
DASHES: dict[str, str] = dict(zip(COLUMNS, ("line0", "line1", "line5", "line2"), strict=True))
"""Columns of a score and the classes of their lines."""


def write_report(folder: Path | str) -> Path | None:
    """Writes the page of the run in `folder` and returns its path; None if it could not be written.

    It never raises: a fault costs the page and logs a warning, and training goes on.
    """
    try:
        return write_page(Path(folder))
    except Exception as fault:  # of any kind: a run is worth more than its page
        logger.warning("%s could not be written (%s); training goes on.", Path(folder) / FILE, redact(str(fault)))
        return None


def write_page(folder: Path) -> Path:
    """Writes the page and returns its path. Raises OSError."""
    write_atomic(folder / FILE, [make_report(read_run(folder)).encode()])
    return folder / FILE


def make_report(run: Run) -> str:
    """The page as HTML. All text is escaped."""
    answer = verdict(run)
    refresh = f' data-refresh="{REFRESH_SECONDS}"' if run.state == "running" else ""
    more = "".join(f"<p>{text(sentence)}</p>" for sentence in answer.more)
    body = f"""<main{refresh}>
<p class="kicker">Run {text(run.name)}, as it was on {moment(run.now)}</p>
<section class="answer {answer.look}">
<h1>{text(answer.sentence)}</h1>
{more}
{_command(run.resume_command, "Resume it with:")}
</section>
{_gain(run)}
{_scores(run)}
{_pictures(run)}
{_training(run)}
{_notes(run)}
<h2>The run</h2>
{_facts(run)}
{_options(run)}
</main>"""
    return make_page(f"{run.name}: {state(run)}", body, script="steps.js")


def _command(command: str, label: str) -> str:
    return f'<p>{label}</p><div class="command"><code>{text(command)}</code></div>' if command else ""


# Control gain -------------------------------------------------------------------------------------------------------


def _gain(run: Run) -> str:
    looks = run.metrics.looks
    if not looks:
        return ""
    marks = advice_marks(run.metrics.advice)
    on = "training pairs" if looks[-1].on == "training" else "held-out pairs"
    benefit = [line_of("line0", on, [(look.step, look.benefit) for look in looks])]
    training = line_of("line1", "training pairs", [(look.step, look.training_benefit) for look in looks])
    show = "{:.0%}".format
    plots = [
        line_plot(
            [*benefit, *([training] if training.points else [])],
            title="Benefit: the part of the loss that the condition removes",
            description=verdict(run).sentence,
            show=show,
            within=(None, 1.0),
            zero=True,
            marks=marks,
        ),
        line_plot(
            _bands(looks),
            title="Benefit by noise: t near 0 is little noise, near 1000 almost only noise",
            description="The benefit of each band of timesteps over the steps.",
            show=show,
            within=(None, 1.0),
            zero=True,
        ),
        line_plot(
            [line_of("line0", "use", [(look.step, look.use) for look in looks])],
            title="Use: how much another pair's condition raises the loss",
            description="Above 0 the condition is read.",
            show=show,
            zero=True,
            marks=marks,
        ),
    ]
    share = looks[-1].share
    cost = f" All looks together took {100 * share:.1f} % of the run's time." if share is not None else ""
    count = f" Each look has {looks[-1].pairs} pairs." if looks[-1].pairs else ""
    return f"""<h2>Control gain</h2>
<p class="note">Losses of fixed pairs at fixed noise, with the pair's own condition, with another pair's, and without
the adapter. Bands and brackets are intervals.{count}{cost}</p>
<div class="plots">{"".join(plots)}</div>
<details><summary>The looks in numbers</summary>
<div class="wide">{_look_table(looks[-MOST_ROWS:])}</div>
</details>"""


def line_of(name: str, label: str, values: Sequence[tuple[int, Interval | None]]) -> Line:
    """A line of means with its band of intervals; steps without a value are skipped."""
    known = [(step, found) for step, found in values if found is not None]
    return Line(
        name,
        label,
        [(step, found.mean) for step, found in known],
        [(step, found.low, found.high) for step, found in known],
    )


def _bands(looks: Sequence[Look]) -> list[Line]:
    ts = sorted({band.t for look in looks for band in look.bands})[:8]
    return [
        line_of(
            f"line{place}",
            f"t near {t}",
            [(look.step, band.benefit) for look in looks for band in look.bands if band.t == t],
        )
        for place, t in enumerate(ts)
    ]


def _look_table(looks: Sequence[Look]) -> str:
    ts = sorted({band.t for look in looks for band in look.bands})[:8]
    rows = []
    for look in looks:
        by_t = {band.t: band.benefit for band in look.bands}
        cells = [look.benefit, look.training_benefit, *map(by_t.get, ts), look.use]
        rows.append([f"{look.step:,}", *map(_cell, cells)])
    headings = ["step", "benefit", "of training pairs", *(f"benefit, t near {t}" for t in ts), "use"]
    return table(headings, rows, "numbers")


def _cell(found: Interval | None) -> str:
    """An interval of shares with its bounds in a line below."""
    mean, _, bounds = percent(found).partition(" (")
    return f"{text(mean)} <small>{text(bounds.removesuffix(')'))}</small>" if bounds else text(mean)


def advice_marks(advice: Sequence[Note]) -> list[tuple[float, str]]:
    """The steps since which advice holds, for a plot."""
    words = {"read": "read", "overfitting": "overfitting"}
    found = [(first(list(advice), kind), word) for kind, word in words.items()]
    found.append((plateau(list(advice)), ADVICE["plateau"]))
    return [(note.step, word) for note, word in found if note]


# Score and pictures -------------------------------------------------------------------------------------------------


def _scores(run: Run) -> str:
    scores = run.metrics.scores
    if not scores:
        return _old_scores(run)
    metric = scores[-1].metric
    same = [score for score in scores if score.metric == metric]
    lines = [
        line_of(DASHES[column], name, [(score.step, score.columns.get(column)) for score in same])
        for column, name in SCORES.items()
    ]
    direction = "higher is better" if same[-1].higher_is_better else "lower is better"
    plot = line_plot(
        [line if line.name == "line0" else Line(line.name, line.label, line.points) for line in lines],
        title=f"{metric}, {direction}",
        description="The score of the adapter's pictures, of both controls and of the true pictures.",
        show="{:.3g}".format,
        zero=True,
    )
    rows = [[SCORES[column], text(value(found))] for column, found in same[-1].columns.items()]
    if same[-1].difference:
        rows.append(["difference of adapter and other condition, paired", text(value(same[-1].difference))])
    count = f"{same[-1].pictures} held-out conditions" if same[-1].pictures else "held-out conditions"
    return f"""<h2>Control score</h2>
<p class="note">Pictures of {count}: the condition of each picture is made again and compared with the one that it was
generated from. Another pair's condition and no adapter are the floors, the target is the ceiling.</p>
<div class="plots">{plot}<div>{table([f"step {same[-1].step:,}", text(metric)], rows, "numbers")}</div></div>"""


def _old_scores(run: Run) -> str:
    """The score of the validation pictures, which has no interval."""
    plot = line_plot(
        [Line("line0", "score", thin(run.metrics.numbers("control")))],
        title="Score of the validation pictures, higher is better",
        description="The agreement of each picture's own condition with the row's condition.",
        show="{:.3g}".format,
        zero=True,
    )
    return f'<h2>Validation score</h2><div class="plots">{plot}</div>' if plot else ""


def _pictures(run: Run) -> str:
    pictures = Pictures(run.folder)
    steps, pairs = chosen(pictures.steps()), pictures.pairs()
    if not steps or not pairs:
        return ""
    rows = "".join(_pair(pictures, pair, steps) for pair in pairs)
    slider = ""
    if len(steps) > 1:
        slider = f"""<div class="scrub" hidden><label for="step">Step</label>
<input type="range" id="step" min="0" max="{len(steps) - 1}" step="1" value="{len(steps) - 1}" autocomplete="off"
data-steps="{" ".join(map(str, steps))}"><output id="step-shown" for="step"></output></div>"""
    total = len(pictures.steps())
    some = f"{len(steps)} of {total} steps are on this page." if len(steps) < total else "All steps are on this page."
    return f"""<h2>Pictures over the steps</h2>
<p class="note">Held-out pairs, always from the same noise. <span class="screen">The slider chooses the step of the last
picture of each row; the arrow keys move it too.</span> {some} Pictures have at most {SIDE} px a side here; the folder
<code>control</code> has them at their own size.</p>
<section class="steps">
{slider}
{rows}
</section>"""


def _pair(pictures: Pictures, pair: Pair, steps: Sequence[int]) -> str:
    shots = [
        f'<figure class="shot">{found.element(name)}<figcaption>{name}</figcaption></figure>'
        for kind, name in FIXED.items()
        if (found := pictures.fixed(pair, kind))
    ]
    made = [(step, found) for step in steps if (found := pictures.at(pair, step))]
    if not made:
        return ""
    if len(made) > 1:
        step, small = made[0]
        name = f"step {step:,}"
        shots.append(f'<figure class="shot">{small.element(name)}<figcaption>{name}</figcaption></figure>')
    end = made[-1][0]
    over = "".join(
        small.element(f"step {step:,}", f'data-step="{step}"{" hidden" * (step != end)}') for step, small in made
    )
    shots.append(f'<figure class="shot subject" data-shots>{over}<figcaption>step {end:,}</figcaption></figure>')
    return f"""<article class="pair">
<header><p class="prompt" title="{text(pair.key)}">{quoted(pair.prompt)}</p></header>
<div class="pictures">{"".join(shots)}</div>
</article>
"""


# Training -----------------------------------------------------------------------------------------------------------


def loss_lines(run: Run) -> list[Line]:
    """The logged loss, thin, and its mean over stretches of steps."""
    losses = run.metrics.numbers("loss")
    return [Line("raw", "logged", thin(losses)), Line("line0", "mean of a stretch", smooth(losses))]


def _training(run: Run) -> str:
    numbers = run.metrics.numbers
    plot = partial(line_plot, description="Over the steps.")
    plots = [
        plot(loss_lines(run), title="Loss", show="{:.3g}".format),
        plot([Line("line0", "", thin(numbers("lr")))], title="Learning rate", zero=True),
        plot([Line("line0", "", thin(numbers("samples_per_s")))], title="Samples a second", zero=True),
        plot([Line("line0", "", thin(numbers("grad_norm")))], title="Norm of the gradient", zero=True),
    ]
    if not any(plots):
        return ""
    waits = [share for _, share in numbers("wait_share")]
    waited = f" The device waited {100 * sum(waits) / len(waits):.0f} % of the time for data." if waits else ""
    return f"""<h2>Training</h2>
<p class="note">The loss hardly shows whether an adapter controls: most of it is the noise that no condition can
predict.{waited}</p>
<div class="plots">{"".join(plots)}</div>"""


def _notes(run: Run) -> str:
    notes = sorted([*run.metrics.advice, *run.metrics.warnings], key=lambda note: note.step)
    if not notes:
        return ""
    shown = notes[-MOST_NOTES:]
    rest = f'<p class="note">The last {len(shown)} of {len(notes)}.</p>' if len(shown) < len(notes) else ""
    kinds = {*ADVICE, "warning"}
    lines = "".join(
        f'<li class="{note.kind if note.kind in kinds else "note"}"><b>Step {note.step:,}.</b> {text(note.text)}</li>'
        for note in shown
    )
    return f'<h2>Advice and warnings</h2>{rest}<ul class="notes">{lines}</ul>'


def _facts(run: Run) -> str:
    best = f"step {run.best[0]:,}, score {run.best[1]:.3f}" if run.best else ""
    saved = ", ".join(f"{step:,}" for step in run.checkpoints[-10:])
    speed = run.samples_per_s
    facts = {
        "folder": run.folder.absolute(),
        "began": moment(run.started),
        "ended": moment(run.ended),
        "loss": "" if run.loss is None else f"{run.loss:.4f} over the last 100 updates",
        "speed": "" if speed is None else f"{speed:.3g} samples a second",
        "checkpoints": saved and f"of step {saved}",
        "best checkpoint": best,
        "size": show_bytes(run.size),
    }
    return _table({name: shown for name, shown in facts.items() if shown})


def _options(run: Run) -> str:
    changed = {name: "none" if found is None else found for name, found in run.changed_options.items()}
    versions = run.record.get("versions")
    parts = [
        run.command and f"<h3>The command that started it</h3>{_command(run.command, '')}",
        changed and f"<h3>Options that differ from their defaults</h3>{_table(changed)}",
        isinstance(versions, dict) and versions and f"<h3>Versions</h3>{_table(versions)}",
    ]
    if run.options:
        again = show_command("t2i-adapter", "train", "--recipe", run.folder / "options.yaml", "--output_dir", "FOLDER")
        parts.append(f"<h3>The same run again</h3>{_command(again, '')}")
    shown = "".join(part for part in parts if part)
    return f"<details><summary>Command, options and versions</summary>{shown}</details>" if shown else ""


def _table(values: Mapping[str, object]) -> str:
    rows = [[text(name), f"<code>{text(found)}</code>"] for name, found in values.items()]
    return table(["name", "value"], rows, "facts")
