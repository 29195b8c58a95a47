// @ts-check
/** The server, as the page talks to it. The key stays in this tab's memory and session storage. */

const STORED = "mrss.key";
const HEALTH_TIMEOUT_MS = 3000;

/** Where the server is: above the folder of this file, whatever stands before that. */
export const ROOT = new URL("../", import.meta.url);

/** What the server refused, in its own words. */
export class ApiError extends Error {
  /**
   * @param {number} status
   * @param {any} body
   */
  constructor(status, body) {
    super(body?.error?.message ?? `the server answered with status ${status}`);
    this.status = status;
    /** @type {string | null} the request's field at fault */
    this.param = body?.error?.param ?? null;
  }
}

/** Nobody answered, or stopped in the middle. */
export class GoneError extends Error {}

/** @returns {string} */
function keptKey() {
  try {
    return sessionStorage.getItem(STORED) ?? "";
  } catch {
    return "";
  }
}

export class Api {
  constructor() {
    /** @type {string} empty without one */
    this.key = keptKey();
    /** @type {() => void} called when nobody answers */
    this.onGone = () => {};
    /** @type {() => void} called when a key is wanted */
    this.onLocked = () => {};
  }

  /**
   * Use a key from here on; "" is none.
   *
   * @param {string} key
   */
  setKey(key) {
    this.key = key;
    try {
      sessionStorage.setItem(STORED, key);
    } catch {
      // Where there is no storage, a reload asks again.
    }
  }

  /**
   * Tell how the server is.
   *
   * @returns {Promise<"ready" | "starting" | "gone">}
   */
  async health() {
    const options = { signal: AbortSignal.timeout(HEALTH_TIMEOUT_MS) };
    try {
      if (!(await fetch(new URL("health", ROOT), options)).ok) return "gone";
      return (await fetch(new URL("ready", ROOT), options)).ok ? "ready" : "starting";
    } catch {
      return "gone";
    }
  }

  /**
   * Return what a route answers.
   *
   * @param {string} path
   * @param {boolean} [asksForKey] whether a refusal is a reason to ask for a key
   * @returns {Promise<any>}
   */
  async get(path, asksForKey = true) {
    return (await this.#send(path, {}, asksForKey)).json();
  }

  /**
   * Send an object and return the answer's.
   *
   * @param {string} path
   * @param {object} body
   * @returns {Promise<any>}
   */
  async post(path, body) {
    return (await this.#send(path, this.#posting(body))).json();
  }

  /**
   * Ask for a stream and return it once it is admitted.
   *
   * @param {string} path
   * @param {object} body
   * @param {AbortSignal} signal
   * @returns {Promise<ReadableStream<Uint8Array>>}
   */
  async stream(path, body, signal) {
    const response = await this.#send(path, { ...this.#posting(body), signal });
    if (!response.body) throw new GoneError("the answer has no body");
    return response.body;
  }

  /** @param {object} body */
  #posting(body) {
    const headers = { "content-type": "application/json" };
    return { method: "POST", body: JSON.stringify(body), headers };
  }

  /**
   * @param {string} path
   * @param {RequestInit} options
   * @param {boolean} [asksForKey]
   */
  async #send(path, options, asksForKey = true) {
    const headers = new Headers(options.headers);
    if (this.key) headers.set("authorization", `Bearer ${this.key}`);
    let response;
    try {
      response = await fetch(new URL(path, ROOT), { ...options, headers });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      this.onGone();
      throw new GoneError("the server does not answer");
    }
    if (response.ok) return response;
    const error = new ApiError(response.status, await response.json().catch(() => null));
    if (error.status === 401 && asksForKey) this.onLocked();
    throw error;
  }
}
