// Fine-grained page: error spans of whole words, missing information, corrected answer.
const TYPES = DATA.types, MISSING = DATA.missing;
let pick = null, anchor = null, panel = null, finish = null;
const chars = (item) => item.chars || (item.chars = Array.from(item.record["prediction 1"])); // code points, as in Python
const textOf = (item, from, to) => chars(item).slice(item.words[from][0], item.words[to][1]).join("");
const typeIndex = (name) => TYPES.findIndex((type) => type.name === name);

function fromRecord(item, record) {
  const fresh = { status: "new", spans: [], missing: [], text: record["prediction 1"], clean: false };
  const given = record.feedback;
  if (!given) return fresh;
  const start = new Map(item.words.map((word, i) => [word[0], i])), end = new Map(item.words.map((word, i) => [word[1], i]));
  fresh.spans = given.errors.map((error, i) => {
    const known = start.has(error.start) && end.has(error.end) && start.get(error.start) <= end.get(error.end);
    if (!known || typeIndex(error["error type"]) < 0) throw new Error("feedback.errors[" + i + "] has an unknown type, or does not hold whole words");
    const span = { from: start.get(error.start), to: end.get(error.end), type: error["error type"], earlier: "", source: null };
    if (span.type === "Redundant") span.earlier = error.explanation;
    if (span.type === "Wrong-Grounding") span.source = JSON.parse(error.explanation);
    return span;
  }).sort((a, b) => a.from - b.from);
  fresh.missing = given["missing-info"].map((piece) => ({ type: piece["error type"], source: { passage_id: piece.passage_id, sentence_id: piece.sentence_id } }));
  fresh.text = given["corrected-prediction"];
  fresh.clean = !fresh.spans.length && !fresh.missing.length;
  fresh.status = "done";
  return fresh;
}
function toRecord(item, mine) {
  const errors = mine.spans.map((span) => ({ "error type": span.type, start: item.words[span.from][0], end: item.words[span.to][1],
    explanation: span.type === "Redundant" ? span.earlier : span.type === "Wrong-Grounding" ? JSON.stringify(span.source) : "" }));
  const missing = mine.missing.map((piece) => ({ "error type": piece.type, ...piece.source }));
  return { ...item.record, feedback: { errors, "missing-info": missing, "corrected-prediction": mine.text } };
}
function problems(item, mine) {
  const labels = mine.spans.length + mine.missing.length, left = [];
  const same = plain(mine.text) === plain(item.record["prediction 1"]);
  for (let i = 1; i < mine.spans.length; i++) if (mine.spans[i].from <= mine.spans[i - 1].to) left.push("Two spans overlap.");
  for (const span of mine.spans) if (span.type === "Wrong-Grounding" && !fits(item, span.source)) left.push("A Wrong-Grounding span names no sentence of a passage.");
  for (const span of mine.spans) if (span.type === "Redundant" && !span.earlier.trim()) left.push("A Redundant span does not say what it repeats.");
  for (const piece of mine.missing) if (!fits(item, piece.source) || !MISSING.some((type) => type.name === piece.type)) left.push("Missing information names no sentence of a passage.");
  if (mine.clean && labels) left.push("You ticked that nothing is wrong, but there are labels.");
  if (!mine.clean && !labels) left.push("Label an error, add missing information, or tick that nothing is wrong.");
  if (mine.clean && !same) left.push("Nothing is wrong, but the corrected answer differs from the answer.");
  if (!mine.clean && labels && same) left.push("There are labels, but the corrected answer is unchanged.");
  return left;
}
function fits(item, source) {
  const passage = source && item.record.passages[source.passage_id - 1];
  return Boolean(passage) && Array.isArray(source.sentence_id) && source.sentence_id.length > 0 &&
    source.sentence_id.every((id) => Number.isInteger(id) && id >= 0 && id < passage.length);
}

// --- the answer, word by word ---

