// The playground: a client of the gateway's own /v1, as any other. The key is in its field and nowhere else.
"use strict";

const at = (id) => document.getElementById(id);
const page = at("playground");
const base = `${location.origin}/v1`;

// How many a request asks for; fewer may come.
const PREVIEWS = 2;

// What the image API takes as a reference.
const IMAGES = ["image/png", "image/jpeg", "image/webp"];

// An error in words for who looks at the page; those of the browser are for who wrote it.
class Told extends Error {}

const NO_ANSWER =
  "No answer came. If the gateway has the request, it reads on and books what is made: look at the requests of the key's team.";
const BROKEN =
  "The connection broke. The gateway reads on while an answer comes, and books it: look at the requests of the key's team.";
const UNREADABLE = "The answer is not one of an image API, and can't be shown.";
const FREE = "Nothing was charged.";

function failWith(message) {
  throw new Told(message);
}

function usd(micro) {
  const digits = String(Math.abs(micro)).padStart(7, "0");
  const fraction = digits.slice(-6).replace(/00$/, "");
  return `${micro < 0 ? "-" : ""}$${digits.slice(0, -6)}.${fraction}`;
}

// What is ordered

function order() {
  const fields = {
    model: at("model").value,
    prompt: at("prompt").value,
    size: at("size").value,
    quality: at("quality").value,
    n: Number(at("n").value),
    stream: true,
    partial_images: PREVIEWS,
  };
  return fields;
}

function typedKey() {
  return at("key").value.trim();
}

// A header takes nothing else.
function isPrintable(key) {
  return /^[\x21-\x7e]*$/.test(key);
}

function mark(id, wrong) {
  if (wrong) at(id).setAttribute("aria-invalid", "true");
  else at(id).removeAttribute("aria-invalid");
}

function tell(id, message) {
  const told = at(`${id}-told`);
  told.dataset.hint ??= told.textContent;
  told.textContent = message || told.dataset.hint;
  told.classList.toggle("error", message !== "");
  mark(id, message !== "");
}

// Says at its field what can't be sent, and gives the first such field.
function wrongField() {
  tell("key", isPrintable(typedKey()) ? "" : "A key has only letters from a to z, digits and hyphens: copy it again.");
  const other = [...at("images").files].find((file) => !IMAGES.includes(file.type));
  tell("images", other ? `${other.name} is not a PNG, JPEG or WebP file: choose others.` : "");
  return [at("key"), at("images")].find((field) => field.hasAttribute("aria-invalid"));
}

function offer() {
  for (const option of document.querySelectorAll("option[data-model]")) {
    option.hidden = option.disabled = option.dataset.model !== at("model").value;
  }
  for (const select of [at("size"), at("quality")]) {
    if (select.selectedOptions[0]?.disabled) select.value = [...select.options].find((option) => !option.disabled).value;
  }
}

function readImage(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Told(`${file.name} can't be read: choose it again.`));
    reader.readAsDataURL(file);
  });
}

// What it costs, and what that leaves

let asked = 0;

async function left(key) {
  const answer = await fetch(`${base}/budget`, { headers: { authorization: `Bearer ${key}` }, credentials: "omit" });
  if (!answer.ok) return null;
  const hard = (await answer.json()).budgets.filter((budget) => !budget.soft).map((budget) => budget.remaining_micro_usd);
  return { tightest: hard.length ? Math.min(...hard) : null };
}

async function showPrice() {
  const mine = ++asked;
  const { model, size, quality } = order();
  const key = typedKey();
  const query = new URLSearchParams({ model, size, quality, n: at("n").value });
  const budgeted = key.startsWith("sk-bm-") && isPrintable(key);
  const [answer, budget] = await Promise.all([fetch(`${page.dataset.price}?${query}`), budgeted ? left(key) : null]);
  const told = await answer.json().catch(() => ({ message: "The price can't be told now." }));
  if (mine !== asked) return;
  mark("n", told.field === "n");
  if (told.message) {
    at("price").textContent = told.message;
    return;
  }
  const price = `${told.at_most ? "At most " : ""}${usd(told.hold_micro_usd)}`;
  if (budget === null) at("price").textContent = price;
  else if (budget.tightest === null) at("price").textContent = `${price}. No hard budget limits this key.`;
  else at("price").textContent = `${price}, which leaves ${usd(budget.tightest - told.hold_micro_usd)} of ${usd(budget.tightest)}`;
}

let waiting;
function soon() {
  clearTimeout(waiting);
  waiting = setTimeout(() => showPrice().catch(() => {}), 250);
}

// The answer

