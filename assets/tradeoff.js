// The trade-off of a sweep: progress, chart, table, and the runs behind a point.
//
// Draws what mtad/ui/tradeoff.py describes; every message is whole, so one that is lost does not
// matter. Texts reach the page through textContent only.

const root = element.querySelector(".mtad-sweep");
// Shape, and a fill that never stands alone. Okabe-Ito.
const MARKS = {
  autoregressive: ["circle", "#000000"],
  beam: ["plus", "#f0e442"],
  speculative: ["square", "#e69f00"],
  mtjd: ["cross", "#999999"],
  mtad: ["triangle", "#0072b2"],
  mtad_tree: ["diamond", "#56b4e9"],
  specinfer: ["down", "#009e73"],
  bild: ["star", "#cc79a7"],
  typical: ["hexagon", "#d55e00"],
};
const Y_TITLES = { perplexity: "perplexity", joules: "J per token" };
const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

// ---------------------------------------------------------------- frame
const error = make("div", "mtad-error");
error.setAttribute("role", "alert");
const status = make("div", "mtad-status");
const remaining = make("span", "mtad-remaining");
const bar = make("progress", "mtad-sweep-bar");
bar.setAttribute("aria-label", "finished runs");
bar.hidden = true;
const progress = make("div", "mtad-progress");
progress.append(bar, remaining);
const hint = make(
  "p",
  "mtad-hint",
  "Run answers the same prompts with every method and value. Each setting becomes one point: how " +
    "fast it is, and how probable the target finds what it wrote. Between two runs the device is " +
    "given back, so other visitors wait for one run at most."
);
const chartBox = make("section", "mtad-sweep-chart");
chartBox.hidden = true;
const tableBox = make("section", "mtad-sweep-table");
const pair = make("div", "mtad-sweep-pair");
pair.append(chartBox, tableBox);
const detail = make("section", "mtad-runs");
detail.hidden = true;
const notes = make("ul", "mtad-notes");
const spoken = make("div", "mtad-hidden");
spoken.setAttribute("role", "status");
spoken.setAttribute("aria-live", "polite");
root.replaceChildren(error, status, progress, hint, pair, detail, notes, spoken);

const title = make("h3", "mtad-title", "Tokens/s against");
title.id = "mtad-chart-title";
const choices = make("fieldset", "mtad-axes");
choices.setAttribute("aria-labelledby", title.id);
const radios = {};
for (const name of ["perplexity", "joules"]) {
  const choice = make("label", "mtad-sweep-axis");
  radios[name] = make("input");
  radios[name].type = "radio";
  radios[name].name = "mtad-sweep-axis";
  radios[name].checked = name === "perplexity";
  radios[name].addEventListener("change", () => {
    axis = name;
    draw();
  });
  choice.append(radios[name], make("span", "", Y_TITLES[name]));
  choices.append(choice);
}
const why = make("span", "mtad-why");
choices.append(why);
const top = make("div", "mtad-chart-head");
top.append(title, choices);
const plot = svg("svg", { class: "mtad-plot", tabindex: "0", role: "listbox" });
plot.setAttribute("aria-label", "Settings, by tokens per second. Arrow keys walk, Enter opens the runs.");
const legend = make("div", "mtad-plot-legend");
chartBox.append(top, plot, legend);

let shown = null; // the last message
let axis = "perplexity";
let active = 0; // number of the point that has the keyboard
let opened = 0; // number of the setting whose runs are listed
let openedDone = -1;
let points = [];

