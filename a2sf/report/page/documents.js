// Documents: one document's prompt and answers under two systems.
const PAGE = 20;
let shownDocuments = PAGE;
const DIFFERENCES = {
  differ: ["the answers differ", (a, b) => a.value !== b.value || a.prediction !== b.prediction || a.text !== b.text],
  a: ["A scores higher", (a, b) => a.value > b.value], b: ["B scores higher", (a, b) => a.value < b.value], all: ["all documents", () => true],
};

function systemName(s) {
  return s.label + (s.factor === DASH ? "" : `, factor ${s.factor}`) + (s.full ? "" : `, budget ${s.budget}`);
}

function buildDocumentChoices() {
  const before = $("doc-task").value;
  const entries = browse.map((e, i) => [e, i]).filter(([e]) => passes("model", e.model) && passes("shots", e.shots) && passes("task", e.task));
  $("doc-task").replaceChildren(...entries.map(([e, i]) => make("option", { value: i, textContent: `${e.task} (${e.model}, ${e.shots}-shot)` })));
  if (entries.some(([, i]) => String(i) === before)) $("doc-task").value = before;
  buildSystemChoices();
}

function buildSystemChoices() {
  const entry = browse[$("doc-task").value];
  for (const id of ["doc-a", "doc-b"]) {
    const before = $(id).value;
    const numbers = Object.keys(entry?.answers ?? {}).filter(n => systemPasses(data.systems[n]));
    $(id).replaceChildren(...numbers.map(n => make("option", { value: n, textContent: systemName(data.systems[n]) })));
    const pruned = numbers.filter(n => !data.systems[n].full), [first] = data.pair ? data.pair.split(` ${MINUS} `) : [];
    const a = pruned.find(n => Object.keys(data.systems[n].difference).length) ?? pruned.find(n => data.systems[n].policy === first) ?? pruned.at(-1) ?? numbers[0];
    const b = data.pair && numbers.find(n => data.systems[n].label === data.pair.split(` ${MINUS} `)[1] && data.systems[n].budget === data.systems[a]?.budget);
    const usual = id === "doc-a" ? a : b ?? numbers.find(n => data.systems[n].full) ?? numbers[0];
    $(id).value = numbers.includes(before) ? before : usual ?? "";
  }
  shownDocuments = PAGE;
  listDocuments();
}

/** How far the gold answer's margin differs between two systems, in nats; documents are listed by it. */
function marginShift(document, a, b) {
  const margin = x => document.gold < 0 || x.logs.length < 2 ? 0 : x.logs[document.gold] - Math.max(...x.logs.filter((_, i) => i !== document.gold));
  return Math.abs(margin(a) - margin(b));
}

function listDocuments() {
  const entry = browse[$("doc-task").value], a = $("doc-a").value, b = $("doc-b").value, list = $("doc-list");
  list.replaceChildren();
  $("doc-more").hidden = true;
  if (!entry || !a || !b) { $("doc-count").textContent = "No per-document answers are stored for this choice."; return; }
  const matches = DIFFERENCES[$("doc-show").value][1];
  const rows = entry.documents.map((d, i) => ({ d, a: entry.answers[a][i], b: entry.answers[b][i] }))
    .filter(r => r.a && r.b && matches(r.a, r.b)).map(r => ({ ...r, size: marginShift(r.d, r.a, r.b) })).sort((x, y) => y.size - x.size);
  const left = entry.total > entry.documents.length ? ` The page holds ${entry.documents.length} of ${entry.total} documents: those on which systems differ most.` : "";
  $("doc-count").textContent = `${rows.length} document${rows.length === 1 ? "" : "s"}${rows.some(r => r.size) ? ", the largest change of the gold answer's margin first" : ""}.${left}`;
  for (const row of rows.slice(0, shownDocuments)) list.append(documentDetails(entry, row, a, b));
  $("doc-more").hidden = rows.length <= shownDocuments;
}

