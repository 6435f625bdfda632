// The token view: draws the board that mtad/ui/board.py describes.
//
// Runs as the js_on_load of a gr.HTML component: `element`, `props`, `server` and `watch` are its
// arguments. Model text and every other text of a message reaches the page through textContent
// only; nothing here parses HTML. A message holds the steps that follow those already here; if
// some are missing (messages are merged while the tab is in the background), `server.resync` is
// asked for the rest.
//
// Scripts that stand behind this one may follow the board: `board.followers` are called with every
// message that has been drawn. `board.top` and `board.under` are places for what they draw.

const KINDS = { a: "accepted", b: "bonus", c: "corrected", s: "sampled" };
const ARROWS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
const root = element.querySelector(".mtad-board");

// ---------------------------------------------------------------- frame around the lanes
const error = make("div", "mtad-error");
error.setAttribute("role", "alert");
const status = make("div", "mtad-status");
const notes = make("ul", "mtad-notes");
const spoken = make("div", "mtad-hidden");
spoken.setAttribute("role", "status");
spoken.setAttribute("aria-live", "polite");
const source = make("div", "mtad-run-source");
const legend = makeLegend();
const topBox = make("div", "mtad-top");
const lanesBox = make("div", "mtad-lanes");
const underBox = make("div", "mtad-under");
const tableBox = make("div", "mtad-results");
const hint = make(
  "p",
  "mtad-hint",
  "Press Run: each method answers the same prompt with the same models, one after another. " +
    "You will see which words came for free from the small draft model, and what each answer cost."
);
const bar = make("div", "mtad-lane-bar");
bar.append(legend, topBox);
root.replaceChildren(error, status, source, bar, hint, lanesBox, notes, underBox, tableBox, spoken);

function makeLegend() {
  const box = make("div", "mtad-legend");
  const entries = [
    ["mtad-a", "accepted", "from the draft, confirmed by the target"],
    ["mtad-b", "bonus", "added by the target's own pass"],
    ["mtad-s", "sampled or corrected", "written by the target"],
  ];
  for (const [className, name, meaning] of entries) {
    const item = make("span", "mtad-key");
    item.title = meaning;
    item.append(make("span", "mtad-tok " + className, name));
    box.append(item);
  }
  const fold = make("label", "mtad-key mtad-fold");
  fold.title = "offered by the draft, refused by the target";
  const tick = make("input");
  tick.type = "checkbox";
  tick.checked = true;
  tick.setAttribute("aria-label", "show rejected tokens");
  tick.addEventListener("change", () => root.classList.toggle("mtad-folded", !tick.checked));
  fold.append(tick, make("span", "mtad-x", "rejected"));
  box.append(fold);
  return box;
}

// ---------------------------------------------------------------- one lane
class Lane {
  constructor(view, index) {
    this.method = view.method;
    this.columns = view.columns;
    this.steps = [];
    this.blocks = [];
    this.epoch = view.epoch;
    this.active = -1;
    this.id = "mtad-lane-" + index;
    this.short = view.short;
    this.state_text = view.state_text;
    this.final = view.meters;
    // How many blocks there are to see; a replay shows fewer than there are.
    this.shown = Infinity;

    this.box = make("section", "mtad-lane mtad-series-" + index);
    const title = make("h3", "mtad-title", view.title);
    title.id = this.id + "-title";
    title.title = view.summary;
    this.box.setAttribute("aria-labelledby", title.id);
    const badge = make("span", view.lossless ? "mtad-badge mtad-exact" : "mtad-badge");
    badge.textContent = view.lossless ? "= lossless" : "≈ not lossless";
    badge.title = view.lossless
      ? "The tokens have exactly the distribution of sampling the target."
      : "The tokens do not have the target's sampling distribution.";
    this.state = make("span", "mtad-state");
    const head = make("header", "mtad-head");
    head.append(title, badge, this.state);
    this.meters = make("dl", "mtad-meters");
    this.meterNodes = {};

    this.text = make("div", "mtad-text");
    this.text.tabIndex = 0;
    this.text.dir = "auto";
    this.text.setAttribute("role", "listbox");
    this.text.setAttribute("aria-orientation", "horizontal");
    this.text.setAttribute("aria-label", view.title + ": blocks of the answer");
    this.provisional = make("span", "mtad-provisional");
    this.text.append(this.provisional);
    this.details = make("div", "mtad-details");
    this.details.id = this.id + "-details";
    this.foot = make("footer", "mtad-foot");
    this.message = make("span", "mtad-message");
    this.save = make("button", "mtad-save", "Trace (JSON)");
    this.save.type = "button";
    this.save.hidden = true;
    this.save.addEventListener("click", () => download(this.method));
    this.foot.append(this.message, this.save);
    this.box.append(head, this.meters, this.text, this.details, this.foot);
    this.showDetails(null);
    this.listen();
  }

