// @ts-check
// The frame of every page: navigation, connection, theme. A page is a module of pages/ that is loaded when it is shown.
import { html, render, useEffect, useRef, useState } from "./vendor/ui.js";
import { Loading, Meter, Problem, setTheme, theme } from "./kit.js";
import { connection, device, fault, jobs, runs, start, state } from "./live.js";
import { address, onLink } from "./router.js";

/** [address, module, title] */
const PAGES = /** @type {[RegExp, string, string][]} */ ([
  [/^\/$/, "runs", "Runs"],
  [/^\/data(?:\/([^/]+))?$/, "data", "Data"],
  [/^\/new$/, "new", "New run"],
  [/^\/runs\/([^/]+)$/, "run", "Run"],
  [/^\/jobs\/([^/]+)$/, "job", "Job"],
  [/^\/compare$/, "compare", "Compare"],
  [/^\/try(?:\/([^/]+))?$/, "try", "Try"],
  [/^\/release(?:\/([^/]+))?$/, "release", "Release"],
]);
const LINKS = [["/", "Runs"], ["/data", "Data"], ["/new", "New run"], ["/compare", "Compare"], ["/try", "Try"], ["/release", "Release"]];

function Navigation() {
  const path = address.value.pathname;
  // On a small screen the links are one line that scrolls.
  useEffect(() => document.querySelector("nav.main [aria-current]")?.scrollIntoView({ block: "nearest", inline: "nearest" }), [path]);
  const running = Object.values(runs.value).filter((run) => run.state === "running").length;
  const waiting = Object.values(jobs.value).filter((job) => job.state === "queued").length;
  return html`<nav class="main" aria-label="Pages">
    <a class="brand" href="/"><img src="/static/icon.svg" alt="" width="24" height="24" /> Studio</a>
    <ul>${LINKS.map(([to, label]) => {
      const isHere = to === "/" ? path === "/" || path.startsWith("/runs") || path.startsWith("/jobs") : path.startsWith(to);
      return html`<li><a href=${to} aria-current=${isHere ? "page" : undefined}>${label}${to === "/" && running + waiting > 0 ? html` <span class="count" title=${`${running} running, ${waiting} waiting`}>${running + waiting}</span>` : ""}</a></li>`;
    })}</ul>
    <div class="foot">
      <p class="quiet">${state.value?.root}</p>
      <${Machine} />
      <label class="quiet">Theme <select value=${theme.value} onChange=${(/** @type {any} */ event) => setTheme(event.target.value)}>
        ${["auto", "light", "dark"].map((name) => html`<option value=${name}>${name}</option>`)}</select></label>
    </div>
  </nav>`;
}

function Machine() {
  const found = device.value;
  if (!found) return null;
  return html`<div class="quiet machine">
    ${found.cards.map((/** @type {any} */ card) => html`<div><p>${card.name}, ${Math.round(100 * card.load)} % busy</p><${Meter} label="Card" used=${card.memory - card.memory_free} total=${card.memory} /></div>`)}
    ${found.memory && html`<${Meter} label="Memory" used=${found.memory - found.memory_free} total=${found.memory} />`}
    <${Meter} label="Disk" used=${found.disk - found.disk_free} total=${found.disk} />
    ${found.cards.length === 0 && html`<p>${found.cores} cores; ${found.cards_known ? "no card" : "no card known"}</p>`}</div>`;
}

function Connection() {
  if (connection.value === "refused") return html`<div class="notice bad" role="alert"><p>This browser has no access any more. In a terminal, <code>t2i-adapter studio --link</code> prints a new link.</p></div>`;
  if (connection.value === "lost") return html`<div class="notice wait" role="status"><p>The studio does not answer. Runs go on without it; this page tries again by itself.</p></div>`;
  return null;
}

function Page() {
  const path = address.value.pathname;
  const [found, setFound] = useState(/** @type {any} */ ({ path: "", view: null, error: null }));
  const main = useRef(/** @type {any} */ (null));
  const [, module, title] = PAGES.find(([pattern]) => pattern.test(path)) ?? [null, "", "Not found"];
  const match = PAGES.map(([pattern]) => pattern.exec(path)).find(Boolean);
  useEffect(() => {
    document.title = `${title} - Studio`;
    if (!module) return setFound({ module, view: null, error: { message: "There is no such page." } });
    import(`./pages/${module}.js`).then(
      (loaded) => setFound({ module, view: loaded.default, error: null }),
      () => setFound({ module, view: null, error: { message: "The page could not be loaded. Is the studio running?" } }),
    );
  }, [module]);
  useEffect(() => void (found.module === module && document.activeElement === document.body && main.current?.focus({ preventScroll: true })), [path, found]);
  const View = found.module === module ? found.view : null;
  return html`<main id="main" tabindex="-1" ref=${main}>
    <${Connection} />
    ${fault.value && connection.value !== "refused" && html`<${Problem} error=${fault.value} />`}
    ${found.module === module && found.error && html`<h1>${title}</h1><${Problem} error=${found.error}><p><a href="/">All runs</a></p></${Problem}>`}
    ${View ? html`<${View} key=${path} id=${match?.[1] ? decodeURIComponent(match[1]) : null} query=${address.value.searchParams} />` : !found.error && html`<${Loading} />`}
  </main>`;
}

const App = () => html`<div class="frame" onClick=${onLink}>
  <a class="skip" href="#main" onClick=${(/** @type {any} */ event) => { event.preventDefault(); document.getElementById("main")?.focus(); }}>Skip to the content</a>
  <${Navigation} />
  ${state.value || fault.value ? html`<${Page} />` : html`<main id="main"><${Loading} label="Loading the studio" /></main>`}
</div>`;

setTheme(theme.value);
const place = /** @type {any} */ (document.getElementById("app"));
place.replaceChildren();
render(html`<${App} />`, place);
start();
