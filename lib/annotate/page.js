"use strict";
// Shared by both pages: marks, storage, undo, time, people, navigation, files. Texts of the data become text nodes only.
//
// The work on a record is a table of marks, {key: {t, v}}: v is a value (null: taken back), t the time in ms when it
// was set. Two versions of a table merge mark by mark, the later one stands. So two tabs, or two machines that
// exchange files, end with the same table in whatever order they meet, and no page overwrites another as a whole.
const $ = (id) => document.getElementById(id);
const DATA = JSON.parse($("data").textContent), ITEMS = DATA.items;
const PREFIX = "annotation:" + DATA.key + ":";
const TAB = "seconds:" + Math.random().toString(36).slice(2, 10); // each tab counts its own time; a record's is the sum
const STATES = { new: "○ new", begun: "… begun", done: "✓ finished" };
let who = "", at = 0, storage = null, marks = {}, states = {}, past = [], future = [], lastTyped = 0;
const current = () => ITEMS[at];

function el(tag, options, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && typeof value !== "string") node[name] = value;
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const choice = (type, name, value, checked, text, onchange) =>
  el("label", { class: "choice" }, el("input", { type, name, value: String(value), checked, onchange }), el("span", {}, text));
const button = (text, onclick, options) => el("button", { type: "button", onclick, ...options }, text);
const list = (names) => names.length < 2 ? names.join("") : names.slice(0, -1).join(", ") + " and " + names.at(-1);
const count = (n, noun) => n + " " + noun + (n === 1 ? "" : "s");
const lines = (text) => text.replace(/\r\n?/g, "\n");
const plain = (text) => text.split(/\s+/).filter(Boolean).join(" ");
const said = (id) => el("p", { id, class: "said", role: "status" });
function say(text, kind = "error", where = "message") { // in one place at a time, beside what it is about
  for (const node of document.querySelectorAll(".said")) if (node.id !== where) node.textContent = "";
  $(where).className = "said " + kind;
  $(where).textContent = text;
  if (text && kind !== "soft") $(where).scrollIntoView({ block: "nearest" });
}

// --- marks ---

const wins = (a, b) => !b || a.t > b.t || (a.t === b.t && JSON.stringify(a.v) > JSON.stringify(b.v));
function merge(into, from) { // whether `into` has changed
  const news = Object.entries(from).filter(([key, mark]) => wins(mark, into[key]));
  for (const [key, mark] of news) into[key] = mark;
  return news.length > 0;
}
const value = (table, key) => table[key] ? table[key].v : null;
function set(item, values) { // their former values
  const table = marks[item.id], former = {};
  for (const [key, v] of Object.entries(values)) {
    former[key] = value(table, key);
    table[key] = { t: Math.max(Date.now(), table[key] ? table[key].t + 1 : 0), v };
  }
  save(item);
  return former;
}
function change(what, changes) { // one step for Undo; changes: [[item, values], ...]
  past.push({ what, former: changes.map(([item, values]) => [item, set(item, values)]) });
  future = [];
  lastTyped = 0;
  refresh();
}
const mark = (what, values) => change(what, [[current(), { status: "begun", ...values }]]);
function typed(what, values) { // keystrokes less than a second apart are one step
  const now = Date.now();
  if (now - lastTyped < 1000) {
    set(current(), values);
    refresh();
  } else mark(what, values);
  lastTyped = now;
}
function step(from, to, verb) {
  if (busy()) return;
  const last = from.pop();
  if (!last) return say("There is nothing to " + verb + ".");
  to.push({ what: last.what, former: last.former.map(([item, values]) => [item, set(item, values)]) });
  lastTyped = 0;
  if (last.former.some(([item]) => item === current())) refresh();
  else go(ITEMS.indexOf(last.former[0][0])); // show where it happened
  say((verb === "undo" ? "Undone: " : "Done again: ") + last.what + ".", "good");
}
const undo = () => step(past, future, "undo"), redo = () => step(future, past, "redo");
function startOver(items) {
  const fresh = (item) => {
    const first = toMarks(item, item.record);
    return Object.fromEntries(Object.keys(marks[item.id]).map((key) => [key, value(first, key)]));
  };
  change("starting over", items.map((item) => [item, fresh(item)]));
  draw();
  say((items.length > 1 ? "All records start" : "This record starts") + " over. Undo brings everything back.", "good");
}

