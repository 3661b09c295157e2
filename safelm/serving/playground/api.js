// The server's API: JSON in, JSON or server-sent events out.
let key = "";

export function setKey(value) { key = value; }

export class ApiError extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

export async function listModels() {
  return (await (await request("/v1/models")).json()).data;
}

// "ok", "warming_up" while the first programs are compiled, or what else the server says of itself.
export async function health() {
  try {
    return (await (await fetch("/health")).json()).status;
  } catch {
    return "unreachable";
  }
}

export async function score(model, input, signal) {
  return (await request("/v1/safelm/score", { model, input }, signal)).json();
}

// Yields the events of a streamed completion or chat.
export async function* generate(kind, prompt, fields, signal) {
  const body = kind === "chat" ? { messages: [{ role: "user", content: prompt }], ...fields } : { prompt, ...fields };
  const path = kind === "chat" ? "/v1/chat/completions" : "/v1/completions";
  const response = await request(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, "the server ended the stream too early");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(0, event.error.message);
      yield event;
    }
  }
}

async function request(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const init = { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the server can't be reached");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new ApiError(response.status, told?.error?.message ?? `the server answered ${response.status}`);
}