async function* events(body) {
  const decoder = new TextDecoder();
  let pieces = [];
  let endedInCr = false;
  const reader = body.getReader();
  for (;;) {
    const { done, value } = await reader.read().catch(() => failWith(BROKEN));
    const decoded = done ? decoder.decode() : decoder.decode(value, { stream: true });
    // A line ends in LF, CR or CRLF; of the latter, the LF can be in the next piece.
    const text = (endedInCr ? decoded.replace(/^\n/, "") : decoded).replace(/\r\n?/g, "\n");
    if (decoded) endedInCr = decoded.endsWith("\r");
    // An event is megabytes long and comes in many pieces: they are joined once, where it ends.
    const ends = ((pieces.at(-1) ?? "").slice(-1) + text).includes("\n\n");
    if (text) pieces.push(text);
    if (ends || done) {
      const blocks = pieces.join("").split("\n\n");
      const rest = done ? "" : blocks.pop();
      pieces = rest ? [rest] : [];
      for (const block of blocks) {
        const lines = block.split("\n").filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).trim()).join("\n");
        if (data && data !== "[DONE]") yield JSON.parse(data);
      }
    }
    if (done) return;
  }
}

function blobOf(base64, format) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], { type: `image/${format || "png"}` }));
}

let shown = [];

function clear() {
  shown.forEach((url) => URL.revokeObjectURL(url));
  shown = [];
  at("pictures").replaceChildren();
  at("cost").textContent = "";
  at("refused").hidden = true;
}

function figure() {
  const found = document.createElement("figure");
  at("pictures").append(found);
  return found;
}

function show(into, event, preview) {
  into.classList.toggle("preview", preview);
  into.dataset.previews = Number(into.dataset.previews || 0) + (preview ? 1 : 0);
  if (!event.b64_json) {
    if (!preview) into.append(linkTo(event.url));
    return;
  }
  const url = blobOf(event.b64_json, event.output_format);
  shown.push(url);
  const image = into.querySelector("img") ?? into.appendChild(document.createElement("img"));
  image.src = url;
  image.alt = preview ? "A preview of the picture" : `The picture: ${at("prompt").value}`;
  if (preview) return;
  const link = document.createElement("a");
  link.href = url;
  link.download = `beanmeter-${at("pictures").children.length}.${event.output_format || "png"}`;
  link.textContent = "Download";
  into.append(link);
}

// Of another host no picture may be shown here: who wants to see it goes there.
function linkTo(url) {
  const address = URL.canParse(url) ? new URL(url) : null;
  if (!["http:", "https:"].includes(address?.protocol)) return "The picture's address can't be opened.";
  const link = document.createElement("a");
  link.href = address.href;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  link.textContent = `The picture is at ${address.host}`;
  return link;
}

async function follow(answer) {
  const type = answer.headers.get("content-type") || "";
  let current = null;
  let finished = 0;
  if (!type.startsWith("text/event-stream")) {
    const text = await answer.text().catch(() => failWith(BROKEN));
    for (const image of JSON.parse(text).data) {
      show(figure(), image, false);
      finished += 1;
    }
    return finished;
  }
  for await (const event of events(answer.body)) {
    if (event.error || event.type === "error") failWith(event.error?.message || event.message || "The upstream failed.");
    const preview = event.type.endsWith(".partial_image");
    if (!preview && !event.type.endsWith(".completed")) continue;
    current ??= figure();
    show(current, event, preview);
    at("told").textContent = preview ? "A preview; the picture is on its way." : "Done.";
    if (!preview) {
      current = null;
      finished += 1;
    }
  }
  return finished;
}

// Why there is no picture, and whether it is certain that it was free: the gateway's own refusals are, but for one.
async function refusal(answer) {
  const error = (await answer.json().catch(() => null))?.error;
  const own = answer.headers.get("x-beanmeter-error-source") === "gateway";
  return {
    message: error?.message || `The answer was an error, status ${answer.status}, without a word why.`,
    free: own && ![undefined, "upstream_failed"].includes(error?.code),
  };
}

// What became of a request. `unseen` is what to say where it belongs to a team that this visitor is no member of.
async function showCost(request, unseen) {
  // The last byte can come a moment before the booking.
  for (let tries = 0; tries < 20; tries += 1) {
    const answer = await fetch(`${page.dataset.cost}?${new URLSearchParams({ request_id: request })}`);
    if (answer.status === 404) {
      at("cost").textContent = unseen;
      return;
    }
    if (!answer.ok) break;
    const charge = await answer.json();
    if (!["reserved", "forwarded"].includes(charge.state)) {
      if (charge.state === "review") {
        at("cost").textContent =
          `${usd(charge.settled_micro_usd)} so far, ${usd(charge.reserved_micro_usd)} held until an operator has looked at it.`;
      } else at("cost").textContent = charge.settled_micro_usd ? `It cost ${usd(charge.settled_micro_usd)}.` : FREE;
      return;
    }
    await new Promise((resolve) => setTimeout(resolve, 250));
  }
  at("cost").textContent = `What it cost is not known yet; the requests of the key's team will tell, at ${request}.`;
}

