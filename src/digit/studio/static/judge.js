// Judge: the nearest training pictures beside each sample, the share recognised, and distances with their scale.

import { h, onLeave, plural, say, settings, showStage, state, stopKey, Work } from "./app.js";

const ENOUGH = 16; // pictures for a distance between distributions

export default function judge() {
  const progress = h("div.progress"), facts = h("div"), list = h("div.judged");
  const work = new Work(progress);
  onLeave(() => work.stop());
  stopKey(work);
  const busy = (on) => { go.disabled = fresh.disabled = on; stop.hidden = !on; if (!on) show_go(); };
  async function look() {
    const pictures = state.drawn.filter(Boolean).slice(0, 36);
    busy(true);
    facts.replaceChildren(); list.replaceChildren();
    const labels = pictures.map((p) => p.label ?? -1);
    const ended = await work.run("/api/judge", { pictures: pictures.map((p) => p.image), labels }, (kind, data) => {
      if (kind === "judged") show(pictures, data);
    });
    if (ended) { progress.replaceChildren(); say(`${plural(pictures.length, "picture")} judged`); }
    busy(false);
  }
  async function drawAndLook() {
    busy(true);
    const drawn = [];
    const ended = await work.run("/api/draw", { num: 16, seed: Math.floor(Math.random() * 1e6), labels: [], ...settings() }, (kind, data) => {
      if (kind === "step") showStage(work, data);
      if (kind === "picture") drawn[data.index] = { ...data, title: `${data.name ?? "picture"}, seed ${data.seed}` };
    });
    if (ended) { state.drawn = drawn; await look(); } else busy(false);
  }
  function show(pictures, data) {
    const { low, median, high } = data.scale, end = Math.max(high * 1.4, ...data.results.map((r) => r.nearest[0].distance * 1.05));
    const fact = (term, value, note) => h("div", {}, h("dt", {}, term), h("dd", {}, value, h("small", {}, note)));
    const found = [];
    if (data.recognised !== undefined) found.push(fact("Recognised", `${Math.round(100 * data.recognised)} %`, `of ${plural(pictures.length, "sample")}, by a linear classifier that is right on ${(100 * data.accuracy).toFixed(0)} % of training pictures it did not see`));
    const distances = data.results.map((r) => r.nearest[0].distance).sort((a, b) => a - b), middle = distances[Math.floor(distances.length / 2)];
    found.push(fact("To the nearest training picture", middle.toFixed(1), `in the middle; between training pictures it is ${median.toFixed(1)} (90 % lie in ${low.toFixed(1)} to ${high.toFixed(1)})`));
    const copies = distances.filter((d) => d < low / 2).length;
    found.push(fact("Possible copies", String(copies), `nearer than ${(low / 2).toFixed(1)}, half of the nearest that training pictures usually are${copies ? ": look at these" : ""}`));
    if (pictures.length < ENOUGH) found.push(fact("Fréchet distance", "–", `of ${ENOUGH} pictures or more: fewer tell nothing`));
    else if (data.distance?.value !== undefined) found.push(fact("Fréchet distance", data.distance.value.toFixed(0), `${data.distance.name}, ${data.distance.images[0]} samples against ${data.distance.images[1]} pictures; as many real pictures have ${data.distance.real.toFixed(0)}. Not an FID, and too high for so few.`));
    const key = h("p.note.key", {}, h("i.usual"), ` from ${low.toFixed(1)} to ${high.toFixed(1)}: nine of ten training pictures are so far from the nearest other one; `, h("i.dot"), " this sample; left is nearer.");
    facts.replaceChildren(h("dl.facts", {}, found), key);
    list.replaceChildren(...data.results.map((result, i) => {
      const picture = pictures[i], first = result.nearest[0].distance;
      const verdict = result.recognised === undefined ? (result.seen ? `taken for: ${result.seen}` : "") : result.recognised ? `recognised as ${result.seen} (${Math.round(100 * result.sure)} %)` : `taken for ${result.seen} (${Math.round(100 * result.sure)} %), not ${picture.name}`;
      return h("article.card", {}, h("div.four", {}, h("div", {}, h("div.frame", {}, h("img", { src: picture.image, alt: picture.title })), h("span", {}, picture.title)), result.nearest.map((near) => h("div", {}, h("div.frame", {}, h("img", { src: near.image, alt: `training picture${near.name ? ", " + near.name : ""}` })), h("span", {}, near.distance.toFixed(1))))),
        h("div.scale", { role: "img", "aria-label": `distance ${first.toFixed(1)}; between training pictures usually ${low.toFixed(1)} to ${high.toFixed(1)}` }, h("div.usual", { css: { left: `${(100 * low) / end}%`, width: `${(100 * (high - low)) / end}%` } }), h("div.dot", { css: { left: `${(100 * first) / end}%` } })),
        h("p.note", {}, verdict));
    }));
  }
  const go = h("button.main", { type: "button", onclick: look }), fresh = h("button", { type: "button", onclick: drawAndLook }, "Draw 16 and judge them");
  const stop = h("button", { type: "button", hidden: true, onclick: () => work.stop() }, "Stop");
  const show_go = () => { const n = state.drawn.filter(Boolean).length; go.textContent = n ? `Judge the ${plural(n, "picture")} drawn` : "Judge"; go.hidden = !n; fresh.className = n ? "" : "main"; };
  show_go();
  return [
    h("h2", {}, "Judge"),
    h("p.lede", {}, "Another network than the tokens' own, EfficientNet-Lite2, looks at each sample and finds the training pictures nearest to it. The band shows how far training pictures are from each other; a dot far left of it would be a copy, one far right something the data do not hold."),
    h("div.row.section", {}, go, fresh, stop), progress, facts, list,
  ];
}
