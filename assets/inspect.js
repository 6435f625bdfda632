// The Inspect tab: draws what mtad/ui/inspect_tab.py sends of a trace, pass by pass.
//
// Runs behind dom.js as the js_on_load of a gr.HTML component: `element`, `props`, `server`,
// `trigger` and `watch` are its arguments. Texts of models and files reach the page through
// textContent only. The strip and the slider know all passes as short columns of numbers; the
// passes themselves are asked for a few at a time and kept.

const root = element.querySelector(".mtad-inspect");
const MAX_FILE_BYTES = 16 * 1024 * 1024;
const MAX_KEPT_CHUNKS = 64;
const GONE =
  "The server no longer keeps this trace: it keeps the latest ones, and none over a restart. " +
  "Choose another one, or open its file.";
const AWAY = "The server cannot be reached. What is shown stays; try again in a moment.";
const CLASSES = { a: "mtad-a", b: "mtad-b", c: "mtad-c", s: "mtad-s" };

// The trace on show; null before the first. `tau`: {index} into the slider's values, or
// {index: -1, lengths, …} for one that was typed.
let open = null;
let chosenByHand = false;
let current = 0;
let shownView = null;
let activeNode = 0;
let frame = 0;

// ---------------------------------------------------------------- frame
const error = make("div", "mtad-error");
error.setAttribute("role", "alert");
const spoken = make("div", "mtad-hidden");
spoken.setAttribute("role", "status");
spoken.setAttribute("aria-live", "polite");

const picker = make("select", "mtad-pick");
picker.id = "mtad-pick";
const pickerLabel = make("label", "mtad-pick-label", "Trace");
pickerLabel.htmlFor = picker.id;
const fileInput = make("input", "mtad-hidden");
fileInput.type = "file";
fileInput.accept = ".json,.jsonl,application/json";
fileInput.tabIndex = -1;
fileInput.setAttribute("aria-hidden", "true");
const fileButton = button("Open a file …", () => fileInput.click());
fileButton.title = "A trace as JSON, several in a list, or one a line; at most 16 MB.";
const saveButton = button("Trace (JSON)", save);
saveButton.title = "Downloads the trace that is shown, measured bounds included.";
const bar = make("div", "mtad-bar");
bar.append(pickerLabel, picker, fileButton, fileInput, saveButton);

const head = make("header", "mtad-trace-head");
const stripBox = make("section", "mtad-section");
const whatIfBox = make("section", "mtad-section mtad-whatif");
const passBox = make("section", "mtad-section mtad-pass");
const body = make("div", "mtad-inspect-body");
body.hidden = true;
body.append(head, stripBox, passBox, whatIfBox);
root.replaceChildren(error, bar, body, spoken);

function button(text, act) {
  const node = make("button", "mtad-save", text);
  node.type = "button";
  node.addEventListener("click", act);
  return node;
}

function say(message) {
  setText(error, message);
}

picker.addEventListener("change", () => {
  chosenByHand = true;
  openTrace(picker.value);
});

// ---------------------------------------------------------------- files
fileInput.addEventListener("change", () => {
  if (fileInput.files.length) takeFile(fileInput.files[0]);
  fileInput.value = "";
});
root.addEventListener("dragover", (event) => {
  if ([...event.dataTransfer.types].includes("Files")) event.preventDefault();
});
root.addEventListener("drop", (event) => {
  if (!event.dataTransfer.files.length) return;
  event.preventDefault();
  takeFile(event.dataTransfer.files[0]);
});

async function takeFile(file) {
  say("");
  if (file.size > MAX_FILE_BYTES) {
    say("The file has " + file.size.toLocaleString("en") + " bytes, but this page reads at most " +
      MAX_FILE_BYTES.toLocaleString("en") + ".");
    return;
  }
  trigger("open_file", { name: file.name, text: await file.text() });
}

async function save() {
  const text = await ask("save_trace", {});
  if (text !== null) saveFile("mtad-trace-" + open.key.replace(/[^0-9a-z]+/gi, "-").slice(0, 24) + ".json", text, "application/json");
}

// An answer of the server about the open trace, as text; null if there is none, and then why is
// on the page.
async function ask(name, request) {
  let text;
  try {
    text = await server[name]({ key: open ? open.key : "", ...request });
  } catch {
    say(AWAY);
    return null;
  }
  if (typeof text !== "string") {
    say(GONE);
    return null;
  }
  return text;
}

async function askView(name, request) {
  const text = await ask(name, request);
  if (text === null) return null;
  const view = JSON.parse(text);
  if (view.error) {
    say(view.error);
    return null;
  }
  return view;
}

// ---------------------------------------------------------------- opening
let opening = "";

async function openTrace(key, index) {
  if (!key) return;
  say("");
  opening = key;
  const view = await askView("open_trace", { key });
  if (opening !== key) return;
  if (!view) {
    if (open) picker.value = open.key;
    return;
  }
  open = view;
  open.chunks = new Map([[view.from / view.chunk, view.passes]]);
  open.asked = new Set();
  open.tau = { index: view.what_if.why ? -1 : view.what_if.recorded };
  picker.value = key;
  current = -1;
  shownView = null;
  body.hidden = false;
  drawHead();
  drawStripFrame();
  drawWhatIf();
  choose(index === undefined ? view.strip.start : index, true);
}

function drawHead() {
  const view = open.head;
  const line = make("div", "mtad-head");
  const title = make("h3", "mtad-title", view.title);
  title.title = view.summary;
  const badge = make("span", view.lossless ? "mtad-badge mtad-exact" : "mtad-badge");
  badge.textContent = view.lossless ? "= lossless" : "≈ not lossless";
  line.append(title, badge, make("span", "mtad-state", view.summary));
  const meters = make("dl", "mtad-meters");
  for (const meter of view.meters) {
    const cell = make("div", "mtad-meter");
    cell.dataset.meter = meter.id;
    cell.title = meter.title;
    cell.append(make("dt", "", meter.label), make("dd", "mtad-value", meter.value), make("dd", "mtad-note", meter.note));
    meters.append(cell);
  }
  const more = make("details", "mtad-more");
  const summary = make("summary", "", "Prompt, configuration, machine, notes");
  const prompt = make("pre", "mtad-prompt", view.prompt || "no text");
  prompt.dir = "auto";
  prompt.tabIndex = 0;
  prompt.setAttribute("role", "region");
  prompt.setAttribute("aria-label", "Prompt");
  const remarks = make("ul", "mtad-notes");
  fillList(remarks, view.remarks);
  more.append(summary, prompt, pairs(view.config), pairs(view.machine), remarks);
  const notes = make("ul", "mtad-notes");
  fillList(notes, view.notes);
  head.replaceChildren(line, meters, notes, more);
}

function pairs(list) {
  const box = make("dl", "mtad-pairs");
  for (const [name, value] of list) {
    const cell = make("div");
    cell.append(make("dt", "", name), make("dd", "", value));
    box.append(cell);
  }
  return box;
}

// ---------------------------------------------------------------- strip
const HEIGHT = 76;
const BASE = HEIGHT + 16;
const strip = {};

