// Shapes as SVG. All looks are attributes, so that the same drawing can be saved as a file of its own.

import { draw } from "./dom.js";
import { area } from "./shapes.js";

const FONT = '600 13px system-ui, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif';
const FAMILY = 'system-ui, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif';
const TALL = 19, PAD = 5, BASE = 14; // of a label's plate
const pen = document.createElement("canvas").getContext("2d");

function widthOf(text) {
  pen.font = FONT;
  return pen.measureText(text).width;
}

// Fill `svg` with the shapes, small ones on top; `unit` is how many pixels of the image are one on the screen.
// Returns the group of each shape, in the order of `shapes`.
export function drawShapes(svg, shapes, { width, height, unit }) {
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const groups = shapes.map((shape) => draw("g", { class: shape.filled ? "shape filled" : "shape" }, ...shape.rings.flatMap((ring) => outline(shape, ring, unit))));
  const order = shapes.map((_, i) => i).sort((a, b) => area(shapes[b]) - area(shapes[a]));
  const taken = [];
  shapes.forEach((shape, i) => shape.hasLabel && groups[i].append(...plate(shape, { width, height, unit }, taken)));
  svg.replaceChildren(...order.map((i) => groups[i]));
  return groups;
}

function outline({ colour, dash, filled }, ring, unit) {
  const points = ring.map((point) => point.join(",")).join(" "), shared = { points, fill: "none", "stroke-linejoin": "round" };
  return [
    draw("polygon", { ...shared, stroke: "#000", "stroke-opacity": 0.65, "stroke-width": 5 * unit }),
    draw("polygon", { ...shared, class: "edge", fill: colour, "fill-opacity": filled ? 0.3 : 0, stroke: colour, "stroke-width": 3 * unit,
      ...(dash.length && { "stroke-dasharray": dash.map((part) => part * unit).join(" ") }) }),
  ];
}

// The label above the shape's top left corner: inside the image, and lower where another label is in the way.
function plate({ title, box: [left, top], colour }, { width, height, unit }, taken) {
  const text = shortened(title, width / unit - 2 * PAD), wide = (widthOf(text) + 2 * PAD) * unit, tall = TALL * unit;
  const x = Math.max(0, Math.min(left, width - wide));
  let y = Math.max(0, Math.min(top - tall, height - tall));
  while (y + 2 * tall <= height && taken.some((other) => x < other.x + other.wide && other.x < x + wide && y < other.y + tall && other.y < y + tall)) y += tall;
  taken.push({ x, y, wide });
  return [
    draw("rect", { x, y, width: wide, height: tall, rx: 3 * unit, fill: colour, stroke: "#000", "stroke-opacity": 0.65, "stroke-width": unit }),
    draw("text", { x: x + PAD * unit, y: y + BASE * unit, fill: "#111", "font-size": 13 * unit, "font-weight": 600, "font-family": FAMILY }, text),
  ];
}

function shortened(text, room) {
  if (widthOf(text) <= room) return text;
  let end = text.length;
  while (end > 1 && widthOf(`${text.slice(0, end)}…`) > room) end -= 1;
  return `${text.slice(0, end)}…`;
}
