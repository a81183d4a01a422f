// The playground: a client of the gateway's own /v1, as any other. The key is in its field and nowhere else.
"use strict";

const at = (id) => document.getElementById(id);
const page = at("playground");
const base = `${location.origin}/v1`;

// How many a request asks for; fewer may come.
const PREVIEWS = 2;

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
    reader.onerror = () => reject(reader.error);
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
  const { model, size, quality, n } = order();
  const key = at("key").value.trim();
  const query = new URLSearchParams({ model, size, quality, n });
  const [answer, budget] = await Promise.all([fetch(`${page.dataset.price}?${query}`), key.startsWith("sk-bm-") ? left(key) : null]);
  const told = await answer.json().catch(() => ({ message: "The price can't be told now." }));
  if (mine !== asked) return;
  if (!answer.ok) {
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
  const reader = body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    const text = done ? decoder.decode() : decoder.decode(value, { stream: true });
    // An event is megabytes long and comes in many pieces: they are joined once, where it ends.
    const tail = (pieces.at(-1) ?? "").slice(-3);
    pieces.push(text);
    if (/\n\r?\n/.test(tail + text) || done) {
      const blocks = pieces.join("").split(/\r?\n\r?\n/);
      pieces = done ? [] : [blocks.pop()];
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
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
  const image = document.createElement("img");
  found.append(image);
  at("pictures").append(found);
  return found;
}

function show(into, event, preview) {
  const url = event.b64_json ? blobOf(event.b64_json, event.output_format) : event.url;
  shown.push(url);
  into.classList.toggle("preview", preview);
  into.dataset.previews = Number(into.dataset.previews || 0) + (preview ? 1 : 0);
  const image = into.querySelector("img");
  image.src = url;
  image.alt = preview ? "A preview of the picture" : `The picture: ${at("prompt").value}`;
  if (preview) return;
  const link = document.createElement("a");
  link.href = url;
  link.download = `beanmeter-${at("pictures").children.length}.${event.output_format || "png"}`;
  link.textContent = "Download";
  into.append(link);
}

async function follow(answer) {
  const type = answer.headers.get("content-type") || "";
  let current = null;
  let finished = 0;
  if (!type.startsWith("text/event-stream")) {
    for (const image of (await answer.json()).data) {
      show(figure(), image, false);
      finished += 1;
    }
    return finished;
  }
  for await (const event of events(answer.body)) {
    if (event.error || event.type === "error") throw new Error(event.error?.message || event.message || "The upstream failed.");
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

async function showCost(request) {
  // The last byte can come a moment before the booking.
  for (let tries = 0; tries < 20; tries += 1) {
    const answer = await fetch(`${page.dataset.cost}?${new URLSearchParams({ request_id: request })}`);
    if (answer.status === 404) {
      at("cost").textContent = "It is booked to the key's own team.";
      return;
    }
    if (!answer.ok) break;
    const charge = await answer.json();
    if (!["reserved", "forwarded"].includes(charge.state)) {
      at("cost").textContent = charge.state === "review"
        ? `${usd(charge.settled_micro_usd)} so far, ${usd(charge.reserved_micro_usd)} held until an operator has looked at it.`
        : `It cost ${usd(charge.settled_micro_usd)}.`;
      return;
    }
    await new Promise((resolve) => setTimeout(resolve, 250));
  }
  at("cost").textContent = "What it cost is not known yet; the team's page will tell.";
}

async function send(event) {
  event.preventDefault();
  clear();
  at("send").disabled = true;
  at("told").textContent = "On its way…";
  let request = null;
  try {
    const images = await Promise.all([...at("images").files].map(readImage));
    const body = images.length ? { ...order(), images: images.map((url) => ({ image_url: url })) } : order();
    const answer = await fetch(`${base}/images/${images.length ? "edits" : "generations"}`, {
      method: "POST",
      credentials: "omit",
      headers: { authorization: `Bearer ${at("key").value.trim()}`, "content-type": "application/json" },
      body: JSON.stringify(body),
    });
    if (!answer.ok) throw new Error((await answer.json()).error?.message || `Status ${answer.status}`);
    request = answer.headers.get("x-beanmeter-request-id");
    const finished = await follow(answer);
    at("told").textContent = finished ? "Done." : "No picture came.";
  } catch (error) {
    at("told").textContent = "";
    at("refused").textContent = error.message;
    at("refused").hidden = false;
  }
  at("send").disabled = false;
  if (request) await showCost(request).catch(() => {});
  soon();
}

// The same request in code

function snippets() {
  const { model, prompt, size, quality, n } = order();
  const edits = at("images").files.length > 0;
  const path = edits ? "edits" : "generations";
  const body = { model, prompt, size, quality, n, ...(edits ? { images: [{ image_url: "data:image/png;base64,..." }] } : {}) };
  const json = JSON.stringify(body, null, 2);
  const quoted = JSON.stringify;
  at("as-curl").textContent =
    `curl ${base}/images/${path} \\\n  -H "Authorization: Bearer $BEANMETER_KEY" \\\n` +
    `  -H 'Content-Type: application/json' \\\n  -d '${json.replaceAll("'", "'\\''")}'`;
  const call = edits ? "edit" : "generate";
  const args = [["model", model], ["prompt", prompt], ["size", size], ["quality", quality]].map(([name, value]) => [name, quoted(value)]);
  args.push(["n", String(n)]);
  const python = [...(edits ? [["image", 'open("image.png", "rb")']] : []), ...args].map(([name, value]) => `    ${name}=${value},`);
  at("as-python").textContent =
    `import base64, os\nfrom openai import OpenAI\n\n` +
    `client = OpenAI(base_url=${quoted(base)}, api_key=os.environ["BEANMETER_KEY"])\n` +
    `answer = client.images.${call}(\n${python.join("\n")}\n)\n` +
    `with open("picture.png", "wb") as file:\n    file.write(base64.b64decode(answer.data[0].b64_json))`;
  const script = [...(edits ? [["image", 'fs.createReadStream("image.png")']] : []), ...args].map(([name, value]) => `  ${name}: ${value},`);
  at("as-javascript").textContent =
    `import fs from "node:fs";\nimport OpenAI from "openai";\n\n` +
    `const client = new OpenAI({ baseURL: ${quoted(base)}, apiKey: process.env.BEANMETER_KEY });\n` +
    `const answer = await client.images.${call}({\n${script.join("\n")}\n});\n` +
    `fs.writeFileSync("picture.png", Buffer.from(answer.data[0].b64_json, "base64"));`;
}

function changed() {
  offer();
  snippets();
  soon();
}

at("order").addEventListener("submit", send);
at("order").addEventListener("input", changed);
changed();
