// An answer, and the request that gave it, as code to copy.

import { address, hasKey } from "./api.js";

export const FORMS = [
  { value: "json", text: "JSON" },
  { value: "reference", text: "Reference" },
  { value: "curl", text: "curl" },
  { value: "python", text: "Python" },
];

export function codeOf(form, { answer, asked, image }) {
  const { florence2_result: reference, ...typed } = answer;
  return { json: () => pretty(typed), reference: () => pretty(reference), curl: () => curl(asked, image), python: () => python(asked, image) }[form]();
}

// JSON with a line for each value, but numbers of one list in one line. A string has no line break of its own in JSON.
const pretty = (value) => JSON.stringify(value, null, 2).replace(/\[\n\s+([-\d.e+,\s]+?)\n\s+\]/g, (_, numbers) => `[${numbers.replace(/\s+/g, " ")}]`);

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

function curl(asked, image) {
  const key = hasKey() ? ` \\\n  -H "Authorization: Bearer $FLORENCE2_API_KEY"` : "";
  if (!image.isKept) return `curl ${address()}${key} \\\n  -F ${quoted(`image=@"${image.name}"`)} \\\n  -F ${quoted(`request=${JSON.stringify({ tasks: [asked] })}`)}`;
  const body = JSON.stringify({ image: { sha256: image.sha256 }, tasks: [asked] });
  return `curl ${address()}${key} \\\n  -H 'Content-Type: application/json' \\\n  -d ${quoted(body)}`;
}

function python(asked, image) {
  const key = hasKey() ? `, "authorization": "Bearer " + os.environ["FLORENCE2_API_KEY"]` : "";
  const imports = [...(image.isKept ? [] : ["base64"]), "json", ...(hasKey() ? ["os"] : []), "urllib.request"];
  const given = image.isKept ? `{"sha256": "${image.sha256}"}` : `{"data": base64.b64encode(open(${JSON.stringify(image.name)}, "rb").read()).decode()}`;
  return `${imports.map((name) => `import ${name}`).join("\n")}

body = {"image": ${given}, "tasks": [${JSON.stringify(asked)}]}
headers = {"content-type": "application/json"${key}}
request = urllib.request.Request("${address()}", json.dumps(body).encode(), headers)
with urllib.request.urlopen(request) as response:
    print(json.load(response)["answers"][0])
`;
}

// Copy without the clipboard's own interface, which browsers have on https and on this machine only.
export async function copyText(text, shown) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // not allowed here; the text is selected instead
    }
  }
  getSelection().selectAllChildren(shown);
  return document.execCommand("copy");
}