// --- storage: one entry for each record and annotator ---

const slot = (item, name = who) => PREFIX + encodeURIComponent(name) + ":" + item.id;
function openStorage() {
  const memory = new Map(); // where the browser keeps nothing: until the page is closed
  try {
    storage = window.localStorage;
    storage.getItem(PREFIX);
  } catch (error) {
    storage = { getItem: (key) => memory.get(key), setItem: (key, text) => memory.set(key, text), removeItem: (key) => memory.delete(key) };
    $("saved").textContent = "This browser does not save here: export before you leave.";
    window.addEventListener("beforeunload", (event) => { if (past.length) event.preventDefault(); });
  }
}
function load() { // the work of `who`; false if there is none
  [past, future] = [[], []];
  return ITEMS.filter((item) => {
    marks[item.id] = toMarks(item, item.record);
    const known = merge(marks[item.id], JSON.parse(storage.getItem(slot(item)) || "{}"));
    assess(item);
    return known;
  }).length > 0;
}
function save(item) {
  const news = merge(marks[item.id], JSON.parse(storage.getItem(slot(item)) || "{}")); // another tab may have written
  if (news) setTimeout(refresh); // its message will bring nothing new any more
  assess(item);
  keep(slot(item), JSON.stringify(marks[item.id]));
}
function keep(key, text) { // in this browser, and tell its other tabs
  try {
    storage.setItem(key, text);
    if (storage.length !== undefined) $("saved").textContent = "Saved in this browser.";
  } catch (error) {
    $("saved").textContent = "Saving failed (" + error.name + "): export now.";
  }
  channel.postMessage([key, text]);
}
// Tabs are told twice: storage events can stay away (Chromium, rarely, gives two tabs opened at once a storage of their own).
const channel = new BroadcastChannel(PREFIX);
channel.onmessage = (event) => hear(...event.data);
window.addEventListener("storage", ({ key, newValue }) => hear(key, newValue));
function hear(key, text) {
  if (!text) return; // an entry removed takes nothing from what is here
  if (key === PREFIX + "who" && !who) return rename(text); // a nameless tab follows the one that got a name
  const item = ITEMS.find((known) => slot(known) === key);
  if (!item) return;
  const theirs = JSON.parse(text), news = merge(marks[item.id], theirs);
  if (merge(theirs, marks[item.id])) save(item); // both wrote at once: what they lack goes back to them
  assess(item);
  if (news) refresh();
}
function rename(name) { // to that annotator's own labels; an open form stays open
  const [old, before] = [who, marks];
  const moves = !old && ITEMS.some((item) => states[item.id] !== "new"); // work done before a name was given is the name's
  who = name;
  marks = {};
  const known = load();
  if (moves) for (const item of ITEMS) {
    merge(marks[item.id], before[item.id]);
    save(item);
    storage.removeItem(slot(item, ""));
  }
  keep(PREFIX + "who", name);
  $("who").value = name;
  refresh();
  const now = moves ? "; the labels made so far are yours." : known ? "; your labels are back." : ", from the start.";
  const then = old ? " The labels of " + old + " stay in this browser under that name." : "";
  say("You annotate as " + (name || "nobody") + now + then, "good");
}

// --- time: while the page is looked at and something moves ---

let moved = Date.now(), ticked = Date.now();
for (const name of ["pointermove", "pointerdown", "keydown", "wheel", "touchmove"])
  document.addEventListener(name, () => { moved = Date.now(); }, { capture: true, passive: true });
function clock() {
  const now = Date.now(), passed = Math.min(now - ticked, 5000) / 1000;
  ticked = now;
  if (document.hidden || !document.hasFocus() || now - moved > 120000) return;
  set(current(), { [TAB]: (value(marks[current().id], TAB) || 0) + passed });
}
setInterval(clock, 5000);
const seconds = (table) => Object.keys(table).filter((key) => key.startsWith("seconds:")).reduce((sum, key) => sum + (table[key].v || 0), 0);

// --- progress and navigation ---

