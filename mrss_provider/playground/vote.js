// @ts-check
/** The blind vote: which answer is best, before anybody knows whose it is. */

import { announce, button, find } from "./dom.js";

/** @typedef {import("./panes.js").Panes} Panes */
/**
 * @typedef {object} Vote
 * @property {string} id of the round
 * @property {"a" | "b" | "c" | "d" | "tie"} vote a letter stands for the name at its place
 * @property {string[]} models
 * @property {string[]} ids of the answers
 */

export class Votes {
  #panes;
  #api;
  #round = 0;

  /**
   * @param {Panes} panes
   * @param {import("./api.js").Api} api
   */
  constructor(panes, api) {
    this.#panes = panes;
    this.#api = api;
    /** @type {Vote[]} of this visit */
    this.cast = [];
  }

  /** Show the question once there is something to vote on, and the tally as long as it is new. */
  update() {
    const panes = this.#panes;
    const answers = panes.shown.map((pane) => pane.answers.at(-1));
    const isOpen = panes.isBlind && !panes.isBusy && answers.every((answer) => answer?.state === "done");
    const bar = find("vote");
    const hasAsked = this.#round === panes.prompts.length && this.#round > 0;
    bar.hidden = !isOpen && !(hasAsked && !panes.isBlind);
    find("vote-title").hidden = !isOpen;
    const choices = find("vote-choices");
    choices.hidden = !isOpen;
    if (!isOpen || hasAsked) return;
    this.#round = panes.prompts.length;
    find("vote-result").textContent = "";
    const letters = panes.shown.map((pane) => pane.label);
    choices.replaceChildren(
      ...letters.map((letter) => button(letter, () => this.#vote(letter), { "aria-label": `Answer ${letter}` })),
      button("None is better", () => this.#vote("tie")),
    );
    announce("All answers are there: which is best?");
  }

  /** Forget that a round was voted on. */
  reset() {
    this.#round = 0;
    this.update();
  }

  /** @param {string} letter */
  async #vote(letter) {
    const panes = this.#panes;
    const shown = [...panes.shown];
    const labels = shown.map((pane) => pane.label);
    /** @type {Vote} */
    const vote = {
      id: `playground-${crypto.getRandomValues(new Uint32Array(4)).join("-")}`,
      vote: /** @type {Vote["vote"]} */ (letter.toLowerCase()),
      models: shown.map((pane) => pane.name),
      ids: shown.map((pane) => pane.answers.at(-1)?.id ?? ""),
    };
    panes.reveal();
    this.cast.push(vote);
    const who = labels.map((label, i) => `${label} was ${vote.models[i]}`).join(", ");
    const result = find("vote-result");
    result.textContent = `${who}.`;
    this.update();
    if (new Set(vote.models).size < vote.models.length) {
      result.textContent += " Not counted by the server: two panes have the same mixture.";
      return;
    }
    try {
      await this.#api.post("v1/feedback", vote);
      result.textContent += " Your vote is counted.";
    } catch (error) {
      result.textContent += ` The server did not take the vote: ${/** @type {Error} */ (error).message}.`;
    }
  }
}