function drawStripFrame() {
  const count = open.head.count;
  const title = make("h4", "mtad-subtitle", "Target passes");
  title.id = "mtad-strip-title";
  const hint = make("span", "mtad-state", "one cell each, height = tokens emitted; walk with ← → Home End");
  const line = make("div", "mtad-head");
  line.append(title, hint);
  strip.scroll = make("div", "mtad-strip");
  strip.scroll.tabIndex = 0;
  strip.scroll.setAttribute("role", "slider");
  strip.scroll.setAttribute("aria-labelledby", title.id);
  strip.scroll.setAttribute("aria-valuemin", "1");
  strip.scroll.setAttribute("aria-valuemax", String(count));
  strip.spacer = make("div", "mtad-strip-all");
  strip.svg = svg("svg", { height: BASE + 20, "aria-hidden": "true" });
  strip.spacer.append(strip.svg);
  strip.scroll.append(strip.spacer);
  strip.scroll.addEventListener("scroll", later);
  strip.scroll.addEventListener("keydown", onStripKey);
  strip.scroll.addEventListener("click", (event) => {
    const x = event.clientX - strip.scroll.getBoundingClientRect().left + strip.scroll.scrollLeft;
    choose(Math.max(0, Math.min(count - 1, Math.floor(x / strip.pitch))));
  });
  // Pointers need these; the keyboard has its arrows, so they are no further tab stops.
  const step = (text, label, move) => {
    const node = button(text, () => choose(move()));
    node.tabIndex = -1;
    node.setAttribute("aria-label", label);
    node.title = label;
    return node;
  };
  strip.place = make("span", "mtad-place-text");
  const walk = make("div", "mtad-walk");
  walk.append(
    step("‹", "previous pass", () => Math.max(0, current - 1)),
    strip.place,
    step("›", "next pass", () => Math.min(count - 1, current + 1))
  );
  if (open.strip.rescued.length) {
    const next = step("next rescued dip ◆", "next pass in which a later token rescues an early dip (key: d)", nextRescue);
    walk.append(next);
  }
  walk.append(legend());
  strip.table = make("details", "mtad-more");
  strip.table.addEventListener("toggle", fillStripTable);
  stripBox.replaceChildren(line, strip.scroll, walk);
  strip.patterns = stripPatterns();
}

function nextRescue() {
  const list = open.strip.rescued;
  const after = list.find((index) => index > current);
  return after === undefined ? (list.length ? list[0] : current) : after;
}

function stripPatterns() {
  const defs = svg("defs", {});
  const hatch = (id, path, className) => {
    const pattern = svg("pattern", { id, width: 5, height: 5, patternUnits: "userSpaceOnUse" });
    pattern.append(svg("rect", { width: 5, height: 5, class: className }), svg("path", { d: path, class: "mtad-hatch" }));
    defs.append(pattern);
  };
  hatch("mtad-fill-b", "M-1 1L1 -1M0 5L5 0M4 6L6 4", "mtad-ground-b");
  hatch("mtad-fill-c", "M0 2.5H5", "mtad-ground-n");
  hatch("mtad-fill-s", "M2.5 1.5V3.5", "mtad-ground-n");
  return defs;
}

function legend() {
  const box = make("span", "mtad-strip-key");
  const swatch = (className, name, title) => {
    const item = make("span", "mtad-key");
    const sign = svg("svg", { width: 14, height: 14, "aria-hidden": "true" });
    sign.append(svg("rect", { x: 1, y: 1, width: 12, height: 12, class: className }));
    item.append(sign, make("span", "", name));
    item.title = title;
    box.append(item);
  };
  const kinds = open.strip.kinds;
  if (open.strip.accepted.some((count) => count)) swatch("mtad-cell-a", "accepted", "from the draft, confirmed by the target");
  if (kinds.includes("b")) swatch("mtad-cell-b", "bonus", "added by the target's own pass");
  if (kinds.includes("c")) swatch("mtad-cell-c", "corrected", "in the place of a rejected token");
  if (kinds.includes("s")) swatch("mtad-cell-s", "sampled", "written by the target");
  if (!open.what_if.why) swatch("mtad-cell-if", "what if", "accepted at the τ of the slider, and the target's token");
  return box;
}

function onStripKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const last = open.head.count - 1;
  const page = Math.max(2, Math.floor(strip.scroll.clientWidth / strip.pitch / 2));
  const moves = {
    ArrowRight: current + 1, ArrowDown: current + 1, ArrowLeft: current - 1, ArrowUp: current - 1,
    PageDown: current + page, PageUp: current - page, Home: 0, End: last,
    d: event.shiftKey ? current : nextRescue(),
  };
  if (!(event.key in moves)) return;
  event.preventDefault();
  choose(Math.max(0, Math.min(last, moves[event.key])));
}

// What the slider's τ, or a typed one, accepts in a pass.
function whatIfLength(index) {
  const { tau } = open;
  if (tau.lengths) return tau.lengths[index];
  let length = 0;
  for (const rank of open.what_if.ranks[index]) if (rank > tau.index) length += 1;
  return length;
}

function whatIfShown() {
  return !open.what_if.why && open.tau.index !== open.what_if.recorded;
}

function drawStrip() {
  const { emitted, accepted, kinds, rescued, top } = open.strip;
  const count = open.head.count;
  const width = strip.scroll.clientWidth;
  if (!width || !count) return;
  strip.pitch = Math.max(7, Math.min(26, Math.floor(width / count)));
  strip.spacer.style.width = Math.max(width, count * strip.pitch) + "px";
  const left = strip.scroll.scrollLeft;
  const first = Math.max(0, Math.floor(left / strip.pitch) - 1);
  const last = Math.min(count - 1, Math.ceil((left + width) / strip.pitch));
  const unit = HEIGHT / top;
  const gap = unit >= 5 ? 1.5 : 0;
  const bar = strip.pitch - (strip.pitch > 12 ? 5 : 2);
  const parts = { a: "", b: "", c: "", s: "", "-": "" };
  let same = "", differs = "", marks = "", ticks = [];
  const rect = (x, y, w, h) => "M" + x.toFixed(1) + " " + y.toFixed(1) + "h" + w.toFixed(1) + "v" + h.toFixed(1) + "h" + (-w).toFixed(1) + "z";
  const every = strip.pitch > 18 ? 5 : strip.pitch > 9 ? 10 : 20;
  const rescuedSet = open.rescuedSet || (open.rescuedSet = new Set(rescued));
  for (let index = first; index <= last; index += 1) {
    const x = index * strip.pitch - left + (strip.pitch - bar) / 2;
    const tall = unit >= 3;
    if (tall) {
      for (let k = 0; k < emitted[index]; k += 1) {
        const kind = k < accepted[index] ? "a" : kinds[index];
        parts[kind] += rect(x, BASE - (k + 1) * unit + gap / 2, bar, unit - gap);
      }
    } else {
      const a = accepted[index] * unit;
      if (a) parts.a += rect(x, BASE - a, bar, a);
      const rest = (emitted[index] - accepted[index]) * unit;
      if (rest) parts[kinds[index]] += rect(x, BASE - a - rest, bar, rest);
    }
    if (whatIfShown()) {
      const length = whatIfLength(index);
      const h = (length + 1) * unit;
      const box = rect(x - 1.5, BASE - h - 1, bar + 3, h + 1);
      if (length === whatIfRecorded(index)) same += box;
      else differs += box;
    }
    if (rescuedSet.has(index)) {
      const y = 7;
      const c = x + bar / 2;
      marks += "M" + c + " " + (y - 4) + "l4 4l-4 4l-4 -4z";
    }
    if (index === 0 || (index + 1) % every === 0) ticks.push([x + bar / 2, index + 1]);
  }
  const nodes = [strip.patterns];
  if (current >= first && current <= last) {
    const x = current * strip.pitch - left;
    nodes.push(svg("rect", { x: x + 0.5, y: 0.5, width: strip.pitch - 1, height: BASE + 3, rx: 3, class: "mtad-cell-now" }));
  }
  for (const kind of "abcs") if (parts[kind]) nodes.push(svg("path", { d: parts[kind], class: "mtad-cell-" + kind }));
  if (same) nodes.push(svg("path", { d: same, class: "mtad-cell-if mtad-cell-same" }));
  if (differs) nodes.push(svg("path", { d: differs, class: "mtad-cell-if" }));
  if (marks) nodes.push(svg("path", { d: marks, class: "mtad-rescue-mark" }));
  nodes.push(svg("path", { d: "M0 " + (BASE + 0.5) + "H" + width, class: "mtad-axis" }));
  for (const [x, number] of ticks) {
    nodes.push(svg("text", { x: Math.max(4, x), y: BASE + 16, class: "mtad-tick", "text-anchor": x < 8 ? "start" : "middle" }, String(number)));
  }
  strip.svg.setAttribute("width", width);
  strip.svg.replaceChildren(...nodes);
}

