// @ts-check
/** What a pane asks the server. */

import { cutOf, heard } from "./mixture.js";

/** @typedef {import("./mixture.js").Mixture} Mixture */
/** @typedef {import("./mixture.js").Method} Method */
/** @typedef {import("./setup.js").Setup} Setup */
/** @typedef {{role: "user" | "assistant", content: string}} Message */

/** How many of the likeliest tokens are asked for beside each that is drawn. */
const TOP = 5;

/**
 * Return the body of a chat request, without what is for showing it only.
 *
 * @param {Mixture} mixture
 * @param {Setup} setup
 * @param {Message[]} messages
 * @returns {Record<string, unknown>}
 */
export function chatBody(mixture, setup, messages) {
  return {
    model: mixture.terms.map((term) => term.name).join("+"),
    messages,
    ...samplingOf(setup),
    max_tokens: setup.max_tokens,
    seed: setup.seed,
    mrss: optionsOf(mixture),
  };
}

/**
 * Return the body of a streamed one, with the trace if the set-up wants it.
 *
 * @param {Mixture} mixture
 * @param {Setup} setup
 * @param {Message[]} messages
 */
export function streamBody(mixture, setup, messages) {
  const body = {
    ...chatBody(mixture, setup, messages),
    stream: true,
    stream_options: { include_usage: true },
  };
  if (!setup.trace) return body;
  const mrss = { ...optionsOf(mixture), trace: true };
  return { ...body, logprobs: true, top_logprobs: TOP, mrss };
}

/**
 * Return the sampling parameters that are set.
 *
 * @param {Setup} setup
 * @returns {Record<string, number>}
 */
export function samplingOf(setup) {
  /** @type {Record<string, number>} */
  const set = {};
  if (setup.temperature !== null) set.temperature = setup.temperature;
  if (setup.top_p !== null) set.top_p = setup.top_p;
  return set;
}

/** @param {Mixture} mixture */
function optionsOf(mixture) {
  /** @type {Record<string, unknown>} */
  const options = {
    weights: Object.fromEntries(mixture.terms.map((term) => [term.name, term.weight])),
  };
  // Where one state has a say, there is nothing to merge.
  if (heard(mixture).length === 1) return options;
  options.merge = methodOf(mixture.merge);
  options.gate = methodOf(mixture.gate);
  const cut = cutOf(mixture);
  if (cut !== null) options.cut = cut;
  return options;
}

/** @param {Method} method */
function methodOf(method) {
  const isPlain = Object.keys(method.parameters).length === 0;
  return isPlain ? method.name : { name: method.name, ...method.parameters };
}
