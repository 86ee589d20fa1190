// Rollouts found by what is known of them; a group side by side; a sequence by turns and by tokens; a session's tree.

import {address, json} from "./api.js";
import {brief, duration, el, facts, number, said, table, visible} from "./dom.js";

const STATES = ["trained", "stale", "quarantined", "filtered", "overlong"];
const FIELDS = [["text", "text", "search", "long"], ["step", "step", "number"], ["environment", "environment", "number"], ["version", "policy version", "number"], ["reward_min", "reward from", "number"], ["reward_max", "reward to", "number"],
  ["length_min", "tokens from", "number"], ["length_max", "tokens to", "number"], ["reason", "reason", "search", "long"], ["session", "session", "search"]];
const NAMES = [...FIELDS.map(field => field[0]), "state"];
const PAGE = 50;

const span = one => one.first_version === null ? "-" : one.first_version === one.last_version ? number(one.first_version) : `${one.first_version} to ${one.last_version}`;
// Batch, group in it, answer in that. Ids are longer than the 32 bits of JavaScript's shifts.
const nameOf = one => [Math.floor(one.group / 65536), one.group % 65536, ...(one.position === undefined ? [] : [one.position])].join(".");
const words = state => String(state).replaceAll("_", " ");

function listed(place, rows) {
  return table("Rollouts", [["rollout", one => el("a", {href: place.to("sequence", {id: one.id})}, nameOf(one))], ["group", one => el("a", {href: place.to("group", {id: one.group}), "aria-label": `compare the group of ${nameOf(one)}`}, "compare")],
    ["step", one => number(one.step), "n"], ["environment", one => number(one.environment), "n"], ["state", one => words(one.state)], ["reward", one => number(one.reward), "n"],
    ["tokens", one => number(one.tokens), "n"], ["trained", one => number(one.trained_tokens), "n"], ["version", span, "n"], ["reason", one => brief(one.reason) || "-", "text"], ["end of the text", one => brief(one.excerpt), "text"]], rows);
}

export async function showRollouts(main, place, runs, told, signal) {
  const values = Object.fromEntries(NAMES.map(name => [name, place.get(name) ?? ""]));
  const query = new URLSearchParams(Object.entries(values).filter(pair => pair[1] !== ""));
  const asked = before => json(address(place.run, `rollouts?${query}&limit=${PAGE}${before ? `&before=${before}` : ""}`));
  const [found, counts] = await Promise.all([asked(), json(address(place.run, "counts"))]);
  if (signal.aborted) return;
  const inputs = FIELDS.map(([name, label, type, kind]) => el("label", {}, label, el("input", {name, type, step: "any", class: kind, value: values[name]})));
  const states = el("select", {name: "state"}, ...["", ...STATES].map(state => el("option", {value: state, selected: state === values.state}, state ? words(state) : "any")));
  const submit = event => { event.preventDefault(); place.go(Object.fromEntries(new FormData(form))); };
  const form = el("form", {role: "search", "aria-label": "Find rollouts", onsubmit: submit}, ...inputs, el("label", {}, "state", states), el("button", {}, "Find"), el("a", {href: place.to("rollouts", {})}, "all"));
  const rows = found.rollouts, box = el("div", {id: "found"}), more = el("button", {type: "button"}, "older rollouts");
  const sums = Object.entries(counts.sequences).map(([state, count]) => `${number(count)} ${words(state)}`).join(", ");
  const draw = () => { box.replaceChildren(rows.length ? listed(place, rows) : el("p", {}, found.has_index ? "No rollout is like that." : "This run has no trace of its rollouts: it has fetched none yet, or is of an older version.")); };
  more.hidden = rows.length < PAGE;
  more.addEventListener("click", async () => { const next = (await asked(rows.at(-1).id)).rollouts; rows.push(...next); more.hidden = next.length < PAGE; draw(); });
  draw();
  main.replaceChildren(el("h2", {}, "Rollouts"), el("p", {class: "dim"}, sums ? `Sequences of this run: ${sums}.` : ""), form, box, more);
}

