// Under and above the lanes of a comparison: the charts, and the replay of the race.
//
// Stands behind chart.js and lanes.js and follows their board. A replay moves one clock over the
// recorded seconds of all steps: it hides the blocks that had not been there yet and puts back the
// meters of that moment. Between two frames it touches only the blocks that came or went, and of
// those at most RACE_BLOCKS a lane, so that a long run costs no long task.

const RACE_BLOCKS = 120;
const SPEEDS = [0.25, 0.5, 1, 2, 4];
// Charts of a run that goes on are drawn at most ten times a second.
const CHART_MILLISECONDS = 100;
const still = matchMedia("(prefers-reduced-motion: reduce)");

// ---------------------------------------------------------------- the parts
const raceBox = make("div", "mtad-race");
raceBox.setAttribute("role", "group");
raceBox.setAttribute("aria-label", "Replay of the race");
const playButton = make("button", "mtad-save mtad-play");
playButton.type = "button";
const scrub = make("input", "mtad-scrub");
scrub.type = "range";
scrub.min = 0;
scrub.setAttribute("aria-label", "Time of the replay");
const clock = make("output", "mtad-clock");
const speed = make("select", "mtad-speed");
speed.setAttribute("aria-label", "Speed of the replay");
speed.append(
  ...SPEEDS.map((factor) => {
    const option = make("option", "", factor + "×");
    option.value = factor;
    return option;
  })
);
const raceNote = make("span", "mtad-race-note");
raceBox.append(playButton, scrub, clock, speed, raceNote);
raceBox.hidden = true;
board.top.append(raceBox);

const tokensChart = new Chart("Tokens against seconds", "seconds of decoding", "tokens", true);
const wattsChart = new Chart("Watts over time", "seconds of decoding", "W", false);
const chartsBox = make("section", "mtad-charts");
const chartFoot = make("div", "mtad-foot");
const png = make("button", "mtad-save", "Chart (PNG)");
png.type = "button";
const wattsPng = make("button", "mtad-save", "Watts (PNG)");
wattsPng.type = "button";
const powerNote = make("span", "mtad-message");
chartFoot.append(powerNote, png, wattsPng);
chartsBox.append(tokensChart.box, wattsChart.box, chartFoot);
chartsBox.hidden = true;
board.under.append(chartsBox);
png.addEventListener("click", () => savePicture(tokensChart, "tokens"));
wattsPng.addEventListener("click", () => savePicture(wattsChart, "watts"));

async function savePicture(chart, what) {
  saveFile(fileName(board.run, what, "png"), await chart.png(), "image/png");
}

// ---------------------------------------------------------------- charts
const drawing = { at: 0, timer: 0, points: [] };

// [seconds, tokens so far] of a lane, grown with its steps.
function pointsOf(lane, index) {
  let kept = drawing.points[index];
  if (!kept || kept.lane !== lane || kept.epoch !== lane.epoch) {
    kept = drawing.points[index] = { lane, epoch: lane.epoch, points: [], tokens: 0 };
  }
  for (let k = kept.points.length; k < lane.steps.length; k += 1) {
    kept.tokens += lane.steps[k].t.length;
    kept.points.push([lane.steps[k].s, kept.tokens]);
  }
  return kept.points;
}

function drawCharts() {
  drawing.at = performance.now();
  drawing.timer = 0;
  const series = board.lanes
    .map((lane, style) => ({ name: lane.short, style, points: pointsOf(lane, style) }))
    .filter((one) => one.points.length);
  chartsBox.hidden = !series.length;
  if (!series.length) return;
  tokensChart.draw(series);
  const power = (board.last && board.last.power) || {};
  const watts = board.lanes
    .map((lane, style) => ({ name: lane.short, style, points: power[lane.method] || [] }))
    .filter((one) => one.points.length);
  wattsChart.box.hidden = wattsPng.hidden = !watts.length;
  setText(powerNote, watts.length || !board.over ? "" : "No chart of watts: no joules were measured over time.");
  if (watts.length) wattsChart.draw(watts);
  const about = board.last && board.last.about;
  const caption = about ? about.models + " on " + about.machine : "";
  tokensChart.caption = wattsChart.caption = caption;
}

function chartsDue() {
  if (drawing.timer) return;
  const wait = Math.max(0, drawing.at + CHART_MILLISECONDS - performance.now());
  drawing.timer = setTimeout(drawCharts, wait);
}

new ResizeObserver(() => chartsDue()).observe(chartsBox);

// ---------------------------------------------------------------- the replay
const race = { run: null, length: 0, time: 0, playing: false, frame: 0, last: 0, lanes: [] };

function follow(message) {
  if (!message.over) {
    if (race.run !== null) closeRace();
    chartsDue();
    return;
  }
  const size = board.lanes.reduce((sum, lane) => sum + lane.steps.length, 0);
  if (race.run === message.run && race.size === size) return;
  openRace(message.run, size);
  drawCharts();
}