function assess(item) {
  const table = marks[item.id], state = value(table, "status") || "new";
  states[item.id] = state === "done" && problems(item, table).length ? "begun" : state; // merged tables may disagree
  const i = ITEMS.indexOf(item), text = (i + 1) + " of " + ITEMS.length + ": " + STATES[states[item.id]];
  if ($("chooser").options[i].text !== text) $("chooser").options[i].text = text;
}
function progress() {
  const done = ITEMS.filter((item) => states[item.id] === "done").length;
  $("counted").textContent = done + " of " + ITEMS.length + " finished";
  $("progress").max = ITEMS.length;
  $("progress").value = done;
  $("chooser").selectedIndex = at;
  $("previous").disabled = at === 0;
  $("next").disabled = at === ITEMS.length - 1;
  $("undo").disabled = !past.length;
  $("redo").disabled = !future.length;
}
function go(to) {
  clock();
  if (busy()) return progress();
  at = Math.max(0, Math.min(ITEMS.length - 1, to));
  storage.setItem(PREFIX + "at", String(at));
  draw();
  say("");
  $("main").focus({ preventScroll: true });
  if ($("main").getBoundingClientRect().top < 0) $("main").scrollIntoView();
}
function submit() {
  clock();
  if (busy()) return;
  const left = problems(current(), marks[current().id]);
  if (left.length) return say("Not finished yet. " + left.join(" "), "error", "finish-said");
  mark("finishing a record", { status: "done" });
  const open = ITEMS.findIndex((item, i) => i > at && states[item.id] !== "done");
  const first = ITEMS.findIndex((item) => states[item.id] !== "done");
  go(open >= 0 ? open : first >= 0 ? first : at);
  say(first < 0 ? "All records are finished. Export them now." : "Finished. This is the next open record.", "good");
}
function finishBar() {
  return el("section", { "aria-label": "Finish" }, el("h2", {}, "Finish"), el("div", { id: "left", class: "note", role: "status" }),
    el("div", { class: "bar" }, button("Finish this record", submit, { id: "submit", class: "main" }),
      button("Start this record over", () => startOver([current()]), { id: "over" })), said("finish-said"));
}
function refreshFinish() {
  const item = current(), left = problems(item, marks[item.id]);
  const good = states[item.id] === "done" ? "Finished. A change opens this record again." : "Consistent: this record can be finished.";
  const told = left.length ? left : [good, ...advice(item, marks[item.id])];
  $("submit").setAttribute("aria-disabled", String(left.length > 0));
  if ($("left").textContent !== told.join("")) $("left").replaceChildren(...told.map((text) => el("p", {}, text))); // read aloud once
  progress();
}
function sources(item) {
  const record = item.record, wide = window.matchMedia("(min-width: 62rem)").matches; // on a phone the answer comes first
  const passages = record.passages.map(([title, ...sentences], i) => el("details", { open: wide && record.passages.length < 3 },
    el("summary", {}, el("strong", {}, "Passage " + (i + 1) + ": " + title)),
    el("ol", {}, sentences.map((text) => el("li", {}, text)))));
  return el("section", { class: "sources", "aria-label": "Question and sources", tabindex: "0" },
    el("h2", {}, "Question"), el("p", { id: "question" }, record.question),
    passages.length ? el("h3", {}, "Passages (sentence 0 is the title)") : el("p", { class: "soft" }, "There are no passages."), passages,
    record.gold ? el("details", {}, el("summary", {}, "Reference answer"), el("p", {}, record.gold)) : null);
}

// --- files ---