function whatIfRecorded(index) {
  let length = 0;
  for (const rank of open.what_if.ranks[index]) if (rank > open.what_if.recorded) length += 1;
  return length;
}

// Draws the strip once before the next frame.
function later() {
  if (!frame) frame = requestAnimationFrame(() => {
    frame = 0;
    if (!open) return;
    drawStrip();
    fillStripTable();
  });
}

// The strip as a table, only while it is unfolded: the passes around the chosen one.
const TABLE_PASSES = 100;
const KIND_NAMES = { b: "bonus", c: "corrected", s: "sampled", "-": "nothing" };

function fillStripTable() {
  const { table } = strip;
  if (!table.firstChild) table.append(make("summary", "", "The passes in numbers"));
  if (!table.open) {
    if (table.children.length > 1) table.lastChild.remove();
    return;
  }
  const { accepted, offered, emitted, kinds, rescued } = open.strip;
  const count = open.head.count;
  const first = Math.max(0, Math.min(current - TABLE_PASSES / 2, count - TABLE_PASSES));
  const headings = ["pass", "offered", "accepted", "added by the target", "emitted", "early dip rescued"];
  const judged = !open.what_if.why;
  if (judged) headings.push("accepted at τ = " + tauText());
  const rows = [];
  for (let index = first; index < Math.min(count, first + TABLE_PASSES); index += 1) {
    const row = [index + 1, offered[index], accepted[index], KIND_NAMES[kinds[index]], emitted[index], rescued.includes(index) ? "◆ yes" : "no"];
    if (judged) row.push(whatIfLength(index));
    rows.push(row.map(String));
  }
  const scroll = make("div", "mtad-scroll mtad-strip-table");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "Passes in numbers, scrolls");
  scroll.append(grid(headings, rows));
  if (table.children.length > 1) {
    const { scrollTop } = table.lastChild;
    table.lastChild.replaceWith(scroll);
    scroll.scrollTop = scrollTop;
  } else table.append(scroll);
}

function revealCell() {
  const x = current * strip.pitch;
  const { scrollLeft, clientWidth } = strip.scroll;
  if (x < scrollLeft + 20) strip.scroll.scrollLeft = Math.max(0, x - clientWidth / 3);
  else if (x + strip.pitch > scrollLeft + clientWidth - 20) strip.scroll.scrollLeft = x - (2 * clientWidth) / 3;
}

// ---------------------------------------------------------------- choosing a pass
let wanted = 0;

function choose(index, fresh) {
  if (!open.head.count) {
    passBox.replaceChildren(make("p", "mtad-hint", "This trace has no pass: the run ended before its first one."));
    stripBox.hidden = true;
    return;
  }
  stripBox.hidden = false;
  if (index === current && !fresh) return;
  current = index;
  if (!strip.pitch || fresh) drawStrip();
  revealCell();
  later();
  const count = open.head.count;
  setText(strip.place, "pass " + (index + 1).toLocaleString("en") + " of " + count.toLocaleString("en"));
  strip.scroll.setAttribute("aria-valuenow", String(index + 1));
  const { accepted, offered, emitted } = open.strip;
  strip.scroll.setAttribute(
    "aria-valuetext",
    "pass " + (index + 1) + " of " + count + ": " +
      (offered[index] ? accepted[index] + " of " + offered[index] + " accepted, " : "") +
      emitted[index] + " tokens emitted" +
      (open.strip.rescued.includes(index) ? ", a later token rescues an early dip" : "")
  );
  if (!wanted) wanted = requestAnimationFrame(() => {
    wanted = 0;
    showPass();
  });
}

function viewOf(index) {
  const chunk = open.chunks.get(Math.floor(index / open.chunk));
  return chunk ? chunk[index % open.chunk] : undefined;
}

// Draws the chosen pass if it is here, else asks for it; asks for its neighbours beforehand.
function showPass() {
  const view = viewOf(current);
  passBox.classList.toggle("mtad-waiting", !view);
  if (view && view !== shownView) {
    shownView = view;
    activeNode = 0;
    drawPass(view);
  } else if (view) drawWhatIfInPass();
  const here = Math.floor(current / open.chunk);
  fetchChunk(here);
  const near = current % open.chunk;
  if (near >= open.chunk - 3) fetchChunk(here + 1);
  if (near < 3) fetchChunk(here - 1);
}

async function fetchChunk(chunk) {
  const from = chunk * open.chunk;
  if (from < 0 || from >= open.head.count || open.chunks.has(chunk) || open.asked.has(chunk)) return;
  const mine = open;
  mine.asked.add(chunk);
  const view = await askView("passes", { from });
  mine.asked.delete(chunk);
  if (!view || mine !== open) return;
  open.chunks.set(chunk, view.passes);
  if (open.chunks.size > MAX_KEPT_CHUNKS) open.chunks.delete(open.chunks.keys().next().value);
  if (Math.floor(current / open.chunk) === chunk) showPass();
}

// ---------------------------------------------------------------- what if
const slider = {};
const CURVE = 170;

function drawWhatIf() {
  const data = open.what_if;
  slider.box = make("div", "mtad-tau");
  stripBox.append(slider.box, strip.table);
  whatIfBox.hidden = Boolean(data.why);
  if (data.why) {
    slider.box.append(make("span", "mtad-details-hint", data.why));
    return;
  }
  slider.range = make("input", "mtad-range");
  slider.range.type = "range";
  slider.range.min = "0";
  slider.range.max = String(data.taus.length - 1);
  slider.range.step = "1";
  slider.range.setAttribute("aria-label", "what-if τ, the acceptance threshold, on a log scale");
  slider.range.addEventListener("input", () => setTau({ index: Number(slider.range.value) }));
  slider.number = make("input", "mtad-number");
  slider.number.type = "text";
  slider.number.inputMode = "decimal";
  slider.number.autocomplete = "off";
  slider.number.setAttribute("aria-label", "what-if τ as a number");
  slider.number.addEventListener("change", () => typeTau(slider.number.value));
  slider.reset = button("recorded τ", () => setTau({ index: data.recorded }));
  slider.result = make("p", "mtad-tau-result");
  slider.box.append(make("span", "mtad-tau-name", "What if τ ="), slider.number, slider.range, slider.reset, slider.result);

  const title = make("h4", "mtad-subtitle", "Expected tokens per pass over τ");
  const line = make("div", "mtad-head");
  line.append(title);
  slider.curve = svg("svg", { height: CURVE, role: "img", "aria-label": "Expected tokens per pass against τ" });
  const picture = make("div", "mtad-curve-box");
  picture.append(slider.curve);
  const side = make("div");
  const table = make("details", "mtad-more");
  table.append(make("summary", "", "The same in numbers"), grid(["τ", "tokens per pass"], data.table));
  side.append(
    make("p", "", "Each recorded draft is judged anew at every τ: its accepted length and the target's own token, on average over all passes."),
    make("p", "mtad-details-hint", "Per pass: a changed choice would change every draft after it, so this is no forecast of another run."),
    table
  );
  const columns = make("div", "mtad-columns");
  columns.append(picture, side);
  whatIfBox.replaceChildren(line, columns);
  showTau();
}

