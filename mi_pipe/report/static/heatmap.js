"use strict";
/* Heatmaps on canvas with labels, a tip for each cell, and arrow keys; the static image stays where there is no script. */
(() => {
  const MAX_CELL = 64, MIN_CELL = 9, MIN_SQUARE = 4, MANY_ROWS = 16, FONT = 11;

  /** Draw `view` into `host`; `options.onpick(row, column)` on click or Enter, `onmove` on hover. */
  function heatmap(host, view, options = {}) {
    const canvas = miPipe.el("canvas", { tabindex: 0, role: "img", "aria-label": options.label || view.value_title });
    const wrap = miPipe.el("div", { class: "heatmap" }, canvas);
    host.replaceChildren(wrap, scale(view));
    const pen = canvas.getContext("2d");
    const n = { rows: view.rows.length, columns: view.columns.length };
    let cursor = null, layout = null;

    function measure() {
      pen.font = FONT + "px " + miPipe.css("--sans");
      const longest = (labels) => Math.max(0, ...labels.map((text) => pen.measureText(text).width));
      const slanted = longest(view.columns) > 18;
      const left = Math.min(longest(view.rows), 130) + 24;
      const bottom = (slanted ? Math.min(longest(view.columns), 110) * 0.87 + 10 : 16) + 18;
      const room = (host.clientWidth || 600) - left - 6;
      const width = Math.min(Math.max(Math.floor(room / n.columns), options.square ? MIN_SQUARE : MIN_CELL), options.cell || MAX_CELL);
      const height = options.square ? width : Math.min(Math.max(width, 16), n.rows > MANY_ROWS ? 18 : 32);
      layout = { left, bottom, width, height, slanted, longest: longest(view.columns), top: 4 };
      layout.w = left + width * n.columns + (slanted ? 6 : 4);
      layout.h = layout.top + height * n.rows + bottom;
    }

    function draw() {
      measure();
      const ratio = devicePixelRatio || 1, { left, top, width, height } = layout;
      canvas.width = layout.w * ratio; canvas.height = layout.h * ratio;
      canvas.style.width = layout.w + "px"; canvas.style.height = layout.h + "px";
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      const colour = miPipe.colours(view), gap = width > 12 && height > 12 ? 1 : 0;
      for (let r = 0; r < n.rows; r++) for (let c = 0; c < n.columns; c++) {
        const value = view.values[r][c];
        pen.fillStyle = value == null ? miPipe.css("--sunk") : `rgb(${colour((value - view.low) / (view.high - view.low))})`;
        pen.fillRect(left + c * width, top + r * height, width - gap, height - gap);
        if (value == null && view.hatch_missing) {
          pen.strokeStyle = miPipe.css("--muted"); pen.lineWidth = 0.5;
          pen.beginPath(); pen.moveTo(left + c * width, top + (r + 1) * height - gap);
          pen.lineTo(left + (c + 1) * width - gap, top + r * height); pen.stroke();
        }
      }
      labels();
      if (cursor) {
        pen.strokeStyle = miPipe.css("--accent"); pen.lineWidth = 2;
        pen.strokeRect(left + cursor[1] * width - 0.5, top + cursor[0] * height - 0.5, width, height);
      }
    }

    function labels() {
      const { left, top, width, height, slanted, w, h } = layout;
      pen.font = FONT + "px " + miPipe.css("--sans"); pen.fillStyle = miPipe.css("--muted");
      pen.textBaseline = "middle"; pen.textAlign = "right";
      const every = (size, needed) => Math.max(1, Math.ceil(needed / size));
      const rowStep = every(height, 12), columnStep = every(width, slanted ? 12 : layout.longest + 4);
      for (let r = 0; r < n.rows; r += rowStep) pen.fillText(view.rows[r], left - 6, top + (r + 0.5) * height, left - 22);
      for (let c = 0; c < n.columns; c += columnStep) {
        pen.save();
        pen.translate(left + (c + 0.5) * width, top + n.rows * height + 9);
        if (slanted) pen.rotate(-Math.PI / 3); else pen.textAlign = "center";
        pen.fillText(view.columns[c], 0, 0, 118);
        pen.restore();
      }
      pen.textAlign = "center"; pen.globalAlpha = 0.85;
      pen.fillText(view.column_title, left + (n.columns * width) / 2, h - 7);
      pen.save(); pen.translate(8, top + (n.rows * height) / 2); pen.rotate(-Math.PI / 2);
      pen.fillText(view.row_title, 0, 0); pen.restore(); pen.globalAlpha = 1;
    }

    function cell(event) {
      const area = canvas.getBoundingClientRect();
      const c = Math.floor((event.clientX - area.left - layout.left) / layout.width);
      const r = Math.floor((event.clientY - area.top - layout.top) / layout.height);
      return r >= 0 && r < n.rows && c >= 0 && c < n.columns ? [r, c] : null;
    }
    function text([r, c]) {
      const value = view.values[r][c];
      return `${view.row_title} ${view.rows[r]}, ${view.column_title} ${view.columns[c]}\n` +
        `${view.value_title} ${value == null ? "not measured" : miPipe.number(value)}`;
    }
    function move(place, x, y) {
      if (String(place) === String(cursor)) { if (place) miPipe.tip(text(place), x, y); return; }
      cursor = place;
      draw();
      if (!place) miPipe.hideTip(); else miPipe.tip(text(place), x, y);
      if (options.onmove) options.onmove(place);
    }
    canvas.addEventListener("pointermove", (event) => move(cell(event), event.clientX, event.clientY));
    canvas.addEventListener("pointerleave", () => move(null));
    canvas.addEventListener("blur", () => move(null));
    canvas.addEventListener("click", (event) => { const at = cell(event); if (at && options.onpick) options.onpick(...at); });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (event.key === "Enter" && cursor && options.onpick) options.onpick(...cursor);
      if (event.key === "Escape") move(null);
      if (!step) return;
      event.preventDefault();
      const [r, c] = cursor ? [cursor[0] + step[0], cursor[1] + step[1]] : [0, 0];
      const place = [Math.min(Math.max(r, 0), n.rows - 1), Math.min(Math.max(c, 0), n.columns - 1)];
      const area = canvas.getBoundingClientRect();
      move(place, area.left + layout.left + (place[1] + 1) * layout.width, area.top + (place[0] + 1) * layout.height);
    });
    draw();
    let width = host.clientWidth;
    new ResizeObserver(() => { if (host.clientWidth !== width) { width = host.clientWidth; draw(); } }).observe(host);
    miPipe.dark.addEventListener("change", draw);
    return { draw, canvas };
  }

  /** Return the colour bar of a view with its two ends, and 0 for maps that diverge. */
  function scale(view) {
    const bar = miPipe.el("canvas", { width: 180, height: 1, "aria-hidden": "true" });
    const paint = () => {
      const pen = bar.getContext("2d"), colour = miPipe.colours(view);
      for (let x = 0; x < 180; x++) { pen.fillStyle = `rgb(${colour(x / 179)})`; pen.fillRect(x, 0, 1, 1); }
    };
    paint();
    miPipe.dark.addEventListener("change", paint);
    return miPipe.el("div", { class: "scale" }, miPipe.number(view.low), bar, miPipe.number(view.high), " " + view.value_title);
  }

  for (const host of document.querySelectorAll("[data-heatmap]")) {
    const image = host.querySelector("img");
    heatmap(host, miPipe.json(host.dataset.heatmap), { label: image.alt + " Arrow keys move between cells." });
  }
  miPipe.heatmap = heatmap;
})();
