"use strict";
/* The attention viewer: one matrix for the chosen head, small ones for its neighbours, and the prompt to read. */
(() => {
  const { el, visible, number, load } = miPipe;
  const by = (id) => document.getElementById(id);
  const view = miPipe.json("attention-view"), FULL = 65535;
  const now = { task: 0, prompt: 0, layer: 0, head: 0 };
  let heads = [], token = null, kept = null, spans = [];

  const task = () => view.tasks[now.task];
  const labels = () => task().prompts[now.prompt];
  /** Attention from `query` to `key` in a head's packed lower triangle. */
  const at = (head, query, key) => (key > query ? null : head[(query * (query + 1)) / 2 + key] / FULL);

  function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const data = new DataView(bytes.buffer);
    return Uint16Array.from({ length: bytes.length / 2 }, (_, i) => data.getUint16(2 * i, true));
  }

  function fill(id, texts, value) {
    by(id).replaceChildren(...texts.map((text, i) => el("option", { value: i }, text)));
    by(id).value = String(value);
  }

  async function show() {
    const place = `${task().key}/p${now.prompt}-${now.layer}`;
    const found = await load(place);
    if (place !== `${task().key}/p${now.prompt}-${now.layer}`) return;
    heads = found.map(unpack);
    now.head = Math.min(now.head, heads.length - 1);
    drawHeads();
    drawHead();
    document.body.classList.add("is-ready");
  }

  function drawHeads() {
    by("heads").replaceChildren(...heads.map((head, i) => {
      const button = el("button", { type: "button", role: "radio", "data-head": i, onclick: () => { now.head = i; drawHead(); } }, thumbnail(head), `${now.layer}.${i}`);
      button.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (!step) return;
        event.preventDefault();
        now.head = (i + step + heads.length) % heads.length;
        drawHead();
        by("heads").children[now.head].focus();
      });
      return button;
    }));
  }

  function thumbnail(head) {
    const n = labels().length, canvas = el("canvas", { width: n, height: n, "aria-hidden": "true" });
    const pen = canvas.getContext("2d"), image = pen.createImageData(n, n), colour = miPipe.colours(view);
    for (let q = 0; q < n; q++) for (let k = 0; k <= q; k++) image.data.set([...colour(at(head, q, k)), 255], 4 * (q * n + k));
    pen.putImageData(image, 0, 0);
    return canvas;
  }

  function drawHead() {
    const n = labels().length, texts = labels().map(visible), head = heads[now.head];
    [...by("heads").children].forEach((button, i) => {
      button.setAttribute("aria-checked", String(i === now.head));
      button.tabIndex = i === now.head ? 0 : -1;
    });
    by("which").textContent = `Layer ${now.layer}, head ${now.head}`;
    const values = texts.map((_, q) => texts.map((_, k) => at(head, q, k)));
    const matrix = { ...view, rows: texts, columns: texts, values, low: 0, high: 1, row_title: "from", column_title: "to", value_title: "attention" };
    miPipe.heatmap(by("matrix"), matrix, { square: true, cell: n > 40 ? 16 : 26, label: `Attention of layer ${now.layer} head ${now.head}. Arrow keys move between cells.`,
      onmove: (place) => point(place ? place[by("way").value === "query" ? 0 : 1] : kept), onpick: (row, column) => keep(by("way").value === "query" ? row : column) });
    drawText();
    miPipe.state.set({ task: task().name, prompt: now.prompt, layer: now.layer, head: now.head });
  }

  function drawText() {
    spans = labels().map((text, i) => el("span", { class: "token", tabindex: 0, role: "button", onpointerenter: () => point(i), onpointerleave: () => point(kept),
      onfocus: () => point(i), onclick: () => keep(i), onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); keep(i); } } }, visible(text)));
    by("text").replaceChildren(...spans);
    point(kept != null && kept < spans.length ? kept : spans.length - 1);
  }

  function keep(i) { kept = kept === i ? null : i; point(i); }

  /** Colour the prompt by the attention from (or to) one token. */
  function point(i) {
    if (i == null) i = spans.length - 1;
    token = i;
    const isQuery = by("way").value === "query", head = heads[now.head];
    let best = [null, -1];
    spans.forEach((span, other) => {
      const value = isQuery ? at(head, token, other) : at(head, other, token);
      span.style.background = value ? `rgba(var(--fire), ${(0.9 * Math.sqrt(value)).toFixed(3)})` : "";
      span.title = value == null ? "" : `${number(value)} ${isQuery ? "of the attention" : "of its attention"}, position ${other}`;
      span.classList.toggle("is-chosen", other === token);
      span.classList.toggle("is-kept", other === kept);
      if (value > best[1]) best = [other, value];
    });
    const named = (place) => `“${visible(labels()[place].trim() || labels()[place])}”`;
    by("reading-title").textContent = isQuery
      ? `${named(token)} looks most at ${named(best[0])} (${number(best[1])})`
      : `${named(token)} is looked at most by ${named(best[0])} (${number(best[1])})`;
  }

  function choose(name, value) {
    now[name] = value;
    if (name === "task") { now.prompt = 0; now.layer = Math.min(now.layer, task().n_layers - 1); fillAll(); }
    if (name !== "layer") kept = null;
    show();
  }

  function fillAll() {
    fill("task", view.tasks.map((item) => item.name), now.task);
    fill("prompt", task().prompts.map((texts, i) => `${i}: ${visible(texts.join("")).trim().slice(0, 60)}`), now.prompt);
    fill("layer", Array.from({ length: task().n_layers }, (_, i) => String(i)), now.layer);
  }

  if (!view.tasks.length) return;
  const wanted = miPipe.state.get(), whole = (name, n) => Math.min(Math.max(parseInt(wanted.get(name) || "0", 10) || 0, 0), n - 1);
  now.task = Math.max(view.tasks.findIndex((item) => item.name === wanted.get("task")), 0);
  now.prompt = whole("prompt", task().prompts.length);
  now.layer = whole("layer", task().n_layers);
  now.head = whole("head", task().n_heads);
  fillAll();
  for (const name of ["task", "prompt", "layer"]) by(name).addEventListener("change", (event) => choose(name, Number(event.target.value)));
  by("way").addEventListener("change", () => point(token));
  show();
})();
