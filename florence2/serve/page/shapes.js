// The shapes of an answer, with a colour and a pattern of dashes for each label.

const COLOURS = ["#ffd23f", "#4cc9f0", "#ff8fab", "#80ed99", "#ffa24c", "#c8b6ff", "#f4f1de", "#5eead4"];
const DASHES = [[], [7, 4], [3, 4], [12, 4, 2, 4], [14, 6]]; // 5 and 8 together make 40 different lines

export function shapesOf(answer, { box = null, title = "" } = {}) {
  const shapes = [
    ...(answer.boxes ?? []).map((part) => ({ ...part, rings: [corners(part.xyxy)], name: "box" })),
    ...(answer.quads ?? []).map((part) => ({ ...part, rings: [pairs(part.xyxyxyxy)], name: "quad" })),
    ...(answer.polygons ?? []).map((part) => ({ ...part, rings: part.rings.map(pairs), name: "outline" })),
  ];
  if (answer.kind === "text" && box) shapes.push({ rings: [corners(box)], label: answer.text.trim(), name: "region" });
  const looks = new Map();
  return shapes.map((shape, i) => finish(shape, i, looks, title));
}

function finish(shape, i, looks, title) {
  const { label = "", rings, name } = shape, points = rings.flat();
  if (!looks.has(label)) looks.set(label, { colour: COLOURS[looks.size % COLOURS.length], dash: DASHES[looks.size % DASHES.length] });
  const xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
  const box = [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
  const words = label.trim() || title;
  return { rings, name, box, ...looks.get(label), filled: name === "outline", hasLabel: words !== "",
    title: words || `${name} ${i + 1}`, sure: shape.confidence ?? shape.score ?? null };
}

export const pairs = (row) => Array.from({ length: row.length / 2 }, (_, i) => [row[2 * i], row[2 * i + 1]]);
const corners = ([left, top, right, bottom]) => [[left, top], [right, top], [right, bottom], [left, bottom]];
export const area = ({ box: [left, top, right, bottom] }) => (right - left) * (bottom - top);

// Scores, raw confidences and calibrated ones are different numbers; say which these are.
export const measureOf = ({ calibrated }) => (calibrated === undefined ? "score" : calibrated ? "confidence" : "raw confidence");
