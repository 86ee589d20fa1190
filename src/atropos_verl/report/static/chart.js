// Curves and bars, as SVG.

import {brief, el, number, svg, visible} from "./dom.js";

const WIDTH = 420, HEIGHT = 190, LEFT = 52, RIGHT = 8, TOP = 8, BOTTOM = 22, MOST = 500;
const DASHES = ["", "6 3", "2 3", "9 3 2 3"];

// series: [{name, points: [[x, y], …], colour, dash}]; several are told apart by colour and by dashes.
export function curves(title, series, unit = "step") {
  const drawn = series.filter(one => one.points.length).map(one => ({...one, points: thinned(one.points)}));
  const box = el("div", {class: "chart"}, el("h3", {}, title));
  if (!drawn.length) { box.append(el("p", {class: "dim"}, "no value yet")); return box; }
  const all = drawn.flatMap(one => one.points), xs = all.map(point => point[0]), marks = ticks(all.map(point => point[1]));
  const [first, last] = [Math.min(...xs), Math.max(...xs)], [low, high] = [marks[0], marks.at(-1)];
  const x = value => LEFT + (last > first ? (value - first) / (last - first) : 0.5) * (WIDTH - LEFT - RIGHT);
  const y = value => HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM);
  const label = drawn.map(one => `${one.name}: ${number(one.points[0][1])} at ${unit} ${number(one.points[0][0])}, ${number(one.points.at(-1)[1])} at ${unit} ${number(one.points.at(-1)[0])}`);
  const picture = svg("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": visible(`${title}. ${label.join("; ")}`)});
  for (const mark of marks) {
    picture.append(svg("line", {class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(mark), y2: y(mark)}), svg("text", {x: LEFT - 5, y: y(mark) + 4, "text-anchor": "end"}, number(mark)));
  }
  for (const value of new Set([first, last])) {
    picture.append(svg("text", {x: x(value), y: HEIGHT - 5, "text-anchor": value === first && last > first ? "start" : value === last && last > first ? "end" : "middle"}, `${unit} ${number(value)}`));
  }
  for (const one of drawn) {
    picture.append(one.points.length === 1
      ? svg("circle", {class: `f${one.colour}`, cx: x(one.points[0][0]), cy: y(one.points[0][1]), r: 3})
      : svg("polyline", {class: `curve s${one.colour}`, "stroke-dasharray": DASHES[one.dash % 4], points: one.points.map(point => `${x(point[0]).toFixed(1)},${y(point[1]).toFixed(1)}`).join(" ")}));
  }
  box.append(picture, drawn.length > 1 ? legend(drawn) : el("div", {class: "legend"}, `now ${number(drawn[0].points.at(-1)[1])}`));
  return box;
}

function legend(drawn) {
  return el("div", {class: "legend"}, ...drawn.map(one => el("span", {}, svg("svg", {viewBox: "0 0 24 8", "aria-hidden": "true"},
    svg("line", {class: `curve s${one.colour}`, "stroke-dasharray": DASHES[one.dash % 4], x1: 0, x2: 24, y1: 4, y2: 4})), brief(`${one.name} ${number(one.points.at(-1)[1])}`))));
}

// Two counts per bin, each as a share of its own sum.
export function bars(title, edges, begun, trained) {
  const box = el("div", {class: "chart"}, el("h3", {}, title)), sums = [begun, trained].map(values => values.reduce((a, b) => a + b, 0) || 1);
  if (!begun.length) { box.append(el("p", {class: "dim"}, "nothing is known")); return box; }
  const shares = [begun.map(value => value / sums[0]), trained.map(value => value / sums[1])], top = Math.max(...shares.flat()) || 1;
  const step = (WIDTH - LEFT - RIGHT) / begun.length, height = value => value / top * (HEIGHT - TOP - BOTTOM);
  const picture = svg("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}: shares of begun and of trained rollouts in ${begun.length} bins from ${number(edges[0])} to ${number(edges.at(-1))}`});
  shares.forEach((values, kind) => values.forEach((value, at) => picture.append(svg("rect", {class: kind ? "f1" : "f0", x: LEFT + at * step + kind * step * 0.45, width: Math.max(1, step * 0.42), y: HEIGHT - BOTTOM - height(value), height: height(value)}))));
  picture.append(svg("text", {x: LEFT, y: HEIGHT - 5}, number(edges[0])), svg("text", {x: WIDTH - RIGHT, y: HEIGHT - 5, "text-anchor": "end"}, number(edges.at(-1))), svg("text", {x: LEFT - 5, y: TOP + 8, "text-anchor": "end"}, `${Math.round(top * 100)} %`));
  box.append(picture);
  return box;
}

function thinned(points) {
  const size = Math.ceil(points.length / MOST);
  if (size < 2) return points;
  const mean = values => values.reduce((a, b) => a + b, 0) / values.length;
  return Array.from({length: Math.ceil(points.length / size)}, (_, at) => points.slice(at * size, (at + 1) * size))
    .map(part => [mean(part.map(point => point[0])), mean(part.map(point => point[1]))]);
}

// Two to six round values that enclose all of them.
export function ticks(values) {
  let low = Math.min(...values), high = Math.max(...values);
  if (high - low <= Math.max(Math.abs(low), Math.abs(high)) * 1e-12) { const room = Math.abs(low) / 10 || 1; low -= room; high += room; }
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 5, 10].map(unit => unit * power).find(size => size >= rough * 0.999999);
  const begin = Math.floor(low / step + 1e-9), end = Math.ceil(high / step - 1e-9);
  return Array.from({length: end - begin + 1}, (_, at) => Number(((begin + at) * step).toPrecision(12)));
}
