// @ts-check
// Run: one run while it learns. Phase, time, control, score, loss, pictures over its steps, warnings, log.
import { html, useCallback, useEffect, useMemo, useRef, useState } from "../vendor/ui.js";
import { post } from "../api.js";
import { Chart, smooth } from "../chart.js";
import { Badge, Button, Command, Field, Loading, Notice, Problem, Progress, Tabs, canWrite, useAction, useGet, useTimeLeft } from "../kit.js";
import { jobs, on, runs } from "../live.js";
import { Log } from "../log.js";
import { go } from "../router.js";
import { bounds, duration, moment, number, percent, size, whole } from "../words.js";

const COLUMNS = [["adapter", "adapter", "line0"], ["other_condition", "another pair's condition", "line1"], ["no_adapter", "no adapter", "line5"], ["target", "target (ceiling)", "line2"]];
const share = (/** @type {number} */ x) => `${(100 * x).toFixed(Math.abs(x) < 0.1 ? 1 : 0)} %`;

/** The numbers of a run: what was read, and what came since. @param {string} id */
function useMetrics(id) {
  const { data, error, reload } = useGet(`/api/runs/${id}/metrics`);
  const [more, setMore] = useState(/** @type {any[]} */ ([]));
  const at = useRef(0);
  useEffect(() => {
    at.current = data?.at ?? 0;
    setMore([]);
  }, [data]);
  useEffect(() => {
    const ends = [
      on("metrics", (event) => {
        if (event.run !== id || !data || event.at <= at.current) return;
        at.current = event.at;
        // A look or a score has a form of its own, so it is read again; numbers are added here.
        if (event.entries.some((/** @type {any} */ entry) => entry.gain || entry.score || entry.advice || entry.warning)) reload();
        else setMore((before) => [...before, ...event.entries]);
      }),
      on("run_reset", (event) => event.run === id && reload()),
      on("reset", () => reload()),
    ];
    return () => ends.forEach((end) => end());
  }, [id, data, reload]);
  const curves = useMemo(() => {
    const found = /** @type {Record<string, [number[], number[]]>} */ ({});
    for (const name of ["loss", "lr", "grad_norm", "samples_per_s", "wait_share", "control"]) {
      const [x, y] = data?.curves[name] ?? [[], []];
      const added = more.filter((entry) => typeof entry[name] === "number" && entry.step > (x[x.length - 1] ?? -1));
      found[name] = [[...x, ...added.map((entry) => entry.step)], [...y, ...added.map((entry) => entry[name])]];
    }
    return found;
  }, [data, more]);
  return { data, curves, error };
}

