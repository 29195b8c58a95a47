// @ts-check
/** One pane: a mixture, its sliders, and its side of the conversation. */

import { Answer, fill } from "./answer.js";
import { AnswerView } from "./answer_view.js";
import { button, make } from "./dom.js";
import { Editor } from "./editor.js";
import { inspect } from "./inspector.js";
import { nameOf } from "./mixture.js";
import { streamBody } from "./requests.js";

/** @typedef {import("./mixture.js").Mixture} Mixture */
/** @typedef {import("./catalogue.js").Catalogue} Catalogue */
/** @typedef {import("./setup.js").Setup} Setup */
/** @typedef {import("./requests.js").Message} Message */
/**
 * @typedef {object} PaneActions what a pane asks of the page
 * @property {(pane: Pane) => void} changed its mixture is another one
 * @property {(pane: Pane) => void} remove
 * @property {(pane: Pane) => void} save
 * @property {(pane: Pane) => void} copy
 */

export class Pane {
  /** @type {AbortController | null} */
  #running = null;
  /** @type {Answer | null} the latest that was asked for, whether it is shown or not */
  #latest = null;
  /** @type {AnswerView[]} */
  #views = [];
  #catalogue;
  #editor;
  #badge = make("span", { class: "badge", "aria-hidden": "true" });
  #name = make("span", { class: "pane-name" });
  #tools;
  #remove;
  #turns = make("div", { class: "turns" });
  #inspector = make("div", { class: "inspector", hidden: true });

  /**
   * @param {Mixture} mixture changed in place
   * @param {Catalogue} catalogue
   * @param {PaneActions} actions
   */
  constructor(mixture, catalogue, actions) {
    this.mixture = mixture;
    this.#catalogue = catalogue;
    this.label = "";
    this.#editor = new Editor(mixture, catalogue, () => {
      this.#showName();
      actions.changed(this);
    });
    this.#remove = button("×", () => actions.remove(this), { class: "quiet", title: "Remove pane" });
    this.#tools = make(
      "div",
      { class: "row" },
      button("Save", () => actions.save(this), { class: "quiet" }),
      button("Copy", () => actions.copy(this), { class: "quiet" }),
      this.#remove,
    );
    this.root = make(
      "section",
      { class: "pane" },
      make("header", {}, make("h2", {}, this.#badge, this.#name), this.#tools),
      this.#editor.root,
      this.#turns,
      this.#inspector,
    );
  }

  /** @returns {Answer[]} one for each prompt */
  get answers() {
    return this.#views.map((view) => view.answer);
  }

  /** @returns {string} the mixture's name */
  get name() {
    return nameOf(this.mixture, this.#catalogue.methods);
  }

  /** @returns {boolean} whether an answer is on its way */
  get isBusy() {
    return this.#running !== null;
  }

  /** @returns {boolean} whether the server went away before the last answer was whole */
  get hasLost() {
    return this.#latest?.isLost ?? false;
  }

  /**
   * Show where the pane stands; hide what it is, if that must not be known.
   *
   * @param {string} label `1`, or `A` where it is blind
   * @param {boolean} isBlind
   * @param {boolean} isLast whether it may not be removed
   */
  place(label, isBlind, isLast) {
    this.label = label;
    this.#editor.root.hidden = isBlind;
    this.#tools.hidden = isBlind;
    this.#inspector.hidden = this.#inspector.hidden || isBlind;
    this.#remove.disabled = isLast;
    this.#remove.setAttribute("aria-label", `Remove pane ${label}`);
    this.#badge.textContent = label;
    this.root.dataset.blind = String(isBlind);
    this.#showName();
    if (!isBlind) this.#views.forEach((view) => view.reveal());
  }

  /**
   * Offer what the server has now.
   *
   * @param {Catalogue} catalogue
   */
  offer(catalogue) {
    this.#catalogue = Object.assign(this.#catalogue, catalogue);
    this.#editor.draw();
    this.#showName();
  }

  /**
   * Answer the last of the prompts; what it said to it before gives way to the first new token.
   *
   * @param {string[]} prompts
   * @param {Setup} setup
   * @param {import("./api.js").Api} api
   */
  async run(prompts, setup, api) {
    this.stop();
    const running = new AbortController();
    this.#running = running;
    const answer = (this.#latest = new Answer());
    const isBlind = this.root.dataset.blind === "true";
    const view = new AnswerView(answer, isBlind, (token, i) => {
      this.#inspector.hidden = false;
      this.#inspector.replaceChildren(...inspect(token, i, answer.tokens.length));
    });
    const slot = this.#slot(prompts);
    const turn = prompts.length - 1;
    this.#turns.querySelectorAll(".stale").forEach((old) => old.classList.remove("stale"));
    slot.firstElementChild?.classList.add("stale");
    if (!slot.firstElementChild) slot.append(view.root);
    this.#views[turn] ??= view;
    const body = streamBody(this.mixture, setup, this.messages(prompts));
    await fill(answer, api, body, running.signal, () => {
      view.update();
      if (running.signal.aborted || slot.firstElementChild === view.root) return;
      if (answer.state === "failed" && !answer.text) {
        // What was there stays, with the reason why nothing took its place.
        slot.replaceChildren(/** @type {Element} */ (slot.firstElementChild), view.root);
        return;
      }
      this.#views[turn] = view;
      slot.replaceChildren(view.root);
      this.#inspector.hidden = true;
    });
    view.update();
    if (this.#running === running) this.#running = null;
  }

  /** End the answer that is on its way. */
  stop() {
    this.#running?.abort();
    this.#running = null;
  }

  /** Forget the conversation. */
  clear() {
    this.stop();
    this.#latest = null;
    this.#views = [];
    this.#turns.replaceChildren();
    this.#inspector.hidden = true;
  }

  /**
   * Return the conversation up to the last prompt, without the turns that got no answer.
   *
   * @param {string[]} prompts
   * @returns {Message[]}
   */
  messages(prompts) {
    const before = prompts.slice(0, -1).flatMap((content, i) => {
      const text = this.#views[i]?.answer.text;
      if (!text) return [];
      return [
        /** @type {Message} */ ({ role: "user", content }),
        /** @type {Message} */ ({ role: "assistant", content: text }),
      ];
    });
    return [...before, { role: "user", content: prompts.at(-1) ?? "" }];
  }

  /**
   * Return where the answer to the last prompt is shown.
   *
   * @param {string[]} prompts
   */
  #slot(prompts) {
    for (let i = this.#turns.children.length; i < prompts.length; i++) {
      const question = make("p", { class: "question" }, prompts[i]);
      this.#turns.append(make("div", { class: "turn" }, question, make("div")));
    }
    const turn = this.#turns.children[prompts.length - 1];
    return /** @type {HTMLElement} */ (turn.lastElementChild);
  }

  #showName() {
    const isBlind = this.root.dataset.blind === "true";
    const shown = isBlind ? `Answer ${this.label}` : this.name;
    // A long name breaks before what it joins.
    this.#name.replaceChildren(...shown.split(/(?=[+~])/).flatMap((part) => [make("wbr"), part]));
    this.#name.title = shown;
    this.root.setAttribute("aria-label", isBlind ? shown : `Pane ${this.label}: ${shown}`);
  }
}