// ---------------------------------------------------------------- marks
function mark(method, x, y, size, filled) {
  const [shape, colour] = MARKS[method] || ["circle", "#999999"];
  const polygon = (turns) =>
    svg("path", {
      d: "M" + turns.map(([a, r]) => {
        const angle = (a * Math.PI) / 180;
        return (x + r * size * Math.sin(angle)).toFixed(1) + " " + (y - r * size * Math.cos(angle)).toFixed(1);
      }).join("L") + "Z",
    });
  const shapes = {
    circle: () => svg("circle", { cx: x, cy: y, r: size * 0.9 }),
    square: () => polygon([[45, 1.2], [135, 1.2], [225, 1.2], [315, 1.2]]),
    triangle: () => polygon([[0, 1.2], [120, 1.2], [240, 1.2]]),
    down: () => polygon([[60, 1.2], [180, 1.2], [300, 1.2]]),
    diamond: () => polygon([[0, 1.25], [90, 1.25], [180, 1.25], [270, 1.25]]),
    hexagon: () => polygon([0, 60, 120, 180, 240, 300].map((a) => [a, 1.05])),
    star: () => polygon([0, 36, 72, 108, 144, 180, 216, 252, 288, 324].map((a, k) => [a, k % 2 ? 0.55 : 1.3])),
    plus: () => polygon([[20, 1.1], [70, 1.1], [45, 0.5], [110, 1.1], [160, 1.1], [135, 0.5], [200, 1.1], [250, 1.1],
      [225, 0.5], [290, 1.1], [340, 1.1], [315, 0.5]].sort((a, b) => a[0] - b[0])),
    cross: () => polygon([[0, 0.45], [25, 1.2], [65, 1.2], [90, 0.45], [115, 1.2], [155, 1.2], [180, 0.45], [205, 1.2],
      [245, 1.2], [270, 0.45], [295, 1.2], [335, 1.2]]),
  };
  const node = shapes[shape]();
  node.setAttribute("class", "mtad-mark" + (filled ? "" : " mtad-open") + (colour === "#000000" ? " mtad-ink" : ""));
  if (filled && colour !== "#000000") node.style.fill = colour;
  return node;
}

function icon(method) {
  const box = svg("svg", { class: "mtad-icon", viewBox: "0 0 16 16", "aria-hidden": "true" });
  box.append(mark(method, 8, 8, 5.5, true));
  return box;
}

// ---------------------------------------------------------------- chart
function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((k) => k >= raw * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) found.push(k * step);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (step / power === 2.5 ? 1 : 0));
  return found.map((value) => [value, value.toFixed(digits)]);
}

function range(values) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  // Not tighter than a tenth of the values: noise should not fill the chart.
  const span = Math.max(high - low, 0.1 * high) || 1;
  const middle = (low + high) / 2;
  return [Math.max(0, middle - 0.62 * span), middle + 0.62 * span];
}

