// What was begun against what was trained on.

import {address, json} from "./api.js";
import {bars} from "./chart.js";
import {brief, el, facts, number, table} from "./dom.js";

const TITLES = {length: "Length in sampled tokens", latency: "Seconds from first request to last answer", reward: "Reward"};

export async function showSurvivors(main, place, runs, told, signal) {
  const found = await json(address(place.run, "survivors"));
  if (signal.aborted) return;
  const by = found.by, environments = Object.keys(by.environment.begun).sort();
  const share = (counts, name) => { const sum = Object.values(counts).reduce((a, b) => a + b, 0); return sum ? `${number(100 * (counts[name] || 0) / sum, 3)} %` : "-"; };
  main.replaceChildren(el("h2", {}, "Which rollouts are trained on"),
    el("p", {}, "Every rollout that was begun has an end. The distance is the largest difference of the two distributions, between 0 and 1: a run that trains on the fast and the short only has a large one."),
    facts([["begun", number(found.begun)], ["trained", number(found.trained)], ["largest difference of an environment's share", number(by.environment.distance, 3)], ...Object.entries(found.ends).map(([state, count]) => [state.replaceAll("_", " "), number(count)])]),
    el("h2", {}, "Begun and trained"), table("Begun and trained", [["of", one => TITLES[one]], ["mean of begun", one => number(by[one].begun_mean), "n"], ["mean of trained", one => number(by[one].trained_mean), "n"], ["distance", one => number(by[one].distance, 3), "n"]], Object.keys(TITLES)),
    el("p", {class: "legend"}, "In each pair of bars the left one is the share of those begun, the right one of those trained."),
    el("div", {class: "charts"}, ...Object.keys(TITLES).map(name => bars(TITLES[name], by[name].edges, by[name].begun, by[name].trained))),
    el("h2", {}, "Environments"), table("Environments", [["environment", one => brief(one)], ["begun", one => number(by.environment.begun[one]), "n"], ["share", one => share(by.environment.begun, one), "n"], ["trained", one => number(by.environment.trained[one] || 0), "n"], ["share", one => share(by.environment.trained, one), "n"]], environments));
}
