"use strict";
// Charts: panels for each model and number of shots, drawn by plotly.
const X = {
  kept_tokens: { title: "tokens retained per KV head" },
  tokens_per_second: { title: "tokens/s of the charged time" }, factor: { title: "forgetting factor" },
};

function buildChartChoices() {
  const choose = (id, options) => {
    $(id).replaceChildren(...options.map(([value, text]) => make("option", { value, textContent: text })));
    $(id).addEventListener("change", drawCharts);
  };
  const some = find => data.systems.some(find);
  const y = [["score", `${data.metric}${data.percent ? " (%)" : ""}`]];
  if (data.pair) y.push(["difference", `${data.pair} (paired difference)`]);
  for (const [measure, text] of Object.entries(data.measures)) {
    if (some(s => Object.keys(s.close).length)) y.push([`close:${measure}`, text]);
  }
  if (data.written.length) y.push(["written", "tokens generated (distribution)"]);
  if (data.lengths.length) y.push(["length", `${data.metric} by the length of the prompt`]);
  if (data.needle.length) y.push(["needle", "Needles found"]);
  if (data.layers.length) {
    for (const [k, text] of Object.entries({ overlap: `retained tokens shared with the second policy of the pair (Jaccard index), by layer`,
      evicted: "evicted tokens per KV head, by layer", age: "age of evicted tokens (steps), by layer",
      mass: "attention that evicted tokens had received, by layer", lost: "share of attention lost, by layer" })) y.push([`layer:${k}`, text]);
  }
  const factors = new Set(data.systems.map(s => s.factor_value).filter(v => v !== null));
  if (factors.size > 1) y.push(["heat", `${data.metric} by forgetting factor and budget`]);
  choose("chart-y", y);
  const x = [["budget", "budget"]];
  if (some(s => Object.values(s.kept_tokens).some(v => v !== null))) x.push(["kept_tokens", "tokens retained"]);
  if (some(s => Object.values(s.tokens_per_second).some(v => v !== null))) x.push(["tokens_per_second", "tokens/s"]);
  if (factors.size > 1) x.push(["factor", "forgetting factor"]);
  choose("chart-x", x);
}

function buildChips(systems) {
  const lines = new Map(systems.map(s => [lineOf(s), s]));
  $("chips").replaceChildren(...[...lines].map(([key, s]) => {
    const chip = make("button", { type: "button", className: "chip", title: "show or hide in the charts" }, make("i"),
      s.label + (s.factor === DASH ? "" : `, factor ${s.factor}`) + (s.causal ? "" : " (oracle)"));
    chip.style.setProperty("--colour", s.colour);
    chip.style.setProperty("--dash", { dot: "dotted", dash: "dashed", dashdot: "dashed", longdash: "dashed" }[s.dash] ?? "solid");
    chip.setAttribute("aria-pressed", !hiddenLines.has(key));
    chip.addEventListener("click", () => {
      hiddenLines.has(key) ? hiddenLines.delete(key) : hiddenLines.add(key);
      drawCharts();
    });
    return chip;
  }));
}

/** A number of a system on one task, or its mean over tasks. */
function measured(s, name, task) {
  const values = task === average ? Object.values(s[name]) : [s[name][task]];
  return values.some(v => v === null || v === undefined) || !values.length ? null : values.reduce((a, b) => a + b, 0) / values.length;
}

/** A budget in tokens over several tasks: the range of the tasks' medians. */
function medians(s) {
  const found = Object.values(s.tokens).map(t => t[0]);
  return found.length ? [null, Math.min(...found), Math.max(...found)] : undefined;
}

/** What a chart shows of a system: value, low, high, n, and the text of a p-value; null where it has none. */
function shownValue(s, y, task) {
  if (y === "score") return s.scores[task] ?? null;
  if (y === "difference") {
    const d = s.difference[task];
    return d ? [d[0], d[1], d[2], d[4], `<br>p (${data.corrected}) = ${d[3] < 0.001 ? "< 0.001" : d[3].toFixed(3)}`] : null;
  }
  const c = s.close[task]?.[y.slice(6)];
  return c ? [...c, s.scores[task]?.[3]] : null;
}

