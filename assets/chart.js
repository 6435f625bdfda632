// Line charts in SVG, small enough to be drawn anew a few times a second, and their PNG.
//
// A series is {name, style, points: [[x, y], …]}, x rising; `style` 0 to 3 names its colour and its
// dashes, which are those of the lane of the same number. Knows no board.

const CHART_POINTS = 400;
const CHART_HEIGHT = 230;
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];

// About `count` round numbers from 0 to `top`.
function chartTicks(top, count) {
  const raw = top / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((k) => k >= raw);
  const ticks = [];
  for (let k = 0; k * step <= top * 1.0001; k += 1) ticks.push(k * step);
  // As many digits as tell the steps apart.
  return { ticks, digits: [0, 1, 2, 3, 4].find((n) => Number(step.toFixed(n)) === Number(step.toPrecision(3))) ?? 4 };
}

// Every point of a short series, each n-th of a long one and always the last.
function chartThin(points) {
  const every = Math.ceil(points.length / CHART_POINTS);
  return every < 2 ? points : points.filter((_, k) => k % every === 0 || k === points.length - 1);
}

class Chart {
  // stairs: a value holds until the next one, as emitted tokens do.
  constructor(title, xLabel, yLabel, stairs) {
    this.title = title;
    this.labels = [xLabel, yLabel];
    this.stairs = stairs;
    this.caption = "";
    this.box = make("figure", "mtad-chart");
    this.svg = svg("svg", { role: "img", "aria-label": title });
    this.data = make("details", "mtad-chart-data");
    this.table = make("table", "mtad-table");
    const scroll = make("div", "mtad-scroll");
    scroll.append(this.table);
    this.data.append(make("summary", "", title + ", as a table"), scroll);
    this.data.addEventListener("toggle", () => this.data.open && this.fillTable());
    this.box.append(this.svg, this.data);
    this.series = [];
    this.time = null;
  }

  draw(series) {
    this.series = series;
    // In a hidden tab there is no width; whoever shows it draws again.
    const width = Math.round(this.box.clientWidth);
    if (!width) return;
    const narrow = width < 620;
    const left = 52, right = 14, top = 62, bottom = 40;
    const height = CHART_HEIGHT + top;
    const ends = series.map((one) => one.points[one.points.length - 1] || [0, 0]);
    const xTop = Math.max(0.05, ...ends.map((end) => end[0]));
    const yTop = Math.max(1, ...series.flatMap((one) => one.points.map((point) => point[1]))) * 1.04;
    const x = (value) => left + (value / xTop) * (width - left - right);
    const y = (value) => height - bottom - (value / yTop) * (height - bottom - top);
    this.x = x;
    const all = [svg("text", { x: 0, y: 14, class: "mtad-chart-title" }, this.title)];
    const across = chartTicks(yTop, 4);
    for (const tick of across.ticks) {
      const at = y(tick).toFixed(1);
      all.push(
        svg("line", { x1: left, x2: width - right, y1: at, y2: at, class: "mtad-chart-grid" }),
        svg("text", { x: left - 8, y: at, dy: "0.35em", class: "mtad-tick mtad-end" },
          tick.toFixed(across.digits))
      );
    }
    const along = chartTicks(xTop, narrow ? 4 : 8);
    for (const tick of along.ticks) {
      all.push(
        svg("text", { x: x(tick).toFixed(1), y: height - bottom + 18, class: "mtad-tick mtad-middle" },
          tick.toFixed(along.digits))
      );
    }
    const [xLabel, yLabel] = this.labels;
    all.push(
      svg("text", { x: width - right, y: height - 4, class: "mtad-tick mtad-end" }, xLabel),
      svg("text", { x: 0, y: top - 10, class: "mtad-tick" }, yLabel)
    );
    series.forEach((one) => {
      all.push(svg("path", {
        d: this.path(one.points, x, y), class: "mtad-line mtad-series-" + one.style,
        "stroke-dasharray": DASHES[one.style],
      }));
    });
    series.forEach((one, k) => {
      const [cx, cy] = [x(ends[k][0]), y(ends[k][1])];
      all.push(svg("circle", { cx, cy, r: 3.5, class: "mtad-dot mtad-series-" + one.style }));
    });
    // In a row of their own: beside the ends of the lines they would lie on other lines.
    all.push(...this.keys(series, width));
    this.cursor = svg("line", { y1: top, y2: height - bottom, class: "mtad-cursor" });
    all.push(this.cursor);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("height", height);
    this.svg.replaceChildren(...all);
    this.mark(this.time);
    this.times = along.ticks.slice(1).map((tick) => [tick, tick.toFixed(along.digits)]);
    if (this.data.open) this.fillTable();
  }

