// The panel of the answer: its text or rows, tied to the shapes on the image, and the earlier answers.

import { codeOf, copyText, FORMS } from "./code.js";
import { button, byId, draw, make, pick, segments } from "./dom.js";
import { drawShapes } from "./overlay.js";
import { savePng } from "./save.js";
import { measureOf, shapesOf } from "./shapes.js";

const NARROW = 420; // CSS pixels; lines and labels on smaller images are smaller
const overlay = byId("overlay"), rows = byId("rows"), least = byId("least");
let entries = [], now = null, shapes = [], groups = [], form = "json", walk = null, tell = null;
const percent = (share) => `${Math.round(100 * share)}\u00a0%`;
const plural = (count, name) => `${count} ${count === 1 ? name : name === "box" ? "boxes" : `${name}s`}`;

// `steps` has what a button of an answer does: use(box), outline(box, title), ground(text); a missing one has no button.
export function watchAnswer(steps, say) {
  [walk, tell] = [steps, say];
  least.addEventListener("input", filter);
  new ResizeObserver(() => now && drawNow()).observe(overlay);
  segments(byId("forms"), "form", FORMS, (value) => {
    form = value;
    showCode();
  });
  byId("copy").addEventListener("click", async () => {
    const isCopied = await copyText(byId("snippet").textContent, byId("snippet"));
    tell(isCopied ? "Copied." : "The browser does not let this page copy; the text is selected.", !isCopied);
  });
  byId("save").addEventListener("click", () => savePng(now.image, kept().map((i) => shapes[i])).then(() => tell("Saved."), (error) => tell(error.message, true)));
  overlay.addEventListener("keydown", steer);
}

export function clearAnswers() {
  [entries, now, shapes, groups] = [[], null, [], []];
  overlay.replaceChildren();
  byId("answered").hidden = true;
  byId("no-answer").hidden = false;
}

// An entry: {image, task, asked, title, from, reply, took}. Returns one sentence about the answer.
export function addAnswer(entry) {
  entries.push({ ...entry, answer: entry.reply.answers[0] });
  show(entries.at(-1));
  return summary();
}

function summary() {
  const { answer } = now, cut = answer.finish_reason === "length" ? " It was cut off at the token limit." : "";
  if (answer.kind === "text") return `${answer.text.trim() || "The answer is empty."}${cut}`;
  const counts = ["box", "quad", "outline"].map((name) => [shapes.filter((shape) => shape.name === name).length, name]).filter(([count]) => count);
  return `${counts.map(([count, name]) => plural(count, name)).join(" and ") || "Nothing"} found.${cut}`;
}

function show(entry) {
  now = entry;
  shapes = shapesOf(entry.answer, { box: entry.asked.box, title: entry.from });
  byId("no-answer").hidden = true;
  byId("answered").hidden = false;
  showTrail();
  showText();
  showRows();
  showTiming();
  showCode();
  drawNow();
}

// ---- text -----------------------------------------------------------------------------------------------------------

function showText() {
  const { answer, task } = now, isText = answer.kind === "text", cut = answer.finish_reason === "length";
  byId("said").textContent = isText || !shapes.length || cut ? summary() : "";
  byId("said").classList.toggle("text", isText);
  const canGround = isText && walk.ground && task.group !== "read" && answer.text.trim() && !now.asked.box;
  byId("said-actions").replaceChildren(...(canGround ? [button("Ground this caption", () => walk.ground(answer.text.trim()))] : []));
  if (isText && answer.confidence !== undefined) byId("said-actions").append(make("span", { class: "quiet" }, `${measureOf(answer)} ${percent(answer.confidence)}`));
}

function showTiming() {
  const { reply: { timing, picture }, took } = now, ms = (value) => `${Math.round(value)}\u00a0ms`;
  const encoding = picture.cached ? "image already encoded" : `encoding ${ms(timing.encode_ms)}`;
  byId("timing").textContent = `Answered in ${ms(took)}: queue ${ms(timing.queue_ms)}, ${encoding}, decoding ${ms(timing.decode_ms)}.`;
}

function showTrail() {
  const steps = entries.map((entry) => make("li", {}, button(entry.title, () => goBack(entry), { "aria-current": entry === now && "step" })));
  byId("trail-steps").replaceChildren(...steps);
  byId("trail").hidden = entries.length < 2;
}

function goBack(entry) {
  show(entry);
  byId("trail-steps").querySelector("[aria-current]").focus();
}

// ---- rows -----------------------------------------------------------------------------------------------------------

