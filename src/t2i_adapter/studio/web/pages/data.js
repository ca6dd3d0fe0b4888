// @ts-check
// Data: look at pairs before paying for a run. Grid, one pair large, captions, the doctor's findings, rows to skip.
import { html, useEffect, useState } from "../vendor/ui.js";
import { get, post, put } from "../api.js";
import { Grid, useRows } from "../grid.js";
import { Badge, Button, Dialog, Empty, Field, Loading, Notice, Picker, Problem, Progress, Tabs, canWrite, useAction, useGet } from "../kit.js";
import { jobs } from "../live.js";
import { go } from "../router.js";
import { size, whole } from "../words.js";

const SHAPES = { out: "data/shapes", num: 200, num_test: 32 };

/** Where a dataset is, and how it is read. @param {{onDone: (id: string) => void}} props */
function Register({ onDone }) {
  const [values, setValues] = useState(/** @type {Record<string, string>} */ ({ location: "", condition: "", split: "train" }));
  const [isPicking, setPicking] = useState(false);
  const { run, isBusy, error } = useAction(async () => onDone((await post("/api/data", { values: Object.fromEntries(Object.entries(values).filter(([, value]) => value !== "")) })).id));
  const set = (/** @type {string} */ name) => (/** @type {any} */ event) => setValues({ ...values, [name]: event.target.value });
  const wrong = (/** @type {string} */ name) => (error?.option === `data.${name}` ? error.message : undefined);
  return html`<form class="panel" onSubmit=${(/** @type {Event} */ event) => { event.preventDefault(); run(); }} aria-label="Open a dataset">
    <h2>Open a dataset</h2>
    <${Field} label="Where it is" error=${wrong("location")} help="A folder of pictures with captions beside them, a table (.jsonl, .csv, .parquet), or tar shards; below the studio's folder."
      control=${(/** @type {any} */ a) => html`<input ...${a} type="text" value=${values.location} onInput=${set("location")} required />`} hint=${html`<button type="button" onClick=${() => setPicking(true)}>Choose ...</button>`} />
    <div class="columns">
      <${Field} label="Condition" error=${wrong("condition")} help="An annotator that makes the condition of each picture, such as canny; empty if the dataset has condition pictures." control=${(/** @type {any} */ a) => html`<input ...${a} type="text" value=${values.condition} onInput=${set("condition")} />`} />
      <${Field} label="Split" error=${wrong("split")} control=${(/** @type {any} */ a) => html`<input ...${a} type="text" value=${values.split} onInput=${set("split")} />`} />
    </div>
    ${error && !["data.location", "data.condition", "data.split"].includes(error.option) && html`<${Problem} error=${error} />`}
    <button type="submit" class="main" disabled=${isBusy}>${isBusy ? "Opening ..." : "Open"}</button>
    ${isPicking && html`<${Picker} title="Choose a dataset" files onClose=${() => setPicking(false)} onPick=${(/** @type {string} */ path) => { setValues({ ...values, location: path }); setPicking(false); }} />`}
  </form>`;
}

/** Draws a small dataset, and opens it when it is there. */
function Shapes() {
  const [id, setId] = useState("");
  const job = jobs.value[id];
  const { run: open, error } = useAction(async () => go(`/data/${(await post("/api/data", { values: { location: SHAPES.out } })).id}`));
  useEffect(() => void (job?.state === "done" && open()), [job?.state]);
  if (job && ["queued", "running"].includes(job.state)) return html`<${Progress} label=${job.progress.phase ?? "drawing"} done=${job.progress.done ?? 0} total=${job.progress.total ?? null} />`;
  return html`<div><p><${Button} onClick=${async () => setId((await post("/api/jobs", { verb: "make-data shapes", values: SHAPES })).id)}>Draw a small dataset of shapes</${Button}></p>
    <${Problem} error=${error ?? (job?.error ? { message: job.error } : null)} /></div>`;
}

function List() {
  const { data, error, reload } = useGet("/api/data");
  return html`<div><h1>Data</h1>
    <${Problem} error=${error} />
    ${data?.length > 0 && html`<section class="panel"><ul class="plain-list">${data.map((/** @type {any} */ one) => html`<li class="row spread"><a href=${`/data/${one.id}`}><b>${one.values.location}</b></a> <span class="quiet">${one.values.condition ?? ""} ${one.values.split ?? ""}</span>
      ${canWrite() && html`<button type="button" class="plain" aria-label=${`Forget ${one.values.location}; its files stay`} onClick=${() => post(`/api/data/${one.id}/remove`).then(reload)}>Forget</button>`}</li>`)}</ul></section>`}
    ${data?.length === 0 && html`<${Empty} title="No dataset is open yet"><p>A dataset is pairs of a picture and a condition, with captions. The shortest way: a folder with</p>
      <pre class="log">a.jpg   a.txt   b.jpg   b.txt   ...</pre><p>and an annotator, such as canny, which makes the conditions.</p>
      ${canWrite() && html`<${Shapes} />`}</${Empty}>`}
    ${canWrite() && html`<${Register} onDone=${(/** @type {string} */ id) => go(`/data/${id}`)} />`}
  </div>`;
}

