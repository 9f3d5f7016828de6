/** The page: asks the server what it can draw, and draws what is asked for, one job at a time. */

import { readAddress, writeAddress } from "./address.js";
import { draw, key, models, Refusal } from "./api.js";
import { find, lookAt } from "./dom.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { Notice } from "./notice.js";
import { drawing, enlargement, itemOf, requestOf, variation } from "./orders.js";
import { Stage } from "./stage.js";

let model = null;
let running = null;

const form = new Form();
const gallery = new Gallery({
  larger: (item) => run(enlargement(item, model)),
  vary: (item) => run(variation(item)),
  use: useSettings,
  changed: galleryChanged,
  shown: refresh,
});
const stage = new Stage(gallery.on);
const notices = {
  page: new Notice(find("page-notice")),
  key: new Notice(find("key-notice")),
  form: new Notice(find("form-notice")),
  stage: new Notice(find("stage-notice")),
};

const ADDRESS_MILLISECONDS = 300; // browsers let an address change only so often
let addressTimer = null;

form.element.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
for (const event of ["input", "change"]) {
  form.element.addEventListener(event, () => {
    clearTimeout(addressTimer);
    addressTimer = setTimeout(() => writeAddress(form.settings), ADDRESS_MILLISECONDS);
  });
}
find("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    submit();
  }
});
find("stop").addEventListener("click", stop);
find("locked").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(find("key").value.trim());
  connect();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !gallery.viewer.open) stop();
});
for (const link of document.querySelectorAll(".skip")) {
  link.addEventListener("click", (event) => {
    event.preventDefault(); // the address holds settings
    lookAt(document.querySelector(link.hash));
  });
}
addEventListener("hashchange", () => {
  if (model) form.settings = readAddress();
});

await gallery.load();
await connect();

/** Asks what can be drawn here, which may take a key. */
async function connect() {
  notices.page.clear();
  let known;
  try {
    [known] = await models();
  } catch (error) {
    if (error.status === 401) lock(error);
    else notices.page.show(error, connect);
    return;
  }
  const settings = model ? form.settings : readAddress();
  const wasLocked = !find("locked").hidden;
  model = known;
  form.use(model);
  form.settings = settings;
  form.lastSeed = gallery.items[0]?.settings.seed;
  find("locked").hidden = true;
  find("facts").textContent = `${model.id}, up to ${model.resolutions.at(-1)} pixels`;
  stage.show(gallery.items.slice(0, 1));
  refresh();
  if (wasLocked) find("prompt").focus();
}

/** Asks for a key. */
function lock(error) {
  notices.key.clear();
  if (key.get()) notices.key.show(error);
  key.forget();
  find("key").value = "";
  form.element.hidden = true;
  find("locked").hidden = false;
  find("key").focus();
}

/** Draws what the form says. */
function submit() {
  if (running || !model) return;
  clearProblems();
  try {
    form.check();
  } catch (error) {
    tell(error, notices.form);
    return;
  }
  clearTimeout(addressTimer);
  writeAddress(form.settings);
  run(drawing(form.settings, form.start), notices.form);
}

/** Draws a job; what goes wrong is said at `notice`. */
async function run(job, notice = notices.stage) {
  if (running || !model) return;
  clearProblems();
  running = new AbortController();
  stage.begin(job, model);
  refresh();
  if (notice === notices.stage) lookAt(stage.element);
  else stage.element.scrollIntoView({ block: "nearest" });
  const items = [];
  try {
    await follow(job, items);
    const count = items.length === 1 ? "The picture is" : `${items.length} pictures are`;
    say(`${count} drawn.`);
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else tell(error, notice, () => run(job, notice));
  }
  running = null;
  const drawn = items.filter(Boolean);
  if (drawn.length) stage.show(drawn);
  else stage.restore(gallery.items);
  refresh();
}

/** Shows a job's events; its finished pictures go into `items`. */
async function follow(job, items) {
  let layer = null;
  form.lastSeed = job.settings.seed;
  for await (const event of draw(requestOf(job, model), running.signal)) {
    if (event.type === "accepted") {
      stage.accepted(event.ahead);
      say(event.ahead ? `In the queue, ${event.ahead} before it.` : "Waiting for a free place.");
    } else if (event.type === "partial") {
      stage.preview(event);
      if (event.resolution !== layer) say(`Drawing, ${event.resolution} pixels.`);
      layer = event.resolution;
    } else {
      const item = itemOf(job, event);
      items[event.image_index] = item;
      stage.completed(event, item);
      await gallery.add(item);
    }
  }
  const missing = job.settings.n - items.filter(Boolean).length;
  if (missing) throw new Refusal("The connection to the server was lost", { retrySeconds: 0 });
}

function stop() {
  running?.abort();
}

/** Says what went wrong, and where. */
function tell(error, notice, again) {
  if (!(error instanceof Refusal)) throw error;
  if (error.status === 401) {
    lock(error);
    return;
  }
  notice.show(error, again);
  if (notice === notices.form) form.blame(error, notice.textId);
  else lookAt(notice.element);
}

function clearProblems() {
  if (notices.form.element.contains(document.activeElement)) find("draw").focus(); // before its button is gone
  notices.form.clear();
  notices.stage.clear();
  form.absolve();
}

function useSettings(item) {
  form.settings = item.settings;
  writeAddress(form.settings);
  lookAt(find("prompt"));
}

function galleryChanged() {
  if (!running) stage.forget(gallery.items);
  refresh();
}

/** What depends on whether something is being drawn. */
function refresh() {
  const busy = running !== null;
  const { activeElement } = document;
  find("draw").setAttribute("aria-disabled", busy);
  find("stop").hidden = !busy;
  if (activeElement === find("stop") && !busy) find("draw").focus();
  const highest = model?.resolutions.at(-1) ?? 0;
  for (const button of document.querySelectorAll("[data-draws]")) {
    button.disabled = busy || !model || Number(button.dataset.side) >= highest;
  }
}

/** For those who listen. */
function say(text) {
  find("live").textContent = text;
}
