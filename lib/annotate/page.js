"use strict";
// Shared by both pages: state, autosave, navigation, export, import. Texts of the data become text nodes only.
const DATA = JSON.parse(document.getElementById("data").textContent);
const ITEMS = DATA.items, KEY = "annotate:" + DATA.key, $ = (id) => document.getElementById(id);
let state = {}, at = 0, storage = null, before = null;

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
const list = (names) => names.length < 2 ? names.join("") : names.slice(0, -1).join(", ") + " and " + names.at(-1);
const lines = (text) => text.replace(/\r\n?/g, "\n");
const plain = (text) => text.split(/\s+/).filter(Boolean).join(" ");

// --- state and autosave ---

function load() {
  state = Object.fromEntries(ITEMS.map((item) => [item.id, fromRecord(item, item.record)]));
  try {
    storage = window.localStorage;
    const kept = JSON.parse(storage.getItem(KEY) || "null");
    if (kept) {
      for (const item of ITEMS) if (kept.state[item.id]) state[item.id] = kept.state[item.id];
      at = Math.min(kept.at || 0, ITEMS.length - 1);
      $("saved").textContent = "Continued from what this browser had saved.";
    }
  } catch (error) {
    storage = null;
    $("saved").textContent = "This browser does not save here: export before you leave.";
  }
}
function save() {
  if (!storage) return;
  try {
    storage.setItem(KEY, JSON.stringify({ state, at }));
    $("saved").textContent = "Saved in this browser.";
  } catch (error) {
    $("saved").textContent = "Saving failed (" + error.name + "): export now.";
  }
}
window.addEventListener("storage", (event) => {
  if (event.key === KEY) say("This page was changed in another tab. Reload before you go on here.");
});
function changed() {
  const mine = current();
  mine.status = "begun";
  save();
  progress();
}
const current = () => state[ITEMS[at].id];
function say(text, good = false) {
  $("message").className = good ? "good" : "error";
  $("message").textContent = text;
}

// --- progress and navigation ---

const MARKS = { new: "○ new", begun: "… begun", done: "✓ finished" };
function progress() {
  const done = ITEMS.filter((item) => state[item.id].status === "done").length;
  $("counted").textContent = done + " of " + ITEMS.length + " finished";
  $("progress").max = ITEMS.length;
  $("progress").value = done;
  $("chooser").replaceChildren(...ITEMS.map((item, i) => el("option", { value: String(i), selected: i === at },
    (i + 1) + " of " + ITEMS.length + ": " + MARKS[state[item.id].status])));
  $("previous").disabled = at === 0;
  $("next").disabled = at === ITEMS.length - 1;
}
function go(to) {
  at = Math.max(0, Math.min(ITEMS.length - 1, to));
  say("");
  save();
  draw();
  $("main").focus();
  window.scrollTo(0, 0);
}
function submit() {
  const left = problems(ITEMS[at], current());
  if (left.length) {
    say("Not finished yet. " + left.join(" "));
    return;
  }
  current().status = "done";
  const open = ITEMS.findIndex((item, i) => i > at && state[item.id].status !== "done");
  const first = ITEMS.findIndex((item) => state[item.id].status !== "done");
  go(open >= 0 ? open : first >= 0 ? first : at);
  say(first < 0 ? "All records are finished. Export them now." : "Finished. This is the next open record.", true);
}
function submitBar() {
  const box = el("div", { class: "note" }), button = el("button", { type: "button", id: "submit", class: "main", onclick: submit }, "Finish this record");
  const refresh = () => {
    const left = problems(ITEMS[at], current());
    const told = left.length ? left : [current().status === "done" ? "Finished. A change opens this record again." : "Consistent: this record can be finished."];
    button.setAttribute("aria-disabled", String(left.length > 0));
    if (box.textContent !== told.join("")) box.replaceChildren(...told.map((text) => el("p", {}, text))); // read aloud once
  };
  refresh();
  return { refresh, node: el("section", { "aria-label": "Finish" }, el("h2", {}, "Finish"), el("div", { id: "left", role: "status" }, box), el("p", {}, button)) };
}
function sources(item) {
  const record = item.record;
  const passages = record.passages.map(([title, ...sentences], i) => el("details", { open: record.passages.length < 3 },
    el("summary", {}, el("strong", {}, "Passage " + (i + 1) + ": " + title)),
    el("ol", {}, sentences.map((text) => el("li", {}, text)))));
  return el("section", { class: "sources", "aria-label": "Question and sources", tabindex: "0" },
    el("h2", {}, "Question"), el("p", { id: "question" }, record.question),
    passages.length ? el("h3", {}, "Passages (sentence 0 is the title)") : el("p", { class: "soft" }, "There are no passages."), passages,
    record.gold ? el("details", {}, el("summary", {}, "Reference answer"), el("p", {}, record.gold)) : null);
}

// --- export and import ---

function exportAll() {
  const done = ITEMS.filter((item) => state[item.id].status === "done");
  if (!done.length) return say("No record is finished yet, so there is nothing to export.");
  const text = JSON.stringify(done.map((item) => toRecord(item, state[item.id])), null, 1) + "\n";
  $("raw").hidden = false;
  $("rawtext").value = text;
  const link = el("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: "feedback_" + DATA.kind + "_" + DATA.key.slice(0, 8) + ".json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  const open = ITEMS.length - done.length;
  say(done.length + " finished records exported" + (open ? "; " + open + " are not finished and stay here." : "."), true);
}
const sameItem = (item, record) => record && record.question === item.record.question &&
  item.texts.every((name) => record[name] === item.record[name]) && JSON.stringify(record.passages) === JSON.stringify(item.record.passages);
async function importAll(event) {
  const file = event.target.files[0];
  if (!file) return;
  try {
    const records = JSON.parse(await file.text()), found = {};
    if (!Array.isArray(records)) throw new Error("the file must hold a list of records");
    let strange = 0;
    records.forEach((record, i) => {
      const item = ITEMS.find((known) => sameItem(known, record));
      if (!item) { strange += 1; return; }
      let read = null, wrong = [];
      try {
        read = fromRecord(item, record);
        wrong = read.status === "new" ? ["it holds no " + DATA.field + "."] : problems(item, read);
      } catch (error) {
        wrong = [error.message];
      }
      if (wrong.length) throw new Error("record " + (i + 1) + ": " + wrong.join(" "));
      found[item.id] = read;
    });
    if (!Object.keys(found).length) throw new Error("none of its records belongs to this page");
    before = JSON.stringify(state);
    Object.assign(state, found);
    $("undo").hidden = false;
    save();
    draw();
    say(Object.keys(found).length + " records imported" + (strange ? ", " + strange + " of other items left out." : "."), true);
  } catch (error) {
    say("Nothing was imported: " + error.message);
  }
  event.target.value = "";
}
function start() {
  load();
  $("previous").onclick = () => go(at - 1);
  $("next").onclick = () => go(at + 1);
  $("chooser").onchange = (event) => go(Number(event.target.value));
  $("export").onclick = exportAll;
  $("import").onchange = importAll;
  $("undo").onclick = () => { state = JSON.parse(before); $("undo").hidden = true; save(); draw(); say("The import is undone.", true); };
  draw();
}
