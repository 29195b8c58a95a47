// @ts-check
/** The panes and their common conversation. */

import { announce, find } from "./dom.js";
import { Pane } from "./pane.js";
import { MAX_PANES, MIN_PANES } from "./setup.js";

/** @typedef {import("./setup.js").Setup} Setup */
/** @typedef {import("./catalogue.js").Catalogue} Catalogue */

/** While a slider moves, the panes begin anew this long after each step. */
const SETTLE_MS = 120;
const LETTERS = ["A", "B", "C", "D"];

export class Panes {
  #api;
  #catalogue;
  #actions;
  #onChange;
  #timers = new Map();

  /**
   * @param {Setup} setup changed in place
   * @param {Catalogue} catalogue
   * @param {import("./api.js").Api} api
   * @param {{save: (pane: Pane) => void, copy: (pane: Pane) => void}} actions
   * @param {() => void} onChange called when the set-up has changed, or an answer began or ended
   */
  constructor(setup, catalogue, api, actions, onChange) {
    this.setup = setup;
    this.#catalogue = catalogue;
    this.#api = api;
    this.#actions = actions;
    this.#onChange = onChange;
    /** @type {string[]} */
    this.prompts = [];
    /** whether the labels are hidden, until somebody votes */
    this.isBlind = false;
    /** @type {Pane[]} in the order of the set-up */
    this.all = setup.panes.map((mixture) => this.#make(mixture));
    /** @type {Pane[]} in the order on the page */
    this.shown = this.all;
    this.#arrange();
  }

  /** @returns {boolean} whether an answer is on its way */
  get isBusy() {
    return this.all.some((pane) => pane.isBusy);
  }

  /** Add a pane with a copy of the last one's mixture. */
  add() {
    if (this.all.length >= MAX_PANES) return;
    const pane = this.#make(structuredClone(this.setup.panes[this.all.length - 1]));
    this.all.push(pane);
    this.#keepOrder();
    this.rerun(pane);
  }

  /**
   * Ask every pane.
   *
   * @param {string} prompt
   */
  async send(prompt) {
    this.isBlind = this.setup.blind;
    this.shown = this.isBlind ? shuffled(this.all) : this.all;
    this.#arrange();
    this.prompts.push(prompt);
    await this.rerunAll();
  }

  /** Answer the last prompt anew in every pane. */
  async rerunAll() {
    if (!this.prompts.length) return;
    this.#timers.forEach(clearTimeout);
    const running = this.all.map((pane) => this.#run(pane));
    this.#onChange();
    await Promise.all(running);
    const answered = this.shown.filter((pane) => pane.answers.at(-1)?.state === "done");
    announce(answered.map((pane) => `${pane.label}: ${pane.answers.at(-1)?.text}`).join(" "));
  }

  /**
   * Answer the last prompt anew in one pane.
   *
   * @param {Pane} pane
   */
  async rerun(pane) {
    if (!this.prompts.length) return;
    const running = this.#run(pane);
    this.#onChange();
    await running;
  }

  /** Answer anew where the server went away. */
  retryLost() {
    this.all.filter((pane) => pane.hasLost).forEach((pane) => this.rerun(pane));
  }

  /** Show which pane is which. */
  reveal() {
    this.isBlind = false;
    this.#arrange();
    this.#onChange();
  }

  /** End all answers that are on their way. */
  stop() {
    this.all.forEach((pane) => pane.stop());
    this.#onChange();
  }

  /** Forget the conversation. */
  clear() {
    this.prompts = [];
    this.all.forEach((pane) => pane.clear());
    this.isBlind = false;
    this.#keepOrder();
  }

  /**
   * Offer what the server has now.
   *
   * @param {Catalogue} catalogue
   */
  offer(catalogue) {
    this.all.forEach((pane) => pane.offer(catalogue));
  }

  /** @param {import("./mixture.js").Mixture} mixture */
  #make(mixture) {
    return new Pane(mixture, this.#catalogue, {
      ...this.#actions,
      changed: (pane) => this.#changed(pane),
      remove: (pane) => this.#remove(pane),
    });
  }

  /** @param {Pane} pane */
  async #run(pane) {
    await pane.run(this.prompts, this.setup, this.#api);
    this.#onChange();
  }

  /** @param {Pane} pane */
  #changed(pane) {
    clearTimeout(this.#timers.get(pane));
    this.#timers.set(pane, setTimeout(() => this.rerun(pane), SETTLE_MS));
    this.#onChange();
  }

  /** @param {Pane} pane */
  #remove(pane) {
    if (this.all.length <= MIN_PANES) return;
    pane.stop();
    clearTimeout(this.#timers.get(pane));
    this.all = this.all.filter((other) => other !== pane);
    this.#keepOrder();
    find("add-pane").focus();
  }

  #keepOrder() {
    this.setup.panes = this.all.map((pane) => pane.mixture);
    this.shown = this.all;
    this.#arrange();
    this.#onChange();
  }

  #arrange() {
    this.shown.forEach((pane, i) => {
      const label = this.isBlind ? LETTERS[i] : String(this.all.indexOf(pane) + 1);
      pane.place(label, this.isBlind, this.all.length <= MIN_PANES);
    });
    const parent = find("panes");
    const roots = this.shown.map((pane) => pane.root);
    // Moving an element takes the focus from it.
    if (roots.some((root, i) => parent.children[i] !== root) || parent.children.length !== roots.length) {
      parent.replaceChildren(...roots);
    }
    parent.dataset.count = String(roots.length);
  }
}

/**
 * Return the items in an order that nobody can guess.
 *
 * @template T
 * @param {T[]} items
 * @returns {T[]}
 */
export function shuffled(items) {
  const left = [...items];
  const order = [];
  while (left.length) {
    const [number] = crypto.getRandomValues(new Uint32Array(1));
    order.push(...left.splice(number % left.length, 1));
  }
  return order;
}
