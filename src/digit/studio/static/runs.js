// Runs: every run of the folder, two of them side by side, and fits that start, stop and continue.

import { get, h, onLeave, plural, post, state, svg } from "./app.js";

const bytes = (count) => { let power = 0; while (count >= 1024 && power < 4) { count /= 1024; power++; } return `${count.toFixed(power ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`; };
const duration = (seconds) => lasting(Math.round(seconds));
const lasting = (s) => (s >= 3600 ? `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min` : s >= 60 ? `${Math.floor(s / 60)} min ${s % 60} s` : `${s} s`);
const STOPPED = [null, 0, 130, 143]; // exit statuses of a fit that did not fail

// how long a run will still train, in words; empty where nobody knows
function left(run) {
  const parts = run.left !== null && run.current ? [`${run.current}: about ${duration(run.left)} left`] : [];
  const whole = run.whole?.seconds ? `${run.whole.unknown.length ? "at least" : "about"} ${duration(run.whole.seconds)}` : "";
  const others = run.whole?.unknown.length ? `, beside ${run.whole.unknown.join(", ")}, whose time is not known yet` : "";
  if (whole && (!run.at_work || run.left === null || run.whole.seconds > run.left + 1 || others)) parts.push(`${run.at_work ? "the whole training" : "still to train"}: ${whole}${others}`);
  return parts.join("; ");
}

// how the model that trains, or was trained last, grew
function strip(run) {
  const name = run.previews.at(-1), model = name?.replace("_growth.png", "").replaceAll("_", " ");
  return name ? h("figure.grown", {}, h("img", { src: `/api/runs/${run.name}/previews/${name}?${Math.floor(run.changed)}`, alt: `how the ${model} of ${run.name} grew, oldest above`, loading: "lazy" }), h("figcaption.note", {}, `how the ${model} grew`)) : "";
}

// a fit that was started here and has no folder yet, or failed before it had one
const beginning = (run) => h("article.card.stack", { "aria-label": run.name }, h("div.row", {}, h("h3", {}, run.name), h(run.ended === null ? "span.tag.live" : "span.tag", {}, run.ended === null ? "begins" : "ended")),
  h("p.mono" + (STOPPED.includes(run.ended) ? ".note" : ".error"), {}, run.message || "no message yet"));
const COLOURS = ["var(--accent)", "var(--signal)", "var(--strong)", "var(--bad)"];

