// The protocol, as far as the page speaks it: one streamed answer, chunk by chunk.

export class Refused extends Error {}

/** Yields the parsed chunks of a streamed chat completion; throws Refused with the server's own words. */
export async function* chat(body, key, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch("/v1/chat/completions", {
      method: "POST", headers, signal, body: JSON.stringify({ ...body, stream: true }),
    });
  } catch (error) {
    if (signal.aborted) return;
    throw new Refused("The server does not answer. It may have stopped; the page tries to reach it again.");
  }
  if (!response.ok) throw new Refused(await words(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "", done = false;
  try {
    while (true) {
      const part = await reader.read();
      if (part.done) break;
      held += part.value;
      const frames = held.split("\n\n");
      held = frames.pop();
      for (const frame of frames) {
        const data = frame.replace(/^data: /, "");
        if (data === "[DONE]") { done = true; continue; }
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refused(chunk.error.message);
        yield chunk;
      }
    }
  } catch (error) {
    if (signal.aborted) return;
    if (error instanceof Refused) throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!done && !signal.aborted) {
    throw new Refused("The connection broke off before the answer's end. What had come so far is kept.");
  }
}

async function words(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}
