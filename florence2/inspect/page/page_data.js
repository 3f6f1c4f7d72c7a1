"use strict";
// The data of the page, and functions that make elements. Texts of the data only become text nodes, never markup.

async function inflate(id) {
  const packed = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function readData() {
  const data = JSON.parse(new TextDecoder().decode(await inflate("data-head")));
  return { ...data, maps: mapsOf(data, await inflate("data-maps")) };
}

// Decode the bytes of the maps. Weights are shares of the whole attention of one head.
function mapsOf(data, bytes) {
  const [h, w] = data.image.grid, { pool, stride } = data.packing, { layers, heads } = data.model;
  const across = Math.ceil(w / pool), cells = Math.ceil(h / pool) * across, words = data.prompt.length;
  const ends = { prompt: layers * heads * cells };
  ends.rollout = ends.prompt + layers * heads * words;
  ends.saliency = ends.rollout + h * w;

  const scaleOf = (token, layer, head) => data.tokens[token].attention.peak[layer][head] / 255;
  return {
    // the h * w weights of one head on the grid
    head(token, layer, head) {
      const start = token * stride + (layer * heads + head) * cells, scale = scaleOf(token, layer, head);
      return Float32Array.from({ length: h * w }, (_, i) => {
        const row = Math.floor(Math.floor(i / w) / pool), column = Math.floor((i % w) / pool);
        return scale * bytes[start + row * across + column];
      });
    },
    // the weights of one head on the tokens of the prompt
    prompt(token, layer, head) {
      const start = token * stride + ends.prompt + (layer * heads + head) * words;
      return Float32Array.from(bytes.subarray(start, start + words), (byte) => byte * scaleOf(token, layer, head));
    },
    rollout: (token) => Float32Array.from(bytes.subarray(token * stride + ends.rollout).subarray(0, h * w)),
    saliency: (token) => Float32Array.from(bytes.subarray(token * stride + ends.saliency).subarray(0, h * w)),
  };
}

function mean(arrays) {
  const sum = new Float32Array(arrays[0].length);
  for (const array of arrays) array.forEach((value, i) => { sum[i] += value; });
  return sum.map((value) => value / arrays.length);
}

const range = (count) => Array.from({ length: count }, (_, i) => i);
const byId = (id) => document.getElementById(id);
const percent = (share) => (share < 0.0005 ? "<0.1" : (100 * share).toFixed(share < 0.0995 ? 1 : 0)) + "\u00a0%";
const SPACES = { " ": "␣", "\n": "⏎", "\t": "⇥" };
const code = (letter) => `U+${letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
// Texts without a visible character are replaced by the names of their characters.
const visible = (text) => (text === "" ? "(empty)" : /^[\s\p{C}]+$/u.test(text) ? [...text].map((one) => SPACES[one] || code(one)).join("") : text);
const brief = (text) => visible(text.trim() || text).replace(/^<loc_(\d+)>$/, "loc $1");
const isSpecial = (token) => token.location !== null || /^<[^<>]+>$/.test(token.text);

function make(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in element) element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function draw(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// Keep one element of a group in the tab order; arrow keys move within it. `next(index, key)` returns the next index.
function rove(elements, next, onFocus) {
  const enter = (index) => elements.forEach((element, i) => element.setAttribute("tabindex", i === index ? 0 : -1));
  elements.forEach((element, index) => {
    element.addEventListener("focus", () => { enter(index); onFocus(index); });
    element.addEventListener("keydown", (event) => {
      const target = event.ctrlKey || event.altKey || event.metaKey ? undefined : next(index, event.key);
      if (target === undefined || target === null) return;
      event.preventDefault();
      elements[target].focus();
    });
  });
  enter(0);
  return enter;
}