/** @param {{metrics: any, curves: Record<string, [number[], number[]]>, notes: any[]}} props */
function Curves({ metrics, curves, notes }) {
  const [isLog, setLog] = useState(false);
  const looks = metrics.looks;
  const line = (/** @type {any[]} */ from, /** @type {(one: any) => any} */ pick, /** @type {any} */ rest) => {
    const found = from.map((one) => [one.step, pick(one)]).filter(([, value]) => value);
    return { x: found.map(([step]) => step), y: found.map(([, value]) => value[0]), low: found.map(([, value]) => value[1]), high: found.map(([, value]) => value[2]), ...rest };
  };
  const bands = [...new Set(looks.flatMap((/** @type {any} */ look) => look.bands.map((/** @type {any} */ band) => band.t)))].sort((a, b) => a - b).slice(0, 6);
  const marks = notes.filter((note) => ["read", "plateau", "overfitting"].includes(note.kind)).map((note) => ({ step: note.step, label: note.kind }));
  const scores = metrics.scores.filter((/** @type {any} */ score) => score.metric === metrics.scores[metrics.scores.length - 1].metric);
  const width = Math.max(1, Math.round(curves.loss[0].length / 40));
  const plain = (/** @type {string} */ name, /** @type {any} */ rest = {}) => ({ label: name, x: curves[name][0], y: curves[name][1], ...rest });
  return html`<div>
    <div class="columns">
      <${Chart} title="Control gain: the part of the loss that the condition removes" show=${share} marks=${marks} note="Held-out pairs at fixed noise. Above 0 the condition helps." lines=${[line(looks, (look) => look.benefit, { label: "held-out pairs" }), line(looks, (look) => look.training, { label: "training pairs" })]} />
      <${Chart} title="Control gain by noise" show=${share} note="t near 0 is little noise, near 1000 almost only noise." lines=${bands.map((t) => ({ ...line(looks, (look) => look.bands.find((/** @type {any} */ band) => band.t === t)?.benefit, { label: `t near ${t}` }), low: undefined, high: undefined }))} />
      ${scores.length > 0 && html`<${Chart} title=${`${scores[0].metric}, ${scores[0].higher_is_better ? "higher" : "lower"} is better`} note="Another pair's condition and no adapter are the floors, the target is the ceiling." lines=${COLUMNS.map(([name, label, colour]) => ({ ...line(scores, (score) => score.columns[name], { label, colour, dashed: name !== "adapter" }), ...(name === "adapter" ? {} : { low: undefined, high: undefined }) }))} />`}
      ${curves.control[0].length > 0 && !scores.length && html`<${Chart} title="Score of the validation pictures" lines=${[plain("control", { label: "score" })]} />`}
      <${Chart} title="Loss" log=${isLog} note="The loss hardly shows whether an adapter controls: most of it is noise that no condition predicts." lines=${[plain("loss", { label: "logged", thin: true }), { label: `mean of ${width}`, x: curves.loss[0], y: smooth(curves.loss[1], width), colour: "line0" }]} />
      <${Chart} title="Learning rate" lines=${[plain("lr", { label: "rate" })]} />
      <${Chart} title="Norm of the gradient" log=${isLog} lines=${[plain("grad_norm", { label: "norm" })]} />
      <${Chart} title="Samples a second" lines=${[plain("samples_per_s", { label: "samples/s" })]} />
      <${Chart} title="Share of time that waits for data" show=${share} lines=${[plain("wait_share", { label: "waiting" })]} />
    </div>
    ${curves.loss[0].length > 0 ? html`<label><input type="checkbox" checked=${isLog} onChange=${(/** @type {any} */ event) => setLog(event.target.checked)} /> Logarithmic scale</label>` : html`<${Notice}><p>The first numbers come after step 10.</p></${Notice}>`}
  </div>`;
}

/** Pictures of held-out pairs: the condition, step 0, and the step that the slider chooses.
 * @param {{run: any}} props */
function Pictures({ run }) {
  const [steps, setSteps] = useState(run.pictures.steps);
  const [chosen, setChosen] = useState(/** @type {number | null} */ (null));
  const [against, setAgainst] = useState("");
  const [edge, setEdge] = useState(50);
  useEffect(() => setSteps(run.pictures.steps), [run]);
  useEffect(() => on("picture", (event) => event.run === run.id && setSteps((/** @type {number[]} */ before) => [...new Set([...before, event.step])].sort((a, b) => a - b))), [run.id]);
  if (!steps.length || !run.pictures.pairs.length) return html`<${Notice}><p>No pictures yet. A run that measures its control draws held-out pairs after some updates.</p></${Notice}>`;
  const place = chosen == null ? steps.length - 1 : Math.min(chosen, steps.length - 1);
  const src = (/** @type {string | number} */ step, /** @type {any} */ pair) => `/api/runs/${run.id}/pictures/${step}/${pair.index}`;
  const hide = (/** @type {boolean} */ isHidden) => (/** @type {any} */ event) => event.target.closest("figure")?.toggleAttribute("hidden", isHidden);
  const shot = (/** @type {string | number} */ step, /** @type {any} */ pair, /** @type {string} */ label) => html`<figure class="shot"><img src=${src(step, pair)} alt=${`${label}: ${pair.prompt || pair.key}`} width="192" height="192" loading="lazy" onError=${hide(true)} onLoad=${hide(false)} /><figcaption>${label}</figcaption></figure>`;
  const label = (/** @type {number} */ step) => `step ${whole(step)}${step === run.best?.step ? ", best" : ""}`;
  const name = against in run.pictures.fixed ? run.pictures.fixed[against] : label(Number(against));
  const wipe = (/** @type {any} */ pair) => html`<figure class="shot"><div class="stacked"><img src=${src(against, pair)} alt=${`${name}: ${pair.prompt || pair.key}`} /><img class="over" src=${src(steps[place], pair)} alt=${`${label(steps[place])}: ${pair.prompt || pair.key}`} style=${{ clipPath: `inset(0 0 0 ${edge}%)` }} /></div>
    <figcaption>${name} | ${label(steps[place])}</figcaption></figure>`;
  return html`<div class="panel">
    <div class="row"><label for="step">Step</label><input id="step" type="range" min="0" max=${steps.length - 1} value=${place} onInput=${(/** @type {any} */ event) => setChosen(+event.target.value)} aria-valuetext=${`step ${steps[place]}`} style=${{ flex: 1 }} /><output for="step">${label(steps[place])}</output></div>
    <div class="row small"><label>Wipe against <select value=${against} onChange=${(/** @type {any} */ event) => setAgainst(event.target.value)}><option value="">nothing</option>${steps.map((/** @type {number} */ step) => html`<option value=${String(step)}>${label(step)}</option>`)}${Object.entries(run.pictures.fixed).map(([kind, text]) => html`<option value=${kind}>${text}</option>`)}</select></label>
      ${against && html`<label class="row grow">Edge <input type="range" min="0" max="100" value=${edge} onInput=${(/** @type {any} */ event) => setEdge(+event.target.value)} /></label>`}</div>
    ${run.pictures.pairs.map((/** @type {any} */ pair) => html`<article class="pair" key=${pair.index}><p class="small">${pair.prompt || pair.key}</p><div class="shots">
      ${Object.entries(run.pictures.fixed).map(([kind, label]) => shot(kind, pair, String(label)))}
      ${steps.length > 1 && shot(steps[0], pair, `step ${whole(steps[0])}`)}
      ${against ? wipe(pair) : shot(steps[place], pair, label(steps[place]))}
    </div></article>`)}
  </div>`;
}

