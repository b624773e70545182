// The studio: what all parts share (elements, the stream of a job, settings, commands), the part Draw, and navigation.

// ---------------------------------------------------------------- elements

export const $ = (id) => document.getElementById(id);

// h("button.main", {onclick}, "Draw"): an element with classes, properties or attributes, and children; text is only text
export function h(kind, props, ...children) {
  const [tag, ...classes] = kind.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "css") for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
    else if (name.startsWith("on") || name === "value" || name === "checked" || name === "disabled" || name === "hidden") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes ?? {})) if (name === "style") element.style.cssText = value; else element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export const say = (text) => { $("live").textContent = text; };
export const plural = (count, one, many = one + "s") => `${count} ${count === 1 ? one : many}`;

// ---------------------------------------------------------------- server

const page = Math.random().toString(36).slice(2);

async function failed(response) {
  let text = `the studio answered ${response.status}`;
  try { text = (await response.json()).error ?? text; } catch { /* no JSON */ }
  throw new Error(text);
}

export async function get(path) {
  const response = await fetch(path, { headers: { "x-studio-page": page } });
  return response.ok ? response.json() : failed(response);
}

export async function post(path, body) {
  const response = await fetch(path, { method: "POST", headers: { "content-type": "application/json", "x-studio-page": page }, body: JSON.stringify(body) });
  return response.ok ? response.json() : failed(response);
}

// the events of a job, as {kind, data}; ends with the job, throws what went wrong
export async function* job(path, body, signal) {
  const asked = body === undefined
    ? { headers: { "x-studio-page": page }, signal }
    : { method: "POST", headers: { "content-type": "application/json", "x-studio-page": page }, body: JSON.stringify(body), signal };
  const response = await fetch(path, asked);
  if (!response.ok) await failed(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    rest += value;
    let end;
    while ((end = rest.indexOf("\n\n")) >= 0) {
      const block = rest.slice(0, end);
      rest = rest.slice(end + 2);
      if (!block.startsWith("event: ")) continue;
      const line = block.indexOf("\n");
      const kind = block.slice(7, line), data = JSON.parse(block.slice(line + 7));
      if (kind === "done") return;
      if (kind === "error") throw new Error(data.text);
      yield { kind, data };
    }
  }
  throw new Error("the connection ended: is the studio still running?");
}