/** The picture and its condition, in several ways. @param {{id: string, row: any, view: string}} props */
function Compare({ id, row, view }) {
  const [share, setShare] = useState(50);
  const [isOn, setOn] = useState(true);
  useEffect(() => {
    if (view !== "blink") return;
    const timer = setInterval(() => setOn((before) => !before), 700);
    return () => clearInterval(timer);
  }, [view]);
  const src = (/** @type {string} */ what) => `/api/data/${id}/rows/${row.n}/${what}?side=1024`;
  const image = (/** @type {any} */ more = {}) => html`<img src=${src("image")} alt=${`Image of ${row.key}`} ...${more} />`;
  const condition = (/** @type {any} */ more = {}) => html`<img src=${src("condition")} alt=${`Condition of ${row.key}`} ...${more} />`;
  if (view === "side") return html`<div class="side-by-side">${image()}${condition()}</div>`;
  const over = { wipe: { clipPath: `inset(0 0 0 ${share}%)` }, overlay: { opacity: share / 100 }, blink: { opacity: isOn ? 1 : 0 } }[view] ?? {};
  return html`<div><div class="stacked">${image()}${condition({ style: over, class: "over" })}</div>
    ${view !== "blink" && html`<label class="row small">${view === "wipe" ? "Edge" : "Condition"} <input type="range" min="0" max="100" value=${share} onInput=${(/** @type {any} */ event) => setShare(+event.target.value)} style=${{ flex: 1 }} /></label>`}</div>`;
}

/** @param {{id: string, row: any, onClose: () => void, onChange: (row: any) => void, onMove: (step: number) => void}} props */
function Pair({ id, row, onClose, onChange, onMove }) {
  const [view, setView] = useState("side");
  const [captions, setCaptions] = useState(row.captions);
  useEffect(() => setCaptions(row.captions), [row]);
  const isChanged = captions.join("\0") !== row.captions.join("\0");
  const { run: save, isBusy, error } = useAction(async () => onChange(await put(`/api/data/${id}/rows/${row.n}/captions`, { captions, was: row.captions })));
  const { run: skip, error: skipError } = useAction(async () => {
    await put(`/api/data/${id}/skip`, { keys: [row.key], on: !row.skipped });
    onChange({ ...row, skipped: !row.skipped });
  });
  return html`<${Dialog} title=${row.key} onClose=${onClose}>
    <${Tabs} label="View" at=${view} onChange=${setView} tabs=${[{ id: "side", label: "Side by side" }, { id: "wipe", label: "Wipe" }, { id: "overlay", label: "Overlay" }, { id: "blink", label: "Blink" }]} />
    ${row.error ? html`<${Notice} kind="bad"><p>${row.error}</p></${Notice}>` : html`<${Compare} id=${id} row=${row} view=${view} />`}
    ${captions.map((/** @type {string} */ text, /** @type {number} */ n) => html`<${Field} label=${captions.length > 1 ? `Caption ${n + 1}` : "Caption"} control=${(/** @type {any} */ a) => html`<textarea ...${a} rows="2" value=${text} disabled=${!canWrite()} onInput=${(/** @type {any} */ event) => setCaptions(captions.map((/** @type {string} */ one, /** @type {number} */ m) => (m === n ? event.target.value : one)))}></textarea>`} />`)}
    <${Problem} error=${error ?? skipError} />
    <footer class="row">
      <button type="button" onClick=${() => onMove(-1)}>← Earlier</button><button type="button" onClick=${() => onMove(1)}>Later →</button>
      ${canWrite() && html`<button type="button" onClick=${skip}>${row.skipped ? "Use this row" : "Skip this row"}</button><button type="button" class="main" disabled=${!isChanged || isBusy} onClick=${save}>Save the caption</button>`}
    </footer>
  </${Dialog}>`;
}

