// The score of the box, quad or polygon to which a token belongs, with the probability of each of its locations.

const EDGES = ["left", "top", "right", "bottom"];
const LISTED = 8; // numbers of a quad; a longer outline becomes a chart

function drawShape(data, shapes, number) {
  const shape = shapes.find((one) => holds(one, number)), numbers = shape ? placesOf(data, shape) : [];
  byId("shape-panel").hidden = numbers.length === 0;
  if (!numbers.length) return;
  const score = shape.score === null ? "" : `: ${shape.score.toFixed(3)}`;
  byId("shape-title").textContent = `${shape.label ? `Score of “${shape.label}”` : "Score"}${score}`;
  const listed = numbers.length <= LISTED;
  byId("shape").replaceChildren(...(listed ? numbers.map((i) => placeRow(data, numbers, i, i === number)) : []));
  byId("shape-chart").replaceChildren(...(listed ? [] : [placeChart(data, numbers, number)]));
  byId("shape-note").textContent = "The score is the geometric mean of the probabilities of its location tokens; " +
    (listed ? "± is the standard deviation of each, in pixels." : "each bar is one of them, in the order of the answer.") +
    confidenceOf(data, shape, numbers);
}

// A region is as sure as its label and its least sure edge.
function confidenceOf(data, { confidence }, numbers) {
  if (!confidence || !confidence.near.length) return "";
  const least = Math.min(...confidence.near), place = placeName(data, numbers, numbers[confidence.near.indexOf(least)]);
  const raw = (confidence.label * least).toFixed(3);
  const calibrated = data.answer.calibrated ? `, which is calibrated to ${confidence.value.toFixed(3)}` : ", not calibrated";
  return ` Its confidence is ${percent(confidence.label)} for the label times ${percent(least)} near its least sure place, ` +
    `${place}: ${raw}${calibrated}.`;
}

function placeName(data, numbers, i) {
  const place = numbers.indexOf(i);
  return numbers.length === 4 ? EDGES[place] : `${axisOf(data.tokens, i)}${Math.floor(place / 2) + 1}`;
}

function placesOf({ tokens }, { tokens: [first, last] }) {
  return range(last - first + 1).map((i) => first + i).filter((i) => tokens[i].location !== null);
}

function placeRow(data, numbers, i, said) {
  const token = data.tokens[i], axis = axisOf(data.tokens, i), name = placeName(data, numbers, i);
  const side = axis === "x" ? data.image.width : data.image.height;
  const spread = token.spread ? ` ±\u00a0${((token.spread.std * side) / 1000).toFixed(1)}` : "";
  return bar({ text: `${name}${spread}`, probability: token.probability }, said);
}

function placeChart(data, numbers, number) {
  const bars = numbers.map((i, place) => draw("rect", { class: i === number ? "said" : "", x: place + 0.1, width: 0.8,
    y: 1 - data.tokens[i].probability, height: data.tokens[i].probability }));
  const about = `${numbers.length} probabilities from 0 to 100\u00a0%`;
  return draw("svg", { viewBox: `0 0 ${numbers.length} 1`, preserveAspectRatio: "none", role: "img", "aria-label": about }, ...bars);
}
