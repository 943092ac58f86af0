// Spans page: error spans of whole words, missing information, a corrected answer.
// Marks: "span:FROM-TO" (word numbers), "missing:TYPE:PASSAGE:SENTENCES", "text", "clean", "status".
const TYPES = DATA.types, MISSING = DATA.missing;
let pick = null, anchor = null, single = false, cursor = 0, panel = null; // words selected, first of them, only one, keyboard, open form
const chars = (item) => item.chars || (item.chars = Array.from(item.record["prediction 1"])); // code points, as in Python
const textOf = (item, from, to) => chars(item).slice(item.words[from][0], item.words[to][1]).join("");
const typeIndex = (name) => TYPES.findIndex((type) => type.name === name);
const quoted = (text) => "“" + text + "”";

function toMarks(item, record) {
  const field = record.feedback, table = {}, put = (key, v) => { table[key] = { t: 1, v }; };
  if (!field) return table;
  const starts = new Map(item.words.map((word, i) => [word[0], i])), ends = new Map(item.words.map((word, i) => [word[1], i]));
  field.errors.forEach((error, i) => {
    const from = starts.get(error.start), to = ends.get(error.end), type = error["error type"];
    const span = { from, to, type, earlier: type === "Redundant" ? error.explanation : "", source: type === "Wrong-Grounding" ? JSON.parse(error.explanation) : null };
    if (!fitsMark(item, "span:" + from + "-" + to, span)) throw new Error("feedback.errors[" + i + "] has an unknown type, names no source, or does not hold whole words");
    put("span:" + from + "-" + to, span);
  });
  for (const piece of field["missing-info"]) {
    const source = { passage_id: piece.passage_id, sentence_id: piece.sentence_id };
    put(missingKey(piece["error type"], source), { type: piece["error type"], source });
  }
  put("text", field["corrected-prediction"]);
  put("clean", !field.errors.length && !field["missing-info"].length);
  put("status", "done");
  return table;
}
const missingKey = (type, source) => ["missing", type, source.passage_id, source.sentence_id.join(",")].join(":");
function fitsMark(item, key, v) {
  if (key === "text") return typeof v === "string";
  if (key === "clean") return typeof v === "boolean";
  if (key.startsWith("missing:")) return MISSING.some((type) => type.name === v.type) && fitsSource(item, v.source) && key === missingKey(v.type, v.source);
  const place = [v.from, v.to].every(Number.isInteger) && 0 <= v.from && v.from <= v.to && v.to < item.words.length;
  return place && key === "span:" + v.from + "-" + v.to && typeIndex(v.type) >= 0 && typeof v.earlier === "string" &&
    (v.type !== "Wrong-Grounding" || fitsSource(item, v.source));
}
function fitsSource(item, source) {
  const passage = source && item.record.passages[source.passage_id - 1];
  return Boolean(passage) && Array.isArray(source.sentence_id) && source.sentence_id.length > 0 &&
    source.sentence_id.every((id) => Number.isInteger(id) && id in passage);
}
function view(item, table = marks[item.id]) { // the marks as lists
  const values = (start) => Object.keys(table).filter((key) => key.startsWith(start) && table[key].v).map((key) => ({ key, ...table[key].v }));
  const text = value(table, "text");
  return { spans: values("span:").sort((a, b) => a.from - b.from), missing: values("missing:"), text: text === null ? item.record["prediction 1"] : text, clean: value(table, "clean") };
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
  for (let i = 1; i < mine.spans.length; i++) if (mine.spans[i].from <= mine.spans[i - 1].to) left.push("Labels " + i + " and " + (i + 1) + " overlap: remove one.");
  for (const span of mine.spans) if (span.type === "Redundant" && !span.earlier.trim()) left.push("A repetition does not say what it repeats.");
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
      group = span ? el("mark", { role: "none", class: "k" + typeIndex(span.type), id: "span" + number }, tag(span, number)) : box;
      if (span) box.append(group);
    }
    const word = el("span", { class: "word", role: "option", "data-i": String(i) }, slice(start, end));
    if (span) word.setAttribute("aria-label", word.textContent + ", labelled " + TYPES[typeIndex(span.type)].title);
    group.append(word);
    [last, inside] = [end, span];
  });
  box.append(slice(last));
  paint();
  if (focused) wordAt(cursor).focus({ preventScroll: true });
}
const tag = (span, number) => el("span", { class: "tag k" + typeIndex(span.type), "aria-hidden": "true" }, (number + 1) + " " + TYPES[typeIndex(span.type)].short);
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
  } else if (["Delete", "Backspace"].includes(event.key) && spanAt(here)) removeLabel(spanAt(here).key, "the removal of a label", "picked");
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
  const box = el("div"), select = el("select", { id: name + "-passage" }, el("option", { value: "" }, "choose a passage"),
    item.record.passages.map((passage, i) => el("option", { value: String(i + 1) }, (i + 1) + ": " + passage[0])));
  const show = (checked) => {
    const passage = item.record.passages[Number(select.value) - 1] || [];
    box.replaceChildren(...(passage.length ? [el("fieldset", {}, el("legend", {}, "Sentences that say it (one is enough)"),
      passage.map((text, id) => choice("checkbox", name + "-sentence", id, checked.includes(id), id + (id ? ": " : " (title): ") + text)))] : []));
  };
  select.onchange = () => show([]);
  if (source || item.record.passages.length === 1) {
    select.value = String(source ? source.passage_id : 1);
    show(source ? source.sentence_id : []);
  }
  const read = () => ({ passage_id: Number(select.value), sentence_id: [...box.querySelectorAll("input:checked")].map((input) => Number(input.value)) });
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
function openPanel(words, type) { // a form for a new label on these words, or, given a span, for its change
  if (panel) panel.close();
  const item = current(), old = words.key ? words : { earlier: "" };
  const repeat = repeatPicker(item, words, old.earlier), grounds = sourcePicker(item, "ground", old.source);
  const looked = choice("checkbox", "looked", 1, old.type === "Unverifiable", "I looked through every passage, and none says this.");
  const extra = el("div"), name = () => (node.querySelector("input[name=type]:checked") || { value: "" }).value;
  const show = () => extra.replaceChildren(...{ Redundant: [repeat.node], "Wrong-Grounding": [el("p", {}, "Which sentence does it contradict?"), grounds.node], Unverifiable: [looked] }[name()] || []);
  const add = () => {
    const span = { from: words.from, to: words.to, type: name(), earlier: name() === "Redundant" ? repeat.text() : "", source: name() === "Wrong-Grounding" ? grounds.read() : null };
    const fault = !span.type ? "Choose one of the five types." : span.type === "Redundant" && !span.earlier ? "Choose a sentence, or drag over the repeated words in the answer." :
      span.source && !fitsSource(item, span.source) ? "Choose a passage and at least one of its sentences." :
      span.type === "Unverifiable" && !looked.querySelector("input").checked ? "Look through every passage first, then tick the box." : "";
    if (fault) return say(fault, "error", "wrong");
    panel.close();
    mark(words.key ? "the change of a label" : "a label", { ["span:" + words.from + "-" + words.to]: span, clean: null });
    say((words.key ? "Changed: " : "Labelled as ") + TYPES[typeIndex(span.type)].title + ".", "good", "picked");
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
  const node = el("form", { class: "panel", id: "panel", "aria-label": "Label the selected words" }, el("h3", {}, (words.key ? "Change the label of " : "Label: ") + quoted(textOf(item, words.from, words.to))),
    el("fieldset", {}, el("legend", {}, "What is wrong?"), TYPES.map((kind, i) => choice("radio", "type", kind.name, kind.name === (type || words.type),
      [el("span", { class: "tag k" + i }, kind.short), el("strong", {}, kind.title), ": " + kind.text], show))),
    extra, said("wrong"), el("div", { class: "bar" }, el("button", { class: "main", id: "add" }, words.key ? "Change this label" : "Add this label"), button("Cancel", close, { id: "cancel" })));
  node.addEventListener("submit", (event) => { event.preventDefault(); add(); });
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
function removeLabel(key, what, where) {
  if (busy()) return;
  mark(what, { [key]: null });
  say("Removed. Undo brings it back.", "good", where);
}
const sourceText = (source) => "passage " + source.passage_id + ", sentence " + list(source.sentence_id.map(String));
function drawLabels(mine) {
  $("spans").replaceChildren(...mine.spans.map((span, i) => {
    const lit = (on) => () => document.querySelectorAll("#span" + i).forEach((node) => node.classList.toggle("on", on)), name = TYPES[typeIndex(span.type)].title, which = " label " + (i + 1) + ", " + name;
    const about = span.type === "Wrong-Grounding" ? " (" + sourceText(span.source) + ")" : span.type === "Redundant" ? " (repeats " + quoted(span.earlier) + ")" : "";
    return el("li", { onmouseenter: lit(true), onmouseleave: lit(false), onfocusin: lit(true), onfocusout: lit(false) },
      el("span", {}, tag(span, i), name + ": " + quoted(textOf(current(), span.from, span.to)) + about),
      button("Change", () => { if (!busy()) openPanel(span); }, { "aria-label": "Change" + which }),
      button("Remove", () => removeLabel(span.key, "the removal of a label", "picked"), { "aria-label": "Remove" + which }));
  }));
  $("missing").replaceChildren(...mine.missing.map((piece, i) => {
    const kinds = MISSING.map((type) => el("option", { value: type.name, selected: type.name === piece.type }, type.title)), which = " missing information " + (i + 1);
    const retype = (event) => mark("the change of a label", { [piece.key]: null, [missingKey(event.target.value, piece.source)]: { type: event.target.value, source: piece.source } });
    return el("li", {}, el("select", { "aria-label": "Type of" + which, onchange: retype }, kinds), el("span", {}, sourceText(piece.source)),
      button("Remove", () => removeLabel(piece.key, "the removal of missing information", "missing-said"), { "aria-label": "Remove" + which }));
  }));
}
function missingForm(item) {
  const box = el("div");
  const fill = () => { // anew, with nothing chosen
    const picker = sourcePicker(item, "miss"), add = (event) => {
      event.preventDefault();
      const type = (form.querySelector("input[name=missing]:checked") || {}).value, source = picker.read();
      if (!type || !fitsSource(item, source)) return say("Choose what is missing, a passage, and at least one of its sentences.", "error", "missing-said");
      fill();
      mark("missing information", { [missingKey(type, source)]: { type, source }, clean: null });
      say("Missing information added.", "good", "missing-said");
    };
    const form = el("form", { id: "miss", onsubmit: add }, el("fieldset", {}, el("legend", {}, "What is missing?"),
      MISSING.map((type) => choice("radio", "missing", type.name, false, [el("strong", {}, type.title), ": " + type.text]))), picker.node,
      el("div", { class: "bar" }, el("button", {}, "Add missing information"), button("Cancel", fill)));
    box.replaceChildren(form);
  };
  fill();
  return item.record.passages.length ? el("details", {}, el("summary", {}, "Add missing information"), box) : el("p", { class: "soft" }, "Without passages nothing can be missing.");
}
function busy() { // leaving would drop an open form without a word
  const where = panel ? "wrong" : document.querySelector("details[open] #miss input:checked") ? "missing-said" : "";
  if (!where) return false;
  say("Add this first, or cancel it.", "error", where);
  $(where).scrollIntoView({ block: "center" });
  return true;
}
function draw() {
  const item = current(), original = item.record["prediction 1"];
  pick = anchor = panel = null;
  cursor = 0;
  const correct = (text) => typed("a change of the correction", { text: lines(text) === lines(original) ? null : text, status: "begun" });
  const edit = el("textarea", { id: "corrected", rows: 7, "aria-describedby": "correct-help", oninput: () => correct(edit.value) });
  const words = el("div", { id: "answer", class: "answer words", role: "listbox", "aria-multiselectable": "true", "aria-describedby": "keys", "aria-label": "Words of the answer", onkeydown: wordKeys, onclick: wordClick });
  $("main").replaceChildren(el("div", { class: "columns" }, sources(item), el("div", {},
    el("section", { "aria-labelledby": "answer-heading" }, el("h2", { id: "answer-heading" }, "Answer: mark what is wrong"),
      el("p", { class: "soft", id: "keys" }, "Drag over words, or tap the first and the last one; a tap on a label changes it. Keys: arrows move, Shift and arrows select, Enter or 1 to 5 labels, Delete removes, Escape lets go."),
      words, el("div", { class: "bar near" }, button("Label these words", () => openPanel(pick), { id: "label", class: "main", disabled: true }), button("Clear", unpick, { "aria-label": "Clear the selection" }), said("picked"))),
    el("div", { id: "after" }), el("ul", { class: "labels", id: "spans" }),
    el("h2", {}, "Missing information"), el("ul", { class: "labels", id: "missing" }), missingForm(item), said("missing-said"),
    choice("checkbox", "clean", 1, false, "Nothing is wrong and nothing is missing.", (event) => mark("the tick", { clean: event.target.checked })),
    el("h2", {}, "Corrected answer"),
    el("p", { class: "soft", id: "correct-help" }, "Change as little as possible: take out what is wrong, put in what is missing."),
    el("label", {}, "Corrected answer", edit), el("p", {}, button("Start again from the answer", () => mark("a change of the correction", { text: null }))), finishBar())));
  unpick();
  refresh();
}
function refresh() { // everything but the open forms
  const item = current(), mine = view(item), edit = $("corrected");
  drawWords(item, mine.spans);
  drawLabels(mine);
  document.querySelector("input[name=clean]").checked = Boolean(mine.clean);
  if (lines(edit.value) !== lines(mine.text)) edit.value = mine.text;
  refreshFinish();
}
start();
