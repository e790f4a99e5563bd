const $ = id => document.getElementById(id);

/** An element with properties and children; texts are never read as HTML. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** The text of a packed script element (gzip in base64). */
async function unpack(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), c => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function written(value, percent, decimals = percent ? 1 : 3) {
  return value === null || value === undefined ? DASH : ((percent ? 100 : 1) * value).toFixed(decimals).replace("-", MINUS);
}

// ---- filters: one set of values that are left out for each kind; the full cache has no budget and is never left out by one
const KINDS = { model: "Model", shots: "Shots", task: "Task", policy: "Policy", budget: "Budget", schedule: "Schedule", factor: "Factor" };
const ALWAYS = ["model", "policy", "budget", "task", "shots"];
const without = Object.fromEntries(Object.keys(KINDS).map(k => [k, new Set()]));
const hiddenLines = new Set();
let data, library, browse;

const passes = (kind, value) => !without[kind].has(String(value));
const lineOf = s => `${s.label}|${s.factor}`;
const average = "average";
function systemPasses(s) {
  const place = data.parts[s.part];
  return passes("model", place.model) && passes("shots", place.shots) && passes("policy", s.policy)
    && (s.full || ["budget", "schedule", "factor"].every(k => s[k] === DASH || passes(k, s[k])));
}

/** A budget's tokens over all tasks: the smallest and the largest median, as ` (3 to 9 tokens)`. */
function tokensOf(budget) {
  const medians = data.systems.filter(s => s.budget === budget).flatMap(s => Object.values(s.tokens).map(t => t[0]));
  if (!medians.length || budget.endsWith("tokens")) return "";
  const [low, high] = [Math.min(...medians), Math.max(...medians)].map(Math.round);
  return low === high ? ` (${low} tokens)` : ` (${low} to ${high} tokens)`;
}

function buildFilters() {
  const pruned = data.systems.filter(s => !s.full);
  const values = {
    model: data.parts.map(p => p.model), shots: data.parts.map(p => p.shots),
    task: data.parts.flatMap(p => p.columns).filter(t => t !== average), policy: data.systems.map(s => s.policy),
    budget: [...pruned].sort((a, b) => a.order - b.order).map(s => s.budget),
    schedule: pruned.map(s => s.schedule), factor: pruned.map(s => s.factor).filter(f => f !== DASH),
  };
  for (const [kind, name] of Object.entries(KINDS)) {
    const choices = [...new Set(values[kind].map(String))].filter(v => v !== DASH);
    if (choices.length < 2 && !ALWAYS.includes(kind)) continue;
    const summary = make("summary"), options = make("div", { className: "options" });
    const box = make("details", {}, summary, options);
    box.dataset.kind = kind;
    const boxes = choices.map(value => {
      const input = make("input", { type: "checkbox", checked: true, value });
      input.addEventListener("change", () => change(input.checked ? [] : [value], input.checked ? [value] : []));
      return input;
    });
    const describe = () => {
      const chosen = choices.filter(c => passes(kind, c));
      summary.textContent = `${name}: ${chosen.length === choices.length ? "all" : chosen.join(", ") || "none"}`;
      if (chosen.length > 2 && chosen.length < choices.length) summary.textContent = `${name}: ${chosen.length} of ${choices.length}`;
      box.classList.toggle("active", chosen.length < choices.length);
    };
    const change = (out, back) => {
      out.forEach(v => without[kind].add(v));
      back.forEach(v => without[kind].delete(v));
      boxes.forEach(b => { b.checked = passes(kind, b.value); });
      describe();
      apply();
    };
    const all = make("button", { type: "button", textContent: "all" }), none = make("button", { type: "button", textContent: "none" });
    all.addEventListener("click", () => change([], choices));
    none.addEventListener("click", () => change(choices, []));
    options.append(make("div", { className: "controls" }, all, none));
    boxes.forEach(b => options.append(make("label", {}, b, ` ${b.value}${kind === "budget" ? tokensOf(b.value) : ""}`)));
    describe();
    box.addEventListener("toggle", () => {
      if (box.open) document.querySelectorAll("#filters details").forEach(d => { if (d !== box) d.open = false; });
    });
    $("filters").append(box);
  }
  document.addEventListener("click", event => {
    if (!event.target.closest("#filters")) document.querySelectorAll("#filters details").forEach(d => { d.open = false; });
  });
}

function filterTables() {
  const tasks = new Set(data.parts.flatMap(p => p.columns)), known = new Set(data.systems.flatMap(s => [s.policy, s.label]));
  const policies = new Set(data.systems.filter(systemPasses).flatMap(s => [s.policy, s.label]));
  const columns = { Policy: v => !known.has(v) || policies.has(v), Against: v => !known.has(v) || policies.has(v),
    Budget: v => passes("budget", v), Schedule: v => passes("schedule", v), Factor: v => passes("factor", v), Task: v => passes("task", v) };
  for (const block of document.querySelectorAll(".block")) {
    const { model, shots } = block.dataset;
    block.hidden = Boolean(model) && !passes("model", model) || Boolean(shots) && !passes("shots", shots);
    for (const table of block.querySelectorAll("table")) {
      const names = [...table.tHead.rows[0].cells].map(c => c.textContent.trim());
      const hidden = names.map(n => tasks.has(n) && !passes("task", n) || n.startsWith("Budget ") && !passes("budget", n.slice(7)));
      for (const row of table.rows) {
        [...row.cells].forEach((cell, i) => { cell.hidden = hidden[i]; });
        if (row.parentElement.tagName === "TBODY" && !row.classList.contains("reference")) {
          row.hidden = names.some((n, i) => columns[n] && !columns[n](row.cells[i].textContent.trim()));
        }
      }
    }
  }
}

// ---- start
function apply() {
  filterTables();
  drawCharts();
  if (browse) buildDocumentChoices();
}

async function start() {
  document.querySelectorAll("table.sortable").forEach(sortable);
  if (!window.DecompressionStream) {
    $("panels").append(make("p", { className: "note", textContent: "Charts, filters and documents need a browser of 2023 or newer." }));
    return;
  }
  data = JSON.parse(await unpack("data-charts"));
  data.systems.filter(s => !s.shown).forEach(s => hiddenLines.add(lineOf(s)));
  document.head.append(make("script", { textContent: await unpack("data-library") }));
  library = window.Plotly;
  buildFilters();
  buildChartChoices();
  $("doc-show").replaceChildren(...Object.entries(DIFFERENCES).map(([value, [text]]) => make("option", { value, textContent: text })));
  browse = JSON.parse(await unpack("data-documents"));
  $("doc-task").addEventListener("change", buildSystemChoices);
  ["doc-a", "doc-b", "doc-show"].forEach(id => $(id).addEventListener("change", () => { shownDocuments = PAGE; listDocuments(); }));
  $("doc-more").addEventListener("click", () => { shownDocuments += PAGE; listDocuments(); });
  apply();
  document.body.dataset.ready = "yes";
}
start();
