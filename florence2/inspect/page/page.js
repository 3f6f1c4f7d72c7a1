// The selection (token, mode, layer, head), and the controls that change it.

async function start() {
  const data = await readData(), shapes = shapesOf(data.answer);
  const state = { pinned: 0, shown: 0, mode: "all", layer: data.model.layers - 1, head: 0 };
  const buttons = makeTokens(data);
  byId("image").style.setProperty("--ratio", data.image.width / data.image.height);

  const show = (token) => {
    state.shown = token;
    const map = mapOf(data, token, state);
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === token));
    drawHeat(data, map);
    drawScale(map, state);
    byId("legend").textContent = legendOf(data, map, state);
    drawMarks(data, shapes, token);
    drawHeads(data, token, state);
    drawPanels(data, token, map, state);
    drawShape(data, shapes, token);
  };
  const pin = (token) => {
    state.pinned = token;
    show(token);
    follow(token, true);
  };
  const choose = (token) => (buttons[token] === document.activeElement ? pin(token) : buttons[token].focus());
  const follow = drawTree(data, pin);

  drawAnswer(data, shapes, choose);
  byId("tokens").replaceChildren(...buttons);
  rove(buttons, (index, key) => stepOf(buttons.length, index, key), pin);
  buttons.forEach((button, i) => {
    button.addEventListener("click", () => pin(i));
    button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && show(i));
  });
  byId("tokens").addEventListener("pointerleave", () => show(state.pinned));
  wireControls(data, state, () => show(state.shown));
  byId("packing").textContent = packingOf(data);
  new ResizeObserver(() => drawMarks(data, shapes, state.shown)).observe(byId("image"));
  pin(Math.max(0, data.tokens.findIndex((token) => !/^<\/?s>$/.test(token.text))));
}

function stepOf(count, index, key) {
  const target = { ArrowLeft: index - 1, ArrowUp: index - 1, ArrowRight: index + 1, ArrowDown: index + 1, Home: 0, End: count - 1 }[key];
  return target === undefined ? undefined : Math.min(count - 1, Math.max(0, target));
}

function wireControls(data, state, show) {
  const radios = [...document.querySelectorAll("input[name=mode]")];
  const tell = () => {
    radios.forEach((radio) => { radio.checked = radio.value === state.mode; });
    byId("layer").value = state.layer + 1;
    byId("head").value = state.head + 1;
    byId("layer-now").textContent = state.layer + 1;
    byId("head-now").textContent = state.head + 1;
    show();
  };
  const change = (changes) => { Object.assign(state, changes); tell(); };
  byId("layer").max = data.model.layers;
  byId("head").max = data.model.heads;
  radios.forEach((radio) => radio.addEventListener("change", () => change({ mode: radio.value })));
  byId("layer").addEventListener("input", (event) => change({ layer: event.target.value - 1, mode: state.mode === "head" ? "head" : "layer" }));
  byId("head").addEventListener("input", (event) => change({ head: event.target.value - 1, mode: "head" }));
  byId("heads").addEventListener("click", (event) => {
    const { layer, head } = event.target.dataset;
    if (layer !== undefined) change({ layer: Number(layer), head: Number(head), mode: "head" });
  });
  tell();
}

function packingOf({ packing, image }) {
  const [h, w] = image.grid;
  if (packing.pool === 1 && packing.levels === 256) return `Maps of ${h} × ${w} cells.`;
  const coarse = packing.pool > 1 ? ` and one value for each block of ${packing.pool} × ${packing.pool} of the ${h} × ${w} cells` : "";
  return `To keep this page small, maps have ${packing.levels} levels${coarse}.`;
}

start().catch((error) => {
  byId("trouble").hidden = false;
  byId("trouble").textContent = `This page could not be shown (${error}); it needs a browser of 2023 or later.`;
});