function grid(headings, rows) {
  const table = make("table", "mtad-grid");
  const top = make("tr");
  for (const name of headings) {
    const cell = make("th", "", name);
    cell.scope = "col";
    top.append(cell);
  }
  const thead = make("thead");
  thead.append(top);
  const tbody = make("tbody");
  for (const cells of rows) {
    const line = make("tr");
    cells.forEach((text, index) => {
      const cell = make(index ? "td" : "th", "", text);
      if (!index) cell.scope = "row";
      line.append(cell);
    });
    tbody.append(line);
  }
  table.append(thead, tbody);
  return table;
}

async function typeTau(text) {
  const value = Number(text.replace(",", "."));
  const mine = open;
  say("");
  const view = await askView("what_if", { tau: text.trim() === "" ? null : value });
  if (mine !== open) return;
  if (!view) {
    slider.number.value = tauText();
    return;
  }
  // A τ between two of the slider's is counted by the server; the slider stands at the nearest.
  const { logs } = open.what_if;
  const nearest = logs.reduce((best, log, index) =>
    Math.abs(log - view.log) < Math.abs(logs[best] - view.log) ? index : best, 0);
  if (open.what_if.taus[nearest] === view.tau) setTau({ index: nearest });
  else {
    setTau({ ...view, index: -1 });
    slider.range.value = String(nearest);
  }
}

function setTau(tau) {
  open.tau = tau;
  showTau();
  later();
  drawWhatIfInPass();
}

function tauText() {
  return open.tau.tau || open.what_if.taus[open.tau.index];
}

function tauLog() {
  return open.tau.lengths ? open.tau.log : open.what_if.logs[open.tau.index];
}

function expectedNow() {
  return open.tau.lengths ? [open.tau.expected, open.tau.expected_text]
    : [open.what_if.expected[open.tau.index], open.what_if.expected_texts[open.tau.index]];
}

function showTau() {
  const data = open.what_if;
  if (open.tau.index >= 0) slider.range.value = String(open.tau.index);
  const text = tauText();
  if (document.activeElement !== slider.number || open.tau.lengths) slider.number.value = text;
  const [value, valueText] = expectedNow();
  const recorded = data.expected[data.recorded];
  slider.range.setAttribute("aria-valuetext", "τ " + text + ", " + valueText + " tokens per pass");
  const parts = [make("b", "", valueText), " tokens per pass"];
  if (!whatIfShown()) parts.push(" at the recorded τ");
  else {
    let changed = 0;
    for (let index = 0; index < open.head.count; index += 1) {
      if (whatIfLength(index) !== whatIfRecorded(index)) changed += 1;
    }
    const difference = value - recorded;
    const sign = difference < 0 ? "−" : "+";
    parts.push(" (" + sign + Math.abs(difference).toFixed(2) + " against the recorded τ = " + data.taus[data.recorded] +
      "); the length changes in " + changed.toLocaleString("en") + " of " + open.head.count.toLocaleString("en") + " passes, each taken alone");
  }
  slider.result.replaceChildren(...parts);
  slider.reset.disabled = !whatIfShown();
  drawCurve();
}

function drawCurve() {
  const data = open.what_if;
  if (data.why) return;
  const width = slider.curve.parentElement.clientWidth;
  if (!width) return;
  const height = CURVE, left = 34, right = 12, top = 12, bottom = 40;
  const low = 1, high = Math.max(2, Math.ceil(Math.max(...data.expected) - 1e-9));
  const px = (x) => left + x * (width - left - right);
  const py = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
  const nodes = [];
  const rows = high - low <= 6 ? 1 : Math.ceil((high - low) / 5);
  for (let value = low; value <= high; value += rows) {
    nodes.push(svg("path", { d: "M" + left + " " + py(value) + "H" + (width - right), class: value === low ? "mtad-axis" : "mtad-gridline" }));
    nodes.push(svg("text", { x: left - 7, y: py(value) + 4, "text-anchor": "end", class: "mtad-tick" }, String(value)));
  }
  for (const [text, x] of data.ticks) {
    nodes.push(svg("text", { x: px(x), y: height - 24, "text-anchor": x > 0.97 ? "end" : x < 0.03 ? "start" : "middle", class: "mtad-tick" }, text));
    nodes.push(svg("path", { d: "M" + px(x) + " " + (height - bottom) + "v4", class: "mtad-axis" }));
  }
  nodes.push(svg("text", { x: left, y: height - 4, class: "mtad-tick" }, "τ, log scale; ● recorded" + (whatIfShown() ? ", ○ what if" : "")));
  nodes.push(svg("polyline", { points: data.x.map((x, k) => px(x).toFixed(1) + "," + py(data.expected[k]).toFixed(1)).join(" "), class: "mtad-curve" }));
  const r = data.recorded;
  nodes.push(svg("path", { d: "M" + px(data.x[r]) + " " + py(low) + "V" + py(data.expected[r]), class: "mtad-recorded-line" }));
  nodes.push(svg("circle", { cx: px(data.x[r]), cy: py(data.expected[r]), r: 4, class: "mtad-recorded-dot" }));
  if (whatIfShown()) {
    const [value] = expectedNow();
    const logs = data.logs;
    const span = logs[logs.length - 1] - logs[0] || 1;
    const x = px(Math.max(0, Math.min(1, (tauLog() - logs[0]) / span)));
    nodes.push(svg("path", { d: "M" + x + " " + py(low) + "V" + py(value), class: "mtad-if-line" }));
    nodes.push(svg("circle", { cx: x, cy: py(value), r: 5, class: "mtad-if-dot" }));
  }
  slider.curve.setAttribute("width", width);
  slider.curve.replaceChildren(...nodes);
}

// ---------------------------------------------------------------- one pass
const pass = {};

function drawPass(view) {
  const title = make("h4", "mtad-subtitle", view.title);
  const facts = make("span", "mtad-facts");
  for (const [name, figure] of view.facts) {
    const fact = make("span", "mtad-fact", name + " ");
    fact.append(make("b", "", figure));
    facts.append(fact);
  }
  const line = make("div", "mtad-head");
  line.append(title, facts);
  const verdict = make("p", "mtad-verdict", view.verdict);
  if (view.chart && view.chart.dips && view.chart.dips.length) verdict.classList.add("mtad-rescued");
  pass.stage = make("div", "mtad-stage");
  pass.ifLine = make("p", "mtad-if-text");
  pass.details = make("div", "mtad-node-details");
  pass.details.id = "mtad-node-details";
  const lower = make("div", "mtad-columns");
  lower.append(alternatives(view), bound(view));
  passBox.replaceChildren(line, context(view.context), verdict, pass.stage, pass.ifLine, pass.details);
  if (view.rows.length) passBox.append(numbers(view));
  passBox.append(lower);
  drawStage();
  drawWhatIfInPass();
  activate(0, false);
}

function context([before, tokens, after]) {
  const box = make("p", "mtad-context");
  box.dir = "auto";
  // A long text scrolls.
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "The text around this pass");
  box.append(make("bdi", "mtad-dim", before));
  for (const [kind, text] of tokens) {
    const token = make("span", "mtad-tok " + CLASSES[kind], text);
    if (text === "") token.classList.add("mtad-void");
    else if (/^[\r\n]+$/.test(text)) token.classList.add("mtad-break");
    box.append(token);
  }
  box.append(make("bdi", "mtad-dim", after));
  return box;
}

function drawWhatIfInPass() {
  if (!shownView || !pass.ifLine || shownView.i !== current) return;
  if (!whatIfShown() || !shownView.rows.length) setText(pass.ifLine, "");
  else {
    const length = whatIfLength(current);
    setText(pass.ifLine, "At τ = " + tauText() + " this pass would accept " + length + " of " +
      open.strip.offered[current] + (length === whatIfRecorded(current) ? ", as recorded." : " instead of " + whatIfRecorded(current) + "."));
  }
  if (shownView.chart && shownView.chart.kind === "ratio") drawChart();
}

