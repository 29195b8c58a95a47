// @ts-check
/** One answer while it arrives: its text, the tokens behind it, and how fast they came. */

import { ApiError, GoneError } from "./api.js";
import { streamBody } from "./requests.js";
import { EOFError, events } from "./sse.js";

/**
 * @typedef {object} Trace as docs/trace.md describes it; what the page shows of it
 * @property {string} token
 * @property {string} who
 * @property {boolean} agreed
 * @property {number} disagreement
 * @property {Record<string, number>} weights
 * @property {Record<string, number>} logprob
 * @property {number} merged_logprob
 * @property {Record<string, number>} r
 * @property {Record<string, string>} would_say
 *
 * @typedef {{token: string, logprob: number}} Likely
 * @typedef {object} Token
 * @property {string} text what it adds to the text; "" for a part of a character
 * @property {Trace} trace
 * @property {Likely[]} likeliest of the merged distribution, most likely first
 *
 * @typedef {"waiting" | "streaming" | "done" | "stopped" | "failed"} AnswerState
 */

export class Answer {
  #decoder = new TextDecoder();
  #sent = performance.now();
  #first = 0;

  constructor() {
    /** @type {AnswerState} */
    this.state = "waiting";
    this.id = "";
    this.text = "";
    this.reasoning = "";
    /** @type {Token[]} */
    this.tokens = [];
    /** @type {Record<string, number> | null} by who spoke */
    this.spokenShare = null;
    this.mixture = "";
    this.rows = 0;
    this.finish = "";
    this.error = "";
    /** whether the server went away meanwhile */
    this.isLost = false;
    this.numTokens = 0;
    /** from the request to the first token on the page; 0 before that */
    this.firstTokenMs = 0;
    this.tokensPerSecond = 0;
  }

  /**
   * Take in one chunk of the stream.
   *
   * @param {any} chunk
   */
  add(chunk) {
    if (chunk.error) throw new ApiError(chunk.error.status ?? 500, chunk);
    this.id = chunk.id;
    if (chunk.mrss) {
      this.mixture = chunk.mrss.mixture;
      this.rows = chunk.mrss.rows;
    }
    if (chunk.usage) this.numTokens = chunk.usage.completion_tokens;
    const choice = chunk.choices[0];
    if (!choice) return;
    const { delta } = choice;
    this.text += delta.content ?? "";
    this.reasoning += delta.reasoning_content ?? "";
    const mrss = delta.provider_specific_fields?.mrss;
    this.#addTokens(mrss?.tokens ?? [], choice.logprobs?.content ?? []);
    if (mrss?.spoken_share) this.spokenShare = mrss.spoken_share;
    if (choice.finish_reason) this.finish = choice.finish_reason;
    this.state = "streaming";
  }

  /** Note that what has come is on the page. */
  shown() {
    const now = performance.now();
    if (!this.firstTokenMs && (this.text || this.reasoning)) {
      this.#first = now;
      this.firstTokenMs = now - this.#sent;
    }
    const seconds = (now - this.#first) / 1000;
    if (this.numTokens > 1 && seconds > 0) this.tokensPerSecond = (this.numTokens - 1) / seconds;
  }

  /**
   * @param {Trace[]} traces
   * @param {any[]} logprobs
   */
  #addTokens(traces, logprobs) {
    traces.forEach((trace, i) => {
      const bytes = logprobs[i] ? new Uint8Array(logprobs[i].bytes) : bytesOf(trace.token);
      const text = this.#decoder.decode(bytes, { stream: true });
      this.tokens.push({ text, trace, likeliest: logprobs[i]?.top_logprobs ?? [] });
    });
  }
}

/**
 * Return the bytes of a token as traces spell it: text, or `bytes:\xe4\xbd` for a part of one.
 *
 * @param {string} token
 */
export function bytesOf(token) {
  if (!token.startsWith("bytes:")) return new TextEncoder().encode(token);
  return Uint8Array.from(token.match(/[0-9a-f]{2}(?=\\x|$)/g) ?? [], (pair) => parseInt(pair, 16));
}

/**
 * Ask for an answer and fill it until it ends, is stopped, or fails; it says which itself.
 *
 * @param {Answer} answer
 * @param {import("./api.js").Api} api
 * @param {ReturnType<typeof streamBody>} body
 * @param {AbortSignal} signal
 * @param {() => void} onChange called after each change, when it may be shown
 */
export async function fill(answer, api, body, signal, onChange) {
  try {
    const stream = await api.stream("v1/chat/completions", body, signal);
    for await (const batch of events(stream)) {
      batch.forEach((chunk) => answer.add(chunk));
      onChange();
      answer.shown();
    }
    answer.state = "done";
  } catch (error) {
    const isStopped = signal.aborted;
    answer.state = isStopped ? "stopped" : "failed";
    if (!isStopped) explain(answer, error, api);
  }
  onChange();
}

/**
 * Say why an answer failed.
 *
 * @param {Answer} answer
 * @param {unknown} error
 * @param {import("./api.js").Api} api
 */
function explain(answer, error, api) {
  // A connection that breaks is a TypeError of fetch.
  const isBroken = error instanceof EOFError || error instanceof TypeError;
  answer.error = isBroken ? "the answer broke off" : /** @type {Error} */ (error).message;
  answer.isLost = isBroken || error instanceof GoneError;
  if (isBroken) api.onGone();
}
