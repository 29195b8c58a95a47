// @ts-check
/** Server-sent events of a stream, as OpenAI's API sends them. */

const DONE = "[DONE]";

/**
 * Yield the events of a stream, those that came together as one list; ends at `[DONE]`.
 *
 * @param {ReadableStream<Uint8Array>} stream
 * @returns {AsyncGenerator<any[]>}
 * @throws {EOFError} the stream ended before that
 */
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new EOFError("the answer broke off");
      // A carriage return that is half a line end waits for the other half.
      const text = rest + decoder.decode(value, { stream: true });
      const blocks = text.replaceAll("\r\n", "\n").split("\n\n");
      rest = /** @type {string} */ (blocks.pop());
      const data = blocks.map(dataOf).filter((text) => text !== "");
      const end = data.indexOf(DONE);
      const batch = (end < 0 ? data : data.slice(0, end)).map((text) => JSON.parse(text));
      if (batch.length) yield batch;
      if (end >= 0) return;
    }
  } finally {
    reader.releaseLock();
  }
}

/** A stream that ended too early. */
export class EOFError extends Error {}

/** @param {string} block */
function dataOf(block) {
  return block
    .split("\n")
    .filter((line) => line.startsWith("data:"))
    .map((line) => line.slice(5).trimStart())
    .join("\n");
}