/** @param {{run: any, job: any, onChange: () => void}} props */
function Actions({ run, job, onChange }) {
  const [steps, setSteps] = useState("");
  const isRunning = run.state === "running" || job?.state === "running";
  const isWaiting = job?.state === "queued";
  const again = (/** @type {any} */ content) => async () => {
    await post(`/api/runs/${run.id}/resume`, content);
    onChange();
  };
  const { run: extend, isBusy, error } = useAction(async () => again({ max_steps: Number(steps) })());
  if (!canWrite()) return null;
  return html`<div>
    <div class="row">
      ${isRunning && html`<${Button} onClick=${() => post(`/api/runs/${run.id}/pause`)} disabled=${!!job?.asked} title="Finishes the step, saves, and ends. Resume continues to the same bits.">${job?.asked ? "Saving ..." : "Pause"}</${Button}>`}
      ${isWaiting && html`<span class="quiet">Waits in the queue.</span>`}
      ${!isRunning && !isWaiting && ["stopped", "killed", "failed", "unfinished"].includes(run.state) && html`<${Button} look="main" onClick=${again({})}>Resume</${Button}>`}
      ${run.has_adapter && html`<a class="button" href=${`/try/${run.id}`}>Try it</a><a class="button" href=${`/release/${run.id}`}>Measure and release</a>`}
      <a class="button" href=${`/compare?runs=${run.id}`}>Compare</a>
      ${run.has_report && html`<a class="button" href=${`/api/runs/${run.id}/report`} target="_blank" rel="noopener">Its page</a>`}
    </div>
    ${!isRunning && !isWaiting && run.checkpoints.length > 0 && html`<details class="small extend"><summary>Extend it</summary>
      <form class="row" onSubmit=${(/** @type {Event} */ event) => { event.preventDefault(); extend(); }}>
        <label>Updates of the whole run <input type="number" min=${run.step + 1} value=${steps} onInput=${(/** @type {any} */ event) => setSteps(event.target.value)} required /></label>
        <button type="submit" disabled=${isBusy}>Continue to there</button></form>
      <${Problem} error=${error} /></details>`}
  </div>`;
}

/** @param {{run: any, job: any}} props */
function Head({ run, job }) {
  const progress = job?.state === "running" ? job.progress : {};
  const { phase, done, total } = progress;
  const left = run.seconds_left;
  const phaseLeft = useTimeLeft(progress);
  const facts = [
    ["state", html`<${Badge} state=${run.state} />`],
    ["step", `${whole(run.step)}${run.steps ? ` of ${whole(run.steps)}` : ""}`],
    ["time left", left ? duration(left) : ""],
    ["loss", number(run.loss, 4)],
    ["speed", run.samples_per_s ? `${number(run.samples_per_s)} samples/s` : ""],
    ["control gain", run.gain?.benefit ? percent([run.gain.benefit.mean, run.gain.benefit.low, run.gain.benefit.high]) : ""],
    ["score", run.score ? `${run.score.metric} ${bounds([run.score.adapter?.mean, run.score.adapter?.low, run.score.adapter?.high])}` : ""],
    ["checkpoints", run.checkpoints.length ? run.checkpoints.slice(-4).map((/** @type {number} */ step) => `${whole(step)}${step === run.best?.step ? " (best)" : ""}`).join(", ") : ""],
    ["best checkpoint", run.best ? `step ${whole(run.best.step)}` : ""],
    ["on disk", size(run.bytes)],
    ["began", moment(run.started)],
  ].filter(([, value]) => value);
  return html`<section class="panel">
    ${run.state === "running" && phase && html`<${Progress} done=${done ?? 0} total=${total ?? null} label=${phase} left=${left ? null : phaseLeft} />`}
    <dl class="facts">${facts.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
  </section>`;
}

