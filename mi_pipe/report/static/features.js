"use strict";
/* The feature browser: a list that is filtered and sorted here, and dashboards loaded by chunk when they are asked for. */
(() => {
  const { el, visible, number, load } = miPipe;
  const by = (id) => document.getElementById(id);
  const saes = miPipe.json("saes"), PAGE = 200;
  const list = by("features"), board = by("dashboard");
  let sae = saes[0], index = null, shown = [], chosen = null, descending = true, nShown = PAGE;

  const cut = (id, other) => (by(id).value === "" ? other : Number(by(id).value));

  function matches(i, words) {
    const show = by("show").value;
    if (show === "board" && index.place[i] < 0) return false;
    if ((show === "alive" && index.dead[i]) || (show === "dead" && !index.dead[i])) return false;
    if (index.density[i] < cut("low", -1) || index.density[i] > cut("high", 2)) return false;
    if (!words) return true;
    if (String(index.feature[i]) === words) return true;
    return [...index.tokens[i], ...index.promoted[i]].some((text) => text.toLowerCase().includes(words));
  }

  function filter() {
    const words = by("query").value.toLowerCase().trim(), column = index[by("sort").value];
    const sign = descending ? -1 : 1;
    shown = index.feature.map((_, i) => i).filter((i) => matches(i, words));
    shown.sort((a, b) => sign * ((column[a] ?? -Infinity) - (column[b] ?? -Infinity)) || a - b);
    nShown = PAGE;
    by("count").textContent = `${shown.length.toLocaleString("en")} of ${index.feature.length.toLocaleString("en")} features`;
    drawList();
  }

  function drawList() {
    list.replaceChildren(...shown.slice(0, nShown).map(entry));
    if (shown.length > nShown) {
      list.append(el("li", { class: "more", onclick: () => { nShown += PAGE; drawList(); } }, `${(shown.length - nShown).toLocaleString("en")} more`));
    }
    mark();
  }

  function entry(i) {
    const words = index.tokens[i].slice(0, 3).map((text) => el("span", { class: "token" }, visible(text)));
    const note = index.dead[i] ? "dead" : number(index.density[i]);
    return el("li", { role: "option", id: "feature-" + i, "data-i": i, class: index.place[i] < 0 ? "is-bare" : "", onclick: () => choose(i) },
      el("span", { class: "feature-number" }, String(index.feature[i])),
      el("span", { class: "feature-words" }, ...words),
      el("span", { class: "feature-density", title: "density" }, note));
  }

  function mark() {
    for (const item of list.children) item.setAttribute("aria-selected", String(Number(item.dataset.i) === chosen));
    const item = by("feature-" + chosen);
    if (item) { list.setAttribute("aria-activedescendant", item.id); item.scrollIntoView({ block: "nearest" }); }
  }

  async function choose(i) {
    chosen = i;
    mark();
    miPipe.state.set({ sae: sae.name, feature: index.feature[i] });
    if (index.place[i] < 0) return board.replaceChildren(...head(i), el("p", { class: "fine" },
      index.dead[i] ? "This feature never fired on the scored tokens." : "This feature has no dashboard in this report; the artifact holds its examples."));
    const chunk = await load(`${sae.key}/${Math.floor(index.place[i] / sae.chunk)}`);
    if (chosen === i) draw(i, chunk.dashboards[index.feature[i]], chunk.tokens);
  }

  function head(i) {
    const facts = { density: index.density[i], "largest activation": index.max[i], "mean activation": index.mean[i] };
    if (sae.hooks.length) facts["share of the decoder at " + sae.hooks.at(-1)] = index.share[i];
    const stats = Object.entries(facts).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, number(value))));
    return [el("header", { class: "of" }, el("h2", {}, "Feature " + index.feature[i]), el("code", { class: "id" }, sae.name)),
      el("dl", { class: "stats" }, ...stats)];
  }

  function draw(i, dashboard, texts) {
    const largest = index.max[i] || 1;
    const groups = new Map();
    for (const example of dashboard.examples) groups.set(example[0], [...(groups.get(example[0]) || []), example]);
    const sections = [...groups].map(([group, examples], at) => section(groupTitle(group), at < 3, examples.map((item) => line(item, texts, largest))));
    const sides = el("div", { class: "sides" }, histogram(dashboard), norms(dashboard.norms), effects("Promotes", dashboard.effects.promoted, "positive"),
      effects("Suppresses", dashboard.effects.suppressed, "negative"));
    board.replaceChildren(...head(i), sides, ...sections);
  }

  const groupTitle = (group) => (group === "top" ? "Strongest examples" : /^q\d+$/.test(group) ? `Quantile ${group.slice(1)}` : group);
  const section = (title, open, rows) => el("details", { open }, el("summary", {}, `${title} (${rows.length})`), el("ol", { class: "examples" }, ...rows));

  function line([, activation, prompt, first, peak, tokens, places, values], texts, largest) {
    const strength = new Map(places.map((place, at) => [place, values[at]]));
    const spans = tokens.map((token, at) => {
      const value = strength.get(at) || 0, text = visible(texts[token]);
      const label = `position ${first + at}, activation ${number(value)}`;
      const span = el("span", { class: "token" + (at === peak ? " is-peak" : ""), "data-tip": label }, text);
      if (value > 0) span.style.background = `rgba(var(--fire), ${(0.12 + 0.78 * Math.min(value / largest, 1)).toFixed(3)})`;
      return span;
    });
    return el("li", {}, el("span", { class: "strength", title: `prompt ${prompt}, position ${first + peak}` }, number(activation)), el("span", { class: "context" }, ...spans));
  }

  function histogram({ counts, edges }) {
    const W = 300, H = 84, top = Math.max(...counts, 1), step = W / counts.length;
    const bars = counts.map((count, i) => {
      const height = count ? Math.max((H * Math.log1p(count)) / Math.log1p(top), 1.5) : 0;
      return el("rect", { x: (i * step).toFixed(2), y: (H - height).toFixed(2), width: Math.max(step - 1, 0.5).toFixed(2), height: height.toFixed(2),
        "data-tip": `${number(edges[i])} to ${number(edges[i + 1])}: ${count.toLocaleString("en")} tokens` });
    });
    const total = counts.reduce((sum, count) => sum + count, 0);
    return el("div", {}, el("h3", {}, "Activations"),
      el("svg", { class: "bars", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `Histogram of ${total} activations from ${number(edges[0])} to ${number(edges.at(-1))}, log scale` }, ...bars),
      el("p", { class: "fine ends" }, el("span", {}, number(edges[0])), el("span", {}, "tokens, log scale"), el("span", {}, number(edges.at(-1)))));
  }

  function norms(rows) {
    if (!rows.length) return null;
    return el("div", {}, el("h3", {}, "Writes at"), el("ol", { class: "effects is-norms" }, ...rows.map(([hook, norm, share]) => {
      const bar = el("span", { class: "bar" });
      bar.style.width = 100 * (share ?? 0) + "%";
      return el("li", { title: `${hook}: decoder norm ${number(norm)}, share ${number(share ?? 0)}` },
        el("span", { class: "hook" }, hook), el("span", { class: "track" }, bar), el("span", { class: "num" }, number(norm)));
    })));
  }

  function effects(title, rows, sign) {
    if (!rows.length) return null;
    const largest = Math.max(...rows.map((row) => Math.abs(row[1])), 1e-9);
    return el("div", {}, el("h3", {}, title), el("ol", { class: "effects is-" + sign }, ...rows.slice(0, 10).map(([token, effect]) => {
      const bar = el("span", { class: "bar" });
      bar.style.width = (100 * Math.abs(effect)) / largest + "%";
      return el("li", {}, el("span", { class: "token" }, visible(token)), el("span", { class: "track" }, bar), el("span", { class: "num" }, number(effect)));
    })));
  }

  async function open(name, feature) {
    sae = saes.find((item) => item.name === name) || saes[0];
    by("sae").value = String(saes.indexOf(sae));
    by("by-share").hidden = by("by-share").disabled = !sae.hooks.length;
    if (!sae.hooks.length && by("sort").value === "share") by("sort").value = "max";
    index = await load(sae.key + "/index");
    filter();
    const wanted = feature == null ? -1 : index.feature.indexOf(Number(feature));
    if (wanted >= 0 && !shown.includes(wanted)) { by("show").value = "all"; filter(); }
    const start = wanted >= 0 ? wanted : shown.find((i) => index.place[i] >= 0);
    if (start == null) board.replaceChildren(el("p", { class: "fine" }, "No feature of this SAE has a dashboard."));
    else await choose(start);
  }

  function step(by_) {
    const at = shown.indexOf(chosen), next = Math.min(Math.max(at + by_, 0), shown.length - 1);
    if (next >= nShown) { nShown += PAGE; drawList(); }
    if (shown.length) choose(shown[next]);
  }

  for (const id of ["query", "sort", "show", "low", "high"]) by(id).addEventListener("input", filter);
  by("direction").addEventListener("click", (event) => {
    descending = !descending;
    event.currentTarget.textContent = descending ? "↓" : "↑";
    event.currentTarget.setAttribute("aria-pressed", String(descending));
    filter();
  });
  by("sae").addEventListener("change", (event) => open(saes[Number(event.target.value)].name));
  list.addEventListener("keydown", (event) => {
    const move = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
    if (move) { event.preventDefault(); step(move); }
  });
  board.addEventListener("pointerover", (event) => {
    const text = event.target.dataset && event.target.dataset.tip;
    if (text) miPipe.tip(text, event.clientX, event.clientY); else miPipe.hideTip();
  });
  board.addEventListener("pointerleave", miPipe.hideTip);
  if (saes.length) open(miPipe.state.get().get("sae"), miPipe.state.get().get("feature")).then(() => document.body.classList.add("is-ready"));
})();
