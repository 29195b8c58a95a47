// @ts-check
/** One colour a state, the same in every pane. */

import { BASE } from "./mixture.js";

// Far apart for all eyes; beyond them hues repeat.
const HUES = [250, 55, 165, 330, 110, 290, 25, 200];
const MOST_DISAGREEMENT = Math.log(2);
const LEAST_COLOUR = 0.35;

/** @type {Map<string, number>} */
let hues = new Map();

/**
 * Give every state its hue.
 *
 * @param {string[]} states
 */
export function setStates(states) {
  hues = new Map(states.map((name, i) => [name, HUES[i % HUES.length]]));
}

/**
 * Colour an element as a state's; the base has no hue.
 *
 * @param {HTMLElement} element
 * @param {string} name
 */
export function colourAs(element, name) {
  element.classList.toggle("base", name === BASE);
  element.style.setProperty("--hue", String(hues.get(name) ?? 0));
}

/**
 * Return how strongly a token is coloured, in [0, 1]: by how far the states are from agreeing.
 *
 * @param {import("./answer.js").Trace} trace
 */
export function strength(trace) {
  if (trace.agreed || trace.who === BASE) return 0;
  const reached = Math.min(1, trace.disagreement / MOST_DISAGREEMENT);
  return LEAST_COLOUR + (1 - LEAST_COLOUR) * reached;
}

/**
 * Return the weights of a token as a stack of colours, for a thin line below it.
 *
 * @param {Record<string, number>} weights
 */
export function strip(weights) {
  const positive = Object.entries(weights).filter(([, weight]) => weight > 0);
  const total = positive.reduce((sum, [, weight]) => sum + weight, 0);
  let reached = 0;
  const stops = positive.map(([name, weight]) => {
    const start = reached;
    reached += (100 * weight) / total;
    const chroma = name === BASE ? 0 : 0.15;
    const colour = `oklch(0.66 ${chroma} ${hues.get(name) ?? 0})`;
    return `${colour} ${start.toFixed(1)}% ${reached.toFixed(1)}%`;
  });
  return stops.length ? `linear-gradient(to right,${stops.join(",")})` : "none";
}