function toRecord(item) { // an unfinished record goes without the field that would be trained on
  const table = marks[item.id], done = states[item.id] === "done", { [DATA.field]: dropped, ...rest } = item.record;
  const about = { annotator: who, seconds: Math.round(seconds(table)), finished: done, marks: table };
  return { ...rest, ...(done ? { [DATA.field]: toField(item, table) } : {}), annotation: { ...rest.annotation, [DATA.field]: about } };
}
function exportAll() {
  clock();
  const begun = ITEMS.filter((item) => states[item.id] !== "new"), done = begun.filter((item) => states[item.id] === "done").length;
  if (!begun.length) return say("No record is begun yet, so there is nothing to export.");
  const text = JSON.stringify(begun.map(toRecord), null, 1) + "\n", name = who.replace(/[^\p{L}\p{N}]+/gu, "-") || "nobody";
  const href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  $("raw").hidden = false;
  $("rawtext").value = text;
  el("a", { href, download: ["feedback", DATA.kind, name, DATA.key.slice(0, 8)].join("_") + ".json" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10000);
  const open = begun.length - done, rest = open ? " " + count(open, "begun record") + " came along, to be finished in this page elsewhere." : "";
  say(count(done, "finished record") + " exported." + rest + (who ? "" : " The file names nobody: type your name above."), "good");
}
const sameItem = (item, record) => record && record.question === item.record.question &&
  item.texts.every((name) => record[name] === item.record[name]) && JSON.stringify(record.passages) === JSON.stringify(item.record.passages);
function readRecord(item, record) { // a record of a file as marks
  const field = record[DATA.field], about = (record.annotation || {})[DATA.field], kept = about && about.marks, table = {};
  if (!field && !kept) throw new Error("it holds no " + DATA.field + ".");
  const read = field ? toMarks(item, record) : {}, wrong = field ? problems(item, read) : [];
  if (wrong.length) throw new Error(wrong.join(" "));
  if (!kept) return read; // made elsewhere: older than any work here
  for (const [key, { t = 0, v = null }] of Object.entries(kept)) {
    const known = key === "status" ? Object.keys(STATES).includes(v) : key.startsWith("seconds:") ? Number.isFinite(v) : v !== null && fitsMark(item, key, v);
    if (!(t > 0) || !(v === null || known)) throw new Error("annotation." + DATA.field + ".marks, " + key + " does not fit the record.");
    table[key] = { t: Math.min(t, Date.now()), v }; // a clock that is ahead must not win for ever
  }
  // A field edited by hand after the export says something else than its marks: then it is as one made elsewhere.
  return !field || JSON.stringify(toField(item, table)) === JSON.stringify(field) ? table : read;
}
async function openFile(event) {
  const [file] = event.target.files;
  if (!file || busy()) return;
  try {
    const records = JSON.parse(await file.text()), names = new Set(), found = [];
    if (!Array.isArray(records)) throw new Error("the file must hold a list of records");
    records.forEach((record, i) => {
      const item = ITEMS.find((known) => sameItem(known, record)), about = item && (record.annotation || {})[DATA.field];
      if (about && about.annotator) names.add(String(about.annotator));
      try {
        if (item) found.push([item, readRecord(item, record)]);
      } catch (error) {
        throw new Error("record " + (i + 1) + ": " + error.message);
      }
    });
    if (!found.length) throw new Error("none of its records belongs to this page");
    if (names.size > 1) throw new Error("it holds the work of " + list([...names]) + "; open one annotator's file at a time");
    addMarks(found, [...names][0] || who, records.length - found.length);
  } catch (error) {
    say("Nothing was imported from " + file.name + ": " + error.message);
  }
  event.target.value = ""; // the same file may be opened again
}
function addMarks(found, name, strange) { // to the annotator's own table, so that two people's labels never mix
  const other = name !== who;
  if (other) rename(name);
  const former = found.map(([item, table]) => [item, Object.fromEntries(Object.keys(table).map((key) => [key, value(marks[item.id], key)]))]);
  for (const [item, table] of found) {
    merge(marks[item.id], table);
    save(item);
  }
  past.push({ what: "opening the file", former });
  future = [];
  draw();
  const rest = (strange ? ", " + strange + " of other items left out." : ".") + (other ? " You annotate as " + name + " now." : "");
  say(count(found.length, "record") + " imported" + rest, "good");
}
function start() {
  $("chooser").append(...ITEMS.map(() => el("option")));
  openStorage();
  who = storage.getItem(PREFIX + "who") || "";
  $("who").value = who;
  if (load()) $("saved").textContent = "Continued from what this browser had saved.";
  at = Math.min(Number(storage.getItem(PREFIX + "at")) || 0, ITEMS.length - 1);
  const acts = { previous: () => go(at - 1), next: () => go(at + 1), undo, redo, export: exportAll, restart: () => startOver(ITEMS) };
  for (const [id, act] of Object.entries(acts)) $(id).addEventListener("click", act);
  $("chooser").onchange = (event) => go(event.target.selectedIndex);
  $("import").onchange = openFile;
  $("who").onchange = () => {
    const name = $("who").value.trim();
    if (busy()) $("who").value = who;
    else if (name !== who) rename(name);
  };
  document.addEventListener("keydown", (event) => {
    const key = event.key.toLowerCase(), writing = event.target.matches("textarea, input:not([type=radio]):not([type=checkbox])");
    if (!(event.ctrlKey || event.metaKey) || writing || !"zy".includes(key)) return; // a text field undoes its own typing
    event.preventDefault();
    if (key === "y" || event.shiftKey) redo(); else undo();
  });
  draw();
}
