/**
 * What is asked of the server. A job is what a person wants; its settings are those of the form:
 *
 *   prompt, negative_prompt   texts
 *   size                      pixels of a side
 *   seed                      digits: a seed may be larger than any number that is exact here
 *   num_steps, guidance, n    numbers
 *   layer_prompts, layer_guidance   by resolution, where they differ
 *   output_format, output_compression
 */

const MAX_LARGE_PREVIEWS = 8;
const LARGE = 256;

/** A seed that is short enough to be typed. */
export const randomSeed = () => String(crypto.getRandomValues(new Uint32Array(1))[0]);

/** The seed of the picture that has this place in a job. */
export const seedOf = (settings, index) => String(BigInt(settings.seed) + BigInt(index));

/** A job of the form's settings; from a picture, if there is one. */
export function drawing(settings, start) {
  const own = { ...settings, seed: settings.seed || randomSeed() };
  if (!start) return { route: "generations", settings: own };
  return { route: "edits", settings: own, image: start.file, strength: start.strength };
}

/** Another picture like this one. */
export function variation(item) {
  const settings = { ...item.settings, seed: randomSeed(), n: 1 };
  return { route: "edits", settings, image: item.blob, strength: 0.6, from: item };
}

/** The resolution after a picture's; undefined at the highest. */
export const larger = (item, model) => model.resolutions.find((side) => side > item.resolution);

/** The same picture, larger: with all steps it is the one that this seed has at that size. */
export function enlargement(item, model) {
  const settings = { ...item.settings, size: larger(item, model), n: 1 };
  if (!model.can_finish || !model.resolutions.includes(item.resolution)) {
    return { route: "generations", settings };
  }
  return { route: "upscales", settings, image: item.blob, strength: 1, from: item };
}

/** A job as a request. */
export function requestOf(job, model) {
  const { settings, route, image, strength } = job;
  const path = `v1/images/${route}`;
  const fields = fieldsOf(settings, model);
  if (!image) {
    // JSON.stringify would round a large seed.
    return { path, body: JSON.stringify(fields).replace("{", `{"seed":${settings.seed},`) };
  }
  const body = new FormData();
  for (const [name, value] of Object.entries({ ...fields, seed: settings.seed, strength })) {
    body.append(name, typeof value === "object" ? JSON.stringify(value) : value);
  }
  body.append("image", image, "picture");
  return { path, body };
}

function fieldsOf(settings, model) {
  const { size, num_steps, output_format } = settings;
  const most = size > LARGE ? MAX_LARGE_PREVIEWS : Infinity;
  const used = Object.entries(settings.layer_prompts).filter(([side]) => Number(side) <= size);
  return {
    model: model.id,
    prompt: settings.prompt,
    negative_prompt: settings.negative_prompt,
    n: settings.n,
    size: `${size}x${size}`,
    num_steps,
    guidance: guidanceOf(settings, model),
    ...(used.length && { layer_prompts: Object.fromEntries(used) }),
    output_format,
    ...(output_format !== "png" && { output_compression: settings.output_compression }),
    stream: true,
    partial_images: Math.max(0, Math.min(num_steps - 1, model.limits.max_previews, most)),
  };
}

/** One number for all layers, or one for each if any has its own. */
function guidanceOf({ guidance, layer_guidance }, model) {
  if (!Object.keys(layer_guidance).length) return guidance;
  return model.resolutions.map((side) => layer_guidance[side] ?? guidance);
}

/** A finished picture of a job, as the gallery keeps it. */
export function itemOf(job, event) {
  return {
    id: `${Date.now()}-${randomSeed()}`,
    blob: blobOf(event),
    route: job.route,
    strength: job.strength,
    resolution: event.resolution,
    seconds: event.seconds,
    weights: event.weights_sha256,
    settings: { ...job.settings, n: 1, seed: seedOf(job.settings, event.image_index) },
  };
}

/** The file that an event holds, byte by byte. */
function blobOf({ b64_json, output_format }) {
  const bytes = Uint8Array.from(atob(b64_json), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: `image/${output_format}` });
}
