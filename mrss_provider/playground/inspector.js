// @ts-check
/** The numbers of one token: what each state weighed, claimed and would have said. */

import { make } from "./dom.js";
import { speaker } from "./heatmap.js";
import { colourAs } from "./hues.js";

/** @typedef {import("./answer.js").Token} Token */

/**
 * Return the details of a token.
 *
 * @param {Token} token
 * @param {number} position from 0
 * @param {number} numTokens of the answer
 */
export function inspect(token, position, numTokens) {
  return [
    make(
      "p",
      { class: "chosen" },
      make("q", {}, visible(token.text)),
      ` ${speaker(token)} `,
      make("small", {}, `token ${position + 1} of ${numTokens}`),
    ),
    statesTable(token),
    likeliest(token),
  ];
}

/** @param {Token} token */
function statesTable({ trace }) {
  const most = Math.max(...Object.values(trace.weights).map(Math.abs), 1e-9);
  const rows = Object.keys(trace.logprob).map((name) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, swatch(name), name),
      make("td", {}, bar(name, Math.abs(trace.weights[name] ?? 0) / most), fixed(trace.weights[name])),
      make("td", {}, bar(name, trace.r[name] ?? 0), fixed(trace.r[name])),
      make("td", {}, percent(trace.logprob[name])),
      make("td", { class: "said" }, visible(trace.would_say[name] ?? "")),
    ),
  );
  const titles = ["state", "weight", "r", "p", "would say"].map((title) =>
    make("th", { scope: "col", title: MEANINGS[title] ?? "" }, title),
  );
  return make(
    "table",
    {},
    make("caption", { class: "sr" }, "What each state had to do with this token"),
    make("thead", {}, make("tr", {}, ...titles)),
    make("tbody", {}, ...rows),
  );
}

/** @type {Record<string, string>} */
const MEANINGS = {
  weight: "the gate's weight at this token",
  r: "this state's share in the token",
  p: "probability of the token under this state alone",
  "would say": "this state's likeliest token",
};

/** @param {Token} token */
function likeliest(token) {
  const items = token.likeliest.map(({ token: text, logprob }) =>
    make(
      "li",
      { class: text === token.trace.token ? "drawn" : "" },
      make("span", { class: "said" }, visible(text)),
      bar("", Math.exp(logprob)),
      make("span", { class: "number" }, percent(logprob)),
    ),
  );
  return make(
    "div",
    { class: "likeliest" },
    make("h4", {}, "Next token, merged"),
    make("ol", {}, ...items),
  );
}

/** @param {string} name */
export function swatch(name) {
  const made = make("span", { class: "swatch", "aria-hidden": "true" });
  colourAs(made, name);
  return made;
}

/**
 * @param {string} name
 * @param {number} share in [0, 1]
 */
function bar(name, share) {
  const filled = make("span", { class: "bar", "aria-hidden": "true" });
  if (name) colourAs(filled, name);
  filled.style.setProperty("--share", String(Math.min(1, share)));
  return filled;
}

/** @param {number | null | undefined} value */
function fixed(value) {
  return value == null ? "–" : value.toFixed(2);
}

/** @param {number | null | undefined} logprob */
function percent(logprob) {
  if (logprob == null) return "–";
  const value = 100 * Math.exp(logprob);
  return `${value >= 10 ? value.toFixed(0) : value.toPrecision(2)} %`.replace(/^0\.0*\d+e.*/, "0 %");
}

/**
 * Return a token without the space before a word, and with what else cannot be seen.
 *
 * @param {string} text
 */
function visible(text) {
  return text.replace(/^ (?=\S)/, "").replaceAll("\n", "↵").replaceAll(" ", "\u00a0") || "·";
}
