// The tasks: their groups, the words for them, and what each needs.

export const GROUPS = [
  { id: "describe", name: "Describe" },
  { id: "find", name: "Find" },
  { id: "read", name: "Read" },
  { id: "region", name: "About a region" },
];

// token: [name, answer, example of its text]
const WORDS = {
  "<CAPTION>": ["Caption", "one sentence"],
  "<DETAILED_CAPTION>": ["Detailed caption", "a few sentences"],
  "<MORE_DETAILED_CAPTION>": ["More detailed caption", "a paragraph"],
  "<OD>": ["Objects", "boxes with names"],
  "<DENSE_REGION_CAPTION>": ["Objects with captions", "boxes with phrases"],
  "<REGION_PROPOSAL>": ["Region proposals", "boxes without names"],
  "<CAPTION_TO_PHRASE_GROUNDING>": ["Phrases of a caption", "a box per phrase", "a red circle and a blue star"],
  "<OPEN_VOCABULARY_DETECTION>": ["Objects by name", "its boxes", "triangle"],
  "<REFERRING_EXPRESSION_SEGMENTATION>": ["Outline by description", "its outline", "a blue triangle"],
  "<OCR>": ["Text", "all the text, without places"],
  "<OCR_WITH_REGION>": ["Text with places", "each line and where it is"],
  "<REGION_TO_CATEGORY>": ["Category", "the name of the object in it"],
  "<REGION_TO_DESCRIPTION>": ["Description", "a phrase about it"],
  "<REGION_TO_OCR>": ["Text in it", "the text in the region"],
  "<REGION_TO_SEGMENTATION>": ["Outline", "the outline of the object in it"],
};
const ANSWERS = { text: "a text", boxes: "boxes with names", proposals: "boxes", phrases: "a box per phrase",
  quads: "text and where it is", polygons: "outlines", boxes_or_polygons: "boxes or outlines" };
const NEEDS = { nothing: "image only", text: "needs words", region: "needs a region", anything: "words or a region, if you like" };

export const CAPTION = "<CAPTION>", GROUND = "<CAPTION_TO_PHRASE_GROUNDING>", OUTLINE = "<REGION_TO_SEGMENTATION>";

export function groupOf({ token, takes, kind }) {
  if (takes === "region") return "region";
  if (/\bOCR|_OCR/.test(token)) return "read";
  return kind === "text" ? "describe" : "find";
}

// A task of the server with the words for it; one of the model's own is called by its alias.
export function describe({ task: token, alias, sentence, takes, kind }) {
  const [name, answer, example] = WORDS[token] ?? [alias.replaceAll("_", " "), ANSWERS[kind] ?? kind];
  return { token, sentence, takes, kind, name, answer, example, needs: NEEDS[takes], group: groupOf({ token, takes, kind }) };
}

export const takesText = (task) => task.takes === "text" || task.takes === "anything";
export const takesRegion = (task) => task.takes === "region" || task.takes === "anything";

// The part of a request that asks a task; missing input is left out, so that the server can say what is missing.
export function question(task, text, box) {
  if (takesText(task) && text.trim()) return { task: task.token, text: text.trim() };
  if (takesRegion(task) && box) return { task: task.token, box };
  return { task: task.token };
}
