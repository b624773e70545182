// Complete: brush whole token cells away, keep the others exactly, and see several proposals.

import { h, lines, onLeave, plural, say, sends, settings, showStage, state, stopKey, Work } from "./app.js";
import { firstPicture, grid, picker } from "./picker.js";

let keep; // rows of booleans
const chosen = { num: 4, seed: 0, own: true };

export default function complete() {
  const [rows, columns] = state.about.cells;
  if (!keep) keep = Array.from({ length: rows }, (_, r) => Array.from({ length: columns }, () => r < rows / 2));
  const board = h("div.board"), progress = h("div.progress"), gallery = h("div.gallery", { css: { "--columns": 2, "--widest": "680px" } }), after = h("div"), counted = h("p.note", { "aria-live": "polite" });
  const work = new Work(progress);
  let buttons = [], done = [];
  onLeave(() => { work.stop(); window.onpointerup = null; });
  stopKey(work);

  function paint() {
    buttons.forEach((button, place) => {
      const kept = keep[Math.floor(place / columns)][place % columns];
      button.classList.toggle("redo", !kept);
      button.setAttribute("aria-pressed", String(!kept));
    });
    const all = keep.flat(), kept = all.filter(Boolean).length;
    counted.textContent = `${kept} of ${all.length} cells kept`;
    go.disabled = kept === all.length || !state.picture;
  }
  let brushing; // the value that the brush gives, while a pointer is down
  function set(place, value) { keep[Math.floor(place / columns)][place % columns] = value; paint(); }
  function showBoard() {
    if (!state.picture) { board.replaceChildren(); paint(); return; }
    const made = grid(rows, columns, (button, place, row, column) => {
      button.setAttribute("aria-label", `row ${row + 1}, column ${column + 1}: sample again`);
      button.onclick = (event) => { if (event.detail === 0) set(place, !keep[row][column]); }; // from the keyboard
    });
    buttons = made.buttons;
    const at = (event) => buttons.indexOf(document.elementFromPoint(event.clientX, event.clientY));
    made.cells.onpointerdown = (event) => {
      const place = at(event);
      if (place < 0) return;
      brushing = !keep[Math.floor(place / columns)][place % columns];
      set(place, brushing);
    };
    made.cells.onpointermove = (event) => { if (brushing !== undefined && event.buttons) { const place = at(event); if (place >= 0) set(place, brushing); } };
    window.onpointerup = () => { brushing = undefined; };
    made.cells.setAttribute("aria-label", "Cells: pressed ones are sampled again");
    board.replaceChildren(h("img", { src: state.picture.image, alt: state.picture.title }), made.cells);
    paint();
  }
  const fill = (rule) => { keep = keep.map((row, r) => row.map((_, c) => rule(r, c))); paint(); };
  const presets = [["Upper half", (r) => r < rows / 2], ["Left half", (r, c) => c < columns / 2], ["Border", (r, c) => r === 0 || c === 0 || r === rows - 1 || c === columns - 1], ["Nothing", () => false], ["Invert", (r, c) => !keep[r][c]]];

  function show() {
    gallery.replaceChildren(...done.map((picture) => h("figure.tile", {}, h("div.frame", {}, h("img", { src: chosen.own || !picture.decoded ? picture.image : picture.decoded, alt: picture.title })), h("figcaption.caption", {}, h("span", {}, picture.name ?? ""), h("span.note", {}, `seed ${picture.seed}`)), sends(picture, "complete"))));
  }
  async function run(path, body, what) {
    done = []; show(); after.replaceChildren();
    stop.hidden = false;
    const ended = await work.run(path, body, (kind, data) => {
      if (kind === "start") after.replaceChildren(lines(data.commands));
      else if (kind === "step") showStage(work, data);
      else if (kind === "picture") { done[data.index] = { ...data, title: `${what} ${data.index + 1}`, file: `${what}-${data.seed}.png` }; show(); }
    });
    stop.hidden = true;
    if (ended) { progress.replaceChildren(h("p.note", {}, state.about.num_classes && done[0]?.name && body.label === undefined && what === "completion" ? `The model took it for: ${done[0].name}.` : "")); say(`${plural(done.length, what)} ready`); }
  }
  const label = h("select", { id: "label" }, h("option", { value: "" }, "as the model guesses"), state.about.classes.map((name, k) => h("option", { value: k }, name)));
  const seed = h("input", { id: "seed", type: "number", min: 0, value: chosen.seed, onchange: () => { chosen.seed = Math.max(0, Math.floor(Number(seed.value) || 0)); } });
  const go = h("button.main", { type: "button", onclick: () => run("/api/complete", { picture: state.picture.image, keep, num: chosen.num, seed: chosen.seed, ...(label.value === "" ? {} : { label: Number(label.value) }), ...settings() }, "completion") }, "Complete");
  const vary = h("button", { type: "button", onclick: () => state.picture && run("/api/vary", { picture: state.picture.image, num: chosen.num, seed: chosen.seed, ...settings() }, "variation") }, "Variations");
  const stop = h("button", { type: "button", hidden: true, onclick: () => work.stop() }, "Stop");
  const own = h("input", { type: "checkbox", id: "own", checked: chosen.own, onchange: () => { chosen.own = own.checked; show(); } });
  const { kinds, pixels, varies } = state.about, two = Boolean(kinds.prior);
  const sees = (kinds.prior ?? kinds.renderer) === "masked" ? "The model sees all that is kept." : "The model reads in rows: it sees what is kept before a hole, and not what is kept after it.";
  const bar = picker(showBoard);
  firstPicture().then(() => { bar.show(); showBoard(); }, (error) => progress.replaceChildren(h("p.error", { role: "alert" }, error.message)));
  showBoard();
  return [
    h("h2", {}, "Complete"),
    h("p.lede", {}, "Brush over the cells to be sampled again. All others keep their tokens exactly, and each proposal has a seed of its own. " + sees),
    bar,
    h("div.split", {},
      h("div.controls", {}, board, counted, h("div.segments", { role: "group", "aria-label": "Keep" }, presets.map(([name, rule]) => h("button", { type: "button", onclick: () => fill(rule) }, name))),
        state.about.num_classes ? h("div", {}, h("label", { for: "label" }, "Class"), h("div", {}, label)) : "",
        h("div", {}, h("label", { for: "seed" }, "Seed of the first proposal"), h("div", {}, seed)),
        h("div.row", {}, go, two ? vary : "", stop),
        two ? h("p.note", {}, varies ? "Variations keep all discriminative tokens and sample only how they look." : `Variations keep ${Math.round(100 * state.about.kept_by_variations)}% of the discriminative tokens and sample the others: this renderer draws equal tokens equally.`) : "",
        pixels ? h("p.note", {}, "The renderer draws every pixel again from the tokens of the whole picture.") : "",
        h("p.note", {}, "The settings are those of Draw.")),
      h("section", { "aria-label": "Proposals" }, h("label", {}, own, " kept cells show the picture's own pixels, not decoded ones"), progress, gallery, after)),
  ];
}
