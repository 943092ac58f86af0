// Spans page: error spans of whole words, missing information, a corrected answer.
// Marks: "span:FROM-TO" (word numbers), "missing:TYPE:PASSAGE:SENTENCES", "text", "clean", "status".
const TYPES = DATA.types, MISSING = DATA.missing;
let pick = null, anchor = null, single = false, cursor = 0; // words selected, the first of them, only one, where the keyboard is
let panel = null, drawn = ""; // the open form; the labels as they stand on the screen
const chars = (item) => item.chars || (item.chars = Array.from(item.record["prediction 1"])); // code points, as in Python
const textOf = (item, from, to) => chars(item).slice(item.words[from][0], item.words[to][1]).join("");
const typeOf = (span) => TYPES.find((type) => type.name === span.type);
const quoted = (text) => "“" + text + "”";

function toMarks(item, record) { // t 1: older than any work on the page
  const field = record.feedback, table = {};
  if (!field) return table;
  const starts = new Map(item.words.map((word, i) => [word[0], i])), ends = new Map(item.words.map((word, i) => [word[1], i]));
  const put = (key, v) => {
    if (!fitsMark(item, key, v)) throw new Error("feedback." + key + " does not fit the record");
    table[key] = { t: 1, v };
  };
  field.errors.forEach((error, i) => {
    const span = { from: starts.get(error.start), to: ends.get(error.end), type: error["error type"], earlier: "", source: null };
    if (span.type === "Redundant") span.earlier = error.explanation;
    if (span.type === "Wrong-Grounding") span.source = JSON.parse(error.explanation);
    if (!fitsMark(item, spanKey(span), span)) throw new Error("feedback.errors[" + i + "] has an unknown type or no source, or does not hold whole words");
    put(spanKey(span), span);
  });
  for (const piece of field["missing-info"]) {
    const v = { type: piece["error type"], source: { passage_id: piece.passage_id, sentence_id: piece.sentence_id } };
    put(missingKey(v), v);
  }
  put("text", field["corrected-prediction"]);
  put("clean", !field.errors.length && !field["missing-info"].length);
  table.status = { t: 1, v: "done" };
  return table;
}
const spanKey = (span) => "span:" + span.from + "-" + span.to;
const missingKey = (piece) => ["missing", piece.type, piece.source.passage_id, String(piece.source.sentence_id)].join(":");
function fitsMark(item, key, v) {
  if (key === "text") return typeof v === "string";
  if (key === "clean") return typeof v === "boolean";
  const source = v.source ? fitsSource(item, v.source) : v.type !== "Wrong-Grounding" && key.startsWith("span:");
  if (key.startsWith("missing:")) return source && key === missingKey(v) && MISSING.some((type) => type.name === v.type);
  const place = [v.from, v.to].every(Number.isInteger) && 0 <= v.from && v.from <= v.to && v.to < item.words.length;
  return source && place && key === spanKey(v) && Boolean(typeOf(v)) && typeof v.earlier === "string";
}
function fitsSource(item, source) {
  const passage = source && item.record.passages[source.passage_id - 1];
  return Boolean(passage) && Array.isArray(source.sentence_id) && source.sentence_id.length > 0 &&
    source.sentence_id.every((id) => Number.isInteger(id) && id in passage);
}
function view(item, table = marks[item.id]) { // the marks as lists
  const lists = (start) => Object.keys(table).filter((key) => key.startsWith(start) && table[key].v).map((key) => ({ ...table[key].v, key }));
  const spans = lists("span:").sort((a, b) => a.from - b.from), text = value(table, "text");
  return { spans, missing: lists("missing:"), text: text === null ? item.record["prediction 1"] : text, clean: value(table, "clean") };
}
function toField(item, table) {
  const mine = view(item, table);
  const errors = mine.spans.map((span) => ({ "error type": span.type, start: item.words[span.from][0], end: item.words[span.to][1],
    explanation: span.type === "Redundant" ? span.earlier : span.type === "Wrong-Grounding" ? JSON.stringify(span.source) : "" }));
  return { errors, "missing-info": mine.missing.map((piece) => ({ "error type": piece.type, ...piece.source })), "corrected-prediction": mine.text };
}
function problems(item, table) {
  const mine = view(item, table), labels = mine.spans.length + mine.missing.length, left = [];
  const same = plain(mine.text) === plain(item.record["prediction 1"]);
  mine.spans.forEach((span, i) => { // two tabs may have labelled the same words
    if (i && span.from <= mine.spans[i - 1].to) left.push("Labels " + i + " and " + (i + 1) + " overlap: remove one.");
    if (span.type === "Redundant" && !span.earlier.trim()) left.push("Label " + (i + 1) + " does not say what it repeats.");
  });
  if (mine.clean && labels) left.push("You ticked that nothing is wrong, but there are labels.");
  if (!mine.clean && !labels) left.push("Label an error, add missing information, or tick that nothing is wrong.");
  if (mine.clean && !same) left.push("Nothing is wrong, but the corrected answer differs from the answer.");
  if (!mine.clean && labels && same) left.push("There are labels, but the corrected answer is unchanged.");
  return left;
}
const advice = () => [];

