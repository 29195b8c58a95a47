// @ts-check
/** Sliders and pickers for one mixture. Changes it in place, and says so at once. */

import { button, make } from "./dom.js";
import { swatch } from "./inspector.js";
import { BASE, hasCut, readMethod, readTerms } from "./mixture.js";

/** @typedef {import("./mixture.js").Mixture} Mixture */
/** @typedef {import("./mixture.js").Method} Method */
/** @typedef {import("./mixture.js").Parameter} Parameter */
/** @typedef {import("./catalogue.js").Catalogue} Catalogue */

const STEP = 0.05;
// A schedule must say something; then it is the state that opens the answer.
const FIRST_POINTS = (/** @type {Mixture} */ mixture) => `${mixture.terms[0].name}=1@0,0@32`;

export class Editor {
  #mixture;
  #catalogue;
  #onChange;

  /**
   * @param {Mixture} mixture changed in place
   * @param {Catalogue} catalogue
   * @param {() => void} onChange
   */
  constructor(mixture, catalogue, onChange) {
    this.#mixture = mixture;
    this.#catalogue = catalogue;
    this.#onChange = onChange;
    this.root = make("div", { class: "editor" });
    this.draw();
  }

  /** Draw it anew: after a change of what there is to choose from. */
  draw() {
    this.root.replaceChildren(
      make("div", { class: "sliders" }, ...this.#mixture.terms.map((term) => this.#slider(term))),
      this.#adder(),
    );
    // One state is what it is under every rule and gate.
    if (this.#mixture.terms.length === 1) return;
    this.root.append(
      make("div", { class: "picker" }, ...this.#picker("merge"), hasCut(this.#mixture) ? this.#cut() : null),
      make("div", { class: "picker" }, ...this.#picker("gate")),
    );
  }

  /** @param {import("./mixture.js").Term} term */
  #slider(term) {
    const isSigned = this.#mixture.merge.name === "contrast" || term.weight < 0;
    const input = make("input", {
      type: "range",
      min: isSigned ? String(Math.min(-1, term.weight)) : "0",
      max: String(Math.max(1, term.weight)),
      step: String(STEP),
      value: String(term.weight),
      "aria-label": `Weight of ${term.name}`,
    });
    const shown = make("output", {}, term.weight.toFixed(2));
    input.addEventListener("input", () => {
      term.weight = input.valueAsNumber;
      shown.textContent = term.weight.toFixed(2);
      this.#onChange();
    });
    const remove = button("×", () => this.#remove(term), {
      class: "quiet",
      "aria-label": `Remove ${term.name}`,
      disabled: this.#mixture.terms.length === 1,
    });
    const name = make("span", { class: "name" }, swatch(term.name), term.name);
    return make("div", { class: "slider" }, name, input, shown, remove);
  }

  /** @param {import("./mixture.js").Term} term */
  #remove(term) {
    this.#mixture.terms = this.#mixture.terms.filter((other) => other !== term);
    this.#changed("select");
  }

  #adder() {
    const taken = new Set(this.#mixture.terms.map((term) => term.name));
    const free = [BASE, ...this.#catalogue.states].filter((name) => !taken.has(name));
    const select = make(
      "select",
      { class: "adder", "aria-label": "Add a state, or load a named mixture" },
      make("option", { value: "" }, "+ state or mixture"),
      group("States", free, "state"),
      group("Named mixtures", [...this.#catalogue.mixtures.keys()], "mixture"),
    );
    select.addEventListener("change", () => {
      const [kind, name] = select.value.split(" ");
      if (kind === "state") this.#mixture.terms.push({ name, weight: 1 });
      else if (kind === "mixture") this.#load(name);
      this.#changed("select");
    });
    return select;
  }

  /** @param {string} name */
  #load(name) {
    const spec = this.#catalogue.mixtures.get(name);
    if (!spec) return;
    const { methods } = this.#catalogue;
    this.#mixture.terms = readTerms(spec.terms);
    this.#mixture.merge = readMethod(spec.merge ?? methods.default.merge, methods.merges);
    this.#mixture.gate = readMethod(spec.gate ?? methods.default.gate, methods.gates);
    this.#mixture.cut = spec.cut ?? null;
  }

  /** @param {"merge" | "gate"} kind */
  #picker(kind) {
    const table = this.#catalogue.methods[kind === "merge" ? "merges" : "gates"];
    const method = this.#mixture[kind];
    const select = make(
      "select",
      { "data-kind": kind },
      ...table.map(({ name }) => option(name, name, name === method.name)),
    );
    select.addEventListener("change", () => {
      const parameters = table.find(({ name }) => name === select.value)?.parameters ?? [];
      this.#mixture[kind] = { name: select.value, parameters: this.#needed(parameters) };
      this.#changed(`select[data-kind=${kind}]`);
    });
    const parameters = table.find(({ name }) => name === method.name)?.parameters ?? [];
    return [
      make("label", { class: "kind" }, make("span", {}, kind), select),
      ...parameters.map((parameter) => this.#parameter(method, parameter)),
    ];
  }

  /**
   * Return values for what has no default.
   *
   * @param {Parameter[]} parameters
   */
  #needed(parameters) {
    /** @type {Method["parameters"]} */
    const needed = {};
    for (const { name, default: value, choices } of parameters) {
      if (value === null) needed[name] = choices ? String(choices[0] ?? "") : FIRST_POINTS(this.#mixture);
    }
    return needed;
  }

  /**
   * @param {Method} method
   * @param {Parameter} parameter
   */
  #parameter(method, parameter) {
    const { name, range, choices, doc } = parameter;
    const value = method.parameters[name] ?? parameter.default;
    const field = choices ? this.#choice(choices, value) : this.#field(range, value, parameter);
    field.addEventListener("change", () => {
      const text = field.value;
      const read = range ? Number(text) : typeof choices?.[0] === "boolean" ? text === "true" : text;
      // What stands at its default is left unsaid.
      if (text === "" || read === parameter.default) delete method.parameters[name];
      else method.parameters[name] = read;
      this.#onChange();
    });
    return make("label", { title: doc }, name, " ", field);
  }

  /**
   * @param {(boolean | string)[]} choices
   * @param {unknown} value
   */
  #choice(choices, value) {
    const options = choices.map((choice) => option(String(choice), String(choice), choice === value));
    return make("select", {}, ...options);
  }

  /**
   * @param {[number, number] | undefined} range
   * @param {unknown} value
   * @param {Parameter} parameter
   */
  #field(range, value, parameter) {
    const properties = range
      ? { type: "number", min: String(range[0]), max: String(range[1]), step: "any" }
      : { type: "text", class: "points", spellcheck: false };
    const shown = value === parameter.default ? "" : String(value ?? "");
    return make("input", { ...properties, value: shown, placeholder: String(parameter.default ?? "") });
  }

  #cut() {
    const { cut } = this.#mixture;
    const field = make("input", {
      type: "number",
      min: "0",
      max: "0.99",
      step: "0.05",
      placeholder: "0.1",
      value: cut === null ? "" : String(cut),
    });
    field.addEventListener("change", () => {
      this.#mixture.cut = field.value === "" ? null : Number(field.value);
      this.#onChange();
    });
    const title = "tokens that no named row finds this fraction as likely as its likeliest are removed";
    return make("label", { title }, "cut ", field);
  }

  /** @param {string} focus what has the focus in the new drawing */
  #changed(focus) {
    this.draw();
    /** @type {HTMLElement | null} */ (this.root.querySelector(focus))?.focus();
    this.#onChange();
  }
}

/**
 * @param {string} label
 * @param {string[]} names
 * @param {string} kind
 */
function group(label, names, kind) {
  if (!names.length) return null;
  return make("optgroup", { label }, ...names.map((name) => option(`${kind} ${name}`, name, false)));
}

/**
 * @param {string} value
 * @param {string} text
 * @param {boolean} selected
 */
function option(value, text, selected) {
  return make("option", { value, selected }, text);
}
