/** Says what went wrong, and offers to try again, when the server says it may be. */

import { make } from "./dom.js";

export class Notice {
  #timer = null;

  /** `element`: where it stands, hidden. */
  constructor(element) {
    this.element = element;
    this.textId = `${element.id}-text`;
  }

  /** Shows a refusal; `again` tries once more. */
  show(refusal, again) {
    this.clear();
    const text = make("p", { id: this.textId, role: "alert" });
    this.element.append(text);
    this.element.hidden = false;
    text.textContent = refusal.message; // after its role, so that it is read out
    if (refusal.retrySeconds !== null && again) this.#offer(refusal.retrySeconds, again);
  }

  clear() {
    clearInterval(this.#timer);
    this.element.replaceChildren();
    this.element.hidden = true;
  }

  #offer(seconds, again) {
    const button = make("button", { type: "button", on: { click: again } });
    const until = performance.now() + seconds * 1000;
    const tick = () => {
      const left = Math.ceil((until - performance.now()) / 1000);
      button.disabled = left > 0;
      button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
      if (left <= 0) clearInterval(this.#timer);
    };
    this.#timer = setInterval(tick, 250);
    tick();
    this.element.append(button);
  }
}