function draw() {
  if (!shown || !shown.rows) return;
  const rows = shown.rows.filter((row) => row.speed && row[axis]);
  chartBox.hidden = false;
  const width = Math.max(280, Math.floor(plot.getBoundingClientRect().width || chartBox.clientWidth));
  const narrow = width < 480;
  const height = Math.round(Math.max(270, Math.min(430, width * 0.68)));
  plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
  plot.setAttribute("height", height);
  const box = { left: 46, right: width - 14, top: 14, bottom: height - 44 };
  const frame = svg("g", { "aria-hidden": "true" });
  const title = (x, y, text, extra) => svg("text", { x, y, class: "mtad-axis-title", ...extra }, text);
  const sign = shown.estimated && axis === "joules" ? "≈ " : "";
  frame.append(
    title((box.left + box.right) / 2, height - 6, "tokens/s", { "text-anchor": "middle" }),
    title(13, (box.top + box.bottom) / 2, sign + Y_TITLES[axis], {
      "text-anchor": "middle",
      transform: `rotate(-90 13 ${(box.top + box.bottom) / 2})`,
    }),
    title(box.right, height - 6, "better ↘", { "text-anchor": "end" })
  );
  frame.append(svg("path", { class: "mtad-frame", d: `M${box.left} ${box.top}V${box.bottom}H${box.right}` }));
  if (!rows.length) {
    frame.append(title((box.left + box.right) / 2, (box.top + box.bottom) / 2,
      "Points appear as runs finish.", { "text-anchor": "middle" }));
    points = [];
    plot.replaceChildren(frame);
    plot.removeAttribute("aria-activedescendant");
    return;
  }
  const [xLow, xHigh] = range(rows.map((row) => row.speed[0]));
  const [yLow, yHigh] = range(rows.map((row) => row[axis][0]));
  const X = (value) => box.left + ((value - xLow) / (xHigh - xLow)) * (box.right - box.left);
  const Y = (value) => box.bottom - ((value - yLow) / (yHigh - yLow)) * (box.bottom - box.top);
  for (const [value, text] of ticks(xLow, xHigh, narrow ? 4 : 6)) {
    const x = X(value).toFixed(1);
    frame.append(svg("path", { class: "mtad-sweep-grid", d: `M${x} ${box.top}V${box.bottom}` }));
    frame.append(svg("text", { x, y: box.bottom + 17, class: "mtad-tick", "text-anchor": "middle" }, text));
  }
  for (const [value, text] of ticks(yLow, yHigh, 5)) {
    const y = Y(value);
    frame.append(svg("path", { class: "mtad-sweep-grid", d: `M${box.left} ${y.toFixed(1)}H${box.right}` }));
    frame.append(svg("text", { x: box.left - 7, y: y + 4, class: "mtad-tick", "text-anchor": "end" }, text));
  }
  // The front: nothing is known between two settings, so it goes in steps.
  const front = rows.filter((row) => row.front[axis]).sort((a, b) => a.speed[0] - b.speed[0]);
  let path = "";
  const edges = []; // where labels had better not be
  let [fromX, fromY] = [box.left, 0];
  front.forEach((row, k) => {
    const [x, y] = [X(row.speed[0]), Y(row[axis][0])];
    if (k) edges.push([fromX - 2, y, fromX + 2, fromY]);
    edges.push([fromX, y - 2, x, y + 2]);
    path += (k ? `V${y.toFixed(1)}` : `M${box.left} ${y.toFixed(1)}`) + `H${x.toFixed(1)}`;
    [fromX, fromY] = [x, y];
  });
  if (front.length) {
    path += `V${box.top}`;
    edges.push([fromX - 2, box.top, fromX + 2, fromY]);
  }
  frame.append(svg("path", { class: "mtad-front", d: path }));
  points = rows
    .map((row) => ({ row, x: X(row.speed[0]), y: Y(row[axis][0]) }))
    .sort((a, b) => a.x - b.x);
  const labels = place(points, box, narrow, edges);
  const nodes = points.map((point, k) => {
    const { row, x, y } = point;
    const node = svg("g", { class: "mtad-point", role: "option", id: "mtad-point-" + row.n });
    const speed = row.cells[0].filter(Boolean).join(", interval ");
    node.setAttribute(
      "aria-label",
      `${row.title} ${row.parameters}: ${speed} tokens/s, ${Y_TITLES[axis]} ` +
        row.cells[axis === "joules" ? 4 : 1][0] + (row.front[axis] ? ", on the front" : "")
    );
    node.setAttribute("aria-selected", String(row.n === opened));
    node.append(svg("path", { class: "mtad-whisker", d: whisker(row, X, Y, box) }));
    if (labels[k].line) node.append(svg("path", { class: "mtad-leader", d: labels[k].line }));
    node.append(svg("circle", { cx: x, cy: y, r: 14, class: "mtad-target" }), mark(row.method, x, y, 6.5, row.front[axis]));
    node.append(svg("text", { x: labels[k].x, y: labels[k].y, class: "mtad-label" }, labels[k].text));
    return node;
  });
  plot.replaceChildren(frame, ...nodes);
  walk(0);
}

// The intervals of a point, as far as the frame shows them.
function whisker(row, X, Y, box) {
  const [x, y] = [X(row.speed[0]).toFixed(1), Y(row[axis][0]).toFixed(1)];
  const inside = (value, low, high) => Math.max(low, Math.min(high, value)).toFixed(1);
  let d = "";
  if (row.speed[1] !== null) {
    const ends = [row.speed[1], row.speed[2]].map((value) => inside(X(value), box.left, box.right));
    d += `M${ends[0]} ${y}H${ends[1]}`;
  }
  if (row[axis][1] !== null) {
    const ends = [row[axis][1], row[axis][2]].map((value) => inside(Y(value), box.top, box.bottom));
    d += `M${x} ${ends[0]}V${ends[1]}`;
  }
  return d;
}

