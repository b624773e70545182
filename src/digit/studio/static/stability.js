// Stability: add noise and see which tokens change, for both tokenizers; the curve of the run beneath (paper, Table 1).

import { h, lines, onLeave, say, state, svg, Work } from "./app.js";
import { firstPicture, picker } from "./picker.js";

const NAMES = { discriminative: "discriminative", vq: "VQ" };
const COLOURS = { discriminative: "var(--accent)", vq: "var(--signal)" };
let snr = 25, seed = 0;

export default function stability() {
  const boards = h("div.boards"), progress = h("div.progress"), curve = h("div"), after = h("div");
  const work = new Work(progress), curveWork = new Work(curve);
  let waiting, measured;
  onLeave(() => { clearTimeout(waiting); work.stop(); curveWork.stop(); });

  async function noise() {
    if (!state.picture) return;
    await work.run("/api/noise", { picture: state.picture.image, snr, seed }, (kind, data) => {
      if (kind !== "noisy") return;
      progress.replaceChildren();
      const names = Object.keys(data.tokens).sort();
      boards.replaceChildren(...names.map((name) => {
        const { clean, noisy } = data.tokens[name], [rows, columns] = state.about.tokenizers[name].grid;
        const changed = clean.filter((t, i) => t !== noisy[i]).length;
        const cells = h("div.cells", { "aria-hidden": "true", css: { "grid-template-columns": `repeat(${columns}, 1fr)`, "grid-template-rows": `repeat(${rows}, 1fr)` } }, clean.map((t, i) => h(t === noisy[i] ? "i" : "i.changed")));
        return h("figure", {}, h("h3", {}, name === "vq" ? "VQ tokens" : "Discriminative tokens"), h("div.board", {}, h("img", { src: data.image, alt: `the picture with noise, ${changed} of ${clean.length} tokens changed` }), cells), h("figcaption", {}, h("span.count", { css: { color: COLOURS[name] } }, `${Math.round((100 * changed) / clean.length)} %`), h("span.note", {}, ` changed: ${changed} of ${clean.length}`)));
      }));
      say(names.map((name) => `${NAMES[name]}: ${data.tokens[name].clean.filter((t, i) => t !== data.tokens[name].noisy[i]).length} of ${data.tokens[name].clean.length} changed`).join(", "));
      after.replaceChildren(lines(data.commands));
    });
  }
  const later = () => { clearTimeout(waiting); waiting = setTimeout(noise, 120); };
  const slider = h("input", { type: "range", id: "snr", min: -40, max: 5, step: 1, value: -snr, oninput: () => { snr = -Number(slider.value); show(); later(); } });
  const value = h("output", { for: "snr" });
  const show = () => {
    value.textContent = `${snr} dB`;
    slider.setAttribute("aria-valuetext", `signal-to-noise ratio ${snr} decibels`);
    if (measured) curve.replaceChildren(...chart(measured, snr));
  };
  show();
  async function curveOf() {
    await curveWork.run("/api/curve", undefined, (kind, data) => { if (kind === "curve") { measured = data; curve.replaceChildren(...chart(measured, snr)); } });
  }
  const bar = picker(noise);
  firstPicture().then(() => { bar.show(); noise(); if (state.about.data || state.about.stability) curveOf(); }, (error) => progress.replaceChildren(h("p.error", {}, error.message)));
  return [
    h("h2", {}, "Stability"),
    h("p.lede", {}, "A model that writes token by token cannot take one back. So the tokens of a picture should stay the same when the picture hardly changes. The paper finds that discriminative tokens do, and VQ tokens do not. " + (Object.keys(state.about.tokenizers).length > 1 ? "Add noise, and see whether it holds here" : `This run has ${"vq" in state.about.tokenizers ? "VQ" : "discriminative"} tokens alone. Add noise`) + ": cells that light up have changed their token."),
    bar,
    h("div.row.section", {}, h("div", { css: { flex: "1 1 18rem" } }, h("div.row.between", {}, h("label", { for: "snr" }, "Noise: little to much (signal-to-noise ratio)"), value), slider), h("button", { type: "button", onclick: () => { seed += 1; noise(); } }, "Other noise")),
    progress,
    h("div.beside", {}, boards, h("section", { "aria-label": "The curve" }, h("h3", {}, "Share of tokens that change"), curve)),
    after,
  ];
}

