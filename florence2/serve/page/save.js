// Save the image with its shapes as a PNG file.

import { draw } from "./dom.js";
import { drawShapes } from "./overlay.js";

const LEAST = 1000; // pixels of the longer side, so that labels on a small image are legible

export async function savePng(image, shapes) {
  const scale = Math.max(1, LEAST / Math.max(image.width, image.height));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [Math.round(image.width * scale), Math.round(image.height * scale)];
  const context = canvas.getContext("2d");
  for (const source of [image.url, drawing(image, shapes, canvas)]) {
    const part = new Image();
    part.src = source;
    await part.decode();
    context.drawImage(part, 0, 0, canvas.width, canvas.height);
    if (source !== image.url) URL.revokeObjectURL(source);
  }
  const file = await new Promise((done) => canvas.toBlob(done, "image/png"));
  if (!file) throw new Error("The browser cannot save an image of this size.");
  download(file, `${image.name.replace(/\.[^.]*$/, "")}-answer.png`);
}

function drawing({ width, height }, shapes, canvas) {
  const svg = draw("svg", { width: canvas.width, height: canvas.height });
  drawShapes(svg, shapes, { width, height, unit: width / canvas.width * Math.max(1, canvas.width / 1400) });
  return URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(svg)], { type: "image/svg+xml" }));
}

function download(file, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