function hover(s, task, [value, low, high, n, more = ""], percent) {
  const unit = percent ? " %" : "", t = s.tokens[task] ?? medians(s), kept = measured(s, "kept_tokens", task);
  const budget = s.full ? "no budget" : `budget ${s.budget}` + (t ? ` = ${t[0] === null ? `${Math.round(t[1])} to ${Math.round(t[2])} tokens (medians of the tasks)` : `${Math.round(t[0])} tokens (${Math.round(t[1])} to ${Math.round(t[2])})`}` : "");
  return `<b>${escaped(s.label)}${s.factor === DASH ? "" : `, factor ${s.factor}`}</b><br>${written(value, percent)}${unit} `
    + `[${written(low, percent)}, ${written(high, percent)}], n = ${n ?? DASH}<br>${budget}`
    + (kept === null ? "" : `<br>${kept.toFixed(1)} tokens retained (mean)`) + more;
}
const escaped = text => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");

function traceOf(points, s, x, percent, name) {
  const scale = percent ? 100 : 1;
  return {
    type: "scatter", mode: "lines+markers", name, x: points.map(p => p.x), y: points.map(p => scale * p.v[0]),
    error_y: { type: "data", symmetric: false, array: points.map(p => scale * ((p.v[2] ?? p.v[0]) - p.v[0])),
      arrayminus: points.map(p => scale * (p.v[0] - (p.v[1] ?? p.v[0]))), thickness: 1, width: 2 },
    text: points.map(p => p.text), hovertemplate: "%{text}<extra></extra>",
    line: { color: s.colour, dash: s.dash, width: 1.8 }, marker: { color: s.colour, symbol: s.symbol, size: 7 },
  };
}

/** Level lines over the whole width: the full cache's value with its interval, and the chance level. */
function levels(traces, shapes, range, level, text, colour, band) {
  traces.push({ type: "scatter", mode: "lines", x: range, y: [level, level], text: [text, text], hovertemplate: "%{text}<extra></extra>",
    line: { color: colour, dash: "dot", width: 1.5 } });
  if (band) shapes.push({ type: "rect", xref: "paper", x0: 0, x1: 1, y0: band[0], y1: band[1], fillcolor: colour, opacity: .08, line: { width: 0 } });
}

function panel(place, title, traces, layout) {
  const element = make("div", { className: "panel" });
  if (layout.height) element.style.height = `${layout.height}px`;
  place.append(element);
  const base = { title: { text: escaped(title), font: { size: 13 }, x: .01 }, margin: { l: 52, r: 10, t: 34, b: 44 }, showlegend: false,
    hovermode: "closest", hoverlabel: { align: "left" }, paper_bgcolor: "#fff", plot_bgcolor: "#fff", shapes: [], font: { size: 11 } };
  const axis = { gridcolor: "#e6e6e6", zeroline: false, linecolor: "#888", automargin: true };
  const merged = { ...base, ...layout, xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis } };
  library.newPlot(element, traces, merged, { responsive: true, displaylogo: false, displayModeBar: false });
}

/** Its forgetting factor; the policy that is compared with has none and scores as factor 1. */
function factorOf(s) {
  return s.factor_value ?? (data.pair?.endsWith(` ${MINUS} ${s.label}`) ? 1 : null);
}

