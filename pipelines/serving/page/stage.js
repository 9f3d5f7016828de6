/** The large picture: coming into being, layer by layer, and when it is there. */

import { find, make } from "./dom.js";
import { actionsOf, described, factsOf, imageOf, setPicture } from "./pictures.js";

export class Stage {
  #tiles = [];
  #layers = new Map();
  #progress = null;
  #words = null;
  #steps = [];
  #shown = [];
  #on;

  /** `on`: see `actionsOf`, and `open`, called with a picture to look at. */
  constructor(on) {
    this.#on = on;
    this.element = find("stage");
  }

  /** What was drawn last, or what there will be. */
  show(items) {
    this.#shown = items;
    if (!items.length) {
      const sign = make("img", { src: "page/icon.svg", alt: "" });
      const words = make("p", {}, "Your picture appears here, coarse first, then finer.");
      const tile = make("div", { class: "tile empty" }, sign, words);
      this.element.replaceChildren(make("div", { class: grid(1) }, tile));
      return;
    }
    const [item] = items;
    const tiles = items.map((one) =>
      make("button", { type: "button", class: "tile", on: { click: () => this.#on.open(one) } }, imageOf(one)),
    );
    const about = items.length === 1 && [
      factsOf(item),
      actionsOf(item, this.#on),
    ];
    this.element.replaceChildren(make("div", { class: grid(items.length) }, ...tiles), ...(about || []));
  }

  /** Shows what it showed, without pictures that are gone. */
  restore(kept) {
    this.show(this.#shown.filter((item) => kept.includes(item)));
  }

  /** Shows no pictures any more that are gone. */
  forget(kept) {
    if (this.#shown.some((item) => !kept.includes(item))) this.restore(kept);
  }

  /** Makes room for a job's pictures. */
  begin(job, model) {
    const { n, prompt, size } = job.settings;
    this.#steps = Array(n).fill(0);
    this.#tiles = this.#steps.map(() => make("img", { alt: described(prompt), hidden: true }));
    if (job.from) {
      const source = imageOf(job.from).src;
      for (const image of this.#tiles) setPicture(image, source, job.from.resolution);
      for (const image of this.#tiles) image.hidden = false;
    }
    this.#progress = make("progress", { max: 1, "aria-label": "Drawing" });
    this.#words = make("p", { class: "facts", id: "step" }, "Waiting for the server…");
    const sides = model.resolutions.filter((side) => side <= size);
    this.#layers = new Map(sides.map((side) => [side, make("img", { alt: "", hidden: true })]));
    this.element.replaceChildren(
      make(
        "div",
        { class: grid(n) },
        ...this.#tiles.map((image) => make("div", { class: "tile waiting" }, image)),
      ),
      this.#progress,
      this.#words,
      n === 1 && sides.length > 1 ? this.#strip() : "",
    );
  }

  /** Says how many are before it. */
  accepted(ahead) {
    this.#words.textContent = ahead ? `In the queue, ${ahead} before it…` : "Waiting for a free place…";
  }

  /** Shows a picture as it is so far. */
  preview({ image_index, step, num_steps, resolution, b64_json, output_format }) {
    const source = `data:image/${output_format};base64,${b64_json}`;
    this.#put(image_index, source, resolution);
    this.#steps[image_index] = step / num_steps;
    this.#progress.value = this.#done();
    this.#words.textContent = `Step ${step} of ${num_steps}, ${resolution} pixels`;
  }

  /** Shows a finished picture in its place, while others are drawn. */
  completed({ image_index }, item) {
    this.#put(image_index, imageOf(item).src, item.resolution);
    this.#steps[image_index] = 1;
    this.#progress.value = this.#done();
  }

  #put(index, source, resolution) {
    for (const image of [this.#tiles[index], this.#layers.get(resolution)]) {
      if (!image) continue;
      setPicture(image, source, resolution);
      image.hidden = false;
    }
    this.#tiles[index].parentElement.classList.remove("waiting");
    for (const [side, image] of this.#layers) image.closest("li")?.classList.toggle("now", side === resolution);
  }

  #done() {
    return this.#steps.reduce((sum, part) => sum + part, 0) / this.#steps.length;
  }

  #strip() {
    const parts = [...this.#layers].map(([side, image]) =>
      make("li", {}, make("span", { class: "layer-picture" }, image), make("span", {}, `${side}`)),
    );
    return make("ol", { class: "strip", "aria-hidden": "true" }, ...parts);
  }
}

const grid = (count) => `tiles ${count === 1 ? "one" : count <= 4 ? "few" : "many"}`;
