// Runs the playground's modules without a page: reads cases on stdin, writes what they gave.
// The first argument is the folder of the modules.

import { readFileSync, readdirSync } from "node:fs";
import { pathToFileURL } from "node:url";

const folder = process.argv[2];
const modules = {};
// The page itself wants a document; all others must do without one until they are called.
for (const file of readdirSync(folder).filter((name) => name.endsWith(".js") && name !== "app.js")) {
  modules[file.replace(".js", "")] = await import(pathToFileURL(`${folder}/${file}`));
}
const { dialogs, mixture, requests, snippets, setup, share, sse } = modules;
const { methods, setups, streams } = JSON.parse(readFileSync(0, "utf8"));

async function batches(pieces) {
  const bytes = pieces.map((piece) => new Uint8Array(piece));
  const stream = new ReadableStream({
    pull(controller) {
      if (bytes.length) controller.enqueue(bytes.shift());
      else controller.close();
    },
  });
  const got = [];
  try {
    for await (const batch of sse.events(stream)) got.push(...batch);
  } catch (error) {
    got.push(error.message);
  }
  return got;
}

const messages = [{ role: "user", content: "It's \"5 €\" \\ <b>\n$HOME" }];
const written = setups.map((raw) => {
  const read = setup.readSetup(raw);
  if (read === null) return null;
  const [first] = read.panes;
  const snippet = { mixture: first, setup: read, messages, methods, root: "http://127.0.0.1:9/", hasKey: raw.hasKey };
  return {
    name: mixture.nameOf(first, methods),
    merge: mixture.readMethod(mixture.spell(first.merge, methods.merges), methods.merges),
    gate: mixture.readMethod(mixture.spell(first.gate, methods.gates), methods.gates),
    body: requests.streamBody(first, read, messages),
    plain: requests.chatBody(first, read, messages),
    spec: dialogs.specOf(first, read, { methods }),
    curl: snippets.curl(snippet),
    python: snippets.python(snippet),
    yaml: snippets.yaml(snippet),
    shared: share.readShared(share.encode(JSON.stringify(read))),
    read,
  };
});
process.stdout.write(JSON.stringify({ written, streams: await Promise.all(streams.map(batches)) }));