// ---------------------------------------------------------------- stage: tree above chart
// Both share their columns: a token stands above its own point.
const BOX = 46, PITCH = 60, ROOT = 104, CHART = 244;

function drawStage() {
  const view = shownView;
  const depth = Math.max(0, ...view.rows.map((row) => row.d));
  const end = view.rows.filter((row) => row.s === "accepted").length;
  const columns = Math.max(depth, end + view.final.length, 1);
  const room = passBox.clientWidth - 4;
  const column = Math.max(154, Math.min(290, Math.floor((room - ROOT - 8) / columns)));
  const lines = Math.max(1, ...view.rows.map((row) => row.y + 1));
  pass.size = { depth, end, columns, column, lines, width: Math.max(room - 2, ROOT + columns * column + 8) };
  pass.stage.replaceChildren();
  pass.stage.style.setProperty("--mtad-stage-width", pass.size.width + "px");
  const inner = make("div", "mtad-stage-inner");
  inner.append(drawTree(view));
  pass.chart = null;
  if (view.chart) {
    pass.chart = svg("svg", { width: pass.size.width, height: CHART, role: "img" });
    pass.chart.setAttribute("aria-label", view.verdict);
    inner.append(pass.chart);
  }
  pass.stage.append(inner);
  if (pass.chart) drawChart();
}

const boxX = (d) => ROOT + (d - 1) * pass.size.column + 20;
const boxWidth = () => Math.min(176, pass.size.column - 24);
const middle = (d) => (d ? boxX(d) + boxWidth() / 2 : 52);

function drawTree(view) {
  const { width, lines, end } = pass.size;
  const height = lines * PITCH + 8;
  const holder = make("div", "mtad-tree");
  holder.tabIndex = 0;
  holder.setAttribute("role", "tree");
  holder.setAttribute("aria-label", "Draft of this pass: walk with the arrow keys");
  const picture = svg("svg", { width, height, role: "none" });
  const y = (line) => 6 + line * PITCH;
  const edges = { accepted: "", other: "" };
  // Siblings share a trunk in the gap before their column.
  const elbow = (x1, y1, x2, y2) => {
    const trunk = x2 - 13;
    return y1 === y2 ? "M" + x1 + " " + y1 + "H" + x2
      : "M" + x1 + " " + y1 + "H" + (trunk - 6) + "Q" + trunk + " " + y1 + " " + trunk + " " + (y1 + 6) +
        "V" + (y2 - 6) + "Q" + trunk + " " + y2 + " " + (trunk + 6) + " " + y2 + "H" + x2;
  };
  const rightOf = (row) => (row < 0 ? 96 : boxX(view.rows[row].d) + boxWidth());
  const lineOf = (row) => (row < 0 ? 0 : view.rows[row].y);
  view.rows.forEach((row) => {
    const path = elbow(rightOf(row.p), y(lineOf(row.p)) + BOX / 2, boxX(row.d), y(row.y) + BOX / 2);
    edges[row.s === "accepted" ? "accepted" : "other"] += path;
  });
  let from = [end ? boxX(end) + boxWidth() : 96, y(0) + BOX / 2];
  let finalEdges = "";
  view.final.forEach((_, k) => {
    finalEdges += "M" + from[0] + " " + from[1] + "H" + boxX(end + 1 + k);
    from = [boxX(end + 1 + k) + boxWidth(), from[1]];
  });
  picture.append(
    svg("path", { d: edges.other, class: "mtad-edge" }),
    svg("path", { d: edges.accepted, class: "mtad-edge mtad-edge-a" }),
    svg("path", { d: finalEdges, class: "mtad-edge mtad-edge-f" })
  );
  const before = svg("svg", { x: 8, y: y(0), width: 88, height: BOX, role: "none" });
  before.append(svg("rect", { x: 0.75, y: 0.75, width: 86.5, height: BOX - 1.5, rx: 7, class: "mtad-box mtad-box-root" }));
  before.append(svg("text", { x: 9, y: 19, class: "mtad-node-text" }, fitting(view.root, 76)));
  before.append(svg("text", { x: 9, y: 37, class: "mtad-node-figures" }, "so far"));
  picture.append(before);
  pass.nodes = view.rows.map((row, index) => node(row, index, view, boxX(row.d), y(row.y)));
  view.final.forEach((entry, k) => pass.nodes.push(finalNode(entry, boxX(end + 1 + k), y(0), end + 1 + k)));
  picture.append(...pass.nodes);
  holder.append(picture);
  pass.tree = holder;
  holder.addEventListener("keydown", onTreeKey);
  const at = (event) => {
    const found = event.target instanceof Element ? event.target.closest(".mtad-node") : null;
    if (found) activate(pass.nodes.indexOf(found), false);
  };
  holder.addEventListener("pointerover", at);
  holder.addEventListener("click", at);
  return holder;
}

function node(row, index, view, x, y) {
  const kind = row.s === "accepted" ? "a" : row.s === "rejected" ? "x" : "o";
  const group = svg("g", { class: "mtad-node mtad-node-" + kind, id: "mtad-node-" + index, role: "treeitem", "aria-level": row.d, "aria-selected": "false" });
  group.setAttribute("aria-label", row.t + ", " + row.s + ", depth " + row.d + ", " +
    view.columns.map((name, k) => name + " " + (k < row.c.length ? row.c[k] : row.w)).join(", "));
  const box = svg("svg", { x, y, width: boxWidth(), height: BOX, role: "none" });
  box.append(svg("rect", { x: 1, y: 1, width: boxWidth() - 2, height: BOX - 2, rx: 7, class: "mtad-box" }));
  const mark = dropped(row, view) ? "" : row.v === true ? "✓" : row.v === false ? "✗" : "";
  const clip = svg("svg", { x: 0, y: 0, width: boxWidth() - (mark ? 24 : 6), height: 26, role: "none" });
  clip.append(svg("text", { x: 10, y: 19, class: "mtad-node-text" }, fitting(row.t, boxWidth() - (mark ? 34 : 16))));
  box.append(clip, svg("text", { x: 10, y: 37, class: "mtad-node-figures" }, "p " + row.c[2] + "  q " + row.c[3]));
  if (mark) box.append(svg("text", { x: boxWidth() - 9, y: 19, "text-anchor": "end", class: "mtad-node-mark" }, mark));
  if (view.chart && view.chart.reference === index) {
    box.append(svg("text", { x: boxWidth() - 9, y: 37, "text-anchor": "end", class: "mtad-node-figures" }, "ref"));
  }
  group.append(box);
  return group;
}

// It passed its own test, but an earlier token had been rejected.
const dropped = (row, view) => row.v === true && row.s !== "accepted" && view.chart !== null && view.chart.kind === "tests";

// As much of a text as a box of this width has room for; a wide script is clipped by the box.
function fitting(text, width) {
  const characters = Array.from(text);
  const most = Math.max(3, Math.floor(width / 8.3));
  return characters.length <= most ? text : characters.slice(0, most - 1).join("") + "…";
}

function finalNode([kind, text, name, logprob], x, y, depth) {
  const group = svg("g", { class: "mtad-node mtad-node-final mtad-node-" + kind, role: "treeitem", "aria-level": depth, "aria-selected": "false", id: "mtad-node-final-" + depth });
  group.setAttribute("aria-label", text + ", " + name + " by the target, log p " + logprob);
  group.dataset.final = [text, name, logprob].join("\u0000");
  const box = svg("svg", { x, y, width: boxWidth(), height: BOX, role: "none" });
  box.append(svg("rect", { x: 1, y: 1, width: boxWidth() - 2, height: BOX - 2, rx: 7, class: "mtad-box" }));
  box.append(svg("rect", { x: 4, y: 4, width: boxWidth() - 8, height: BOX - 8, rx: 4.5, class: "mtad-box-inner" }));
  const clip = svg("svg", { x: 0, y: 0, width: boxWidth() - 8, height: 26, role: "none" });
  clip.append(svg("text", { x: 11, y: 19, class: "mtad-node-text" }, fitting(text, boxWidth() - 20)));
  box.append(clip, svg("text", { x: 11, y: 36, class: "mtad-node-figures" }, name));
  group.append(box);
  return group;
}

function onTreeKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || !pass.nodes.length) return;
  const rows = shownView.rows;
  const count = rows.length;
  const here = activeNode;
  const { end } = pass.size;
  const accepted = rows.map((row, index) => [row, index]).filter(([row]) => row.s === "accepted");
  const lastAccepted = accepted.length ? accepted[accepted.length - 1][1] : -1;
  const children = (parent) => rows.map((row, index) => (row.p === parent ? index : -1)).filter((index) => index >= 0)
    .sort((one, two) => rows[one].y - rows[two].y);
  const depthOf = (index) => (index < count ? rows[index].d : end + 1 + index - count);
  const lineOf = (index) => (index < count ? rows[index].y : 0);
  let next = here;
  if (event.key === "ArrowRight") {
    if (here >= count) next = Math.min(pass.nodes.length - 1, here + 1);
    else if (here === lastAccepted && shownView.final.length) next = count;
    else next = children(here)[0] ?? here;
  } else if (event.key === "ArrowLeft") {
    if (here > count) next = here - 1;
    else if (here === count) next = lastAccepted >= 0 ? lastAccepted : here;
    else next = rows[here].p >= 0 ? rows[here].p : here;
  } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const sign = event.key === "ArrowDown" ? 1 : -1;
    const same = pass.nodes.map((_, index) => index)
      .filter((index) => depthOf(index) === depthOf(here) && sign * (lineOf(index) - lineOf(here)) > 0)
      .sort((one, two) => sign * (lineOf(one) - lineOf(two)));
    next = same[0] ?? here;
  } else if (event.key === "Home") next = 0;
  else if (event.key === "End") next = pass.nodes.length - 1;
  else return;
  event.preventDefault();
  activate(next, true);
}

function activate(index, reveal) {
  const nodes = pass.nodes || [];
  if (!nodes.length) {
    pass.details.replaceChildren();
    return;
  }
  for (const each of passBox.querySelectorAll("[aria-selected='true'], tr.mtad-now")) {
    if (each.hasAttribute("aria-selected")) each.setAttribute("aria-selected", "false");
    else each.classList.remove("mtad-now");
  }
  activeNode = Math.min(index, nodes.length - 1);
  const chosen = nodes[activeNode];
  chosen.setAttribute("aria-selected", "true");
  pass.tree.setAttribute("aria-activedescendant", chosen.id);
  if (reveal) chosen.scrollIntoView({ block: "nearest", inline: "nearest" });
  const row = shownView.rows[activeNode];
  const lines = [];
  if (row) {
    lines.push(["token", row.t], ["id", String(row.id)], ["depth", String(row.d)], ["state", row.s]);
    shownView.columns.forEach((name, k) => lines.push([name, k < row.c.length ? row.c[k] : row.w]));
    const table = pass.rows && pass.rows[activeNode];
    if (table) table.classList.add("mtad-now");
  } else {
    const [text, name, logprob] = chosen.dataset.final.split("\u0000");
    lines.push(["token", text], ["state", name + ", by the target's own pass"], ["log p, unfiltered", logprob]);
  }
  pass.details.replaceChildren(pairs(lines));
}

// ---------------------------------------------------------------- chart
function drawChart() {
  if (shownView.chart.kind === "ratio") drawRatioChart(shownView.chart);
  else drawTestChart(shownView.chart);
}

function niceTicks(low, high, most) {
  const raw = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= raw);
  const ticks = [];
  for (let k = Math.ceil(low / step); k * step <= high; k += 1) ticks.push(k * step);
  return [ticks, Math.max(0, -Math.floor(Math.log10(step) + 1e-9))];
}

function drawRatioChart(chart) {
  const { width, columns } = pass.size;
  const top = 36, bottom = 44;
  const infinite = chart.values.includes("-inf");
  let low = chart.low, high = chart.high;
  const what = whatIfShown() ? tauLog() : null;
  if (what !== null) {
    low = Math.min(low, what - 0.06 * (high - low));
    high = Math.max(high, what + 0.06 * (high - low));
  }
  const floor = CHART - bottom - (infinite ? 20 : 0);
  const y = (value) => {
    if (value === "-inf") return CHART - bottom - 6;
    if (value === "inf") return top - 4;
    return floor - ((Math.max(low, Math.min(high, value)) - low) / (high - low)) * (floor - top);
  };
  const out = (value) => typeof value === "number" && (value < low || value > high);
  const nodes = [];
  const x0 = middle(0), x1 = width - 6;
  const lineY = y(chart.log_tau);
  nodes.push(svg("rect", { x: x0, y: top, width: x1 - x0, height: Math.max(0, lineY - top), class: "mtad-zone" }));
  const [ticks, digits] = niceTicks(low, high, 4);
  for (const tick of ticks) {
    nodes.push(svg("path", { d: "M" + x0 + " " + y(tick) + "H" + x1, class: "mtad-gridline" }));
    nodes.push(svg("text", { x: x0 - 7, y: y(tick) + 4, "text-anchor": "end", class: "mtad-tick" }, tick.toFixed(digits).replace("-", "−")));
  }
  if (infinite) {
    nodes.push(svg("path", { d: "M" + x0 + " " + (floor + 7) + "H" + x1, class: "mtad-break-line" }));
    nodes.push(svg("text", { x: x0 - 7, y: y("-inf") + 4, "text-anchor": "end", class: "mtad-tick" }, "−∞"));
  }
  nodes.push(svg("path", { d: "M" + x0 + " " + top + "V" + (CHART - bottom), class: "mtad-axis" }));
  const axis = shownView.columns[4].replace("log p/q", "joint log p/q");
  nodes.push(svg("text", { x: 6, y: 13, class: "mtad-tick" }, axis + "; above the line log τ it passes"));
  for (let d = 1; d <= Math.min(columns, chart.depth); d += 1) {
    nodes.push(svg("text", { x: middle(d), y: CHART - 24, "text-anchor": "middle", class: "mtad-tick" }, "depth " + d));
  }
  // Where the longest passing prefix ends.
  const endX = middle(chart.end);
  nodes.push(svg("path", { d: "M" + endX + " " + top + "V" + (CHART - bottom + 5), class: "mtad-end-line" }));
  const anchor = chart.end === 0 ? "start" : endX > width - 150 ? "end" : "middle";
  nodes.push(svg("text", { x: chart.end === 0 ? x0 - 46 : anchor === "end" ? endX + 60 : endX, y: CHART - 7, "text-anchor": anchor, class: "mtad-end-text" }, "▲ " + chart.end_text));
  // The line of the rule.
  nodes.push(svg("path", { d: "M" + x0 + " " + lineY + "H" + x1, class: "mtad-tau-line" }));
  // Curves: all leaves thin, then the chosen path.
  const rows = shownView.rows;
  const point = (index) => [middle(rows[index].d), y(chart.values[index])];
  const path = (indices) => "M" + x0 + " " + y(0) + indices.map((index) => "L" + point(index).map((v) => v.toFixed(1)).join(" ")).join("");
  const block = chart.curves.length === 1;
  for (const curve of chart.curves) nodes.push(svg("path", { d: path(curve), class: block ? "mtad-ratio-rest" : "mtad-ratio-other" }));
  if (chart.chosen.length) nodes.push(svg("path", { d: path(chart.chosen), class: "mtad-ratio-chosen" }));
  nodes.push(svg("circle", { cx: x0, cy: y(0), r: 3.5, class: "mtad-origin" }));
  const strong = new Set(block ? chart.curves[0] : chart.chosen);
  const labels = [];
  chart.values.forEach((value, index) => {
    if (value === null) return;
    const [px, py] = point(index);
    const big = strong.has(index);
    const passed = rows[index].v;
    if (passed) nodes.push(svg("circle", { cx: px, cy: py, r: big ? 5.5 : 3, class: "mtad-pass" + (big ? "" : " mtad-faint") }));
    else {
      const s = big ? 5 : 2.5;
      nodes.push(svg("path", { d: "M" + (px - s) + " " + (py - s) + "l" + 2 * s + " " + 2 * s + "M" + (px - s) + " " + (py + s) + "l" + 2 * s + " " + -2 * s, class: "mtad-fail" + (big ? "" : " mtad-faint") }));
    }
    if (!big) return;
    const below = py < top + 18 || (passed === false && py > lineY && py < CHART - bottom - 24);
    const far = out(value) ? (value < low ? " ▼" : " ▲") : "";
    labels.push(svg("text", { x: px + 9, y: py + (below ? 15 : -7), class: "mtad-point-text" }, chart.labels[index] + far));
  });
  nodes.push(...labels);
  // Where no curve runs through the label; above the line's beginning if there is no such place.
  const ink = chart.curves.flatMap((curve) => along([[x0, y(0)], ...curve.map(point)]));
  const size = chart.line.length * 7.2;
  const left = x0 + 8, right = x1 - 4 - size;
  const fits = width <= passBox.clientWidth; // or the right end would have to be scrolled to
  const places = (fits ? [right, left] : [left]).flatMap((x) => [[x, 15], [x, -7]]);
  const [labelX, shift] =
    places.find(([x, dy]) => {
      const [above, below] = dy > 0 ? [lineY - 2, lineY + 21] : [lineY - 21, lineY + 2];
      return !ink.some(([px, py]) => px >= x - 6 && px <= x + size + 6 && py >= above && py <= below);
    }) || [left, -7];
  const atEnd = labelX === right;
  nodes.push(svg("text", { x: atEnd ? x1 - 4 : left, y: lineY + shift, "text-anchor": atEnd ? "end" : "start", class: "mtad-tau-text" }, chart.line));
  // A dip that a later token rescues: from the last of it to the token that lifts it back.
  if (chart.dips.length) {
    const dip = chart.dips[chart.dips.length - 1];
    const dipRow = chart.chosen[dip - 1];
    let back = dip + 1;
    while (back < chart.chosen.length && rows[chart.chosen[back - 1]].v !== true) back += 1;
    const [ax, ay] = point(dipRow);
    const [bx, by] = point(chart.chosen[back - 1]);
    const low_ = Math.min(CHART - bottom - 6, Math.max(ay, by) + 34);
    nodes.push(svg("path", { d: "M" + ax + " " + (ay + 9) + "C" + ax + " " + low_ + " " + bx + " " + low_ + " " + bx + " " + (by + 10), class: "mtad-rescue" }));
    nodes.push(svg("path", { d: "M" + (bx - 4.5) + " " + (by + 16) + "L" + bx + " " + (by + 9) + "L" + (bx + 4.5) + " " + (by + 16), class: "mtad-rescue" }));
    nodes.push(svg("text", { x: (ax + bx) / 2, y: Math.min(CHART - bottom - 4, low_ + 9), "text-anchor": "middle", class: "mtad-rescue-text" }, "◆ dip, rescued"));
  }
  if (what !== null) {
    const wy = y(what);
    nodes.push(svg("path", { d: "M" + x0 + " " + wy + "H" + x1, class: "mtad-if-line" }));
    const length = whatIfLength(current);
    nodes.push(svg("text", { x: x0 + 8, y: wy + (what > chart.log_tau ? -6 : 15), class: "mtad-point-text" }, "what if τ = " + tauText() + ": accepts " + length));
  }
  pass.chart.replaceChildren(...nodes);
}

