// Calls the gateway as any application does: with nothing but its base URL and a team key. One line of JSON a call.
// The first argument names the SDK's release, as package.json does.
const [sdk, baseURL, apiKey] = process.argv.slice(2);
const { default: OpenAI, toFile } = await import(sdk);
const client = new OpenAI({ baseURL, apiKey });
const order = { model: "gpt-image-2", prompt: "a bean", size: "1024x1024", quality: "low" };

const pixel = Buffer.from("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==", "base64");
const picture = (name) => toFile(pixel, name, { type: "image/png" });
// Megabytes of it come before the fields that set the price.
const large = () => toFile(Buffer.concat([pixel, Buffer.alloc(3 << 20, 7)]), "large \u{1fad8}.png", { type: "image/png" });

async function events(stream) {
  const types = [];
  for await (const event of stream) types.push(event.type);
  return types;
}

const calls = {
  generate: async () => (await client.images.generate(order)).data.length,
  several: async () => (await client.images.generate({ ...order, n: 3, quality: "auto" })).data.length,
  stream: async () => events(await client.images.generate({ ...order, stream: true, partial_images: 2 })),
  edit: async () => (await client.images.edit({ ...order, image: await picture("a.png") })).data.length,
  "edit of several": async () =>
    (await client.images.edit({ ...order, n: 2, image: [await picture("a.png"), await large()] })).data.length,
  "edit with a mask": async () =>
    (await client.images.edit({ ...order, image: await picture("a.png"), mask: await picture("m.png") })).data.length,
  "streamed edit": async () =>
    events(await client.images.edit({ image: await large(), ...order, stream: true, partial_images: 1 })),
  models: async () => {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    return ids;
  },
  "wrong size": async () => (await client.images.generate({ ...order, size: "1x1" })).data.length,
  "refused upstream": async () => (await client.images.generate({ ...order, prompt: "[[sim error=400]]" })).data.length,
  "over budget": async () => (await client.images.generate({ ...order, size: "3840x2160", quality: "high", n: 10 })).data.length,
};

for (const [name, call] of Object.entries(calls)) {
  let answer;
  try {
    answer = await call();
  } catch (error) {
    answer = { error: error.constructor.name, status: error.status ?? null, code: error.code ?? null };
  }
  console.log(JSON.stringify({ name, answer }));
}