  listen() {
    const blockAt = (event) => {
      const node = event.target instanceof Element ? event.target.closest(".mtad-block") : null;
      return node ? this.blocks.indexOf(node) : -1;
    };
    this.text.addEventListener("pointerover", (event) => {
      const index = blockAt(event);
      if (index >= 0) this.activate(index, false);
    });
    this.text.addEventListener("click", (event) => {
      const index = blockAt(event);
      if (index >= 0) this.activate(index, false);
    });
    this.text.addEventListener("focus", () => {
      if (this.active < 0 && this.blocks.length) this.activate(0, false);
    });
    this.text.addEventListener("keydown", (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey || !this.blocks.length) return;
      const last = Math.min(this.shown, this.blocks.length) - 1;
      if (last < 0) return;
      let index;
      if (event.key === "Home") index = 0;
      else if (event.key === "End") index = last;
      else if (event.key in ARROWS) {
        index = Math.max(0, Math.min(last, this.active + ARROWS[event.key]));
      } else return;
      event.preventDefault();
      this.activate(index, true);
    });
  }

  activate(index, scroll) {
    if (index === this.active) return;
    const before = this.blocks[this.active];
    if (before) before.setAttribute("aria-selected", "false");
    this.active = index;
    const block = this.blocks[index];
    const step = this.steps[index];
    block.setAttribute("aria-selected", "true");
    const facts = step.f.map(([name, figure]) => name + " " + figure).join(", ");
    block.setAttribute("aria-label", step.t.map(([, text]) => text).join("") + ". " + step.h + ". " + facts);
    this.text.setAttribute("aria-activedescendant", block.id);
    if (scroll) block.scrollIntoView({ block: "nearest", inline: "nearest" });
    this.showDetails(step);
  }

  showDetails(step) {
    if (!step) {
      this.details.replaceChildren(
        make("p", "mtad-details-hint", "Point at a word, tap it, or walk the blocks with ← and →.")
      );
      return;
    }
    const head = make("p", "mtad-details-head", step.h);
    const facts = make("p", "mtad-facts");
    for (const [name, figure] of step.f) {
      const fact = make("span", "mtad-fact", name + " ");
      fact.append(make("b", "", figure));
      facts.append(fact);
    }
    this.details.replaceChildren(head, facts);
    if (step.n && step.n.length) this.details.append(this.figures(step.n));
  }

  figures(rows) {
    const box = make("div", "mtad-figures");
    const table = make("table");
    const headings = make("tr");
    for (const name of this.columns) {
      const cell = make("th", "", name);
      cell.scope = "col";
      headings.append(cell);
    }
    const body = make("tbody");
    for (const [accepted, text, ...figures] of rows) {
      const passed = figures.pop();
      const row = make("tr");
      const name = make("th");
      name.scope = "row";
      const shown = make("bdi", accepted ? "mtad-tok mtad-a" : "mtad-x", text);
      name.append(shown, make("span", "mtad-hidden", accepted ? " accepted" : " rejected"));
      row.append(name);
      for (const figure of figures) row.append(make("td", "", figure));
      let verdict = "not tested";
      if (passed === true) verdict = "✓ yes";
      if (passed === false) verdict = accepted ? "✗ no, a later one passes" : "✗ no";
      row.append(make("td", "", verdict));
      body.append(row);
    }
    const head = make("thead");
    head.append(headings);
    table.append(head, body);
    box.append(table);
    return box;
  }

  // True if the lane now has all steps that the message knows of.
  update(view) {
    if (view.epoch !== this.epoch) {
      if (view.from !== 0) return false;
      this.clear(view.epoch);
    }
    if (view.from <= this.steps.length) this.append(view.steps.slice(this.steps.length - view.from));
    setText(this.provisional, view.provisional);
    this.box.dataset.state = view.state;
    this.state_text = view.state_text;
    setText(this.state, view.state_text);
    setText(this.message, view.message);
    this.save.hidden = !view.trace;
    this.final = view.meters;
    this.updateMeters(view.meters);
    return this.steps.length >= view.count;
  }

  clear(epoch) {
    this.epoch = epoch;
    this.steps = [];
    for (const block of this.blocks) block.remove();
    this.blocks = [];
    this.active = -1;
    this.text.removeAttribute("aria-activedescendant");
    this.showDetails(null);
  }

  append(steps) {
    if (!steps.length) return;
    const atEnd = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 40;
    const fragment = document.createDocumentFragment();
    for (const step of steps) {
      const block = this.block(step);
      this.steps.push(step);
      this.blocks.push(block);
      fragment.append(block);
    }
    this.text.insertBefore(fragment, this.provisional);
    if (atEnd) this.text.scrollTop = this.text.scrollHeight;
  }

  block(step) {
    const block = make("span", "mtad-block");
    block.id = this.id + "-" + this.epoch + "-" + step.i;
    block.setAttribute("role", "option");
    block.setAttribute("aria-selected", "false");
    const struck = () => {
      const box = make("span", step.alt ? "mtad-struck mtad-alt" : "mtad-struck");
      for (const text of step.x) box.append(make("s", "mtad-x", text));
      return box;
    };
    let pending = Boolean(step.x);
    for (const [kind, text] of step.t) {
      if (pending && kind !== "a") {
        block.append(struck());
        pending = false;
      }
      const token = make("span", "mtad-tok mtad-" + kind, text);
      token.dataset.kind = KINDS[kind];
      if (text === "") token.classList.add("mtad-void");
      else if (/^[\r\n]+$/.test(text)) token.classList.add("mtad-break");
      block.append(token);
    }
    if (pending) block.append(struck());
    const words = [...step.t.map(([, text]) => text), ...(step.x || [])].join("");
    if (!words.trim()) block.setAttribute("aria-label", /[\r\n]/.test(words) ? "line break" : "space");
    return block;
  }

  updateMeters(meters) {
    for (const meter of meters) {
      let nodes = this.meterNodes[meter.id];
      if (!nodes) {
        const cell = make("div", "mtad-meter");
        cell.dataset.meter = meter.id;
        nodes = { value: make("dd", "mtad-value"), note: make("dd", "mtad-note"), cell };
        cell.append(make("dt", "", meter.label), nodes.value, nodes.note);
        this.meters.append(cell);
        this.meterNodes[meter.id] = nodes;
      }
      setText(nodes.value, meter.value);
      setText(nodes.note, meter.note);
      if (nodes.cell.title !== meter.title) nodes.cell.title = meter.title;
    }
  }
}

