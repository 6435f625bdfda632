// The conversation: draws what mtad/ui/conversation.py describes.
//
// Every text reaches the page through textContent only; the little Markdown that models write most
// (code in fences and between backticks, bold, headings) is found here and becomes elements, and
// all else, HTML included, stays the text that it is. A message holds everything, or what the
// answer that is being made has gained; whoever missed one asks for the whole.

const root = element.querySelector(".mtad-chat");
const thread = make("div", "mtad-thread");
thread.tabIndex = 0;
thread.setAttribute("role", "region");
thread.setAttribute("aria-label", "Conversation");
const hint = make(
  "p",
  "mtad-hint",
  "Ask something. Below each answer stands what it cost; open it to see which words came for free " +
    "from the small draft model. Retry another way, and the conversation goes on from there."
);
const status = make("div", "mtad-status");
const error = make("div", "mtad-error");
error.setAttribute("role", "alert");
const notes = make("ul", "mtad-notes");
const spoken = make("div", "mtad-hidden");
spoken.setAttribute("role", "status");
spoken.setAttribute("aria-live", "polite");
thread.append(hint);
root.replaceChildren(thread, status, error, notes, spoken);

// ---------------------------------------------------------------- text
// [kind, text, language] of what stands on its own lines: code between fences, headings, the rest.
function blocksOf(text) {
  const blocks = [];
  let lines = [];
  let fence = null;
  let language = "";
  const close = (kind) => {
    const inner = lines.join("\n");
    lines = [];
    if (kind === "code" || inner.trim()) blocks.push([kind, inner, language]);
  };
  for (const line of text.split(/\r\n|\r|\n/)) {
    const mark = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/.exec(line);
    if (fence) {
      if (mark && mark[1][0] === fence[0] && mark[1].length >= fence.length && !mark[2].trim()) {
        close("code");
        fence = null;
      } else lines.push(line);
      continue;
    }
    const heading = /^#{1,6} +(.+?) *#*$/.exec(line);
    if (mark) {
      close("text");
      fence = mark[1];
      language = mark[2].trim();
    } else if (heading) {
      close("text");
      lines = [heading[1]];
      close("heading");
    } else if (!line.trim()) close("text");
    else lines.push(line);
  }
  close(fence ? "code" : "text");
  return blocks;
}

