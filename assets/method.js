// Fills in what the prose of the Method tab leaves open. Texts through textContent only.

const root = element.querySelector(".mtad-method");
const at = (name) => root.querySelector("." + name);
const contents = at("mtad-contents");
for (const heading of root.querySelectorAll("h2")) {
  const link = make("a", "", heading.textContent);
  link.href = "#" + heading.id;
  heading.tabIndex = -1;
  link.addEventListener("click", (event) => {
    event.preventDefault();
    heading.scrollIntoView({ block: "start" });
    heading.focus({ preventScroll: true });
  });
  contents.append(link);
}

function table(columns, rows, label) {
  const scroll = make("div", "mtad-scroll");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", label + ", scrolls sideways");
  const grid = make("table", "mtad-table");
  const head = make("tr");
  for (const name of columns) {
    const cell = make("th", "", name);
    cell.scope = "col";
    head.append(cell);
  }
  const top = make("thead");
  top.append(head);
  const body = make("tbody");
  for (const [first, ...cells] of rows) {
    const line = make("tr");
    const name = make("th");
    name.scope = "row";
    name.append(first);
    line.append(name);
    for (const cell of cells) {
      const box = make("td");
      box.append(cell);
      line.append(box);
    }
    body.append(line);
  }
  grid.append(top, body);
  scroll.append(grid);
  return scroll;
}

// ---------------------------------------------------------------- the drawn pass
function drawExample(pass) {
  const box = at("mtad-example");
  if (!pass) {
    box.replaceChildren(make("p", "", "This installation has no recorded pass."));
    return;
  }
  const picture = svg("svg", { class: "mtad-pass", role: "img" });
  picture.setAttribute("aria-label", pass.sentences.join(" "));
  const steps = make("ol", "mtad-pass-steps");
  for (const sentence of pass.sentences) steps.append(make("li", "", sentence));
  const rows = pass.rows.map((row, k) => {
    const text = make("bdi", row.accepted ? "mtad-tok mtad-a" : "mtad-x", row.text);
    const verdict = row.passes ? "✓ yes" : k < pass.accepted ? "✗ no, a later one passes" : "✗ no";
    const name = make("span");
    name.append(text, make("span", "mtad-hidden", row.accepted ? " accepted" : " rejected"));
    return [name, ...row.cells, verdict];
  });
  const words = make("div", "mtad-pass-words");
  words.append(steps, table(pass.columns, rows, "Figures of the pass"));
  box.replaceChildren(picture, words, make("p", "mtad-source", pass.source));
  const redraw = () => drawPass(picture, pass);
  redraw();
  new ResizeObserver(redraw).observe(box);
}

