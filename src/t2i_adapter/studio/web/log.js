// @ts-check
// What a job prints, as it prints it.
import { html, useEffect, useRef, useState } from "./vendor/ui.js";
import { useGet } from "./kit.js";
import { on } from "./live.js";

/** A job's output without what a bar wrote over: of the parts between carriage returns only the last is shown.
 * @param {string} text */
export const plainLog = (text) => text.split("\n").map((line) => line.split("\r").filter(Boolean).pop() ?? "").join("\n");

/** @param {{job: any}} props */
export function Log({ job }) {
  const [text, setText] = useState("");
  const { data } = useGet(`/api/jobs/${job.id}/log?from=0`);
  const at = useRef(0);
  const end = useRef(/** @type {any} */ (null));
  useEffect(() => {
    if (!data) return;
    setText(data.text);
    at.current = data.at;
    return on("log", (event) => {
      if (event.job !== job.id || event.at <= at.current) return;
      at.current = event.at;
      setText((before) => (before + event.text).slice(-200_000));
    });
  }, [data, job.id]);
  const shown = plainLog(text);
  useEffect(() => end.current?.scrollTo(0, end.current.scrollHeight), [shown]);
  return html`<pre class="log" tabindex="0" aria-label="Log" ref=${end}>${shown || "No output yet."}</pre>`;
}
