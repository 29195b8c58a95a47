// @ts-check
/** An answer as tokens, coloured by who spoke; pointing at one, or walking to it, chooses it. */

import { make } from "./dom.js";
import { colourAs, strength, strip } from "./hues.js";

/** @typedef {import("./answer.js").Token} Token */
/** @typedef {import("./answer.js").Answer} Answer */

export class HeatMap {
  /** @type {HTMLElement[]} */
  #spans = [];
  // How much of the answer's text the spans hold.
  #reached = 0;
  #chosen = -1;
  #onChoose;

  /** @param {(token: Token, position: number) => void} onChoose */
  constructor(onChoose) {
    this.#onChoose = onChoose;
    this.root = make("div", {
      class: "heatmap",
      role: "toolbar",
      "aria-label": "Tokens of the answer; arrow keys walk",
    });
    this.root.addEventListener("keydown", (event) => this.#walk(event));
  }

  /**
   * Show what is new of an answer. Tokens that may turn out to end it wait; those that a stop
   * string cut are shown as such.
   *
   * @param {Answer} answer
   */
  update(answer) {
    for (let i = this.#spans.length; i < answer.tokens.length; i++) {
      const token = answer.tokens[i];
      // What the template puts before an answer is no part of its text.
      const text = i ? token.text : token.text.trimStart();
      const isCut = this.#reached + text.length > answer.text.length && !answer.reasoning;
      if (isCut && answer.state !== "done") return;
      this.#reached += text.length;
      // The space before a word has no colour.
      const [space] = /^ *(?=\S)/.exec(text) ?? [""];
      const span = this.#span(token, text.slice(space.length), i, isCut);
      this.#spans.push(span);
      this.root.append(space, span);
    }
  }

  /**
   * @param {Token} token
   * @param {string} text
   * @param {number} position
   * @param {boolean} isCut
   */
  #span(token, text, position, isCut) {
    const { trace } = token;
    const shown = text.replaceAll("\r", "").replaceAll("\n", isCut ? "↵" : "↵\n") || "·";
    const span = make("span", {
      class: `token${trace.agreed ? " agreed" : ""}${isCut ? " cut" : ""}`,
      role: "button",
      tabIndex: position ? -1 : 0,
      "aria-label": `${token.text.trim() || "blank"}, ${speaker(token)}`,
      "aria-pressed": "false",
    });
    span.append(shown);
    colourAs(span, trace.who);
    span.style.setProperty("--strength", strength(trace).toFixed(3));
    span.style.setProperty("--strip", strip(trace.weights));
    const choose = () => this.#choose(position, token);
    span.addEventListener("pointerenter", choose);
    span.addEventListener("focus", choose);
    span.addEventListener("click", () => span.focus());
    return span;
  }

  /**
   * @param {number} position
   * @param {Token} token
   */
  #choose(position, token) {
    const before = this.#spans[this.#chosen];
    before?.setAttribute("aria-pressed", "false");
    if (before) before.tabIndex = -1;
    else if (this.#spans[0]) this.#spans[0].tabIndex = -1;
    this.#chosen = position;
    this.#spans[position].setAttribute("aria-pressed", "true");
    this.#spans[position].tabIndex = 0;
    this.#onChoose(token, position);
  }

  /** @param {KeyboardEvent} event */
  #walk(event) {
    const last = this.#spans.length - 1;
    const at = this.#spans.indexOf(/** @type {HTMLElement} */ (event.target));
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    this.#spans[Math.min(Math.max(to, 0), last)].focus();
  }
}

/**
 * Tell who spoke a token, in words.
 *
 * @param {Token} token
 */
export function speaker(token) {
  return token.trace.agreed ? "all agree" : `${token.trace.who} spoke`;
}
