/** How a finished picture is shown everywhere: its image, what it was drawn from, and what can be done with it. */

import { icon, make } from "./dom.js";

const CRISP = 64;

const urls = new WeakMap();

/** A picture's address on this page. */
function urlOf(item) {
  if (!urls.has(item)) urls.set(item, URL.createObjectURL(item.blob));
  return urls.get(item);
}

/** Frees what showing it took. */
export function release(item) {
  URL.revokeObjectURL(urls.get(item));
  urls.delete(item);
}

export const described = (prompt) => prompt || "A picture without a prompt";

/** Small pictures are shown with the edges of their pixels: smoothed they would look out of focus. */
export function setPicture(image, source, resolution) {
  image.classList.toggle("crisp", resolution <= CRISP);
  image.src = source;
}

export function imageOf(item) {
  const image = make("img", { alt: described(item.settings.prompt) });
  setPicture(image, urlOf(item), item.resolution);
  return image;
}

/** In a line, which may be broken between facts. */
export function factsOf(item) {
  const { seed, num_steps, guidance } = item.settings;
  const side = item.resolution;
  const facts = [`${side} × ${side}`, `seed ${seed}`, `${num_steps} steps`, `guidance ${guidance}`];
  const parts = facts.map((fact, index) => make("span", {}, index < facts.length - 1 ? `${fact} ·` : fact));
  return make("p", { class: "facts" }, ...parts.flatMap((part) => [part, " "]));
}

/** All of it. */
export function detailsOf(item) {
  const { settings } = item;
  const layers = Object.entries(settings.layer_prompts).map(([side, text]) => [`Prompt at ${side}`, text]);
  const guidances = Object.entries(settings.layer_guidance).map(([side, value]) => [`Guidance at ${side}`, value]);
  const rows = [
    ["Size", `${item.resolution} × ${item.resolution}`],
    ["Seed", settings.seed],
    ["Steps", settings.num_steps],
    ["Guidance", settings.guidance],
    ["Negative prompt", settings.negative_prompt],
    ...layers,
    ...guidances,
    ["Drawn from", { edits: "another picture", upscales: "the next smaller one" }[item.route]],
    ["May change", item.route === "edits" && `${Math.round(item.strength * 100)} %`],
    ["Seconds", item.seconds?.toFixed(1)],
    ["Model", item.weights?.slice(0, 12)],
  ].filter(([, value]) => value || value === 0);
  return make("dl", {}, ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, `${value}`)]));
}

/**
 * What can be done with a picture.
 *
 * `on` has `larger`, `vary`, `use` and `remove`, each called with the item. With `small` the buttons show their signs alone.
 * Those that draw are marked as such, for there are times when nothing can be drawn.
 */
export function actionsOf(item, on, small = false) {
  const of = small ? `: ${described(item.settings.prompt)}` : "";
  const button = (name, label, act, more = {}) =>
    make(
      "button",
      { type: "button", class: name, title: small ? label : null, on: { click: () => act(item) }, ...more },
      ...face(name, label, of),
    );
  const hint = "The same picture at the next size";
  return make(
    "div",
    { class: small ? "actions small" : "actions" },
    button("larger", "Larger", on.larger, { "data-draws": "", "data-side": item.resolution, title: hint }),
    button("vary", "Vary", on.vary, { "data-draws": "" }),
    button("use", "Use settings", on.use),
    make(
      "a",
      { class: "button download", href: urlOf(item), download: fileName(item), title: small ? "Download" : null },
      ...face("download", "Download", of),
    ),
    button("delete", "Delete", on.remove),
  );
}

function face(name, label, of) {
  return [icon(name), make("span", { class: "label" }, label, make("span", { class: "unseen" }, of))];
}

function fileName({ settings, resolution, blob }) {
  const words = settings.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["picture"];
  return `${words.join("-").slice(0, 60)}-${settings.seed}-${resolution}.${blob.type.split("/")[1]}`;
}
