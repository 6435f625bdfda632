// The header: the pair, its device, how far the loading is, and the menu of pairs. Texts by
// textContent only. `trigger` asks the server for another pair.

const pair = element.querySelector(".mtad-pair");
const device = element.querySelector(".mtad-device");
const notes = element.querySelector(".mtad-pair-notes");
const bar = element.querySelector("progress");
const choice = element.querySelector(".mtad-pair-choice");
const menu = choice.querySelector("select");
const next = element.querySelector(".mtad-pair-next");
let drawnMenu = "";
// Why the last choice was refused, for so long that it can be read.
let refused = "", refusedUntil = 0;

function show(text) {
  if (typeof text !== "string" || !text) return;
  const view = JSON.parse(text);
  const ready = view.state === "ready";
  element.firstElementChild.dataset.state = view.state;
  setText(pair, ready ? view.models || view.pair : "Pair " + view.pair);
  setText(device, ready ? view.device : view.text);
  fillList(notes, view.notes);
  const following = view.next || { text: "", fraction: null };
  bar.hidden = view.state !== "loading" && (!view.next || Boolean(following.failed));
  const fraction = view.state === "loading" ? view.fraction : following.fraction;
  if (fraction === null) bar.removeAttribute("value");
  else bar.value = fraction;
  if (view.refused) [refused, refusedUntil] = [view.refused, Date.now() + 15000];
  const refusing = Date.now() < refusedUntil;
  setText(next, refusing ? refused : following.text);
  next.classList.toggle("mtad-failed", refusing || Boolean(following.failed));
  showMenu(view.menu || []);
}

// Drawn anew only when it has changed, so that an open menu stays open.
function showMenu(entries) {
  choice.hidden = entries.length === 0;
  const now = JSON.stringify(entries);
  if (now !== drawnMenu) {
    drawnMenu = now;
    menu.replaceChildren(
      ...entries.map((entry) => {
        const words = entry.why_not ? entry.title + " – " + entry.why_not : entry.title;
        const option = make("option", "", words);
        option.value = entry.id;
        option.disabled = Boolean(entry.why_not);
        return option;
      })
    );
  }
  const chosen = entries.find((entry) => entry.chosen);
  if (chosen) menu.value = chosen.id;
}

menu.addEventListener("change", () => trigger("choose_pair", { id: menu.value }));
watch("value", () => show(props.value));
show(props.value);
