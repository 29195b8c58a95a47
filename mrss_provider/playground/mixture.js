// @ts-check
/** Mixtures: states with weights, a merge rule and a gate; and how they are spelled. */

/**
 * @typedef {object} Term
 * @property {string} name of a state, or `base`
 * @property {number} weight only ratios count
 *
 * @typedef {object} Method
 * @property {string} name
 * @property {Record<string, number | boolean | string>} parameters those that are set
 *
 * @typedef {object} Mixture
 * @property {Term[]} terms
 * @property {Method} merge
 * @property {Method} gate
 * @property {number | null} cut null leaves it to the server
 *
 * @typedef {object} Parameter as `GET /v1/mrss/methods` describes one
 * @property {string} name
 * @property {string} doc
 * @property {number | boolean | string | null} default
 * @property {[number, number]} [range]
 * @property {(boolean | string)[]} [choices]
 * @property {string} [format]
 *
 * @typedef {{name: string, parameters: Parameter[]}} MethodInfo
 * @typedef {{merges: MethodInfo[], gates: MethodInfo[], default: {merge: string, gate: string}}} Methods
 */

export const BASE = "base";
const MERGES_WITH_CUT = ["delta", "contrast"];

/**
 * Tell whether a merge rule removes tokens that no named row finds likely.
 *
 * @param {Mixture} mixture
 */
export function hasCut(mixture) {
  return MERGES_WITH_CUT.includes(mixture.merge.name);
}

/**
 * Return the cut that a mixture asks for: none under a rule without one, whatever stood there before.
 *
 * @param {Mixture} mixture
 * @returns {number | null}
 */
export function cutOf(mixture) {
  return hasCut(mixture) ? mixture.cut : null;
}

/**
 * Return the terms that have a say.
 *
 * @param {Mixture} mixture
 */
export function heard(mixture) {
  return mixture.terms.filter((term) => term.weight !== 0);
}

/**
 * Spell a mixture as a model's name, `knowledge+tone:0.5~linear~novelty:0.1`; the cut, which a name
 * cannot say, is left out.
 *
 * @param {Mixture} mixture
 * @param {Methods} methods
 * @returns {string}
 */
export function nameOf(mixture, methods) {
  const terms = heard(mixture);
  if (!terms.length) return mixture.terms.map((term) => term.name).join("+");
  const largest = Math.max(...terms.map((term) => Math.abs(term.weight)));
  const spelled = [...terms]
    .sort((a, b) => (a.name < b.name ? -1 : 1))
    .map(({ name, weight }) => {
      const ratio = Number((weight / largest).toPrecision(4));
      return ratio === 1 ? name : `${name}:${ratio}`;
    })
    .join("+");
  // One state is what it is under every rule and gate.
  if (terms.length === 1) return spelled;
  const merge = spell(mixture.merge, methods.merges);
  const gate = spell(mixture.gate, methods.gates);
  const said = [merge === methods.default.merge ? "" : `~${merge}`];
  said.push(gate === methods.default.gate ? "" : `~${gate}`);
  return spelled + said.join("");
}

/**
 * Spell a merge rule or gate as a name has it: `power:2`. Parameters after the last one that is set
 * are left out.
 *
 * @param {Method} method
 * @param {MethodInfo[]} table
 * @returns {string}
 */
export function spell(method, table) {
  const known = table.find((info) => info.name === method.name)?.parameters ?? [];
  const values = known.map((p) => method.parameters[p.name] ?? p.default);
  while (values.length && values.at(-1) === known[values.length - 1].default) values.pop();
  return values.length ? `${method.name}:${values.map(String).join(",")}` : method.name;
}

/**
 * Read what `spell` wrote; what stands at its default is left unsaid.
 *
 * @param {string} text
 * @param {MethodInfo[]} table
 * @returns {Method}
 */
export function readMethod(text, table) {
  const [name, rest] = split(text, ":");
  const known = table.find((info) => info.name === name)?.parameters ?? [];
  // A schedule's points have commas of their own, and come first.
  const isPoints = known[0]?.format !== undefined;
  const texts = rest === "" ? [] : isPoints ? splitPoints(rest, known[1]) : rest.split(",");
  /** @type {Record<string, number | boolean | string>} */
  const parameters = {};
  known.slice(0, texts.length).forEach((parameter, i) => {
    const value = readValue(texts[i], parameter);
    if (value !== parameter.default) parameters[parameter.name] = value;
  });
  return { name, parameters };
}

/**
 * Read the terms of a name: `knowledge+tone:0.5`.
 *
 * @param {string} text
 * @returns {Term[]}
 */
export function readTerms(text) {
  return text.split("+").map((term) => {
    const [name, weight] = split(term, ":");
    return { name, weight: weight === "" ? 1 : Number(weight) };
  });
}

/**
 * @param {string} text
 * @param {string} at
 */
function split(text, at) {
  const i = text.indexOf(at);
  return i < 0 ? [text, ""] : [text.slice(0, i), text.slice(i + at.length)];
}

/**
 * @param {string} text
 * @param {Parameter | undefined} after what may follow the points
 */
function splitPoints(text, after) {
  const i = text.lastIndexOf(",");
  const last = text.slice(i + 1);
  return after?.choices?.includes(last) ? [text.slice(0, i), last] : [text];
}

/**
 * @param {string} text
 * @param {Parameter} parameter
 */
function readValue(text, parameter) {
  if (parameter.range) return Number(text);
  return typeof parameter.default === "boolean" ? text === "true" : text;
}
