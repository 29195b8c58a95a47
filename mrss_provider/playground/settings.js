// @ts-check
/** The fields that all panes share. */

import { find } from "./dom.js";

/** @typedef {import("./setup.js").Setup} Setup */
const OPTIONAL = /** @type {const} */ (["temperature", "top_p"]);
const NEEDED = /** @type {const} */ (["max_tokens", "seed"]);
const MAX_SEED = 2 ** 31;

/**
 * Show a set-up's fields and change it in place.
 *
 * @param {Setup} setup
 * @param {(isNow: boolean) => void} onChange whether the answers of now are concerned
 */
export function startSettings(setup, onChange) {
  for (const name of [...OPTIONAL, ...NEEDED]) {
    const field = /** @type {HTMLInputElement} */ (find(name));
    field.value = setup[name] === null ? "" : String(setup[name]);
    field.addEventListener("change", () => {
      if (!field.reportValidity()) return;
      const value = field.value === "" ? null : field.valueAsNumber;
      /** @type {Record<string, number | null>} */ (/** @type {unknown} */ (setup))[name] = value;
      onChange(true);
    });
  }
  const seed = /** @type {HTMLInputElement} */ (find("seed"));
  find("new-seed").addEventListener("click", () => {
    setup.seed = crypto.getRandomValues(new Uint32Array(1))[0] % MAX_SEED;
    seed.value = String(setup.seed);
    onChange(true);
  });
  for (const name of /** @type {const} */ (["trace", "blind"])) {
    const box = /** @type {HTMLInputElement} */ (find(name));
    box.checked = setup[name];
    box.addEventListener("change", () => {
      setup[name] = box.checked;
      // What is blind is what will be asked: these answers have been seen.
      onChange(name === "trace");
    });
  }
  // Until now there was no set-up that they could change.
  /** @type {HTMLFieldSetElement} */ (find("fields")).disabled = false;
  // A phone has no room for them until they are asked for.
  if (matchMedia("(max-width: 640px)").matches) find("settings").removeAttribute("open");
}
