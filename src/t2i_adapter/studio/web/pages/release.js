// @ts-check
// Release: measure an adapter, complete its card, write it for other programs, publish it.
import { html, useEffect, useState } from "../vendor/ui.js";
import { get, post, put } from "../api.js";
import { Badge, Button, Command, Empty, Field, Loading, Notice, Problem, Progress, Sentence, Tabs, canWrite, useAction, useGet } from "../kit.js";
import { jobs } from "../live.js";
import { plainLog } from "../log.js";
import { go } from "../router.js";
import { size } from "../words.js";

const PROGRAMS = [["comfyui", "ComfyUI"], ["a1111", "A1111 and Forge"], ["invoke", "InvokeAI and SD.Next"], ["civitai", "CivitAI"], ["diffusers", "diffusers"], ["space", "a Space on the hub"]];
const LICENCES = ["", "apache-2.0", "mit", "openrail++", "creativeml-openrail-m", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0"];

/** The last job of a verb about this adapter, and its output when it has ended. @param {{verb: string, folder: string, onEnd?: () => void}} props */
function LastJob({ verb, folder, onEnd }) {
  const words = ` ${folder}`;
  const job = Object.values(jobs.value).filter((one) => one.verb === verb && (one.command.includes(words) || one.command.includes(`=${folder}`))).sort((a, b) => b.created - a.created)[0];
  const [text, setText] = useState("");
  const isAtWork = job && ["queued", "running"].includes(job.state);
  useEffect(() => {
    setText("");
    if (!job || isAtWork) return;
    get(`/api/jobs/${job.id}/log?from=0`).then((found) => setText(plainLog(found.text).trim()));
    onEnd?.();
  }, [job?.id, job?.state]);
  if (!job) return null;
  return html`<div>
    ${isAtWork ? html`<${Progress} label=${job.progress.phase ?? (job.state === "queued" ? "waits" : "starting")} done=${job.progress.done ?? 0} total=${job.progress.total ?? null} />` : html`<p><${Badge} state=${job.state} /></p>`}
    ${job.error && html`<${Notice} kind="bad"><p>${job.error}</p></${Notice}>`}
    ${text && !job.error && html`<pre class="log" tabindex="0" aria-label=${`Output of ${verb}`}>${text}</pre>`}
    <${Command} command=${job.command} />
  </div>`;
}

/** @param {{found: any, reload: () => void}} props */
function Measure({ found, reload }) {
  const [form, setForm] = useState({ data: found.data ?? "", split: "test", size: "quick" });
  const set = (/** @type {string} */ name) => (/** @type {any} */ event) => setForm({ ...form, [name]: event.target.value });
  return html`<section class="panel" aria-label="Measure"><h2>Measure</h2>
    <p class="quiet">Pictures of held-out pairs, measured against their conditions, with another pair's condition and without the adapter as controls.</p>
    ${canWrite() && html`<div class="fields">
      <${Field} label="Dataset" control=${(/** @type {any} */ a) => html`<input ...${a} type="text" value=${form.data} onInput=${set("data")} />`} />
      <${Field} label="Split" help="Pairs that it was not trained on." control=${(/** @type {any} */ a) => html`<input ...${a} type="text" value=${form.split} onInput=${set("split")} />`} />
      <${Field} label="How much" control=${(/** @type {any} */ a) => html`<select ...${a} value=${form.size} onChange=${set("size")}><option value="quick">16 pairs</option><option value="usual">64 pairs</option><option value="large">256 pairs</option></select>`} />
    </div><${Button} look="main" onClick=${() => post(`/api/release/${found.id}/measure`, form)}>Measure</${Button}>`}
    ${found.evaluation && html`<p><${Badge} state="done" label="measured" /> Its numbers go into the card.</p>`}
    <${LastJob} verb="evaluate" folder=${found.folder} onEnd=${reload} />
  </section>`;
}

/** @param {{found: any, reload: () => void}} props */
function Card({ found, reload }) {
  const [tab, setTab] = useState("shown");
  const [text, setText] = useState(found.card);
  useEffect(() => setText(found.card), [found.card]);
  const { run: save, isBusy, error } = useAction(async () => {
    await put(`/api/release/${found.id}/card`, { text, was: found.card });
    reload();
  });
  return html`<section class="panel" aria-label="Card"><h2>Card</h2>
    <${Tabs} label="Card" at=${tab} onChange=${setTab} tabs=${[{ id: "shown", label: "As it will be published" }, { id: "edit", label: "Edit README.md" }]} />
    ${tab === "shown" ? html`<pre class="log" tabindex="0" aria-label="The card">${found.published_card ?? found.card}</pre>` : html`<div><textarea class="code" rows="20" aria-label="README.md" value=${text} disabled=${!canWrite()} onInput=${(/** @type {any} */ event) => setText(event.target.value)}></textarea>
      <${Problem} error=${error} /><button type="button" class="main" disabled=${text === found.card || isBusy || !canWrite()} onClick=${save}>Save</button></div>`}
  </section>`;
}

/** @param {{found: any}} props */
function Publish({ found }) {
  const [form, setForm] = useState({ model_id: "", license: "", private: true });
  const send = (/** @type {boolean} */ isDry) => () => post(`/api/release/${found.id}/push`, { ...form, dry_run: isDry });
  return html`<section class="panel" aria-label="Publish"><h2>Publish on the hub</h2>
    ${!found.is_logged_in && html`<${Notice} kind="wait"><p>No login was found. In a terminal:</p><${Command} command="hf auth login" /></${Notice}>`}
    ${canWrite() && html`<div><div class="fields">
      <${Field} label="Repository" help="Empty: the folder's name under your account." control=${(/** @type {any} */ a) => html`<input ...${a} type="text" value=${form.model_id} onInput=${(/** @type {any} */ event) => setForm({ ...form, model_id: event.target.value })} />`} />
      <${Field} label="Licence" control=${(/** @type {any} */ a) => html`<select ...${a} value=${form.license} onChange=${(/** @type {any} */ event) => setForm({ ...form, license: event.target.value })}>${LICENCES.map((one) => html`<option value=${one}>${one || "that of the card"}</option>`)}</select>`} />
    </div>
    <p><label><input type="checkbox" checked=${form.private} onChange=${(/** @type {any} */ event) => setForm({ ...form, private: event.target.checked })} /> Private, if it is new</label></p>
    <div class="row"><${Button} onClick=${send(true)}>List what would be sent</${Button}><${Button} look="main" disabled=${!found.is_logged_in} onClick=${send(false)}>Publish</${Button}></div></div>`}
    <${LastJob} verb="push" folder=${found.folder} />
  </section>`;
}

/** @param {{found: any, reload: () => void}} props */
function Adapter({ found, reload }) {
  if (!found.is_finished) {
    return html`<${Empty} title="This run is not finished"><p>It has ${found.checkpoints.length ? `checkpoints of step ${found.checkpoints.join(", ")}` : "no checkpoint"}. Resume it to its end; or publish a checkpoint in a terminal:</p>
      <${Command} command=${`t2i-adapter push --folder ${found.folder} --checkpoint best --dry_run`} /><p><a class="button" href=${`/runs/${found.id}`}>To the run</a></p></${Empty}>`;
  }
  return html`<div>
    ${found.error && html`<${Notice} kind="bad"><p>${found.error}</p></${Notice}>`}
    ${found.checks && html`<section class="panel" aria-label="Checklist"><h2>What a good release has</h2><ul class="checks">${found.checks.map((/** @type {any} */ one) => html`<li><${Badge} state=${one.is_there ? "done" : "stopped"} label=${one.is_there ? "there" : "missing"} /> ${one.what} ${!one.is_there && html`<span class="quiet small"><${Sentence} text=${one.how} /></span>`}</li>`)}</ul></section>`}
    <${Measure} found=${found} reload=${reload} />
    <section class="panel" aria-label="Other programs"><h2>For other programs</h2><p class="quiet">Written to the folder exports, and checked as the program reads it.</p>
      ${canWrite() && html`<div class="row">${PROGRAMS.map(([to, label]) => html`<${Button} onClick=${() => post(`/api/release/${found.id}/export`, { to })}>${label}</${Button}>`)}</div>`}
      <${LastJob} verb="export" folder=${found.folder} /></section>
    <${Card} found=${found} reload=${reload} />
    ${found.files.length > 0 && html`<section class="panel wide" tabindex="0" role="region" aria-label="Files"><h2>Files to publish</h2><table><tbody>${found.files.map((/** @type {any} */ file) => html`<tr><td><code>${file.name}</code></td><td class="number">${size(file.size)}</td></tr>`)}</tbody></table>${found.notes.map((/** @type {string} */ note) => html`<p class="small">${note}</p>`)}</section>`}
    <${Publish} found=${found} />
  </div>`;
}

/** @param {{id: string | null}} props */
export default function Release({ id }) {
  const { data: all, error } = useGet("/api/adapters");
  const chosen = id ?? all?.[0]?.id ?? null;
  const { data: found, error: missing, reload } = useGet(chosen ? `/api/release/${chosen}` : null);
  if (error) return html`<div><h1>Release</h1><${Problem} error=${error} /></div>`;
  if (!all) return html`<${Loading} />`;
  if (!all.length) return html`<div><h1>Release</h1><${Empty} title="No adapter yet"><p>Train one, or run the demo.</p><p><a class="button" href="/">To the runs</a></p></${Empty}></div>`;
  return html`<div><div class="row spread"><h1>Release</h1><label>Adapter <select value=${chosen} onChange=${(/** @type {any} */ event) => go(`/release/${event.target.value}`)}>${all.map((/** @type {any} */ one) => html`<option value=${one.id}>${one.name}${one.is_finished ? "" : " (not finished)"}</option>`)}</select></label></div>
    <${Problem} error=${missing} />
    ${found ? html`<${Adapter} key=${found.id} found=${found} reload=${reload} />` : !missing && html`<${Loading} label="Reading the adapter" />`}</div>`;
}
