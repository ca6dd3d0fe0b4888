// @ts-check
// A grid of many rows of which only the visible ones exist. It asks for rows in pages, and keeps some of them.
import { html, useEffect, useRef, useState } from "./vendor/ui.js";
import { get } from "./api.js";

const PAGE = 50;
const MOST_PAGES = 40;

/** Rows by their place, read when they are needed. @param {string} path of the rows, with its filters */
export function useRows(path) {
  const [found, setFound] = useState({ path: "", total: 0, of: 0, error: /** @type {any} */ (null) });
  const pages = useRef(/** @type {Map<number, any[]>} */ (new Map()));
  const asked = useRef(/** @type {Set<number>} */ (new Set()));
  const now = useRef(path);
  if (now.current !== path) {
    now.current = path;
    pages.current = new Map();
    asked.current = new Set();
  }
  const read = async (/** @type {number} */ page) => {
    if (asked.current.has(page)) return;
    asked.current.add(page);
    try {
      const answer = await get(`${path}${path.includes("?") ? "&" : "?"}from=${page * PAGE}&n=${PAGE}`);
      if (now.current !== path) return;
      pages.current.set(page, answer.rows);
      if (pages.current.size > MOST_PAGES) {
        const oldest = /** @type {number} */ (pages.current.keys().next().value);
        pages.current.delete(oldest);
        asked.current.delete(oldest);
      }
      setFound({ path, total: answer.total, of: answer.of, error: null });
    } catch (error) {
      asked.current.delete(page);
      if (now.current === path) setFound({ path, total: 0, of: 0, error });
    }
  };
  useEffect(() => void read(0), [path]);
  return {
    total: found.path === path ? found.total : 0,
    of: found.of,
    error: found.path === path ? found.error : null,
    isLoading: found.path !== path,
    /** @param {number} place */
    at(place) {
      const page = Math.floor(place / PAGE);
      if (!pages.current.has(page)) read(page);
      return pages.current.get(page)?.[place % PAGE] ?? null;
    },
    /** Puts a changed row in its place. @param {number} place @param {any} row */
    put(place, row) {
      const page = pages.current.get(Math.floor(place / PAGE));
      if (page) page[place % PAGE] = row;
      setFound({ ...found });
    },
  };
}

/** Tiles of `total` rows; arrow keys move between them.
 * @param {{total: number, width: number, height: number, label: string, tile: (place: number, more: any) => any, at: number | null}} props */
export function Grid({ total, width, height, label, tile, at }) {
  const box = useRef(/** @type {any} */ (null));
  const [view, setView] = useState({ top: 0, height: 600, width: 800 });
  useEffect(() => {
    const node = box.current;
    const look = () => setView({ top: node.scrollTop, height: node.clientHeight, width: node.clientWidth });
    look();
    const observer = new ResizeObserver(look);
    observer.observe(node);
    return () => observer.disconnect();
  }, []);
  const columns = Math.max(1, Math.floor(view.width / width));
  const lines = Math.ceil(total / columns);
  // A browser cannot lay out an element of some ten million pixels: beyond that a pixel of the scroll bar is several lines.
  const whole = Math.min(lines * height, 8_000_000);
  const scale = whole > view.height ? (lines * height - view.height) / (whole - view.height) : 1;
  const first = Math.max(0, Math.floor((view.top * scale) / height) - 2);
  const last = Math.min(lines, Math.ceil((view.top * scale + view.height) / height) + 2);
  const keys = (/** @type {KeyboardEvent} */ event) => {
    const step = /** @type {Record<string, number>} */ ({ ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, PageDown: columns * 4, PageUp: -columns * 4 })[event.key];
    if (!step) return;
    const place = Math.min(total - 1, Math.max(0, Number(/** @type {any} */ (event.target).dataset.place ?? 0) + step));
    event.preventDefault();
    const y = Math.floor(place / columns) * height;
    if (y < view.top * scale || y + height > view.top * scale + view.height) box.current.scrollTop = (y - view.height / 2) / scale;
    requestAnimationFrame(() => requestAnimationFrame(() => box.current?.querySelector(`[data-place="${place}"]`)?.focus()));
  };
  const tiles = [];
  for (let line = first; line < last; line++) {
    for (let column = 0; column < columns; column++) {
      const place = line * columns + column;
      if (place >= total) break;
      const y = line * height - view.top * scale + view.top;
      tiles.push(tile(place, { style: { position: "absolute", left: `${column * width}px`, top: `${y}px`, width: `${width - 8}px`, height: `${height - 8}px` }, tabindex: place === (at ?? first * columns) || (at == null && place === 0) ? 0 : -1, "data-place": place }));
    }
  }
  return html`<div class="grid" ref=${box} role="list" aria-label=${label} onScroll=${() => setView({ ...view, top: box.current.scrollTop })} onKeyDown=${keys}>
    <div style=${{ height: `${whole}px`, position: "relative" }}>${tiles}</div></div>`;
}
