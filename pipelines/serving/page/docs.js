/** The API's description, readable: operations, their fields with types, defaults and limits, and how to call them. */

import { models, Refusal } from "./api.js";
import { find, make } from "./dom.js";
import { Notice } from "./notice.js";

const ORIGIN = new URL(".", location).href.replace(/\/$/, "");

/** What examples say, beside the fields that must be there. */
const VALUES = { prompt: "a rocket on a pink background", image: "@picture.png" };
const MORE = {
  "/v1/images/generations": { seed: 7 },
  "/v1/images/edits": { strength: 0.6 },
  "/v1/images/upscales": { seed: 7, strength: 1 },
};

for (const code of document.querySelectorAll("[data-origin]")) {
  code.textContent = code.textContent.replaceAll("ORIGIN", ORIGIN);
}
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  find("main").focus();
});

await showLimits();
await describe();
if (location.hash) find(location.hash.slice(1))?.scrollIntoView();

async function describe() {
  let description;
  try {
    description = await (await fetch("openapi.json")).json();
  } catch {
    const refusal = new Refusal("The description cannot be fetched", { retrySeconds: 0 });
    new Notice(find("page-notice")).show(refusal, () => location.reload());
    return;
  }
  find("about").textContent = description.info.description ?? "";
  const operations = Object.entries(description.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => ({ path, method, ...operation })),
  );
  const resolve = (schema) => resolved(schema ?? {}, description);
  find("operations").replaceChildren(...operations.map((operation) => section(operation, resolve)));
  find("statuses").replaceChildren(...statuses(operations));
  const links = [...document.querySelectorAll("section:not([hidden])")].map(({ id, firstElementChild }) =>
    make("li", {}, make("a", { href: `#${id}` }, firstElementChild.dataset.short ?? firstElementChild.textContent)),
  );
  const wide = matchMedia("(min-width: 900px)").matches;
  find("contents").replaceChildren(make("details", { open: wide }, make("summary", {}, "Contents"), make("ul", {}, ...links)));
}

/** What /v1/models says; nothing where that takes a key. */
async function showLimits() {
  const [model] = await models().catch(() => []);
  if (!model) return;
  const rows = {
    Model: model.id,
    Sizes: model.resolutions.map((side) => `${side}x${side}`).join(", "),
    Steps: `${model.num_steps}, at most ${model.limits.max_steps}`,
    Guidance: model.guidance,
    "Pictures at once": model.limits.max_images,
    Previews: model.limits.max_previews,
    "Tokens of a prompt": model.max_tokens,
    "Bytes of a request": model.limits.max_body_bytes.toLocaleString("en"),
  };
  const parts = Object.entries(rows).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, `${value}`)]);
  find("limits").querySelector("dl").replaceChildren(...parts);
  find("limits").hidden = false;
  find("facts").textContent = model.id;
}

function section(operation, resolve) {
  const { method, path, description, parameters = [], requestBody } = operation;
  const [[type, body] = []] = Object.entries(requestBody?.content ?? {});
  const schema = resolve(body?.schema);
  const answer = resolve(operation.responses?.[200]?.content?.["application/json"]?.schema);
  const inPath = parameters.map((one) => [one.name, resolve(one.schema), one.required]);
  const title = make("h2", {}, make("span", { class: "method" }, method.toUpperCase()), " ", make("code", {}, path));
  title.dataset.short = path;
  return make(
    "section",
    { id: operation.operationId },
    title,
    prose(description ?? operation.summary),
    make("pre", { tabindex: "0" }, make("code", {}, example(operation, type, schema))),
    inPath.length > 0 && fields("In the path", inPath, resolve),
    schema.properties && fields(type === "multipart/form-data" ? "Fields of the form" : "Fields", propertiesOf(schema), resolve),
    answer.properties && fields("Answer", propertiesOf(answer, []), resolve),
  );
}

function propertiesOf({ properties, required }, must = required ?? []) {
  return Object.entries(properties).map(([name, schema]) => [name, schema, must.includes(name)]);
}

