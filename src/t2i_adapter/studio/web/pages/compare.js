// @ts-check
// Compare: which of some runs is better. Curves over each other, options that differ, pictures of one step.
import { html, useEffect, useState } from "../vendor/ui.js";
import { get } from "../api.js";
import { Chart, smooth } from "../chart.js";
import { Badge, Empty, Loading, Notice, Problem, useGet } from "../kit.js";
import { runs } from "../live.js";
import { go } from "../router.js";
import { number, percent, whole } from "../words.js";

const MOST = 6;
const share = (/** @type {number} */ x) => `${(100 * x).toFixed(Math.abs(x) < 0.1 ? 1 : 0)} %`;

/** @param {{chosen: string[]}} props */
function Choice({ chosen }) {
  const all = Object.values(runs.value).sort((a, b) => (b.started ?? 0) - (a.started ?? 0));
  const toggle = (/** @type {string} */ id) => go(`/compare?runs=${(chosen.includes(id) ? chosen.filter((one) => one !== id) : [...chosen, id]).join(",")}`, { replace: true });
  return html`<details class="panel" open=${chosen.length < 2}><summary>Runs: ${chosen.length} of at most ${MOST}</summary>
    <ul class="plain-list">${all.map((run) => html`<li><label class="row"><input type="checkbox" checked=${chosen.includes(run.id)} disabled=${!chosen.includes(run.id) && chosen.length >= MOST} onChange=${() => toggle(run.id)} /> ${run.name} <${Badge} state=${run.state} /> <span class="quiet small">${run.folder}</span></label></li>`)}</ul></details>`;
}

/** @param {{found: any, metrics: any[], over: string}} props */
function Curves({ found, metrics, over }) {
  const x = (/** @type {number} */ n, /** @type {number[]} */ steps) => {
    const run = found.runs[n];
    if (over === "samples" && run.global_batch) return steps.map((step) => step * run.global_batch);
    if (over === "hours" && run.global_batch && run.samples_per_s) return steps.map((step) => (step * run.global_batch) / run.samples_per_s / 3600);
    return steps;
  };
  const plain = (/** @type {string} */ name, /** @type {boolean} */ isSmooth = false) =>
    found.runs.flatMap((/** @type {any} */ run, /** @type {number} */ n) => {
      const curve = metrics[n]?.curves[name];
      if (!curve) return [];
      return [{ label: run.shown, x: x(n, curve[0]), y: isSmooth ? smooth(curve[1], Math.max(1, Math.round(curve[0].length / 40))) : curve[1], colour: `line${n}` }];
    });
  const looks = (/** @type {(look: any) => any} */ pick) =>
    found.runs.flatMap((/** @type {any} */ run, /** @type {number} */ n) => {
      const some = (metrics[n]?.looks ?? []).filter(pick);
      if (!some.length) return [];
      return [{ label: run.shown, x: x(n, some.map((/** @type {any} */ look) => look.step)), y: some.map((/** @type {any} */ look) => pick(look)[0]), low: some.map((/** @type {any} */ look) => pick(look)[1]), high: some.map((/** @type {any} */ look) => pick(look)[2]), colour: `line${n}` }];
    });
  const scores = found.runs.flatMap((/** @type {any} */ run, /** @type {number} */ n) => {
    const some = metrics[n]?.scores ?? [];
    return some.length ? [{ label: `${run.shown}: ${some[0].metric}`, x: x(n, some.map((/** @type {any} */ one) => one.step)), y: some.map((/** @type {any} */ one) => one.columns.adapter[0]), colour: `line${n}` }] : [];
  });
  return html`<div class="columns" key=${over}>
    <${Chart} title="Control gain on held-out pairs" show=${share} lines=${looks((look) => look.benefit)} />
    <${Chart} title="Control score" lines=${scores} />
    <${Chart} title="Loss, smoothed" lines=${plain("loss", true)} />
    <${Chart} title="Learning rate" lines=${plain("lr")} />
    <${Chart} title="Samples a second" lines=${plain("samples_per_s")} />
  </div>`;
}

