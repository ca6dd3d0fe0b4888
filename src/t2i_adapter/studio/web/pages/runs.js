// @ts-check
// Runs: what is going on, what waits, what was. The first page.
import { html, useState } from "../vendor/ui.js";
import { post } from "../api.js";
import { Badge, Button, Dialog, Empty, Problem, Progress, canWrite, useAction } from "../kit.js";
import { jobs, runs, state } from "../live.js";
import { ago, duration, number, percent, whole } from "../words.js";

const ENDED = ["failed", "died"];

/** @param {{job: any}} props */
function JobCard({ job }) {
  const act = (/** @type {string} */ action) => () => post(`/api/jobs/${job.id}/${action}`);
  const { phase, done, total } = job.progress;
  const isRunning = job.state === "running";
  return html`<article class="panel job" data-job=${job.id}>
    <div class="row spread"><h3><a href=${`/jobs/${job.id}`}>${job.verb}</a> ${job.run && html`<span class="quiet">${job.run}</span>`}</h3>
      <${Badge} state=${job.asked ? "stopped" : job.state} label=${job.asked ? `asked to ${job.asked}` : job.state === "queued" ? "waits" : job.state} /></div>
    ${isRunning && html`<${Progress} done=${done ?? 0} total=${total ?? null} label=${phase ?? "starting"} />`}
    ${job.error && html`<p class="field-error">${job.error}</p>`}
    <p class="small quiet"><code>${job.command}</code></p>
    ${canWrite() && html`<div class="row">
      ${isRunning && ["train", "prepare"].includes(job.verb) && html`<${Button} onClick=${act("pause")} disabled=${!!job.asked} title="Saves and ends; it can be resumed">Pause</${Button}>`}
      ${job.state === "queued" && html`<${Button} onClick=${act("up")} title="Earlier">↑ Earlier</${Button}><${Button} onClick=${act("down")}>↓ Later</${Button}>`}
      ${["queued", "running"].includes(job.state) && html`<${Button} onClick=${act("cancel")} disabled=${job.asked === "cancel"}>Cancel</${Button}>`}
      ${isRunning && job.asked && html`<${Button} look="danger" onClick=${act("kill")} title="Ends it now; what is not saved is lost">End now</${Button}>`}
    </div>`}
  </article>`;
}

/** @param {{run: any, onTrash: () => void}} props */
function RunRow({ run, onTrash }) {
  const picture = run.picture != null ? `/api/runs/${run.id}/pictures/${run.picture}/0` : null;
  const score = run.score && `${run.score.metric} ${number(run.score.adapter?.mean)}`;
  const benefit = run.gain?.benefit && percent([run.gain.benefit.mean, run.gain.benefit.low, run.gain.benefit.high]);
  return html`<tr data-run=${run.id}>
    <td>${picture ? html`<img class="thumb" src=${picture} alt="" width="72" height="72" loading="lazy" />` : html`<div class="thumb"></div>`}</td>
    <td><a href=${`/runs/${run.id}`}><b>${run.name}</b></a><br /><span class="quiet small">${run.folder}</span></td>
    <td><${Badge} state=${run.state} /></td>
    <td class="number">${whole(run.step)}${run.steps && run.steps !== run.step ? html`<span class="quiet"> / ${whole(run.steps)}</span>` : ""}</td>
    <td>${run.state === "running" ? run.seconds_left && `${duration(run.seconds_left)} left` : ago(run.ended ?? run.started)}</td>
    <td class="number">${number(run.loss, 4)}</td>
    <td>${benefit ?? ""}${score ? html`<br /><span class="quiet small">${score}</span>` : ""}</td>
    <td>${canWrite() && run.state !== "running" && html`<button type="button" class="plain" aria-label=${`Move ${run.name} to the trash`} onClick=${onTrash}>Trash</button>`}</td>
  </tr>`;
}

/** @param {{run: any, onClose: () => void}} props */
function Trash({ run, onClose }) {
  const [name, setName] = useState("");
  const { run: move, isBusy, error } = useAction(async () => {
    await post(`/api/runs/${run.id}/trash`, { name });
    const { [run.id]: _, ...rest } = runs.value;
    runs.value = rest;
    onClose();
  });
  return html`<${Dialog} title="Move a run to the trash" onClose=${onClose}>
    <p>The folder <code>${run.folder}</code> moves to <code>.studio/trash</code>. Type its name, <b>${run.name}</b>.</p>
    <${Problem} error=${error} />
    <form onSubmit=${(/** @type {Event} */ event) => { event.preventDefault(); move(); }}>
      <label>Name <input value=${name} onInput=${(/** @type {any} */ event) => setName(event.target.value)} autocomplete="off" /></label>
      <footer><button type="submit" class="danger" disabled=${isBusy || name !== run.name}>Move it</button></footer>
    </form>
  </${Dialog}>`;
}

export default function Runs() {
  const [trashed, setTrashed] = useState(/** @type {any} */ (null));
  const all = Object.values(runs.value).sort((a, b) => (b.started ?? 0) - (a.started ?? 0));
  const queue = Object.values(jobs.value).filter((job) => ["queued", "running"].includes(job.state)).sort((a, b) => a.created - b.created);
  const failed = Object.values(jobs.value).filter((job) => ENDED.includes(job.state) && Date.now() / 1000 - job.created < 86400).sort((a, b) => b.created - a.created).slice(0, 3);
  return html`<div>
    <div class="row spread"><h1>Runs</h1>${canWrite() && html`<a class="button main" href="/new">New run</a>`}</div>
    ${queue.length > 0 && html`<section aria-label="Queue"><h2>Now</h2><div class="columns">${queue.map((job) => html`<${JobCard} key=${job.id} job=${job} />`)}</div></section>`}
    ${failed.length > 0 && html`<section aria-label="Failed jobs"><h2>Failed today</h2><div class="columns">${failed.map((job) => html`<${JobCard} key=${job.id} job=${job} />`)}</div></section>`}
    ${all.length > 0 && html`<section class="panel wide" tabindex="0" role="region" aria-label="All runs"><table class="runs">
      <thead><tr><th scope="col"><span class="quiet">Picture</span></th><th scope="col">Run</th><th scope="col">State</th><th scope="col" class="number">Step</th><th scope="col">Time</th><th scope="col" class="number">Loss</th><th scope="col">Control: benefit, score</th><th scope="col"><span class="quiet">More</span></th></tr></thead>
      <tbody>${all.map((run) => html`<${RunRow} key=${run.id} run=${run} onTrash=${() => setTrashed(run)} />`)}</tbody>
    </table></section>`}
    ${all.length === 0 && queue.length === 0 && html`<${Empty} title="No run yet">
      <p>Everything in <b>${state.value?.root}</b> and below it is shown here, also runs that a terminal starts.</p>
      ${canWrite() && html`<div class="row">
        <${Button} look="main" onClick=${() => post("/api/jobs", { verb: "demo", values: { out: `${state.value.runs}/demo` } })}>Watch the demo: two minutes</${Button}>
        <a class="button" href="/data">Look at my pictures</a><a class="button" href="/new">Choose a recipe</a></div>`}
    </${Empty}>`}
    ${trashed && html`<${Trash} run=${trashed} onClose=${() => setTrashed(null)} />`}
  </div>`;
}
