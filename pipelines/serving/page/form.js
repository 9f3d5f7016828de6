/** The form: limits and defaults are the model's; settings go in and come out; a mistake is shown at its field. */

import { Refusal } from "./api.js";
import { find, make } from "./dom.js";

/** Where the server's fields stand on the page. */
const PLACES = {
  prompt: "prompt",
  negative_prompt: "negative",
  size: "sizes",
  seed: "seed",
  num_steps: "steps",
  guidance: "guidance",
  n: "count",
  output_format: "format",
  output_compression: "quality",
  image: "start",
  strength: "strength",
};
const MAX_SEED = 2n ** 63n - 1n;
const WIDE = "(min-width: 900px)";

export class Form {
  #model = null;
  #lastSeed = null;

  constructor() {
    this.element = find("form");
    find("settings").open = matchMedia(WIDE).matches;
    for (const event of ["input", "change"]) {
      this.element.addEventListener(event, ({ target }) => {
        unmark(target);
        this.#refresh();
      });
    }
    find("fix-seed").addEventListener("click", () => this.#toggleSeed());
    find("start").addEventListener("change", () => this.#showStart());
    find("start-remove").addEventListener("click", () => this.#forgetStart());
  }

  /** Takes a model's resolutions, limits and defaults. */
  use(model) {
    this.#model = model;
    find("steps").max = model.limits.max_steps;
    find("count").max = model.limits.max_images;
    find("count").closest("div").hidden = model.limits.max_images === 1;
    find("size-choices").replaceChildren(...model.resolutions.map(choice));
    find("layers").replaceChildren(...model.resolutions.map(layerFields));
    this.settings = {};
    this.element.hidden = false;
  }

  /** The settings as they stand; see `orders.js`. */
  get settings() {
    const size = Number(this.element.querySelector("[name=size]:checked")?.value);
    return {
      prompt: find("prompt").value.trim(),
      negative_prompt: find("negative").value.trim(),
      size,
      seed: find("seed").value.trim(),
      num_steps: number("steps"),
      guidance: number("guidance"),
      n: number("count"),
      output_format: find("format").value,
      output_compression: number("quality"),
      layer_prompts: this.#ofLayers("prompt", (field) => field.value.trim(), size),
      layer_guidance: this.#ofLayers("guidance", (field) => field.valueAsNumber, size),
    };
  }

  /** Settings to show; the defaults where there are none. */
  set settings(given) {
    const { resolutions, num_steps, guidance } = this.#model;
    const size = resolutions.includes(given.size) ? given.size : resolutions.at(-1);
    find(`size-${size}`).checked = true;
    find("prompt").value = given.prompt ?? "";
    find("negative").value = given.negative_prompt ?? "";
    find("seed").value = given.seed ?? "";
    find("steps").value = given.num_steps ?? num_steps;
    find("guidance").value = given.guidance ?? guidance;
    find("count").value = given.n ?? 1;
    find("format").value = given.output_format ?? "png";
    if (!find("format").value) find("format").value = "png";
    find("quality").value = given.output_compression ?? 90;
    for (const side of resolutions) {
      find(`layer-${side}-guidance`).value = given.layer_guidance?.[side] ?? "";
      if (side > resolutions[0]) find(`layer-${side}-prompt`).value = given.layer_prompts?.[side] ?? "";
    }
    this.#refresh();
  }

  /** The picture to start from and how much of it may change; null where there is none. */
  get start() {
    const [file] = find("start").files;
    return file ? { file, strength: number("strength") } : null;
  }

  /** The seed that can be fixed. */
  set lastSeed(seed) {
    this.#lastSeed = seed;
    this.#refresh();
  }

  /** Throws a `Refusal` of the first field that cannot be meant. */
  check() {
    const { limits } = this.#model;
    const { prompt, seed, output_format } = this.settings;
    if (prompt.length > limits.max_prompt_characters) {
      throw new Refusal(`The prompt has more than ${limits.max_prompt_characters} characters`, { param: "prompt" });
    }
    if (!/^\d*$/.test(seed) || (seed && BigInt(seed) > MAX_SEED)) {
      throw new Refusal(`The seed is a whole number from 0 to ${MAX_SEED}, or empty for a random one`, { param: "seed" });
    }
    whole("num_steps", "Steps", limits.max_steps);
    if (Number.isNaN(number("guidance"))) throw new Refusal("Guidance is a number", { param: "guidance" });
    whole("n", "Pictures", limits.max_images);
    if (output_format !== "png") whole("output_compression", "Quality", 100, 0);
    if (this.start?.file.size > limits.max_body_bytes) {
      const megabytes = Math.floor(limits.max_body_bytes / 1e6);
      throw new Refusal(`The picture has more than ${megabytes} MB`, { param: "image" });
    }
  }

  /** Marks the field that a refusal blames, and goes there. */
  blame({ param }, noteId) {
    const [, name, side] = param?.match(/^(\w+?)(?:\[(\d+)\])?$/) ?? [];
    const own = side && find(`layer-${side}-${name === "layer_prompts" ? "prompt" : name}`);
    const field = own || find(PLACES[name]);
    if (!field) return;
    const fold = field.closest("details");
    if (fold) fold.open = true;
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-describedby", noteId);
    field.focus();
  }

  /** No field is wrong any more. */
  absolve() {
    for (const field of this.element.querySelectorAll("[aria-invalid]")) unmark(field);
  }

  #ofLayers(what, valueOf, size) {
    const values = {};
    for (const side of this.#model.resolutions) {
      const field = find(`layer-${side}-${what}`);
      const value = field && side <= size ? valueOf(field) : "";
      if (value !== "" && !Number.isNaN(value)) values[side] = value;
    }
    return values;
  }

  #toggleSeed() {
    find("seed").value = find("seed").value ? "" : this.#lastSeed;
    find("seed").dispatchEvent(new Event("input", { bubbles: true }));
  }

  #showStart() {
    const { start } = this;
    const picture = find("start-picture");
    URL.revokeObjectURL(picture.src);
    if (start) picture.src = URL.createObjectURL(start.file);
    picture.hidden = find("start-remove").hidden = find("strength-field").hidden = !start;
  }

