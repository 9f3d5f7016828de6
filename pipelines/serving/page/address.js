/** Settings in the page's address, so that they can be kept and passed on. Keys and pictures never stand there. */

const NAMES = {
  prompt: "prompt",
  negative_prompt: "negative",
  size: "size",
  seed: "seed",
  num_steps: "steps",
  guidance: "guidance",
  n: "pictures",
  output_format: "format",
  output_compression: "quality",
};
const TEXTS = ["prompt", "negative_prompt", "seed", "output_format"];

/** The settings of the address: those that it has. */
export function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const settings = {};
  for (const [field, name] of Object.entries(NAMES)) {
    const text = given.get(name);
    if (text !== null) settings[field] = TEXTS.includes(field) ? text : Number(text);
  }
  for (const [name, text] of given) {
    const [, what, side] = name.match(/^(prompt|guidance)-(\d+)$/) ?? [];
    if (what === "prompt") settings.layer_prompts = { ...settings.layer_prompts, [side]: text };
    if (what === "guidance") settings.layer_guidance = { ...settings.layer_guidance, [side]: Number(text) };
  }
  return settings;
}

/** Puts settings into the address. */
export function writeAddress(settings) {
  const given = new URLSearchParams();
  for (const [field, name] of Object.entries(NAMES)) {
    const value = settings[field];
    if (value !== "" && value != null && !Number.isNaN(value)) given.set(name, value);
  }
  if (settings.output_format === "png") given.delete("quality");
  for (const [side, text] of Object.entries(settings.layer_prompts)) given.set(`prompt-${side}`, text);
  for (const [side, value] of Object.entries(settings.layer_guidance)) given.set(`guidance-${side}`, value);
  history.replaceState(null, "", `#${given}`);
}
