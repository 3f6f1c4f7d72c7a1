// Elements, made from text alone: nothing that a model or a file says is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

export const make = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
export const draw = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

function fill(element, attributes = {}, children = []) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export function button(text, act, attributes = {}) {
  const made = make("button", { type: "button", ...attributes }, text);
  made.addEventListener("click", act);
  return made;
}

// Radio buttons that look like one row of choices; `choose` hears the value.
export function segments(fieldset, name, choices, choose) {
  const labels = choices.map(({ value, text, note }) => {
    const input = make("input", { type: "radio", name, value });
    input.addEventListener("change", () => choose(value));
    return make("label", {}, input, make("span", { class: "face" }, text, ...(note ? [make("small", {}, note)] : [])));
  });
  fieldset.replaceChildren(fieldset.querySelector("legend"), ...labels);
}

export const pick = (fieldset, value) => {
  for (const input of fieldset.querySelectorAll("input")) input.checked = input.value === value;
};