// Points along a polyline, 24 a piece and its end.
function along(line) {
  const points = line.slice(1).flatMap(([bx, by], k) => {
    const [ax, ay] = line[k];
    return Array.from({ length: 24 }, (_, i) => [ax + ((bx - ax) * i) / 24, ay + ((by - ay) * i) / 24]);
  });
  return [...points, line[line.length - 1]];
}

function drawTestChart(chart) {
  const { width } = pass.size;
  const top = 34, bottom = 42;
  const base = CHART - bottom;
  const y = (value) => {
    if (value === "inf") return top;
    if (value === "-inf" || value === null) return base;
    return base - ((Math.max(chart.low, Math.min(chart.high, value)) - chart.low) / (chart.high - chart.low)) * (base - top);
  };
  const nodes = [];
  const x0 = middle(0), x1 = width - 6;
  for (const [value, text] of chart.ticks) {
    nodes.push(svg("path", { d: "M" + x0 + " " + y(value) + "H" + x1, class: "mtad-gridline" }));
    nodes.push(svg("text", { x: x0 - 7, y: y(value) + 4, "text-anchor": "end", class: "mtad-tick" }, text));
  }
  nodes.push(svg("path", { d: "M" + x0 + " " + base + "H" + x1, class: "mtad-axis" }));
  const heading = chart.bars
    ? "bar: " + chart.score + ", at most 1; line: " + chart.threshold + ". Accepted where the line falls into the bar"
    : "dot: " + chart.score + "; line: " + chart.threshold + ". Accepted where the dot is above the line";
  nodes.push(svg("text", { x: 6, y: 13, class: "mtad-tick" }, heading));
  const byDepth = new Map();
  for (const item of chart.items) byDepth.set(item.d, [...(byDepth.get(item.d) || []), item]);
  for (const [d, items] of byDepth) {
    nodes.push(svg("text", { x: middle(d), y: CHART - 7, "text-anchor": "middle", class: "mtad-tick" }, "depth " + d));
    const slot = boxWidth() / items.length;
    const bar = Math.min(34, slot * 0.42);
    items.forEach((item, k) => {
      const c = boxX(d) + slot * (k + 0.5);
      if (item.v === null) {
        nodes.push(svg("text", { x: c, y: base + 16, "text-anchor": "middle", class: "mtad-tick" }, "not tested"));
        return;
      }
      const sy = y(item.score), ty = y(item.threshold);
      const late = dropped(shownView.rows[item.row], shownView);
      const state = late ? "mtad-test-late" : item.v ? "mtad-test-pass" : "mtad-test-fail";
      if (chart.bars) nodes.push(svg("rect", { x: c - bar / 2, y: sy, width: bar, height: Math.max(1, base - sy), class: "mtad-test " + state }));
      else {
        nodes.push(svg("path", { d: "M" + c + " " + ty + "V" + sy, class: "mtad-stem" }));
        nodes.push(svg("circle", { cx: c, cy: sy, r: 5.5, class: late ? "mtad-test-late" : item.v ? "mtad-pass" : "mtad-miss" }));
      }
      nodes.push(svg("path", { d: "M" + (c - bar / 2 - 6) + " " + ty + "h" + (bar + 12), class: "mtad-threshold" }));
      nodes.push(svg("text", { x: c, y: base + 16, "text-anchor": "middle", class: late ? "mtad-tick" : "mtad-node-mark" }, late ? "dropped" : item.v ? "✓" : "✗"));
      // The score above its bar, or above the line where that would run through it.
      const labelY = ty < sy + 4 && sy - ty < 22 ? ty - 6 : sy - (chart.bars ? 5 : 9);
      nodes.push(svg("text", { x: c, y: labelY, "text-anchor": "middle", class: "mtad-point-text" }, item.st));
      if (items.length <= 2) nodes.push(svg("text", { x: c + bar / 2 + 9, y: ty + 4, class: "mtad-tick" }, item.tt));
    });
  }
  pass.chart.replaceChildren(...nodes);
}

