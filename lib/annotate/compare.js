// Comparison page: six pairs of four answers. Places A to D are shown; item.order says which answer stands there.
const PAIRS = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]], PLACES = "ABCD";
let finish = null;
const prediction = (item, place) => item.record["prediction " + (item.order[place] + 1)];

// Preferences are kept as stored (1: first answer of the pair, 2: second, 0: equal); both ways between answers and places.
function turned(item, values, toPlaces) {
  const index = (a, b) => PAIRS.findIndex(([x, y]) => x === Math.min(a, b) && y === Math.max(a, b));
  return PAIRS.map(([a, b]) => {
    const [x, y] = toPlaces ? [item.order[a], item.order[b]] : [item.order.indexOf(a), item.order.indexOf(b)];
    const value = values[index(x, y)];
    return value && x > y ? 3 - value : value;
  });
}
function fromRecord(item, record) {
  const given = record.preference;
  if (!given) return { status: "new", pairs: PAIRS.map(() => null) };
  if (!Array.isArray(given) || given.length !== 6 || !given.every((value) => [0, 1, 2].includes(value))) throw new Error("preference must be six of 0, 1, 2");
  return { status: "done", pairs: turned(item, given, true) };
}
const toRecord = (item, mine) => ({ ...item.record, preference: turned(item, mine.pairs, false) });

function conflicts(pairs) {
  const relation = (a, b) => {
    const value = pairs[PAIRS.findIndex(([x, y]) => x === Math.min(a, b) && y === Math.max(a, b))];
    return value === null ? null : [0, 1, -1][value] * (a < b ? 1 : -1);
  };
  const found = [];
  for (const triple of [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]) {
    const [a, b, c] = triple, known = [relation(a, b), relation(a, c), relation(b, c)];
    if (known.includes(null) || known.filter((value) => value === 0).length > 1) continue;
    const orders = [[a, b, c], [a, c, b], [b, a, c], [b, c, a], [c, a, b], [c, b, a]];
    const broken = ([x, y, z]) => relation(x, y) >= 0 && relation(y, z) >= 0 && relation(x, z) < Math.max(relation(x, y), relation(y, z));
    if (orders.some(broken)) found.push(triple);
  }
  return found;
}
function verdict(a, b, value) {
  return value === 0 ? PLACES[a] + " equals " + PLACES[b] : PLACES[value === 1 ? a : b] + " over " + PLACES[value === 1 ? b : a];
}
function problems(item, mine) {
  const open = PAIRS.filter((pair, i) => mine.pairs[i] === null).map(([a, b]) => PLACES[a] + " and " + PLACES[b]);
  const left = open.length ? ["Not compared yet: " + open.join("; ") + "."] : [];
  for (const triple of conflicts(mine.pairs)) {
    const said = PAIRS.map(([a, b], i) => triple.includes(a) && triple.includes(b) ? verdict(a, b, mine.pairs[i]) : null).filter(Boolean);
    left.push("Answers " + list(triple.map((place) => PLACES[place])) + " contradict each other: " + said.join(", ") + ". Change one of the three.");
  }
  return left;
}
function drawPair(item, mine, [a, b], i) {
  const set = (value) => () => { mine.pairs[i] = value; changed(); finish.refresh(); };
  const option = (value, text) => choice("radio", "pair" + i, value, mine.pairs[i] === value, text, set(value));
  const shown = (place) => el("div", {}, el("strong", {}, "Answer " + PLACES[place]), el("div", { class: "answer" }, prediction(item, place)));
  return el("fieldset", { id: "pair" + i }, el("legend", {}, "Pair " + (i + 1) + " of 6: " + PLACES[a] + " and " + PLACES[b]), el("div", { class: "pair" }, shown(a), shown(b)),
    option(1, "Answer " + PLACES[a] + " is better"), option(0, "They are equally good"), option(2, "Answer " + PLACES[b] + " is better"));
}
function draw() {
  const item = ITEMS[at], mine = current();
  finish = submitBar();
  $("main").replaceChildren(el("div", { class: "columns" }, sources(item), el("div", {}, el("h2", {}, "Which answer is better?"),
    PAIRS.map((pair, i) => drawPair(item, mine, pair, i)), finish.node)));
  progress();
}
start();
