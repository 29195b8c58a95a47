// @ts-check
/** A pane's request as text that runs elsewhere: curl, Python, and a proxy's configuration. */

import { cutOf, heard, nameOf } from "./mixture.js";
import { chatBody, samplingOf } from "./requests.js";

/** @typedef {import("./mixture.js").Mixture} Mixture */
/** @typedef {import("./mixture.js").Methods} Methods */
/** @typedef {import("./setup.js").Setup} Setup */
/** @typedef {import("./requests.js").Message} Message */
/**
 * @typedef {object} Snippet what is to be written
 * @property {Mixture} mixture
 * @property {Setup} setup
 * @property {Message[]} messages
 * @property {Methods} methods
 * @property {string} root the server's address, with a slash at its end
 * @property {boolean} hasKey whether the server wants one; it is never written
 */

const MAX_LINE = 80;

/**
 * Return a command for a shell.
 *
 * @param {Snippet} snippet
 */
export function curl({ mixture, setup, messages, root, hasKey }) {
  const key = hasKey ? ` \\\n  -H "Authorization: Bearer $MRSS_API_KEY"` : "";
  const body = JSON.stringify(chatBody(mixture, setup, messages), null, 2);
  return (
    `curl ${root}v1/chat/completions -H 'Content-Type: application/json'${key} \\\n` +
    `  -d '${body.replaceAll("'", `'\\''`)}'\n`
  );
}

/**
 * Return a program for the `openai` package.
 *
 * @param {Snippet} snippet
 */
export function python({ mixture, setup, messages, root, hasKey }) {
  const { mrss, ...rest } = chatBody(mixture, setup, messages);
  const given = Object.entries({ ...rest, extra_body: { mrss } });
  const lines = given.map(([name, value]) => `    ${name}=${pythonValue(value, "    ")},\n`);
  const key = hasKey ? `os.environ["MRSS_API_KEY"]` : `"none"`;
  return (
    `${hasKey ? "import os\n\n" : ""}from openai import OpenAI\n\n` +
    `client = OpenAI(base_url=${JSON.stringify(`${root}v1`)}, api_key=${key})\n` +
    `answer = client.chat.completions.create(\n${lines.join("")})\n` +
    `print(answer.choices[0].message.content)\n`
  );
}

/**
 * Return a configuration for LiteLLM's proxy that serves the mixture as `playground`.
 *
 * @param {Snippet} snippet
 */
export function yaml({ mixture, setup, methods, root, hasKey }) {
  const params = {
    model: `mrss/${nameOf(mixture, methods)}`,
    api_base: root.replace(/\/$/, ""),
    ...(hasKey ? { api_key: "os.environ/MRSS_API_KEY" } : {}),
    ...samplingOf(setup),
    max_tokens: setup.max_tokens,
    seed: setup.seed,
  };
  const lines = Object.entries(params).map(
    ([name, value]) => `      ${name}: ${JSON.stringify(value)}\n`,
  );
  const cut = cutOf(mixture);
  if (cut !== null && heard(mixture).length > 1) {
    lines.push(`      extra_body: {"mrss": {"cut": ${cut}}}\n`);
  }
  return (
    `model_list:\n  - model_name: playground\n    litellm_params:\n${lines.join("")}\n` +
    "litellm_settings:\n  custom_provider_map:\n    - provider: mrss\n" +
    "      custom_handler: mrss_provider.handler\n\n" +
    "general_settings:\n" +
    "  # For loopback only. Elsewhere take this out and set LITELLM_MASTER_KEY.\n" +
    "  dangerously_permit_weak_or_unset_master_key: true\n"
  );
}

/**
 * Write a value as Python does, an item a line where it is long.
 *
 * @param {unknown} value
 * @param {string} indent of the line that it begins on
 * @returns {string}
 */
function pythonValue(value, indent) {
  const words = new Map([[true, "True"], [false, "False"], [null, "None"]]);
  const word = words.get(/** @type {any} */ (value));
  if (word || typeof value !== "object") return word ?? JSON.stringify(value);
  const inner = `${indent}    `;
  const isList = Array.isArray(value);
  const items = Object.entries(/** @type {object} */ (value)).map(([key, item]) =>
    isList ? pythonValue(item, inner) : `${JSON.stringify(key)}: ${pythonValue(item, inner)}`,
  );
  const [open, close] = isList ? "[]" : "{}";
  const flat = items.join(", ");
  if (indent.length + flat.length <= MAX_LINE && !flat.includes("\n")) return open + flat + close;
  return `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${indent}${close}`;
}