function fields(title, properties, resolve) {
  const rows = properties.flatMap(([name, given, required]) => {
    const schema = resolve(given);
    const notes = [typeOf(schema, resolve), limitsOf(schema), required ? "required" : defaultOf(schema)];
    return [
      make("dt", {}, make("code", {}, name), " ", make("span", {}, notes.filter(Boolean).join(", "))),
      make("dd", {}, schema.description ? prose(schema.description) : "", nested(schema, resolve), samples(schema)),
    ];
  });
  return make("div", {}, make("h3", {}, title), make("dl", { class: "schema" }, ...rows));
}

/** The fields of what a list holds. */
function nested(schema, resolve) {
  const inner = resolve(schema.items);
  if (!inner.properties) return "";
  return make("dl", { class: "schema" }, ...propertiesOf(inner, []).flatMap(([name, given]) => [
    make("dt", {}, make("code", {}, name), " ", make("span", {}, typeOf(resolve(given), resolve))),
    make("dd", {}, prose(resolve(given).description ?? "")),
  ]));
}

function samples({ examples }) {
  if (!examples?.length) return "";
  const codes = examples.flatMap((one) => [", ", make("code", {}, JSON.stringify(one))]).slice(1);
  return make("p", {}, "For example ", ...codes, ".");
}

function typeOf(schema, resolve) {
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  const options = schema.anyOf ?? schema.oneOf;
  if (options) return options.map(resolve).filter(({ type }) => type !== "null").map((one) => typeOf(one, resolve)).join(" or ");
  if (schema.type === "array") return `list of ${typeOf(resolve(schema.items), resolve)}s`;
  if (schema.format === "binary") return "file";
  const names = { string: "text", integer: "whole number", number: "number", boolean: "true or false", object: "object" };
  return names[schema.type] ?? "anything";
}

function limitsOf(schema) {
  const bounds = [schema, ...(schema.anyOf ?? [])].reduce((all, one) => ({ ...one, ...all }), {});
  if (bounds.minimum !== undefined && bounds.maximum !== undefined) return `from ${bounds.minimum} to ${bounds.maximum}`;
  const words = { minimum: "at least", exclusiveMinimum: "above", maximum: "at most", exclusiveMaximum: "below" };
  return Object.entries(words)
    .filter(([name]) => bounds[name] !== undefined)
    .map(([name, word]) => `${word} ${power(bounds[name])}`)
    .join(", ");
}

/** Large bounds are powers of two, which nobody would recognize. */
function power(value) {
  return value > Number.MAX_SAFE_INTEGER ? `2^${Math.round(Math.log2(value))}` : `${value}`;
}

function defaultOf({ default: value }) {
  const empty = value === undefined || value === null || value === "";
  return empty ? "" : `default ${JSON.stringify(value)}`;
}

function resolved(schema, description) {
  if (!schema.$ref) return schema;
  const target = schema.$ref.slice(2).split("/").reduce((part, name) => part?.[name], description);
  return { ...resolved(target ?? {}, description), ...schema, $ref: undefined };
}

function example({ path, method }, type, schema) {
  const values = Object.fromEntries([
    ...(schema.required ?? []).map((name) => [name, VALUES[name] ?? ""]),
    ...Object.entries(MORE[path] ?? {}),
  ]);
  const address = `curl ${ORIGIN}${path.replaceAll(/[{}]/g, (brace) => (brace === "{" ? "<" : ">"))}`;
  if (method === "get") return address.includes("<") ? address.replace(ORIGIN, `'${ORIGIN}`) + "'" : address;
  if (type === "multipart/form-data") {
    const parts = Object.entries(values).map(([name, value]) => `  -F ${name}=${quoted(value)}`);
    return [address, ...parts].join(" \\\n");
  }
  return `${address} \\\n  -H 'content-type: application/json' \\\n  -d '${JSON.stringify(values)}'`;
}

function quoted(value) {
  return /\s/.test(value) ? `'${value}'` : `${value}`;
}

/** Refusals of all operations: they are the same everywhere. */
function statuses(operations) {
  const all = {};
  for (const { responses = {} } of operations) {
    for (const [status, { description }] of Object.entries(responses)) if (status >= 400) all[status] ??= description;
  }
  return Object.entries(all).flatMap(([status, text]) => [
    make("dt", {}, make("code", {}, status)),
    make("dd", {}, prose(text ?? "")),
  ]);
}

/** A text with code between backticks. */
function prose(text) {
  const parts = text.split("`").map((part, index) => (index % 2 ? make("code", {}, part) : part));
  return make("p", {}, ...parts);
}