function inline(parent, text) {
  // Split by `code` and **bold**; what is left over is text.
  for (const part of text.split(/(`[^`\n]+`|\*\*[^\s*](?:[^*\n]*[^\s*])?\*\*)/)) {
    if (!part) continue;
    if (part.length > 2 && part[0] === "`" && part.endsWith("`")) {
      parent.append(make("code", "", part.slice(1, -1)));
    } else if (part.length > 4 && part.startsWith("**") && part.endsWith("**")) {
      parent.append(make("strong", "", part.slice(2, -2)));
    } else parent.append(document.createTextNode(part));
  }
}

function blockNode([kind, text, language]) {
  if (kind !== "code") {
    const node = make("p", kind === "heading" ? "mtad-heading" : "");
    node.dir = "auto";
    inline(node, text);
    return node;
  }
  const box = make("div", "mtad-code");
  const bar = make("div", "mtad-code-bar");
  const copy = make("button", "mtad-save", "Copy");
  copy.type = "button";
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      setText(copy, "Copied");
    } catch {
      setText(copy, "Select the text and copy it");
    }
    setTimeout(() => setText(copy, "Copy"), 2000);
  });
  bar.append(make("span", "", language || "code"), copy);
  const pre = make("pre");
  pre.tabIndex = 0;
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", "Code, scrolls sideways");
  pre.append(make("code", "", text));
  box.append(bar, pre);
  return box;
}

// ---------------------------------------------------------------- one answer
class Answer {
  constructor(view) {
    this.key = view.key;
    this.epoch = -1;
    this.text = "";
    this.drawn = [];
    this.box = make("article", "mtad-answer");
    this.title = make("div", "mtad-by", view.title);
    this.body = make("div", "mtad-bubble");
    this.provisional = make("p", "mtad-provisional");
    this.provisional.dir = "auto";
    this.figures = make("div", "mtad-cost");
    this.fold = make("details", "mtad-provenance");
    this.fold.append(make("summary", "", "Which words came for free"));
    this.lane = make("div");
    this.lane.append(make("div", "mtad-board"));
    this.fold.append(this.lane);
    this.fold.addEventListener("toggle", () => this.open());
    this.box.append(this.title, this.body, this.figures, this.fold);
    this.box.setAttribute("aria-label", "Answer by " + view.title);
    this.opened = false;
  }

  // True if nothing is missing.
  update(view) {
    if (view.epoch !== this.epoch) {
      if (view.from !== 0) return false;
      this.text = "";
      this.epoch = view.epoch;
    }
    if (view.from > this.text.length) return false;
    this.text = this.text.slice(0, view.from) + view.text;
    this.box.dataset.state = view.state;
    this.draw(view);
    this.cost(view);
    this.fold.hidden = !view.trace;
    return true;
  }

  draw(view) {
    const blocks = blocksOf(this.text);
    blocks.forEach((block, index) => {
      const old = this.drawn[index];
      if (old && old.block.every((part, k) => part === block[k])) return;
      const node = blockNode(block);
      if (old) old.node.replaceWith(node);
      else this.body.insertBefore(node, this.provisional.isConnected ? this.provisional : null);
      this.drawn[index] = { block, node };
    });
    for (const gone of this.drawn.splice(blocks.length)) gone.node.remove();
    setText(this.provisional, view.provisional);
    if (view.provisional) this.body.append(this.provisional);
    else this.provisional.remove();
    this.body.classList.toggle("mtad-empty", !blocks.length && !view.provisional);
  }

  cost(view) {
    const parts = [];
    for (const [figure, unit, why] of view.figures) {
      const part = make("span", "mtad-figure");
      part.append(make("b", "", figure), document.createTextNode(" " + unit));
      if (why) {
        part.title = why;
        // Why there are no joules stands once, below the conversation.
        const hidden = figure === "–" ? "mtad-hidden" : "";
        part.append(make("span", hidden, hidden ? " (" + why + ")" : ", " + why));
      }
      parts.push(part);
    }
    if (view.message) parts.push(make("span", "mtad-message", view.message));
    this.figures.replaceChildren(...parts);
  }

  async open() {
    if (!this.fold.open || this.opened) return;
    this.opened = true;
    const request = { chat: chat.id, answer: this.key };
    let answer = null;
    try {
      answer = await server.provenance(request);
    } catch {
      // Said below.
    }
    if (typeof answer !== "string") {
      this.opened = false;
      this.fold.open = false;
      setText(error, "The server no longer keeps this answer. Its text stays here until you leave.");
      return;
    }
    const asked = { traces: () => server.trace(request), resync: () => server.provenance(request) };
    const props = { value: answer, prefix: this.key.slice(0, 8) + "-" };
    drawLanes(this.lane, props, asked, () => {});
    this.fold.scrollIntoView({ block: "nearest" });
  }
}

// ---------------------------------------------------------------- messages
const chat = { id: null, generation: -1, tick: 0, version: -1, answers: new Map(), asking: false };

function receive(message) {
  if (message.chat === null) {
    setText(error, message.error);
    if (message.say) setText(spoken, message.say);
    return;
  }
  // What a cleared conversation still has to say, and what was overtaken.
  if (message.generation < chat.generation) return;
  if (message.chat !== chat.id) {
    Object.assign(chat, { id: message.chat, tick: 0, version: -1, answers: new Map() });
    chat.generation = message.generation;
  }
  if (message.tick < chat.tick) return;
  chat.tick = message.tick;
  // What was said of a message that could not be sent stays while the answer grows.
  if (message.turns || message.error) setText(error, message.error);
  setText(status, message.status);
  if (message.say) setText(spoken, message.say);
  root.classList.toggle("mtad-busy", message.busy);
  const atEnd = thread.scrollHeight - thread.scrollTop - thread.clientHeight < 60;
  let whole = true;
  if (message.turns) {
    drawTurns(message);
    fillList(notes, message.notes);
    chat.version = message.version;
  } else {
    const answer = message.version === chat.version && chat.answers.get(message.answer.key);
    whole = Boolean(answer) && answer.update(message.answer);
  }
  if (atEnd) thread.scrollTop = thread.scrollHeight;
  if (!whole) resync();
}

function drawTurns(message) {
  const known = chat.answers;
  chat.answers = new Map();
  const nodes = [];
  const dropped = message.turns.filter((turn) => turn.dropped).length;
  message.turns.forEach((turn, index) => {
    if (dropped && index === dropped) nodes.push(droppedNote(dropped));
    const box = make("section", turn.dropped ? "mtad-turn mtad-dropped" : "mtad-turn");
    box.setAttribute("aria-label", "Turn " + (index + 1));
    const question = make("p", "mtad-question", turn.question);
    question.dir = "auto";
    box.append(question);
    const counting = turn.answers.map((view) => view.text.trim() !== "").lastIndexOf(true);
    turn.answers.forEach((view, place) => {
      const answer = known.get(view.key) || new Answer(view);
      answer.update(view);
      chat.answers.set(view.key, answer);
      const last = place === turn.answers.length - 1;
      // What was retried is folded away; the conversation does not go on from it.
      if (last || place === counting) return box.append(answer.box);
      const before = make("details", "mtad-before");
      before.append(make("summary", "", "Another answer, by " + view.title), answer.box);
      box.append(before);
    });
    nodes.push(box);
  });
  hint.hidden = nodes.length > 0;
  const focused = document.activeElement;
  thread.replaceChildren(hint, ...nodes);
  if (focused && focused !== document.activeElement && thread.contains(focused)) focused.focus();
}

function droppedNote(count) {
  const turns = count === 1 ? "The turn above no longer fits" : `The ${count} turns above no longer fit`;
  return make("p", "mtad-cut", turns + " into the context: the model does not see " +
    (count === 1 ? "it" : "them") + " any more. The system prompt stays.");
}

async function resync() {
  if (chat.asking) return;
  chat.asking = true;
  try {
    const answer = await server.whole({ chat: chat.id });
    chat.asking = false;
    if (typeof answer === "string") read(answer);
  } catch {
    chat.asking = false;
  }
}

function read(text) {
  if (typeof text === "string" && text) receive(JSON.parse(text));
}

watch("value", () => read(props.value));
read(props.value);
