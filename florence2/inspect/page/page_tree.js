// The search as a tree: steps from left to right, the candidates of a step from best to worst.

const STEP = 96, LANE = 28, PILL = 72, HIGH = 20, TOP = 24;
const SIGNS = { lives: "", finished: "✓ ", "ended low": "↓ ", dropped: "× ", stopped: "‖ ", cut: "… " };
const FATES = {
  lives: "It continued as a beam.",
  finished: "It ended here and became a finished hypothesis.",
  "ended low": "It ended here, but ranked too low: only candidates among the beams may finish.",
  dropped: "It was dropped: better candidates took all beams.",
  stopped: "It was a beam when the search had enough hypotheses.",
  cut: "It was a beam at the length limit, and became a hypothesis unfinished.",
};

// The possible candidates, as nodes {step, rank, parent: node or null, …}, in the order of the steps.
function nodesOf(beams) {
  const nodes = [];
  let before = [];
  for (const { step, candidates } of beams) {
    const possible = candidates.filter((one) => one.sum !== null && one.sum > -1e8);
    const now = possible.map((one, rank) => ({ ...one, step, rank, parentBeam: one.parent,
      parent: before.find((other) => other.beam !== null && other.beam === one.parent) || null }));
    nodes.push(...now);
    before = now;
  }
  return nodes;
}

function pathTo(node) {
  const path = [];
  for (let here = node; here; here = here.parent) path.unshift(here);
  return path;
}

// The path of the answer; empty when no beam wrote it.
function winnerOf(nodes, tokens) {
  const ids = tokens.map((token) => token.id);
  const spells = (path) => path.length === ids.length && path.every((node, i) => node.token === ids[i]);
  const ends = nodes.filter((node) => node.step === ids.length - 1 && (node.fate === "finished" || node.fate === "cut"));
  return ends.map(pathTo).find(spells) || [];
}

function drawTree(data, choose) {
  const nodes = nodesOf(data.beams || []), won = new Set(winnerOf(nodes, data.tokens)), svg = byId("tree");
  byId("search-note").textContent = nodes.length
    ? "✓ finished, × dropped, ↓ ended below the beams, ‖ stopped with the search, … cut at the length limit. The thick path is the answer. " +
      "Arrow keys move: left and right along a path, up and down within a step."
    : "Greedy search, without beams: every step takes the most probable token.";
  byId("node").hidden = nodes.length === 0;
  byId("node").textContent = "Choose a candidate to see its text and its outcome.";
  byId("tree-scroll").hidden = nodes.length === 0;
  if (!nodes.length) return () => {};
  const steps = Math.max(...nodes.map((node) => node.step)) + 1, lanes = Math.max(...nodes.map((node) => node.rank)) + 1;
  svg.setAttribute("width", steps * STEP);
  svg.setAttribute("height", TOP + lanes * LANE + 6);
  const column = draw("rect", { class: "column", x: 0, y: 0, width: STEP, height: TOP + lanes * LANE + 6 });
  const numbers = range(steps).map((step) => draw("text", { class: "step", x: middle(step), y: 16 }, `${step + 1}`));
  const parents = new Set(nodes.map((node) => node.parent));
  const edges = nodes.filter((node) => node.parent).map((node) => edge(node, parents.has(node), won.has(node)));
  const pills = nodes.map((node) => pill(node, won.has(node)));
  svg.replaceChildren(column, ...numbers, ...edges, ...pills);
  walkTree(data, nodes, pills, won, choose);
  return (token, scroll) => {
    column.setAttribute("x", token * STEP);
    if (scroll) byId("tree-scroll").scrollLeft = middle(token) - byId("tree-scroll").clientWidth / 2;
  };
}

const middle = (step) => step * STEP + STEP / 2;
const height = (node) => TOP + node.rank * LANE + LANE / 2;

function edge(node, goesOn, won) {
  const from = middle(node.step - 1) + PILL / 2, to = middle(node.step) - PILL / 2, y1 = height(node.parent), y2 = height(node);
  const bend = (from + to) / 2;
  return draw("path", { class: won ? "won" : goesOn ? "on" : "", d: `M${from} ${y1}C${bend} ${y1} ${bend} ${y2} ${to} ${y2}` });
}

function pill(node, won) {
  const text = SIGNS[node.fate] + brief(node.text), letters = [...text];
  const short = letters.length > 9 ? `${letters.slice(0, 8).join("")}…` : text;
  const label = `Step ${node.step + 1}, ${visible(node.text)}, sum ${node.sum.toFixed(2)}, ${node.fate}${won ? ", part of the answer" : ""}`;
  const kind = node.fate === "ended low" ? "low" : node.fate;
  return draw("g", { class: `candidate ${kind}${won ? " won" : ""}`, role: "button", "aria-label": label },
    draw("rect", { x: middle(node.step) - PILL / 2, y: height(node) - HIGH / 2, width: PILL, height: HIGH, rx: 9 }),
    draw("text", { x: middle(node.step), y: height(node) + 4, "text-anchor": "middle" }, short));
}

function walkTree(data, nodes, pills, won, choose) {
  const pick = (index) => {
    pills.forEach((one, i) => one.classList.toggle("picked", i === index));
    drawNode(data, nodes[index], won.has(nodes[index]));
  };
  const enter = rove(pills, (index, key) => neighbour(nodes, index, key), pick);
  pills.forEach((one, index) => one.addEventListener("click", () => {
    one.focus();
    if (won.has(nodes[index])) choose(nodes[index].step);
  }));
  enter(Math.max(0, nodes.findIndex((node) => won.has(node))));
}

function neighbour(nodes, index, key) {
  const node = nodes[index], at = (step, rank) => nodes.findIndex((other) => other.step === step && other.rank === rank);
  const found = {
    ArrowLeft: () => nodes.indexOf(node.parent),
    ArrowRight: () => nodes.findIndex((other) => other.parent === node),
    ArrowUp: () => at(node.step, node.rank - 1),
    ArrowDown: () => at(node.step, node.rank + 1),
    Home: () => 0,
    End: () => nodes.length - 1,
  }[key];
  const target = found ? found() : -1;
  return target < 0 ? (found ? index : null) : target;
}

function drawNode(data, node, won) {
  const bans = data.beams.find((one) => one.step === node.step).bans.filter((ban) => ban.beam === node.parentBeam);
  const said = pathTo(node).map((one) => one.text).join("");
  byId("node").replaceChildren(
    make("p", { className: "said" }, said),
    make("p", {}, `Step ${node.step + 1}: ${visible(node.text).trim()}, summed log-probability ${node.sum.toFixed(3)}. ` +
      `${FATES[node.fate] || node.fate}${won ? " It is part of the answer." : ""}`),
    ...(bans.length ? [make("p", {}, `Banned for its beam here: ${rulesOf(bans).join("; ")}.`)] : []),
  );
}