export default function runs() {
  const list = h("div.runs"), problem = h("div", { role: "alert" }), compared = h("section.section", { "aria-label": "Two runs side by side" });
  const losses = {}; // by run, read again where it has changed
  let chosen = [], timer, gone = false, shown = "";
  onLeave(() => { gone = true; clearTimeout(timer); });

  async function refresh() {
    clearTimeout(timer);
    try {
      const data = await get("/api/runs");
      if (gone) return;
      problem.replaceChildren();
      const key = JSON.stringify([data.runs, data.starting]);
      if (key !== shown) {
        shown = key;
        const cards = [...data.starting.map(beginning), ...await Promise.all(data.runs.map(card))];
        if (!gone && !list.contains(document.activeElement)) list.replaceChildren(...cards); else if (!gone) { const place = [...list.querySelectorAll("button")].indexOf(document.activeElement); list.replaceChildren(...cards); list.querySelectorAll("button")[place]?.focus(); }
        if (!cards.length) list.replaceChildren(h("p.note", {}, "There is no run in this folder yet."));
      }
      timer = setTimeout(refresh, data.runs.some((run) => run.at_work) || data.starting.some((run) => run.ended === null) ? 3000 : 15000);
    } catch (error) { problem.replaceChildren(h("p.error", {}, error.message)); timer = setTimeout(refresh, 15000); }
  }
  async function act(name, action) {
    try { await post("/api/runs/act", { name, action }); setTimeout(refresh, 1200); } catch (error) { problem.replaceChildren(h("p.error", {}, `${name}: ${error.message}`)); }
  }
  async function card(run) {
    if (losses[run.name]?.changed !== run.changed) losses[run.name] = { changed: run.changed, curves: await get(`/api/runs/${run.name}/curves`).catch(() => ({})) };
    const curves = losses[run.name].curves;
    const box = h("input", { type: "checkbox", id: `compare-${run.name}`, checked: chosen.includes(run.name), onchange: () => { chosen = box.checked ? [...chosen, run.name].slice(-2) : chosen.filter((n) => n !== run.name); list.querySelectorAll("input[type=checkbox]").forEach((other) => { other.checked = chosen.includes(other.id.slice(8)); }); compare(); } });
    const status = run.at_work ? h("span.tag.live", {}, "at work") : run.done ? h("span.tag.done", {}, Object.keys(run.metrics).length ? "done" : "trained, no report") : h("span.tag", {}, "stopped");
    const metrics = Object.entries(run.metrics).filter(([name]) => !name.endsWith("_images")).slice(0, 4).map(([name, value]) => h("li", {}, `${name.replaceAll("_", " ")} ${Number(value.toPrecision(4))}`));
    return h("article.card.run-card", { "aria-label": run.name },
      h("div.stack", {}, h("div.row", {}, h("h3", {}, run.name), status), h("p.note", {}, `recipe ${run.recipe}, ${run.data}, ${bytes(run.bytes)}`),
        h("ul.note", {}, run.stages.map((stage) => h("li", {}, `${stage.name}: ${stage.state}`))),
        left(run) ? h("p", {}, left(run)) : "",
        run.message ? h("p.mono" + (STOPPED.includes(run.ended) ? ".note" : ".error"), {}, run.message) : "",
        h("div.row", {}, run.can_stop ? h("button", { type: "button", "aria-label": `Stop ${run.name}`, onclick: () => act(run.name, "stop") }, "Stop") : "", run.can_continue ? h("button", { type: "button", "aria-label": `Continue ${run.name}`, onclick: () => act(run.name, "continue") }, "Continue") : "", box, h("label", { for: box.id }, "compare"))),
      h("div", {}, lossChart(curves), h("ul.note.metrics", {}, metrics)),
      h("div", {}, strip(run), run.pictures.includes("samples.png") ? h("img", { src: `/api/runs/${run.name}/pictures/samples.png?${Math.floor(run.changed)}`, alt: `samples of ${run.name}`, loading: "lazy" }) : run.previews.length ? "" : h("p.note", {}, "no samples yet")));
  }
  async function compare() {
    if (chosen.length < 2) { compared.replaceChildren(); return; }
    try {
      const [first, second] = chosen;
      const [data, ...curves] = await Promise.all([get(`/api/compare?first=${encodeURIComponent(first)}&second=${encodeURIComponent(second)}`), get(`/api/runs/${first}/curves`), get(`/api/runs/${second}/curves`)]);
      const table = (head, rows) => h("div.scroll", { tabindex: 0, role: "region", "aria-label": head[0] }, h("table", {}, h("thead", {}, h("tr", {}, head.map((text) => h("th", { scope: "col" }, text)))), h("tbody", {}, rows.map(([name, ...cells]) => h("tr", {}, h("th", { scope: "row" }, name), cells.map((text) => h("td", {}, text)))))));
      const names = [...new Set(data.metrics.flatMap(Object.keys))].filter((n) => !n.endsWith("_images"));
      const number = (value) => (value === undefined ? "–" : String(Number(value.toPrecision(4))));
      const both = (name) => data.pictures.every((list) => list.includes(name));
      compared.replaceChildren(h("h2", {}, `${first} and ${second}`),
        h("div.section", {}, data.differences.length ? table(["Setting", first, second], data.differences.map((d) => [d.name, d.first, d.second])) : h("p.note", {}, "No setting differs.")),
        h("div.section", {}, names.length ? table(["Figure", first, second], names.map((n) => [n.replaceAll("_", " "), number(data.metrics[0][n]), number(data.metrics[1][n])])) : ""),
        h("div.section.two", {}, curves.map((c, i) => h("figure", {}, h("h3", {}, chosen[i]), lossChart(c)))),
        ...["samples.png", "reconstructions.png", "token_map.png"].filter(both).map((name) => h("div.section.two", {}, chosen.map((run) => h("figure", {}, h("img", { src: `/api/runs/${run}/pictures/${name}`, alt: `${name.replace(".png", "").replace("_", " ")} of ${run}`, loading: "lazy" }))))));
    } catch (error) { compared.replaceChildren(h("p.error", {}, error.message)); }
  }
  refresh();
  return [h("h2", {}, "Runs"), h("p.lede", {}, "The runs beside this one, as they are now. Mark two to see in which settings they differ and what came of it."), problem, list, compared, state.about.read_only ? "" : starter(refresh)];
}

