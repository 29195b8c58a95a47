// @ts-check
/** One answer on the page: as a heat map or plain, with what went wrong and how fast it was. */

import { make } from "./dom.js";
import { HeatMap } from "./heatmap.js";
import { swatch } from "./inspector.js";

/** @typedef {import("./answer.js").Answer} Answer */
/** @typedef {import("./answer.js").Token} Token */

export class AnswerView {
  #onChoose;
  #isBlind;
  /** @type {HeatMap | null} */
  #heatmap = null;
  #text = make("p", { class: "text" });
  #reasoning = make("details", { class: "reasoning", hidden: true });
  #thought = make("p");
  #error = make("p", { class: "error", role: "alert" });
  #foot = make("p", { class: "foot" });

  /**
   * @param {Answer} answer
   * @param {boolean} isBlind whether nothing may tell which mixture wrote it
   * @param {(token: Token, position: number) => void} onChoose
   */
  constructor(answer, isBlind, onChoose) {
    this.answer = answer;
    this.#isBlind = isBlind;
    this.#onChoose = onChoose;
    this.#reasoning.append(make("summary", {}, "Thought first"), this.#thought);
    this.root = make("div", { class: "answer" });
    this.root.append(this.#reasoning, this.#text, this.#error, this.#foot);
    this.update();
  }

  /** Show what a blind answer did not. */
  reveal() {
    this.#isBlind = false;
    this.update();
  }

  /** Show the answer as it is now. */
  update() {
    const { answer } = this;
    this.root.dataset.state = answer.state;
    this.root.setAttribute("aria-busy", String(["waiting", "streaming"].includes(answer.state)));
    if (answer.firstTokenMs) this.root.dataset.firstTokenMs = answer.firstTokenMs.toFixed(1);
    this.#text.textContent = answer.text;
    this.#thought.textContent = answer.reasoning;
    this.#reasoning.hidden = !answer.reasoning;
    this.#error.textContent = answer.error;
    if (answer.tokens.length && !this.#isBlind) this.#showTokens();
    this.#foot.replaceChildren(...(this.#isBlind ? [] : this.#facts()));
  }

  #showTokens() {
    if (!this.#heatmap) {
      this.#heatmap = new HeatMap(this.#onChoose);
      this.#text.after(this.#heatmap.root);
      // Who listens to the page hears the text as one.
      this.#text.classList.add("sr");
    }
    this.#heatmap.update(this.answer);
  }

  #facts() {
    const { answer } = this;
    const facts = [];
    if (answer.state === "stopped") facts.push(make("span", {}, "stopped"));
    if (answer.firstTokenMs) facts.push(make("span", {}, `first token ${answer.firstTokenMs.toFixed(0)} ms`));
    if (answer.state !== "done") return facts;
    const speed = answer.tokensPerSecond;
    facts.push(make("span", {}, `${answer.numTokens} tokens${speed ? `, ${speed.toFixed(0)} a second` : ""}`));
    if (!answer.text && !answer.reasoning) facts.push(make("span", {}, "said nothing"));
    if (answer.finish === "length") facts.push(make("span", {}, "cut at the most tokens"));
    for (const [name, share] of Object.entries(answer.spokenShare ?? {})) {
      // One state has nobody to agree with.
      if (!share || answer.rows === 1) continue;
      const label = name === "agreed" ? "all agree" : name;
      const mark = name === "agreed" ? null : swatch(name);
      facts.push(make("span", {}, mark, `${label} ${(100 * share).toFixed(0)} %`));
    }
    return facts;
  }
}
