"use strict";
/* What every page's script uses: data files, elements, colours, numbers, the tip. No text is ever parsed as HTML. */
const miPipe = (() => {
  const waiting = new Map();

  /** Called by a data file: hand its payload to whoever asked for it. */
  function receive(key, payload) {
    const entry = waiting.get(key);
    if (entry) entry.resolve(payload);
  }

  /** Return a promise of the payload of `data/<key>.js`; each file is loaded once. */
  function load(key) {
    if (!waiting.has(key)) {
      const entry = {};
      entry.promise = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
      waiting.set(key, entry);
      const script = document.createElement("script");
      script.src = "data/" + key.split("/").map(encodeURIComponent).join("/") + ".js";
      script.onerror = () => { waiting.delete(key); entry.reject(new Error("cannot read data/" + key + ".js")); };
      script.onload = () => script.remove();
      document.head.append(script);
    }
    return waiting.get(key).promise;
  }

  /** Return the JSON of a script element. */
  const json = (id) => JSON.parse(document.getElementById(id).textContent);

  /** Make an element; children are elements or text. */
  function el(name, attributes = {}, ...children) {
    const svg = ["svg", "rect", "path", "line", "g", "text"].includes(name);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value === true) node.setAttribute(key, "");
      else if (value !== false && value != null) node.setAttribute(key, value);
    }
    node.append(...children.filter((child) => child != null));
    return node;
  }

  const signs = { "\n": "⏎", "\t": "⇥", "\r": "␍" };
  /** Show newlines, tabs and invisible characters of a token by signs or escapes, as html.visible does. */
  const visible = (text) => text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu,
    (c) => signs[c] || "\\u" + c.codePointAt(0).toString(16).padStart(4, "0"));

  /** Write a number for reading. */
  function number(value) {
    if (value == null) return "–";
    if (Number.isInteger(value) && Math.abs(value) < 1e6) return value.toLocaleString("en");
    const size = Math.abs(value);
    return size >= 1e-3 && size < 1e6 ? String(+value.toPrecision(4)) : value.toExponential(2);
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

  /** Return a function from [0, 1] to [r, g, b], from the stops for this reader's theme. */
  function colours(view) {
    const stops = (dark.matches ? view.stops_dark : view.stops).map(channels);
    return (place) => {
      const at = Math.min(Math.max(place, 0), 1) * (stops.length - 1);
      const low = Math.min(Math.floor(at), stops.length - 2);
      return stops[low].map((value, i) => Math.round(value + (stops[low + 1][i] - value) * (at - low)));
    };
  }

  const box = () => document.getElementById("tip");
  /** Show `text` near a point of the window. */
  function tip(text, x, y) {
    const node = box();
    node.textContent = text;
    node.hidden = false;
    const left = Math.min(x + 14, innerWidth - node.offsetWidth - 8);
    const top = y + 18 + node.offsetHeight > innerHeight ? y - node.offsetHeight - 10 : y + 18;
    node.style.left = Math.max(left, 8) + "px";
    node.style.top = Math.max(top, 8) + "px";
  }
  const hideTip = () => { box().hidden = true; };

  /** Read and write the part of the address after #, as names and values. */
  const state = {
    get: () => new URLSearchParams(location.hash.slice(1)),
    set: (values) => history.replaceState(null, "", "#" + new URLSearchParams(values)),
  };
  return { receive, load, json, el, visible, number, dark, css, colours, tip, hideTip, state };
})();

/* Lineage: show what an artifact was made from and what was made of it. */
for (const box of document.querySelectorAll(".lineage .box")) {
  const mark = (on) => {
    box.classList.toggle("is-related", on);
    for (const arrow of document.querySelectorAll(".lineage .arrow")) {
      if (![arrow.dataset.from, arrow.dataset.to].includes(box.dataset.id)) continue;
      arrow.classList.toggle("is-related", on);
    }
  };
  box.addEventListener("pointerenter", () => mark(true));
  box.addEventListener("pointerleave", () => mark(false));
}