function starter(refresh) {
  const name = h("input", { type: "text", id: "new-name", required: true, pattern: "[A-Za-z0-9][A-Za-z0-9_\\-]{0,63}", autocomplete: "off" });
  const recipe = h("select", { id: "new-recipe" }, Object.keys(state.about.recipes).map((r) => h("option", { value: r }, r)));
  const note = h("p.note");
  recipe.value = "demo" in state.about.recipes ? "demo" : recipe.value;
  recipe.onchange = () => { note.textContent = state.about.recipes[recipe.value]; };
  recipe.onchange();
  const data = h("select", { id: "new-data" }, state.about.data_sets.map((d) => h("option", { value: d }, d)));
  const seed = h("input", { type: "number", id: "new-seed", min: 0, value: 0 });
  const told = h("div", { role: "status" });
  return h("details.card.section", {}, h("summary", {}, "Train another run"), h("form.stack", { onsubmit: async (event) => {
    event.preventDefault();
    try { await post("/api/runs", { name: name.value, recipe: recipe.value, data: data.value, seed: Math.floor(Number(seed.value) || 0) }); told.replaceChildren(h("p", {}, `${name.value} has begun.`)); setTimeout(refresh, 4000); } catch (error) { told.replaceChildren(h("p.error", {}, error.message)); }
  } }, h("div.row", {}, h("label", { for: "new-name" }, "Name"), name, h("label", { for: "new-recipe" }, "Recipe"), recipe, h("label", { for: "new-data" }, "Data"), data, h("label", { for: "new-seed" }, "Seed"), seed, h("button", { type: "submit" }, "Start")), note, told));
}

// losses by training step, one line a model; one chart for tokens and one for pixels, which have other units
const UNITS = [["nats per token", (c) => [c.nll ?? c.loss, c.val_nll]], ["mean absolute error of pixels, 0 to 1", (c) => [c.nll || c.loss ? undefined : c.l1, c.val_l1]]];
export function lossChart(curves) {
  const charts = UNITS.map(([unit, pick]) => [unit, Object.entries(curves).map(([name, c]) => [name, ...pick(c)]).filter(([, c]) => c?.length > 1)]).filter(([, models]) => models.length);
  return charts.length ? h("div.stack", {}, charts.map(([unit, models]) => oneChart(unit, models))) : h("p.note", {}, "no losses yet");
}

function oneChart(unit, models) {
  const W = 360, H = 170, left = 44, bottom = 24, top = 10, right = 6;
  const values = models.flatMap(([, c, v]) => [...c, ...(v ?? [])].map((p) => p[1])).sort((a, b) => a - b);
  const low = values[0], high = Math.max(low + 1e-9, values[Math.floor(values.length * 0.98)]), last = Math.max(...models.flatMap(([, c]) => c.map((p) => p[0])));
  const x = (step) => left + (step / last) * (W - left - right), y = (value) => top + ((high - Math.min(value, high)) / (high - low)) * (H - top - bottom);
  const line = (points, attributes) => svg("polyline", { class: "line", points: points.map(([s, v]) => `${x(s).toFixed(1)},${y(v).toFixed(1)}`).join(" "), ...attributes });
  const parts = [low, (low + high) / 2, high].flatMap((v) => [svg("line", { class: "axis", x1: left, x2: W - right, y1: y(v), y2: y(v) }), svg("text", { x: left - 4, y: y(v) + 4, "text-anchor": "end" }, v.toPrecision(2))]);
  parts.push(svg("text", { x: left, y: H - 6 }, unit), svg("text", { x: W - right, y: H - 6, "text-anchor": "end" }, `step ${last}`));
  models.forEach(([, c, v], i) => { parts.push(line(c, { style: `stroke:${COLOURS[i % 4]};stroke-width:1.6` })); if (v?.length > 1) parts.push(line(v, { style: `stroke:${COLOURS[i % 4]};stroke-width:1.2;stroke-dasharray:4 3` })); });
  const text = models.map(([name, c]) => `${name} from ${c[0][1].toPrecision(3)} to ${c[c.length - 1][1].toPrecision(3)}`).join(", ");
  const dashed = models.some(([, , v]) => v?.length > 1) ? h("span", {}, h("i.dashed", { css: { "--c": "var(--soft)" } }), "held out") : "";
  return h("div", {}, svg("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${unit} by step: ${text}` }, ...parts), h("div.legend", {}, models.map(([name], i) => h("span", {}, h("i", { css: { "--c": COLOURS[i % 4] } }), name)), dashed));
}