function openRace(run, size) {
  closeRace();
  const lanes = board.lanes.filter((lane) => lane.steps.length);
  if (!lanes.length) return;
  race.run = run;
  race.size = size;
  race.lanes = lanes.map((lane) => ({
    lane, drawn: lane.blocks.length, step: lane.steps.length,
    end: lane.steps[lane.steps.length - 1].s,
  }));
  race.length = Math.max(...race.lanes.map((one) => one.end));
  race.time = race.length;
  // A second-long race is over before it is seen: slow enough for four seconds, where possible.
  speed.value = SPEEDS.filter((factor) => race.length / factor >= 4).pop() || SPEEDS[0];
  scrub.max = race.length;
  scrub.step = race.length / 500;
  raceBox.hidden = false;
  showClock();
}

function closeRace() {
  stopRace();
  for (const one of race.lanes) {
    for (const block of one.lane.blocks) block.classList.remove("mtad-later");
    one.lane.shown = Infinity;
  }
  race.run = null;
  race.lanes = [];
  raceBox.hidden = true;
  tokensChart.mark(null);
  wattsChart.mark(null);
}

// Steps of a lane that had ended at a time.
function stepsAt(steps, time) {
  let low = 0, high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle].s <= time) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Brings the page to race.time; false if there is more to do than one frame may take.
function showMoment() {
  const ended = race.time >= race.length;
  let done = true;
  const moves = race.lanes.map((one) => {
    const target = ended ? one.lane.blocks.length : stepsAt(one.lane.steps, race.time);
    const way = Math.max(-RACE_BLOCKS, Math.min(RACE_BLOCKS, target - one.drawn));
    const drawn = one.drawn + way;
    if (drawn !== target) done = false;
    const edge = one.lane.blocks[Math.max(0, drawn - 1)];
    // All that is measured is measured before anything is written.
    return { one, drawn, bottom: way ? edge.offsetTop + edge.offsetHeight : null };
  });
  // Scrolled while the layout still holds: after a change every scroll would lay out the page anew.
  for (const { one, drawn, bottom } of moves) {
    if (bottom !== null) one.lane.text.scrollTop = drawn ? bottom - one.height : 0;
  }
  for (const { one, drawn } of moves) {
    const { lane } = one;
    for (let k = one.drawn; k < drawn; k += 1) lane.blocks[k].classList.remove("mtad-later");
    for (let k = one.drawn - 1; k >= drawn; k -= 1) lane.blocks[k].classList.add("mtad-later");
    one.drawn = lane.shown = drawn;
    showFigures(one, drawn);
  }
  showClock();
  return done;
}

function showFigures(one, count) {
  const { lane } = one;
  if (count === one.step) return;
  one.step = count;
  const whole = count === lane.steps.length;
  setText(lane.state, whole ? lane.state_text + " at " + one.end.toFixed(2) + " s" : count ? "writing" : "ready");
  lane.box.dataset.race = whole ? "done" : "running";
  if (whole) return lane.updateMeters(lane.final);
  const figures = count ? lane.steps[count - 1].m : [];
  lane.updateMeters(
    lane.final.map((meter, k) => {
      const [value, note] = figures[k] || ["–", count ? "known at the end" : ""];
      return { id: meter.id, label: meter.label, value, note, title: note };
    })
  );
}

function showClock() {
  const at = race.time.toFixed(2), whole = race.length.toFixed(2);
  setText(clock, at + " of " + whole + " s");
  scrub.value = race.time;
  scrub.setAttribute("aria-valuetext", at + " of " + whole + " seconds");
  const now = race.time < race.length ? race.time : null;
  tokensChart.mark(now);
  wattsChart.mark(now);
  setText(playButton, race.playing ? "❚❚ Pause" : "▶ Replay");
  playButton.disabled = still.matches && !race.playing;
  setText(
    raceNote,
    still.matches
      ? "Your system asks for less motion: move the slider. Runs made one after another, on one clock."
      : "A replay of runs made one after another, on one clock."
  );
}

function tick(now) {
  race.frame = 0;
  // A tab that was in the background goes on where it was.
  const passed = Math.min(0.25, (now - race.last) / 1000);
  race.last = now;
  // Time stands still until the page has caught up with it.
  if (race.playing && race.settled) race.time = Math.min(race.length, race.time + passed * Number(speed.value));
  race.settled = showMoment();
  if (race.playing && race.settled && race.time >= race.length) {
    stopRace();
    say("The replay has ended.");
    showClock();
    return;
  }
  if (race.playing || !race.settled) askFrame();
}

function askFrame() {
  if (race.frame) return;
  race.frame = requestAnimationFrame(tick);
}

function startRace() {
  if (still.matches || race.run === null) return;
  if (race.time >= race.length) race.time = 0;
  race.playing = true;
  moveRace();
}

// Shows race.time, over as many frames as it takes.
function moveRace() {
  for (const one of race.lanes) one.height = one.lane.text.clientHeight - 6;
  race.settled = false;
  race.last = performance.now();
  showClock();
  askFrame();
}

function stopRace() {
  race.playing = false;
  if (race.frame) cancelAnimationFrame(race.frame);
  race.frame = 0;
}

playButton.addEventListener("click", () => {
  if (!race.playing) return startRace();
  race.playing = false;
  showClock();
});
scrub.addEventListener("input", () => {
  race.playing = false;
  race.time = Math.min(race.length, Number(scrub.value));
  moveRace();
});
still.addEventListener("change", () => {
  if (still.matches && race.playing) race.playing = false;
  if (race.run !== null) showClock();
});

board.followers.push(follow);
if (board.last) follow(board.last);