// ---------------------------------------------------------------- numbers
function numbers(view) {
  const box = make("details", "mtad-more mtad-numbers");
  box.open = numbers.open !== false;
  box.addEventListener("toggle", () => { numbers.open = box.open; });
  const scroll = make("div", "mtad-scroll");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "Figures of the draft, scrolls");
  const table = make("table", "mtad-grid");
  const top = make("tr");
  for (const name of ["draft token", "depth", ...view.columns, ""]) {
    const cell = make(name ? "th" : "td", "", name);
    if (name) cell.scope = "col";
    top.append(cell);
  }
  const thead = make("thead");
  thead.append(top);
  const tbody = make("tbody");
  pass.rows = view.rows.map((row) => {
    const line = make("tr");
    const name = make("th");
    name.scope = "row";
    name.append(make("bdi", row.s === "accepted" ? "mtad-tok mtad-a" : row.s === "rejected" ? "mtad-x" : "mtad-plain", row.t));
    line.append(name, make("td", "", String(row.d)));
    for (const text of row.c) line.append(make("td", "", text));
    line.append(make("td", "", row.w), make("td", "", row.s));
    tbody.append(line);
    return line;
  });
  table.append(thead, tbody);
  scroll.append(table);
  box.append(make("summary", "", "The same in numbers"), scroll);
  if (view.hidden) box.append(make("p", "mtad-details-hint", view.hidden.toLocaleString("en") + " more nodes are in the trace; the drawing stops here."));
  return box;
}

// ---------------------------------------------------------------- alternatives
function alternatives(view) {
  const box = make("section", "mtad-part");
  box.append(make("h5", "mtad-part-title", "What else the target might have said"));
  const list = make("div", "mtad-alts");
  list.tabIndex = 0;
  list.setAttribute("role", "region");
  list.setAttribute("aria-label", "The target's alternatives at each emitted token, scrolls sideways");
  for (const entry of view.alternatives) {
    const card = make("table", "mtad-alternatives");
    const caption = make("caption");
    caption.append(make("bdi", "mtad-tok " + CLASSES[entry.k], entry.t));
    const tbody = make("tbody");
    for (const [text, share, figure, chosen] of entry.list) {
      const line = make("tr", chosen ? "mtad-said" : "");
      const name = make("th");
      name.scope = "row";
      name.append(make("bdi", "", text), make("span", "mtad-hidden", chosen ? ", emitted" : ""));
      const cell = make("td", "mtad-share");
      const bar = make("span", "mtad-bar-p");
      bar.style.width = Math.round(share * 100) + "%";
      cell.append(bar);
      line.append(name, cell, make("td", "", figure));
      tbody.append(line);
    }
    card.append(caption, tbody);
    list.append(card);
  }
  box.append(list, make("p", "mtad-details-hint", "Probabilities of the target itself, before any filter, at temperature 1."));
  if (view.more) box.append(make("p", "mtad-details-hint", view.more.toLocaleString("en") + " more tokens were emitted in this pass."));
  return box;
}

// ---------------------------------------------------------------- bound
const gap = { job: "", key: "", i: -1, state: "", text: "" };

function bound(view) {
  const data = view.bound;
  const box = make("section", "mtad-part mtad-bound");
  box.append(make("h5", "mtad-part-title", "How far from the best block?"));
  pass.bound = box;
  if (data.why) {
    box.append(make("p", "mtad-bound-line", data.why));
    return box;
  }
  const certified = make("p", "mtad-bound-line", "Certified for the accepted prefix x: log p(x) − log q(x) = ");
  certified.append(make("b", "", data.certified), " > log τ = " + data.log_tau + ".");
  const rows = data.terms.length ? data.terms : [["draft's error on y", "log p(y)/q(y)", "–"], ["search gap", "log q(y)/q(x)", "–"], ["slack", "log 1/τ", data.log_tau.startsWith("−") ? data.log_tau.slice(1) : "−" + data.log_tau]];
  const table = make("table", "mtad-grid mtad-terms");
  const tbody = make("tbody");
  const line = (name, meaning, figure, className) => {
    const row = make("tr", className);
    const th = make("th", "", name);
    th.scope = "row";
    row.append(th, make("td", "", meaning), make("td", "", figure));
    tbody.append(row);
  };
  line("true gap", "log p(y) − log p(x)", data.gap, "mtad-total");
  line("is under their sum", "", data.limit, "mtad-total");
  for (const [name, meaning, figure] of rows) line(name, meaning, figure, "");
  table.append(tbody);
  box.append(certified, make("p", "mtad-details-hint", "y is the best block of the same length that the target has, found by exact joint decoding. In nats."), table);
  if (data.best.length) {
    const best = make("p", "mtad-bound-line", "y: ");
    data.best.forEach((text) => best.append(make("bdi", "mtad-plain", text), " "));
    box.append(best);
  }
  if (data.reason) box.append(make("p", "mtad-details-hint", "–: " + data.reason + "."));
  pass.gapControls = make("div", "mtad-walk");
  pass.gapText = make("p", "mtad-bound-line");
  if (data.measurable) {
    pass.measure = button("Measure the true gap", () => {
      say("");
      trigger("measure_gap", { key: open.key, i: shownView.i });
    });
    pass.stopGap = button("Stop", async () => {
      let text = null;
      try { text = await server.stop_gap({ job: gap.job }); } catch { say(AWAY); }
      if (typeof text === "string") receive(text);
    });
    pass.gapControls.append(pass.measure, pass.stopGap);
    box.append(pass.gapControls);
  }
  box.append(pass.gapText);
  showGap();
  return box;
}

function showGap() {
  if (!pass.gapText) return;
  const mine = shownView && open && gap.key === open.key && gap.i === shownView.i;
  const busy = gap.state === "waiting" || gap.state === "running";
  setText(pass.gapText, mine ? gap.text : busy ? "Another pass is being measured." : "");
  if (pass.measure) pass.measure.disabled = busy;
  if (pass.stopGap) pass.stopGap.hidden = !busy;
}

async function takeGap(message) {
  Object.assign(gap, message);
  showGap();
  if (message.state === "waiting" || message.state === "running") return;
  setText(spoken, message.text);
  if (message.state !== "done" || !open || open.key !== message.key) return;
  const chunk = Math.floor(message.i / open.chunk);
  open.chunks.delete(chunk);
  await fetchChunk(chunk);
}

// ---------------------------------------------------------------- messages
function fillPicker(list) {
  const keep = open ? open.key : "";
  const groups = list.groups.map(([title, entries]) => {
    const group = make("optgroup");
    group.label = title;
    for (const [key, label] of entries) {
      const option = make("option", "", label);
      option.value = key;
      group.append(option);
    }
    return group;
  });
  picker.replaceChildren(...groups);
  if (keep && ![...picker.options].some((option) => option.value === keep)) {
    const option = make("option", "", open.head.label);
    option.value = keep;
    picker.prepend(option);
  }
  picker.value = keep;
}

function receive(text) {
  if (typeof text !== "string" || !text) return;
  const message = JSON.parse(text);
  if (message.error !== undefined) say(message.error);
  if (message.list) {
    fillPicker(message.list);
    const better = !open || (!chosenByHand && message.list.own && message.list.prefer !== open.key);
    if (message.open === undefined && better) openTrace(message.list.prefer);
  }
  if (message.open !== undefined) {
    chosenByHand = true;
    openTrace(message.open);
  }
  if (message.gap) takeGap(message.gap);
}

new ResizeObserver(() => {
  if (!open || !root.clientWidth || root.clientWidth === receive.width) return;
  receive.width = root.clientWidth;
  drawStrip();
  drawCurve();
  if (shownView) {
    drawStage();
    activate(activeNode, false);
  }
}).observe(root);

watch("value", () => receive(props.value));
receive(props.value);