function showRows() {
  const isText = now.answer.kind === "text", measure = measureOf(now.answer);
  rows.replaceChildren(...(isText ? [] : shapes.map(row)));
  byId("filter").hidden = isText || !shapes.some(({ sure }) => sure !== null);
  byId("save").hidden = !shapes.length;
  byId("least-label").textContent = `Least ${measure}`;
  byId("answered").classList.toggle("bare", isText || !shapes.length);
}

function row(shape, i) {
  const words = make("div", { class: "words" }, make("strong", {}, shape.title), make("span", { class: "quiet place" }, shape.box.map(Math.round).join(", ")));
  const actions = make("div", { class: "actions" });
  if (walk.use) actions.append(button("Use this box", () => walk.use(shape.box), { "aria-label": `Use this box: ${shape.title}` }));
  if (walk.outline && shape.name !== "outline") actions.append(button("Outline this", () => walk.outline(shape.box, shape.title), { "aria-label": `Outline this: ${shape.title}` }));
  const made = make("li", { tabindex: "-1" }, swatch(shape), words, make("span", { class: "sure" }, shape.sure === null ? "" : percent(shape.sure)), actions);
  tie(made, i);
  return made;
}

const swatch = ({ colour, dash, filled }) => draw("svg", { class: "swatch", viewBox: "0 0 34 20", "aria-hidden": "true" },
  draw("rect", { x: 2, y: 2, width: 30, height: 16, rx: 3, fill: "none", stroke: "#000", "stroke-opacity": 0.65, "stroke-width": 4.5 }),
  draw("rect", { x: 2, y: 2, width: 30, height: 16, rx: 3, fill: colour, "fill-opacity": filled ? 0.45 : 0, stroke: colour, "stroke-width": 2.5, "stroke-dasharray": dash.join(" ") || "none" }));

// Pointing at either one, or focusing it, lights both.
function tie(element, i) {
  for (const name of ["pointerenter", "focusin"]) element.addEventListener(name, () => light(i));
  for (const name of ["pointerleave", "focusout"]) element.addEventListener(name, () => light(null));
}

function light(lit) {
  overlay.classList.toggle("some", lit !== null);
  groups.forEach((group, i) => group.classList.toggle("lit", i === lit));
  [...rows.children].forEach((one, i) => one.classList.toggle("lit", i === lit));
}

// ---- shapes ---------------------------------------------------------------------------------------------------------

function drawNow() {
  const [width, height] = now.answer.image_size, wide = overlay.clientWidth;
  if (!wide) return;
  const focused = groups.indexOf(document.activeElement);
  groups = drawShapes(overlay, shapes, { width, height, unit: (width / wide) * (wide < NARROW ? 0.85 : 1) });
  groups.forEach((group, i) => {
    const sure = shapes[i].sure === null ? "" : `, ${measureOf(now.answer)} ${percent(shapes[i].sure)}`;
    for (const [name, value] of Object.entries({ role: "button", "aria-label": `${shapes[i].title}${sure}`, tabindex: "-1" })) group.setAttribute(name, value);
    group.addEventListener("click", () => enter(i));
    tie(group, i);
  });
  filter();
  if (focused >= 0) groups[focused]?.focus();
}

const kept = () => shapes.map((_, i) => i).filter((i) => shapes[i].sure === null || shapes[i].sure >= Number(least.value));

function filter() {
  const shown = kept();
  groups.forEach((group, i) => group.toggleAttribute("hidden", !shown.includes(i)));
  [...rows.children].forEach((one, i) => (one.hidden = !shown.includes(i)));
  groups.forEach((group) => group.setAttribute("tabindex", "-1"));
  groups[shown[0]]?.setAttribute("tabindex", "0"); // one stop for Tab; arrow keys lead to the others
  byId("least-now").textContent = `${percent(Number(least.value))} · ${shown.length} of ${shapes.length}`;
}

function enter(i) {
  rows.children[i]?.scrollIntoView({ block: "nearest" });
  (rows.children[i] ?? byId("said")).focus({ preventScroll: true });
}

function steer(event) {
  const shown = kept(), place = shown.indexOf(groups.indexOf(event.target));
  if (place < 0) return;
  if (event.key === "Enter" || event.key === " ") enter(shown[place]);
  else {
    const way = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!way) return;
    const next = shown[(place + way + shown.length) % shown.length];
    groups.forEach((group, i) => group.setAttribute("tabindex", i === next ? "0" : "-1"));
    groups[next].focus();
  }
  event.preventDefault();
}

// ---- code -----------------------------------------------------------------------------------------------------------

function showCode() {
  if (!now) return;
  pick(byId("forms"), form);
  byId("snippet").textContent = codeOf(form, now);
}