function drawLines(place, part, systems, y, x) {
  const percent = y === "score" || y === "difference" ? data.percent : y === "close:agreement";
  const columns = part.columns.filter(t => t === average || passes("task", t)).sort((a, b) => (b === average) - (a === average)), several = data.budget_axis.categories;
  for (const task of columns) {
    const traces = [], shapes = [], groups = new Map(), xs = [];
    for (const s of systems.filter(s => !s.full)) {
      const v = shownValue(s, y, task), at = x === "budget" ? (several ? s.budget : s.order) : x === "factor" ? factorOf(s) : measured(s, x, task);
      if (!v || at === null) continue;
      const key = x === "factor" ? `${s.label}, budget ${s.budget}` : lineOf(s);
      if (!groups.has(key)) groups.set(key, { s, points: [] });
      groups.get(key).points.push({ x: at, v, text: hover(s, task, v, percent) });
      xs.push(at);
    }
    const width = x === "budget" && several ? 0 : (Math.max(...xs) - Math.min(...xs)) / 120;
    [...groups].forEach(([key, { s, points }], i) => {  // side by side, so that intervals do not cover each other
      const moved = width ? points.map(p => ({ ...p, x: p.x + width * (i - (groups.size - 1) / 2) })) : points;
      traces.push(traceOf(moved, s, x, percent, key));
    });
    if (!traces.length) continue;
    const range = several && x === "budget" ? [...new Set(xs)] : [Math.min(...xs), Math.max(...xs)], scale = percent ? 100 : 1;
    const ends = [range[0], range.at(-1)];
    for (const s of systems.filter(s => s.full)) {
      const v = y === "score" ? s.scores[task] : null, at = measured(s, x, task);
      if (!v) continue;
      if (["kept_tokens", "tokens_per_second"].includes(x) && at !== null) traces.push(traceOf([{ x: at, v, text: hover(s, task, v, percent) }], s, x, percent, s.label));
      else levels(traces, shapes, ends, scale * v[0], hover(s, task, v, percent), s.colour, v[1] === null ? null : [scale * v[1], scale * v[2]]);
    }
    if (y === "score" && part.chance[task] !== undefined) {
      levels(traces, shapes, ends, scale * part.chance[task], `chance level ${written(part.chance[task], percent)}`, "#b00020");
    }
    if (y !== "score" && y !== "close:agreement") shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: 0, y1: 0, line: { color: "#888", width: 1 } });
    const n = systems.map(s => s.scores[task]?.[3]).find(v => v !== undefined);
    const chance = part.chance[task] === undefined ? "" : `, chance ${written(part.chance[task], data.percent)}`;
    const ticks = x === "budget" && !several ? { tickvals: [...new Set(xs)] } : several && x === "budget" ? { type: "category" } : {};
    panel(place, `${task === average ? `average of ${part.columns.length - 1} tasks` : task} (n = ${n ?? DASH}${y === "score" ? chance : ""})`, traces, { shapes, xaxis: { title: { text: x === "budget" ? data.budget_axis.title : X[x].title }, ...ticks } });
  }
}

function drawByLength(place, part, systems) {
  const numbers = new Map(data.systems.map((s, i) => [s, i])), points = new Map(data.lengths.map(l => [l.system, l.points]));
  for (const budget of new Set(systems.filter(s => !s.full).map(s => s.budget))) {
    const traces = systems.filter(s => (s.full || s.budget === budget) && points.has(numbers.get(s))).map(s => {
      const found = points.get(numbers.get(s)).map(([x, ...v]) => ({ x, v, text: hover(s, average, v, data.percent) + `<br>prompts of ${Math.round(x)} tokens (median)` }));
      return traceOf(found, s, "length", data.percent, s.label);
    });
    const ticks = [...new Set(traces.flatMap(t => t.x))];
    if (traces.length) panel(place, `budget ${budget}`, traces, { xaxis: { title: { text: "tokens of the prompt" }, type: "log", tickvals: ticks, ticktext: ticks.map(t => Math.round(t)) } });
  }
}

/** How long the generated texts are: of each system the share of texts that have at most so many tokens. */
function drawWritten(place, part, systems) {
  const numbers = new Map(systems.map(s => [data.systems.indexOf(s), s]));
  for (const task of new Set(data.written.filter(w => numbers.has(w.system) && passes("task", w.task)).map(w => w.task))) {
    const traces = data.written.filter(w => w.task === task && numbers.has(w.system)).map(w => {
      const s = numbers.get(w.system), y = w.quantiles.map((_, i) => 100 * i / (w.quantiles.length - 1));
      const about = `n = ${w.n}, mean ${written(w.mean, false, 1)} tokens` + (w.cut === null ? "" : `, cut off ${written(w.cut, true)} %`) + (w.loop === null ? "" : `, ended in a loop ${written(w.loop, true)} %`);
      return { type: "scatter", mode: "lines", name: s.label, x: w.quantiles, y, line: { color: s.colour, dash: s.dash, width: 1.8, shape: "hv" },
        text: w.quantiles.map((q, i) => `<b>${escaped(systemName(s))}</b><br>${Math.round(y[i])} % of the texts have at most ${Math.round(q)} tokens<br>${about}`),
        hovertemplate: "%{text}<extra></extra>" };
    });
    panel(place, task, traces, { xaxis: { title: { text: "tokens generated" }, rangemode: "tozero" }, yaxis: { title: { text: "texts with at most so many (%)" }, range: [0, 102] } });
  }
}

function drawNeedles(place, part) {
  for (const map of data.needle.filter(m => m.model === part.model && m.shots === part.shots)) {
    const keep = map.rows.map((_, i) => i).filter(i => passes("policy", map.policies[i]) && (map.budgets[i] === DASH || passes("budget", map.budgets[i])));
    heat(place, `Needles found (%) by ${map.unit}`, map.columns, keep.map(i => map.rows[i]), keep.map(i => map.shares[i].map(v => v && v.map(x => 100 * x))), map.unit, "");
  }
}