/** @param {{id: string, data: any, onChange: () => void, finding: string, setFinding: (kind: string) => void}} props */
function Doctor({ id, data, onChange, finding, setFinding }) {
  const mine = Object.values(jobs.value).filter((job) => job.verb === "doctor" && job.command.includes(`${id}-doctor.json`)).sort((a, b) => b.created - a.created)[0];
  const isAtWork = mine && ["queued", "running"].includes(mine.state);
  useEffect(() => void (mine && !isAtWork && onChange()), [mine?.state]);
  const report = data.report;
  return html`<section class="panel" aria-label="Doctor"><div class="row spread"><h2>Doctor</h2>
    ${canWrite() && html`<${Button} disabled=${isAtWork} onClick=${() => post(`/api/data/${id}/doctor`)}>${report ? "Check it again" : "Check the dataset"}</${Button}>`}</div>
    ${isAtWork && html`<${Progress} label=${mine.progress.phase ?? "waits"} done=${mine.progress.done ?? 0} total=${mine.progress.total ?? null} />`}
    ${mine?.state === "failed" && html`<${Notice} kind="bad"><p>${mine.error || "The doctor failed; its log is among the jobs."}</p></${Notice}>`}
    ${report && html`<div>
      <p><b>${report.errors || report.warnings ? `${report.errors} errors, ${report.warnings} warnings` : "Nothing is wrong."}</b> <span class="quiet">${whole(report.rows)} rows; the cache will take about ${size(report.needs.picture_bytes + report.needs.caption_bytes)}.</span></p>
      <ul class="findings">${report.findings.map((/** @type {any} */ one) => html`<li><button type="button" aria-pressed=${finding === one.kind} disabled=${!one.rows} onClick=${() => setFinding(finding === one.kind ? "" : one.kind)}>
        <${Badge} state=${one.level === "error" ? "failed" : "stopped"} label=${one.level} /> ${one.what}${one.rows ? `: ${whole(one.rows)} rows` : one.whole ? `: ${one.whole}` : ""}</button><p class="help">${one.advice}</p></li>`)}</ul></div>`}
    ${!report && !isAtWork && html`<p class="quiet">The doctor reads every row and says what is wrong: missing and damaged pictures, shifted or inverted conditions, doubles, long captions.</p>`}
  </section>`;
}

/** @param {{id: string}} props */
function Dataset({ id }) {
  const { data, error, reload } = useGet(`/api/data/${id}`);
  const [find, setFind] = useState("");
  const [asked, setAsked] = useState("");
  const [finding, setFinding] = useState("");
  const [open, setOpen] = useState(/** @type {number | null} */ (null));
  useEffect(() => {
    const timer = setTimeout(() => setAsked(find), 300);
    return () => clearTimeout(timer);
  }, [find]);
  const rows = useRows(`/api/data/${id}/rows?find=${encodeURIComponent(asked)}&finding=${finding}`);
  const chosen = open == null ? null : rows.at(open);
  if (error) return html`<div><p class="small"><a href="/data">Data</a></p><h1>Data</h1><${Problem} error=${error} /></div>`;
  if (!data) return html`<${Loading} label="Opening the dataset" />`;
  const tile = (/** @type {number} */ place, /** @type {any} */ more) => {
    const row = rows.at(place);
    const src = (/** @type {string} */ what) => `/api/data/${id}/rows/${row.n}/${what}?side=160`;
    return html`<div role="listitem" key=${place} style=${more.style}><button type="button" class=${`tile ${row?.skipped ? "skipped" : ""}`} tabindex=${more.tabindex} data-place=${place} onClick=${() => row && setOpen(place)} aria-label=${row ? `${row.key}${row.skipped ? ", skipped" : ""}: ${row.error ?? ""}${row.captions[0] ?? ""}` : `row ${place}`}>
      ${row && !row.error && html`<span class="halves"><img src=${src("image")} alt="" loading="lazy" /><img src=${src("condition")} alt="" loading="lazy" /></span>`}
      ${row?.error && html`<span class="small field-error">${row.error}</span>`}
      <span class="small caption">${row?.captions[0] ?? ""}</span></button></div>`;
  };
  return html`<div>
    <p class="small"><a href="/data">Data</a></p>
    <div class="row spread"><h1>${data.values.location}</h1>${canWrite() && html`<a class="button main" href=${`/new?data=${id}`}>Train on it</a>`}</div>
    <p>${data.described[0]}</p>${data.described.slice(1).map((/** @type {string} */ line) => html`<p class="small quiet">${line}</p>`)}
    ${data.skipped > 0 && html`<${Notice}><p>${whole(data.skipped)} rows are skipped by <code>${data.skip_file}</code>, which a run reads as data.skip.</p></${Notice}>`}
    <${Doctor} id=${id} data=${data} onChange=${reload} finding=${finding} setFinding=${setFinding} />
    <section class="panel" aria-label="Pairs"><div class="row spread"><label>Find in captions <input type="search" value=${find} onInput=${(/** @type {any} */ event) => setFind(event.target.value)} /></label>
      <span class="quiet" role="status">${whole(rows.total)} of ${whole(rows.of)} rows${finding ? html` <button type="button" class="plain" onClick=${() => setFinding("")}>Show all</button>` : ""}</span></div>
      <${Problem} error=${rows.error} />
      ${rows.isLoading ? html`<${Loading} label="Reading rows" />` : html`<${Grid} key=${asked + finding} total=${rows.total} width=${190} height=${150} label="Pairs of the dataset" tile=${tile} at=${open} />`}</section>
    ${chosen && html`<${Pair} id=${id} row=${chosen} onClose=${() => setOpen(null)} onChange=${(/** @type {any} */ row) => { rows.put(/** @type {number} */ (open), row); get(`/api/data/${id}`).then(() => reload()); }} onMove=${(/** @type {number} */ step) => setOpen(Math.min(rows.total - 1, Math.max(0, /** @type {number} */ (open) + step)))} />`}
  </div>`;
}

/** @param {{id: string | null}} props */
export default ({ id }) => (id ? html`<${Dataset} key=${id} id=${id} />` : html`<${List} />`);
