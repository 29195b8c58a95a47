// @ts-check
/** Elements made and found. Text becomes text nodes here, and nothing becomes HTML. */

/**
 * Make an element. Properties are set as such; `class`, `for`, `role` and names with a dash are
 * attributes.
 *
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, unknown>} [properties]
 * @param {...(Node | string | null | undefined)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class" || name === "for" || name === "role" || name.includes("-")) {
      element.setAttribute(name, String(value));
    } else {
      /** @type {any} */ (element)[name] = value;
    }
  }
  element.append(.../** @type {(Node | string)[]} */ (children.filter((child) => child != null)));
  return element;
}

/**
 * Return the element of the page with this id.
 *
 * @template {HTMLElement} [T=HTMLElement]
 * @param {string} id
 * @returns {T}
 */
export function find(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no element ${id}`);
  return /** @type {T} */ (found);
}

/**
 * Make a button that does something.
 *
 * @param {string} text
 * @param {() => void} onClick
 * @param {Record<string, unknown>} [properties]
 */
export function button(text, onClick, properties = {}) {
  const made = make("button", { type: "button", ...properties }, text);
  made.addEventListener("click", onClick);
  return made;
}

/** @type {number | undefined} */
let toastTimer;

/**
 * Tell something in passing, to eyes and to screen readers.
 *
 * @param {string} text
 */
export function tell(text) {
  announce(text);
  const toast = find("toast");
  toast.textContent = text;
  toast.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (toast.hidden = true), 4000);
}

/**
 * Tell something to screen readers only.
 *
 * @param {string} text
 */
export function announce(text) {
  find("status").textContent = text;
}
