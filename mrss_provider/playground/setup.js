// @ts-check
/** The set-up: what the panes compute and how. Kept over a reload, and carried by links. */

/** @typedef {import("./mixture.js").Mixture} Mixture */
/** @typedef {import("./mixture.js").Method} Method */
/**
 * @typedef {object} Setup
 * @property {Mixture[]} panes two to four
 * @property {number | null} temperature null leaves it to the model
 * @property {number | null} top_p the same
 * @property {number} max_tokens
 * @property {number} seed
 * @property {boolean} trace whether answers are shown as heat maps
 * @property {boolean} blind whether the next answers are to be voted on
 * @property {string} prompt what stands in the prompt field
 */

export const MIN_PANES = 2;
export const MAX_PANES = 4;
const STORED = "mrss.setup";
const MAX_CHARS = 20_000;

/**
 * Return a mixture of states with the default merge and gate.
 *
 * @param {string[]} names
 * @returns {Mixture}
 */
export function plainMixture(names) {
  return {
    terms: names.map((name) => ({ name, weight: 1 })),
    merge: { name: "delta", parameters: {} },
    gate: { name: "novelty", parameters: {} },
    cut: null,
  };
}

/**
 * Return the set-up of a first visit.
 *
 * @param {string[]} states that are served
 * @returns {Setup}
 */
export function firstSetup(states) {
  // Of the bundled states the two that the first question is about.
  const pair = ["knowledge", "tone"];
  const mixed = pair.every((name) => states.includes(name)) ? pair : states.slice(0, 2);
  return {
    panes: [plainMixture(mixed.length ? mixed : ["base"]), plainMixture(["base"])],
    temperature: null,
    top_p: null,
    max_tokens: 120,
    seed: 1,
    trace: true,
    blind: false,
    prompt: states.includes("knowledge") ? "Where is the lighthouse?" : "Hello! How are you?",
  };
}

/**
 * Return what is kept in this browser, or null.
 *
 * @returns {Setup | null}
 */
export function keptSetup() {
  try {
    return readSetup(JSON.parse(localStorage.getItem(STORED) ?? "null"));
  } catch {
    return null;
  }
}

/**
 * Keep a set-up in this browser, if it lets us.
 *
 * @param {Setup} setup
 */
export function keepSetup(setup) {
  try {
    localStorage.setItem(STORED, JSON.stringify(setup));
  } catch {
    // Private windows may have no storage: then a reload begins anew.
  }
}

/**
 * Return a value that came from outside as a set-up, with no field but ours, or null.
 *
 * @param {any} raw
 * @returns {Setup | null}
 */
export function readSetup(raw) {
  if (typeof raw !== "object" || raw === null || !Array.isArray(raw.panes)) return null;
  const panes = raw.panes.map(readMixture);
  const { temperature = null, top_p = null, max_tokens, seed, trace, blind, prompt } = raw;
  const isRight =
    panes.length >= MIN_PANES &&
    panes.length <= MAX_PANES &&
    panes.every(Boolean) &&
    [temperature, top_p].every((value) => value === null || Number.isFinite(value)) &&
    Number.isInteger(max_tokens) &&
    Number.isInteger(seed) &&
    typeof prompt === "string" &&
    prompt.length <= MAX_CHARS;
  if (!isRight) return null;
  return { panes, temperature, top_p, max_tokens, seed, trace: !!trace, blind: !!blind, prompt };
}

/**
 * @param {any} raw
 * @returns {Mixture | null}
 */
function readMixture(raw) {
  if (typeof raw !== "object" || raw === null || !Array.isArray(raw.terms)) return null;
  const merge = readMethod(raw.merge);
  const gate = readMethod(raw.gate);
  const cut = raw.cut ?? null;
  const terms = raw.terms.map((/** @type {any} */ term) => ({
    name: String(term?.name),
    weight: Number(term?.weight),
  }));
  const isRight =
    terms.length > 0 &&
    terms.every((/** @type {any} */ term) => Number.isFinite(term.weight)) &&
    (cut === null || Number.isFinite(cut));
  return merge && gate && isRight ? { terms, merge, gate, cut } : null;
}

/**
 * @param {any} raw
 * @returns {Method | null}
 */
function readMethod(raw) {
  if (typeof raw?.name !== "string") return null;
  /** @type {Method["parameters"]} */
  const parameters = {};
  for (const [name, value] of Object.entries(raw.parameters ?? {})) {
    if (!["number", "boolean", "string"].includes(typeof value)) return null;
    parameters[name] = /** @type {number | boolean | string} */ (value);
  }
  return { name: raw.name, parameters };
}
