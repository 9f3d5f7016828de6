/** Making elements. Texts go in as text, never as markup. */

const SVG = "http://www.w3.org/2000/svg";

/** The element of the page with this id. */
export const find = (id) => document.getElementById(id);

/** A new element. Attributes that are true stand without a value, those that are false, null or undefined do not stand at all. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (value !== false && value != null) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
}

/** One of the signs that index.html defines; for the eye only. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", "icon");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** Where to look after something has happened: moves the focus, and the page if it must. */
export function lookAt(element) {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  element.focus({ preventScroll: true });
  element.scrollIntoView({ behavior: calm ? "instant" : "smooth", block: "nearest" });
}
