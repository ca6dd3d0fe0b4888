// Opens a pair's picture large over its condition, with a wipe. Texts are set as text, never as HTML.
"use strict";
(() => {
  const pairs = [...document.querySelectorAll(".pair")].sort((a, b) => a.dataset.rank - b.dataset.rank);
  const viewer = document.getElementById("viewer");
  const find = (selector) => viewer.querySelector(selector);
  const [wipe, slider, choices] = [".wipe", "input", ".choices"].map(find);
  let place = 0;
  let column = "adapter";

  const pictures = (pair) => [...pair.querySelectorAll(".picture")];
  const pictureOf = (pair) => pictures(pair).find((button) => button.dataset.column === column);
  const copyName = (button) => button.querySelector(".name").cloneNode(true);

  function moveWipe() {
    wipe.style.setProperty("--wipe", `${slider.value}%`);
  }

  function showPicture(image, source) {
    image.src = source.src;
    image.alt = source.alt;
  }

  function show() {
    const pair = pairs[place];
    const [condition, ...others] = pictures(pair);
    const shown = pictureOf(pair) || others[0];
    const source = shown.querySelector("img");
    showPicture(find(".under"), condition.querySelector("img"));
    showPicture(find(".over"), source);
    viewer.style.setProperty("--ratio", source.width / source.height);
    find("#viewer-title").textContent = pair.querySelector("h3").textContent;
    find(".right").replaceChildren(copyName(shown));
    find(".prompt").replaceChildren(...pair.querySelector(".prompt").cloneNode(true).childNodes);
    const inside = choices.contains(document.activeElement);
    choices.replaceChildren(...others.map((button) => {
      const choice = document.createElement("button");
      choice.type = "button";
      choice.setAttribute("aria-pressed", button === shown);
      choice.append(button.querySelector("img").cloneNode(), copyName(button));
      choice.onclick = () => choose(button.dataset.column);
      return choice;
    }));
    if (inside) choices.querySelector("[aria-pressed=true]").focus();
    moveWipe();
  }

  function choose(name) {
    column = name;
    show();
  }

  function step(count) {
    place = (place + count + pairs.length) % pairs.length;
    show();
  }

  function open(pair, name) {
    place = pairs.indexOf(pair);
    slider.value = 50;
    choose(name === "condition" ? "adapter" : name);
    viewer.showModal();
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest(".picture");
    const dot = event.target.closest("circle[data-pair]");
    if (button) open(button.closest(".pair"), button.dataset.column);
    else if (dot) {
      const pair = pairs.find((each) => each.dataset.pair === dot.dataset.pair);
      open(pair, dot.closest(".dots").classList[1]);
    }
  });

  viewer.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button && "close" in button.dataset) viewer.close();
    else if (button && button.dataset.step) step(Number(button.dataset.step));
  });

  // Moves the focus from one end of the viewer to the other; the browser would leave the page there.
  function wraps(backwards) {
    const stops = [...viewer.querySelectorAll("button, input")];
    const [end, start] = backwards ? [stops[0], stops.at(-1)] : [stops.at(-1), stops[0]];
    if (document.activeElement !== end) return false;
    start.focus();
    return true;
  }

  viewer.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const sideways = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const vertical = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    const number = Number(event.key);
    if (vertical) step(vertical);
    else if (sideways && event.target !== slider) step(sideways);
    else if (event.key === "Tab" && !wraps(event.shiftKey)) return;
    else if (number >= 1 && number <= choices.children.length) choices.children[number - 1].click();
    else return;
    event.preventDefault();
  });

  viewer.addEventListener("close", () => {
    const pair = pairs[place];
    pair.scrollIntoView({ block: "nearest" });
    (pictureOf(pair) || pair.querySelector(".picture")).focus();
  });

  slider.addEventListener("input", moveWipe);
  for (const kind of ["pointerdown", "pointermove"]) {
    wipe.addEventListener(kind, (event) => {
      if (kind === "pointermove" && !wipe.hasPointerCapture(event.pointerId)) return;
      wipe.setPointerCapture(event.pointerId);
      const box = wipe.getBoundingClientRect();
      slider.value = Math.round(100 * (event.clientX - box.left) / box.width);
      moveWipe();
    });
  }

  // The dots of one pair are marked together.
  const plot = document.querySelector(".plot");
  plot.addEventListener("pointerover", (event) => {
    const pair = event.target.dataset.pair;
    for (const dot of plot.querySelectorAll("circle[data-pair]")) dot.classList.toggle("hot", dot.dataset.pair === pair);
  });
  plot.addEventListener("pointerleave", () => {
    for (const dot of plot.querySelectorAll(".hot")) dot.classList.remove("hot");
  });

  for (const button of document.querySelectorAll("[data-copy]")) {
    const code = document.getElementById(button.dataset.copy);
    button.hidden = false;
    button.onclick = () => navigator.clipboard.writeText(code.textContent).then(
      () => { button.textContent = "Copied"; },
      () => { getSelection().selectAllChildren(code); button.textContent = "Press Ctrl+C"; },
    );
  }

  // A printed page shows the folded parts too.
  const folded = [...document.querySelectorAll("details")];
  let before = [];
  addEventListener("beforeprint", () => {
    before = folded.map((each) => each.open);
    for (const each of folded) each.open = true;
  });
  addEventListener("afterprint", () => folded.forEach((each, index) => { each.open = before[index]; }));
})();
