// The panels about one token.

const RULE_NAMES = { no_repeat_ngram: "no repeated n-grams", min_new_tokens: "minimum length", repetition_penalty: "repetition penalty",
  forced_bos_token: "forced first token", forced_eos_token: "forced last token" };
const ENDINGS = { stop: "The model ended the answer.", length: "The answer was cut off at the length limit." };

function drawAnswer(data, shapes, choose) {
  const { answer } = data, score = answer.score === null ? "" : ` Score ${answer.score.toFixed(3)}.`;
  if (!answer.text.trim()) byId("answer").replaceChildren(make("span", { className: "quiet" }, "(empty answer: no text and no locations)"));
  byId("ending").textContent = (ENDINGS[answer.finish_reason] || answer.finish_reason || "") + score;
  byId("things").replaceChildren(...shapes.map((shape) => {
    const sure = shape.confidence ? shape.confidence.value : shape.score;
    const label = `${shape.label || "(no label)"}${sure === null ? "" : ` ${sure.toFixed(2)}`}`;
    const button = make("button", { type: "button", onclick: () => shape.tokens && choose(firstPlace(data, shape)) }, label);
    button.style.borderLeftColor = shape.colour;
    return make("li", {}, button);
  }));
}

function firstPlace({ tokens }, { tokens: [first, last] }) {
  return range(last - first + 1).map((i) => first + i).find((i) => tokens[i].location !== null) ?? first;
}

function makeTokens(data) {
  return data.tokens.map((token, i) => {
    const sure = make("span", { className: "sure" });
    sure.style.width = `${100 * token.probability}%`;
    const label = `${visible(token.text)}, ${percent(token.probability)}`;
    return make("button", { type: "button", className: kindOf(data.tokens, i), "aria-label": label, "aria-pressed": false },
      visible(token.text.trimStart() || token.text), sure);
  });
}

// A token that continues a word is joined to the token before it.
function kindOf(tokens, i) {
  if (isSpecial(tokens[i])) return "special";
  return i && !isSpecial(tokens[i - 1]) && !/^\s/.test(tokens[i].text) ? "joined" : "";
}

function rulesOf(bans) {
  return bans.map(({ rule, texts, count }) => {
    const name = RULE_NAMES[rule] || rule, more = (count ?? texts.length) - texts.length;
    if (rule.startsWith("forced_")) return `${name}: ${texts.map(visible).join(", ")}`; // its text already says which token is left
    return `${name}: ${texts.map((text) => `“${visible(text)}”`).join(", ")}${more > 0 ? ` and ${more} more` : ""}`;
  });
}

function drawPanels(data, number, map, settings) {
  const token = data.tokens[number];
  byId("chosen").textContent = `Token ${number + 1} of ${data.tokens.length}: ${visible(token.text)}, ${percent(token.probability)}`;
  byId("instead").replaceChildren(...token.alternatives.map((other) => bar(other, other.id === token.id)));
  byId("rules-panel").hidden = token.banned.length === 0;
  byId("rules").replaceChildren(...rulesOf(token.banned).map((text) => make("li", {}, text)));
  byId("spread-panel").hidden = !token.spread;
  if (token.spread) drawSpread(token, axisOf(data.tokens, number), data.image);
  drawPrompt(data, map);
  drawLens(token, settings);
}

function bar({ text, probability }, said) {
  const fill = make("span", { className: "fill" });
  fill.style.width = `${100 * probability}%`;
  return make("li", { className: said ? "said" : "" }, make("span", { className: "word" }, visible(text.trim() || text)),
    make("span", { className: "track" }, fill), make("span", { className: "share" }, percent(probability)));
}

function drawSpread(token, axis, image) {
  const { bins, mean: middle, std } = token.spread, side = axis === "x" ? image.width : image.height;
  const first = Math.min(...bins.map(([bin]) => bin)), last = Math.max(...bins.map(([bin]) => bin));
  const top = Math.max(...bins.map(([, share]) => share), 1e-9);
  const bars = bins.map(([bin, share]) => draw("rect", { class: bin === token.location ? "said" : "", x: bin - first + 0.1,
    width: 0.8, y: 1 - share / top, height: share / top }));
  const held = Math.min(1, bins.reduce((sum, [, share]) => sum + share, 0));
  const about = `${axis} bins ${first} to ${last} hold ${percent(held)}, at most ${percent(top)} in one`;
  const svg = draw("svg", { viewBox: `0 0 ${last - first + 1} 1`, preserveAspectRatio: "none", role: "img", "aria-label": about }, ...bars);
  const pixels = (std * side) / 1000;
  byId("spread").replaceChildren(svg, make("p", {}, `${about}. Mean of all bins ${middle.toFixed(1)}, ` +
    `standard deviation ${std.toFixed(1)} bins (${pixels.toFixed(1)} pixels).`));
}

function drawPrompt(data, map) {
  const weights = map && map.prompt, top = weights ? Math.max(...weights) || 1 : 1;
  byId("prompt-title").textContent = weights ? "Weights on the prompt" : "The prompt (this map has no weights for it)";
  byId("prompt").replaceChildren(...data.prompt.map((word, i) => {
    const weight = make("span", { className: "weight" });
    weight.style.opacity = weights ? (0.55 * weights[i]) / top : 0;
    return make("span", {}, weight, visible(word.text));
  }));
}

function drawLens(token, { mode, layer }) {
  const rows = token.lens.map((guesses, number) => {
    const name = number ? `${number}` : "input", now = number === layer + 1 && (mode === "layer" || mode === "head");
    return make("tr", { className: now ? "now" : "" }, make("th", { scope: "row" }, name),
      ...guesses.map((guess) => lensCell(guess, guess.text === token.text)));
  });
  byId("lens").tBodies[0].replaceChildren(...rows);
}

function lensCell({ text, probability }, said) {
  const fill = make("span", { className: "fill" });
  fill.style.width = `${100 * probability}%`;
  const words = make("span", { className: "cell" }, make("span", { className: "word" }, brief(text)),
    make("span", { className: "share" }, percent(probability)));
  return make("td", { className: said ? "said" : "", title: visible(text) }, fill, words);
}

// Every head as a square: the larger, the more of its weight lies on one place.
function drawHeads(data, token, { mode, layer, head }) {
  const { layers, heads } = data.model, { peak } = data.tokens[token].attention, svg = byId("heads");
  const top = Math.max(...peak.flat()) || 1;
  svg.setAttribute("viewBox", `0 0 ${heads} ${layers}`);
  svg.style.maxWidth = `${1.1 * heads}rem`;
  const squares = range(layers).flatMap((l) => range(heads).flatMap((h) => {
    const side = 0.9 * Math.sqrt(peak[l][h] / top), edge = (1 - side) / 2;
    return [draw("rect", { class: "back", x: h, y: l, width: 1, height: 1, "data-layer": l, "data-head": h }),
      draw("rect", { x: h + edge, y: l + edge, width: side, height: side, "data-layer": l, "data-head": h })];
  }));
  const now = mode === "head" ? { x: head, y: layer, width: 1, height: 1 } : { x: 0, y: layer, width: heads, height: 1 };
  svg.replaceChildren(...squares, ...(mode === "head" || mode === "layer" ? [draw("rect", { class: "now", ...now })] : []));
  byId("heads-caption").textContent = "Rows are layers, columns are heads. The size of a square shows the largest share of the " +
    `head's weight on one place of the image or prompt (at most ${percent(top)}). Click a square, or use the sliders.`;
}
