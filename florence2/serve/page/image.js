// Where images come from: a drop, the clipboard, a file, a camera, or the example.

import { byId } from "./dom.js";

const EXAMPLE = "page/example.png";

// Read a file at once, so that it can be sent later even if it changes on the disk. Throws an Error with a sentence.
export async function readImage(source, name) {
  const file = new Blob([await source.arrayBuffer()], { type: source.type });
  const url = URL.createObjectURL(file), trial = new Image();
  trial.src = url;
  try {
    await trial.decode();
  } catch {
    URL.revokeObjectURL(url);
    throw new Error(`The browser cannot show ${name}; choose a PNG, JPEG, WebP, GIF or AVIF image.`);
  }
  return { file, name, url, width: trial.naturalWidth, height: trial.naturalHeight, sha256: null, isKept: true };
}

// Call `take(blob, name)` with whatever image comes, and `refuse(sentence)` for anything else.
export function watchSources(take, refuse) {
  const first = (files) => [...files].find((file) => file.type.startsWith("image/")) ?? files[0];
  for (const id of ["file", "photo"]) {
    byId(id).addEventListener("change", ({ target }) => {
      if (target.files.length) take(target.files[0], target.files[0].name);
      target.value = ""; // so that the same file can be chosen again
    });
  }
  byId("example").addEventListener("click", async () => {
    const response = await fetch(EXAMPLE).catch(() => null);
    if (response?.ok) take(await response.blob(), "example.png");
    else refuse("The example cannot be loaded, because the server cannot be reached.");
  });
  document.addEventListener("paste", (event) => {
    const file = first(event.clipboardData.files);
    if (!file) return;
    event.preventDefault();
    take(file, file.name || "pasted image");
  });
  watchDrops((files) => (files.length ? take(first(files), first(files).name) : refuse("Drop an image file; text and links cannot be opened here.")));
}

function watchDrops(drop) {
  const over = (isOver) => document.body.classList.toggle("over", isOver);
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    over(true);
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) over(false);
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    over(false);
    drop(event.dataTransfer.files);
  });
}