// A place for each label that covers no point and no other label, the front's first.
function place(points, box, narrow, edges) {
  const taken = [...edges, ...points.map(({ x, y }) => [x - 8, y - 8, x + 8, y + 8])];
  const cost = ([a, b, c, d]) => {
    let found = 0;
    for (const [e, f, g, h] of taken) {
      found += Math.max(0, Math.min(c, g) - Math.max(a, e)) * Math.max(0, Math.min(d, h) - Math.max(b, f));
    }
    const out = Math.max(0, box.left - a) + Math.max(0, c - box.right) + Math.max(0, box.top - b) + Math.max(0, d - box.bottom);
    return found + out * 60;
  };
  const order = points.map((_, k) => k).sort((a, b) => points[b].row.front[axis] - points[a].row.front[axis]);
  const found = [];
  for (const k of order) {
    const { row, x, y } = points[k];
    const text = narrow ? String(row.n) : row.label;
    const [w, h] = [text.length * 6.6 + 2, 14];
    let best = null;
    for (const distance of [11, 22, 36, 52]) {
      for (const degrees of [0, 180, 335, 25, 155, 205, 90, 270, 60, 120, 300, 240]) {
        const angle = (degrees * Math.PI) / 180;
        const [cx, cy] = [x + Math.cos(angle) * distance, y - Math.sin(angle) * distance];
        const side = Math.cos(angle);
        const left = side > 0.3 ? cx : side < -0.3 ? cx - w : cx - w / 2;
        const area = [left, cy - h / 2, left + w, cy + h / 2];
        const price = cost(area) + distance * 0.4 + Math.abs(Math.sin(angle)) * 2;
        if (!best || price < best.price) best = { price, area, distance, cx, cy };
      }
    }
    taken.push(best.area);
    found[k] = {
      text,
      x: best.area[0].toFixed(1),
      y: (best.area[1] + 11).toFixed(1),
      line: best.distance > 20 ? `M${x.toFixed(1)} ${y.toFixed(1)}L${best.cx.toFixed(1)} ${best.cy.toFixed(1)}` : "",
    };
  }
  return found;
}

function walk(by) {
  if (!points.length) return;
  let at = points.findIndex(({ row }) => row.n === active);
  if (at < 0) at = 0;
  else at = Math.max(0, Math.min(points.length - 1, at + by));
  if (active !== 0 || by !== 0) active = points[at].row.n;
  for (const { row } of points) {
    const node = plot.querySelector("#mtad-point-" + row.n);
    node.classList.toggle("mtad-now", row.n === active);
  }
  plot.setAttribute("aria-activedescendant", "mtad-point-" + points[at].row.n);
}

// The point under the pointer: the nearest one, as marks may lie on each other.
function under(event) {
  const area = plot.getBoundingClientRect();
  const far = ({ x, y }) => Math.hypot(event.clientX - area.left - x, event.clientY - area.top - y);
  const best = points.reduce((a, b) => (a && far(a) <= far(b) ? a : b), null);
  const label = event.target instanceof Element ? event.target.closest(".mtad-label") : null;
  if (label) return points.find(({ row }) => label.parentNode.id === "mtad-point-" + row.n);
  return best && far(best) < 18 ? best : null;
}

function light(number) {
  for (const { row } of points) {
    plot.querySelector("#mtad-point-" + row.n).classList.toggle("mtad-lit", row.n === number);
  }
}

plot.addEventListener("pointermove", (event) => {
  const point = under(event);
  light(point ? point.row.n : 0);
  plot.style.cursor = point ? "pointer" : "";
});
plot.addEventListener("pointerleave", () => light(0));
plot.addEventListener("click", (event) => {
  const point = under(event);
  if (!point) return;
  active = point.row.n;
  open(point.row.n);
});
plot.addEventListener("focus", () => {
  if (!active && points.length) active = points[0].row.n;
  walk(0);
});
plot.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || !points.length) return;
  if (event.key === "Home") walk(-points.length);
  else if (event.key === "End") walk(points.length);
  else if (event.key in STEPS) walk(STEPS[event.key]);
  else if (event.key === "Enter" || event.key === " ") open(active);
  else return;
  event.preventDefault();
});
new ResizeObserver(() => draw()).observe(chartBox);

