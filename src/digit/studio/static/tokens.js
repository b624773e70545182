// Tokens: both tokenizers' maps over the picture, what a token stands for, and the picture with another token.

import { available, colour, h, lines, onLeave, palettes, plural, say, settings, state, stopKey, Work } from "./app.js";
import { firstPicture, grid, picker } from "./picker.js";

const NAMES = { discriminative: "Discriminative tokens", vq: "VQ tokens" };
let wash = 55;

export default function tokens() {
  const boards = h("div.boards"), progress = h("div.progress"), panel = h("div.card.stack"), after = h("div"), rebuilt = h("div.boards.section");
  const work = new Work(progress), patchWork = new Work(h("div")), renderWork = new Work(h("div.progress"));
  let found = {}, own = [], now = [], chosen = 0, views = {}, label = -1, rendered;
  onLeave(() => { work.stop(); patchWork.stop(); renderWork.stop(); });
  stopKey(work, patchWork, renderWork);

  async function encode() {
    if (!state.picture) return;
    try { await palettes(); } catch (error) { progress.replaceChildren(h("p.error", { role: "alert" }, error.message)); return; }
    boards.replaceChildren(); rebuilt.replaceChildren(); panel.replaceChildren(); rendered = undefined;
    const ended = await work.run("/api/encode", { picture: state.picture.image }, (kind, data) => {
      if (kind === "tokens") {
        found = data.tokens; label = data.label; own = [...(found.discriminative ?? [])]; now = [...own];
        show(); after.replaceChildren(lines(data.commands));
        const name = own.length ? "discriminative" : "vq", [rows, columns] = state.about.tokenizers[name].grid;
        choose(name, Math.floor(rows / 2) * columns + Math.floor(columns / 2)); // in the middle of the picture
      } else if (kind === "rebuilt") {
        const text = data.tokenizer === "vq" ? "Decoded from the VQ tokens" : "Rendered from the discriminative tokens alone";
        const note = data.tokenizer === "vq" ? "They store how the picture looks." : "They keep what is where; the renderer makes up the rest.";
        const figure = h("figure", {}, h("h3", {}, text), h("div.board", {}, h("img", { src: data.image, alt: text })), h("figcaption.note", {}, note));
        if (data.tokenizer === "vq") rebuilt.append(figure); else { rebuilt.prepend(figure); rendered = data.image; } // below its map
      }
    });
    if (ended) progress.replaceChildren();
  }
  function show() {
    views = {};
    boards.replaceChildren(...Object.keys(found).map((name) => {
      const [rows, columns] = state.about.tokenizers[name].grid;
      const { cells, buttons } = grid(rows, columns, (button, place, row, column) => {
        button.append(h("span.wash", { css: { "--code": colour(name, found[name][place]), display: "block", width: "100%", height: "100%" } }));
        button.dataset.place = `row ${row + 1}, column ${column + 1}`;
        button.setAttribute("aria-label", `${button.dataset.place}: token ${found[name][place]}`);
        button.onpointerenter = button.onfocus = () => light(name, place);
        button.onblur = () => light();
        button.onclick = () => choose(name, place);
      });
      cells.setAttribute("aria-label", NAMES[name]);
      cells.onpointerleave = () => light();
      views[name] = buttons;
      const about = state.about.tokenizers[name];
      return h("figure", {}, h("h3", {}, NAMES[name]), h("div.board", { css: { "--wash": wash / 100 } }, h("img", { src: state.picture.image, alt: state.picture.title }), cells), h("figcaption.note", {}, `${rows} × ${columns} tokens of ${about.codes} codes, ${new Set(found[name]).size} different here`));
    }));
  }
  // cells of the map that hold another token than the picture's
  function swapped() {
    views.discriminative?.forEach((button, place) => {
      const other = now[place] !== own[place];
      button.classList.toggle("swapped", other);
      button.firstChild.style.setProperty("--code", colour("discriminative", now[place]));
      button.setAttribute("aria-label", `${button.dataset.place}: token ${now[place]}${other ? ` in place of ${own[place]}` : ""}`);
    });
  }
  const told = h("p.note", { "aria-live": "off" });
  function light(name, place) {
    const tokens = name === "discriminative" ? now : found[name];
    for (const [other, buttons] of Object.entries(views)) buttons.forEach((button, p) => button.classList.toggle("same", name === other && tokens[p] === tokens[place]));
    told.textContent = name ? `Under the pointer: token ${tokens[place]}, ${plural(tokens.filter((t) => t === tokens[place]).length, "time")} in this picture` : "";
  }
  async function choose(name, place) {
    Object.values(views).flat().forEach((button) => button.classList.remove("chosen"));
    views[name]?.[place]?.classList.add("chosen");
    if (name !== "discriminative") {
      panel.replaceChildren(h("h3", {}, `VQ token ${found[name][place]}`), h("p.note", {}, `A VQ code stands for the look of a few pixels.${own.length ? " Choose a discriminative token to see what it stands for." : ""}`));
      return;
    }
    chosen = place;
    const token = now[place], area = h("div.stack", { "aria-live": "off" });
    panel.replaceChildren(h("h3"), area);
    head();
    if (!state.about.data) { area.append(h("p.note", {}, "The training pictures are not here (digit studio RUN --data PATH)."), swapper([])); return; }
    patchWork.place = area;
    await patchWork.run(`/api/patches/${token}`, undefined, (kind, data) => {
      if (kind !== "patches") return;
      const thumbs = Array.from({ length: data.shown }, (_, i) => h("div.thumb", { css: { "background-image": `url(${data.sheet})`, "background-size": `${data.shown * 100}% 100%`, "background-position": `${data.shown > 1 ? (100 * i) / (data.shown - 1) : 0}% 0` } }));
      say(`token ${token}: ${plural(data.count, "place")} in ${data.pictures} training pictures`);
      area.replaceChildren(h("p.note", {}, data.count ? `In training pictures ${token} stands for these places (${data.count} in ${data.pictures} pictures):` : `It does not occur in the ${data.pictures} training pictures looked at.`), h("div.patches", { role: "img", "aria-label": `${data.shown} patches of training pictures with token ${token}` }, thumbs), swapper(data.near));
    });
  }
  function head() {
    const token = now[chosen], instead = token === own[chosen] ? "" : ` in place of ${own[chosen]}`;
    panel.querySelector("h3").replaceChildren(h("span.swatch", { css: { "--code": colour("discriminative", token) } }), ` Token ${token}${instead}`);
  }
  function swapper(near) {
    const number = h("input", { id: "swap", type: "number", min: 0, max: state.about.tokenizers.discriminative.codes - 1, value: now[chosen] });
    const result = h("div");
    renderWork.place = h("div.progress");
    const put = async (token) => {
      now[chosen] = token; number.value = token; swapped(); head();
      await renderWork.run("/api/render", { tokens: now, seed: 0, label, ...settings() }, (kind, data) => {
        if (kind === "step") { const flat = data.tokens.flat(); renderWork.show("rendering", flat.filter((t) => t >= 0).length / flat.length); }
        if (kind === "start") after.replaceChildren(lines(data.commands));
        if (kind === "picture") {
          const changed = now.filter((t, i) => t !== own[i]).length;
          result.replaceChildren(h("div.two", {}, h("figure", {}, h("div.frame", {}, h("img", { src: rendered ?? state.picture.image, alt: "rendered from its own tokens" })), h("figcaption.note", {}, "its own tokens")), h("figure", {}, h("div.frame", {}, h("img", { src: data.image, alt: "rendered with other tokens" })), h("figcaption.note", {}, `${plural(changed, "token")} changed`))), h("button.quiet", { type: "button", onclick: () => { now = [...own]; swapped(); choose("discriminative", chosen); } }, "All tokens back"));
          renderWork.place.replaceChildren();
        }
      });
    };
    if (!available("draw")) return "";
    return h("div.stack", {}, h("h3", {}, "Swap it and render again"), near.length ? h("div.codes", { role: "group", "aria-label": "Codes near to it" }, near.map((token) => h("button", { type: "button", onclick: () => put(token) }, h("i", { css: { "--code": colour("discriminative", token) } }), String(token)))) : "", h("div.row", {}, h("label", { for: "swap" }, "any code"), number, h("button", { type: "button", onclick: () => { const token = Math.floor(Number(number.value)); if (token >= 0 && token < state.about.tokenizers.discriminative.codes) put(token); } }, "Render")), renderWork.place, result);
  }
  const strength = h("input", { type: "range", id: "wash", min: 0, max: 100, value: wash, oninput: () => { wash = Number(strength.value); boards.querySelectorAll(".board").forEach((b) => b.style.setProperty("--wash", wash / 100)); } });
  const names = Object.keys(state.about.tokenizers), both = names.length > 1;
  const bar = picker(encode);
  firstPicture().then(() => { bar.show(); encode(); }, (error) => progress.replaceChildren(h("p.error", {}, error.message)));
  return [
    h("h2", {}, "Tokens"),
    h("p.lede", {}, `${both ? "The same picture as two languages write it." : names.includes("vq") ? "The picture as VQ tokens. This pipeline has no discriminative ones." : "The picture as discriminative tokens. This run has no VQ tokens: its renderer goes straight to pixels."} Near codes have near colours. Point at a token to see where else it stands${names.includes("discriminative") ? "; choose one to see what it stands for in the training pictures, and put another in its place" : ""}.`),
    bar, progress,
    h("div.split.maps", {},
      h("div.shown", {}, boards, rebuilt, after),
      h("div.controls", {}, h("div", {}, h("label", { for: "wash" }, "Tokens over the picture"), strength), told, panel)),
  ];
}