// a job with its progress in `place` and a way to stop it; answers whether it came to its end
export class Work {
  constructor(place) { this.place = place; }
  get busy() { return Boolean(this.control); }
  stop() { this.control?.abort(); }
  show(text, share, second) {
    this.place.replaceChildren(h("p.note", {}, text), share === undefined ? "" : h("div.bar" + (second ? ".second" : ""), { role: "progressbar", "aria-label": text, "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * share) }, h("i", { css: { width: `${100 * share}%` } })));
  }
  async run(path, body, on) {
    this.stop();
    const control = (this.control = new AbortController());
    try {
      for await (const { kind, data } of job(path, body, control.signal)) {
        if (this.control !== control) return false;
        if (kind === "queue") this.show(data.before ? `${plural(data.before, "job")} before yours` : "at work", 0);
        else if (kind === "progress") this.show(`${data.text}: ${data.done} of ${data.total}`, data.done / Math.max(1, data.total));
        else on(kind, data);
      }
      return true;
    } catch (error) {
      if (this.control === control) this.place.replaceChildren(error.name === "AbortError" ? h("p.note", {}, "stopped") : h("p.error", { role: "alert" }, error.message));
      return false;
    } finally {
      if (this.control === control) this.control = undefined;
    }
  }
}

// ---------------------------------------------------------------- state

export const state = { about: undefined, picture: undefined, drawn: [], palettes: undefined, examples: undefined };
const kept = (key, value) => { try { return value === undefined ? JSON.parse(sessionStorage.getItem(key)) : sessionStorage.setItem(key, JSON.stringify(value)); } catch { return undefined; } };
const sampling = { prior: {}, renderer: {} }; // changes to the recipe's settings
export const settings = () => ({ prior: { ...sampling.prior }, renderer: { ...sampling.renderer } });

export async function palettes() {
  if (!state.palettes) {
    for await (const { kind, data } of job("/api/palettes")) {
      if (kind !== "palettes") continue;
      state.palettes = Object.fromEntries(Object.entries(data).map(([name, hex]) => [name, hex.match(/.{6}/g).map((code) => "#" + code)]));
    }
  }
  return state.palettes;
}
export const colour = (name, token) => state.palettes?.[name]?.[token] ?? "#888";

// draws tokens as a map of colours; -1 stays empty
export function paint(canvas, tokens, name, clear = true) {
  const [rows, columns] = state.about.tokenizers[name].grid;
  if (clear) { canvas.width = columns; canvas.height = rows; }
  const context = canvas.getContext("2d");
  tokens.forEach((token, place) => {
    if (token < 0) return;
    context.fillStyle = colour(name, token);
    context.fillRect(place % columns, Math.floor(place / columns), 1, 1);
  });
}

export function lines(found, extra) {
  const part = (title, text) => h("div", {}, h("div.row.between", {}, h("h3", {}, title), h("button.quiet", { type: "button", "aria-label": `Copy: ${title}`, onclick: (event) => copy(text, event.currentTarget) }, "Copy")), h("pre", { tabindex: 0, "aria-label": title }, text));
  return h("section.lines", { "aria-label": "The same without the page" }, found.shell ? part("On the command line", found.shell) : "", found.python ? part("In Python", found.python) : "", extra ?? "");
}

async function copy(text, button) {
  try { await navigator.clipboard.writeText(text); } catch {
    const area = h("textarea", { "aria-hidden": "true" }, text);
    document.body.append(area); area.select(); document.execCommand("copy"); area.remove();
  }
  button.textContent = "Copied"; say("copied");
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

export function save(url, name) {
  const link = h("a", { href: url, download: name });
  document.body.append(link); link.click(); link.remove();
}

// sends a picture to another part
export function send(picture, part) {
  state.picture = picture;
  location.hash = "#" + part;
}

// what can be done with a picture, below it
export function sends(picture, except) {
  const parts = [["complete", "Complete"], ["tokens", "Tokens"], ["stability", "Noise"]].filter(([part]) => part !== except && available(part));
  return h("div.send", {}, parts.map(([part, text]) => h("button", { type: "button", "aria-label": `${text}: ${picture.title}`, onclick: () => send(picture, part) }, text)), h("button", { type: "button", "aria-label": `Save: ${picture.title}`, onclick: () => save(picture.image, picture.file ?? "picture.png") }, "Save"));
}

// why a part has nothing to show; undefined where it works
const reason = (part) => state.about.missing[part];
export const available = (part) => !reason(part);

// ---------------------------------------------------------------- settings of both stages

const SPECS = {
  temperature: { name: "Temperature", values: [0, ...Array.from({ length: 40 }, (_, i) => (i + 1) / 20)], help: "0 takes the most likely token" },
  top_k: { name: "Top-k", values: [0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 300, 400, 500, 1000, 2000, 4000, 8000, 16000], help: "only the k most likely tokens; all is off", text: (v) => (v ? String(v) : "all") },
  top_p: { name: "Top-p", values: Array.from({ length: 20 }, (_, i) => (i + 1) / 20), help: "only the most likely tokens up to this probability", text: (v) => (v < 1 ? String(v) : "1, all") },
  cfg_scale: { name: "Guidance", values: Array.from({ length: 41 }, (_, i) => i / 5), help: "towards the class or the tokens; 1 is off", text: (v) => (v === 1 ? "1, off" : String(v)) },
  cfg_schedule: { name: "Guidance schedule", help: "constant; or linear and cosine, from none at the first token to all of it at the last" },
  num_steps: { name: "Steps", values: Array.from({ length: 32 }, (_, i) => i + 1), help: "passes of the masked model" },
  order: { name: "Order", help: "which tokens a masked model decides first: the most likely (confidence), or spread over the picture (halton)" },
  choice_temperature: { name: "Choice temperature", values: Array.from({ length: 41 }, (_, i) => i / 4), help: "noise on the confidence of the masked model" },
};
const STAGES = { prior: ["1", "What to show", "the prior writes discriminative tokens"], renderer: ["2", "How it looks", "the renderer writes VQ tokens, which become pixels"] };
const KINDS = { next_token: "next token", masked: "masked", pixels: "straight to pixels" };
const current = (stage, name) => sampling[stage][name] ?? state.about.settings[stage][name];

// why a setting cannot be changed, or changes nothing now
function idle(stage, name) {
  if (name.startsWith("cfg") && !state.about.guidance[stage]) return ["needs dropout in training", true];
  if (name === "cfg_schedule" && current(stage, "cfg_scale") === 1) return ["guidance is off", false];
  if (name === "choice_temperature" && current(stage, "order") === "halton") return ["not used by halton", false];
  return undefined;
}

export function settingsPanel(changed = () => {}) {
  const about = state.about, shows = [];
  const all = () => { shows.forEach((show) => show()); changed(); };
  return Object.keys(STAGES).filter((stage) => about.kinds[stage]).map((stage) => {
    const [no, title, note] = STAGES[stage], names = Object.keys(about.settings[stage]);
    const does = stage === "renderer" && about.pixels ? `the renderer draws all pixels in one pass${about.varies ? "" : ", equal tokens equally"}; it has no settings` : note;
    return h("details", { open: innerWidth > 860 }, h("summary", {}, h("span.stage-name", {}, h("span.no", { "aria-hidden": "true" }, no), title)), h("p.note", {}, `${does} (${about.millions[stage]} M parameters, ${KINDS[about.kinds[stage]] ?? about.kinds[stage]})`), h("div.section", { css: { "margin-top": ".7rem" } }, names.map((name) => setting(stage, name, shows, all))));
  });
}

// a setting with its name, its value, how to change it, and the recipe's value
function setting(stage, name, shows, changed) {
  const spec = SPECS[name], recipe = state.about.settings[stage][name], id = `${stage}-${name}`, text = spec.text ?? String;
  const put = (value) => { if (value === recipe) delete sampling[stage][name]; else sampling[stage][name] = value; changed(); };
  const choices = state.about.choices[name];
  const { input, mark, display } = choices ? choice(id, choices, recipe, put) : slider(id, stage, name, recipe, put);
  const output = h("output", { for: id, hidden: Boolean(choices) });
  const back = h("button.recipe", { type: "button", id: `${id}-recipe`, onclick: () => { put(recipe); input.focus(); } });
  const off = idle(stage, name)?.[1];
  input.disabled = Boolean(off);
  input.setAttribute("aria-description", spec.help);
  const box = h("div.setting", { title: off ? `${spec.help}. This run was trained without label or prefix dropout.` : spec.help }, h("label", { for: id }, spec.name), back, output, h("div.slider", {}, input, mark));
  shows.push(() => {
    const value = current(stage, name), why = idle(stage, name)?.[0];
    display(value, text);
    output.textContent = text(value);
    box.classList.toggle("changed", value !== recipe);
    back.disabled = Boolean(off) || value === recipe;
    back.textContent = back.disabled ? why ?? "recipe" : `back to ${text(recipe)}`;
    if (!back.disabled) back.setAttribute("aria-label", `${spec.name}: back to the recipe's ${text(recipe)}`); else back.removeAttribute("aria-label");
  });
  shows.at(-1)();
  return box;
}

function slider(id, stage, name, recipe, put) {
  const codes = state.about.tokenizers[stage === "prior" ? "discriminative" : "vq"]?.codes ?? Infinity;
  const values = [...new Set([...SPECS[name].values.filter((v) => name !== "top_k" || v < codes), recipe])].sort((a, b) => a - b);
  if (name === "top_k") values.push(values.shift()); // all is the end of the scale
  const input = h("input", { id, type: "range", min: 0, max: values.length - 1, step: 1, oninput: () => put(values[input.value]) });
  const mark = h("span.tick", { css: { left: `calc(8px + ${values.indexOf(recipe) / (values.length - 1)} * (100% - 16px))` } });
  const display = (value, text) => {
    input.value = values.indexOf(value) >= 0 ? values.indexOf(value) : values.findIndex((v) => v >= value);
    input.setAttribute("aria-valuetext", text(value));
  };
  return { input, mark, display };
}

function choice(id, choices, recipe, put) {
  const input = h("select", { id, onchange: () => put(input.value) }, choices.map((value) => h("option", { value }, value === recipe ? `${value} (recipe)` : value)));
  return { input, mark: "", display: (value) => { input.value = value; } };
}

// ---------------------------------------------------------------- Draw

const draw = { num: 4, seed: 0, labels: [] }, PALETTE_MS = 300;

function drawPart() {
  const about = state.about;
  Object.assign(draw, kept("draw") ?? {});
  const gallery = h("div.gallery", { "aria-label": "Pictures", role: "group" }), progress = h("div.progress"), after = h("div");
  const work = new Work(progress);
  const seed = h("input", { id: "seed", type: "number", min: 0, max: 2 ** 53 - 1001, step: 1, value: draw.seed });
  const setSeed = (value) => { draw.seed = seed.value = Math.min(2 ** 53 - 1001, Math.max(0, Math.floor(Number(value) || 0))); kept("draw", draw); };
  seed.onchange = () => setSeed(seed.value);
  const go = h("button.main", { type: "submit" }, "Draw");
  const stop = h("button", { type: "button", hidden: true, onclick: () => work.stop() }, "Stop");
  const counts = h("div.segments", { role: "group", "aria-label": "How many pictures" });
  const showCounts = () => counts.replaceChildren(...[1, 4, 9, 16, 36].map((n) => h("button", { type: "button", "aria-pressed": String(draw.num === n), onclick: () => { draw.num = n; kept("draw", draw); showCounts(); } }, String(n))));
  showCounts();

  async function start(event) {
    event?.preventDefault();
    seed.onchange();
    kept("draw", draw);
    go.disabled = true; stop.hidden = false;
    const began = performance.now(), tiles = [];
    after.replaceChildren();
    if (innerWidth <= 860) gallery.scrollIntoView({ block: "start", behavior: "smooth" });
    await Promise.race([palettes().catch(() => {}), new Promise((later) => setTimeout(later, PALETTE_MS))]); // else the first maps were grey
    const ended = await work.run("/api/draw", { num: draw.num, seed: draw.seed, labels: draw.labels.slice(0, draw.num), ...settings() }, (kind, data) => {
      if (kind === "start") {
        columns(gallery, data.num);
        tiles.push(...data.labels.map((_, i) => waitingTile(data.names[i], data.seed + i)));
        gallery.replaceChildren(...tiles.map((tile) => tile.element));
        after.replaceChildren(lines(data.commands));
        state.drawn = [];
      } else if (kind === "step") grow(tiles, data, work);
      else if (kind === "picture") {
        const picture = { ...data, title: `${data.name ?? "picture"}, seed ${data.seed}`, file: `${data.name ?? "picture"}-${data.seed}.png` };
        state.drawn[data.index] = picture;
        tiles[data.index].finish(picture, () => { setSeed(data.seed); draw.num = 1; draw.labels = data.label >= 0 ? [data.label] : []; showCounts(); showClasses(); go.focus(); });
        work.show(`${data.index + 1} of ${tiles.length} pictures`, (data.index + 1) / tiles.length);
      }
    });
    go.disabled = false; stop.hidden = true;
    if (ended) {
      const seconds = ((performance.now() - began) / 1000).toFixed(1);
      progress.replaceChildren(h("p.note", {}, `${plural(tiles.length, "picture")} in ${seconds} s. Click a seed to keep it.`));
      say(`${plural(tiles.length, "picture")} drawn`);
    }
  }

  const classes = h("div");
  function showClasses() {
    if (!about.num_classes) { classes.replaceChildren(); return; }
    classes.replaceChildren(classPicker(draw.labels, (labels) => { draw.labels = labels; kept("draw", draw); }));
  }
  showClasses();
  if (about.num_classes && about.data && !state.examples) examples().then(showClasses, () => {});

  const form = h("form.controls", { onsubmit: start, "aria-label": "What to draw" },
    classes,
    h("div", {}, h("label", { for: "seed" }, "Seed of the first picture"), h("div.row", {}, seed, h("button.quiet", { type: "button", onclick: () => setSeed(Math.floor(Math.random() * 1e6)) }, "Any"), h("button.quiet", { type: "button", onclick: () => setSeed(draw.seed + draw.num) }, "Next"))),
    h("div", {}, h("p.label", {}, "Pictures"), counts),
    h("div.row", {}, go, stop),
    settingsPanel());
  const maps = h("button.small", { type: "button", "aria-pressed": "false", onclick: () => maps.setAttribute("aria-pressed", String(gallery.classList.toggle("maps"))) }, "Token maps");
  const view = h("section", { "aria-label": "Pictures and progress" }, h("div.row.between.above", {}, progress, maps), gallery, after);
  const empty = h("div.empty", { css: { "grid-column": "1 / -1" } }, h("p", {}, "Choose classes or none, and draw. Each picture shows its token map first; the pixels grow out of it."), h("button.main", { type: "button", onclick: start }, "Draw four"));
  gallery.append(empty);
  if (state.drawn.length) {
    columns(gallery, state.drawn.filter(Boolean).length);
    gallery.replaceChildren(...state.drawn.filter(Boolean).map((picture) => { const tile = waitingTile(picture.name, picture.seed); tile.finish(picture, () => setSeed(picture.seed)); return tile.element; }));
  }
  stopKey(work);
  restore = (found) => {
    setSeed(found.seed ?? 0); draw.num = 1; draw.labels = Number.isInteger(found.label) && found.label >= 0 && found.label < about.num_classes ? [found.label] : [];
    for (const stage of Object.keys(sampling)) {
      sampling[stage] = {};
      for (const [name, value] of Object.entries(found[stage] ?? {})) if (name in about.settings[stage] && known(name, value) && value !== about.settings[stage][name]) sampling[stage][name] = value;
    }
    kept("draw", draw);
  };
  return [
    h("h2", {}, "Draw"),
    h("p.lede", {}, !about.kinds.prior ? `A model writes a picture as it would write a text: as ${tokensText("vq")}, which are decoded to pixels.` : `A model writes a picture as it would write a text: first ${tokensText("discriminative")} that say what is where, then ${about.pixels ? "all its pixels at once" : `${tokensText("vq")} that say how it looks`}.`),
    h("div.split", {}, form, view),
  ];
}
let restore = () => {};
const known = (name, value) => (state.about.choices[name] ? state.about.choices[name].includes(value) : Number.isFinite(value));

function tokensText(name) {
  const found = state.about.tokenizers[name];
  if (!found) return "tokens";
  return `${found.grid[0] * found.grid[1]} ${name === "vq" ? "VQ" : name} tokens`;
}

// Escape stops what a part is doing
export function stopKey(...works) { window.onkeydown = (event) => { if (event.key === "Escape") works.forEach((work) => work.stop()); }; }

// shows how far the stages of a drawing are
export function showStage(work, data) {
  const flat = data.tokens.flat(), share = flat.filter((t) => t >= 0).length / flat.length, first = data.stage === "prior";
  if (!state.about.kinds.prior) work.show("VQ tokens", share);
  else if (first && share === 1 && state.about.pixels) work.show("2 of 2: pixels, in one pass", 1);
  else work.show(first ? "1 of 2: discriminative tokens" : "2 of 2: how it looks", share, first);
}

// as many columns as give a square, and no picture larger than it deserves
export function columns(gallery, num) {
  const count = num <= 1 ? 1 : num <= 4 ? 2 : num <= 9 ? 3 : num <= 16 ? 4 : 6, place = gallery.parentElement ?? gallery;
  place.style.setProperty("--columns", count);
  gallery.classList.toggle("dense", count === 6);
  place.style.setProperty("--widest", `${{ 1: 460, 2: 680, 3: 820, 4: 960, 6: 1080 }[count]}px`);
}

function waitingTile(name, seed) {
  const canvas = h("canvas", { width: 1, height: 1, "aria-hidden": "true" }), frame = h("div.frame", {}, canvas);
  const caption = h("figcaption.caption", {}, h("span", {}, name ?? ""), h("span.note", {}, `seed ${seed}`));
  const element = h("figure.tile", {}, frame, caption);
  return {
    element, canvas, frame,
    finish(picture, use) {
      const first = picture.tokens?.discriminative ? "discriminative" : "vq", tokens = picture.tokens?.[first];
      const maps = tokens ? ["map", "mini"].map((kind) => h(`canvas.${kind}`, { width: 1, height: 1, "aria-hidden": "true" })) : [];
      palettes().then(() => maps.forEach((map) => paint(map, tokens, first)), () => {});
      frame.replaceChildren(h("img.new", { src: picture.image, alt: picture.title, width: state.about.size, height: state.about.size }), maps[0] ?? "");
      caption.replaceChildren(h("span.name", {}, maps[1] ?? "", picture.name ?? ""), h("button", { type: "button", title: "use this seed", "aria-label": `use seed ${picture.seed}`, onclick: use }, `seed ${picture.seed}`));
      element.append(sends(picture));
    },
  };
}

// shows the tokens so far, and where the server sent them, the unfinished pixels of decided cells
function grow(tiles, data, work) {
  const name = data.stage === "prior" ? "discriminative" : state.about.tokenizers.vq ? "vq" : "discriminative";
  showStage(work, data);
  if (!state.about.tokenizers[name]) return;
  data.tokens.forEach((tokens, row) => {
    const canvas = tiles[data.first + row]?.canvas;
    if (!canvas) return;
    if (data.stage === "prior" || data.sheet || tokens.some((t) => t >= 0)) {
      if (canvas.dataset.sheet) paintOver(canvas, tokens, name); else if (data.stage === "prior") paint(canvas, tokens, name); else paintFine(canvas, tokens, name);
    }
  });
  if (data.sheet) growPixels(tiles, data, name);
}

// VQ colours over the coarser map that is there already
function paintFine(canvas, tokens, name) {
  const [rows, columns] = state.about.tokenizers[name].grid;
  if (canvas.width !== columns || canvas.height !== rows) {
    const old = document.createElement("canvas");
    old.width = canvas.width; old.height = canvas.height;
    old.getContext("2d").drawImage(canvas, 0, 0);
    canvas.width = columns; canvas.height = rows;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(old, 0, 0, columns, rows);
  }
  paint(canvas, tokens, name, false);
}

function paintOver(canvas, tokens, name) {
  const [rows, columns] = state.about.tokenizers[name].grid, size = state.about.size, shown = Number(canvas.dataset.sheet);
  const context = canvas.getContext("2d"), w = size / columns, t = size / rows;
  tokens.forEach((token, place) => {
    if (token < 0 || place < shown) return;
    context.fillStyle = colour(name, token);
    context.fillRect((place % columns) * w, Math.floor(place / columns) * t, w, t);
  });
}

function growPixels(tiles, data, name) {
  const image = new Image(), size = state.about.size, [rows, columns] = state.about.tokenizers[name].grid;
  image.onload = () => data.rows.forEach((row, place) => {
    const canvas = tiles[data.first + row]?.canvas, tokens = data.tokens[row];
    if (!canvas?.isConnected) return;
    const decided = tokens.findIndex((t) => t < 0), until = decided < 0 ? tokens.length : decided;
    if (until < Number(canvas.dataset.sheet ?? 0)) return;
    if (canvas.width !== size) {
      const old = document.createElement("canvas");
      old.width = canvas.width; old.height = canvas.height;
      old.getContext("2d").drawImage(canvas, 0, 0);
      canvas.width = canvas.height = size;
      const context = canvas.getContext("2d");
      context.imageSmoothingEnabled = false;
      context.drawImage(old, 0, 0, size, size);
    }
    canvas.dataset.sheet = until;
    const context = canvas.getContext("2d"), w = size / columns, t = size / rows;
    for (let cell = 0; cell < until; cell++) {
      const x = (cell % columns) * w, y = Math.floor(cell / columns) * t;
      context.drawImage(image, place * size + x, y, w, t, x, y, w, t);
    }
  });
  image.src = data.sheet;
}

// ---------------------------------------------------------------- classes

async function examples() {
  for await (const { kind, data } of job("/api/examples")) if (kind === "examples") state.examples = data;
}

function classPicker(chosen, change) {
  const about = state.about, names = about.classes.length ? about.classes : Array.from({ length: about.num_classes }, (_, i) => String(i));
  const found = state.examples, list = h("div.classes", { role: "group", "aria-label": "Classes" });
  const all = [...names.map((name, label) => ({ name, label })), ...(about.unlabelled ? [{ name: "no class", label: -1 }] : [])];
  const show = (filter) => {
    const matching = all.filter((c) => c.name.toLowerCase().includes(filter.toLowerCase()));
    const shown = [...matching.filter((c) => chosen.includes(c.label)), ...matching.filter((c) => !chosen.includes(c.label))].slice(0, 120);
    list.replaceChildren(...(all.length > 120 ? shown : matching).map(({ name, label }) => {
      const place = found?.labels.indexOf(label) ?? -1, count = found?.labels.length ?? 1;
      const thumb = found?.sheet && place >= 0 ? h("div.thumb", { css: { "background-image": `url(${found.sheet})`, "background-size": `${count * 100}% 100%`, "background-position": `${count > 1 ? (100 * place) / (count - 1) : 0}% 0` } }) : about.data && found === undefined && all.length <= 120 ? h("div.thumb") : "";
      return h("button", { type: "button", "aria-pressed": String(chosen.includes(label)), title: name, onclick: () => {
        chosen = chosen.includes(label) ? chosen.filter((k) => k !== label) : [...chosen, label];
        change(chosen); show(search?.value ?? ""); head();
      } }, thumb, name);
    }));
  };
  const search = all.length > 24 ? h("input", { type: "search", id: "class-search", placeholder: "search", "aria-label": "Search classes", oninput: () => show(search.value) }) : undefined;
  const text = h("p.label"), none = h("button.quiet", { type: "button", onclick: () => { chosen = []; change(chosen); show(search?.value ?? ""); head(); } }, "All");
  const head = () => { text.textContent = chosen.length ? `Class: ${plural(chosen.length, "chosen", "chosen")}, in turn` : "Class: every one in turn"; none.hidden = !chosen.length; };
  show(""); head();
  return h("div", {}, h("div.row.between", {}, text, none), search ?? "", list);
}

// ---------------------------------------------------------------- pictures from outside

export async function upload(file) {
  const response = await fetch("/api/picture", { method: "POST", headers: { "content-type": "application/octet-stream", "x-studio-page": page }, body: file });
  if (!response.ok) await failed(response);
  const data = await response.json();
  return { ...data, title: file.name || "picture", name: file.name };
}

async function dropped(file) {
  try {
    const picture = await upload(file), found = picture.settings;
    if (found?.kind === "draw" && part() === "draw") {
      restore(found);
      navigate();
      const note = picture.same_model ? "Its settings are back: Draw makes the same picture." : "Its settings are back, as far as this run takes them; another model made it.";
      document.querySelector(".progress")?.replaceChildren(h("p.note", { role: "status" }, note));
      return;
    }
    state.picture = picture;
    if (["complete", "tokens", "stability"].includes(part())) navigate(); else location.hash = "#tokens";
  } catch (error) {
    say(error.message);
    (document.querySelector(".progress") ?? $("view")).prepend(h("p.error", { role: "alert" }, error.message));
  }
}

addEventListener("dragover", (event) => { event.preventDefault(); $("drop").hidden = false; });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
addEventListener("drop", (event) => {
  event.preventDefault(); $("drop").hidden = true;
  const file = event.dataTransfer.files[0];
  if (file) dropped(file);
});
addEventListener("paste", (event) => { const file = [...(event.clipboardData?.files ?? [])][0]; if (file) dropped(file); });

// ---------------------------------------------------------------- navigation

const PARTS = { draw: drawPart, complete: "./complete.js", tokens: "./tokens.js", stability: "./stability.js", judge: "./judge.js", runs: "./runs.js" };
const part = () => (location.hash.slice(1) in PARTS ? location.hash.slice(1) : available("draw") ? "draw" : "tokens");
const title = (name) => `${name[0].toUpperCase()}${name.slice(1)}`;
const nothing = (name) => [h("h2", {}, title(name)), h("div.empty.section", {}, h("p", {}, reason(name)))];
let leave = () => {};
export const onLeave = (call) => { leave = call; };

async function navigate(event) {
  const name = part();
  leave(); leave = () => {}; window.onkeydown = null;
  for (const link of document.querySelectorAll("#tabs a")) {
    if (link.hash === "#" + name) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  document.title = `${title(name)} · DiGIT studio`;
  const make = reason(name) ? () => nothing(name) : typeof PARTS[name] === "string" ? (await import(PARTS[name])).default : PARTS[name];
  if (part() !== name) return;
  $("view").replaceChildren(...make());
  if (event) { $("view").focus({ preventScroll: true }); scrollTo(0, 0); }
}

function theme() {
  const order = ["", "light", "dark"], names = { "": "automatic", light: "light", dark: "dark" };
  let now = "";
  try { now = localStorage.getItem("theme") ?? ""; } catch { /* no storage */ }
  const show = () => {
    if (now) document.documentElement.dataset.theme = now; else delete document.documentElement.dataset.theme;
    $("theme").textContent = `Colours: ${names[now] ?? names[""]}`;
  };
  $("theme").onclick = () => { now = order[(order.indexOf(now) + 1) % 3]; try { localStorage.setItem("theme", now); } catch { /* no storage */ } show(); };
  show();
}

async function begin() {
  theme();
  try {
    const about = (state.about = await get("/api/about"));
    $("run").replaceChildren("run ", h("b", {}, about.run), about.read_only ? " · read-only" : "");
    $("about").textContent = `DiGIT ${about.version} on ${about.device}, ${about.size} × ${about.size} pixels, recipe ${about.recipe ?? "of the released weights"}. The page and all its parts come from this machine.`;
    for (const link of document.querySelectorAll("#tabs a")) link.classList.toggle("nothing", !available(link.hash.slice(1)));
    if (!(location.hash.slice(1) in PARTS)) history.replaceState(null, "", "#" + part());
    addEventListener("hashchange", navigate);
    await navigate();
    document.documentElement.dataset.ready = String(Math.round(performance.now())); // ms, for whoever measures
  } catch (error) {
    $("view").replaceChildren(h("p.error", { role: "alert" }, `${error.message}. Load the page again once the studio runs.`));
  }
}
begin();
