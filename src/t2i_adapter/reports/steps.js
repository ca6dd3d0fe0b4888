// The slider over the steps of a run's page: it shows every pair's picture of one step, and stays where it was set when
// the page of a running run loads itself again.
"use strict";
(() => {
  const main = document.querySelector("main");
  const slider = document.getElementById("step");
  const details = [...document.querySelectorAll("details")];
  const place = `t2i-adapter ${location.pathname}`;
  let kept = {};
  try { kept = JSON.parse(sessionStorage.getItem(place)) || {}; } catch { /* no storage: the page begins anew */ }

  function keep() {
    const isLast = !slider || slider.value === slider.max;
    const open = details.map((each, index) => (each.open ? index : -1)).filter((index) => index >= 0);
    const step = isLast ? null : slider.dataset.steps.split(" ")[slider.value];
    try { sessionStorage.setItem(place, JSON.stringify({ step, open })); } catch { /* as above */ }
  }

  if (slider) {
    const steps = slider.dataset.steps.split(" ");
    const shots = [...document.querySelectorAll("figure[data-shots]")];
    const show = () => {
      const step = steps[slider.value];
      const name = Number(step).toLocaleString("en");
      document.getElementById("step-shown").textContent = name;
      slider.setAttribute("aria-valuetext", `step ${name}`);
      for (const shot of shots) {
        // A pair without a picture of this step shows its last one before it.
        const images = [...shot.querySelectorAll("img")].filter((image) => Number(image.dataset.step) <= Number(step));
        const shown = images.at(-1) || shot.querySelector("img");
        for (const image of shot.querySelectorAll("img")) image.hidden = image !== shown;
        shot.querySelector("figcaption").textContent = `step ${Number(shown.dataset.step).toLocaleString("en")}`;
      }
    };
    const index = steps.indexOf(String(kept.step));
    slider.value = index < 0 ? steps.length - 1 : index;
    slider.closest(".scrub").hidden = false;
    slider.addEventListener("input", () => { show(); keep(); });
    show();
  }

  for (const index of kept.open || []) if (details[index]) details[index].open = true;
  for (const each of details) each.addEventListener("toggle", keep);

  // The page of a running run loads itself again, unless nobody looks at it or its text is being selected.
  if (main.dataset.refresh) {
    setInterval(() => {
      if (!document.hidden && getSelection().isCollapsed) location.reload();
    }, 1000 * main.dataset.refresh);
  }

  // A printed page shows the folded parts too.
  let before = [];
  addEventListener("beforeprint", () => {
    before = details.map((each) => each.open);
    for (const each of details) each.open = true;
  });
  addEventListener("afterprint", () => details.forEach((each, index) => { each.open = before[index]; }));
})();