// ---------------------------------------------------------------- results
function showTable(table) {
  if (!table) {
    tableBox.replaceChildren();
    return;
  }
  const scroll = make("div", "mtad-scroll");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "Results, scrolls sideways");
  const grid = make("table", "mtad-table");
  const headings = make("tr");
  for (const name of table.columns) {
    const cell = make("th", "", name);
    cell.scope = "col";
    headings.append(cell);
  }
  const head = make("thead");
  head.append(headings);
  const body = make("tbody");
  const reasons = new Set();
  for (const row of table.rows) {
    const line = make("tr");
    const name = make("th", "", row.title + (row.stopped ? " (stopped early)" : ""));
    name.scope = "row";
    line.append(name);
    row.cells.forEach(([text, why], index) => {
      const cell = make("td", "", text);
      if (why) {
        cell.title = why;
        reasons.add(table.columns[index + 1] + " –: " + why);
      }
      line.append(cell);
    });
    body.append(line);
  }
  grid.append(head, body);
  scroll.append(grid);
  const foot = make("div", "mtad-foot");
  const reason = make("span", "mtad-message", [...reasons].join(" · "));
  const csv = make("button", "mtad-save", "Table (CSV)");
  csv.type = "button";
  csv.addEventListener("click", () => downloadTable());
  const save = make("button", "mtad-save", "All traces (JSON)");
  save.type = "button";
  save.addEventListener("click", () => download(""));
  foot.append(reason, csv, save);
  tableBox.replaceChildren(make("h3", "mtad-title", "Results"), scroll, foot);
}

async function ask(question, request) {
  let answer;
  try {
    answer = await question(request);
  } catch {
    answer = null;
  }
  if (typeof answer === "string") return answer;
  setText(error, "The server no longer keeps this run. Run it again to download it.");
  return null;
}

async function download(method) {
  const run = board.run;
  const answer = await ask(server.traces, { run, method });
  if (answer !== null) saveFile(fileName(run, method, "json"), answer, "application/json");
}

