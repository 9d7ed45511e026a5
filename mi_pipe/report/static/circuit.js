"use strict";
/* Circuit drawings: pointing at or choosing a node or an edge brings out what belongs to it, and lists the edges. */
for (const drawing of document.querySelectorAll("[data-circuit]")) {
  const { el, number } = miPipe;
  const edges = miPipe.json(drawing.dataset.circuit);
  const paths = [...drawing.querySelectorAll(".edge")], nodes = [...drawing.querySelectorAll(".node")];
  const listing = drawing.closest("figure").querySelector("[data-edges]");
  let chosen = null;

  const touches = (edge, name) => edge.source === name || edge.target === name;

  /** Bring out the edges for which `test` is true, and the nodes at their ends. */
  function bring(test) {
    const names = new Set();
    edges.forEach((edge, i) => {
      const on = test ? test(edge, i) : false;
      paths[i].classList.toggle("is-on", on);
      if (on) { names.add(edge.source); names.add(edge.target); }
    });
    drawing.classList.toggle("is-choosing", Boolean(test));
    for (const node of nodes) node.classList.toggle("is-on", names.has(node.dataset.node));
  }

  function tell(name) {
    const found = edges.filter((edge) => touches(edge, name)).sort((a, b) => Math.abs(b.score) - Math.abs(a.score));
    const row = (edge) => el("li", {}, el("span", { class: "key is-" + edge.part }), ` ${edge.source} → ${edge.target}${edge.how ? " (" + edge.how + ")" : ""} `, el("span", { class: "num" }, number(edge.score)));
    const part = (title, rows) => rows.length ? el("div", {}, el("h3", {}, title), el("ol", {}, ...rows.map(row))) : null;
    listing.replaceChildren(...[part(`Into ${name}`, found.filter((edge) => edge.target === name)), part(`Out of ${name}`, found.filter((edge) => edge.source === name))].filter(Boolean));
    listing.hidden = false;
  }

  function choose(name) {
    chosen = chosen === name ? null : name;
    for (const node of nodes) node.setAttribute("aria-pressed", String(node.dataset.node === chosen));
    if (chosen) { tell(chosen); bring((edge) => touches(edge, chosen)); } else { listing.hidden = true; bring(null); }
  }
  const rest = () => bring(chosen ? (edge) => touches(edge, chosen) : null);

  for (const node of nodes) {
    const name = node.dataset.node;
    node.addEventListener("pointerenter", () => bring((edge) => touches(edge, name)));
    node.addEventListener("pointerleave", rest);
    node.addEventListener("focus", () => bring((edge) => touches(edge, name)));
    node.addEventListener("blur", rest);
    node.addEventListener("click", () => choose(name));
    node.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(name); }
      if (event.key === "Escape" && chosen) choose(chosen);
    });
  }
  paths.forEach((path, i) => {
    path.querySelector("title").remove();
    path.addEventListener("pointermove", (event) => {
      const edge = edges[i];
      bring((_, other) => other === i);
      miPipe.tip(`${edge.source} → ${edge.target}${edge.how ? " (" + edge.how + ")" : ""}\nscore ${number(edge.score)}`, event.clientX, event.clientY);
    });
    path.addEventListener("pointerleave", () => { miPipe.hideTip(); rest(); });
  });
}
