// @ts-check
/** What the server has: states, named mixtures, merge rules and gates. */

import { ApiError } from "./api.js";
import { setStates } from "./hues.js";
import { BASE } from "./mixture.js";

/**
 * @typedef {{terms: string, merge?: string, gate?: string, cut?: number}} Named
 * @typedef {object} Catalogue
 * @property {string[]} states without the base
 * @property {Map<string, Named>} mixtures by name; empty for a key that may not see what they are
 * @property {import("./mixture.js").Methods} methods
 * @property {string} model
 * @property {string} version
 */

/**
 * Ask for all of it.
 *
 * @param {import("./api.js").Api} api
 * @returns {Promise<Catalogue>}
 */
export async function readCatalogue(api) {
  const [models, methods, version] = await Promise.all([
    api.get("v1/models"),
    api.get("v1/mrss/methods"),
    api.get("version"),
  ]);
  /** @type {{id: string, mrss: {kind: string}}[]} */
  const cards = models.data;
  const states = cards.filter(({ mrss }) => mrss.kind === "state").map(({ id }) => id);
  setStates(states.filter((name) => name !== BASE));
  const hasMixtures = cards.some(({ mrss }) => mrss.kind === "mixture");
  return {
    states,
    mixtures: hasMixtures ? await readMixtures(api) : new Map(),
    methods,
    model: version.model,
    version: version.version,
  };
}

/**
 * @param {import("./api.js").Api} api
 * @returns {Promise<Map<string, Named>>}
 */
async function readMixtures(api) {
  try {
    const { data } = await api.get("v1/mixtures", false);
    return new Map(data.map((/** @type {Named & {name: string}} */ mixture) => [mixture.name, mixture]));
  } catch (error) {
    // What a mixture is made of is for administrators.
    if (error instanceof ApiError && [401, 403, 404].includes(error.status)) return new Map();
    throw error;
  }
}
