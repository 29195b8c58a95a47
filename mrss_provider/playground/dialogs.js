// @ts-check
/** The three questions: for a key, for a name, and in which form to copy. */

import { ApiError } from "./api.js";
import { button, find, tell } from "./dom.js";
import { cutOf, nameOf, spell } from "./mixture.js";
import { curl, python, yaml } from "./snippets.js";

/** @typedef {import("./api.js").Api} Api */
/** @typedef {import("./mixture.js").Mixture} Mixture */
/** @typedef {import("./catalogue.js").Catalogue} Catalogue */
/** @typedef {import("./setup.js").Setup} Setup */

/**
 * Ask for a key, and call back with a new one.
 *
 * @param {Api} api
 * @param {() => void} onKey
 * @returns {(error: string) => void} opens the dialog
 */
export function keyDialog(api, onKey) {
  const dialog = /** @type {HTMLDialogElement} */ (find("key-dialog"));
  const input = /** @type {HTMLInputElement} */ (find("key-input"));
  dialog.querySelector("form")?.addEventListener("submit", () => {
    api.setKey(input.value.trim());
    input.value = "";
    onKey();
  });
  find("key-cancel").addEventListener("click", () => dialog.close());
  return (error) => {
    find("key-error").textContent = error;
    if (!dialog.open) dialog.showModal();
    input.focus();
  };
}

/**
 * Ask for a name and save a mixture under it.
 *
 * @param {Api} api
 * @param {() => void} onSaved
 * @returns {(mixture: Mixture, setup: Setup, catalogue: Catalogue) => void} opens the dialog
 */
export function saveDialog(api, onSaved) {
  const dialog = /** @type {HTMLDialogElement} */ (find("save-dialog"));
  const name = /** @type {HTMLInputElement} */ (find("save-name"));
  const description = /** @type {HTMLInputElement} */ (find("save-description"));
  /** @type {object} */
  let spec = {};
  dialog.querySelector("form")?.addEventListener("submit", async (event) => {
    event.preventDefault();
    const said = description.value.trim() ? { description: description.value.trim() } : {};
    try {
      await api.post("v1/mixtures", { name: name.value.trim(), ...spec, ...said });
    } catch (error) {
      find("save-error").textContent = /** @type {Error} */ (error).message;
      return;
    }
    dialog.close();
    tell(`Saved: ask for mrss/${name.value.trim()}`);
    onSaved();
  });
  find("save-cancel").addEventListener("click", () => dialog.close());
  return (mixture, setup, catalogue) => {
    spec = specOf(mixture, setup, catalogue);
    name.value = description.value = "";
    find("save-what").textContent = nameOf(mixture, catalogue.methods);
    find("save-error").textContent = "";
    dialog.showModal();
  };
}

/**
 * Return a mixture as `POST /v1/mixtures` takes it.
 *
 * @param {Mixture} mixture
 * @param {Setup} setup
 * @param {Catalogue} catalogue
 */
export function specOf(mixture, { temperature, top_p }, { methods }) {
  const cut = cutOf(mixture);
  return {
    terms: mixture.terms.map(({ name, weight }) => `${name}:${weight}`).join("+"),
    merge: spell(mixture.merge, methods.merges),
    gate: spell(mixture.gate, methods.gates),
    ...(cut === null ? {} : { cut }),
    ...(temperature === null ? {} : { temperature }),
    ...(top_p === null ? {} : { top_p }),
  };
}

const FORMS = { curl, Python: python, "Proxy YAML": yaml };

/**
 * Offer a request as text.
 *
 * @returns {(snippet: import("./snippets.js").Snippet) => void} opens the dialog
 */
export function copyDialog() {
  const dialog = /** @type {HTMLDialogElement} */ (find("copy-dialog"));
  const shown = find("copy-text");
  find("copy-close").addEventListener("click", () => dialog.close());
  find("copy-now").addEventListener("click", () => copyText(shown.textContent ?? "", shown));
  return (snippet) => {
    const buttons = Object.entries(FORMS).map(([name, write]) => {
      const made = button(name, () => {
        shown.textContent = write(snippet);
        buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === made)));
      });
      return made;
    });
    find("copy-forms").replaceChildren(...buttons);
    buttons[0].click();
    dialog.showModal();
  };
}

/**
 * Copy a text; where the browser does not let us, select what shows it.
 *
 * @param {string} text
 * @param {HTMLElement} shown
 */
async function copyText(text, shown) {
  try {
    await navigator.clipboard.writeText(text);
    tell("Copied");
  } catch {
    getSelection()?.selectAllChildren(shown);
    tell("This browser does not let the page copy; it is selected");
  }
}

/** @param {unknown} error */
export function isLocked(error) {
  return error instanceof ApiError && error.status === 401;
}
