// Which view is shown is in the hash: #rollouts?run=NAME&step=3. Every place of the page has such an address.

import {json, keepToken, Refused} from "./api.js";
import {brief, el} from "./dom.js";
import {showLive} from "./live.js";
import {showGroup, showRollouts, showSequence, showSession} from "./rollouts.js";
import {showSurvivors} from "./survivors.js";

const VIEWS = {live: showLive, rollouts: showRollouts, group: showGroup, sequence: showSequence, session: showSession, survivors: showSurvivors};
const LINKS = [["live", "Live"], ["rollouts", "Rollouts"], ["survivors", "Survivors"]];
const main = document.getElementById("main"), link = document.getElementById("link"), choice = document.getElementById("run");
let shown = new AbortController();

export function hashOf(view, values) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) for (const one of [value].flat()) if (one !== "" && one !== null && one !== undefined) query.append(name, one);
  return `#${view}?${query}`;
}

function placeOf(hash) {
  const [view, rest] = [hash.slice(1).split("?")[0], hash.split("?").slice(1).join("?")], query = new URLSearchParams(rest);
  const place = {view: VIEWS[view] ? view : "live", run: query.get("run"), get: name => query.get(name), all: name => query.getAll(name), values: Object.fromEntries(query)};
  place.go = values => { location.hash = hashOf(place.view, {run: place.run, ...values}); };
  place.to = (other, values) => hashOf(other, {run: place.run, ...values});
  return place;
}

async function show() {
  if (location.hash.startsWith("#token=")) {  // what follows "#" is not sent to the server, nor kept in the address
    const [token, ...rest] = location.hash.slice(7).split("&");
    keepToken(decodeURIComponent(token));
    history.replaceState(null, "", `/${rest.length ? `#${rest.join("&")}` : ""}`);
  }
  shown.abort();
  const own = shown = new AbortController(), place = placeOf(location.hash);
  try {
    const runs = await json("/api/runs");
    if (own.signal.aborted) return;
    link.textContent = "";
    if (!runs.length) { main.replaceChildren(el("p", {}, "There is no run here yet. Reload the page when one has begun.")); return; }
    place.run = place.run ?? runs[0].name;
    choice.replaceChildren(...runs.map(run => el("option", {value: run.name, selected: run.name === place.run, title: brief(run.path)}, brief(run.name))));
    document.getElementById("views").replaceChildren(...LINKS.map(([view, text]) => el("a", {href: place.to(view, {}), "aria-current": view === place.view ? "page" : null}, text)));
    document.title = `${brief(place.run)}: ${place.view} - Atropos-VERL`;
    await VIEWS[place.view](main, place, runs, text => { if (!own.signal.aborted) link.textContent = text; }, own.signal);
  } catch (error) {
    if (own.signal.aborted) return;
    if (error instanceof Refused && error.status === 401) askForToken();
    else if (error instanceof Refused) main.replaceChildren(el("p", {class: "bad", role: "alert"}, brief(error.message)));
    else { link.textContent = "The view does not answer. Trying again."; setTimeout(() => { if (!own.signal.aborted) show(); }, 1000); }
  }
}

function askForToken() {
  const field = el("input", {type: "password", autocomplete: "current-password", required: true, class: "long"});
  const form = el("form", {onsubmit: event => { event.preventDefault(); keepToken(field.value); show(); }}, el("label", {}, "Token of this view", field), el("button", {}, "Show"));
  main.replaceChildren(el("p", {}, "This view asks for its token. It is in the address that the command printed."), form);
  field.focus();
}

document.getElementById("skip").addEventListener("click", event => { event.preventDefault(); main.focus(); });
choice.addEventListener("change", () => { const place = placeOf(location.hash); location.hash = hashOf(LINKS.some(one => one[0] === place.view) ? place.view : "rollouts", {run: choice.value}); });
addEventListener("hashchange", show);
show();