  #forgetStart() {
    find("start").value = "";
    this.#showStart();
    find("start").focus();
  }

  /** What depends on other fields. */
  #refresh() {
    const { size, num_steps, guidance, seed, n, output_format } = this.settings;
    const parts = [`${size} × ${size}`, `${num_steps} steps`, seed ? `seed ${seed}` : "random seed"];
    if (n > 1) parts.push(`${n} pictures`);
    find("summary").textContent = parts.join(" · ");
    find("fix-seed").textContent = seed ? "Random" : "Fix last";
    find("fix-seed").disabled = !seed && !this.#lastSeed;
    find("quality-field").hidden = output_format === "png";
    find("strength-value").value = `${Math.round(number("strength") * 100)} %`;
    for (const side of this.#model.resolutions) {
      find(`layer-${side}`).hidden = side > size;
      find(`layer-${side}-guidance`).placeholder = Number.isNaN(guidance) ? "" : guidance;
    }
  }
}

const number = (id) => find(id).valueAsNumber;

function whole(param, name, most, least = 1) {
  const value = number(PLACES[param]);
  if (!Number.isInteger(value) || value < least || value > most) {
    throw new Refusal(`${name}: a whole number from ${least} to ${most}`, { param });
  }
}

function unmark(field) {
  const marked = field.closest("[aria-invalid]");
  marked?.removeAttribute("aria-invalid");
  marked?.removeAttribute("aria-describedby");
}

function choice(side) {
  const radio = make("input", { type: "radio", name: "size", value: side, id: `size-${side}` });
  return make("label", { class: "choice" }, radio, `${side} × ${side}`);
}

/** A layer's own guidance, and above the lowest its own prompt. */
function layerFields(side, index) {
  const prompt = `layer-${side}-prompt`;
  const guidance = `layer-${side}-guidance`;
  return make(
    "fieldset",
    { id: `layer-${side}`, class: "layer" },
    make("legend", {}, `${side} pixels`),
    index === 0
      ? make("p", { class: "note" }, "What is in the picture, and where.")
      : make(
          "div",
          {},
          make("label", { for: prompt }, "Prompt"),
          make("input", { id: prompt, type: "text", autocomplete: "off", placeholder: "The same" }),
        ),
    make(
      "div",
      { class: "short" },
      make("label", { for: guidance }, "Guidance"),
      make("input", { id: guidance, type: "number", inputmode: "decimal", step: "any" }),
    ),
  );
}