function drawPass(picture, pass) {
  const width = Math.max(290, Math.floor(picture.getBoundingClientRect().width || 480));
  const small = width < 400;
  const height = 356;
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  picture.setAttribute("height", height);
  const count = pass.rows.length;
  const left = 44;
  const gap = (width - left - 6) / (count + 1);
  const X = (k) => left + gap * (k + 0.5);
  const [top, bottom] = [140, height - 34];
  const known = pass.rows.map((row) => row.ratio).filter((ratio) => ratio !== null);
  const low = Math.min(pass.limit, ...known) - 0.5;
  const high = Math.max(0, ...known) + 0.25;
  const Y = (value) => bottom - ((value - low) / (high - low)) * (bottom - top);
  const parts = [];
  const text = (x, y, content, name, anchor) =>
    parts.push(svg("text", { x, y, class: name || "", "text-anchor": anchor || "middle" }, content));
  const line = (d, name) => parts.push(svg("path", { d, class: name }));

  text(2, 14, pass.context.slice(small ? -34 : -48), "mtad-pass-faint", "start");
  // The block and the bonus, as boxes.
  const half = Math.min(gap / 2 - 3, 46);
  const cell = (k, label, kind, caption) => {
    const x = X(k);
    parts.push(svg("rect", { x: x - half, y: 34, width: 2 * half, height: 30, rx: 4, class: "mtad-pass-" + kind }));
    const room = Math.floor((2 * half) / 7.2);
    const shown = label.trim().length > room ? label.trim().slice(0, room - 1) + "…" : label.trim();
    text(x, 54, shown, "mtad-pass-token");
    if (kind === "accepted") line(`M${x - half + 6} 60H${x + half - 6}`, "mtad-pass-solid");
    if (kind === "bonus") line(`M${x - half + 6} 59H${x + half - 6}M${x - half + 6} 62H${x + half - 6}`, "mtad-pass-double");
    if (kind === "rejected") line(`M${x - half + 6} 49H${x + half - 6}`, "mtad-pass-strike");
    text(x, 80, caption, "mtad-pass-faint");
  };
  const captions = small ? [["accepted", "✓"], ["rejected", "✗"]] : [["accepted", "accepted"], ["rejected", "rejected"]];
  pass.rows.forEach((row, k) => cell(k, row.text, ...captions[row.accepted ? 0 : 1]));
  cell(count, pass.bonus, "bonus", "bonus");

  // The ratio against depth.
  line(`M${left} ${top - 8}V${bottom}H${width - 4}`, "mtad-frame");
  const title = svg("text", { x: 0, y: 0, class: "mtad-pass-faint", "text-anchor": "middle",
    transform: `translate(12 ${(top + bottom) / 2}) rotate(-90)` }, "joint ratio, log p/q");
  parts.push(title);
  for (let value = Math.ceil(low); value <= high; value += 1) {
    line(`M${left} ${Y(value)}H${width - 4}`, "mtad-grid");
    text(left - 6, Y(value) + 4, String(value).replace("-", "−"), "mtad-pass-faint", "end");
  }
  line(`M${left} ${Y(pass.limit)}H${width - 4}`, "mtad-pass-limit");
  text(width - 6, Y(pass.limit) - 6, small ? "log τ" : pass.limit_text, "mtad-pass-halo", "end");
  const end = X(pass.accepted - 1);
  line(`M${end} ${top - 18}V${bottom}`, "mtad-pass-end");
  text(end, top - 24, "accepted up to here", "mtad-pass-note");
  let path = `M${left} ${Y(0)}`;
  pass.rows.forEach((row, k) => {
    if (row.ratio !== null) path += `L${X(k)} ${Y(row.ratio)}`;
  });
  line(path, "mtad-pass-ratio");
  pass.rows.forEach((row, k) => {
    if (row.ratio === null) return;
    const [x, y] = [X(k), Y(row.ratio)];
    parts.push(
      row.passes
        ? svg("circle", { cx: x, cy: y, r: 5.5, class: "mtad-pass-yes" })
        : svg("path", { d: `M${x - 5} ${y - 5}L${x + 5} ${y + 5}M${x + 5} ${y - 5}L${x - 5} ${y + 5}`, class: "mtad-pass-no" })
    );
    // Beside the line, on the side where it does not run.
    const below = !row.passes;
    text(x, y + (below ? 20 : -11), row.cells[2], "mtad-pass-figure");
  });
  pass.rows.forEach((_, k) => text(X(k), bottom + 18, String(k + 1), "mtad-pass-faint"));
  text(X(count), bottom + 18, "depth", "mtad-pass-faint");
  picture.replaceChildren(...parts);
}

// ---------------------------------------------------------------- tables and facts
function drawMethods(methods) {
  const rows = methods.map((method) => {
    const name = make("span");
    name.append(make("span", "mtad-block-line", method.title), make("span", "mtad-note", method.id));
    return [name, method.summary, method.lossless ? "= yes" : "≈ no", method.draft ? "yes" : "no", method.citation];
  });
  at("mtad-all").replaceChildren(
    table(["method", "what one iteration does", "lossless", "draft", "source"], rows, "All methods")
  );
}

function drawFacts(facts, notes) {
  const boxes = facts.map(([title, entries]) => {
    const box = make("div", "mtad-fact-box");
    const list = make("dl");
    for (const [name, value] of entries) list.append(make("dt", "", name), make("dd", "", value));
    box.append(make("h3", "mtad-title", title), list);
    return box;
  });
  const remarks = make("ul", "mtad-notes");
  fillList(remarks, notes);
  at("mtad-facts-here").replaceChildren(...boxes, remarks);
}

function drawCitation(bibtex) {
  const text = make("pre", "mtad-bibtex", bibtex);
  text.tabIndex = 0;
  text.setAttribute("aria-label", "BibTeX entry");
  const copy = make("button", "mtad-save", "Copy BibTeX");
  copy.type = "button";
  const said = make("span", "mtad-note");
  said.setAttribute("role", "status");
  copy.addEventListener("click", async () => {
    // Browsers give the clipboard to secure pages only; elsewhere the text is marked.
    try {
      await navigator.clipboard.writeText(bibtex);
      setText(said, "Copied.");
    } catch {
      getSelection().selectAllChildren(text);
      setText(said, "Selected: copy it with Ctrl+C.");
    }
  });
  const foot = make("div", "mtad-cite-foot");
  foot.append(copy, said);
  at("mtad-cite").replaceChildren(text, foot);
}

let filled = false;
function read(text) {
  if (typeof text !== "string" || !text) return;
  const message = JSON.parse(text);
  if (!filled) {
    drawExample(message.example);
    drawMethods(message.methods);
    drawCitation(message.bibtex);
  }
  filled = true;
  setText(at("mtad-energy-here"), message.energy);
  drawFacts(message.facts, message.notes);
}

watch("value", () => read(props.value));
read(props.value);