function about(place, one) {
  return facts([["state", words(one.state)], ["reason", brief(one.reason) || "-"], ["step", number(one.step)], ["environment", number(one.environment)], ["reward", number(one.reward)], ["tokens", `${number(one.tokens)}, ${number(one.trained_tokens)} trained`],
    ["policy version", span(one)], ["time from first request to last answer", duration(one.latency)], ["session", one.session ? el("a", {href: place.to("session", {id: one.session})}, brief(one.session)) : "-"]]);
}

function turnsOf(one) {
  if (!one.turns?.length) return [el("p", {class: "dim"}, "Its text is noted when its step ends.")];
  return one.turns.map(turn => el("div", {class: `turn${turn.trained ? " trained" : ""}`}, el("h3", {}, `${brief(turn.role)}${turn.trained ? ", trained" : ""} `, el("span", {class: "dim"}, `tokens ${turn.start} to ${turn.stop - 1}`)), said(turn.text)));
}

export async function showGroup(main, place, runs, told, signal) {
  const group = await json(address(place.run, `groups/${place.get("id")}`));
  const whole = await Promise.all(group.sequences.map(one => json(address(place.run, `sequences/${one.id}`))));
  if (signal.aborted) return;
  const answers = whole.map(one => el("article", {class: "answer", "aria-label": `answer ${one.position}`}, el("h3", {}, el("a", {href: place.to("sequence", {id: one.id})}, `answer ${one.position}`)),
    facts([["reward", number(one.reward)], ["state", words(one.state)], ["tokens", number(one.tokens)], ["version", span(one)]]), ...turnsOf(one)));
  main.replaceChildren(el("h2", {}, `Group ${nameOf({group: group.id})}: ${group.size} answers`),
    facts([["state", words(group.state)], ["reason", brief(group.reason) || "-"], ["step", number(group.step)], ["environment", number(group.environment)], ["mean reward", number(group.reward)], ["group id", brief(group.hash)]]),
    el("div", {class: "answers", tabindex: 0, role: "region", "aria-label": "Answers side by side"}, ...answers));
}

export async function showSequence(main, place, runs, told, signal) {
  const id = place.get("id"), one = await json(address(place.run, `sequences/${id}`));
  if (signal.aborted) return;
  const tokens = el("div", {}), at = place.get("token");
  const open = el("a", {href: place.to("sequence", {id, token: at === null ? "0" : null})}, at === null ? "Show its tokens" : "Hide its tokens");
  main.replaceChildren(el("h2", {}, `Rollout ${nameOf(one)}`), about(place, one), el("p", {}, el("a", {href: place.to("group", {id: one.group})}, "Compare with its group"), " · ", open), tokens, el("h2", {}, "Turns"), ...turnsOf(one));
  if (at !== null) await showTokens(tokens, place, one, Number(at) || 0, signal);
}

const SHADES = {
  trained: item => item.trained ? ["--c2", 0.25] : null,
  advantage: (item, most) => item.advantage === null ? null : [item.advantage < 0 ? "--c5" : "--c2", 0.35 * Math.abs(item.advantage) / most],
  logprob: (item, most) => item.logprob === null ? null : ["--c4", 0.35 * Math.abs(item.logprob) / most],
  mismatch: (item, most) => item.mismatch === null ? null : ["--c3", 0.35 * Math.abs(item.mismatch) / most],
  version: item => item.version === null ? null : [`--c${item.version % 8}`, 0.25],
};

