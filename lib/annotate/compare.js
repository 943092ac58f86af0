// Comparison page: six pairs of four answers. Places A to D are shown; item.order says which answer stands there.
// Marks: "pair0" to "pair5", as the field stores them (1: first answer of the pair, 2: second, 0: equal); "status".
const PAIRS = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]], PLACES = "ABCD";
const pairIndex = (a, b) => PAIRS.findIndex(([x, y]) => x === Math.min(a, b) && y === Math.max(a, b));
const busy = () => false;

function toMarks(item, record) {
  const field = record.preference;
  if (!field) return {};
  if (!Array.isArray(field) || field.length !== 6) throw new Error("preference must be six of 0, 1, 2");
  const table = Object.fromEntries(field.map((v, i) => ["pair" + i, { t: 1, v }]));
  if (!field.every((v, i) => fitsMark(item, "pair" + i, v))) throw new Error("preference must be six of 0, 1, 2");
  return { ...table, status: { t: 1, v: "done" } };
}
const fitsMark = (item, key, v) => /^pair[0-5]$/.test(key) && [0, 1, 2].includes(v);
const toField = (item, table) => PAIRS.map((pair, i) => value(table, "pair" + i));
const turned = (v, turn) => v && turn ? 3 - v : v;
function placed(item, table) { // the preferences between places, in the order of PAIRS
  return PAIRS.map(([a, b]) => {
    const [x, y] = [item.order[a], item.order[b]];
    return turned(value(table, "pair" + pairIndex(x, y)), x > y);
  });
}

function conflicts(pairs) {
  const relation = (a, b) => {
    const v = pairs[pairIndex(a, b)];
    return v === null ? null : [0, 1, -1][v] * (a < b ? 1 : -1);
  };
  const found = [];
  for (const triple of [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]) {
    const [a, b, c] = triple, known = [relation(a, b), relation(a, c), relation(b, c)];
    if (known.includes(null) || known.filter((v) => v === 0).length > 1) continue;
    const orders = [[a, b, c], [a, c, b], [b, a, c], [b, c, a], [c, a, b], [c, b, a]];
    const broken = ([x, y, z]) => relation(x, y) >= 0 && relation(y, z) >= 0 && relation(x, z) < Math.max(relation(x, y), relation(y, z));
    if (orders.some(broken)) found.push(triple);
  }
  return found;
}
function verdict(a, b, v) {
  return v === 0 ? PLACES[a] + " equals " + PLACES[b] : PLACES[v === 1 ? a : b] + " over " + PLACES[v === 1 ? b : a];
}
function problems(item, table) {
  const pairs = placed(item, table), open = PAIRS.filter((pair, i) => pairs[i] === null).map(([a, b]) => PLACES[a] + " and " + PLACES[b]);
  const left = open.length ? ["Not compared yet: " + open.join("; ") + "."] : [];
  for (const triple of conflicts(pairs)) {
    const said = PAIRS.map(([a, b], i) => triple.includes(a) && triple.includes(b) ? verdict(a, b, pairs[i]) : null).filter(Boolean);
    left.push("Answers " + list(triple.map((place) => PLACES[place])) + " contradict each other: " + said.join(", ") + ". Change one of the three.");
  }
  return left;
}
const advice = (item, table) => toField(item, table).every((v) => v === 0) ? ["All six pairs are called equal. Is there really no difference?"] : [];

function drawPair(item, [a, b], i) {
  const [x, y] = [item.order[a], item.order[b]];
  const set = (v) => () => mark("the comparison of " + PLACES[a] + " and " + PLACES[b], { ["pair" + pairIndex(x, y)]: turned(v, x > y) });
  const option = (v, text) => choice("radio", "pair" + i, v, false, text, set(v));
  return el("fieldset", { id: "pair" + i, class: "pair" }, el("legend", {}, "Pair " + (i + 1) + " of 6: " + PLACES[a] + " and " + PLACES[b]),
    option(1, PLACES[a] + " is better"), option(0, "equally good"), option(2, PLACES[b] + " is better"));
}
function draw() {
  const item = current();
  const answers = [...PLACES].map((place, i) => el("div", {}, el("strong", {}, "Answer " + place),
    el("div", { class: "answer" }, item.record["prediction " + (item.order[i] + 1)])));
  $("main").replaceChildren(el("div", { class: "columns" }, sources(item), el("div", {}, el("h2", {}, "Which answer is better?"),
    el("div", { class: "answers" }, answers), el("div", { class: "pairs" }, PAIRS.map((pair, i) => drawPair(item, pair, i))), finishBar())));
  refresh();
}
function refresh() {
  const pairs = placed(current(), marks[current().id]);
  pairs.forEach((v, i) => { for (const input of $("pair" + i).querySelectorAll("input")) input.checked = input.value === String(v); });
  refreshFinish();
}
start();
