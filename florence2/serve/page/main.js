// The page: an image, a task, a question to the server, and what came back.

import { addAnswer, clearAnswers, watchAnswer } from "./answer.js";
import { ask, getModel, getTasks, ServerError, setKey } from "./api.js";
import { byId, make, pick, segments } from "./dom.js";
import { readImage, watchSources } from "./image.js";
import { fitRegion, getRegion, setRegion, showRegionTool, watchRegion } from "./region.js";
import { describe, GROUND, GROUPS, OUTLINE, question, takesRegion, takesText } from "./tasks.js";

const chosen = {}; // the last task of each group
const texts = {}; // what was typed for each task
const steps = {};
const LOW = 0.6; // an answer that begins below this share of the window is scrolled to
const FADE = 5000; // ms that good news stays in sight
let tasks = [], task = null, image = null, running = null, fading = 0;

// ---- one line says what happens -------------------------------------------------------------------------------------

// `isSeen` is false for what the answer on the page says itself: only screen readers need it then.
function say(sentence, isBad = false, isSeen = true) {
  byId("status").textContent = sentence;
  byId("toast").classList.toggle("bad", isBad);
  showToast(isSeen && sentence !== "");
  clearTimeout(fading);
  if (!isBad && !running) fading = setTimeout(() => showToast(false), FADE);
}

function showToast(isSeen) {
  byId("toast").classList.toggle("away", !isSeen);
  byId("dismiss").hidden = !isSeen;
}

function complain(error) {
  say(error.message, true);
  if (error.status === 401) openKeyForm();
}

// ---- the server -----------------------------------------------------------------------------------------------------

async function start() {
  try {
    tasks = (await getTasks()).map(describe);
    byId("model").textContent = await getModel();
  } catch (error) {
    complain(error);
    if (error.status === 503) setTimeout(start, 1000 * (error.retryAfter || 2));
    return;
  }
  byId("model").hidden = false;
  byId("key-form").hidden = true;
  say("");
  showTasks();
}

function openKeyForm() {
  byId("key-form").hidden = false;
  byId("api").hidden = true; // a link carries no key
  byId("key").focus();
}

function useKey(event) {
  event.preventDefault();
  try {
    setKey(byId("key").value);
  } catch (error) {
    complain(error);
    return;
  }
  start();
}

// ---- tasks ----------------------------------------------------------------------------------------------------------

function showTasks() {
  const known = GROUPS.filter(({ id }) => tasks.some(({ group }) => group === id));
  segments(byId("groups"), "group", known.map(({ id, name }) => ({ value: id, text: name, note: needsOf(id) })), chooseGroup);
  const has = (token) => tasks.some((one) => one.token === token);
  const possible = { ...(tasks.some(({ takes }) => takes === "region") && { use }), ...(has(OUTLINE) && { outline }), ...(has(GROUND) && { ground }) };
  Object.assign(steps, possible);
  choose(task ?? tasks.find(({ group }) => group === known[0].id));
}

function needsOf(group) {
  const needs = [...new Set(tasks.filter((one) => one.group === group).map((one) => one.needs))];
  return needs.length > 1 && needs.includes("image only") ? "some need words" : needs[0];
}

function chooseGroup(id) {
  choose(chosen[id] ?? tasks.find(({ group }) => group === id));
}

function choose(next) {
  if (task) texts[task.token] = byId("text").value;
  task = next;
  byId("text").value = texts[task.token] ?? "";
  chosen[task.group] = task;
  pick(byId("groups"), task.group);
  const list = byId("tasks"), here = tasks.filter(({ group }) => group === task.group);
  if (list.dataset.group !== task.group) {
    list.dataset.group = task.group;
    list.replaceChildren(list.querySelector("legend"), ...here.map(taskLabel));
  }
  pick(list, task.token);
  showInputs();
}

function taskLabel(one) {
  const input = make("input", { type: "radio", name: "task", value: one.token });
  input.addEventListener("change", () => choose(one));
  return make("label", {}, input, make("span", { class: "face" }, make("strong", {}, one.name), make("small", {}, one.needs === needsOf(one.group) ? one.answer : `${one.needs} · ${one.answer}`)));
}

