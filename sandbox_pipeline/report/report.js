"use strict";
// Every text of an agent reaches the page by textContent only.
const MAX_ROWS = 4000;
const MAX_CELLS = 4000000;
const cache = new Map();
function fork(number) {
  if (!cache.has(number)) {
    const holder = document.getElementById("fork-" + number);
    cache.set(number, holder ? JSON.parse(holder.textContent) : {});
  }
  return cache.get(number);
}
function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}
function files(patch) {
  const found = new Map();
  let name = "", lines = [];
  for (const line of (patch || "").split("\n")) {
    if (line.startsWith("diff --git ")) {
      const match = / b\/(.*?)"?$/.exec(line);
      name = match ? match[1] : line;
      lines = [];
      found.set(name, lines);
    } else if (name && !/^(index |--- |\+\+\+ )/.test(line)) lines.push(line);
  }
  return found;
}
function aligned(left, right) {
  const rows = [];
  const n = left.length, m = right.length;
  if (n * m > MAX_CELLS || !n || !m) {
    for (let i = 0; i < Math.max(n, m); i++) rows.push([left[i], right[i]]);
    return rows;
  }
  const width = m + 1;
  const table = new Uint32Array((n + 1) * width);
  for (let i = n - 1; i >= 0; i--)
    for (let j = m - 1; j >= 0; j--)
      table[i * width + j] = left[i] === right[j] ? table[(i + 1) * width + j + 1] + 1
        : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
  let i = 0, j = 0, onlyLeft = [], onlyRight = [];
  const flush = () => {
    for (let k = 0; k < Math.max(onlyLeft.length, onlyRight.length); k++)
      rows.push([onlyLeft[k], onlyRight[k]]);
    onlyLeft = []; onlyRight = [];
  };
  while (i < n || j < m) {
    if (i < n && j < m && left[i] === right[j]) { flush(); rows.push([left[i++], right[j++]]); }
    else if (j >= m || (i < n && table[(i + 1) * width + j] >= table[i * width + j + 1]))
      onlyLeft.push(left[i++]);
    else onlyRight.push(right[j++]);
  }
  flush();
  return rows;
}
function cell(line, differs) {
  const kind = line === undefined ? "" : line[0] === "+" ? "add" : line[0] === "-" ? "del" : "";
  return make("div", "code " + kind + (differs ? " differs" : ""), line === undefined ? "" : line);
}
function compare() {
  const target = document.getElementById("comparison");
  target.replaceChildren();
  const a = document.getElementById("left").value, b = document.getElementById("right").value;
  const left = files(fork(a).patch), right = files(fork(b).patch);
  const names = [...new Set([...left.keys(), ...right.keys()])].sort();
  if (!names.length) { target.append(make("p", "soft", "Neither fork left a patch.")); return; }
  let shown = 0;
  for (const name of names) {
    const box = make("div", "pair");
    const status = (side) => side.has(name) ? "" : " (untouched)";
    box.append(make("div", "head", "fork " + a + ": " + name + status(left)),
      make("div", "head", "fork " + b + ": " + name + status(right)));
    for (const [one, two] of aligned(left.get(name) || [], right.get(name) || [])) {
      if (++shown > MAX_ROWS) break;
      box.append(cell(one, one !== two), cell(two, one !== two));
    }
    target.append(make("h3", "", name), box);
    if (shown > MAX_ROWS) {
      target.append(make("p", "soft", "The rest is left out; the whole patches are in the artifacts."));
      break;
    }
  }
  for (const number of new Set([a, b]))
    if (fork(number).patch_note) target.append(make("p", "soft", "Fork " + number + ": " + fork(number).patch_note));
}
function read() {
  const number = document.getElementById("reader").value;
  const data = fork(number);
  const transcript = document.getElementById("transcript");
  transcript.replaceChildren();
  if (data.transcript_note) transcript.append(make("p", "soft", data.transcript_note));
  for (const [kind, name, text, bad] of data.transcript || []) {
    const entry = make("div", "entry" + (bad ? " bad" : ""));
    entry.append(make("div", "kind", name ? kind + " " + name : kind), make("div", "code text", text));
    transcript.append(entry);
  }
  if (!(data.transcript || []).length) transcript.append(make("p", "soft", "No transcript."));
  document.getElementById("verification-reason").textContent = data.verification || "not verified";
  document.getElementById("log").textContent = data.log || "(no output)";
}
for (const [names, action] of [[["left", "right"], compare], [["reader"], read]]) {
  for (const name of names) document.getElementById(name).addEventListener("change", action);
  const section = document.getElementById(names[0]).closest("section");
  // Built when it comes into view, so that a thousand forks cost nothing until looked at.
  const watch = new IntersectionObserver((seen) => {
    if (seen.some((item) => item.isIntersecting)) { watch.disconnect(); action(); }
  }, { rootMargin: "400px" });
  watch.observe(section);
}