function drawWords(item, mine) {
  const box = el("div", { id: "answer", class: "answer words", role: "listbox", "aria-multiselectable": "true", "aria-describedby": "keys", "aria-label": "Words of the answer" });
  let last = 0, mark = null;
  item.words.forEach(([start, end], i) => {
    const span = mine.spans.find((known) => known.from <= i && i <= known.to), gap = chars(item).slice(last, start).join("");
    if (span && span.from < i) mark.append(gap); else box.append(gap);
    const word = el("span", { class: "word", role: "option", "data-i": String(i), tabindex: i ? "-1" : "0", "aria-selected": "false" }, chars(item).slice(start, end).join(""));
    if (span && span.from === i) {
      const number = mine.spans.indexOf(span);
      mark = el("mark", { role: "none", class: "k" + typeIndex(span.type), id: "span" + number }, el("span", { class: "tag", "aria-hidden": "true" }, (number + 1) + " " + TYPES[typeIndex(span.type)].short));
      box.append(mark);
    }
    if (span) word.setAttribute("aria-label", word.textContent + ", labelled " + TYPES[typeIndex(span.type)].title);
    (span ? mark : box).append(word);
    last = end;
  });
  box.append(chars(item).slice(last).join(""));
  box.addEventListener("keydown", wordKeys);
  box.addEventListener("click", wordClick);
  return box;
}
const wordAt = (i) => document.querySelector('#answer [data-i="' + i + '"]');
function choose(from, to) { // words from..to; shows them, refuses an overlap
  pick = { from: Math.min(from, to), to: Math.max(from, to) };
  document.querySelectorAll("#answer .word").forEach((word) => {
    const i = Number(word.dataset.i), inside = pick.from <= i && i <= pick.to;
    word.classList.toggle("picked", inside);
    word.setAttribute("aria-selected", String(inside));
    word.tabIndex = i === to ? 0 : -1;
  });
  const number = current().spans.findIndex((span) => span.from <= pick.to && pick.from <= span.to);
  say(number < 0 ? "" : "The selection overlaps with label " + (number + 1) + ". Choose other words, or remove that label first.");
  $("label").disabled = number >= 0;
  $("picked").textContent = number < 0 ? "Selected: " + textOf(ITEMS[at], pick.from, pick.to) : "";
}
function unpick() {
  pick = anchor = null;
  $("label").disabled = true;
  $("picked").textContent = "Nothing is selected.";
  document.querySelectorAll("#answer .picked").forEach((word) => { word.classList.remove("picked"); word.setAttribute("aria-selected", "false"); });
}
function wordClick(event) {
  const word = event.target.closest(".word"), selection = window.getSelection();
  if (!word || !selection.isCollapsed) return; // a dragged selection is read in fromSelection
  const i = Number(word.dataset.i);
  if (event.shiftKey && anchor !== null || anchor !== null && pick && pick.from === pick.to && i !== anchor) choose(anchor, i);
  else { anchor = i; choose(i, i); }
}
function fromSelection() { // a dragged selection grows to whole words
  const selection = window.getSelection(), box = $("answer");
  if (!box || !selection.rangeCount || selection.isCollapsed) return;
  const range = selection.getRangeAt(0);
  const touched = [...box.querySelectorAll(".word")].filter((word) => {
    const whole = document.createRange();
    whole.selectNodeContents(word.firstChild);
    return range.compareBoundaryPoints(Range.END_TO_START, whole) < 0 && range.compareBoundaryPoints(Range.START_TO_END, whole) > 0;
  });
  if (!touched.length) return;
  selection.removeAllRanges();
  anchor = Number(touched[0].dataset.i);
  choose(anchor, Number(touched.at(-1).dataset.i));
}
for (const name of ["mouseup", "touchend", "pointerup"]) document.addEventListener(name, () => setTimeout(fromSelection));
function wordKeys(event) {
  const here = Number(event.target.dataset.i), last = ITEMS[at].words.length - 1;
  const steps = { ArrowRight: here + 1, ArrowLeft: here - 1, ArrowDown: inLine(here, 1), ArrowUp: inLine(here, -1), Home: 0, End: last };
  if (event.key in steps) {
    const to = Math.max(0, Math.min(last, steps[event.key]));
    if (event.shiftKey) { if (anchor === null) anchor = here; choose(anchor, to); }
    else { unpick(); document.querySelectorAll("#answer .word").forEach((word) => { word.tabIndex = Number(word.dataset.i) === to ? 0 : -1; }); }
    wordAt(to).focus();
  } else if (event.key === "Enter" || event.key === " " || /^[1-5]$/.test(event.key)) {
    if (!pick) { anchor = here; choose(here, here); }
    if (!$("label").disabled) openPanel(/^[1-5]$/.test(event.key) ? Number(event.key) - 1 : null);
  } else if (event.key === "Escape") unpick();
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

function sourcePicker(item, name) {
  const box = el("div"), select = el("select", { id: name + "-passage" }, el("option", { value: "" }, "choose a passage"),
    item.record.passages.map((passage, i) => el("option", { value: String(i + 1) }, (i + 1) + ": " + passage[0])));
  select.onchange = () => {
    const passage = item.record.passages[Number(select.value) - 1] || [];
    box.replaceChildren(...(passage.length ? [el("fieldset", {}, el("legend", {}, "Sentences that say it"),
      passage.map((text, id) => choice("checkbox", name + "-sentence", id, false, id + (id ? ": " : " (title): ") + text)))] : []));
  };
  const node = el("div", {}, el("p", {}, el("label", {}, "Passage ", select)), box);
  const read = () => ({ passage_id: Number(select.value), sentence_id: [...box.querySelectorAll("input:checked")].map((input) => Number(input.value)) });
  return { node, read };
}
function openPanel(type) {
  const item = ITEMS[at], words = { ...pick }, grounds = sourcePicker(item, "ground");
  const wrong = el("p", { class: "error", role: "alert", id: "wrong" });
  const earlier = el("textarea", { id: "earlier", "aria-describedby": "wrong" });
  const looked = choice("checkbox", "looked", 1, false, "I looked through every passage, and none says this.");
  const extra = el("div"), head = el("h3", { tabindex: "-1" }, "Label: “" + textOf(item, words.from, words.to) + "”");
  const show = () => {
    const name = (panel.querySelector("input[name=type]:checked") || {}).value;
    extra.replaceChildren(...(name === "Redundant" ? [el("label", {}, "Which earlier words of the answer does it repeat? Copy them exactly.", earlier)] :
      name === "Wrong-Grounding" ? [el("p", {}, "Which sentence does it contradict?"), grounds.node] : name === "Unverifiable" ? [looked] : []));
  };
  const add = () => {
    const name = (panel.querySelector("input[name=type]:checked") || {}).value, span = { ...words, type: name, earlier: "", source: null };
    const upto = chars(item).slice(0, item.words[words.from][0]).join("");
    let fault = name ? "" : "Choose one of the five types.";
    if (name === "Redundant") {
      span.earlier = earlier.value.trim();
      if (!span.earlier || !lines(upto).includes(span.earlier)) fault = "The repeated words must stand, letter by letter, before the selected ones.";
    }
    if (name === "Wrong-Grounding" && !fits(item, span.source = grounds.read())) fault = "Choose a passage and at least one of its sentences.";
    if (name === "Unverifiable" && !looked.querySelector("input").checked) fault = "Look through every passage first, then tick the box.";
    wrong.textContent = fault;
    if (fault) return;
    current().spans = [...current().spans, span].sort((a, b) => a.from - b.from);
    current().clean = false;
    changed();
    draw();
    wordAt(words.to).focus();
    say("Labelled as " + TYPES[typeIndex(name)].title + ".", true);
  };
  const close = () => { panel.remove(); panel = null; wordAt(words.to).focus(); };
  if (panel) panel.remove();
  panel = el("form", { class: "panel", id: "panel", "aria-label": "Label the selected words" }, head,
    el("fieldset", {}, el("legend", {}, "What is wrong?"), TYPES.map((kind, i) => choice("radio", "type", kind.name, i === type,
      [el("span", { class: "tag k" + i }, kind.short), el("strong", {}, kind.title), ": " + kind.text], show))),
    extra, wrong, el("div", { class: "bar" }, el("button", { class: "main", id: "add" }, "Add this label"), el("button", { type: "button", onclick: close }, "Cancel")));
  panel.addEventListener("submit", (event) => { event.preventDefault(); add(); });
  panel.addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });
  $("after").replaceChildren(panel);
  show();
  (panel.querySelector("input[name=type]:checked") || panel.querySelector("input[name=type]")).focus();
}
const sourceText = (source) => "passage " + source.passage_id + ", sentence " + list(source.sentence_id.map(String));
function labelList(mine) {
  const drop = (what, i) => () => { mine[what].splice(i, 1); changed(); draw(); $("answer-heading").focus(); say("The label is removed.", true); };
  const spans = mine.spans.map((span, i) => {
    const mark = (on) => () => $("span" + i).classList.toggle("on", on), name = TYPES[typeIndex(span.type)];
    const about = span.source ? " (" + sourceText(span.source) + ")" : span.earlier ? " (repeats “" + span.earlier + "”)" : "";
    return el("li", { onmouseenter: mark(true), onmouseleave: mark(false), onfocusin: mark(true), onfocusout: mark(false) },
      el("span", {}, el("span", { class: "tag k" + typeIndex(span.type) }, (i + 1) + " " + name.short), name.title + ": “" + textOf(ITEMS[at], span.from, span.to) + "”" + about),
      el("button", { type: "button", "aria-label": "Remove label " + (i + 1) + ", " + name.title, onclick: drop("spans", i) }, "Remove"));
  });
  const missing = mine.missing.map((piece, i) => el("li", {}, el("span", {}, MISSING.find((type) => type.name === piece.type).title + ": " + sourceText(piece.source)),
    el("button", { type: "button", "aria-label": "Remove missing information " + (i + 1), onclick: drop("missing", i) }, "Remove")));
  return { spans: el("ul", { class: "labels", id: "spans" }, spans), missing: el("ul", { class: "labels", id: "missing" }, missing) };
}
function missingForm(item, mine) {
  const picker = sourcePicker(item, "miss"), wrong = el("p", { class: "error", role: "alert" });
  const form = el("form", { id: "miss" }, el("fieldset", {}, el("legend", {}, "What is missing?"),
    MISSING.map((type) => choice("radio", "missing", type.name, false, [el("strong", {}, type.title), ": " + type.text]))), picker.node, wrong, el("button", {}, "Add missing information"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const type = (form.querySelector("input[name=missing]:checked") || {}).value, source = picker.read();
    wrong.textContent = type && fits(item, source) ? "" : "Choose what is missing, a passage, and at least one of its sentences.";
    if (wrong.textContent) return;
    mine.missing.push({ type, source });
    mine.clean = false;
    changed();
    draw();
    $("missing-heading").focus();
    say("Missing information added.", true);
  });
  return item.record.passages.length ? el("details", {}, el("summary", {}, "Add missing information"), form) : el("p", { class: "soft" }, "Without passages nothing can be missing.");
}
function draw() {
  const item = ITEMS[at], mine = current(), labels = labelList(mine);
  pick = anchor = panel = null;
  finish = submitBar();
  const edit = el("textarea", { id: "corrected", rows: 7, "aria-describedby": "correct-help" });
  edit.value = mine.text;
  edit.addEventListener("input", () => {
    mine.text = lines(edit.value) === lines(item.record["prediction 1"]) ? item.record["prediction 1"] : edit.value;
    changed();
    finish.refresh();
  });
  const reset = () => { mine.text = edit.value = item.record["prediction 1"]; changed(); finish.refresh(); };
  const clean = (event) => { mine.clean = event.target.checked; changed(); finish.refresh(); };
  const open = el("button", { type: "button", id: "label", class: "main", disabled: true, onclick: () => openPanel(null) }, "Label the selected words");
  $("main").replaceChildren(el("div", { class: "columns" }, sources(item), el("div", {},
    el("h2", { id: "answer-heading", tabindex: "-1" }, "Answer: mark what is wrong"),
    el("p", { class: "soft", id: "keys" }, "Drag over words, or tap the first and the last one. Keys: arrows move, Shift and arrows select, Enter or 1 to 5 labels, Escape lets go."),
    drawWords(item, mine), el("div", { class: "bar" }, open, el("button", { type: "button", onclick: unpick }, "Clear the selection")),
    el("p", { id: "picked", role: "status", class: "soft" }, "Nothing is selected."), el("div", { id: "after" }), labels.spans,
    el("h2", { id: "missing-heading", tabindex: "-1" }, "Missing information"), labels.missing, missingForm(item, mine),
    choice("checkbox", "clean", 1, mine.clean, "Nothing is wrong and nothing is missing.", clean),
    el("h2", {}, "Corrected answer"),
    el("p", { class: "soft", id: "correct-help" }, "Change as little as possible: take out what is wrong, put in what is missing."),
    el("label", {}, "Corrected answer", edit), el("p", {}, el("button", { type: "button", onclick: reset }, "Start again from the answer")), finish.node)));
  progress();
}
start();
