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
    parts.push(firstTokens(x, y));
    const whole = s => (s.thinking ?? "") + "\u0000" + (s.text ?? "");
    const common = x.text === null || y.text === null ? 0 : firstDifference(whole(x), whole(y));
    parts.push(make("div", { className: "pair" }, ...[x, y].map((s, i) => make("div", {}, make("h4", { textContent: `${"AB"[i]}: ${names[i]}` }), ...generatedText(s, common)))));
  }
  const traces = [a, b].map(n => entry.traces.find(t => String(t.system) === n && t.document === d.id));
  if (traces.some(Boolean)) {
    parts.push(make("h4", { textContent: "Retained tokens: the darker, the more layers and KV heads retain a token at the end; crossed out: evicted everywhere" }), scale());
    parts.push(make("div", { className: "pair" }, ...traces.map((t, i) => t ? tokenView(t, `${"AB"[i]}: ${names[i]}`) : make("div", { className: "legend", textContent: `${"AB"[i]}: no trace` }))));
    parts.push(make("h4", { textContent: "Cached positions at each step, along the prompt and the generated text" }));
    const maps = make("div", { className: "pair" }, ...traces.map(() => make("div")));
    parts.push(maps);
    requestAnimationFrame(() => traces.forEach((t, i) => { if (t?.map) cachedMap(maps.children[i], t, `${"AB"[i]}: ${names[i]}`); }));
  }
  return parts;
}

function firstDifference(a, b) {
  let i = 0;
  while (i < a.length && i < b.length && a[i] === b[i]) i++;
  return i;
}

const FINISH = { eos: "ended by the model", stop: "ended by a stop sequence", length: "cut off at the limit of tokens", thinking: "cut off inside its thinking, so that there is no answer" };

/** What was thought and answered, its tokens, why it ended, and what the task's filter extracted. */
function generatedText(s, common) {
  if (s.text === null) return [make("p", { className: "legend", textContent: "(texts were not stored)" })];
  const parts = [], thinking = s.thinking ?? "", answered = Math.max(0, common - thinking.length - 1);
  const marked = (text, from) => make("div", { className: "text generated" }, text.slice(0, from), make("mark", { textContent: text.slice(from) }));
  if (thinking) parts.push(make("details", {}, make("summary", { textContent: `Thinking (${s.thought} tokens)` }), marked(thinking, common)));
  parts.push(marked(s.text, answered));
  if (s.extracted !== undefined) parts.push(make("p", { className: "legend extracted", textContent: `Extracted answer: ${s.extracted}` }));
  const ended = FINISH[s.finish] ?? (s.cut ? FINISH.length : "");
  parts.push(make("p", { className: "legend", textContent: `${s.count ?? DASH} tokens${ended ? `, ${ended}` : ""}.` }));
  return parts;
}

/** Where the tokens of two texts first differ. */
function firstTokens(x, y) {
  if (!x.ids || !y.ids) return "";
  const at = firstDifference(x.ids, y.ids), same = at === x.ids.length && at === y.ids.length;
  return make("p", { className: "legend first", textContent: same ? "Both texts have the same tokens." : `The first ${at} tokens are the same.` });
}

/** The colours of shares from 0 to 100 %. */
function scale() {
  const steps = [0, 20, 40, 60, 80, 100].map(p => {
    const step = make("span", { textContent: `${p} %` });
    step.style.background = shadeOf(p / 100);
    if (p > 60) step.style.color = "#fff";
    return step;
  });
  return make("div", { className: "scale legend" }, "Share of layers and KV heads: ", ...steps);
}
const shadeOf = share => `rgba(0, 114, 178, ${(.85 * share).toFixed(2)})`;

/** A map of what is cached: steps downwards, positions to the right; lines divide the prompt from the generated text. */
function cachedMap(place, trace, name) {
  const { steps, positions, share } = trace.map, last = steps.at(-1), edge = trace.context;
  const text = share.map((row, i) => row.map((v, j) => v === null ? "" : `after step ${steps[i]}: ${v} % of layers and KV heads<br>have cached positions ${positions[j]} to ${(positions[j + 1] ?? last + 1) - 1}`));
  const line = { type: "line", line: { color: "#d55e00", width: 1.5, dash: "dash" } };
  const shapes = trace.context <= last ? [{ ...line, xref: "x", yref: "paper", x0: edge, x1: edge, y0: 0, y1: 1 }, { ...line, xref: "paper", yref: "y", x0: 0, x1: 1, y0: edge, y1: edge }] : [];
  const annotations = shapes.length ? [{ x: edge, y: 1, yref: "paper", text: "generated \u2192", showarrow: false, xanchor: "left", yanchor: "bottom", font: { size: 10 } }] : [];
  panel(place, name, [{ type: "heatmap", x: [...positions, last + 1], y: [0, ...steps.map(s => s + 1)], z: share, text, hovertemplate: "%{text}<extra></extra>",
    zmin: 0, zmax: 100, colorscale: [[0, "#fff"], [1, "#0072b2"]], colorbar: { title: { text: "%" }, thickness: 10 }, hoverongaps: false }],
    { height: 320, shapes, annotations, xaxis: { title: { text: "position" } }, yaxis: { title: { text: "step" }, autorange: "reversed" } });
}

/** The prompt's tokens and those after it apart, shaded by the share of layers and KV heads that retain them. */
function tokenView(trace, name) {
  const strip = (from, to) => make("div", { className: "text tokens" }, ...trace.pieces.slice(from, to).map((piece, k) => {
    const share = trace.share[from + k], span = make("span", { textContent: piece, title: `token ${from + k}: retained by ${Math.round(100 * share)} % of layers and KV heads` });
    span.style.background = shadeOf(share);
    if (share > .6) span.style.color = "#fff";
    if (share === 0) span.style.textDecoration = "line-through";
    return span;
  }));
  const view = make("div", {}, make("h4", { textContent: name }), make("div", { className: "legend", textContent: "Prompt" }), strip(0, trace.context));
  if (trace.pieces.length > trace.context) view.append(make("div", { className: "divider", textContent: `generated after ${trace.context} tokens of the prompt` }), strip(trace.context));
  return view;
}
