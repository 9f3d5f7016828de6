/** What was drawn in this browser, newest first; looking at one of them; deleting, and thinking better of it. */

import { find, icon, lookAt, make } from "./dom.js";
import { actionsOf, described, detailsOf, factsOf, imageOf, release } from "./pictures.js";
import { MAX_KEPT, newestFirst, Store } from "./store.js";

export class Gallery {
  items = [];
  #store = new Store();
  #on;
  #seen = null;

  /** `on`: see `actionsOf`; `changed` is called when pictures have come or gone, `shown` when there are new buttons. */
  constructor(on) {
    this.#on = { ...on, remove: (item) => this.#remove([item]) };
    this.viewer = find("viewer");
    this.viewer.addEventListener("click", ({ target }) => target === this.viewer && this.viewer.close());
    this.viewer.addEventListener("keydown", (event) => this.#turn(event));
    find("clear").addEventListener("click", () => this.#remove(this.items));
  }

  /** What to do with pictures, for those who show them elsewhere. */
  get on() {
    return { ...this.#on, open: (item) => this.open(item) };
  }

  async load() {
    this.items = await this.#store.open();
    this.#render();
  }

  async add(item) {
    this.items = [item, ...this.items];
    const surplus = this.items.splice(MAX_KEPT);
    surplus.forEach(release);
    this.#render();
    await this.#store.put(item);
    await this.#store.remove(surplus);
    this.#note();
  }

  /** Shows a picture alone. */
  open(item) {
    this.#seen = item;
    const title = make("h2", { id: "viewer-title", tabindex: "-1" }, described(item.settings.prompt));
    const index = this.items.indexOf(item);
    const sign = (name, label, act) =>
      make(
        "button",
        { type: "button", class: "sign", "aria-label": label, title: label, disabled: !act, on: { click: act } },
        icon(name),
      );
    const turn = (other) => other && (() => this.open(other));
    const bar = make(
      "div",
      { class: "bar" },
      sign("previous", "Newer", turn(this.items[index - 1])),
      sign("next", "Older", turn(this.items[index + 1])),
      sign("close", "Close", () => this.viewer.close()),
    );
    const text = make("div", { class: "about" }, title, detailsOf(item), actionsOf(item, this.#closing()));
    this.viewer.replaceChildren(bar, make("div", { class: "picture" }, imageOf(item)), text);
    if (!this.viewer.open) this.viewer.showModal();
    title.focus({ preventScroll: true });
    this.#on.shown();
  }

  /** Whatever is done with a picture is seen elsewhere. */
  #closing() {
    const closing = (act) => (item) => {
      this.viewer.close();
      act(item);
    };
    const { larger, vary, use, remove } = this.#on;
    return { larger: closing(larger), vary: closing(vary), use: closing(use), remove: closing(remove) };
  }

  #turn({ key }) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[key];
    const other = this.items[this.items.indexOf(this.#seen) + by];
    if (by && other) this.open(other);
  }

  async #remove(items) {
    const place = this.items.indexOf(items[0]);
    const hadFocus = find("gallery").contains(document.activeElement) || document.activeElement === document.body;
    this.items = this.items.filter((item) => !items.includes(item));
    this.#render();
    this.#offerUndo(items);
    if (hadFocus || !document.activeElement.isConnected) this.#focusNear(place);
    await this.#store.remove(items);
  }

  #focusNear(place) {
    const thumbs = [...find("pictures").querySelectorAll(".tile")];
    lookAt(thumbs[Math.min(place, thumbs.length - 1)] ?? find("gallery-title"));
  }

  #offerUndo(items) {
    const what = items.length === 1 ? "a picture" : `${items.length} pictures`;
    const undo = make("button", { type: "button", on: { click: () => this.#restore(items) } }, "Undo");
    const text = make("span", { role: "status" });
    find("undo").replaceChildren(text, undo);
    text.textContent = `Deleted ${what}.`;
  }

  async #restore(items) {
    this.items = [...this.items, ...items].sort(newestFirst);
    this.#render();
    find("undo").replaceChildren();
    lookAt(find("gallery-title"));
    for (const item of items) await this.#store.put(item);
  }

  /** Leaves cards alone that stay, for one of them may have the focus. */
  #render() {
    const list = find("pictures");
    const before = new Map([...list.children].map((card) => [card.dataset.id, card]));
    const cards = this.items.map((item) => before.get(item.id) ?? this.#card(item));
    for (const card of before.values()) if (!cards.includes(card)) card.remove();
    cards.forEach((card, index) => {
      if (list.children[index] !== card) list.insertBefore(card, list.children[index] ?? null);
    });
    find("clear").hidden = !this.items.length;
    this.#note();
    this.#on.changed();
  }

  #note() {
    const there = this.items.length > 0 || find("undo").childElementCount > 0;
    find("gallery").hidden = !there;
    find("gallery-note").textContent = this.#store.keeps
      ? "Kept in this browser."
      : "This browser forgets them when you leave.";
  }

  #card(item) {
    return make(
      "li",
      { class: "card", "data-id": item.id },
      make("button", { type: "button", class: "tile", on: { click: () => this.open(item) } }, imageOf(item)),
      make("p", { class: "prompt" }, item.settings.prompt || "No prompt"),
      factsOf(item),
      actionsOf(item, this.#on, true),
    );
  }
}