async function send(event) {
  event.preventDefault();
  const wrong = wrongField();
  if (wrong) {
    wrong.focus();
    return;
  }
  clear();
  at("send").disabled = true;
  at("told").textContent = "On its way…";
  let request = null;
  let unseen = "";
  try {
    const images = await Promise.all([...at("images").files].map(readImage));
    const body = images.length ? { ...order(), images: images.map((url) => ({ image_url: url })) } : order();
    const answer = await fetch(`${base}/images/${images.length ? "edits" : "generations"}`, {
      method: "POST",
      credentials: "omit",
      headers: { authorization: `Bearer ${typedKey()}`, "content-type": "application/json" },
      body: JSON.stringify(body),
    }).catch(() => failWith(NO_ANSWER));
    request = answer.headers.get("x-beanmeter-request-id");
    if (!answer.ok) {
      const { message, free } = await refusal(answer);
      if (free) {
        request = null;
        at("cost").textContent = FREE;
      }
      failWith(message);
    }
    const finished = await follow(answer);
    if (finished) unseen = "It is booked to the key's own team.";
    at("told").textContent = finished ? "Done." : "No picture came.";
  } catch (error) {
    at("told").textContent = "";
    at("refused").textContent = error instanceof Told ? error.message : UNREADABLE;
    at("refused").hidden = false;
  }
  at("send").disabled = false;
  if (request) await showCost(request, unseen).catch(() => {});
  soon();
}

// The same request in code

function snippets() {
  const { model, prompt, size, quality, n } = order();
  const types = [...at("images").files].map(({ type }) => type).filter((type) => IMAGES.includes(type));
  const files = types.map((type, index) => ({ type, name: `image-${index + 1}.${type.replace("image/", "")}` }));
  const fields = { model, prompt, size, quality, n };
  at("as-curl").textContent = asCurl(fields, files);
  at("as-python").textContent = asPython(fields, files);
  at("as-javascript").textContent = asJavaScript(fields, files);
}

const inShell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function asCurl(fields, files) {
  const head = [`curl ${base}/images/${files.length ? "edits" : "generations"}`, `-H "Authorization: Bearer $BEANMETER_KEY"`];
  const body = files.length
    ? [
        ...Object.entries(fields).map(([name, value]) => `--form-string ${inShell(`${name}=${value}`)}`),
        ...files.map(({ name, type }) => `-F ${inShell(`image[]=@${name};type=${type}`)}`),
      ]
    : [`-H 'Content-Type: application/json'`, `-d ${inShell(JSON.stringify(fields, null, 2))}`];
  return [...head, ...body].join(" \\\n  ");
}

function asPython(fields, files) {
  const args = Object.entries(fields).map(([name, value]) => `    ${name}=${JSON.stringify(value)},\n`);
  const images = files.map(({ name }) => `open("${name}", "rb")`);
  if (files.length) args.unshift(`    image=[${images.join(", ")}],\n`);
  return (
    `import base64, os\nfrom openai import OpenAI\n\n` +
    `client = OpenAI(base_url=${JSON.stringify(base)}, api_key=os.environ["BEANMETER_KEY"])\n` +
    `answer = client.images.${files.length ? "edit" : "generate"}(\n${args.join("")})\n` +
    `for number, image in enumerate(answer.data, 1):\n` +
    `    with open(f"picture-{number}.png", "wb") as file:\n        file.write(base64.b64decode(image.b64_json))`
  );
}

function asJavaScript(fields, files) {
  const args = Object.entries(fields).map(([name, value]) => `  ${name}: ${JSON.stringify(value)},\n`);
  // Without a type the SDK sends a stream as unknown bytes.
  const images = files.map(({ name, type }) => `await toFile(fs.createReadStream("${name}"), null, { type: "${type}" })`);
  if (files.length) args.unshift(`  image: [\n${images.map((image) => `    ${image},\n`).join("")}  ],\n`);
  return (
    `import fs from "node:fs";\nimport OpenAI${files.length ? ", { toFile }" : ""} from "openai";\n\n` +
    `const client = new OpenAI({ baseURL: ${JSON.stringify(base)}, apiKey: process.env.BEANMETER_KEY });\n` +
    `const answer = await client.images.${files.length ? "edit" : "generate"}({\n${args.join("")}});\n` +
    `for (const [index, image] of answer.data.entries()) {\n` +
    `  fs.writeFileSync(\`picture-\${index + 1}.png\`, Buffer.from(image.b64_json, "base64"));\n}`
  );
}

function changed() {
  offer();
  wrongField();
  snippets();
  soon();
}

at("order").addEventListener("submit", send);
at("order").addEventListener("input", changed);
changed();
