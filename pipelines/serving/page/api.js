/** Talking to the server: the key, the models, and a drawing's stream of events. Whatever goes wrong is a `Refusal`. */

const KEY = "layered.key";

/** What a person calls the fields that the server names. */
const NAMES = {
  prompt: "the prompt",
  negative_prompt: "the negative prompt",
  layer_prompts: "the prompt of the layer",
  n: "pictures",
  num_steps: "steps",
  image: "the picture",
  output_compression: "quality",
};

/** The key, for as long as this tab is open. */
export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** What cannot be done, in words for a person. */
export class Refusal extends Error {
  /**
   * `param`: the server's name of the field to blame. `retrySeconds`: after which it may be tried again; 0 is now, null is never
   * as it is.
   */
  constructor(message, { param = null, status = 0, retrySeconds = null } = {}) {
    super(sentence(message, param));
    Object.assign(this, { param, status, retrySeconds });
  }
}

/** The models that draw here. */
export async function models() {
  const response = await request("v1/models", {});
  return (await response.json()).data;
}

/**
 * Draws: yields `{type: "accepted", ahead}`, then `{type: "partial" | "completed", ...}` as the server tells them.
 * Aborting the signal closes the connection, by which the server knows that nobody waits any more.
 */
export async function* draw({ path, body }, signal) {
  const headers = typeof body === "string" ? { "content-type": "application/json" } : {};
  const response = await request(path, { method: "POST", body, headers, signal });
  for await (const { comment, data } of events(response.body)) {
    const ahead = comment?.match(/accepted, (\d+) before/);
    if (ahead) yield { type: "accepted", ahead: Number(ahead[1]) };
    if (!data) continue;
    const told = JSON.parse(data);
    if (told.type === "error") throw new Refusal(told.error.message, { ...told.error, retrySeconds: 0 });
    yield { ...told, type: told.type.endsWith(".completed") ? "completed" : "partial" };
  }
}

async function request(path, { headers, ...options }) {
  const authorization = key.get() ? { authorization: `Bearer ${key.get()}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...authorization } });
  } catch (error) {
    throw lost(error, "The server cannot be reached");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** What the server says is wrong. */
async function refusal(response) {
  const { status } = response;
  const { error } = await response.json().catch(() => ({}));
  const wait = Number(response.headers.get("retry-after") ?? 0);
  const again = status === 429 || status >= 500;
  return new Refusal(error?.message ?? `The server answered with status ${status}`, {
    param: error?.param,
    status,
    retrySeconds: again ? wait : null,
  });
}

/** What a connection's end means; being stopped by the person is no mistake and passes as it is. */
function lost(error, message) {
  if (error.name === "AbortError") return error;
  return new Refusal(message, { retrySeconds: 0 });
}

/** Server-sent events, and the comments between them. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  while (true) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw lost(error, "The connection to the server was lost");
    }
    if (part.done) return;
    text += part.value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) yield parsed(block);
  }
}

function parsed(block) {
  const lines = block.split("\n");
  const data = lines.filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
  const comment = lines.find((line) => line.startsWith(":"));
  return { comment: comment?.slice(1).trim(), data: data.join("\n") };
}

/** The server's messages begin with the name of a field, or small. */
function sentence(text, param) {
  const [, name, side] = param?.match(/^(\w+?)(?:\[(\d+)\])?$/) ?? [];
  const told = NAMES[name] && text.startsWith(param) ? NAMES[name] + text.slice(param.length).replace("=", " ") : text;
  const whole = side ? told.replace("layer", `layer of ${side} pixels`) : told;
  const capital = whole.charAt(0).toUpperCase() + whole.slice(1);
  return /[.!?]$/.test(capital) ? capital : `${capital}.`;
}
