// @ts-check
/** The page: makes the parts and joins them. Everything else is a module with one concern. */

import { Api, ROOT } from "./api.js";
import { readCatalogue } from "./catalogue.js";
import { Connection } from "./connection.js";
import { copyDialog, isLocked, keyDialog, saveDialog } from "./dialogs.js";
import { find, tell } from "./dom.js";
import { Panes } from "./panes.js";
import { startSettings } from "./settings.js";
import { firstSetup, keepSetup, keptSetup, MAX_PANES } from "./setup.js";
import { download, linkTo, takeShared } from "./share.js";
import { startTheme } from "./theme.js";
import { Votes } from "./vote.js";

/** @typedef {import("./catalogue.js").Catalogue} Catalogue */

const api = new Api();
const connection = new Connection(api, showConnection);
const askForKey = keyDialog(api, start);
const askForName = saveDialog(api, start);
const offerCopy = copyDialog();
const prompt = /** @type {HTMLTextAreaElement} */ (find("prompt"));
/** @type {Catalogue} */
let catalogue;
/** @type {Panes | undefined} */
let panes;
/** Whether somebody sent a prompt before there were panes to ask. */
let isEarly = false;
/** @type {Votes} */
let votes;

api.onGone = () => connection.look();
api.onLocked = () => {
  find("key").hidden = false;
  find("server").textContent = "wants an API key";
  askForKey(api.key ? "This key is not known here, or may not do that." : "");
};

/** Ask what there is, and make the panes if they are not there yet. */
async function start() {
  try {
    const found = await readCatalogue(api);
    catalogue = catalogue ? Object.assign(catalogue, found) : found;
  } catch (error) {
    if (!isLocked(error)) connection.look();
    return;
  }
  find("server").textContent = `${catalogue.model} · ${catalogue.version}`;
  find("key").hidden = !api.key;
  if (!panes) {
    makePanes();
    return;
  }
  panes.offer(catalogue);
  panes.retryLost();
}

function makePanes() {
  const shared = takeShared();
  const setup = shared.setup ?? keptSetup() ?? firstSetup(catalogue.states);
  const actions = {
    save: (/** @type {import("./pane.js").Pane} */ pane) => askForName(pane.mixture, setup, catalogue),
    copy: (/** @type {import("./pane.js").Pane} */ pane) => copyPane(pane),
  };
  panes = new Panes(setup, catalogue, api, actions, update);
  votes = new Votes(panes, api);
  // Who was faster than the server keeps what is written.
  prompt.value ||= setup.prompt;
  fitPrompt();
  /** @type {HTMLButtonElement} */ (find("send")).disabled = false;
  startSettings(setup, (isNow) => {
    if (isNow) panes?.rerunAll();
    update();
  });
  update();
  if (shared.isBroken) tell("The link's set-up cannot be read; this is your last one");
  if (isEarly) send();
}

/** @param {import("./pane.js").Pane} pane */
function copyPane(pane) {
  if (!panes) return;
  const prompts = panes.prompts.length ? panes.prompts : [prompt.value || "Hello!"];
  offerCopy({
    mixture: pane.mixture,
    setup: panes.setup,
    messages: pane.messages(prompts),
    methods: catalogue.methods,
    root: ROOT.href,
    hasKey: api.key !== "",
  });
}

/** Show what has changed, and keep the set-up. */
function update() {
  if (!panes) return;
  const { isBusy, setup } = panes;
  find("hint").hidden = panes.prompts.length > 0;
  find("send").hidden = isBusy;
  find("stop").hidden = !isBusy;
  /** @type {HTMLButtonElement} */ (find("add-pane")).disabled =
    panes.isBlind || panes.all.length >= MAX_PANES;
  votes?.update();
  keepSetup(setup);
}

/** @param {import("./connection.js").State} state */
function showConnection(state) {
  const words = { connecting: "connecting", ready: "ready", starting: "starting", gone: "gone" };
  find("dot").dataset.state = state;
  if (state !== "ready") find("server").textContent = words[state];
  find("gone").hidden = state !== "gone" && state !== "starting";
  find("retry").hidden = state !== "gone";
  find("gone-text").textContent =
    state === "gone"
      ? "The server does not answer. This page asks again by itself; nothing here is lost."
      : "The server is loading its model.";
  if (state === "ready") start();
}

function send() {
  const text = prompt.value.trim();
  isEarly = !panes && text !== "";
  if (!panes || !text) return;
  prompt.value = "";
  fitPrompt();
  panes.setup.prompt = text;
  panes.send(text);
  find("panes").lastElementChild?.scrollIntoView({ block: "nearest" });
}

/** Let the field be as high as its text. */
function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

/** @param {string} link */
async function shareLink(link) {
  try {
    await navigator.clipboard.writeText(link);
    tell("The link to this set-up is copied");
  } catch {
    history.replaceState(null, "", link);
    tell("The link to this set-up stands in the address bar");
  }
}

function exportAll() {
  if (!panes) return;
  const { setup, prompts, all } = panes;
  const answers = all.map((pane) => ({ name: pane.name, mixture: pane.mixture, answers: pane.answers }));
  const { model, version } = catalogue;
  const exported = new Date().toISOString();
  const server = { address: ROOT.href, model, version };
  const file = { object: "mrss.playground", exported, server, setup, prompts };
  download({ ...file, panes: answers, votes: votes.cast }, "mrss-playground.json");
}

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
prompt.addEventListener("input", () => {
  fitPrompt();
  if (panes) {
    panes.setup.prompt = prompt.value;
    keepSetup(panes.setup);
  }
});
find("stop").addEventListener("click", () => panes?.stop());
find("clear").addEventListener("click", () => {
  panes?.clear();
  votes?.reset();
  if (panes) prompt.value = panes.setup.prompt;
  prompt.focus();
});
find("add-pane").addEventListener("click", () => panes?.add());
find("share").addEventListener("click", () => {
  if (panes) shareLink(linkTo(panes.setup));
});
find("export").addEventListener("click", exportAll);
find("key").addEventListener("click", () => askForKey(""));
find("retry").addEventListener("click", () => connection.look());
// A link that is followed from here does not load the page again by itself.
addEventListener("hashchange", () => location.reload());

startTheme();
connection.look();
