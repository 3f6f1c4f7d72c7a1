// The image: a map as a heat map, the regions of the answer as outlines, a location token as a line.

const RAMP = [[18, 8, 54], [110, 25, 110], [205, 60, 75], [248, 150, 45], [255, 252, 180]]; // dark to bright
const exact = (share) => `${Number((100 * share).toPrecision(2))}\u00a0%`;
const MODE_NAMES = { all: "Mean over all layers and heads", rollout: "Attention rollout through encoder and decoder",
  saliency: "Gradient × input, summed over each cell" };

function ramp(share) {
  const place = Math.min(0.9999, Math.max(0, share)) * (RAMP.length - 1), low = Math.floor(place);
  return RAMP[low].map((value, i) => value + (RAMP[low + 1][i] - value) * (place - low));
}

// The map that the controls select, as {cells, prompt, share}; null without one.
function mapOf(data, token, { mode, layer, head }) {
  const { maps, model } = data, pairs = (layers, heads) => layers.flatMap((l) => heads.map((h) => [l, h]));
  if (mode === "none") return null;
  if (mode === "rollout") return { cells: maps.rollout(token), prompt: null };
  if (mode === "saliency") {
    const found = data.tokens[token].saliency;
    return found && { cells: maps.saliency(token), prompt: found.prompt.map(Math.abs) };
  }
  const layers = mode === "all" ? range(model.layers) : [layer], heads = mode === "head" ? [head] : range(model.heads);
  const chosen = pairs(layers, heads);
  return { cells: mean(chosen.map(([l, h]) => maps.head(token, l, h))),
    prompt: mean(chosen.map(([l, h]) => maps.prompt(token, l, h))),
    share: chosen.reduce((sum, [l, h]) => sum + data.tokens[token].attention.image[l][h], 0) / chosen.length };
}

function drawHeat(data, map) {
  const canvas = byId("heat"), [h, w] = data.image.grid;
  canvas.width = w;
  canvas.height = h;
  if (!map) return;
  const low = Math.min(...map.cells), top = Math.max(...map.cells), context = canvas.getContext("2d");
  const image = context.createImageData(w, h);
  map.cells.forEach((weight, i) => {
    const share = (weight - low) / (top - low || 1);
    image.data.set([...ramp(share), 255 * (0.5 + 0.3 * share)], 4 * i);
  });
  context.putImageData(image, 0, 0);
}

// The ends of the colour scale; its colours are in the style sheet.
function drawScale(map, { mode }) {
  byId("scale").hidden = !map;
  if (!map) return;
  const shares = mode !== "rollout" && mode !== "saliency";
  byId("scale-low").textContent = shares ? exact(Math.min(...map.cells)) : "lowest";
  byId("scale-top").textContent = shares ? exact(Math.max(...map.cells)) : "highest";
}

function legendOf(data, map, { mode, layer, head }) {
  if (mode === "none") return "The image without a map.";
  if (!map) return "No saliency was computed for this token.";
  if (mode === "rollout" || mode === "saliency") return `${MODE_NAMES[mode]}, on its own scale.`;
  const name = mode === "all" ? MODE_NAMES.all : mode === "layer" ? `Layer ${layer + 1}, mean over heads`
    : `Layer ${layer + 1}, head ${head + 1}`;
  return `${name}: ${percent(map.share)} of the weight is on the image. The scale is the share of the weight on one cell.`;
}

// Every outline of the answer: {label, score, tokens, rings: [[x, y, x, y, …], …], filled}.
function shapesOf(answer) {
  const boxes = (answer.boxes || []).map((box) => {
    const [x1, y1, x2, y2] = box.xyxy;
    return { ...box, rings: [[x1, y1, x2, y1, x2, y2, x1, y2]], filled: false };
  });
  const quads = (answer.quads || []).map((quad) => ({ ...quad, rings: [quad.points.flat()], filled: false }));
  const polygons = (answer.polygons || []).map((one) => ({ ...one, rings: one.points.map((ring) => ring.flat()), filled: true }));
  return [...boxes, ...quads, ...polygons].map((shape, i) => ({ ...shape, colour: `hsl(${(i * 137.5) % 360} 90% 62%)` }));
}

const holds = (shape, token) => Boolean(shape.tokens) && shape.tokens[0] <= token && token <= shape.tokens[1];

function drawMarks(data, shapes, token) {
  const svg = byId("marks"), { width, height } = data.image, unit = width / (svg.clientWidth || width);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("font-size", 14 * unit);
  const said = shapes.map((shape) => shape.label || "no label").join(", ");
  svg.setAttribute("aria-label", said ? `The answer drawn on the image: ${said}` : "Nothing is drawn: the answer has no regions");
  svg.replaceChildren(...shapes.flatMap((shape) => outline(shape, holds(shape, token), unit)), ...placeOf(data, token, unit));
}

function outline(shape, ofToken, unit) {
  const kind = `${shape.filled ? "filled " : ""}${ofToken ? "of-token" : ""}`;
  const lines = shape.rings.flatMap((ring) => [
    draw("polygon", { class: "under", points: ring.join(" ") }),
    draw("polygon", { class: kind, points: ring.join(" "), stroke: shape.colour, ...(shape.filled && { fill: shape.colour }) }),
  ]);
  const ring = shape.rings[0] || [0, 0], xs = ring.filter((_, i) => i % 2 === 0), ys = ring.filter((_, i) => i % 2 === 1);
  const text = draw("text", { x: Math.min(...xs) + 6 * unit, y: Math.min(...ys) + 18 * unit }, shape.label || "");
  return [...lines, text];
}

// In a row of consecutive location tokens, x and y take turns.
function axisOf(tokens, token) {
  let first = token;
  while (first > 0 && tokens[first - 1].location !== null) first -= 1;
  return (token - first) % 2 ? "y" : "x";
}

function placeOf(data, token, unit) {
  const { tokens, image } = data, { location, spread } = tokens[token];
  if (location === null) return [];
  const x = axisOf(tokens, token) === "x", side = x ? image.width : image.height, at = (bin) => ((bin + 0.5) * side) / 1000;
  const line = (bin, attributes) => draw("line", x ? { x1: at(bin), x2: at(bin), y1: 0, y2: image.height, ...attributes }
    : { y1: at(bin), y2: at(bin), x1: 0, x2: image.width, ...attributes });
  const top = Math.max(...(spread ? spread.bins : []).map((bin) => bin[1]), 1e-9);
  const bins = (spread ? spread.bins : []).map(([bin, share]) => line(bin, { class: "bin", opacity: (0.7 * share) / top, "stroke-width": 2 }));
  return [...bins, line(location, { class: "place" }), ...cornerOf(data, token, x, at(location), unit)];
}

function cornerOf({ tokens, image }, token, x, here, unit) {
  const other = tokens[x ? token + 1 : token - 1];
  if (!other || other.location === null) return [];
  const there = ((other.location + 0.5) * (x ? image.height : image.width)) / 1000;
  return [draw("circle", { class: "corner", cx: x ? here : there, cy: x ? there : here, r: 6 * unit })];
}
