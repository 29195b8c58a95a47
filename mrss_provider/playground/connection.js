// @ts-check
/** Watches whether the server is there, and says when that changes. */

const WATCH_MS = 5000;
const STARTING_MS = 500;
const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 8000;

/** @typedef {"connecting" | "ready" | "starting" | "gone"} State */

export class Connection {
  #api;
  #onChange;
  #retryMs = FIRST_RETRY_MS;
  /** @type {number | undefined} */
  #timer;
  #isAsking = false;

  /**
   * @param {import("./api.js").Api} api
   * @param {(state: State) => void} onChange
   */
  constructor(api, onChange) {
    this.#api = api;
    this.#onChange = onChange;
    /** @type {State} */
    this.state = "connecting";
    // A page that nobody looked at may be behind by hours.
    document.addEventListener("visibilitychange", () => this.look());
  }

  /** Ask now, and from then on by itself: seldom while all is well, more and more seldom else. */
  async look() {
    if (this.#isAsking || document.hidden) return;
    this.#isAsking = true;
    clearTimeout(this.#timer);
    const state = await this.#api.health();
    this.#isAsking = false;
    this.#retryMs = state === "gone" ? Math.min(2 * this.#retryMs, LAST_RETRY_MS) : FIRST_RETRY_MS;
    const waits = { ready: WATCH_MS, starting: STARTING_MS, gone: this.#retryMs };
    this.#timer = setTimeout(() => this.look(), waits[state]);
    if (state !== this.state) {
      this.state = state;
      this.#onChange(state);
    }
  }
}
