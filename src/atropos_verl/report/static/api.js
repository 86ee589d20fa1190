// Requests to the server of this page, with its token.

let token = sessionStorage.getItem("token") || "";

export function keepToken(text) { token = text; sessionStorage.setItem("token", text); }

export class Refused extends Error {
  constructor(status, text) { super(text); this.status = status; }
}

async function get(path, headers, signal) {
  const answer = await fetch(path, {headers: {...(token && {authorization: `Bearer ${token}`}), ...headers}, signal});
  if (!answer.ok) {
    const found = await answer.json().catch(() => ({}));
    throw new Refused(answer.status, found.detail || `the server answered ${answer.status}`);
  }
  return answer;
}

export async function json(path) { return (await get(path, {})).json(); }

export function address(run, rest) { return `/api/runs/${encodeURIComponent(run)}/${rest}`; }

// Follows a run until `signal` aborts: on(name, content) for each event, told(problem or "") of the connection.
// EventSource cannot send a token, so the stream is read here. A run that has ended is asked again now and then.
export async function follow(run, metrics, on, told, signal) {
  const query = new URLSearchParams(metrics.map(name => ["metric", name]));
  let last = "";
  while (!signal.aborted) {
    let pause = 1000;
    const own = new AbortController(), stop = () => own.abort();
    signal.addEventListener("abort", stop);
    try {
      const answer = await get(address(run, `events?${query}`), last ? {"last-event-id": last} : {}, own.signal);
      told("");
      for await (const [name, content, id] of events(answer.body)) {
        if (id) last = id;
        on(name, JSON.parse(content));
        if (name === "live" && !JSON.parse(content).running) { pause = 5000; own.abort(); break; }
      }
    } catch (error) {
      if (!own.signal.aborted) told(error instanceof Refused ? error.message : "The view does not answer. Trying again.");
    }
    signal.removeEventListener("abort", stop);
    if (!signal.aborted) await new Promise(done => setTimeout(done, pause));
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const fields = Object.fromEntries(part.split("\n").map(line => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]));
      if (fields.data) yield [fields.event, fields.data, fields.id];
    }
  }
}
