"use strict";
/* Tables marked data-sortable: a click on a heading sorts by it, numbers by value. Figures of which one is shown. */
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const headings = [...table.tHead.rows[0].cells];
  const key = (row, i) => {
    const cell = row.cells[i];
    const value = Number(cell.dataset.value ?? (cell.classList.contains("num") ? cell.textContent.replace(/,/g, "") : NaN));
    return Number.isNaN(value) ? cell.textContent : value;
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  headings.forEach((heading, i) => {
    const sort = () => {
      const sign = heading.getAttribute("aria-sort") === "descending" ? 1 : -1;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].sort((a, b) => sign * compare(key(a, i), key(b, i)));
      table.tBodies[0].append(...rows);
    };
    heading.replaceChildren(miPipe.el("button", { type: "button", onclick: sort }, heading.textContent));
  });
}

/* data-either: several figures of one thing; buttons choose which is shown, named by data-choice or the unit of the
   heatmap. Without a script all are shown. */
for (const group of document.querySelectorAll("[data-either]")) {
  const figures = [...group.querySelectorAll(":scope > .figure")];
  const choose = (chosen) => figures.forEach((figure, i) => {
    figure.classList.toggle("is-away", i !== chosen);
    [...figure.querySelector(".choices").children].forEach((button, j) => button.setAttribute("aria-pressed", String(j === chosen)));
  });
  figures.forEach((figure) => figure.querySelector("h3").after(miPipe.el("div", { class: "choices", role: "group", "aria-label": "Shown as" },
    ...figures.map((other, i) => miPipe.el("button", { type: "button", onclick: () => { choose(i); figures[i].querySelectorAll(".choices button")[i].focus(); } },
      (other.dataset.choice ?? other.querySelector(".scale").lastChild.textContent).trim())))));
  choose(0);
}