// --- the answer, word by word ---

function drawWords(item, spans) {
  const box = $("answer"), focused = box.contains(document.activeElement), slice = (a, b) => chars(item).slice(a, b).join("");
  let last = 0, inside = null, group = box;
  box.replaceChildren();
  item.words.forEach(([start, end], i) => {
    const span = spans.find((known) => known.from <= i && i <= known.to) || null, gap = slice(last, start);
    (span === inside ? group : box).append(gap);
    if (span !== inside) {
      const number = spans.indexOf(span);
      group = span ? el("mark", { role: "none", class: colour(span), id: "span" + number }, tag(span, number)) : box;
      if (span) box.append(group);
    }
    const word = el("span", { class: "word", role: "option", "data-i": String(i) }, slice(start, end));
    if (span) word.setAttribute("aria-label", word.textContent + ", labelled " + typeOf(span).title);
    group.append(word);
    [last, inside] = [end, span];
  });
  box.append(slice(last));
  paint();
  if (focused) wordAt(cursor).focus({ preventScroll: true });
}
const colour = (span) => "k" + TYPES.indexOf(typeOf(span));
const tag = (span, number) => el("span", { class: "tag " + colour(span), "aria-hidden": "true" }, (number + 1) + " " + typeOf(span).short);
const wordAt = (i) => document.querySelector('#answer [data-i="' + i + '"]');
const spanAt = (i) => view(current()).spans.find((span) => span.from <= i && i <= span.to);
function paint() { // what is selected, and what the open form names as repeated
  const within = (range, i) => Boolean(range) && range.from <= i && i <= range.to;
  for (const word of document.querySelectorAll("#answer .word")) {
    const i = Number(word.dataset.i);
    word.classList.toggle("picked", within(pick, i));
    word.classList.toggle("repeated", Boolean(panel) && within(panel.repeated(), i));
    word.setAttribute("aria-selected", String(within(pick, i)));
    word.tabIndex = i === cursor ? 0 : -1;
  }
}
function select(a, b) { // words a to b in either order: for a new label, or for the open form
  const range = { from: Math.min(a, b), to: Math.max(a, b) };
  [cursor, single] = [b, a === b];
  if (panel) return panel.take(range);
  const spans = view(current()).spans, number = spans.findIndex((span) => span.from <= range.to && range.from <= span.to);
  pick = range;
  paint();
  $("label").disabled = number >= 0;
  if (number < 0) say("Selected: " + textOf(current(), range.from, range.to), "soft", "picked");
  else say("The selection overlaps with label " + (number + 1) + ". Choose other words, or change or remove that label.", "error", "picked");
}
function unpick() {
  pick = anchor = null;
  $("label").disabled = true;
  paint();
  say("Nothing is selected.", "soft", "picked");
}
function wordClick(event) {
  const word = event.target.closest(".word");
  if (!word || !window.getSelection().isCollapsed) return; // a dragged selection is read in fromSelection
  const i = Number(word.dataset.i), second = anchor !== null && anchor !== i && (event.shiftKey || single);
  if (!panel && !second && spanAt(i)) return openPanel(spanAt(i));
  if (!second) anchor = i;
  select(anchor, i);
}
function fromSelection() { // a dragged selection grows to whole words
  const selection = window.getSelection(), box = $("answer");
  if (!box || !selection.rangeCount || selection.isCollapsed) return;
  const range = selection.getRangeAt(0), touched = [...box.querySelectorAll(".word")].filter((word) => {
    const whole = document.createRange();
    whole.selectNodeContents(word.firstChild);
    return range.compareBoundaryPoints(Range.END_TO_START, whole) < 0 && range.compareBoundaryPoints(Range.START_TO_END, whole) > 0;
  }).map((word) => Number(word.dataset.i));
  if (!touched.length) return;
  selection.removeAllRanges();
  anchor = touched[0];
  select(anchor, touched.at(-1));
}
for (const name of ["mouseup", "touchend", "pointerup"]) document.addEventListener(name, () => setTimeout(fromSelection));
document.addEventListener("copy", (event) => { // the browser's own selection is gone: copy what is selected here
  if (!pick || !window.getSelection().isCollapsed || event.target.matches("textarea, input")) return;
  event.clipboardData.setData("text/plain", textOf(current(), pick.from, pick.to));
  event.preventDefault();
});
function wordKeys(event) {
  const here = Number(event.target.dataset.i), last = current().words.length - 1, digit = /^[1-5]$/.test(event.key);
  const steps = { ArrowRight: here + 1, ArrowLeft: here - 1, ArrowDown: inLine(here, 1), ArrowUp: inLine(here, -1), Home: 0, End: last };
  if (event.key in steps) {
    cursor = Math.max(0, Math.min(last, steps[event.key]));
    if (!event.shiftKey) unpick();
    else {
      if (anchor === null) anchor = here;
      select(anchor, cursor);
    }
    wordAt(cursor).focus();
  } else if (event.key === "Enter" || event.key === " " || digit) {
    const label = pick ? null : spanAt(here), type = digit ? TYPES[Number(event.key) - 1].name : "";
    if (!label && !pick) select(anchor = here, here);
    if (label && !panel) openPanel(label, type);
    else if (!$("label").disabled) openPanel(pick, type);
  } else if (["Delete", "Backspace"].includes(event.key) && spanAt(here)) removeMark(spanAt(here).key, "picked");
  else if (event.key === "Escape") unpick();
  else return;
  event.preventDefault();
}
function inLine(here, way) { // the nearest word in the next visual line
  const start = wordAt(here).getBoundingClientRect();
  let best = here, distance = Infinity, line = null;
  for (let i = here + way; wordAt(i); i += way) {
    const box = wordAt(i).getBoundingClientRect();
    if (Math.abs(box.top - start.top) < start.height / 2) continue;
    if (line !== null && Math.abs(box.top - line) > start.height / 2) break;
    line = box.top;
    if (Math.abs(box.left - start.left) < distance) { distance = Math.abs(box.left - start.left); best = i; }
  }
  return best;
}