/** @param {{run: any}} props */
function Notes({ run }) {
  if (!run.notes.length) return html`<p class="quiet">No advice and no warnings.</p>`;
  return html`<ul class="notes">${run.notes.map((/** @type {any} */ note) => html`<li class=${note.kind === "warning" ? "warning" : ""}><b>Step ${whole(note.step)}.</b> ${note.text}</li>`)}</ul>`;
}

/** @param {{values: Record<string, any>}} props */
const Options = ({ values }) => html`<div class="wide"><table><tbody>${Object.entries(values).map(([name, value]) => html`<tr><th scope="row"><code>${name}</code></th><td>${String(Array.isArray(value) ? value.join(", ") : value)}</td></tr>`)}</tbody></table></div>`;

/** @param {{id: string}} props */
export default function Run({ id }) {
  const { data: whole_, error, reload } = useGet(`/api/runs/${id}`);
  const [tab, setTab] = useState("curves");
  const { data: metrics, curves } = useMetrics(id);
  const row = runs.value[id];
  const stamp = row && `${row.state} ${row.checkpoints.length} ${row.warnings} ${row.advice?.step} ${row.picture} ${row.ended}`;
  useEffect(() => void (stamp && reload()), [stamp]);
  const job = useCallback(() => {
    const mine = Object.values(jobs.value).filter((one) => one.run === (row ?? whole_)?.folder);
    return mine.sort((a, b) => b.created - a.created)[0] ?? null;
  }, [jobs.value, row, whole_])();
  if (error) return html`<div><h1>Run</h1><${Problem} error=${error}><button type="button" onClick=${() => go("/")}>All runs</button></${Problem}></div>`;
  if (!whole_) return html`<${Loading} label="Reading the run" />`;
  const run = { ...whole_, ...row };
  const hasEnded = ["failed", "killed"].includes(run.state) && job?.state !== "running";
  return html`<div>
    <p class="small"><a href="/">Runs</a></p>
    <div class="row spread"><h1>${run.name}</h1></div>
    ${run.verdict.sentence && html`<div class=${`notice ${{ good: "good", bad: "bad", warn: "wait" }[/** @type {string} */ (run.verdict.look)] ?? "calm"}`}><p><b>${run.verdict.sentence}</b></p>${run.verdict.more.map((/** @type {string} */ text) => html`<p class="small">${text}</p>`)}</div>`}
    ${hasEnded && run.reason && html`<${Notice} kind="bad"><p>${run.reason}</p>${run.resume && html`<${Command} command=${run.resume} />`}</${Notice}>`}
    <${Actions} run=${run} job=${job} onChange=${reload} />
    <${Head} run=${run} job=${job} />
    <${Tabs} label="Parts of the run" at=${tab} onChange=${setTab} tabs=${[{ id: "curves", label: "Curves" }, { id: "pictures", label: "Pictures" }, { id: "notes", label: `Advice and warnings (${run.notes.length})` }, { id: "log", label: "Log" }, { id: "options", label: "Options" }]} />
    ${tab === "curves" && (metrics ? html`<${Curves} metrics=${metrics} curves=${curves} notes=${run.notes} />` : html`<${Loading} />`)}
    ${tab === "pictures" && html`<${Pictures} run=${run} />`}
    ${tab === "notes" && html`<${Notes} run=${run} />`}
    ${tab === "log" && (job ? html`<${Log} key=${job.id} job=${job} />` : html`<p class="quiet">This run was started in a terminal, which has its output.</p>`)}
    ${tab === "options" && html`<div>${run.command && html`<h2>Command</h2><${Command} command=${run.command} />`}<h2>Options that differ from their defaults</h2><${Options} values=${run.options} /><h2>Versions</h2><${Options} values=${run.versions} /></div>`}
  </div>`;
}
