// The picture that Complete, Tokens and Stability work on: from a file, from the training data, or drawn.

import { available, h, job, showStage, state, upload, Work } from "./app.js";

export function picker(changed) {
  const now = h("div.now"), name = h("p.note"), strip = h("div"), problem = h("div");
  const work = new Work(problem);
  const file = h("input.hidden", { type: "file", accept: "image/*", id: "file", tabindex: -1, "aria-label": "Picture file", onchange: async () => {
    try { take(await upload(file.files[0])); } catch (error) { problem.replaceChildren(h("p.error", { role: "alert" }, error.message)); }
    file.value = "";
  } });
  function show() {
    const picture = state.picture;
    now.replaceChildren(picture ? h("img", { src: picture.image, alt: "" }) : "");
    name.textContent = picture ? picture.title : "no picture yet";
  }
  function take(picture) {
    state.picture = picture;
    strip.replaceChildren(); problem.replaceChildren();
    show(); changed();
  }
  let start = 0;
  async function more() {
    const list = h("div.strip");
    strip.replaceChildren(list, h("button.quiet", { type: "button", onclick: () => { start += 24; more(); } }, "Others"));
    await work.run(`/api/data?start=${start}&num=24`, undefined, (kind, data) => {
      if (kind !== "picture") return;
      const title = `training picture ${data.index}${data.name ? ", " + data.name : ""}`;
      list.append(h("button", { type: "button", "aria-label": title, onclick: () => take({ ...data, title, file: `training-${data.index}.png` }) }, h("img", { src: data.image, alt: "", loading: "lazy" })));
    });
    problem.replaceChildren();
  }
  async function one() {
    await work.run("/api/draw", { num: 1, seed: Math.floor(Math.random() * 1e6), labels: [] }, (kind, data) => {
      if (kind === "step") showStage(work, data);
      else if (kind === "picture") take({ ...data, title: `${data.name ?? "picture"}, seed ${data.seed}` });
    });
  }
  show();
  const buttons = [h("button", { type: "button", onclick: () => file.click() }, "Open a file"), file];
  if (state.about.data) buttons.push(h("button", { type: "button", onclick: more }, "From the training data"));
  if (available("draw")) buttons.push(h("button", { type: "button", onclick: one }, "Draw one"));
  const bar = h("div", {}, h("div.picker", {}, now, h("div", {}, h("div.row", {}, buttons), name)), problem, strip);
  return Object.assign(bar, { show });
}

// a picture to begin with, so that no part starts empty
export async function firstPicture() {
  if (state.picture) return;
  const drawn = state.drawn.find(Boolean);
  if (drawn) { state.picture = drawn; return; }
  if (state.about.data) {
    for await (const { kind, data } of job("/api/data?start=7&num=1")) {
      if (kind === "picture" && !state.picture) state.picture = { ...data, title: `training picture ${data.index}${data.name ? ", " + data.name : ""}`, file: `training-${data.index}.png` };
    }
  }
}

// buttons over the cells of a grid, moved through with the arrow keys
export function grid(rows, columns, make) {
  const cells = h("div.cells", { role: "group", css: { "grid-template-columns": `repeat(${columns}, 1fr)`, "grid-template-rows": `repeat(${rows}, 1fr)` } });
  const buttons = Array.from({ length: rows * columns }, (_, place) => {
    const button = h("button", { type: "button", tabindex: place ? -1 : 0 });
    make(button, place, Math.floor(place / columns), place % columns);
    return button;
  });
  cells.append(...buttons);
  cells.onkeydown = (event) => {
    const place = buttons.indexOf(document.activeElement), step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (place < 0 || !step || !buttons[place + step]) return;
    if (Math.abs(step) === 1 && Math.floor(place / columns) !== Math.floor((place + step) / columns)) return;
    event.preventDefault();
    buttons[place].tabIndex = -1; buttons[place + step].tabIndex = 0; buttons[place + step].focus();
  };
  return { cells, buttons };
}
