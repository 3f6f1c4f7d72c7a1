// The region of a question: drawn on the image, moved by arrow keys, or typed into four fields.

import { byId } from "./dom.js";

const EDGES = ["left", "top", "right", "bottom"];
const STEP = 0.01; // of a side, an arrow key
const SMALLEST = 4; // CSS pixels; less is a click
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const within = (value, low, high) => Math.min(Math.max(value, low), high);

const layer = byId("region-layer"), handle = byId("region-box");
const fields = EDGES.map((edge) => byId(`region-${edge}`));
let size = [1, 1], drag = null;

// The box as [left, top, right, bottom] in pixels; null unless all four edges are given.
export function getRegion() {
  const values = fields.map((field) => (field.value === "" ? NaN : field.valueAsNumber));
  return values.every(Number.isFinite) ? values : null;
}

export function setRegion(box) {
  fields.forEach((field, i) => (field.value = box ? Math.round(box[i]) : ""));
  show();
}

export function showRegionTool(isOn) {
  layer.hidden = !isOn;
  show();
}

export function fitRegion(width, height) {
  size = [width, height];
  fields.forEach((field, i) => (field.max = size[i % 2]));
  setRegion(null);
}

function show() {
  const box = getRegion();
  handle.hidden = !box;
  if (!box) return;
  const [left, top, right, bottom] = box, [width, height] = size;
  const place = { left: Math.min(left, right) / width, top: Math.min(top, bottom) / height,
    width: Math.abs(right - left) / width, height: Math.abs(bottom - top) / height };
  for (const [name, share] of Object.entries(place)) handle.style[name] = `${100 * share}%`;
  handle.setAttribute("aria-label", `Region: left ${left}, top ${top}, right ${right}, bottom ${bottom}`);
}

function moved([left, top, right, bottom], x, y) {
  const across = within(x, -left, size[0] - right), down = within(y, -top, size[1] - bottom);
  return [left + across, top + down, right + across, bottom + down];
}

function resized(box, edges, x, y) {
  const to = { left: x, right: x, top: y, bottom: y };
  const [left, top, right, bottom] = box.map((value, i) => (edges.includes(EDGES[i]) ? to[EDGES[i]] : value));
  return [Math.min(left, right), Math.min(top, bottom), Math.max(left, right), Math.max(top, bottom)];
}

// ---- keys and fields ------------------------------------------------------------------------------------------------

function press(event) {
  const box = getRegion(), arrow = ARROWS[event.key];
  if (!box) return;
  if (arrow) {
    const [x, y] = arrow.map((way, i) => way * Math.max(1, Math.round(size[i] * STEP)));
    const [left, top, right, bottom] = box;
    const grown = [left, top, within(right + x, left + 1, size[0]), within(bottom + y, top + 1, size[1])];
    setRegion(event.shiftKey ? grown : moved(box, x, y));
    event.preventDefault();
  } else if (event.key === "Delete" || event.key === "Backspace") {
    setRegion(null);
    fields[0].focus();
  }
}

// Four numbers that are pasted into one field fill all.
function paste(event) {
  const numbers = event.clipboardData.getData("text").match(/-?\d+(\.\d+)?/g) ?? [];
  if (numbers.length !== 4) return;
  event.preventDefault();
  setRegion(numbers.map(Number));
}

// ---- the pointer ----------------------------------------------------------------------------------------------------

function point(event) {
  const frame = layer.getBoundingClientRect();
  return [within((event.clientX - frame.left) / frame.width, 0, 1) * size[0], within((event.clientY - frame.top) / frame.height, 0, 1) * size[1]];
}

function begin(event) {
  if (event.button !== 0) return;
  const [x, y] = point(event), box = getRegion(), edges = event.target.dataset.edges;
  const start = { at: [x, y], seen: [event.clientX, event.clientY], before: box };
  if (edges) drag = { ...start, change: (to) => resized(cornered(box, edges), ["right", "bottom"], ...to) };
  else if (event.target === handle) drag = { ...start, change: (to) => moved(box, to[0] - x, to[1] - y) };
  else drag = { ...start, isNew: true, change: (to) => resized([x, y, x, y], ["right", "bottom"], ...to) };
  layer.setPointerCapture(event.pointerId);
  event.preventDefault();
}

// The box as if the corner that is dragged were its lower right one.
function cornered([left, top, right, bottom], edges) {
  const [x1, x2] = edges.includes("left") ? [right, left] : [left, right];
  const [y1, y2] = edges.includes("top") ? [bottom, top] : [top, bottom];
  return [x1, y1, x2, y2];
}

function move(event) {
  if (drag) setRegion(drag.change(point(event)));
}

function end(event) {
  if (!drag) return;
  const [x, y] = drag.seen, isClick = Math.max(Math.abs(event.clientX - x), Math.abs(event.clientY - y)) < SMALLEST;
  if (event.type === "pointercancel" || (drag.isNew && isClick)) setRegion(drag.before);
  drag = null;
  if (!handle.hidden) handle.focus({ preventScroll: true });
}

export function watchRegion() {
  handle.addEventListener("keydown", press);
  layer.addEventListener("pointerdown", begin);
  layer.addEventListener("pointermove", move);
  layer.addEventListener("pointerup", end);
  layer.addEventListener("pointercancel", end);
  for (const field of fields) {
    field.addEventListener("input", show);
    field.addEventListener("paste", paste);
  }
  byId("region-clear").addEventListener("click", () => setRegion(null));
  byId("region-middle").addEventListener("click", () => {
    setRegion([size[0] / 4, size[1] / 4, (3 * size[0]) / 4, (3 * size[1]) / 4]);
    if (!layer.hidden && !byId("stage").hidden) handle.focus();
  });
}