// --- forms ---

function sourcePicker(item, name, source) { // a passage and some of its sentences
  const passages = item.record.passages, box = el("div");
  const select = el("select", { id: name + "-passage", onchange: () => show([]) }, el("option", { value: "" }, "choose a passage"),
    passages.map((passage, i) => el("option", { value: String(i + 1) }, (i + 1) + ": " + passage[0])));
  const show = (checked) => {
    const passage = passages[Number(select.value) - 1];
    const options = passage && passage.map((text, id) =>
      choice("checkbox", name + "-sentence", id, checked.includes(id), id + (id ? ": " : " (title): ") + text));
    box.replaceChildren(...(passage ? [el("fieldset", {}, el("legend", {}, "Sentences that say it (one is enough)"), options)] : []));
  };
  if (source || passages.length === 1) select.value = String(source ? source.passage_id : 1);
  show(source ? source.sentence_id : []);
  const checked = () => [...box.querySelectorAll("input:checked")].map((input) => Number(input.value));
  const read = () => ({ passage_id: Number(select.value), sentence_id: checked() });
  return { node: el("div", {}, el("p", {}, el("label", {}, "Passage ", select)), box), read };
}
function repeatPicker(item, words, before) { // the earlier words that a span repeats: a listed sentence, or words of the answer
  let text = before, range = null;
  const echo = el("p", { id: "earlier", class: "soft", role: "status" }, text ? "It repeats: " + quoted(text) : "");
  const set = (chosen, listed) => {
    range = chosen;
    text = textOf(item, chosen.from, chosen.to);
    echo.textContent = listed ? "" : "It repeats: " + quoted(text);
    paint();
  };
  const take = (chosen) => { // words selected in the answer; says what is wrong with them
    if (chosen.to >= words.from) return "The repeated words must stand before the labelled ones.";
    for (const input of node.querySelectorAll("input")) input.checked = false;
    set(chosen, false);
    return "";
  };
  const earlier = item.sentences.filter(([from]) => from < words.from).map(([from, to]) => ({ from, to: Math.min(to, words.from - 1) }));
  const options = earlier.map((sentence) =>
    choice("radio", "sentence", sentence.from, false, textOf(item, sentence.from, sentence.to), () => set(sentence, true)));
  const hint = options.length ? "Or drag over the repeated words in the answer above." : "No words stand before these, so they repeat nothing.";
  const node = el("fieldset", {}, el("legend", {}, "What does it repeat?"), options, el("p", { class: "soft" }, hint), echo);
  return { node, take, text: () => text, range: () => range };
}
function extras(item, words, repeat) { // what a type asks for besides: its form, the fields of the span, what is wrong with them
  const grounds = sourcePicker(item, "ground", words.source);
  const looked = choice("checkbox", "looked", 1, words.type === "Unverifiable", "I looked through every passage, and none says this.");
  return {
    Redundant: { node: repeat.node, read: () => ({ earlier: repeat.text() }),
      fault: () => repeat.text() ? "" : "Choose a sentence, or drag over the repeated words in the answer." },
    "Wrong-Grounding": { node: el("div", {}, el("p", {}, "Which sentence does it contradict?"), grounds.node), read: () => ({ source: grounds.read() }),
      fault: () => fitsSource(item, grounds.read()) ? "" : "Choose a passage and at least one of its sentences." },
    Unverifiable: { node: looked, read: () => ({}),
      fault: () => looked.querySelector("input").checked ? "" : "Look through every passage first, then tick the box." },
    "": { node: "", read: () => ({}), fault: () => "Choose one of the five types." },
  };
}
function openPanel(words, type) { // a form for a new label on these words or, where they are a span, for its change
  if (panel) panel.close();
  const item = current(), text = quoted(textOf(item, words.from, words.to)), repeat = repeatPicker(item, words, words.earlier);
  const asked = extras(item, words, repeat), nothing = { node: "", read: () => ({}), fault: () => "" }, extra = el("div");
  const name = () => (node.querySelector("input[name=type]:checked") || { value: "" }).value, more = () => asked[name()] || nothing;
  const add = (event) => {
    event.preventDefault();
    const span = { from: words.from, to: words.to, type: name(), earlier: "", source: null, ...more().read() }, fault = more().fault();
    if (fault) return say(fault, "error", "wrong");
    panel.close();
    mark(words.key ? "the change of a label" : "a label", { [spanKey(span)]: span, clean: null });
    say((words.key ? "Changed: " : "Labelled as ") + typeOf(span).title + ".", "good", "picked");
  };
  const close = () => {
    node.remove();
    panel = null;
    unpick();
    wordAt(words.to).focus();
  };
  const take = (range) => {
    const fault = name() === "Redundant" ? repeat.take(range) : "Add this label or cancel it before you select other words.";
    say(fault || "It repeats: " + quoted(repeat.text()), fault ? "error" : "soft", "picked");
  };
  const show = () => extra.replaceChildren(more().node);
  const types = TYPES.map((kind, i) => choice("radio", "type", kind.name, kind.name === (type || words.type),
    [el("span", { class: "tag k" + i }, kind.short), el("strong", {}, kind.title), ": " + kind.text], show));
  const node = el("form", { class: "panel", id: "panel", "aria-label": "Label the selected words", onsubmit: add },
    el("h3", {}, (words.key ? "Change the label of " : "Label: ") + text), el("fieldset", {}, el("legend", {}, "What is wrong?"), types), extra, said("wrong"),
    el("div", { class: "bar" }, el("button", { class: "main", id: "add" }, words.key ? "Change this label" : "Add this label"), button("Cancel", close, { id: "cancel" })));
  node.addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });
  panel = { take, close, repeated: () => name() === "Redundant" ? repeat.range() : null };
  pick = { from: words.from, to: words.to };
  anchor = null;
  $("label").disabled = true;
  $("after").replaceChildren(node);
  show();
  paint();
  (node.querySelector("input[name=type]:checked") || node.querySelector("input[name=type]")).focus();
}
function removeMark(key, where) {
  if (busy()) return;
  mark("the removal of a label", { [key]: null });
  say("Removed. Undo brings it back.", "good", where);
}
const sourceText = (source) => "passage " + source.passage_id + ", sentence " + list(source.sentence_id.map(String));
function spanRow(span, i) {
  const lit = (on) => () => document.querySelectorAll("#span" + i).forEach((node) => node.classList.toggle("on", on));
  const about = { "Wrong-Grounding": () => " (" + sourceText(span.source) + ")", Redundant: () => " (repeats " + quoted(span.earlier) + ")" }[span.type];
  const title = typeOf(span).title, which = " label " + (i + 1) + ", " + title;
  return el("li", { onmouseenter: lit(true), onmouseleave: lit(false), onfocusin: lit(true), onfocusout: lit(false) },
    el("span", {}, tag(span, i), title + ": " + quoted(textOf(current(), span.from, span.to)) + (about ? about() : "")),
    button("Change", () => { if (!busy()) openPanel(span); }, { "aria-label": "Change" + which }),
    button("Remove", () => removeMark(span.key, "picked"), { "aria-label": "Remove" + which }));
}
function missingRow(piece, i) {
  const which = " missing information " + (i + 1), options = MISSING.map((type) => el("option", { value: type.name, selected: type.name === piece.type }, type.title));
  const retype = (event) => {
    const changed = { type: event.target.value, source: piece.source };
    mark("the change of a label", { [piece.key]: null, [missingKey(changed)]: changed });
  };
  return el("li", {}, el("select", { "aria-label": "Type of" + which, onchange: retype }, options), el("span", {}, sourceText(piece.source)),
    button("Remove", () => removeMark(piece.key, "missing-said"), { "aria-label": "Remove" + which }));
}
function missingForm(item) {
  if (!item.record.passages.length) return el("p", { class: "soft" }, "Without passages nothing can be missing.");
  const box = el("div");
  const fill = () => { // anew, with nothing chosen
    const picker = sourcePicker(item, "miss");
    const types = MISSING.map((type) => choice("radio", "missing", type.name, false, [el("strong", {}, type.title), ": " + type.text]));
    const add = (event) => {
      event.preventDefault();
      const piece = { type: (form.querySelector("input[name=missing]:checked") || {}).value, source: picker.read() };
      if (!piece.type || !fitsSource(item, piece.source)) return say("Choose what is missing, a passage, and at least one of its sentences.", "error", "missing-said");
      fill();
      mark("missing information", { [missingKey(piece)]: piece, clean: null });
      say("Missing information added.", "good", "missing-said");
    };
    const form = el("form", { id: "miss", onsubmit: add }, el("fieldset", {}, el("legend", {}, "What is missing?"), types), picker.node,
      el("div", { class: "bar" }, el("button", {}, "Add missing information"), button("Cancel", fill)));
    box.replaceChildren(form);
  };
  fill();
  return el("details", {}, el("summary", {}, "Add missing information"), box);
}
function busy() { // leaving would drop an open form without a word
  const where = panel ? "wrong" : document.querySelector("details[open] #miss input:checked") ? "missing-said" : "";
  if (where) say("Add this first, or cancel it.", "error", where);
  return Boolean(where);
}

