// Elements and texts. Everything a run holds reaches the page through here, as text: no markup is ever parsed.

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter(child => child !== null && child !== undefined));
  return made;
}

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Control characters and marks that turn text around are shown by number, not obeyed.
export function visible(text) {
  return String(text ?? "").replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]/gu, mark => `<U+${mark.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}>`);
}

// For a cell or a name: its beginning.
export function brief(text, most = 200) {
  const short = String(text ?? "");
  return visible(short.length > most ? `${short.slice(0, most)} …` : short);
}

export function number(value, digits = 4) {
  if (value === null || value === undefined || value === "") return "-";
  if (typeof value !== "number") return brief(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "-";
  if (seconds < 60) return `${Math.round(seconds * 10) / 10} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60 ? `${minutes} min ${Math.round(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// columns: [title, cell, class]; cell(row) gives text or an element.
export function table(label, columns, rows) {
  const head = el("tr", {}, ...columns.map(([title, , kind]) => el("th", {scope: "col", class: kind}, title)));
  const body = rows.map(row => el("tr", {}, ...columns.map(([, cell, kind]) => el("td", {class: kind}, cell(row) ?? "-"))));
  return el("div", {class: "wide", tabindex: 0, role: "region", "aria-label": label}, el("table", {}, el("thead", {}, head), el("tbody", {}, ...body)));
}

const LONG = 4000;

// A text of any length; of a long one the beginning, and a button for all of it.
export function said(text, tag = "div") {
  const whole = visible(text), box = el(tag, {class: "said"}, whole.slice(0, LONG));
  if (whole.length > LONG) {
    const more = el("button", {type: "button", onclick: () => { box.textContent = whole; }}, `show all ${number(whole.length)} characters`);
    box.append(" … ", more);
  }
  return box;
}

export function facts(pairs) {
  return el("dl", {}, ...pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value ?? "-"))));
}