function documentDetails(entry, row, a, b) {
  const score = x => x.value === null ? DASH : written(x.value, false, Number.isInteger(x.value) ? 0 : 3);
  const details = make("details", {}, make("summary", { textContent:
    `${entry.task} ${row.d.id}: ${data.metric} A ${score(row.a)}, B ${score(row.b)}` + (row.size ? `; |Δ margin| ${row.size.toFixed(2)} nats` : "") }));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(...documentBody(entry, row, a, b));
  });
  return details;
}

function documentBody(entry, { d, a: x, b: y }, a, b) {
  const names = [a, b].map(n => systemName(data.systems[n]));
  const parts = [make("h4", { textContent: `Prompt${d.tokens ? ` (${d.tokens} tokens)` : ""}` }), make("div", { className: "text prompt", textContent: d.context })];
  if (d.choices.length) {
    const head = ["Choice", "", `A: ${names[0]}`, `B: ${names[1]}`, "A \u2212 B"].map((t, i) => make("th", { textContent: t, className: i < 2 ? "word" : "" }));
    const body = d.choices.map((choice, i) => make("tr", {}, make("td", { className: "wrap", textContent: choice }),
      make("td", { className: "word", textContent: i === d.gold ? "gold" : "" }),
      ...[x, y].map(s => make("td", { className: i === s.prediction ? "best" : "", textContent: written(s.logs[i], false, 2) + (i === s.prediction ? " chosen" : "") })),
      make("td", { textContent: written(x.logs[i] - y.logs[i], false, 2) })));
    parts.push(make("h4", { textContent: "Choices" }), make("div", { className: "scroll" },
      make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body))));
  } else {
    if (d.target !== null) parts.push(make("h4", { textContent: "Gold answer" }), make("div", { className: "text", textContent: d.target }));
    parts.push(make("h4", { textContent: "Generated texts, from the first difference on marked" }));
    const common = x.text === null || y.text === null ? 0 : firstDifference(x.text, y.text);
    parts.push(make("div", { className: "pair" }, ...[x, y].map((s, i) => make("div", {}, make("h4", { textContent: `${"AB"[i]}: ${names[i]}` }),
      s.text === null ? make("p", { className: "legend", textContent: "(texts were not stored)" })
        : make("div", { className: "text generated" }, s.text.slice(0, common), make("mark", { textContent: s.text.slice(common) })),
      s.cut ? make("p", { className: "legend", textContent: "Ended by the limit of its tokens." }) : ""))));
  }
  const traces = [a, b].map(n => entry.traces.find(t => String(t.system) === n && t.document === d.id));
  if (traces.some(Boolean)) {
    parts.push(make("h4", { textContent: "Retained tokens: the darker, the more layers and KV heads retain a token at the end; crossed out: evicted everywhere" }));
    parts.push(make("div", { className: "pair" }, ...traces.map((t, i) => t ? tokenView(t, `${"AB"[i]}: ${names[i]}`) : make("div", { className: "legend", textContent: `${"AB"[i]}: no trace` }))));
  }
  return parts;
}

function firstDifference(a, b) {
  let i = 0;
  while (i < a.length && i < b.length && a[i] === b[i]) i++;
  return i;
}

/** The prompt's tokens and those after it apart, shaded by the share of layers and KV heads that retain them. */
function tokenView(trace, name) {
  const strip = (from, to) => make("div", { className: "text tokens" }, ...trace.pieces.slice(from, to).map((piece, k) => {
    const share = trace.share[from + k], span = make("span", { textContent: piece, title: `token ${from + k}: retained by ${Math.round(100 * share)} % of layers and KV heads` });
    span.style.background = `rgba(0, 114, 178, ${(.85 * share).toFixed(2)})`;
    if (share > .6) span.style.color = "#fff";
    if (share === 0) span.style.textDecoration = "line-through";
    return span;
  }));
  const view = make("div", {}, make("h4", { textContent: name }), make("div", { className: "legend", textContent: "Prompt" }), strip(0, trace.context));
  if (trace.pieces.length > trace.context) view.append(make("div", { className: "legend", textContent: "After the prompt" }), strip(trace.context));
  return view;
}
