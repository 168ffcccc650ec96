// The service's HTTP interface: what the page asks, and every way in which that can fail, as a `Problem`.

export class Problem extends Error {
  constructor(kind, detail, retryAfter = 0) {
    super(detail);
    this.kind = kind; // an HTTP status, or "gone" (no answer at all), or "cut" (the answer ended early)
    this.retryAfter = retryAfter; // seconds
  }
}

const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function ask(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("gone", "");
  }
  if (response.ok) return response;
  let detail = "";
  try {
    detail = (await response.json()).detail ?? "";
  } catch { /* an answer of something in between, such as a proxy: the status says enough */ }
  throw new Problem(response.status, detail, Number(response.headers.get("Retry-After")) || 0);
}

export async function about(key) {
  return (await ask("/v1/about", { headers: headers(key) })).json();
}

// The picture of a map tile as a URL; null where there is none.
export async function tileUrl(url, key, signal) {
  try {
    const response = await ask(url, { headers: headers(key), signal });
    return URL.createObjectURL(await response.blob());
  } catch {
    return null;
  }
}

// Yields { event, data } as the search goes on; ends after "result", throws a Problem for anything else.
export async function* search(photo, parameters, key, signal) {
  const query = new URLSearchParams(parameters);
  const response = await ask(`/v1/locate/stream?${query}`, {
    method: "POST",
    body: photo,
    headers: { ...headers(key), "Content-Type": photo.type || "application/octet-stream", Accept: "text/event-stream" },
    signal,
  });
  for await (const message of messages(response.body, signal)) {
    if (message.event === "error") throw new Problem(message.data.status, message.data.detail, message.data.retry_after);
    yield message;
    if (message.event === "result") return;
  }
  throw new Problem("cut", "");
}

// Server-sent events: blocks of "field: value" lines, each ended by an empty line; lines with ":" first are comments.
async function* messages(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new Problem("cut", "");
    }
    if (part.done) return;
    const blocks = (text + part.value).replaceAll("\r\n", "\n").split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = block.split("\n").filter((line) => !line.startsWith(":")).map((line) => /^(\w+): ?(.*)$/.exec(line));
      const all = (name) => fields.filter((field) => field?.[1] === name).map((field) => field[2]).join("\n");
      if (all("data")) yield { event: all("event"), data: JSON.parse(all("data")) };
    }
  }
}