  // The figures of the chart at its ticks and at its end, for those who do not see lines.
  fillTable() {
    if (!this.times) return;
    const end = Math.max(...this.series.map(({ points }) => (points.length ? points[points.length - 1][0] : 0)));
    const times = this.times.filter(([time]) => time < end);
    const cells = (tag, texts) => {
      const row = make("tr");
      texts.forEach((text, k) => {
        const cell = make(k ? tag : "th", "", text);
        if (cell.tagName === "TH") cell.scope = tag === "th" ? "col" : "row";
        row.append(cell);
      });
      return row;
    };
    const head = make("thead"), body = make("tbody");
    head.append(cells("th", [this.labels[0], ...this.series.map(({ name }) => name)]));
    for (const [time, text] of [...times, [end, end.toFixed(2)]]) {
      body.append(cells("td", [text, ...this.series.map(({ points }) => this.valueAt(points, time))]));
    }
    this.table.replaceChildren(head, body);
  }

  // A dash behind the end of a series; what stairs have reached stays.
  valueAt(points, time) {
    if (this.stairs) {
      let value = 0;
      for (const point of points) if (point[0] <= time) value = point[1];
      return value.toLocaleString("en");
    }
    const point = points.find(([at]) => at >= time);
    return point ? point[1].toFixed(1) : "–";
  }

  path(points, x, y) {
    let d = "M" + x(0).toFixed(1) + " " + y(this.stairs || !points.length ? 0 : points[0][1]).toFixed(1);
    for (const [at, value] of chartThin(points)) {
      d += this.stairs
        ? "H" + x(at).toFixed(1) + "V" + y(value).toFixed(1)
        : "L" + x(at).toFixed(1) + " " + y(value).toFixed(1);
    }
    return d;
  }

  keys(series, width) {
    const each = Math.min(160, width / series.length);
    return series.flatMap((one, k) => [
      svg("line", {
        x1: k * each, x2: k * each + 18, y1: 34, y2: 34, class: "mtad-line mtad-series-" + one.style,
        "stroke-dasharray": DASHES[one.style],
      }),
      svg("text", { x: k * each + 22, y: 34, dy: "0.35em", class: "mtad-tick" }, one.name),
    ]);
  }

  // A line at a time of the replay; none for null.
  mark(seconds) {
    this.time = seconds;
    if (!this.cursor) return;
    this.cursor.style.display = seconds === null ? "none" : "";
    if (seconds !== null) this.cursor.setAttribute("transform", `translate(${this.x(seconds).toFixed(1)} 0)`);
  }

  // The drawing as it stands, on the page's own ground, as a PNG of twice the size.
  async png() {
    const [width, height] = ["width", "height"].map((name) => Number(this.svg.getAttribute(name)));
    const copy = this.svg.cloneNode(true);
    const before = this.svg.querySelectorAll("*");
    const look = ["fill", "stroke", "stroke-width", "font-size", "font-weight", "font-family",
      "text-anchor", "display", "opacity"];
    copy.querySelectorAll("*").forEach((node, k) => {
      const style = getComputedStyle(before[k]);
      for (const name of look) node.style.setProperty(name, style.getPropertyValue(name));
    });
    const style = getComputedStyle(this.box);
    const caption = svg("text", { x: 0, y: height + 14 }, this.caption);
    caption.style.cssText = `fill:${style.color};font-size:11px;font-family:${style.fontFamily}`;
    copy.append(caption);
    const full = [width + 24, height + 44];
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    copy.setAttribute("viewBox", `-12 -12 ${full[0]} ${full[1]}`);
    copy.setAttribute("width", full[0]);
    copy.setAttribute("height", full[1]);
    const image = new Image();
    image.src = "data:image/svg+xml;charset=utf-8," +
      encodeURIComponent(new XMLSerializer().serializeToString(copy));
    await image.decode();
    const canvas = make("canvas");
    [canvas.width, canvas.height] = full.map((size) => 2 * size);
    const context = canvas.getContext("2d");
    context.fillStyle = getComputedStyle(document.body).backgroundColor;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    return new Promise((done) => canvas.toBlob(done, "image/png"));
  }
}