export function chart(data, now) {
  const W = 560, H = 330, left = 54, right = 14, top = 12, bottom = 54;
  const all = [...data.snrs, ...(data.paper?.snrs ?? [])], low = Math.min(0, ...all), high = Math.max(...all);
  const x = (value) => left + ((high - value) / (high - low)) * (W - left - right), y = (share) => top + (1 - share) * (H - top - bottom);
  const line = (xs, ys, attributes) => svg("polyline", { class: "line", points: xs.map((v, i) => [v, ys[i]]).sort((a, b) => b[0] - a[0]).map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" "), ...attributes });
  const parts = [];
  for (const share of [0, 0.25, 0.5, 0.75, 1]) parts.push(svg("line", { class: "axis", x1: left, x2: W - right, y1: y(share), y2: y(share) }), svg("text", { x: left - 6, y: y(share) + 4, "text-anchor": "end" }, `${100 * share} %`));
  for (const value of [30, 25, 20, 15, 10, 5, 0].filter((v) => v <= high && v >= low)) parts.push(svg("text", { x: x(value), y: H - 34, "text-anchor": "middle" }, String(value)));
  parts.push(svg("text", { x: (left + W) / 2, y: H - 10, "text-anchor": "middle" }, "signal-to-noise ratio (dB): more noise to the right"));
  for (const name of Object.keys(data.curves)) parts.push(line(data.snrs, data.curves[name], { style: `stroke:${COLOURS[name] ?? "currentColor"}` }));
  for (const name of Object.keys(data.paper?.curves ?? {})) parts.push(line(data.paper.snrs, data.paper.curves[name], { style: `stroke:${COLOURS[name]};stroke-dasharray:5 4;stroke-width:1.4;opacity:.85` }));
  if (now <= high && now >= low) parts.push(svg("line", { class: "now", x1: x(now), x2: x(now), y1: top, y2: H - bottom }));
  const summary = Object.entries(data.curves).map(([name, values]) => `${NAMES[name] ?? name}: ${data.snrs.map((s, i) => `${Math.round(100 * values[i])} percent at ${s} decibels`).join(", ")}`).join("; ");
  const legend = h("div.legend", {}, Object.keys(data.curves).map((name) => h("span", {}, h("i", { css: { "--c": COLOURS[name] } }), `${NAMES[name] ?? name}, this run`)), Object.keys(data.paper?.curves ?? {}).map((name) => h("span", {}, h("i.dashed", { css: { "--c": COLOURS[name] } }), `${NAMES[name] ?? name}, the paper (DINOv2 and MAGE's VQGAN, ImageNet)`)));
  const at = (xs, ys) => { // between two measured strengths of noise, on a line
    const points = xs.map((v, i) => [v, ys[i]]).sort((a, b) => a[0] - b[0]), i = points.findIndex((p) => p[0] >= now);
    if (i < 0 || now < points[0][0]) return undefined;
    if (i === 0) return points[0][1];
    const [[a, u], [b, v]] = [points[i - 1], points[i]];
    return u + ((now - a) / (b - a)) * (v - u);
  };
  const text = (curves, xs) => Object.entries(curves).map(([name, ys]) => [name, at(xs, ys)]).filter(([, v]) => v !== undefined).map(([name, v]) => `${Math.round(100 * v)} % of the ${NAMES[name] ?? name} tokens`).join(" and ");
  const here = text(data.curves, data.snrs), there = data.paper ? text(data.paper.curves, data.paper.snrs) : "";
  const verdict = here ? h("p.verdict", {}, `On average over pictures, at ${now} dB ${here} of this run change${there ? `; in the paper ${there}` : ""}. Its encoder is ${state.about.encoder ?? "none"}.`) : "";
  const note = data.source === "run" ? `Measured by digit stability on ${data.images} pictures.` : `Measured by this page on ${data.images} training pictures; digit stability measures it on more, with intervals.`;
  return [verdict, svg("svg", { class: "chart wide", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": summary }, ...parts), legend, h("p.note", {}, note)];
}