/** Pictures of the same pairs at one step, a column a run. @param {{ids: string[], names: string[]}} props */
function Pictures({ ids, names }) {
  const [whole_, setWhole] = useState(/** @type {any[]} */ ([]));
  const [place, setPlace] = useState(/** @type {number | null} */ (null));
  useEffect(() => void Promise.all(ids.map((id) => get(`/api/runs/${id}`))).then(setWhole), [ids.join()]);
  const steps = [...new Set(whole_.flatMap((run) => run.pictures.steps))].sort((a, b) => a - b);
  if (!steps.length) return null;
  const at = place == null ? steps.length - 1 : Math.min(place, steps.length - 1);
  const near = (/** @type {any} */ run) => run.pictures.steps.filter((/** @type {number} */ step) => step <= steps[at]).pop();
  const most = Math.max(...whole_.map((run) => run.pictures.pairs.length));
  return html`<section class="panel" aria-label="Pictures"><h2>Pictures</h2>
    <div class="row"><label for="step">Step</label><input id="step" type="range" min="0" max=${steps.length - 1} value=${at} onInput=${(/** @type {any} */ event) => setPlace(+event.target.value)} aria-valuetext=${`step ${steps[at]}`} style=${{ flex: 1 }} /><output for="step">${whole(steps[at])}</output></div>
    <div class="wide" tabindex="0" role="region" aria-label="Pictures by run"><table><thead><tr>${names.map((name) => html`<th scope="col">${name}</th>`)}</tr></thead>
      <tbody>${[...Array(most).keys()].map((pair) => html`<tr>${whole_.map((run) => html`<td>${near(run) != null && run.pictures.pairs[pair] && html`<figure class="shot"><img src=${`/api/runs/${run.id}/pictures/${near(run)}/${run.pictures.pairs[pair].index}`} alt=${run.pictures.pairs[pair].prompt || run.pictures.pairs[pair].key} width="192" height="192" loading="lazy" /><figcaption>step ${whole(near(run))}</figcaption></figure>`}</td>`)}</tr>`)}</tbody></table></div></section>`;
}

/** @param {{query: URLSearchParams}} props */
export default function Compare({ query }) {
  const ids = (query.get("runs") ?? "").split(",").filter(Boolean);
  const { data: found, error } = useGet(ids.length ? `/api/compare?runs=${ids.join(",")}` : null);
  const [metrics, setMetrics] = useState(/** @type {any[]} */ ([]));
  const [over, setOver] = useState("steps");
  useEffect(() => {
    setMetrics([]);
    Promise.all(ids.map((id) => get(`/api/runs/${id}/metrics`))).then(setMetrics, () => setMetrics([]));
  }, [ids.join()]);
  const bases = new Set((found?.runs ?? []).map((/** @type {any} */ run) => run.base).filter(Boolean));
  return html`<div><h1>Compare</h1>
    <${Problem} error=${error} />
    <${Choice} chosen=${ids} />
    ${ids.length < 2 && html`<${Empty} title="Choose two runs or more"><p>The first one is what the others are compared with.</p></${Empty}>`}
    ${ids.length > 1 && !found && !error && html`<${Loading} />`}
    ${found && ids.length > 1 && html`<div>
      ${bases.size > 1 && html`<${Notice} kind="wait"><p>The runs have different bases: ${[...bases].join(", ")}. Their losses are not comparable.</p></${Notice}>`}
      ${found.sentences.map((/** @type {string} */ text) => html`<p>${text}</p>`)}
      <section class="panel wide" tabindex="0" role="region" aria-label="Numbers"><table><thead><tr><th scope="col">Run</th><th scope="col">State</th><th scope="col" class="number">Step</th><th scope="col" class="number">Loss</th><th scope="col">Control gain</th><th scope="col">Score</th><th scope="col" class="number">Samples/s</th></tr></thead>
        <tbody>${found.runs.map((/** @type {any} */ run) => html`<tr><td><a href=${`/runs/${run.id}`}>${run.shown}</a></td><td><${Badge} state=${run.state} /></td><td class="number">${whole(run.step)}</td><td class="number">${number(run.loss, 4)}</td>
          <td>${run.gain?.benefit ? percent([run.gain.benefit.mean, run.gain.benefit.low, run.gain.benefit.high]) : ""}</td><td>${run.score ? `${run.score.metric} ${number(run.score.adapter?.mean)}` : ""}</td><td class="number">${number(run.samples_per_s)}</td></tr>`)}</tbody></table></section>
      ${Object.keys(found.options).length > 0 && html`<section class="panel wide" tabindex="0" role="region" aria-label="Options that differ"><h2>Options that differ</h2><table><thead><tr><th scope="col">Option</th>${found.runs.map((/** @type {any} */ run) => html`<th scope="col">${run.shown}</th>`)}</tr></thead>
        <tbody>${Object.entries(found.options).map(([name, values]) => html`<tr><th scope="row"><code>${name}</code></th>${values.map((/** @type {any} */ value) => html`<td>${value == null ? "none" : String(value)}</td>`)}</tr>`)}</tbody></table></section>`}
      <label>Curves over <select value=${over} onChange=${(/** @type {any} */ event) => setOver(event.target.value)}>${["steps", "samples", "hours"].map((one) => html`<option value=${one}>${one}</option>`)}</select></label>
      <${Curves} found=${found} metrics=${metrics} over=${over} />
      <${Pictures} ids=${ids} names=${found.runs.map((/** @type {any} */ run) => run.shown)} />
    </div>`}
  </div>`;
}