// ---------------------------------------------------------------- legend and table
function drawLegend() {
  const seen = new Map(shown.rows.map((row) => [row.method, row.title]));
  const items = [...seen].map(([method, name]) => {
    const item = make("span", "mtad-key");
    item.append(icon(method), make("span", "", name));
    return item;
  });
  items.push(make("span", "mtad-key", "filled, on the line: no other setting is better in both"));
  items.push(make("span", "mtad-key", "point at one for its intervals, click for its runs"));
  const text = items.map((item) => item.textContent).join("|");
  if (legend.dataset.text === text) return;
  legend.dataset.text = text;
  legend.replaceChildren(...items);
}

let lines = [];
let gridOf = "";
function makeTable() {
  const scroll = make("div", "mtad-scroll");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "Figures by setting, scrolls sideways");
  const grid = make("table", "mtad-table");
  grid.append(headings(shown.columns));
  const body = make("tbody");
  lines = shown.rows.map((row) => {
    const line = make("tr");
    const name = make("th");
    name.scope = "row";
    const button = make("button", "mtad-setting");
    button.type = "button";
    const words = make("span", "mtad-setting-words");
    words.append(make("span", "", row.title), make("span", "mtad-note", row.parameters));
    button.append(make("span", "mtad-n", String(row.n)), icon(row.method), words);
    button.addEventListener("click", () => open(row.n));
    name.append(button);
    line.append(name);
    const cells = row.cells.map(() => {
      const cell = make("td");
      const [value, note] = [make("span", "mtad-figure"), make("span", "mtad-note")];
      cell.append(value, note);
      line.append(cell);
      return [value, note];
    });
    line.addEventListener("pointerenter", () => light(row.n));
    line.addEventListener("pointerleave", () => light(0));
    button.addEventListener("focus", () => light(row.n));
    button.addEventListener("blur", () => light(0));
    body.append(line);
    return { line, button, cells };
  });
  grid.append(body);
  scroll.append(grid);
  const foot = make("div", "mtad-foot");
  foot.append(make("span", "mtad-message"));
  for (const [kind, text, type] of [
    ["csv", "Table (CSV)", "text/csv"],
    ["json", "All runs (JSON)", "application/json"],
  ]) {
    const save = make("button", "mtad-save", text);
    save.type = "button";
    save.addEventListener("click", async () => {
      const content = await server.export({ sweep: shown.sweep, kind });
      if (typeof content === "string") saveFile("mtad-sweep." + kind, content, type);
      else forgotten();
    });
    foot.append(save);
  }
  tableBox.replaceChildren(scroll, foot);
}

function headings(names) {
  const line = make("tr");
  for (const name of names) {
    const cell = make("th", "", name);
    cell.scope = "col";
    line.append(cell);
  }
  const head = make("thead");
  head.append(line);
  return head;
}

function fillTable() {
  const shape = shown.sweep + shown.rows.length;
  if (gridOf !== shape) makeTable();
  gridOf = shape;
  shown.rows.forEach((row, k) => {
    const { line, button, cells } = lines[k];
    row.cells.forEach(([value, note], index) => {
      setText(cells[index][0], value);
      setText(cells[index][1], note);
    });
    line.classList.toggle("mtad-failed", Boolean(row.failure));
    line.classList.toggle("mtad-opened", row.n === opened);
    button.setAttribute("aria-expanded", String(row.n === opened));
    button.title = row.failure || "Show the runs behind this point";
  });
}

// ---------------------------------------------------------------- the runs of a setting
async function open(number) {
  if (!shown || !shown.rows || !shown.rows[number - 1]) return;
  opened = number;
  await listRuns(true);
}

