// The server: its tasks, and questions about an image, which is sent once and then named by its hash.

const QUESTIONS = "v1/florence2";
let key = "";

export class ServerError extends Error {
  constructor(message, status = 0, code = "", retryAfter = 0) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

export const address = () => new URL(QUESTIONS, document.baseURI).href;
export const hasKey = () => key !== "";

export function setKey(value) {
  if (/[^\x21-\x7e]/.test(value.trim())) throw new ServerError("An API key consists of ASCII characters without spaces; check it.", 401);
  key = value.trim();
}

async function call(path, settings = {}) {
  const headers = { ...settings.headers, ...(key && { authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...settings, headers }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new ServerError(`The server at ${location.host} cannot be reached. Check that it is running and that this device is online, then ask again.`);
  });
  const body = await response.json().catch((error) => {
    if (error.name === "AbortError") throw error;
    return null;
  });
  if (response.ok && body) return body;
  const { message, code } = body?.error ?? {};
  throw new ServerError(message ?? `The server answered with status ${response.status} and without an explanation.`,
    response.status, code, Number(response.headers.get("retry-after")) || 0);
}

export const getTasks = async () => (await call("v1/tasks")).tasks;
export const getModel = async () => (await call("v1/models")).data[0].id;

// The whole reply to one task; `image` learns the hash by which the server knows it.
export async function ask(image, task, signal) {
  if (image.sha256) {
    const body = JSON.stringify({ image: { sha256: image.sha256 }, tasks: [task] });
    try {
      const reply = await call(QUESTIONS, { method: "POST", headers: { "content-type": "application/json" }, body, signal });
      image.isKept = true;
      return reply;
    } catch (error) {
      if (error.code !== "picture_not_cached") throw error;
      image.isKept = false;
    }
  }
  const form = new FormData();
  form.append("request", JSON.stringify({ tasks: [task] }));
  form.append("image", image.file, image.name);
  const reply = await call(QUESTIONS, { method: "POST", body: form, signal });
  image.sha256 = reply.picture.sha256;
  return reply;
}