async function showTokens(box, place, one, at, signal) {
  const size = 1000, first = Math.floor(at / size) * size, {items} = await json(address(place.run, `sequences/${one.id}?tokens=${first}`));
  if (signal.aborted) return;
  const list = el("div", {class: "tokens", role: "listbox", tabindex: 0, "aria-label": "Tokens; the arrow keys choose one"}), details = el("div", {class: "details", role: "status"});
  const spans = items.map((item, number) => {
    const text = visible(item.text).replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t") || "∅", kind = `${item.trained ? "trained" : "masked"}${item.unmatched ? " unmatched" : ""}`;
    return el("span", {role: "option", id: `token-${first + number}`, "aria-selected": "false", class: kind}, text.replace(/^ +$/, blank => "␣".repeat(blank.length)));
  });
  let chosen = -1;
  const choose = next => {
    if (!items.length) return;
    spans[chosen]?.classList.remove("at");
    spans[chosen]?.setAttribute("aria-selected", "false");
    chosen = Math.max(0, Math.min(items.length - 1, next));
    const item = items[chosen], span = spans[chosen];
    span.classList.add("at");
    span.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", span.id);
    span.scrollIntoView({block: "nearest"});
    history.replaceState(null, "", place.to("sequence", {id: one.id, token: first + chosen}));
    details.replaceChildren(facts([["token", `${first + chosen} (id ${item.id})`], ["text", JSON.stringify(visible(item.text))], ["mask", item.trained ? "trained" : "masked"], ["advantage", number(item.advantage)], ["logprob", number(item.logprob)],
      ["mismatch with the trainer", number(item.mismatch)], ["policy version", number(item.version)], ["generated by the policy", item.unmatched ? "unmatched: nobody is known to have generated it" : item.trained ? "yes, or not looked up" : "-"]]));
  };
  const keys = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -size, End: size};
  list.addEventListener("keydown", event => { if (keys[event.key]) { event.preventDefault(); choose(chosen + keys[event.key]); } });
  list.addEventListener("click", event => { const found = spans.indexOf(event.target); if (found >= 0) choose(found); });
  const shade = el("select", {onchange: () => paint()}, ...Object.keys(SHADES).map(name => el("option", {}, name)));
  const paint = () => {
    const most = Math.max(...items.map(item => Math.abs(item[shade.value] ?? 0))) || 1;
    items.forEach((item, number) => {
      const found = SHADES[shade.value](item, most);
      spans[number].style.background = found ? `color-mix(in srgb, var(${found[0]}) ${Math.round(found[1] * 100)}%, transparent)` : "";
    });
  };
  list.append(...spans);
  paint();
  const parts = Array.from({length: Math.ceil(one.tokens / size)}, (_, part) => el("a", {href: place.to("sequence", {id: one.id, token: part * size}), "aria-current": part * size === first ? "true" : null}, `from ${number(part * size)}`));
  box.replaceChildren(el("h2", {}, "Tokens"), el("p", {}, el("label", {}, "shade by ", shade), ...(parts.length > 1 ? [" tokens ", ...parts.flatMap(part => [part, " "])] : [])), list, details);
  if (items.length) choose(at - first); else list.append("Its tokens are noted when its step ends.");
}

export async function showSession(main, place, runs, told, signal) {
  const session = await json(address(place.run, `sessions/${encodeURIComponent(place.get("id"))}`));
  if (signal.aborted) return;
  const children = new Map();
  for (const turn of session.tree || []) children.set(turn.parent ?? null, [...(children.get(turn.parent ?? null) || []), turn]);
  const numbers = new Set((session.tree || []).map(turn => turn.turn));
  const roots = (session.tree || []).filter(turn => !numbers.has(turn.parent));
  const line = turn => `turn ${turn.turn}, row ${turn.lineage}: ${number(turn.prompt_tokens)} tokens of prompt, ${number(turn.completion_tokens)} sampled, version ${[...new Set(turn.versions)].join(" to ") || "-"}, ${brief(turn.finish_reason) || "-"}${turn.received ? "" : ", not received"}`;
  const box = el("ul", {class: "tree"}), stack = roots.map(turn => [turn, box]);
  while (stack.length) {  // no recursion: a session may have thousands of turns, one below the other
    const [turn, into] = stack.shift(), own = children.get(turn.turn) || [], item = el("li", {}, line(turn));
    into.append(item);
    if (own.length > 1) { const inner = el("ul", {class: "tree"}); item.append(inner); stack.unshift(...own.map(child => [child, inner])); }
    else stack.unshift(...own.map(child => [child, into]));
  }
  const known = Object.entries(session).filter(pair => pair[1] !== null && !["tree", "sequences"].includes(pair[0]));
  main.replaceChildren(el("h2", {}, `Session ${brief(session.id)}`), facts(known.map(([name, value]) => [words(name), typeof value === "object" ? said(JSON.stringify(value)) : number(value)])), el("h2", {}, "Tree of turns"), box,
    el("h2", {}, "Sequences that came of it"), session.sequences.length ? listed(place, session.sequences) : el("p", {}, "None."));
}
