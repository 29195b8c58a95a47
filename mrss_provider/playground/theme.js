// @ts-check
/** Light or dark: as the system says, until the switch says otherwise. */

import { find } from "./dom.js";

const STORED = "mrss.theme";
/** @typedef {"system" | "light" | "dark"} Theme */
/** @type {Theme[]} */
const THEMES = ["system", "light", "dark"];

/** Apply the kept choice and let the switch change it. */
export function startTheme() {
  let theme = kept();
  const knob = find("theme");
  const show = () => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    const name = theme === "system" ? "auto" : theme;
    knob.textContent = `◐ ${name}`;
    knob.setAttribute("aria-label", `Theme: ${name}`);
  };
  knob.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    try {
      localStorage.setItem(STORED, theme);
    } catch {
      // Then it holds until the reload.
    }
    show();
  });
  show();
}

/** @returns {Theme} */
function kept() {
  try {
    const theme = /** @type {Theme} */ (localStorage.getItem(STORED));
    return THEMES.includes(theme) ? theme : "system";
  } catch {
    return "system";
  }
}
