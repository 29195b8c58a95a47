// @ts-check
/** A set-up in a link, and everything in a file. */

import { make } from "./dom.js";
import { readSetup } from "./setup.js";

/** @typedef {import("./setup.js").Setup} Setup */
const PREFIX = "#setup=";

/**
 * Return a link to this page with a set-up in it: behind the `#`, which no server is told.
 *
 * @param {Setup} setup
 * @returns {string}
 */
export function linkTo(setup) {
  const url = new URL(location.href);
  url.hash = PREFIX + encode(JSON.stringify(setup));
  return url.href;
}

/**
 * Return the set-up of the link that was followed, and take it out of the address.
 *
 * @returns {{setup: Setup | null, isBroken: boolean}}
 */
export function takeShared() {
  const { hash } = location;
  if (!hash.startsWith(PREFIX)) return { setup: null, isBroken: false };
  history.replaceState(null, "", location.pathname + location.search);
  const setup = readShared(hash.slice(PREFIX.length));
  return { setup, isBroken: setup === null };
}

/**
 * @param {string} text
 * @returns {Setup | null}
 */
export function readShared(text) {
  try {
    return readSetup(JSON.parse(decode(text)));
  } catch {
    return null;
  }
}

/**
 * Offer an object as a file.
 *
 * @param {object} value
 * @param {string} name
 */
export function download(value, name) {
  const blob = new Blob([JSON.stringify(value, null, 1)], { type: "application/json" });
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: name }).click();
  URL.revokeObjectURL(url);
}

/**
 * Write text in letters that a link carries as they are.
 *
 * @param {string} text
 */
export function encode(text) {
  const bytes = new TextEncoder().encode(text);
  const binary = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  return btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** @param {string} text */
export function decode(text) {
  const binary = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
  return new TextDecoder().decode(Uint8Array.from(binary, (letter) => letter.charCodeAt(0)));
}