function heat(place, title, columns, rows, values, xtitle, ytitle) {
  if (!rows.length) return;
  const height = Math.max(300, 16 * rows.length + 90);
  const each = make => values.map(r => r.map(v => v ? make(v) : null));  // of value, low and high
  panel(place, title, [{ type: "heatmap", x: columns, y: rows, z: each(v => v[0]), text: each(v => v[0].toFixed(1)), texttemplate: "%{text}",
    customdata: each(v => v[1] === null ? "" : ` [${v[1].toFixed(1)}, ${v[2].toFixed(1)}]`), colorscale: "Cividis",
    hovertemplate: `${ytitle} %{y}<br>${xtitle} %{x}<br>%{z:.1f}%{customdata}<extra></extra>` }],
    { height, xaxis: { type: "category", title: { text: xtitle } }, yaxis: { type: "category", title: { text: ytitle } } });
}

function drawHeat(place, part, systems) {
  const column = part.columns.at(-1), scale = data.percent ? 100 : 1;
  for (const label of new Set(systems.filter(s => s.factor_value !== null).map(s => s.label))) {
    const own = systems.filter(s => s.label === label && s.factor_value !== null && s.scores[column]);
    const factors = [...new Set(own.map(s => s.factor_value))].sort((a, b) => a - b), budgets = [...new Set(own.map(s => s.budget))];
    if (factors.length < 2) continue;
    const at = (f, b) => own.find(s => s.factor_value === f && s.budget === b)?.scores[column].slice(0, 3).map(x => x === null ? null : scale * x);
    heat(place, `${label}: ${column}, ${data.metric}`, budgets, factors.map(String), factors.map(f => budgets.map(b => at(f, b) ?? null)), "budget", "forgetting factor");
  }
}

function drawLayers(place, part, systems, name) {
  const rows = data.layers.filter(r => r.model === part.model && r.shots === part.shots && passes("task", r.task) && passes("budget", r.budget));
  const bounds = r => [r[name], ...[-1, 1].map(sign => r[`${name}_half`] === null ? null : r[name] + sign * r[`${name}_half`])];
  const places = new Set(rows.map(r => `${r.task}, budget ${r.budget}`));
  for (const title of places) {
    const traces = systems.filter(s => !s.full).flatMap(s => {
      const own = rows.filter(r => `${r.task}, budget ${r.budget}` === title && r.policy === s.label && r.factor === s.factor && r.budget === s.budget && r[name] !== null);
      const found = own.map(r => ({ x: r.layer, v: bounds(r), text: `<b>${escaped(s.label)}</b><br>layer ${r.layer}: ${written(r[name], false)} [${written(bounds(r)[1], false)}, ${written(bounds(r)[2], false)}]<br>${r.documents} documents` }));
      return found.length ? [traceOf(found, s, "layer", false, s.label)] : [];
    });
    if (traces.length) panel(place, title, traces, { xaxis: { title: { text: "layer" } } });
  }
}

function drawCharts() {
  const y = $("chart-y").value, x = $("chart-x").value, systems = data.systems.filter(systemPasses);
  $("chart-x").disabled = !(y === "score" || y === "difference" || y.startsWith("close:"));
  const acrossFactors = y === "heat" || x === "factor" && !$("chart-x").disabled;
  const labels = new Set(systems.filter(s => !hiddenLines.has(lineOf(s))).map(s => s.label));
  buildChips(systems);
  document.querySelectorAll(".panel").forEach(p => library.purge(p));
  $("panels").replaceChildren();
  data.parts.forEach((part, i) => {
    const own = systems.filter(s => s.part === i && (acrossFactors ? labels.has(s.label) : !hiddenLines.has(lineOf(s))));
    if (!own.length) return;
    const place = make("div", { className: "panels" });
    $("panels").append(make("h3", { textContent: `${part.model}, ${part.shots}-shot` }), place);
    if (y === "length") drawByLength(place, part, own);
    else if (y === "written") drawWritten(place, part, own);
    else if (y === "needle") drawNeedles(place, part);
    else if (y === "heat") drawHeat(place, part, own);
    else if (y.startsWith("layer:")) drawLayers(place, part, own, y.slice(6));
    else drawLines(place, part, own, y, x);
    if (!place.children.length) place.append(make("p", { className: "legend", textContent: "There is nothing to draw for this choice." }));
  });
}