async function downloadTable() {
  const run = board.run;
  const answer = await ask(server.table, { run });
  if (answer !== null) saveFile(fileName(run, "table", "csv"), answer, "text/csv");
}

function fileName(run, what, ending) {
  const name = run.startsWith("recorded-") ? run : run.slice(0, 8);
  return "mtad-" + (what || "comparison") + "-" + name + "." + ending;
}

// ---------------------------------------------------------------- where it was made
const origin = make("span", "mtad-run-origin");
const gallery = make("select", "mtad-gallery");
gallery.setAttribute("aria-label", "Recorded comparisons");
gallery.addEventListener("change", async () => {
  const answer = gallery.value && (await ask(server.recording, gallery.value));
  if (answer) read(answer);
});

async function fillGallery() {
  let choices = [];
  try {
    choices = await server.recordings({});
  } catch {
    // Without the list the recording that came with the page still stands.
  }
  if (!Array.isArray(choices) || !choices.length) return;
  const first = make("option", "", "Show a recorded comparison…");
  first.value = "";
  gallery.replaceChildren(
    first,
    ...choices.map(([id, label]) => {
      const option = make("option", "", label);
      option.value = id;
      return option;
    })
  );
  source.append(gallery);
  choose();
}

// The choice says what is on show; while a run goes on nothing else can be shown.
function choose() {
  const name = board.recorded ? board.run.slice("recorded-".length) : "";
  if (gallery.value !== name) gallery.value = name;
  gallery.disabled = Boolean(board.run) && !board.over;
}

function showOrigin(message) {
  const about = message.about;
  origin.replaceChildren();
  if (!about) return;
  const add = (name, value) => {
    const part = make("span", "mtad-origin-part", name + " ");
    part.append(make("b", "", value));
    origin.append(part);
  };
  if (message.recorded) origin.append(make("span", "mtad-recorded", "Recorded " + about.made));
  add("on", about.machine);
  add("with", about.models);
  if (message.recorded) add("prompt:", about.prompt);
}

// ---------------------------------------------------------------- messages
const board = {
  run: null, tick: 0, lanes: [], asking: false, recorded: false, over: false,
  followers: [], last: null, top: topBox, under: underBox,
};
const say = (text) => setText(spoken, text);

function receive(message) {
  setText(error, message.error || "");
  if (message.say) say(message.say);
  if (message.run === null) return;
  const opened = message.run !== board.run;
  if (opened) open(message);
  // An answer to a resync may come after a newer message: its steps count, its state does not.
  const stale = message.tick < board.tick;
  let whole = true;
  message.lanes.forEach((view, index) => {
    const lane = board.lanes[index];
    if (stale) {
      if (view.epoch === lane.epoch && view.from <= lane.steps.length) {
        lane.append(view.steps.slice(lane.steps.length - view.from));
      }
    } else if (!lane.update(view)) whole = false;
  });
  if (stale) return;
  board.tick = message.tick;
  setText(status, message.status);
  fillList(notes, message.notes);
  board.recorded = message.recorded;
  board.over = message.over;
  // A recorded comparison is no run of this page that is over.
  root.classList.toggle("mtad-over", message.over && !message.recorded);
  showOrigin(message);
  choose();
  showTable(message.table);
  board.last = message;
  // What has been recorded is read from its beginning.
  if (message.recorded && opened) for (const lane of board.lanes) lane.text.scrollTop = 0;
  for (const follow of board.followers) follow(message);
  if (!whole) resync();
}

function open(message) {
  board.run = message.run;
  board.tick = 0;
  board.lanes = message.lanes.map((view, index) => new Lane(view, (props.prefix || "") + index));
  lanesBox.replaceChildren(...board.lanes.map((lane) => lane.box));
  say(message.say);
  hint.hidden = true;
  legend.classList.add("mtad-shown");
}

async function resync() {
  if (board.asking) return;
  board.asking = true;
  const have = {};
  for (const lane of board.lanes) have[lane.method] = [lane.epoch, lane.steps.length];
  try {
    const answer = await server.resync({ run: board.run, have });
    board.asking = false;
    if (typeof answer === "string") read(answer);
  } catch {
    board.asking = false;
  }
}

function read(text) {
  if (typeof text === "string" && text) receive(JSON.parse(text));
}

source.append(origin);
watch("value", () => read(props.value));
read(props.value);
// Not every page that shows lanes has recordings.
if (server.recordings) fillGallery();
root.classList.add("mtad-ready");