// --- the record on the screen ---

const KEYS = "Drag over words, or tap the first and the last one; a tap on a label changes it. " +
  "Keys: arrows move, Shift and arrows select, Enter or 1 to 5 labels, Delete removes, Escape lets go.";
function answerPart() {
  const words = el("div", { id: "answer", class: "answer words", role: "listbox", "aria-multiselectable": "true", "aria-describedby": "keys",
    "aria-label": "Words of the answer", onkeydown: wordKeys, onclick: wordClick });
  const bar = el("div", { class: "bar near" }, button("Label these words", () => openPanel(pick), { id: "label", class: "main", disabled: true }),
    button("Clear", unpick, { "aria-label": "Clear the selection" }), said("picked"));
  return [el("section", { "aria-label": "Answer" }, el("h2", {}, "Answer: mark what is wrong"), el("p", { class: "soft", id: "keys" }, KEYS), words, bar),
    el("div", { id: "after" }), el("ul", { class: "labels", id: "spans" })];
}
function correctionPart(original) {
  const correct = (event) => {
    const text = lines(event.target.value);
    typed("a change of the correction", { text: text === lines(original) ? null : event.target.value, status: "begun" });
  };
  const reset = () => mark("a change of the correction", { text: null });
  return [el("h2", {}, "Corrected answer"),
    el("p", { class: "soft", id: "correct-help" }, "Change as little as possible: take out what is wrong, put in what is missing."),
    el("label", {}, "Corrected answer", el("textarea", { id: "corrected", rows: 7, "aria-describedby": "correct-help", oninput: correct })),
    el("p", {}, button("Start again from the answer", reset))];
}
function draw() {
  const item = current(), tick = (event) => mark("the tick", { clean: event.target.checked });
  pick = anchor = panel = null;
  cursor = 0;
  drawn = "";
  $("main").replaceChildren(el("div", { class: "columns" }, sources(item), el("div", {}, answerPart(),
    el("h2", {}, "Missing information"), el("ul", { class: "labels", id: "missing" }), missingForm(item), said("missing-said"),
    choice("checkbox", "clean", 1, false, "Nothing is wrong and nothing is missing.", tick),
    correctionPart(item.record["prediction 1"]), finishBar())));
  unpick();
  refresh();
}
function refresh() { // everything but the open forms; words are left alone where nothing has changed: someone may be dragging
  const item = current(), mine = view(item), edit = $("corrected"), labels = JSON.stringify([mine.spans, mine.missing]);
  if (labels !== drawn) {
    drawWords(item, mine.spans);
    $("spans").replaceChildren(...mine.spans.map(spanRow));
    $("missing").replaceChildren(...mine.missing.map(missingRow));
  }
  drawn = labels;
  document.querySelector("input[name=clean]").checked = Boolean(mine.clean);
  if (lines(edit.value) !== lines(mine.text)) edit.value = mine.text;
  refreshFinish();
}
start();
