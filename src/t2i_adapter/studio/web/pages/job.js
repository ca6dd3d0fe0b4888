// @ts-check
// Job: a verb from its start to its end. A run that has not written its folder yet is shown here; then its own page is.
import { html, useEffect } from "../vendor/ui.js";
import { post } from "../api.js";
import { Badge, Button, Command, Loading, Notice, Problem, Progress, canWrite, useGet, useTimeLeft } from "../kit.js";
import { jobs, runs } from "../live.js";
import { Log } from "../log.js";
import { go } from "../router.js";
import { moment } from "../words.js";

const WHAT = /** @type {Record<string, string>} */ ({ queued: "It waits until the card is free.", running: "", done: "It has done its work.", stopped: "It was stopped, and has saved what it had.", failed: "", died: "Its process ended without a word, as after a kill or with too little memory.", cancelled: "It was cancelled before it began." });

/** @param {{id: string, query: URLSearchParams}} props */
export default function Job({ id, query }) {
  const known = jobs.value[id];
  const { data, error } = useGet(known ? null : "/api/jobs");
  const job = known ?? data?.find((/** @type {any} */ one) => one.id === id);
  const left = useTimeLeft(job?.progress);
  const run = job?.run && Object.values(runs.value).find((row) => row.folder === job.run);
  const isActive = job && ["queued", "running"].includes(job.state);
  // A run that was just started: its own page shows more as soon as its folder is there.
  useEffect(() => void (run && query.has("follow") && isActive && go(`/runs/${run.id}`, { replace: true })), [run?.id, isActive]);
  if (error) return html`<div><h1>Job</h1><${Problem} error=${error} /></div>`;
  if (!job && !data) return html`<${Loading} label="Reading the job" />`;
  if (!job) return html`<div><h1>Job</h1><${Problem} error=${{ message: "There is no such job. Jobs that have ended are removed after a while." }} /></div>`;
  const { phase, done, total } = job.progress;
  const act = (/** @type {string} */ action) => () => post(`/api/jobs/${id}/${action}`);
  return html`<div>
    <p class="small"><a href="/">Runs</a></p>
    <div class="row spread"><h1>${job.verb} ${job.run}</h1><${Badge} state=${job.asked ? "stopped" : job.state} label=${job.asked ? `asked to ${job.asked}` : job.state === "queued" ? "waits" : job.state} /></div>
    ${job.error ? html`<${Notice} kind="bad"><p>${job.error}</p></${Notice}>` : WHAT[job.state] && html`<${Notice}><p>${WHAT[job.state]}</p></${Notice}>`}
    ${run && html`<p><a class="button main" href=${`/runs/${run.id}`}>Its run</a></p>`}
    ${job.state === "running" && html`<section class="panel" aria-label="Progress"><${Progress} label=${phase ?? "starting"} done=${done ?? 0} total=${total ?? null} left=${left} /></section>`}
    ${isActive && canWrite() && html`<p class="row">${job.verb === "train" && job.state === "running" && html`<${Button} disabled=${!!job.asked} onClick=${act("pause")}>Pause</${Button}>`}<${Button} disabled=${job.asked === "cancel"} onClick=${act("cancel")}>Cancel</${Button}></p>`}
    <p class="quiet small">Asked for ${moment(job.created)}${job.ended ? `, ended ${moment(job.ended)}` : ""}</p>
    <${Command} command=${job.command} />
    <h2>Log</h2><${Log} key=${id} job=${job} />
  </div>`;
}
