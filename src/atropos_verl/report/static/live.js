// Curves of one or several runs, and what the shown one does now.

import {follow} from "./api.js";
import {curves} from "./chart.js";
import {brief, duration, el, number, said, table} from "./dom.js";

const CHARTS = [
  ["Reward", ["reward/mean"]], ["Held-out score", ["held_out/score"]], ["Loss", ["loss"]],
  ["KL of trainer and sampling policy", ["off_policy/kl_k3", "rollout_corr/k3_kl"]], ["KL to the reference policy", ["actor/kl_loss", "actor/reward_kl_penalty"]],
  ["Staleness in policy versions", ["off_policy/staleness_mean", "off_policy/staleness_max"]],
  ["Share of time the trainer is idle", ["perf/idle_share"]], ["Trained tokens per second", ["perf/trained_tokens_per_second"]],
];
const METRICS = [...CHARTS.flatMap(chart => chart[1]), "env/*/reward", "data/quarantined", "timing/step", "timing/rollout"];

export function showLive(main, place, runs, told, signal) {
  const chosen = [place.run, ...place.all("with")].filter((name, at, all) => runs.some(run => run.name === name) && all.indexOf(name) === at);
  const figures = new Map(chosen.map(name => [name, []])), problems = new Map();
  const charts = el("div", {class: "charts"}), state = el("div", {id: "state"});
  const others = runs.filter(run => run.name !== place.run);
  main.replaceChildren(el("h2", {}, brief(place.run)), state, el("h2", {}, "Curves"), charts);
  if (others.length) {
    const boxes = others.map(run => el("label", {}, el("input", {type: "checkbox", value: run.name, checked: chosen.includes(run.name)}), ` ${brief(run.name)}`));
    const choose = () => place.go({with: boxes.map(box => box.firstChild).filter(box => box.checked).map(box => box.value)});
    main.append(el("details", {open: chosen.length > 1}, el("summary", {}, "Compare with other runs"), el("fieldset", {onchange: choose}, el("legend", {}, "Runs in the same charts"), ...boxes)));
  }
  let waits = false;
  const draw = () => { waits = false; if (!signal.aborted) charts.replaceChildren(...drawn(figures)); };
  draw();
  for (const name of chosen) {
    const on = (kind, content) => {
      if (kind === "live") { if (name === place.run) showState(state, content, figures.get(name)); return; }
      if (content.anew) figures.set(name, []);
      figures.get(name).push(...content.lines);
      if (!waits) { waits = true; setTimeout(draw, 100); }
    };
    const tell = problem => { problems.set(name, problem); told([...problems.values()].find(Boolean) || ""); };
    follow(name, METRICS, on, tell, signal);
  }
}

function drawn(figures) {
  const names = [...figures.keys()], lines = [...figures.values()].flat();
  const environments = [...new Set(lines.flatMap(line => Object.keys(line).filter(key => key.startsWith("env/"))))].sort();
  const wanted = [...CHARTS];
  if (environments.length > 1) wanted.splice(1, 0, ["Reward by environment", environments]);
  return wanted.flatMap(([title, keys]) => {
    const present = keys.filter(key => lines.some(line => typeof line[key] === "number"));
    if (!present.length && title !== "Reward") return [];
    return [curves(title, names.flatMap((name, run) => present.map((key, at) => ({
      name: [names.length > 1 && name, present.length > 1 && key.replace(/^off_policy\/|\/reward$/g, "")].filter(Boolean).join(" ") || title,
      points: points(figures.get(name), key), colour: (present.length > 1 ? at + run * present.length : run) % 8, dash: run + at,
    }))))];
  });
}

function points(lines, key) {
  const step = key.startsWith("held_out/") ? "held_out/step" : "step";
  return lines.filter(line => typeof line[key] === "number").map(line => [line[step] ?? line.step, line[key]]);
}

function showState(box, {state, age, running}, lines) {
  const last = lines.at(-1) || {}, api = state?.api, gateway = state?.gateway, rates = state?.rates || {};
  const step = state ? `${number(state.step)} of ${number(state.steps)}` : number(last.step);
  const gate = !running ? "-" : !gateway ? "does not answer" : gateway.paused ? "paused" : "open";
  const tiles = [["run", running ? "goes on" : "has ended"], ["step", step], ["reward", number(last["reward/mean"])], ["seconds per step", number(last["timing/step"], 3)],
    ["groups in the queue", number(api?.queue_size)], ["open leases", number(api?.open_leases)], ["gate", gate], ["policy version", number(gateway?.policy_version ?? last.policy_version)],
    ["requests in flight", number(gateway?.in_flight)], ["sampled tokens per second", number(rates.tokens_per_second, 3)]];
  const parts = [el("div", {class: "tiles"}, ...tiles.map(([name, value]) => el("div", {class: "tile"}, el("b", {}, value), el("span", {}, name))))];
  if (state?.diagnosis) parts.push(el("h2", {}, "Nothing moves"), said(state.diagnosis, "pre"));
  if (state?.diagnosis) parts.at(-1).classList.add("stall");
  if (state?.ending) parts.push(el("h2", {}, "How it ended"), said(state.ending, "pre"));
  if (state && running) {
    parts.push(el("h2", {}, "Processes"), table("Processes", [["name", one => brief(one.name)], ["state", one => el("span", {class: one.state === "running" ? "good" : "bad"}, brief(one.state))],
      ["up", one => duration(one.seconds), "n"], ["restarts", one => number(one.restarts), "n"], ["detail", one => brief(one.detail), "text"]], state.services || []));
    const rows = Array.isArray(api?.environments) ? api.environments : [], sum = rows.reduce((total, row) => total + (row.groups || 0), 0);
    parts.push(el("h2", {}, "Environments"), table("Environments", [["id", one => number(one.env_id), "n"], ["name", one => brief(one.name ?? one.real_name), "text"], ["state", one => el("span", {class: one.state === "alive" ? "good" : "bad"}, brief(one.state))],
      ["heard", one => typeof one.heard_seconds_ago === "number" ? `${one.heard_seconds_ago} s ago` : "-", "n"], ["groups", one => number(one.groups), "n"], ["share", one => sum ? `${Math.round(100 * one.groups / sum)} %` : "-", "n"],
      ["least share", one => number(one.min_batch_allocation), "n"], ["waiting sequences", one => number(one.waiting_sequences), "n"], ["refused", one => number(one.refused), "n"]], rows));
  }
  if (state?.notes?.length) parts.push(el("details", {}, el("summary", {}, "What the run said last"), said(state.notes.slice(-8).join("\n"), "pre")));
  if (!state) parts.push(el("p", {class: "dim"}, "This run has left no state of its processes."));
  const open = box.querySelector("details")?.open;
  box.replaceChildren(...parts);
  if (open && box.querySelector("details")) box.querySelector("details").open = true;
  box.dataset.step = last.step ?? "";
}