async function listRuns(scroll) {
  const number = opened;
  const row = shown.rows[number - 1];
  const sweep = shown.sweep;
  openedDone = shown.done;
  const runs = await server.runs({ sweep, n: number });
  // Another setting may have been opened meanwhile, or this one closed.
  if (!shown || shown.sweep !== sweep || opened !== number) return;
  if (!Array.isArray(runs)) return forgotten();
  fillTable();
  for (const { row: one } of points) {
    const node = plot.querySelector("#mtad-point-" + one.n);
    if (node) node.setAttribute("aria-selected", String(one.n === opened));
  }
  const head = make("div", "mtad-runs-head");
  const name = make("h3", "mtad-title", `${row.title}${row.parameters ? ", " + row.parameters : ""}`);
  name.tabIndex = -1;
  const close = make("button", "mtad-save", "Close");
  close.type = "button";
  close.addEventListener("click", () => {
    opened = 0;
    detail.hidden = true;
    fillTable();
    lines[row.n - 1].button.focus();
  });
  head.append(icon(row.method), name, close);
  const box = make("div", "mtad-scroll");
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", "Runs, scrolls sideways");
  const grid = make("table", "mtad-table");
  grid.append(headings([...shown.run_columns, "trace"]));
  const body = make("tbody");
  for (const run of runs) {
    const line = make("tr");
    const prompt = make("th");
    prompt.scope = "row";
    prompt.append(make("span", "mtad-sweep-prompt", run.text), make("span", "mtad-note", `${run.kind}, ${run.prompt}`));
    line.append(prompt);
    for (const text of run.cells) line.append(make("td", "", text));
    line.append(links(run, sweep, row));
    body.append(line);
  }
  grid.append(body);
  box.append(grid);
  const nothing = make("p", "mtad-note", "No run is finished yet.");
  detail.replaceChildren(head, runs.length ? box : nothing);
  detail.hidden = false;
  if (scroll) {
    detail.scrollIntoView({ block: "nearest" });
    name.focus({ preventScroll: true });
  }
}

function links(run, sweep, row) {
  const cell = make("td", "mtad-links");
  if (!run.key) {
    cell.append(make("span", "mtad-note", "no longer kept"));
    return cell;
  }
  const save = make("button", "mtad-save", "JSON");
  save.type = "button";
  save.setAttribute("aria-label", "Trace of " + run.prompt + " as JSON");
  save.addEventListener("click", async () => {
    const content = await server.trace({ sweep, key: run.key });
    if (typeof content === "string") {
      saveFile(`mtad-${row.method}-${run.prompt}.json`, content, "application/json");
    } else forgotten();
  });
  if (inspectTab()) {
    const look = make("button", "mtad-save", "Inspect");
    look.type = "button";
    look.setAttribute("aria-label", "Inspect the trace of " + run.prompt);
    look.addEventListener("click", () => {
      // The tab's script may not have run yet: it finds the key here, or hears of it.
      document.documentElement.dataset.mtadInspect = run.key;
      inspectTab().click();
      window.dispatchEvent(new CustomEvent("mtad-inspect", { detail: { key: run.key } }));
    });
    cell.append(look);
  }
  cell.append(save);
  return cell;
}

function inspectTab() {
  return [...document.querySelectorAll('button[role="tab"]')].find(
    (button) => button.textContent.trim() === "Inspect"
  );
}

function forgotten() {
  setText(error, "The server no longer has this sweep. What you see stays; Run measures it anew.");
}

// ---------------------------------------------------------------- messages
function read(text) {
  if (typeof text !== "string" || !text) return;
  const message = JSON.parse(text);
  setText(error, message.error || "");
  setText(spoken, message.say || "");
  if (message.sweep === undefined) return;
  if (message.sweep === null) return clear();
  const fresh = !shown || shown.sweep !== message.sweep;
  shown = message;
  if (fresh) {
    opened = active = 0;
    detail.hidden = true;
  }
  hint.hidden = true;
  root.classList.toggle("mtad-sweep-over", !message.active);
  root.dataset.state = message.state;
  setText(status, message.status);
  setText(remaining, `${message.done} of ${message.total}` + (message.remaining ? ", " + message.remaining : ""));
  bar.hidden = false;
  bar.max = message.total;
  bar.value = message.done;
  setText(why, message.energy ? "– " + message.energy : "");
  radios.joules.disabled = Boolean(message.energy);
  if (message.energy && axis === "joules") {
    axis = "perplexity";
    radios.perplexity.checked = true;
  }
  fillList(notes, message.notes);
  fillTable();
  drawLegend();
  draw();
  if (opened && message.done !== openedDone) listRuns(false);
}

function clear() {
  shown = null;
  opened = active = 0;
  points = [];
  gridOf = "";
  for (const node of [status, remaining]) setText(node, "");
  delete root.dataset.state;
  bar.hidden = detail.hidden = chartBox.hidden = true;
  hint.hidden = false;
  tableBox.replaceChildren();
  notes.replaceChildren();
}

watch("value", () => read(props.value));
read(props.value);
