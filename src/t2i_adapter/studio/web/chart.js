// @ts-check
// Curves over steps, with bands of intervals and marks; a table of the last values is their text alternative.
import uPlot from "./vendor/uplot.js";
import { html, useEffect, useRef } from "./vendor/ui.js";
import { number } from "./words.js";

/**
 * @typedef {Object} Line
 * @property {string} label
 * @property {number[]} x steps, ascending
 * @property {(number | null)[]} y
 * @property {(number | null)[]} [low] of its band
 * @property {(number | null)[]} [high]
 * @property {string} [colour] name of a colour of app.css, such as line0
 * @property {boolean} [thin]
 * @property {boolean} [dashed]
 */

/** One set of steps for all lines, and each line's values at them. @param {Line[]} lines */
export function align(lines) {
  const steps = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, n) => [step, n]));
  const spread = (/** @type {number[]} */ x, /** @type {(number | null)[]} */ y) => {
    /** @type {(number | null | undefined)[]} */
    const found = new Array(steps.length).fill(undefined);
    x.forEach((step, n) => (found[/** @type {number} */ (place.get(step))] = y[n]));
    return found;
  };
  return { steps, spread };
}

/** Mean of the last `width` values at each of them. @param {(number | null)[]} values @param {number} width */
export function smooth(values, width) {
  let sum = 0;
  /** @type {number[]} */
  const last = [];
  return values.map((value) => {
    if (value == null) return null;
    last.push(value);
    sum += value;
    if (last.length > width) sum -= /** @type {number} */ (last.shift());
    return sum / last.length;
  });
}

const colour = (/** @type {string} */ name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
/** A colour of the form #rrggbb with a transparency. @param {string} name @param {string} alpha */
const faint = (name, alpha) => (/^#[0-9a-f]{6}$/i.test(colour(name)) ? colour(name) + alpha : colour(name));

/** @param {{title: string, lines: Line[], show?: (x: number) => string, log?: boolean, marks?: {step: number, label: string}[], note?: string, height?: number}} props */
export function Chart({ title, lines, show = number, log = false, marks = [], note, height = 220 }) {
  const ref = useRef(/** @type {any} */ (null));
  const shown = lines.filter((line) => line.x.length > 0);
  const key = shown.map((line) => `${line.label}:${line.low ? 1 : 0}`).join("|") + log;
  const plot = useRef(/** @type {any} */ (null));
  const data = useRef(/** @type {any} */ ([[0]]));
  const { steps, spread } = align(shown);
  data.current = [steps, ...shown.flatMap((line) => [spread(line.x, line.y), ...(line.low && line.high ? [spread(line.x, line.low), spread(line.x, line.high)] : [])])];
  useEffect(() => {
    if (!shown.length) return;
    const series = /** @type {any[]} */ ([{ label: "step", value: (/** @type {any} */ _, /** @type {number} */ x) => x?.toLocaleString("en-US") ?? "" }]);
    const bands = /** @type {any[]} */ ([]);
    shown.forEach((line, n) => {
      const name = line.colour ?? `line${n % 6}`;
      series.push({ label: line.label, stroke: line.thin ? faint(name, "66") : colour(name), width: line.thin ? 1 : 2, dash: line.dashed ? [6, 4] : undefined, spanGaps: true, points: { show: line.x.length < 40 && !line.thin }, value: (/** @type {any} */ _, /** @type {number} */ x) => (x == null ? "" : show(x)) });
      if (line.low && line.high) {
        const at = series.length;
        for (const label of ["low", "high"]) series.push({ label, show: true, stroke: "transparent", width: 0, spanGaps: true, points: { show: false }, class: "bound" });
        bands.push({ series: [at + 1, at], fill: faint(name, "2e") });
      }
    });
    const axis = () => ({ stroke: () => colour("quiet"), grid: { stroke: () => colour("edge"), width: 1 }, ticks: { show: false } });
    const drawMarks = (/** @type {any} */ u) => {
      for (const mark of marks) {
        const x = u.valToPos(mark.step, "x", true);
        u.ctx.save();
        u.ctx.strokeStyle = colour("quiet");
        u.ctx.setLineDash([4, 4]);
        u.ctx.beginPath();
        u.ctx.moveTo(x, u.bbox.top);
        u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
        u.ctx.stroke();
        u.ctx.fillStyle = colour("quiet");
        u.ctx.fillText(mark.label, x + 4, u.bbox.top + 12 * devicePixelRatio);
        u.ctx.restore();
      }
    };
    // Without a pointer over the chart the legend has each line's last value.
    const showLast = (/** @type {any} */ u) => {
      const idxs = u.data.map((/** @type {any[]} */ values) => values.findLastIndex((value) => value != null));
      u.setLegend({ idx: idxs[0], idxs }, false);
    };
    const options = {
      width: ref.current.clientWidth || 400,
      height,
      series,
      bands,
      scales: { x: { time: false }, y: log ? { distr: 3 } : {} },
      axes: [{ ...axis(), size: 32, values: (/** @type {any} */ _, /** @type {number[]} */ at) => at.map((x) => x.toLocaleString("en-US")) }, { ...axis(), size: 64, values: (/** @type {any} */ _, /** @type {(number | null)[]} */ at) => at.map((x) => (x == null ? "" : show(x))) }],
      hooks: { draw: [drawMarks], ready: [showLast], setData: [showLast], setCursor: [(/** @type {any} */ u) => u.cursor.idx == null && showLast(u)] },
      legend: { live: true },
    };
    plot.current = new uPlot(/** @type {any} */ (options), data.current, ref.current);
    for (const [n, one] of series.entries()) if (one.class === "bound") ref.current.querySelectorAll(".u-legend .u-series")[n]?.setAttribute("hidden", "");
    const box = ref.current;
    const observer = new ResizeObserver(() => plot.current?.setSize({ width: box.clientWidth, height }));
    observer.observe(box);
    return () => {
      observer.disconnect();
      plot.current?.destroy();
      plot.current = null;
    };
  }, [key, height]);
  useEffect(() => void plot.current?.setData(data.current), [lines]);
  if (!shown.length) return null;
  const ends = shown.map((line) => `${line.label} ${show(/** @type {number} */ (line.y[line.y.length - 1] ?? NaN))} at step ${line.x[line.x.length - 1].toLocaleString("en-US")}`).join(", ");
  return html`<figure class="chart panel"><h3>${title}</h3>${note && html`<p class="quiet small">${note}</p>`}
    <div ref=${ref} role="img" aria-label=${`${title}: ${ends}`}></div></figure>`;
}