function showInputs() {
  byId("text-input").hidden = !takesText(task);
  byId("region-input").hidden = !takesRegion(task);
  byId("text-label").textContent = task.token === GROUND ? "Caption" : "Words";
  byId("text-help").textContent = task.example ? `For example: ${task.example}` : "";
  byId("prompt").replaceChildren(make("code", {}, task.token), " asks the model: ", make("q", {}, task.sentence.replace("{input}", "…")));
  showRegionTool(takesRegion(task) && image !== null);
}

// ---- the image ------------------------------------------------------------------------------------------------------

async function take(source, name) {
  let next;
  try {
    next = await readImage(source, name);
  } catch (error) {
    complain(error);
    return;
  }
  running?.abort();
  if (image) URL.revokeObjectURL(image.url);
  image = next;
  byId("shown").src = image.url;
  byId("stage").style.setProperty("--ratio", image.width / image.height);
  byId("about-image").textContent = `${image.name}, ${image.width} × ${image.height}`;
  document.body.classList.add("has-image");
  [byId("drop").hidden, byId("stage").hidden] = [true, false];
  clearAnswers();
  fitRegion(image.width, image.height);
  if (task) showInputs();
  say(`The image is ready: ${image.width} × ${image.height} pixels. Choose a task and ask.`, false, false);
}

// ---- questions ------------------------------------------------------------------------------------------------------

async function send(asked, { title, from }) {
  if (!task) return; // the line says what keeps the tasks from being there
  if (!image) {
    say("Choose an image first, or use the example.", true);
    return;
  }
  running?.abort();
  const [mine, about, called, started] = [new AbortController(), image, task, performance.now()];
  show(mine);
  say("Asking…");
  try {
    const reply = await ask(about, asked, mine.signal);
    const hadFocus = byId("answered").contains(document.activeElement); // on a button that the new answer replaces
    say(addAnswer({ image: about, task: called, asked, title, from, reply, took: performance.now() - started }), false, false);
    if (hadFocus) byId("answer-title").focus({ preventScroll: true });
    if (byId("answer").getBoundingClientRect().top > innerHeight * LOW) byId("answer").scrollIntoView({ block: "nearest" });
  } catch (error) {
    if (error.name === "AbortError") {
      if (running === mine) say("Cancelled.");
    } else complain(error instanceof ServerError ? error : new Error(`The answer cannot be shown: ${error.message}.`));
  }
  if (running === mine) show(null);
}

// Show whether a question runs.
function show(question) {
  running = question;
  document.body.classList.toggle("busy", question !== null);
  byId("answer").setAttribute("aria-busy", String(question !== null));
  byId("cancel").hidden = question === null;
}

function submit(event) {
  event.preventDefault();
  if (!task) return;
  const text = byId("text").value, asked = question(task, text, getRegion());
  send(asked, { title: asked.text ? `${task.name}: ${asked.text}` : task.name, from: asked.text ?? "" });
}

// ---- a cascade, walked ----------------------------------------------------------------------------------------------

const taskOf = (token) => tasks.find((one) => one.token === token);

function use(box) {
  choose(task.group === "region" ? task : (chosen.region ?? tasks.find(({ takes }) => takes === "region")));
  setRegion(box);
  say("The box is the region now. Choose a task and ask.");
  byId("tasks").querySelector("input:checked").focus();
}

function outline(box, title) {
  choose(taskOf(OUTLINE));
  setRegion(box);
  send(question(task, "", getRegion()), { title: `Outline: ${title}`, from: title });
}

function ground(text) {
  choose(taskOf(GROUND));
  byId("text").value = text;
  send(question(task, text, null), { title: `${task.name}: ${text}`, from: "" });
}

byId("key-form").addEventListener("submit", useKey);
byId("ask").addEventListener("submit", submit);
byId("dismiss").addEventListener("click", () => {
  say("");
  byId("send").focus();
});
byId("cancel").addEventListener("click", () => running?.abort());
watchSources(take, (sentence) => say(sentence, true));
watchRegion();
watchAnswer(steps, say);
start();
